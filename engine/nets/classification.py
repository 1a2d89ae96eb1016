"""Training of a classifier, the same for every arm of a comparison.

The number of optimizer steps, the batch and the schedule are given; val is scored at an equal
cadence, and the weights that score best there are what training returns. "Early stopping" never
means fewer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from engine.core.arrays import Stack
from engine.core.fit import FitContext
from engine.core.rng import derive_seed, generator
from engine.core.spec import Spec
from engine.nets.training import (
    WeightedSampler,
    below,
    descend,
    make_accelerator,
    optimizer_tensors,
    restore_optimizer,
    restore_schedule,
    run,
    seed_dropout,
    share_of_batch,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Prepare = Callable[["Tensor"], "Tensor"]
# Class numbers (n,) and probabilities (n, classes) to figures, one of them named as the objective.
Score = Callable[[np.ndarray, np.ndarray], dict[str, float]]
Objective = Literal[
    "macro_f1", "weighted_f1", "accuracy", "balanced_accuracy", "worst_class_recall", "roc_auc"
]  # fmt: skip
_PREDICT_BATCH = 256


class Training(Spec):
    """How a classifier is trained: the budget that all arms share."""

    steps: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 64
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024)] = 1
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # Optimizer steps between two looks at val.
    evaluate_every: Annotated[int, Field(ge=1)] = 100
    # What is called best on val: the checkpoint, and the ratio of a search.
    objective: Objective = "macro_f1"
    # Online augmentation, of every arm alike: the picture padded by so many pixels and cropped
    # back, and mirrored. A mirrored digit is another digit: off unless the study allows it.
    crop_padding: Annotated[int, Field(ge=0, le=256)] = 0
    horizontal_flip: bool = False
    # Each batch is mixed with itself by Beta(alpha, alpha), pixel by pixel (Zhang et al. 2018) or a
    # box for a box (Yun et al. 2019), its labels likewise; 0: not. With both, each step takes one.
    mixup_alpha: Annotated[float, Field(ge=0, le=10)] = 0.0
    cutmix_alpha: Annotated[float, Field(ge=0, le=10)] = 0.0


@dataclass(frozen=True)
class LabelledImages:
    """labels: class numbers int64 (n,). weights: how often an image is drawn, relative to the
    others. pixels: uint8 (m, height, width, channels), of which `rows` (n,) are the images; all of
    them where there are none.

    Trials that differ in their images share the pixels: at 100,000 images each would hold GBs.
    """

    pixels: np.ndarray | Stack
    labels: np.ndarray
    weights: np.ndarray
    rows: np.ndarray | None = None

    def pictures(self, held: np.ndarray) -> np.ndarray:
        """Pixels of the images `held` (k,)."""
        return self.pixels[held if self.rows is None else self.rows[held]]


@dataclass(frozen=True)
class Mixing:
    """How a batch is mixed with another. share: of the first; corner: of the box that cutmix takes
    from the other, as shares of the room that it leaves; None for mixup."""

    share: float
    corner: tuple[float, float] | None

    def mix(self, images: Tensor, others: Tensor) -> tuple[Tensor, float]:
        """Images (n, channels, height, width) mixed, and the share that the first ones have."""
        if self.corner is None:
            return others.float().lerp(images.float(), self.share), self.share
        height, width = images.shape[2:]
        side = (1 - self.share) ** 0.5
        rows, columns = round(side * height), round(side * width)
        top = round(self.corner[0] * (height - rows))
        left = round(self.corner[1] * (width - columns))
        made = images.clone()
        box = (..., slice(top, top + rows), slice(left, left + columns))
        made[box] = others[box].to(made.dtype)
        return made, 1 - rows * columns / (height * width)


def draw_mixing(settings: Training, random: np.random.Generator) -> Mixing | None:
    """How a step mixes its batch, or None where the settings say nothing of it."""
    alphas = [settings.mixup_alpha, settings.cutmix_alpha]
    chosen = [kind for kind, alpha in enumerate(alphas) if alpha]
    if not chosen:
        return None
    kind = chosen[int(random.integers(len(chosen)))]
    share = float(random.beta(alphas[kind], alphas[kind]))
    first, second = random.random(2)
    return Mixing(share, (float(first), float(second)) if kind else None)


@dataclass(frozen=True)
class Trained:
    """The best network, its probabilities on val (n, classes), and the history of the training."""

    network: Module
    probabilities: np.ndarray
    best_step: int
    history: list[dict[str, float]]


def train(
    context: FitContext,
    build: Callable[[], Module],
    prepare: Prepare,
    data: LabelledImages,
    val: LabelledImages,
    score: Score,
    settings: Training,
    seed: int,
) -> Trained:
    """Train for `settings.steps`, from the newest checkpoint if there is one."""
    training = _Training(context, build, prepare, data, val, score, settings, seed)
    history = run(
        context, training, settings.steps, checkpoint_every=context.checkpoint_every,
        report_every=settings.evaluate_every, measure=training.look_at_val,
    )  # fmt: skip
    return training.finish(history)


def predict(network: Module, prepare: Prepare, pixels: np.ndarray, device: str) -> np.ndarray:
    """Probabilities float32 (n, classes) of uint8 images (n, height, width, channels)."""
    import torch

    found = []
    with torch.inference_mode():
        for start in range(0, len(pixels), _PREDICT_BATCH):
            logits = network(prepare(_on(device, pixels[start : start + _PREDICT_BATCH]))).float()
            found.append(logits.softmax(1).cpu().numpy())
    return np.concatenate(found)


def _on(device: Any, pixels: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(0, 3, 1, 2)


class _Training:
    """The state of one training, for `engine.nets.training.run`."""

    def __init__(
        self,
        context: FitContext,
        build: Callable[[], Module],
        prepare: Prepare,
        data: LabelledImages,
        val: LabelledImages,
        score: Score,
        settings: Training,
        seed: int,
    ) -> None:
        import torch
        from transformers import get_scheduler

        self.prepare, self.data, self.val, self.score = prepare, data, val, score
        self.settings, self.seed = settings, seed
        self.slices = share_of_batch(
            settings.batch_size, context.rank, context.world_size,
            settings.gradient_accumulation_steps,
        )  # fmt: skip
        self.sampler = WeightedSampler(data.weights, settings.batch_size, seed)
        torch.manual_seed(derive_seed(seed, "weights"))
        # Convolutions take a third less time so, on a CPU and on a GPU.
        network = build().to(memory_format=torch.channels_last)
        self.accelerator = make_accelerator(
            context, settings.precision, settings.gradient_accumulation_steps
        )
        trained = [value for value in network.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=True
        )
        # Alone, a worker needs no gradients of others.
        self.model = self.accelerator.prepare_model(
            network, evaluation_mode=context.world_size == 1
        )
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.network = self.accelerator.unwrap_model(self.model)
        self.lr_scheduler = get_scheduler(
            settings.lr_scheduler, optimizer, num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.steps,
        )  # fmt: skip
        self.best: dict[str, Tensor] = {}
        self.best_score, self.best_step = -1.0, 0

    def update(self, step: int) -> dict[str, float]:
        self.model.train()
        mixing = draw_mixing(self.settings, generator(self.seed, "mix", step))
        # Dropout draws from torch's own generator: f(seed, step, rank), as all else.
        rank = self.accelerator.process_index
        seed_dropout(str(self.accelerator.device), self.seed, "dropout", step, rank)
        rows, total = self.sampler.rows(step), 0.0
        for piece in self.slices:
            with self.accelerator.accumulate(self.model):
                held = rows[piece]
                pixels = self._augmented(step, piece, self.data.pictures(held))
                labels = _labels_on(self.accelerator.device, self.data.labels[held])
                share = 1.0
                if mixing is not None:
                    # The partner stands in the whole batch: how it is cut changes no pair.
                    other = rows[::-1][piece]
                    pixels, share = mixing.mix(
                        pixels, self._augmented(step, piece, self.data.pictures(other))
                    )
                with self.accelerator.autocast():
                    logits = self.model(self.prepare(pixels))
                loss = self._loss(logits.float(), labels)
                if mixing is not None:
                    others = _labels_on(self.accelerator.device, self.data.labels[other])
                    loss = share * loss + (1 - share) * self._loss(logits.float(), others)
                descend(
                    self.accelerator, self.model, self.optimizer, loss, self.settings.max_grad_norm
                )
            total += float(self.accelerator.reduce(loss.detach(), "mean")) / len(self.slices)
        self.lr_scheduler.step()
        return {"loss": total}

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)

    def _augmented(self, step: int, piece: slice, pixels: np.ndarray) -> Tensor:
        """The pieces' images on the device, cropped and mirrored by draws that belong to the step
        and the place in the batch."""
        from torch.nn.functional import pad

        images = _on(self.accelerator.device, pixels)
        border, height, width = self.settings.crop_padding, *images.shape[2:]
        if not border and not self.settings.horizontal_flip:
            return images
        count = self.settings.batch_size
        draw = generator(self.seed, "augment", step)
        corners = draw.integers(0, 2 * border + 1, (count, 2))[piece]
        mirrored = draw.random(count)[piece] < 0.5
        padded = pad(images.float(), [border] * 4, mode="replicate") if border else images
        made = padded.new_empty(images.shape)
        for row, (top, left) in enumerate(corners):
            cropped = padded[row, :, top : top + height, left : left + width]
            flip = self.settings.horizontal_flip and mirrored[row]
            made[row] = cropped.flip(-1) if flip else cropped
        return made

    def look_at_val(self, step: int) -> dict[str, float]:
        """Score val, and keep a copy of the weights where they score better than any before."""
        figures = self.score(self.val.labels, self._predict_val())
        score = figures[self.settings.objective]
        if score > self.best_score:
            self.best_score, self.best_step = score, step
            self.best = {
                name: value.detach().cpu().clone()
                for name, value in self.network.state_dict().items()
            }
        return {f"val_{name}": value for name, value in figures.items()}

    def _predict_val(self) -> np.ndarray:
        self.network.eval()
        device = str(self.accelerator.device)
        pixels = self.val.pictures(np.arange(len(self.val.labels)))
        return predict(self.network, self.prepare, pixels, device)

    def tensors(self) -> dict[str, Tensor]:
        import torch

        named = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        named |= {f"best.{name}": value for name, value in self.best.items()}
        named["best_score"] = torch.tensor(self.best_score, dtype=torch.float64)
        named["best_step"] = torch.tensor(self.best_step)
        named["lr_step"] = torch.tensor(self.lr_scheduler.last_epoch)
        return named | optimizer_tensors(self.optimizer, "optimizer.")

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict(below("network.", tensors))
        self.best = below("best.", tensors)
        self.best_score = float(tensors["best_score"])
        self.best_step = int(tensors["best_step"])
        restore_optimizer(self.optimizer, "optimizer.", tensors)
        restore_schedule(self.lr_scheduler, int(tensors["lr_step"]))

    def finish(self, history: list[dict[str, float]]) -> Trained:
        self.network.load_state_dict(self.best)
        return Trained(self.network, self._predict_val(), self.best_step, history)


def _labels_on(device: Any, labels: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(labels)).to(device)


def class_numbers(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Numbers int64 of class names."""
    number = {name: index for index, name in enumerate(classes)}
    return np.asarray([number[label] for label in labels], dtype=np.int64)
