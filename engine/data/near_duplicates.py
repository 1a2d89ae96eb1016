"""Near duplicates: is one picture a crop of another, encoded anew?

A crop moves a perceptual hash by many bits, and embeddings say what is alike, not what is the same.
So the pictures themselves are laid over each other: the best normalised cross-correlation (Lewis
1995) of one whole picture with any window of the other, both made small, grey and free of their
coarse shading. It is looked for among all windows on a coarse grid, then around the best on a finer
one.

How high is too high depends on the data: different chest X-rays agree as well as copies of one
photograph do elsewhere. So the data is asked twice (`calibrate`): how well copies of its own
pictures agree that are made for it here, and how well its different pictures do.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import norm

from engine.core.rng import generator

# Side of the small pictures, in pixels.
SIDE = 64
# What a crop may take from each side of a picture, in shares of that side.
_MOST, _STEP = 0.125, 0.03125
_COARSE, _FINE = 12, 32
# Standard deviation of what counts as shading, in pixels of each grid.
_SHADING = 1.5
_COPIES = 200
_DIFFERENT = 1000
# Of so many pictures that one agrees best with, all but the last may be its copies.
_RANKS = 10
# Share of true copies that the limit may cost.
_MISSED = 0.05
_TINY = 1e-6
# Standard deviation, in grey levels, that JPEG leaves of an even surface.
_EVEN = 1.0
_BLOCK = 4096


@dataclass(frozen=True)
class NearLimit:
    """Pairs that agree at least so well are near duplicates; `coarse` is a first sieve.

    copies: the agreement that 95% of copies made here reach. different: the one that the share
    `quantile` of the pictures reaches with a different one. Where that is not the lower of the two,
    copies cannot be told from alike pictures, and `fine` is None.
    """

    fine: float | None
    coarse: float
    copies: float
    different: float


def thumbnail(pixels: np.ndarray, width: int, height: int, padded: bool) -> np.ndarray:
    """A preprocessed picture (side, side, channels) as grey uint8 (SIDE, SIDE), without the bars
    that `fit: pad` lays around an original of `width` by `height`."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("L")
    if padded:
        side, longest = image.width, max(width, height)
        held = [max(1, round(side * length / longest)) for length in (width, height)]
        # As `PIL.ImageOps.pad` rounds. A `box` of `resize` would let the bars shine through.
        left, top = (round((side - length) * 0.5) for length in held)
        image = image.crop((left, top, left + held[0], top + held[1]))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def of_one_colour(thumbnails: np.ndarray) -> np.ndarray:
    """Which thumbnails, uint8 (n, SIDE²), show nothing: bool (n,)."""
    found = np.empty(len(thumbnails), bool)
    for start in range(0, len(thumbnails), _BLOCK):
        here = slice(start, start + _BLOCK)
        found[here] = thumbnails[here].astype(np.float32).std(1) < _EVEN
    return found


@dataclass(frozen=True)
class Matched:
    """Pairs of pictures, int64 (m, 2), how well they agree on the coarse grid, float32 (m,), and
    the window that does so, int64 (m,): those of the second picture after those of the first."""

    pairs: np.ndarray
    score: np.ndarray
    window: np.ndarray

    def __getitem__(self, held: np.ndarray) -> Matched:
        return Matched(self.pairs[held], self.score[held], self.window[held])


def match(pictures: np.ndarray, pairs: np.ndarray) -> Matched:
    """Lay pairs of pictures over each other. pictures: uint8 (n, SIDE, SIDE)."""
    score = np.full(len(pairs), -1, np.float32)
    window = np.zeros(len(pairs), np.int64)
    used, place = np.unique(pairs, return_inverse=True)
    place = place.reshape(pairs.shape)
    whole = np.empty((len(used), _COARSE**2), np.float32)
    for row, number in enumerate(used):
        whole[row] = _windows(pictures[number], _WHOLE, _WHOLE, _COARSE)[0]
    for role in (0, 1):
        order = np.argsort(place[:, role], kind="stable")
        starts = np.flatnonzero(np.diff(place[order, role], prepend=-1))
        for held in np.split(order, starts[1:]):
            if not len(held):
                continue
            cut = _windows(pictures[pairs[held[0], role]], _GRID, _GRID, _COARSE)
            agreement = cut @ whole[place[held, 1 - role]].T
            best = agreement.argmax(0)
            found = agreement[best, np.arange(len(held))]
            better = found > score[held]
            score[held[better]] = found[better]
            window[held[better]] = best[better] + role * len(cut)
    return Matched(pairs, score, window)


