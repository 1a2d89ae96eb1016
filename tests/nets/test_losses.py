from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.utils.class_weight import compute_class_weight
from torch.nn.functional import cross_entropy

from engine.nets.classification import Training
from engine.nets.losses import balanced_class_weights, loss_of
from engine.nets.training import balanced_weights

LOGITS = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2] * 4)


def loss(label_smoothing: float = 0.0, focal_gamma: float | None = None) -> torch.Tensor:
    return loss_of(LOGITS, LABELS, label_smoothing=label_smoothing, focal_gamma=focal_gamma)


def test_balanced_weights_equal_scikit_learn_and_are_one_for_balanced_draws() -> None:
    labels = np.asarray([0] * 6 + [1] * 3 + [3])
    expected = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    found = balanced_class_weights(labels, np.ones(10))
    np.testing.assert_allclose(found[[0, 1, 3]], expected)
    assert found[2] == 0
    drawn = balanced_weights([str(label) for label in labels], 1.0)
    np.testing.assert_allclose(balanced_class_weights(labels, drawn)[[0, 1, 3]], 1)
    # The mean weight of drawn images is always 1.
    drawn = np.random.default_rng(0).random(10)
    mean = np.average(balanced_class_weights(labels, drawn)[labels], weights=drawn)
    assert mean == pytest.approx(1)


def test_default_loss_equals_torch() -> None:
    torch.testing.assert_close(loss(), cross_entropy(LOGITS, LABELS))
    smooth = cross_entropy(LOGITS, LABELS, label_smoothing=0.2)
    torch.testing.assert_close(loss(label_smoothing=0.2), smooth)


def test_weighted_loss_does_not_depend_on_how_a_batch_is_divided() -> None:
    weights = torch.tensor([0.5, 1.0, 4.0])
    # Classes of unequal number in each half.
    labels = torch.tensor([0, 0, 0, 0, 1, 0, 2, 2, 1, 2, 2, 1])
    halves = [loss_of(LOGITS[part], labels[part], weights) for part in (slice(6), slice(6, 12))]
    whole = loss_of(LOGITS, labels, weights)
    torch.testing.assert_close(torch.stack(halves).mean(), whole)
    losses = cross_entropy(LOGITS, labels, reduction="none") * weights[labels]
    torch.testing.assert_close(whole, losses.mean())


def test_focal_loss_is_as_published() -> None:
    probability = LOGITS.softmax(1)[torch.arange(12), LABELS]
    for gamma in (0.5, 2.0):
        expected = (-((1 - probability) ** gamma) * probability.log()).mean()
        torch.testing.assert_close(loss(focal_gamma=gamma), expected)
    torch.testing.assert_close(loss(focal_gamma=0), cross_entropy(LOGITS, LABELS))


def test_focal_loss_of_a_certain_answer_has_a_finite_slope() -> None:
    certain = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(loss_of(certain, LABELS[:1], focal_gamma=0.5), certain)
    assert torch.isfinite(slope).all()


def test_contradicting_settings_are_rejected() -> None:
    with pytest.raises(ValidationError, match="label_smoothing belongs to cross_entropy"):
        Training(loss="focal", label_smoothing=0.1)
    with pytest.raises(ValidationError, match="lr_milestones must rise"):
        Training(lr_milestones=(0.8, 0.4))
