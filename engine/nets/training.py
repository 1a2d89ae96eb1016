"""The loop that every fit shares: resume, update, checkpoint, report.

What is trained brings its own update; the loop knows nothing of losses. Everything random in an
update must be a function of the step (and of image ids), so that a resumed fit goes on as if
nothing had been.
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
    from torch import Tensor


# Pictures that a training draws of what it has learnt.
_LOOKS = 8


class Trainable(Protocol):
    """One training in progress."""

    def update(self, step: int) -> dict[str, float]:
        """Take optimizer step number `step` (from 0) and return figures such as the loss."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next update depends on, as named tensors."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None: ...


def run(
    context: FitContext,
    trainable: Trainable,
    steps: int,
    *,
    checkpoint_every: int,
    report_every: int,
    measure: Callable[[int], dict[str, float]] | None = None,
    look: Callable[[], bytes] | None = None,
    keep_last: bool = False,
) -> list[dict[str, float]]:
    """Train to `steps` from the newest checkpoint, if there is one; returns the reported history.

    measure: called with the number of steps done at each report; its figures stand in the history.
    look: draws what has been learnt, as PNG; called on rank 0, a few times until the end.
    keep_last: write a checkpoint at the very end too: more is trained after this.
    Raises `EngineError` when the loss is no longer finite.
    """
    start, history = 0, []
    sums: dict[str, float] = {}
    if found := context.latest_checkpoint():
        start, tensors, state = found
        trainable.restore(tensors)
        history, sums = list(state["history"]), dict(state["sums"])
    told = 0.0
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
            if context.rank == 0 and (time.monotonic() - told > 0.5 or done == steps):
                told = time.monotonic()
                context.report(done, steps, **means)
        if look is not None and context.rank == 0 and done in _looks(steps):
            context.save_sample(done, look())
        # At the very end the weights themselves are written.
        if (done % checkpoint_every == 0 and done < steps) or (keep_last and done == steps):
            context.save_checkpoint(done, trainable.tensors(), {"history": history, "sums": sums})
    return history


def _looks(steps: int) -> set[int]:
    """After which steps pictures are drawn: eight times, and closer together in the beginning."""
    return {max(1, round(steps * (number / _LOOKS) ** 2)) for number in range(1, _LOOKS + 1)}


def make_accelerator(
    context: FitContext,
    precision: str,
    gradient_accumulation_steps: int,
    some_unused: bool = False,
) -> Accelerator:
    """accelerate for this worker, on the device, memory and threads that the profile gives it.

    some_unused: workers must not wait for gradients of parameters that a loss does not reach.
    """
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, is_initialized

    if precision == "fp16" and context.device == "cpu":
        raise StudyError("precision: fp16 is for GPUs; say bf16 or fp32")
    mixed_precision = {"fp32": "no"}.get(precision, precision)
    if is_initialized() and AcceleratorState().mixed_precision != mixed_precision:
        # accelerate holds one precision for a process, which does one fit after the other. There is
        # no public way; the process group, which belongs to PartialState, stays.
        AcceleratorState._reset_state()
    made = Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        cpu=context.device == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=some_unused)],
    )
    keep_freed_memory()
    if context.threads:
        # After accelerate, which guesses the number from the machine's cores.
        torch.set_num_threads(context.threads)
    return made


def restore_schedule(scheduler: torch.optim.lr_scheduler.LambdaLR, steps: int) -> None:
    """Put a schedule of the learning rate where it stands after `steps` steps."""
    with warnings.catch_warnings():
        # The optimizer's own steps were taken before the checkpoint.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(steps):
            scheduler.step()


def seed_dropout(device: str, *parts: int | str) -> None:
    """Make what torch draws from its own generators, such as dropout, a function of `parts`.

    torch.manual_seed does as much and formats the stack each time, for CUDA's sake: 1.5 ms a step.
    """
    import torch

    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.startswith("cuda"):
        torch.cuda.manual_seed_all(seed)


def descend(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Any,
    loss: Tensor,
    max_grad_norm: float,
) -> None:
    """Backward, and at the end of accumulation clip and step."""
    accelerator.backward(loss)
    if accelerator.sync_gradients:
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


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


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def share_of_batch(batch_size: int, rank: int, world_size: int, accumulation: int) -> list[slice]:
    """The slices of a global batch that this rank computes, one for each micro-step."""
    if batch_size % (world_size * accumulation):
        raise StudyError(
            f"batch_size: {batch_size} cannot be shared among {world_size} workers x"
            f" {accumulation} accumulation steps;"
            f" make it a multiple of {world_size * accumulation}"
        )
    size = batch_size // (world_size * accumulation)
    first = rank * accumulation * size
    return [slice(first + part * size, first + (part + 1) * size) for part in range(accumulation)]


class WeightedSampler:
    """Rows of each step's global batch, drawn with replacement: f(seed, step) alone.

    weights: of n rows, relative to each other.
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
    """n^-balance for each image, where n is the size of its class: 0 draws images evenly, 1 draws
    classes evenly, 0.5 (square-root sampling) lies between."""
    _, inverse, counts = np.unique(
        np.asarray(labels, dtype=str), return_inverse=True, return_counts=True
    )
    return np.asarray(counts[inverse].astype(float) ** -balance)


def scaler_tensors(accelerator: Accelerator) -> dict[str, Tensor]:
    """The scale of fp16's losses, of which the next step depends."""
    import torch

    if accelerator.scaler is None:
        return {}
    state = accelerator.scaler.state_dict()
    return {
        f"scaler.{name}": torch.tensor(float(state[name])) for name in ("scale", "_growth_tracker")
    }


def restore_scaler(accelerator: Accelerator, tensors: dict[str, Tensor]) -> None:
    """Bring back what `scaler_tensors` gave."""
    if accelerator.scaler is None:
        return
    state = accelerator.scaler.state_dict()
    held = {name: float(value) for name, value in below("scaler.", tensors).items()}
    tracker = {"_growth_tracker": int(held["_growth_tracker"])}
    accelerator.scaler.load_state_dict({**state, **held, **tracker})


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
    """Bring back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            index, name = key.removeprefix(prefix).split(".", 1)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
