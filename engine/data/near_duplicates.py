"""Near duplicates: is one picture a re-encoded crop of another?

A crop changes many bits of a perceptual hash, and embeddings measure similarity, not identity. So
pictures are compared directly: their agreement is the best normalised cross-correlation (Lewis
1995) of one whole picture with any window of the other, both small, grey and without coarse
shading. The search covers all windows on a coarse grid, then the neighbourhood of the best one on a
finer grid.

The limit depends on the data: different chest X-rays agree as well as copies of a photograph do
elsewhere. So `calibrate` measures both on the data itself: the agreement of its pictures with
copies made here, and the agreement of different pictures. New encodings and slight crops need no
such limit: `same_pictures` recognises them by what differs after an overlay.
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
from engine.data.alignment import (
    CHANGED,
    SAME,
    differences,
    overlaid_differences,
    same_in_place,
)

# Side of the small pictures, in pixels.
SIDE = 64
# Largest crop from each side and step of the search, in shares of that side.
_MOST, _STEP = 0.125, 0.03125
_COARSE, _FINE = 12, 32
# Standard deviation of the blur that extracts shading, in pixels of each grid.
_SHADING = 1.5
_COPIES = 200
_DIFFERENT = 1000
# Copies agree at least this well on the coarse grid; other pairs are not compared further.
_WORTH_COMPARING = 0.95
# Best matches considered per picture; all but the last may be its copies.
_RANKS = 10
# Share of true copies that the limit may miss.
_MISSED = 0.05
_TINY = 1e-6
# Standard deviation of a plain surface after JPEG, in grey levels.
_EVEN = 1.0
_BLOCK = 4096


@dataclass(frozen=True)
class NearLimit:
    """Minimum agreement of near duplicates: `coarse` on the coarse grid, then `fine` on the fine
    grid.

    copies: the agreement that 95% of copies made here reach. different: the agreement that a share
    `quantile` of pictures reaches with a different picture. Where `different` is not below
    `copies`, the two cannot be told apart, and `fine` is None.
    """

    fine: float | None
    coarse: float
    copies: float
    different: float


def thumbnail(pixels: np.ndarray, width: int, height: int, padded: bool) -> np.ndarray:
    """A preprocessed picture (side, side, channels) as grey uint8 (SIDE, SIDE).

    padded: remove the bars that `fit: pad` adds around an original of `width` by `height`.
    """
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("L")
    if padded:
        side, longest = image.width, max(width, height)
        inner = [max(1, round(side * length / longest)) for length in (width, height)]
        # Rounds like `PIL.ImageOps.pad`. The `box` of `resize` would blend the bars in.
        left, top = (round((side - length) * 0.5) for length in inner)
        image = image.crop((left, top, left + inner[0], top + inner[1]))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def of_one_colour(thumbnails: np.ndarray) -> np.ndarray:
    """Whether each thumbnail, uint8 (n, SIDE²), is a plain surface: bool (n,)."""
    plain = np.empty(len(thumbnails), bool)
    for start in range(0, len(thumbnails), _BLOCK):
        here = slice(start, start + _BLOCK)
        plain[here] = thumbnails[here].astype(np.float32).std(1) < _EVEN
    return plain


@dataclass(frozen=True)
class Matched:
    """Pairs of pictures and their best window on the coarse grid.

    pairs: int64 (m, 2). score: agreement, float32 (m,). window: int64 (m,); windows of the second
    picture are numbered after those of the first.
    """

    pairs: np.ndarray
    score: np.ndarray
    window: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> Matched:
        return Matched(self.pairs[chosen], self.score[chosen], self.window[chosen])


def match(pictures: np.ndarray, pairs: np.ndarray) -> Matched:
    """The best window of each pair, int64 (m, 2), on the coarse grid. pictures: uint8 (n, SIDE,
    SIDE)."""
    score = np.full(len(pairs), -1, np.float32)
    window = np.zeros(len(pairs), np.int64)
    whole, place = _whole_pictures(pictures, pairs)
    for role in (0, 1):
        order = np.argsort(place[:, role], kind="stable")
        starts = np.flatnonzero(np.diff(place[order, role], prepend=-1))
        for same in np.split(order, starts[1:]):  # pairs with the same picture in this role
            if not len(same):
                continue
            cut = _windows(pictures[pairs[same[0], role]], _GRID, _GRID, _COARSE)
            agreement = cut @ whole[place[same, 1 - role]].T
            best = agreement.argmax(0)
            highest = agreement[best, np.arange(len(same))]
            better = highest > score[same]
            score[same[better]] = highest[better]
            window[same[better]] = best[better] + role * len(cut)
    return Matched(pairs, score, window)


def match_in_place(pictures: np.ndarray, pairs: np.ndarray) -> Matched:
    """As `match`, but each whole picture with the whole of the other."""
    whole, place = _whole_pictures(pictures, pairs)
    score = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), _BLOCK):
        here = slice(start, start + _BLOCK)
        score[here] = (whole[place[here, 0]] * whole[place[here, 1]]).sum(1)
    return Matched(pairs, score, np.zeros(len(pairs), np.int64))


def _whole_pictures(pictures: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of `pairs` on the coarse grid, a unit vector each, and their places in it,
    int64 (m, 2)."""
    used, place = np.unique(pairs, return_inverse=True)
    whole = np.empty((len(used), _COARSE**2), np.float32)
    for row, number in enumerate(used):
        whole[row] = _windows(pictures[number], _WHOLE, _WHOLE, _COARSE)[0]
    return whole, place.reshape(pairs.shape)


