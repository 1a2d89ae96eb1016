"""What a classifier's training minimises."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from engine.nets.classification import Training


def balanced_class_weights(labels: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """What each class counts in a loss, float64 by class number: n / (k n_c), where n_c of n images
    are drawn of class c, and k classes occur; 1 on average over what is drawn, 0 for a class
    without an image.

    labels: class numbers (n,). drawn: how often each image is drawn, relative to the others (n,).
    """
    counts = np.bincount(labels, drawn)
    found = np.zeros(len(counts))
    np.divide(counts.sum(), np.count_nonzero(counts) * counts, out=found, where=counts > 0)
    return found


def loss_of(
    logits: Tensor, labels: Tensor, settings: Training, class_weights: Tensor | None
) -> Tensor:
    """Mean loss of a batch (n, classes): cross entropy, or by `focal` times (1 - p)^gamma, p being
    the probability of the true class (Lin et al. 2017).

    class_weights (classes,) are 1 on average, so that n divides what is weighted: by the sum of a
    batch's own weights, how it is cut among workers would change the loss.
    """
    from torch.nn.functional import cross_entropy

    losses = cross_entropy(
        logits, labels, label_smoothing=settings.label_smoothing, reduction="none"
    )
    if settings.loss == "focal":
        # A power below 1 has no slope at 0.
        unsure = -(-losses).expm1()
        losses = unsure.clamp_min(1e-8) ** settings.focal_gamma * losses
    if class_weights is not None:
        losses = losses * class_weights[labels]
    return losses.mean()