def match_finely(pictures: np.ndarray, matched: Matched) -> np.ndarray:
    """How well pairs agree on the fine grid, around the windows found: float32 (m,)."""
    found = np.empty(len(matched.pairs), np.float32)
    for row, (pair, place) in enumerate(zip(matched.pairs, matched.window, strict=True)):
        role, number = divmod(int(place), len(_GRID) ** 2)
        down, across = (_GRID[part] for part in divmod(number, len(_GRID)))
        cut = _windows(pictures[pair[role]], _around(down), _around(across), _FINE)
        whole = _windows(pictures[pair[1 - role]], _WHOLE, _WHOLE, _FINE)
        found[row] = (cut @ whole[0]).max()
    return found


def calibrate(
    pictures: np.ndarray, matched: Matched, groups: np.ndarray, quantile: float, seed: int
) -> NearLimit:
    """What agreement tells a copy from a different picture in this data.

    matched: pairs of pictures that are alike. groups: of n pictures; those of one group say
    nothing, for they may be alike for good reason. Agreements of different pictures are taken for
    normal after Fisher's transformation (1915), with the middle and the spread of their quartiles:
    what lies in the tail are the twins that are looked for, and they must not set their limit. So
    the agreement asked of each picture is its best, or a later one where most pictures have twins.
    """
    random = generator(seed, "near")
    chosen = random.permutation(np.unique(matched.pairs))[:_COPIES]
    copies = np.stack([_copy(pictures[row], random) for row in chosen])
    both, number = np.concatenate([pictures[chosen], copies]), np.arange(len(chosen))
    own = match(both, np.stack([number, number + len(chosen)], 1))
    reached = _fisher(np.quantile(match_finely(both, own), _MISSED))

    foreign = matched[groups[matched.pairs[:, 0]] != groups[matched.pairs[:, 1]]]
    if not len(foreign.pairs):
        return NearLimit(None, 1.0, float(np.tanh(reached)), 1.0)
    # A first sieve half-way between the two: what is made here is a little better than what a
    # study's preprocessing leaves of a copy.
    sieve = (_fisher(np.median(foreign.score)) + _fisher(np.quantile(own.score, _MISSED))) / 2
    # No lower than half-way from alike pictures to copies: in few pictures the tail is a guess.
    least = (_fisher(np.median(foreign.score)) + reached) / 2
    asked = random.permutation(np.unique(foreign.pairs))[:_DIFFERENT]
    limit = np.inf
    for place in _ranked(foreign, asked).T:
        nearest = _fisher(match_finely(pictures, foreign[np.unique(place[place >= 0])]))
        # What agrees like a copy says nothing of different pictures. Where most pictures have one,
        # the next best of each is asked.
        if len(held := nearest[nearest < reached]) > len(nearest) / 2:
            limit = max(least, _tail(held, quantile))
            break
    return NearLimit(
        float(np.tanh(limit)) if limit < reached else None, float(np.tanh(sieve)),
        float(np.tanh(reached)), float(np.tanh(limit)),
    )  # fmt: skip


