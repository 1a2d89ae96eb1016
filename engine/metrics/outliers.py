"""Outliers: images within a class, and image sizes."""

from __future__ import annotations

import numpy as np

# Modified z-scores beyond this are outliers (Iglewicz and Hoaglin 1993).
LIMIT = 3.5
_MAD = 1.4826


def modified_z(values: np.ndarray, least_spread: float = 1e-9) -> np.ndarray:
    """Distance of each of n values from their median, in standard deviations estimated from the
    median absolute deviation: float64 (n,)."""
    if not len(values):
        return np.zeros(0)
    deviation = values - np.median(values)
    spread = max(_MAD * float(np.median(np.abs(deviation))), least_spread)
    return np.asarray(deviation / spread)


def neighbour_outliers(nearest: np.ndarray) -> np.ndarray:
    """Modified z-scores of n distances to the k-th nearest neighbour in the class (Ramaswamy et al.
    2000), by logarithms, because distances are skewed."""
    return modified_z(np.log(np.maximum(nearest, 1e-6)), least_spread=0.05)


def odd_sizes(widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """The larger modified z-score of n images, in the longer side or in the aspect ratio regardless
    of orientation. Differences below a half are never odd."""
    longest = modified_z(np.log2(np.maximum(widths, heights)), least_spread=0.17)
    aspect = modified_z(np.abs(np.log2(widths / heights)), least_spread=0.17)
    return np.asarray(np.maximum(np.abs(longest), np.abs(aspect)))
