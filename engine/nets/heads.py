"""What a classifier's outputs mean: the classes of one task, or the labels of several tasks side by
side, which is a head per task on one backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from engine.core.labels import LabelSpace
from engine.nets.losses import balanced_class_weights, focal, loss_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """How a loss is computed. balanced: classes are weighted by n / (k n_c) of the drawn images.
    focal_gamma: None without the focal loss."""

    balanced: bool = False
    label_smoothing: float = 0.0
    focal_gamma: float | None = None


class Head(Protocol):
    """The probabilities and the loss of a network's outputs."""

    def activate(self, logits: Tensor) -> Tensor:
        """Probabilities (n, outputs)."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch. labels: class numbers (n,), or targets (n, outputs)."""


class OneLabel:
    """One class per image: softmax and cross entropy."""

    def __init__(
        self, settings: Loss = Loss(), labels: np.ndarray | None = None,
        drawn: np.ndarray | None = None, device: str = "cpu",
    ) -> None:  # fmt: skip
        """labels, drawn: for training; class numbers (n,), and how often each image is drawn
        (n,)."""
        import torch

        self.settings, self.weights = settings, None
        if settings.balanced:
            assert labels is not None
            assert drawn is not None
            weights = balanced_class_weights(labels, drawn)
            self.weights = torch.from_numpy(weights).float().to(device)

    def activate(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(1)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return loss_of(
            logits, labels, self.weights, label_smoothing=self.settings.label_smoothing,
            focal_gamma=self.settings.focal_gamma,
        )  # fmt: skip


@dataclass(frozen=True)
class _TaskWeights:
    """scale: the task's share of the loss over the share of drawn images with a label, so that the
    loss does not depend on how a batch is divided. positive, negative: of each label (labels,), or
    of each class as `positive`; None without class weights."""

    scale: float
    positive: Tensor | None = None
    negative: Tensor | None = None


class SeveralTasks:
    """The labels of several tasks: softmax and cross entropy for each with one label per image,
    sigmoids and binary cross entropy for each with several. Images without a label in a task have
    no loss in it."""

    def __init__(
        self, space: LabelSpace, settings: Loss = Loss(), targets: np.ndarray | None = None,
        drawn: np.ndarray | None = None, device: str = "cpu",
    ) -> None:  # fmt: skip
        """targets, drawn: for training; `LabelSpace.encode` (n, outputs), and how often each image
        is drawn (n,)."""
        self.space, self.settings = space, settings
        self.weights: dict[str, _TaskWeights] = {}
        if targets is not None:
            assert drawn is not None
            self.weights = {
                name: _weights_of(task.kind, targets[:, space.slices[name]], drawn,
                                  space.shares[name], settings.balanced, device)
                for name, task in space.tasks.items()
            }  # fmt: skip

    def activate(self, logits: Tensor) -> Tensor:
        import torch

        values = logits.float()
        return torch.cat(
            [
                values[:, part].softmax(1)
                if self.space.tasks[name].kind == "single"
                else values[:, part].sigmoid()
                for name, part in self.space.slices.items()
            ],
            1,
        )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        total = logits.new_zeros(())
        for name, part in self.space.slices.items():
            single = self.space.tasks[name].kind == "single"
            of_task = self._one_class if single else self._several_labels
            total = total + of_task(logits[:, part], labels[:, part], self.weights[name])
        return total

    def _one_class(self, logits: Tensor, targets: Tensor, weights: _TaskWeights) -> Tensor:
        labelled = targets[:, 0].isfinite()
        if not labelled.any():
            return logits.sum() * 0
        mean = loss_of(
            logits[labelled], targets[labelled].argmax(1), weights.positive,
            label_smoothing=self.settings.label_smoothing, focal_gamma=self.settings.focal_gamma,
        )  # fmt: skip
        return mean * labelled.sum() / len(labelled) * weights.scale

    def _several_labels(self, logits: Tensor, targets: Tensor, weights: _TaskWeights) -> Tensor:
        from torch.nn.functional import binary_cross_entropy_with_logits

        labelled, truth = targets[:, 0].isfinite(), targets.nan_to_num(0.0)
        smooth = self.settings.label_smoothing
        losses = binary_cross_entropy_with_logits(
            logits, truth * (1 - smooth) + smooth / 2, reduction="none"
        )
        if self.settings.focal_gamma is not None:
            losses = focal(losses, self.settings.focal_gamma)
        if weights.positive is not None and weights.negative is not None:
            losses = losses * (truth * weights.positive + (1 - truth) * weights.negative)
        return losses.mean(1)[labelled].sum() / len(labelled) * weights.scale


def _weights_of(
    kind: str, targets: np.ndarray, drawn: np.ndarray, share: float, balanced: bool, device: str
) -> _TaskWeights:
    """The weights of a task's loss. targets: (n, labels), NaN without a label. drawn: (n,)."""
    import torch

    labelled = np.isfinite(targets[:, 0])
    within = drawn[labelled].sum() / drawn.sum()
    scale = share / within if within > 0 else 0.0
    if not balanced or not within:
        return _TaskWeights(scale)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).float().to(device)

    truth, counts = targets[labelled], drawn[labelled]
    if kind == "single":
        weights = balanced_class_weights(truth.argmax(1), counts)
        # Classes without an image, at the end of the numbers, have no weight yet.
        padded = np.zeros(targets.shape[1])
        padded[: len(weights)] = weights
        return _TaskWeights(scale, tensor(padded))
    positive = counts @ truth / counts.sum()
    ends = (np.where(share > 0, 0.5 / np.maximum(share, 1e-12), 0.0)
            for share in (positive, 1 - positive))  # fmt: skip
    return _TaskWeights(scale, *map(tensor, ends))
