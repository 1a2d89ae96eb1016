"""The loop that every fit shares: resume, update, checkpoint, report.

Each training brings its own update; the loop knows no losses. Every random draw in an update must
be a function of the step (and of image ids), so that a resumed fit equals an undisturbed one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine.core.errors import EngineError, StudyError
from engine.core.rng import derive_seed, generator
from engine.work.fit import FitContext
from engine.work.memory import keep_freed_memory

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    from torch import Tensor


# Sample grids that a training draws.
_SAMPLE_GRIDS = 8
# State of the gradient scaler that the next step depends on, as torch names it.
_SCALER = ("scale", "_growth_tracker")


class Trainable(Protocol):
    """One training in progress."""

    def update(self, step: int) -> dict[str, float]:
        """Take optimizer step number `step` (from 0) and return figures such as the loss."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next update depends on, as named tensors."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned."""


def run(
    context: FitContext,
    trainable: Trainable,
    steps: int,
    *,
    checkpoint_every: int,
    report_every: int,
    measure: Callable[[int], dict[str, float]] | None = None,
    sample_grid: Callable[[], bytes] | None = None,
    keep_last: bool = False,
) -> list[dict[str, float]]:
    """Train to `steps` from the newest checkpoint, if there is one; returns the reported history.

    measure: called with the number of finished steps at each report; returns figures for the
    history. sample_grid: draws samples as PNG; called on rank 0, a few times until the end.
    keep_last: write a checkpoint at the very end too, because another training follows.
    Raises `EngineError` when a figure is not finite.
    """
    start, history = 0, []
    sums: dict[str, float] = {}
    if checkpoint := context.latest_checkpoint():
        start, tensors, state = checkpoint
        trainable.restore(tensors)
        history, sums = list(state["history"]), dict(state["sums"])
    reported_at = 0.0
    for step in range(start, steps):
        figures = trainable.update(step)
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value
        done = step + 1
        if done % report_every == 0 or done == steps:
            count = (done - 1) % report_every + 1
            means = {name: value / count for name, value in sums.items()}
            if measure is not None:
                means |= measure(done)
            sums = {}
            if not all(np.isfinite(value) for value in means.values()):
                raise EngineError(
                    f"training diverged at step {done}: {means}; lower the learning rate"
                )
            history.append({"step": done, **means})
            if context.rank == 0 and (time.monotonic() - reported_at > 0.5 or done == steps):
                reported_at = time.monotonic()
                context.report(done, steps, **means)
        if sample_grid is not None and context.rank == 0 and done in _sample_steps(steps):
            context.save_sample(done, sample_grid())
        # At the very end the weights themselves are written.
        if (done % checkpoint_every == 0 and done < steps) or (keep_last and done == steps):
            context.save_checkpoint(done, trainable.tensors(), {"history": history, "sums": sums})
    return history


def _sample_steps(steps: int) -> set[int]:
    """After which steps samples are drawn: eight times, more often at the beginning."""
    shares = (number / _SAMPLE_GRIDS for number in range(1, _SAMPLE_GRIDS + 1))
    return {max(1, round(steps * share**2)) for share in shares}


def make_accelerator(
    context: FitContext,
    precision: str,
    gradient_accumulation_steps: int,
    unused_parameters: bool = False,
) -> Accelerator:
    """accelerate for this worker, with the device and threads that the profile gives it.

    unused_parameters: a loss may not reach some parameters, and workers must not wait for their
    gradients. Raises `StudyError` for fp16 on a CPU.
    """
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, is_initialized

    if precision == "fp16" and context.device == "cpu":
        raise StudyError("precision: fp16 needs a GPU; set bf16 or fp32")
    mixed_precision = {"fp32": "no"}.get(precision, precision)
    if is_initialized() and AcceleratorState().mixed_precision != mixed_precision:
        # accelerate keeps one precision per process, which runs several fits. There is no public
        # reset; the process group, which belongs to PartialState, stays.
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        cpu=context.device == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)],
    )
    keep_freed_memory()
    if context.threads:
        # After accelerate, which guesses the number from the machine's cores.
        torch.set_num_threads(context.threads)
    return accelerator


class TrainState:
    """What a training by accelerate steps together: the network, its optimizer, the learning rate,
    the averaged weights and the gradient scaler of fp16.

    schedule: makes the learning rate's schedule for the optimizer. slices: see `share_of_batch`.
    ema_decay: None keeps no averaged weights.
    """

    def __init__(
        self,
        context: FitContext,
        accelerator: Accelerator,
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
        slices: Sequence[slice],
        *,
        max_grad_norm: float,
        ema_decay: float | None = None,
    ) -> None:
        self.accelerator, self.slices, self.max_grad_norm = accelerator, slices, max_grad_norm
        self.parameters = list(optimizer.param_groups[0]["params"])
        # A single worker needs no gradients of others: DDP would cost a third of its time on a CPU.
        self.model = accelerator.prepare_model(network, evaluation_mode=context.world_size == 1)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        # Stepped by hand: accelerate's own wrapper multiplies steps by the number of workers.
        self.lr_scheduler = schedule(optimizer)
        self.ema: EMAModel | None = None
        if ema_decay is not None:
            from diffusers.training_utils import EMAModel

            self.ema = EMAModel(self.parameters, decay=ema_decay, foreach=True)

    def optimizer_step(self, seed: int, step: int, loss_of: Callable[[slice], Tensor]) -> float:
        """Step on a batch whose loss `loss_of` computes slice by slice; returns the mean loss."""
        accelerator, total = self.accelerator, 0.0
        # Dropout draws from torch's own generator: f(seed, step, rank), like every other draw.
        seed_dropout(
            str(accelerator.device), seed, "dropout", step, accelerator.process_index
        )  # fmt: skip
        for piece in self.slices:
            with accelerator.accumulate(self.model):
                loss = loss_of(piece)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += float(accelerator.reduce(loss.detach(), "mean")) / len(self.slices)
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        return total

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the network, as named tensors for a checkpoint."""
        import torch

        named: dict[str, Tensor] = {}
        if self.ema is not None:
            named |= {f"ema.{index}": value for index, value in enumerate(self.ema.shadow_params)}
            named["ema_step"] = torch.tensor(self.ema.optimization_step)
        named["lr_step"] = torch.tensor(self.lr_scheduler.last_epoch)
        if self.accelerator.scaler is not None:
            state = self.accelerator.scaler.state_dict()
            named |= {f"scaler.{name}": torch.tensor(float(state[name])) for name in _SCALER}
        return named | optimizer_tensors(self.optimizer, "optimizer.")

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        if self.ema is not None:
            self.ema.shadow_params = [
                tensors[f"ema.{index}"].to(self.accelerator.device)
                for index in range(len(self.parameters))
            ]
            self.ema.optimization_step = int(tensors["ema_step"])
        if (scaler := self.accelerator.scaler) is not None:
            scale, tracker = (float(tensors[f"scaler.{name}"]) for name in _SCALER)
            scaler.load_state_dict(
                {**scaler.state_dict(), "scale": scale, "_growth_tracker": int(tracker)}
            )
        restore_optimizer(self.optimizer, "optimizer.", tensors)
        with warnings.catch_warnings():
            # The optimizer took its own steps before the checkpoint.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(int(tensors["lr_step"])):
                self.lr_scheduler.step()


