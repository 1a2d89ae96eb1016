"""What lies far from the rest: images of a class, and sizes."""

from __future__ import annotations

import numpy as np

# Modified z-scores beyond this are outliers (Iglewicz and Hoaglin 1993).
LIMIT = 3.5
_MAD = 1.4826


def modified_z(values: np.ndarray, least_spread: float = 1e-9) -> np.ndarray:
    """How far each of n values lies from their median, in standard deviations that are told from
    the median of the absolute deviations: float64 (n,)."""
    if not len(values):
        return np.zeros(0)
    off = values - np.median(values)
    found: np.ndarray = off / max(_MAD * float(np.median(np.abs(off))), least_spread)
    return found


def neighbour_outliers(nearest: np.ndarray) -> np.ndarray:
    """Modified z-scores of n distances to the k-th nearest of the same class (Ramaswamy et al.
    2000). Distances are skewed; their logarithms are not."""
    return modified_z(np.log(np.maximum(nearest, 1e-6)), least_spread=0.05)


def odd_sizes(widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """The larger modified z-score of n pictures in length of the longer side and in aspect, lying
    or standing: what differs by less than half from the rest is never odd."""
    longest = modified_z(np.log2(np.maximum(widths, heights)), least_spread=0.17)
    aspect = modified_z(np.abs(np.log2(widths / heights)), least_spread=0.17)
    return np.maximum(np.abs(longest), np.abs(aspect))
