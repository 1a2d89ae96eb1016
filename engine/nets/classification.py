"""Training of a classifier, the same for every arm of a comparison.

The number of optimizer steps, the batch and the schedule are given; val is scored at an equal
cadence, and the weights that score best there are what training returns. "Early stopping" never
means fewer steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from engine.core.rng import derive_seed, generator
from engine.core.spec import Spec
from engine.data.arrays import Stack
from engine.nets.augmentation import MOVES, by_policy, draw_mixing, moved, policy_of
from engine.nets.losses import balanced_class_weights, loss_of
from engine.nets.training import (
    WeightedSampler,
    below,
    descend,
    make_accelerator,
    optimizer_tensors,
    restore_optimizer,
    restore_scaler,
    restore_schedule,
    run,
    scaler_tensors,
    seed_dropout,
    share_of_batch,
)
from engine.work.fit import FitContext

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Prepare = Callable[["Tensor"], "Tensor"]
# Class numbers (n,) and probabilities (n, classes) to figures, one of them named as the objective;
# `loss`, where it is one of them, decides between looks that are equal in it.
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
    # step: the rate drops by lr_gamma after each of these shares of the steps.
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup", "step"] = "cosine"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    lr_milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    lr_gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    # focal: what is easy counts less (Lin et al. 2017).
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = 2.0
    # balanced: a class counts in the loss by n / (k n_c), of what the arm draws.
    class_weights: Literal["none", "balanced"] = "none"
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
    # Degrees to either side, and factors of light between 1 - x and 1 + x.
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    saturation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # A published policy after all these: it turns, shears and posterizes. num_ops, magnitude: of
    # rand_augment.
    augment: Literal["none", "trivial_augment", "rand_augment", "auto_augment"] = "none"
    num_ops: Annotated[int, Field(ge=1, le=10)] = 2
    magnitude: Annotated[int, Field(ge=1, le=29)] = 9
    # Each batch is mixed with itself by Beta(alpha, alpha), pixel by pixel (Zhang et al. 2018) or a
    # box for a box (Yun et al. 2019), its labels likewise; 0: not. With both, each step takes one.
    mixup_alpha: Annotated[float, Field(ge=0, le=10)] = 0.0
    cutmix_alpha: Annotated[float, Field(ge=0, le=10)] = 0.0

    @model_validator(mode="after")
    def _possible(self) -> Training:
        if self.loss == "focal" and self.label_smoothing:
            raise PydanticCustomError(
                "explained", "label_smoothing belongs to cross_entropy; leave it out with focal"
            )
        if list(self.lr_milestones) != sorted(set(self.lr_milestones)):
            raise PydanticCustomError("explained", "lr_milestones must rise, each standing once")
        if self.batch_size % self.gradient_accumulation_steps:
            raise PydanticCustomError(
                "explained",
                "batch_size: {size} images cannot be computed in {parts} equal parts; make it a"
                " multiple of gradient_accumulation_steps",
                {"size": self.batch_size, "parts": self.gradient_accumulation_steps},
            )
        if self.lr_warmup_steps >= self.steps:
            raise PydanticCustomError(
                "explained",
                "lr_warmup_steps: {warmup} leave none of {steps} steps at the full rate; name"
                " fewer",
                {"warmup": self.lr_warmup_steps, "steps": self.steps},
            )
        return self

    def shortened(self, steps: int) -> Training:
        """The same with fewer steps: the rate rises over the same share of them."""
        warmup = self.lr_warmup_steps * steps // self.steps
        return self.model_copy(update={"steps": steps, "lr_warmup_steps": warmup})

    def pixel_settings(self) -> list[str]:
        """The settings at work that change pixels, and mean nothing to vectors."""
        fields = (
            "crop_padding", "horizontal_flip", "rotate", "brightness", "contrast", "saturation",
            "augment", "cutmix_alpha",
        )  # fmt: skip
        return [name for name in fields if getattr(self, name) not in (0, "none")]


@dataclass(frozen=True)
class LabelledImages:
    """labels: class numbers int64 (n,). weights: how often an image is drawn, relative to the
    others. pixels: uint8 (m, height, width, channels), of which `rows` (n,) are the images; all of
    them where there are none. Or float32 (m, width): what a classifier's `features` made of them.

    Trials that differ in their images share the pixels: at 100,000 images each would hold GBs.
    """

    pixels: np.ndarray | Stack
    labels: np.ndarray
    weights: np.ndarray
    rows: np.ndarray | None = None

    def pictures(self, held: np.ndarray) -> np.ndarray:
        """Pixels of the images `held` (k,)."""
        return self.pixels[held if self.rows is None else self.rows[held]]

    def all_pictures(self) -> np.ndarray:
        """Pixels of all images in their order: no copy, where they are all of `pixels`."""
        if self.rows is None and isinstance(self.pixels, np.ndarray):
            return self.pixels
        return self.pictures(np.arange(len(self.labels)))


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
    """Probabilities float32 (n, classes) of uint8 images (n, height, width, channels), or of
    vectors (n, width)."""
    import torch

    found = []
    with torch.inference_mode():
        for start in range(0, len(pixels), _PREDICT_BATCH):
            logits = network(prepare(_on(device, pixels[start : start + _PREDICT_BATCH]))).float()
            found.append(logits.softmax(1).cpu().numpy())
    return np.concatenate(found)


def _on(device: Any, pixels: np.ndarray) -> Tensor:
    import torch

    # Shared arrays are read-only, and a tensor of one would be open to writing: those are copied.
    held = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(device)
    return held.permute(0, 3, 1, 2) if held.ndim == 4 else held


def with_synchronised_norms(network: Module) -> Module:
    """The network with batch normalisation over the batch of all workers, where it follows
    training; what stands still is left as it is. Names of tensors stay, so that what is saved loads
    into the network as it was built."""
    from torch.nn import SyncBatchNorm

    network.train()
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if child.training and not list(child.children()):
                setattr(module, name, SyncBatchNorm.convert_sync_batchnorm(child))
    return network


def lr_schedule(optimizer: Any, settings: Training) -> Any:
    """The learning rate over the steps, warmed up linearly."""
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import get_scheduler

    warmup = settings.lr_warmup_steps
    if settings.lr_scheduler != "step":
        return get_scheduler(
            settings.lr_scheduler, optimizer, num_warmup_steps=warmup,
            num_training_steps=settings.steps,
        )  # fmt: skip
    drops = [round(share * settings.steps) for share in settings.lr_milestones]

    def factor(step: int) -> float:
        risen = step / warmup if step < warmup else 1.0
        return risen * settings.lr_gamma ** sum(step >= drop for drop in drops)

    return LambdaLR(optimizer, factor)


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
        # On CPUs torch has none that is synchronised: each worker normalises by what its own share
        # of the batch is like, and the weights that are kept have the statistics of rank 0.
        if context.world_size > 1 and context.device == "cuda":
            network = with_synchronised_norms(network)
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
        # Without accelerate's autocast, for which `update` asks by itself: test is scored in 32
        # bits, by `predict` on weights that were saved, and so is val, on which choices are made.
        self.network = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.lr_scheduler = lr_schedule(optimizer, settings)
        self.class_weights: Tensor | None = None
        if settings.class_weights == "balanced":
            weights = balanced_class_weights(data.labels, data.weights)
            self.class_weights = torch.from_numpy(weights).float().to(self.accelerator.device)
        if settings.augment != "none":
            self.policy = policy_of(settings.augment, settings.num_ops, settings.magnitude)
        self.best: dict[str, Tensor] = {}
        self.best_score, self.best_loss, self.best_step = -1.0, 0.0, 0

    def update(self, step: int) -> dict[str, float]:
        self.model.train()
        mixing = draw_mixing(
            self.settings.mixup_alpha, self.settings.cutmix_alpha,
            generator(self.seed, "mix", step),
        )  # fmt: skip
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
        return loss_of(logits, labels, self.settings, self.class_weights)

    def _augmented(self, step: int, piece: slice, pixels: np.ndarray) -> Tensor:
        """The pieces' images on the device, augmented by draws that belong to the step and the
        place in the batch."""
        import torch

        settings, images = self.settings, _on(self.accelerator.device, pixels)
        if settings.crop_padding or settings.horizontal_flip:
            images = self._cropped(step, piece, images)
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

    def _cropped(self, step: int, piece: slice, images: Tensor) -> Tensor:
        """Images padded and cropped back, and mirrored."""
        from torch.nn.functional import pad

        border, height, width = self.settings.crop_padding, *images.shape[2:]
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
        """Score val, and keep a copy of the weights where they score better than any before. Of
        equal scores, which the recall of the worst class has while it is 0, the lower loss counts,
        and then the earlier."""
        figures = self.score(self.val.labels, self._predict_val())
        score, loss = figures[self.settings.objective], figures.get("loss", 0.0)
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
        return predict(self.network, self.prepare, self.val.all_pictures(), device)

    def tensors(self) -> dict[str, Tensor]:
        import torch

        named = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        named |= {f"best.{name}": value for name, value in self.best.items()}
        named["best_score"] = torch.tensor(self.best_score, dtype=torch.float64)
        named["best_loss"] = torch.tensor(self.best_loss, dtype=torch.float64)
        named["best_step"] = torch.tensor(self.best_step)
        named["lr_step"] = torch.tensor(self.lr_scheduler.last_epoch)
        named |= scaler_tensors(self.accelerator)
        return named | optimizer_tensors(self.optimizer, "optimizer.")

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict(below("network.", tensors))
        self.best = below("best.", tensors)
        self.best_score = float(tensors["best_score"])
        # A checkpoint from before losses were held: what it found best stands until it is beaten.
        self.best_loss = float(tensors["best_loss"]) if "best_loss" in tensors else -math.inf
        self.best_step = int(tensors["best_step"])
        restore_optimizer(self.optimizer, "optimizer.", tensors)
        restore_scaler(self.accelerator, tensors)
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