def seed_dropout(device: str, *parts: int | str) -> None:
    """Make what torch draws from its own generators, such as dropout, a function of `parts`.

    torch.manual_seed does the same but formats the stack each time for CUDA: 1.5 ms a step.
    """
    import torch

    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.startswith("cuda"):
        torch.cuda.manual_seed_all(seed)


def average_gradients(accelerator: Accelerator, network: torch.nn.Module) -> None:
    """Make the gradients of all workers their mean, in one message."""
    import torch

    if accelerator.num_processes == 1:
        return
    gradients = [value.grad for value in network.parameters() if value.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    means = accelerator.reduce(flat, "mean").split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def with_synchronised_norms(network: torch.nn.Module) -> torch.nn.Module:
    """The network with batch normalisation over the batch of all workers, except in frozen layers.
    Tensors keep their names, so saved weights load into the network as it was built."""
    from torch.nn import SyncBatchNorm

    network.train()
    convert: Callable[[torch.nn.Module], torch.nn.Module] = SyncBatchNorm.convert_sync_batchnorm
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if child.training and not list(child.children()):
                setattr(module, name, convert(child))
    return network


def strip_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, under their names without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def share_of_batch(batch_size: int, rank: int, world_size: int, accumulation: int) -> list[slice]:
    """The slices of a global batch that this rank computes, one for each micro-step. Raises
    `StudyError` where the batch cannot be divided."""
    if batch_size % (world_size * accumulation):
        raise StudyError(
            f"batch_size: {batch_size} cannot be divided among {world_size} workers x"
            f" {accumulation} accumulation steps; make it a multiple of"
            f" {world_size * accumulation}"
        )
    size = batch_size // (world_size * accumulation)
    first = rank * accumulation * size
    return [slice(first + part * size, first + (part + 1) * size) for part in range(accumulation)]


class Schedule(Protocol):
    """The settings of a schedule: of a classifier's training (`engine.nets.classification`)."""

    @property
    def steps(self) -> int: ...
    @property
    def lr_scheduler(self) -> str: ...
    @property
    def lr_warmup_steps(self) -> int: ...
    @property
    def lr_milestones(self) -> Sequence[float]: ...
    @property
    def lr_gamma(self) -> float: ...


def lr_schedule(optimizer: Any, settings: Schedule) -> Any:
    """The schedule of the learning rate, with a linear warmup."""
    from diffusers.optimization import get_scheduler
    from torch.optim.lr_scheduler import LambdaLR

    warmup = settings.lr_warmup_steps
    if settings.lr_scheduler != "step":
        return get_scheduler(
            settings.lr_scheduler, optimizer, num_warmup_steps=warmup,
            num_training_steps=settings.steps,
        )  # fmt: skip
    drops = [round(share * settings.steps) for share in settings.lr_milestones]

    def factor(step: int) -> float:
        warmed = step / warmup if step < warmup else 1.0
        return warmed * settings.lr_gamma ** sum(step >= drop for drop in drops)

    return LambdaLR(optimizer, factor)


class WeightedSampler:
    """Rows of each step's global batch, drawn with replacement: a function of seed and step alone.

    weights: relative frequency of each row, (n,).
    """

    def __init__(self, weights: np.ndarray, batch_size: int, seed: int) -> None:
        self.cumulative = np.cumsum(np.asarray(weights, dtype=float) / np.sum(weights))
        self.batch_size, self.seed = batch_size, seed

    def rows(self, step: int) -> np.ndarray:
        draws = generator(self.seed, "batch", step).random(self.batch_size)
        return np.minimum(
            np.searchsorted(self.cumulative, draws, side="right"), len(self.cumulative) - 1
        )


def balanced_weights(labels: Sequence[str], balance: float) -> np.ndarray:
    """Sampling weights n^-balance of images, where n is the size of the image's class: 0 draws
    images evenly, 1 draws classes evenly, 0.5 (square-root sampling) lies between."""
    _, inverse, counts = np.unique(
        np.asarray(labels, dtype=str), return_inverse=True, return_counts=True
    )
    return np.asarray(counts[inverse].astype(float) ** -balance)


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimizer's state as flat named tensors, for safetensors."""
    import torch

    return {
        f"{prefix}{index}.{name}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` returned."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            index, name = key.removeprefix(prefix).split(".", 1)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
