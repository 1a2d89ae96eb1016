"""Trials on Ray Tune.

A trial computes a step of the study in a process of its own, which goes on to the next trial; or
workers of Ray Train compute it, and the trial holds nothing itself (`engine.runtime.nested`). What
is computed lies in the store, so Tune's own state is thrown away and never restored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ray import tune

from engine.core.errors import EngineError, StorageError, in_a_line
from engine.core.interrupts import off_main_thread
from engine.core.resources import TrialResources
from engine.core.share import Share
from engine.runtime.base import Runtime, Trial
from engine.runtime.cluster import ray_error_text
from engine.runtime.inline import InlineRuntime
from engine.runtime.nested import DRIVER, Nested

_REFUSED = "refused"


class _Tell(tune.Callback):
    """Passes on that trials have started, and the end of each."""

    def __init__(self, on_start: Callable[[], None], on_end: Callable[[str], None]) -> None:
        self.on_start, self.on_end = on_start, on_end

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes its callbacks down, to restore them: never done, and a terminal's progress
        # cannot be written.
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.on_start()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.on_end(trial.config["name"])


def search(
    run: Trial,
    names: Sequence[str],
    resources: TrialResources,
    on_start: Callable[[], None],
    on_end: Callable[[str], None],
    folder: str,
    share: Share,
) -> None:
    """Run a trial for each name, as many at once as there is room for."""
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    alone, threads = resources.workers == 1, resources.threads

    def trial(config: dict[str, Any]) -> dict[str, Any]:
        runtime: Runtime = InlineRuntime(threads, share) if alone else Nested(share, threads)
        try:
            figures = run(config["name"], runtime)
        except StorageError:
            raise  # may be gone at the next attempt
        except EngineError as error:
            # Another attempt would come to the same: Tune is not told of a failure.
            return {_REFUSED: str(error)}
        except Exception as error:
            if alone:
                raise
            # Ray Train has tried again as often as it may.
            return {_REFUSED: f"{config['name']} failed: {in_a_line(error)}"}
        return figures or {"done": 1.0}

    held = {"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})}
    tuner = tune.Tuner(
        tune.with_resources(trial, held if alone else DRIVER),
        param_space={"name": tune.grid_search(list(names))},
        # One process goes on from trial to trial: starting one costs more than a small fit.
        tune_config=tune.TuneConfig(
            max_concurrent_trials=None if alone else resources.drivers, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="search", storage_path=folder, verbose=0, callbacks=[_Tell(on_start, on_end)],
            failure_config=tune.FailureConfig(max_failures=resources.max_failures),
        ),
    )  # fmt: skip
    results = off_main_thread(tuner.fit)
    # All others have been run, and what they computed stays.
    for result in results:
        if (error := result.error) is not None:
            if (own := ray_error_text(error)) is not None:
                raise own from None
            name = (result.config or {}).get("name", "a trial")
            raise EngineError(f"{name} failed: {in_a_line(error)}") from error
    for result in results:
        if _REFUSED in (result.metrics or {}):
            raise EngineError(result.metrics[_REFUSED])