def _ranked(matched: Matched, asked: np.ndarray) -> np.ndarray:
    """Of each picture asked, the places of the pairs that hold it, best first: int64 (asked,
    `_RANKS`), -1 where there are fewer."""
    found = np.full((len(asked), _RANKS), -1, np.int64)
    place = np.tile(np.arange(len(matched.pairs)), 2)
    picture = matched.pairs.T.ravel()
    order = np.lexsort((-matched.score[place], picture))
    place, picture = place[order], picture[order]
    first, last = (np.searchsorted(picture, asked, side) for side in ("left", "right"))
    for rank in range(_RANKS):
        there = first + rank < last
        found[there, rank] = place[first[there] + rank]
    return found


def _tail(held: np.ndarray, quantile: float) -> float:
    """What the share `quantile` of a normal distribution with the quartiles of `held` exceeds.

    Twins widen the quartiles; each that is found narrows them again.
    """
    limit = np.inf
    while len(held := held[held < limit]):
        low, middle, high = np.quantile(held, (0.25, 0.5, 0.75))
        limit = middle + (high - low) / 1.349 * norm.isf(max(quantile, 1e-12))
        if held.max() < limit:
            break
    return float(limit)


def near_pairs(
    pictures: np.ndarray, matched: Matched, limit: NearLimit
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that are near duplicates, int64 (k, 2), and their agreement float32 (k,)."""
    if limit.fine is None:
        return np.empty((0, 2), np.int64), np.empty(0, np.float32)
    held = matched[matched.score >= limit.coarse]
    fine = match_finely(pictures, held)
    return held.pairs[fine >= limit.fine], fine[fine >= limit.fine]


Span = tuple[float, float]
Spans = tuple[Span, ...]
_MARGINS = np.arange(0, _MOST + _STEP / 2, _STEP)
_GRID: Spans = tuple((float(low), float(1 - high)) for low in _MARGINS for high in _MARGINS)
_WHOLE: Spans = ((0.0, 1.0),)


@cache
def _around(span: Span) -> Spans:
    moves = (-_STEP / 2, 0.0, _STEP / 2)
    return tuple(
        (max(0.0, span[0] + low), min(1.0, span[1] + high)) for low in moves for high in moves
    )


def _windows(picture: np.ndarray, down: Spans, across: Spans, grid: int) -> np.ndarray:
    """Windows of a picture, each span down with each across, as unit vectors float32 (windows,
    grid²) without shading."""
    held = picture.astype(np.float32)
    (rows, row_shades), (columns, column_shades) = _shrink(down, grid), _shrink(across, grid)
    cut = rows @ held @ columns.T - row_shades @ held @ column_shades.T
    cut = cut.reshape(len(down), grid, len(across), grid).transpose(0, 2, 1, 3)
    flat = cut.reshape(-1, grid * grid)
    flat = flat - flat.mean(1, keepdims=True)
    made: np.ndarray = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), _TINY)
    return made


@cache
def _shrink(spans: Spans, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrix that brings each span of SIDE pixels to `grid` means, (spans * grid, SIDE), and
    the one that brings it to their shading."""
    ends = np.array([np.linspace(low, high, grid + 1) for low, high in spans]) * SIDE
    pixel = np.arange(SIDE)
    low, high = ends[:, :-1, None], ends[:, 1:, None]
    covered = np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, None) / (high - low)
    shades = _blur(grid) @ covered
    first, second = (part.reshape(-1, SIDE).astype(np.float32) for part in (covered, shades))
    return first, second


def _blur(grid: int) -> np.ndarray:
    apart = np.arange(grid)[:, None] - np.arange(grid)
    weight = np.exp(-0.5 * (apart / _SHADING) ** 2)
    made: np.ndarray = weight / weight.sum(1, keepdims=True)
    return made


def _fisher(agreement: Any) -> Any:
    return np.arctanh(np.clip(agreement, -0.9999, 0.9999))


def _copy(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A crop of 3% to 10% of each side, as JPEG of middling quality."""
    left, top, right, bottom = random.uniform(0.03, 0.10, 4) * SIDE
    box = (left, top, SIDE - right, SIDE - bottom)
    image = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)
    target = io.BytesIO()
    image.save(target, "JPEG", quality=int(random.integers(60, 81)))
    return np.asarray(Image.open(target))
