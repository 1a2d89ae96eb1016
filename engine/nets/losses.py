"""The loss of a classifier's training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def balanced_class_weights(labels: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Weight of each class in a loss, float64 by class number: n / (k n_c), where n_c of n drawn
    images have class c and k classes occur. The weights are 1 on average over the drawn images, and
    0 for a class without an image.

    labels: class numbers (n,). drawn: how often each image is drawn, relative to the others (n,).
    """
    counts = np.bincount(labels, drawn)
    weights = np.zeros(len(counts))
    np.divide(counts.sum(), np.count_nonzero(counts) * counts, out=weights, where=counts > 0)
    return weights


def focal(losses: Tensor, gamma: float) -> Tensor:
    """Cross entropies, each multiplied by (1 - p)^gamma, p being the probability of the truth (Lin
    et al. 2017)."""
    # A power below 1 has an infinite slope at 0.
    unsure = -(-losses).expm1()
    return unsure.clamp_min(1e-8) ** gamma * losses


def loss_of(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    focal_gamma: float | None = None,
) -> Tensor:
    """Mean cross entropy of a batch (n, classes). With `focal_gamma` each image's loss is
    multiplied by (1 - p)^gamma, p being the probability of the true class (Lin et al. 2017).

    class_weights (classes,) are 1 on average over all draws, so the sum is divided by n: dividing
    by the batch's own weights would make the loss depend on its division among workers.
    """
    from torch.nn.functional import cross_entropy

    losses = cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    if focal_gamma is not None:
        losses = focal(losses, focal_gamma)
    if class_weights is not None:
        losses = losses * class_weights[labels]
    return losses.mean()