def match_finely(pictures: np.ndarray, matched: Matched) -> np.ndarray:
    """The agreement of each pair on the fine grid, around its best window: float32 (m,)."""
    fine = np.empty(len(matched.pairs), np.float32)
    for row, (pair, place) in enumerate(zip(matched.pairs, matched.window, strict=True)):
        role, number = divmod(int(place), len(_GRID) ** 2)
        down, across = (_GRID[part] for part in divmod(number, len(_GRID)))
        cut = _windows(pictures[pair[role]], _around(down), _around(across), _FINE)
        whole = _windows(pictures[pair[1 - role]], _WHOLE, _WHOLE, _FINE)
        fine[row] = (cut @ whole[0]).max()
    return fine


def calibrate(
    pictures: np.ndarray, matched: Matched, groups: np.ndarray, quantile: float, seed: int
) -> NearLimit:
    """The agreement that separates copies from different pictures in this data.

    matched: pairs of similar pictures. groups: of n pictures; pairs within a group are ignored,
    because they may be similar for good reason. Agreements of different pictures are modelled as
    normal after Fisher's transformation (1915), with median and spread from their quartiles: the
    tail contains the copies to be found, which must not shift the limit. Each picture contributes
    its best agreement, or a later one where most pictures have copies.
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
    # The coarse limit is half-way between the two, because copies made here agree a little better
    # than real copies after the study's preprocessing.
    sieve = (_fisher(np.median(foreign.score)) + _fisher(np.quantile(own.score, _MISSED))) / 2
    # At least half-way from similar pictures to copies: with few pictures the tail is a guess.
    least = (_fisher(np.median(foreign.score)) + reached) / 2
    asked = random.permutation(np.unique(foreign.pairs))[:_DIFFERENT]
    limit = np.inf
    for place in _ranked(foreign, asked).T:
        nearest = _fisher(match_finely(pictures, foreign[np.unique(place[place >= 0])]))
        # Pairs that agree like copies do not count as different pictures. If most pictures have
        # one, the next best match of each is used.
        if len(different := nearest[nearest < reached]) > len(nearest) / 2:
            limit = max(least, _tail(different, quantile))
            break
    return NearLimit(
        float(np.tanh(limit)) if limit < reached else None, float(np.tanh(sieve)),
        float(np.tanh(reached)), float(np.tanh(limit)),
    )  # fmt: skip


def _ranked(matched: Matched, asked: np.ndarray) -> np.ndarray:
    """The rows in `matched` of the pairs with each picture of `asked`, best first: int64 (asked,
    `_RANKS`), padded with -1."""
    ranked = np.full((len(asked), _RANKS), -1, np.int64)
    place = np.tile(np.arange(len(matched.pairs)), 2)
    picture = matched.pairs.T.ravel()
    order = np.lexsort((-matched.score[place], picture))
    place, picture = place[order], picture[order]
    first, last = (np.searchsorted(picture, asked, side) for side in ("left", "right"))
    for rank in range(_RANKS):
        there = first + rank < last
        ranked[there, rank] = place[first[there] + rank]
    return ranked


def _tail(values: np.ndarray, quantile: float) -> float:
    """The upper `quantile` of a normal distribution with the quartiles of `values`.

    Copies widen the quartiles, so values above the limit are removed until none is left.
    """
    limit = np.inf
    while len(values := values[values < limit]):
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
        limit = middle + (high - low) / 1.349 * norm.isf(max(quantile, 1e-12))
        if values.max() < limit:
            break
    return float(limit)


def near_pairs(
    pictures: np.ndarray, matched: Matched, limit: NearLimit
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of near duplicates, int64 (k, 2), and their agreement, float32 (k,).

    Two signals on the same pair: the agreement without shading, and what differs after an overlay.
    Two skirts on the same hanger have the first alone.
    """
    if limit.fine is None:
        return np.empty((0, 2), np.int64), np.empty(0, np.float32)
    candidates = matched[matched.score >= limit.coarse]
    fine = match_finely(pictures, candidates)
    candidates, fine = candidates[fine >= limit.fine], fine[fine >= limit.fine]
    alike = _overlaid(pictures, candidates) <= CHANGED
    return candidates.pairs[alike], fine[alike]


