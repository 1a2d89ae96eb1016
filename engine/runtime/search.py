"""Trials on Ray Tune.

A trial computes a step of the study in its own process, which is reused for the next trial. With
several workers, Ray Train computes the step and the trial reserves no CPU
(`engine.runtime.nested`). Results are in the store, so Tune's own state is discarded and never
restored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ray import tune
from ray.tune import Result

from engine.core.errors import EngineError, StorageError, one_line
from engine.core.interrupts import off_main_thread
from engine.runtime.base import Runtime, Trial
from engine.runtime.errors import find_engine_error
from engine.runtime.inline import InlineRuntime
from engine.runtime.nested import DRIVER, Nested
from engine.work.resources import TrialResources
from engine.work.share import Share

_REFUSED = "refused"


class _Progress(tune.Callback):
    """Reports the start and end of trials, and counts the failures of each."""

    def __init__(self, on_start: Callable[[], None], on_end: Callable[[str], None]) -> None:
        self.on_start, self.on_end = on_start, on_end
        self.completed = set[str]()

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks to restore them later, which never happens here, and a progress
        # bar cannot be pickled.
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.on_start()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.completed.add(trial.config["name"])
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
    """Run a trial for each name, as many at once as fit."""
    # Its errors are stack dumps of trials that run again; those that count are raised.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    in_trial, threads = resources.workers == 1, resources.threads

    def trial(config: dict[str, Any]) -> dict[str, Any]:
        runtime: Runtime = InlineRuntime(threads, share) if in_trial else Nested(share, threads)
        try:
            metrics = run(config["name"], runtime)
        except StorageError:
            raise  # a retry may succeed
        except EngineError as error:
            # A retry would fail in the same way, so Tune must not see a failure.
            return {_REFUSED: str(error)}
        except Exception as error:
            if in_trial:
                raise
            # Ray Train has used its retries already.
            return {_REFUSED: f"{config['name']} failed: {one_line(error)}"}
        return metrics or {"done": 1.0}

    per_trial = {"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})}
    progress = _Progress(on_start, on_end)
    results = dict[str, Result]()
    waiting = list(names)
    for attempt in range(resources.max_failures + 1):
        tuner = tune.Tuner(
            tune.with_resources(trial, per_trial if in_trial else DRIVER),
            param_space={"name": tune.grid_search(waiting)},
            # Processes are reused: starting one costs more than a small fit.
            tune_config=tune.TuneConfig(
                max_concurrent_trials=None if in_trial else resources.drivers, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name=f"search-{attempt}", storage_path=folder, verbose=0, callbacks=[progress],
                failure_config=tune.FailureConfig(max_failures=resources.max_failures),
            ),
        )  # fmt: skip
        grid = off_main_thread(tuner.fit)
        # By position: the result of a trial that never reported contains no name.
        results |= {name: grid[place] for place, name in enumerate(waiting)}
        # Tune 2.60 gives up a trial, or ends it without a word, if its process dies between the
        # reset for it and its start (TuneController._process_trial_failure recovers only RUNNING
        # trials).
        waiting = [
            name
            for name in waiting
            if name not in progress.completed
            and ((error := results[name].error) is None or find_engine_error(error) is None)
        ]
        if not waiting:
            break
    # All trials have run by now, and the results of the others are stored. A trial that was tried
    # again and completed keeps the error of its first attempt.
    for name, result in results.items():
        if name in progress.completed:
            continue
        if (error := result.error) is None:
            raise EngineError(f"{name} failed: its process died at each attempt; see Ray's logs")
        if (own := find_engine_error(error)) is not None:
            raise own from None
        raise EngineError(f"{name} failed: {one_line(error)}") from error
    for result in results.values():
        if (refusal := (result.metrics or {}).get(_REFUSED)) is not None:
            raise EngineError(refusal)
