"""Fits on Ray Train workers.

Checkpoints and weights go through the store (`engine.work.fit`), not through Ray: they outlive the
Ray cluster, and any later run can use them. Ray Train starts the workers, joins them in one process
group and replaces workers that die.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ray.train
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from engine.core.errors import EngineError, brief
from engine.core.interrupts import off_main_thread
from engine.runtime.errors import find_engine_error
from engine.work.fit import FitContext
from engine.work.resources import FitResources


def fit(
    train: Callable[[FitContext], None], context: FitContext, resources: FitResources, folder: str
) -> None:
    """Run `train` on `resources.workers` workers until it has ended on all of them."""

    def loop(_: dict[str, object]) -> None:
        worker = ray.train.get_context()
        train(
            replace(
                context,
                rank=worker.get_world_rank(),
                world_size=worker.get_world_size(),
                device="cuda" if resources.gpus else "cpu",
                threads=context.threads or max(1, int(resources.cpus)),
            )
        )

    for attempt in range(resources.max_failures + 1):
        trainer = TorchTrainer(
            loop,
            train_loop_config={},
            scaling_config=ScalingConfig(
                num_workers=resources.workers,
                use_gpu=resources.gpus > 0,
                resources_per_worker={
                    "CPU": resources.cpus,
                    **({"GPU": resources.gpus} if resources.gpus else {}),
                },
            ),
            run_config=RunConfig(
                name=f"{context.attempt}-{attempt}",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=resources.max_failures),
            ),
        )
        try:
            off_main_thread(trainer.fit)
            return
        except ControllerError as error:
            # Ray Train 2.60 replaces workers that die in the loop, and gives up if one dies while
            # they start. What has been computed is in the store.
            if (own := find_engine_error(error)) is not None:
                raise own from None
            if attempt == resources.max_failures:
                raise EngineError(
                    f"{context.work}: the workers of a fit died {attempt + 1} times while they"
                    f" started ({brief(error)}); see Ray's logs, or raise fit.max_failures"
                ) from error
        except Exception as error:
            if (own := find_engine_error(error)) is not None:
                raise own from None
            raise