def same_pictures(
    pictures: np.ndarray, matched: Matched, small_side: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of one picture in two encodings, sizes or slight crops, int64 (k, 2), and their
    correlation, float32 (k,).

    small_side: of pictures that are compared without overlay. Pictures of few pixels have little
    that tells them apart, and an overlay removes part of it.
    """
    matched = matched[matched.score >= _WORTH_COMPARING]
    difference = differences(pictures, matched.pairs)
    if small_side is None:
        apart = np.flatnonzero(difference > SAME)
        overlaid = _overlaid(pictures, matched[apart])
        difference[apart] = np.minimum(difference[apart], overlaid)
    same = difference <= (SAME if small_side is None else same_in_place(small_side))
    return matched.pairs[same], np.sqrt(1 - difference[same] ** 2)


def _overlaid(pictures: np.ndarray, matched: Matched) -> np.ndarray:
    """The difference of each pair after an overlay that begins at its best window: float32 (m,)."""
    role, number = np.divmod(matched.window, len(_GRID) ** 2)
    spans = np.asarray(_GRID)[np.stack(np.divmod(number, len(_GRID)), 1)]
    # A span has a start and an end; the overlay takes the distances from both edges.
    edges = np.stack([spans[..., 0], 1 - spans[..., 1]], -1).reshape(-1, 4)
    wider_first = np.where(role[:, None] == 0, matched.pairs, matched.pairs[:, ::-1])
    return overlaid_differences(pictures, wider_first, edges)


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
    """All windows of a picture (each span of `down` with each of `across`) without shading, as unit
    vectors float32 (windows, grid²)."""
    values = picture.astype(np.float32)
    (rows, row_shades), (columns, column_shades) = _shrink(down, grid), _shrink(across, grid)
    cut = rows @ values @ columns.T - row_shades @ values @ column_shades.T
    cut = cut.reshape(len(down), grid, len(across), grid).transpose(0, 2, 1, 3)
    flat = cut.reshape(-1, grid * grid)
    flat = flat - flat.mean(1, keepdims=True)
    unit: np.ndarray = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), _TINY)
    return unit


@cache
def _shrink(spans: Spans, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Two matrices (spans * grid, SIDE): one averages each span of SIDE pixels to `grid` values,
    the other gives the shading of these values."""
    ends = np.array([np.linspace(low, high, grid + 1) for low, high in spans]) * SIDE
    pixel = np.arange(SIDE)
    low, high = ends[:, :-1, None], ends[:, 1:, None]
    covered = np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, None) / (high - low)
    shades = _blur(grid) @ covered
    first, second = (part.reshape(-1, SIDE).astype(np.float32) for part in (covered, shades))
    return first, second


def _blur(grid: int) -> np.ndarray:
    distance = np.arange(grid)[:, None] - np.arange(grid)
    weight = np.exp(-0.5 * (distance / _SHADING) ** 2)
    normalised: np.ndarray = weight / weight.sum(1, keepdims=True)
    return normalised


def _fisher(agreement: Any) -> Any:
    return np.arctanh(np.clip(agreement, -0.9999, 0.9999))


def _copy(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A copy cropped by 3% to 10% on each side and re-encoded as JPEG of medium quality."""
    left, top, right, bottom = random.uniform(0.03, 0.10, 4) * SIDE
    box = (left, top, SIDE - right, SIDE - bottom)
    image = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)
    target = io.BytesIO()
    image.save(target, "JPEG", quality=int(random.integers(60, 81)))
    return np.asarray(Image.open(target))
