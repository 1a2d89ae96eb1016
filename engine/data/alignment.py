"""Is one picture a new encoding of another, or of a part of it?

The difference that remains after the two are laid over each other answers this by itself. A new
encoding changes small grey pictures by about 1% of their contrast, a crop or a new size by up to
10%; different pictures that look alike, such as chest X-rays in one position, differ by 14% and
more (`python -m benchmarks.near`). So this needs no comparison with other pictures of the data.

The overlay is found by Gauss-Newton steps on the differences of pixels (Lucas and Kanade 1981),
for a window of one picture, as four edges, that shows the whole of the other.
"""

from __future__ import annotations

import numpy as np

# A picture differs from its copy by at most this share of its contrast, after an overlay.
SAME = 0.10
# In place, at sides of 24 px and more. Among 60,000 digits of 28 px no two differ by less than
# 0.086. At fewer pixels both noise and the subject are averaged away: at 16 px, 95% of new
# encodings at quality 50 differ by less than 0.044, and of 70,000 digits some by 0.063.
_SAME_IN_PLACE, _FULL_SIDE = 0.075, 24
# New encodings alone stay below this. Where more than a few pictures differ by more than it and
# less than `SAME`, pictures of this data are that alike.
ENCODED = 0.03
# At most, if another signal says that one is a changed copy of the other: crops by 10% of each side
# that were encoded again reach it.
CHANGED = 0.20
# Brightness of a copy as a share of the original's.
_GAIN = (0.7, 1.4)
# Lower standard deviations, in grey levels, are mostly noise.
_PLAIN = 3.0
_STEPS = 10
# Largest change of an edge in one step, and the range of an edge, in shares of the side.
_LARGEST_STEP, _FROM, _TO = 0.03, -0.02, 0.15
# Standard deviation of the blur that makes differences smooth enough to follow, in pixels.
_BLUR = 1.0
# Pixels at each border that are not compared: they show what the blur could not see.
_BORDER = 2
_BLOCK = 512


def same_in_place(side: int) -> float:
    """The largest difference of a picture of this side from a new encoding, without overlay."""
    return _SAME_IN_PLACE * min(1.0, side / _FULL_SIDE)


def differences(pictures: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The difference of each pair of small grey pictures, as a share of the contrast, without
    overlay: float32 (m,); infinite for plain pictures and for very different brightness.

    pictures: uint8 (n, side, side). pairs: int64 (m, 2).
    """
    shares = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), _BLOCK):
        here = slice(start, start + _BLOCK)
        first, second = (_blurred(pictures[pairs[here, role]]) for role in (0, 1))
        shares[here] = _compare(first, second)[0]
    return shares


def overlaid_differences(pictures: np.ndarray, pairs: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """As `differences`, after the overlay of a window of each pair's first picture with the whole
    of its second.

    edges: the windows to begin with, float (m, 4): top, bottom, left and right, as distances from
    the picture's edges in shares of its side. An error of 3% in each is corrected.
    """
    shares = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), _BLOCK):
        here = slice(start, start + _BLOCK)
        wider, narrower = (_blurred(pictures[pairs[here, role]]) for role in (0, 1))
        shares[here] = _overlay(wider, narrower, edges[here])
    return shares


def _overlay(wider: np.ndarray, narrower: np.ndarray, edges: np.ndarray) -> np.ndarray:
    side = wider.shape[-1]
    slope = _slope(side)
    down, across = slope @ wider, wider @ slope.T
    place = ((np.arange(side) + 0.5) / side).astype(np.float32)
    edges = edges.astype(np.float64)
    best = np.full(len(wider), np.inf, np.float32)
    for _ in range(_STEPS):
        rows = _sampling(edges[:, 0], edges[:, 1], place)
        columns = _sampling(edges[:, 2], edges[:, 3], place).transpose(0, 2, 1)
        window = rows @ wider @ columns
        difference, gain, rest = _compare(window, narrower)
        best = np.minimum(best, difference)
        steepness = [rows @ slopes @ columns for slopes in (down, across)]
        vertical, horizontal = side * (1 - place), -side * place
        move = np.stack(
            [
                steepness[0] * vertical[:, None], steepness[0] * horizontal[:, None],
                steepness[1] * vertical, steepness[1] * horizontal,
            ],
            1,
        )  # fmt: skip
        move = gain[:, None, None] * _centred(move)
        normal = move @ move.transpose(0, 2, 1)
        # Damped: a plain picture has no slope to follow.
        scale = np.trace(normal, axis1=1, axis2=2)[:, None, None] / 4
        normal = normal + (1e-3 * scale + 1e-6) * np.eye(4)
        step = np.linalg.solve(normal, move @ rest[..., None])[..., 0]
        edges = np.clip(edges + np.clip(step, -_LARGEST_STEP, _LARGEST_STEP), _FROM, _TO)
    return best


def _compare(window: np.ndarray, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The difference of pictures after the best change of brightness and contrast, as a share of
    the contrast, that change (n,), and what remains (n, pixels)."""
    values, target = _centred(window), _centred(picture)
    gain = (values * target).sum(1) / np.maximum((values * values).sum(1), 1e-6)
    rest = target - gain[:, None] * values
    contrast = target.std(1)
    difference = rest.std(1) / np.maximum(contrast, 1e-6)
    usable = (contrast >= _PLAIN) & (gain >= _GAIN[0]) & (gain <= _GAIN[1])
    return np.where(usable, difference, np.inf), gain, rest


def _centred(pictures: np.ndarray) -> np.ndarray:
    inner = pictures[..., _BORDER:-_BORDER, _BORDER:-_BORDER]
    flat = inner.reshape(*pictures.shape[:-2], -1)
    centred: np.ndarray = flat - flat.mean(-1, keepdims=True)
    return centred


def _slope(side: int) -> np.ndarray:
    """The matrix of central differences."""
    slope = (np.eye(side, k=1) - np.eye(side, k=-1)) / 2
    slope[0, :2], slope[-1, -2:] = (-1, 1), (-1, 1)
    return slope.astype(np.float32)


def _sampling(low: np.ndarray, high: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Matrices (n, side, side) that read, by linear interpolation, `side` values between two edges
    from as many."""
    side = len(place)
    at = (low[:, None] + (1 - low - high)[:, None] * place) * side - 0.5
    distance = np.abs(np.clip(at, 0, side - 1)[..., None] - np.arange(side))
    weights: np.ndarray = np.maximum(0, 1 - distance).astype(np.float32)
    return weights


def _blurred(pictures: np.ndarray) -> np.ndarray:
    side = pictures.shape[-1]
    distance = np.arange(side)[:, None] - np.arange(side)
    weight = np.exp(-0.5 * (distance / _BLUR) ** 2).astype(np.float32)
    weight /= weight.sum(1, keepdims=True)
    blurred: np.ndarray = weight @ pictures.astype(np.float32) @ weight.T
    return blurred
