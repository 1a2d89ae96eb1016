"""Training of a classifier, the same for every arm of a comparison.

The number of optimizer steps, the batch size and the schedule are fixed; "early stopping" never
means fewer steps. Training returns the weights with the best of the evaluations on val.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from engine.core.labels import LabelSpace
from engine.core.rng import derive_seed, generator
from engine.core.spec import Spec, explained
from engine.data.arrays import Stack
from engine.nets.augmentation import (
    MOVES,
    Mixing,
    by_policy,
    cropped,
    draw_mixing,
    moved,
    policy_of,
)
from engine.nets.heads import Head, Loss, OneLabel, SeveralTasks
from engine.nets.training import (
    TrainState,
    WeightedSampler,
    lr_schedule,
    make_accelerator,
    run,
    share_of_batch,
    strip_prefix,
    with_synchronised_norms,
)
from engine.work.fit import FitContext

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Prepare = Callable[["Tensor"], "Tensor"]
# Class numbers (n,) and probabilities (n, classes) to figures, one of them named as the objective.
# A figure `loss`, if there is one, breaks ties between evaluations.
Score = Callable[[np.ndarray, np.ndarray], dict[str, float]]
Objective = Literal[
    "macro_f1", "weighted_f1", "accuracy", "balanced_accuracy", "worst_class_recall", "roc_auc"
]  # fmt: skip
_PREDICT_BATCH = 256


class Training(Spec):
    """How a classifier is trained: the budget that all arms share."""

    later_fields: ClassVar[tuple[str, ...]] = ("first_share", "choose_after")

    steps: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 64
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024)] = 1
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    # step: the rate drops by lr_gamma after each share of the steps in lr_milestones.
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup", "step"] = "cosine"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    lr_milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    lr_gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    # focal: easy images count less (Lin et al. 2017).
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = 2.0
    # balanced: classes are weighted in the loss by n / (k n_c) of the images that the arm draws.
    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # Optimizer steps between two evaluations on val.
    evaluate_every: Annotated[int, Field(ge=1)] = 100
    # The figure on val that chooses the checkpoint, and the ratio of a search.
    objective: Objective = "macro_f1"
    # Online augmentation, the same for every arm: images are padded by this many pixels and cropped
    # back, and mirrored. A mirrored digit is another digit: off unless the study allows it.
    crop_padding: Annotated[int, Field(ge=0, le=256)] = 0
    horizontal_flip: bool = False
    # Degrees to either side, and factors between 1 - x and 1 + x.
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    saturation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # A published policy, applied last: it rotates, shears and posterizes. num_ops and magnitude
    # belong to rand_augment.
    augment: Literal["none", "trivial_augment", "rand_augment", "auto_augment"] = "none"
    num_ops: Annotated[int, Field(ge=1, le=10)] = 2
    magnitude: Annotated[int, Field(ge=1, le=29)] = 9
    # Each batch and its labels are mixed with themselves by Beta(alpha, alpha), pixel by pixel
    # (Zhang et al. 2018) or box by box (Yun et al. 2019); 0: off. With both, each step draws one.
    mixup_alpha: Annotated[float, Field(ge=0, le=10)] = 0.0
    cutmix_alpha: Annotated[float, Field(ge=0, le=10)] = 0.0
    # Share of the steps that an arm with two phases spends on its first images.
    first_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Checkpoints of this share of the steps are not chosen.
    choose_after: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _possible(self) -> Training:
        if self.loss == "focal" and self.label_smoothing:
            raise explained("label_smoothing belongs to cross_entropy; remove it with loss: focal")
        if list(self.lr_milestones) != sorted(set(self.lr_milestones)):
            raise explained("lr_milestones must rise, without repeats")
        if self.batch_size % self.gradient_accumulation_steps:
            raise explained(
                "batch_size: {size} must be a multiple of gradient_accumulation_steps ({parts})",
                size=self.batch_size,
                parts=self.gradient_accumulation_steps,
            )
        if self.lr_warmup_steps >= self.steps:
            raise explained(
                "lr_warmup_steps: {warmup} is not below steps {steps}; lower it",
                warmup=self.lr_warmup_steps,
                steps=self.steps,
            )
        return self

    def shortened(self, steps: int) -> Training:
        """The same training with fewer steps: the learning rate warms up over the same share."""
        warmup = self.lr_warmup_steps * steps // self.steps
        return self.model_copy(update={"steps": steps, "lr_warmup_steps": warmup})

    @property
    def loss_settings(self) -> Loss:
        gamma = self.focal_gamma if self.loss == "focal" else None
        return Loss(self.class_weights == "balanced", self.label_smoothing, gamma)

    def pixel_settings(self) -> list[str]:
        """The active settings that change pixels, which vectors do not have."""
        fields = (
            "crop_padding", "horizontal_flip", "rotate", "brightness", "contrast", "saturation",
            "augment", "cutmix_alpha",
        )  # fmt: skip
        return [name for name in fields if getattr(self, name) not in (0, "none")]


@dataclass(frozen=True)
class LabelledImages:
    """Images with their classes and sampling weights.

    pixels: uint8 (m, height, width, channels), or float32 (m, width), a classifier's `features`.
    labels: class numbers int64 (n,), or targets float32 (n, outputs) of several tasks
    (`LabelSpace.encode`). weights: how often an image is drawn, relative to the others,
    (n,). rows: index (n,) of the images in `pixels`; None: all of them, in order. first_weights:
    the weights of a first phase (n,).

    Trials with different images share the pixels: at 100,000 images each copy would take GBs.
    """

    pixels: np.ndarray | Stack
    labels: np.ndarray
    weights: np.ndarray
    rows: np.ndarray | None = None
    first_weights: np.ndarray | None = None

    def pixels_of(self, images: np.ndarray) -> np.ndarray:
        """Pixels of the images with these numbers (k,)."""
        return self.pixels[images if self.rows is None else self.rows[images]]

    def all_pixels(self) -> np.ndarray:
        """Pixels of all images in order, without a copy if `pixels` holds exactly these."""
        if self.rows is None and isinstance(self.pixels, np.ndarray):
            return self.pixels
        return self.pixels_of(np.arange(len(self.labels)))


@dataclass(frozen=True)
class Trained:
    """The best network, its probabilities on val (n, classes), the step that it comes from, and the
    history of the training."""

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
    space: LabelSpace | None = None,
) -> Trained:
    """Train for `settings.steps`, from the newest checkpoint if there is one. space: of several
    tasks."""
    training = _Training(context, build, prepare, data, val, score, settings, seed, space)
    history = run(
        context, training, settings.steps, checkpoint_every=context.checkpoint_every,
        report_every=settings.evaluate_every, measure=training.evaluate,
    )  # fmt: skip
    return training.finish(history)


def predict(
    network: Module, prepare: Prepare, pixels: np.ndarray, device: str, head: Head | None = None
) -> np.ndarray:
    """Probabilities float32 (n, outputs) of uint8 images (n, height, width, channels), or of
    vectors (n, width). head: of several tasks; None: a class per image."""
    import torch

    head = head or OneLabel()
    probabilities = []
    with torch.inference_mode():
        for start in range(0, len(pixels), _PREDICT_BATCH):
            inputs = prepare(_on(device, pixels[start : start + _PREDICT_BATCH]))
            probabilities.append(head.activate(network(inputs)).cpu().numpy())
    return np.concatenate(probabilities)


def _on(device: Any, pixels: np.ndarray) -> Tensor:
    import torch

    # Shared arrays are read-only, but their tensors would be writable: those are copied.
    values = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(device)
    return values.permute(0, 3, 1, 2) if values.ndim == 4 else values


class _Training:
    """One training in progress, for `engine.nets.training.run`."""

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
        space: LabelSpace | None = None,
    ) -> None:
        import torch

        self.prepare, self.data, self.val, self.score = prepare, data, val, score
        self.settings, self.seed = settings, seed
        slices = share_of_batch(
            settings.batch_size, context.rank, context.world_size,
            settings.gradient_accumulation_steps,
        )  # fmt: skip
        self.sampler = WeightedSampler(data.weights, settings.batch_size, seed)
        self.first_steps = round(settings.first_share * settings.steps)
        if data.first_weights is not None:
            self.first_sampler = WeightedSampler(data.first_weights, settings.batch_size, seed)
        torch.manual_seed(derive_seed(seed, "weights"))
        network = build()
        # Convolutions take a third less time this way, on CPUs and on GPUs. torch declares no
        # overload of `to` with a memory format alone.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # torch has no synchronised normalisation on CPUs: each worker normalises by its own share
        # of the batch, and the published weights have the statistics of rank 0.
        if context.world_size > 1 and context.device == "cuda":
            network = with_synchronised_norms(network)
        self.accelerator = make_accelerator(
            context, settings.precision, settings.gradient_accumulation_steps
        )
        optimizer = torch.optim.AdamW(
            [value for value in network.parameters() if value.requires_grad],
            lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=True,
        )  # fmt: skip
        self.state = TrainState(
            context, self.accelerator, network, optimizer,
            lambda optimizer: lr_schedule(optimizer, settings), slices,
            max_grad_norm=settings.max_grad_norm,
        )  # fmt: skip
        # Without accelerate's autocast, which `_loss` enters itself: test is scored in 32 bits, by
        # `predict` on the published weights, and so is val, which choices depend on.
        self.network = self.accelerator.unwrap_model(self.state.model, keep_fp32_wrapper=False)
        labelled = settings.loss_settings, data.labels, data.weights, str(self.accelerator.device)
        self.head: Head = SeveralTasks(space, *labelled) if space else OneLabel(*labelled)
        if settings.augment != "none":
            self.policy = policy_of(settings.augment, settings.num_ops, settings.magnitude)
        self.best: dict[str, Tensor] = {}
        self.best_score, self.best_loss, self.best_step = -1.0, 0.0, 0

    def update(self, step: int) -> dict[str, float]:
        self.state.model.train()
        first = step < self.first_steps and self.data.first_weights is not None
        rows = (self.first_sampler if first else self.sampler).rows(step)
        mixing = draw_mixing(
            self.settings.mixup_alpha, self.settings.cutmix_alpha,
            generator(self.seed, "mix", step),
        )  # fmt: skip
        loss = self.state.optimizer_step(
            self.seed, step, lambda piece: self._loss(step, rows, piece, mixing)
        )
        return {"loss": loss}

    def _loss(self, step: int, rows: np.ndarray, piece: slice, mixing: Mixing | None) -> Tensor:
        """The loss of a slice of the batch."""
        pixels, labels = self._batch(step, rows, piece)
        share = 1.0
        if mixing is not None:
            # Partners come from the whole batch: its division among workers changes no pair.
            partners, partner_labels = self._batch(step, rows[::-1], piece)
            pixels, share = mixing.mix(pixels, partners)
        with self.accelerator.autocast():
            logits = self.state.model(self.prepare(pixels)).float()
        loss = self.head.loss(logits, labels)
        if mixing is not None:
            loss = share * loss + (1 - share) * self.head.loss(logits, partner_labels)
        return loss

    def _batch(self, step: int, rows: np.ndarray, piece: slice) -> tuple[Tensor, Tensor]:
        """Augmented images and class numbers of a slice of the batch, on the device."""
        import torch

        images = rows[piece]
        labels = torch.from_numpy(np.ascontiguousarray(self.data.labels[images]))
        augmented = self._augmented(step, piece, self.data.pixels_of(images))
        return augmented, labels.to(self.accelerator.device)

    def _augmented(self, step: int, piece: slice, pixels: np.ndarray) -> Tensor:
        """Images on the device, augmented by draws that are functions of the step and the position
        in the batch."""
        import torch

        settings, images = self.settings, _on(self.accelerator.device, pixels)
        if settings.crop_padding or settings.horizontal_flip:
            images = cropped(
                images, generator(self.seed, "augment", step), settings.batch_size, piece,
                settings.crop_padding, settings.horizontal_flip,
            )  # fmt: skip
        if settings.rotate or settings.brightness or settings.contrast or settings.saturation:
            draws = generator(self.seed, "move", step).random((settings.batch_size, MOVES))
            images = 255 * moved(
                images.float() / 255, torch.from_numpy(draws[piece]).to(images.device).float(),
                rotate=settings.rotate, brightness=settings.brightness,
                contrast=settings.contrast, saturation=settings.saturation,
            )  # fmt: skip
        if settings.augment != "none":
            places = range(settings.batch_size)[piece]
            seeds = [derive_seed(self.seed, "augment", step, place) for place in places]
            images = 255 * by_policy(images.float() / 255, seeds, self.policy)
        return images

    def evaluate(self, step: int) -> dict[str, float]:
        """Score val, and copy the weights if they score better than all before. The lower loss
        breaks ties, which the recall of the worst class has while it is 0; then the earlier step
        wins."""
        figures = self.score(self.val.labels, self._predict_val())
        score, loss = figures[self.settings.objective], figures.get("loss", 0.0)
        if step <= self.settings.choose_after * self.settings.steps:
            return {f"val_{name}": value for name, value in figures.items()}
        if score > self.best_score or (score == self.best_score and loss < self.best_loss):
            self.best_score, self.best_loss, self.best_step = score, loss, step
            self.best = {
                name: value.detach().cpu().clone()
                for name, value in self.network.state_dict().items()
            }
        return {f"val_{name}": value for name, value in figures.items()}

    def _predict_val(self) -> np.ndarray:
        self.network.eval()
        device = str(self.accelerator.device)
        return predict(self.network, self.prepare, self.val.all_pixels(), device, self.head)

    def tensors(self) -> dict[str, Tensor]:
        import torch

        named = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        named |= {f"best.{name}": value for name, value in self.best.items()}
        named["best_score"] = torch.tensor(self.best_score, dtype=torch.float64)
        named["best_loss"] = torch.tensor(self.best_loss, dtype=torch.float64)
        named["best_step"] = torch.tensor(self.best_step)
        return named | self.state.tensors()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict(strip_prefix("network.", tensors))
        self.best = strip_prefix("best.", tensors)
        self.best_score = float(tensors["best_score"])
        # Older checkpoints have no best loss: their best stays until a score beats it.
        self.best_loss = float(tensors["best_loss"]) if "best_loss" in tensors else -math.inf
        self.best_step = int(tensors["best_step"])
        self.state.restore(tensors)

    def finish(self, history: list[dict[str, float]]) -> Trained:
        self.network.load_state_dict(self.best)
        return Trained(self.network, self._predict_val(), self.best_step, history)


def class_numbers(labels: Iterable[str], classes: Sequence[str]) -> np.ndarray:
    """Numbers int64 of class names."""
    number = {name: index for index, name in enumerate(classes)}
    return np.asarray([number[label] for label in labels], dtype=np.int64)
