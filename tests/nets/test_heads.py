from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from engine.core.labels import LabelSpace, TaskLabels
from engine.nets.heads import Loss, OneLabel, SeveralTasks

SPACE = LabelSpace(
    {
        "digit": TaskLabels(kind="single", classes=("0", "1", "2"), weight=3),
        "sign": TaskLabels(kind="multi", classes=("a", "b")),
    },
    {},
)
PLAIN = Loss()
ALL = SPACE.encode({"digit": ["0", "1", "2", "2"], "sign": [(), ("a",), ("a", "b"), ("a",)]})


def logits(seed: int, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def head(targets: np.ndarray, settings: Loss = PLAIN) -> SeveralTasks:
    return SeveralTasks(SPACE, settings, targets, np.ones(len(targets)))


def test_each_task_has_its_own_probabilities() -> None:
    probabilities = SeveralTasks(SPACE).activate(logits(0))
    torch.testing.assert_close(probabilities[:, :3].sum(1), torch.ones(4))
    torch.testing.assert_close(probabilities[:, 3:], logits(0)[:, 3:].sigmoid())


def test_loss_is_the_weighted_mean_of_the_tasks() -> None:
    values, targets = logits(1), torch.from_numpy(ALL)
    expected = 0.75 * cross_entropy(values[:, :3], targets[:, :3].argmax(1))
    expected += 0.25 * binary_cross_entropy_with_logits(values[:, 3:], targets[:, 3:])
    torch.testing.assert_close(head(ALL).loss(values, targets), expected)


def test_image_without_a_label_has_no_loss_in_the_task() -> None:
    some = ALL.copy()
    some[0, :3] = np.nan
    some[3, 3:] = np.nan
    values, targets = logits(2).requires_grad_(), torch.from_numpy(some)
    loss = head(some).loss(values, targets)
    loss.backward()
    assert values.grad is not None
    assert not values.grad[0, :3].any()
    assert not values.grad[3, 3:].any()
    assert values.grad[0, 3:].all()
    # The mean is over the images with a label: three quarters of both tasks.
    of_digits = cross_entropy(values[1:, :3], torch.tensor([1, 2, 2]))
    of_signs = binary_cross_entropy_with_logits(values[:3, 3:], torch.from_numpy(ALL[:3, 3:]))
    torch.testing.assert_close(loss, 0.75 * of_digits + 0.25 * of_signs)


def test_loss_does_not_depend_on_how_the_batch_is_divided() -> None:
    some = ALL.copy()
    some[:2, :3] = np.nan
    whole, values = head(some), logits(3)
    targets = torch.from_numpy(some)
    halves = [whole.loss(values[part], targets[part]) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole.loss(values, targets))


def test_batch_without_any_label_of_a_task_has_a_finite_loss() -> None:
    none = np.full_like(ALL, np.nan)
    loss = head(ALL).loss(logits(4), torch.from_numpy(none))
    assert loss.item() == 0.0


def test_balanced_weights_raise_rare_labels() -> None:
    balanced = head(ALL, Loss(balanced=True)).weights["sign"]
    assert balanced.positive is not None
    assert balanced.negative is not None
    # a: three of four images; b: one of four.
    torch.testing.assert_close(balanced.positive, torch.tensor([2 / 3, 2.0]))
    torch.testing.assert_close(balanced.negative, torch.tensor([2.0, 2 / 3]))


@pytest.mark.parametrize("settings", [Loss(label_smoothing=0.2), Loss(focal_gamma=2.0)])
def test_settings_of_the_loss_change_both_kinds_of_task(settings: Loss) -> None:
    targets = torch.from_numpy(ALL)
    for part in (slice(0, 3), slice(3, 5)):
        values = torch.zeros(4, 5)
        values[:, part] = logits(5)[:, part]
        assert not torch.isclose(
            head(ALL, settings).loss(values, targets), head(ALL).loss(values, targets)
        )


def test_one_label_is_softmax_and_cross_entropy() -> None:
    values, labels = logits(6), torch.tensor([0, 4, 2, 1])
    torch.testing.assert_close(OneLabel().activate(values), values.softmax(1))
    torch.testing.assert_close(OneLabel().loss(values, labels), cross_entropy(values, labels))
