"""Settings of a study on Ray Tune.

Results are in the store, so Tune's own state is discarded and never restored. A trial whose setting
needs only small fits computes them in its own process, which is reused for the next trial (`leaf`).
Any other trial drives streams and fits that reserve CPUs and GPUs of their own, and reserves none
itself (`engine.runtime.nested`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray import cloudpickle
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from engine.core.errors import StorageError, one_line
from engine.core.interrupts import off_main_thread
from engine.runtime.base import Outcome, Runtime, Try
from engine.runtime.errors import find_engine_error
from engine.runtime.inline import InlineRuntime
from engine.runtime.nested import DRIVER, Nested
from engine.tuning.proposals import Halving, Proposals, Rung, Settings
from engine.work.resources import TrialResources
from engine.work.share import Share

_VALUE, _STEPS, _ERROR = "objective", "steps", "refused"
_DIED = "its process died"


class _ProposalSearcher(Searcher):
    """Gives proposals to Tune, and results back to them."""

    def __init__(self, proposals: Proposals, on_end: Callable[[Outcome], None]) -> None:
        super().__init__(metric=_VALUE, mode="max")
        self.proposals, self.on_end = proposals, on_end
        self.asked: dict[str, tuple[int, Settings]] = {}
        # An error that ends the run without failing a setting. Running trials continue: their
        # results are there for the next run.
        self.failed: Exception | None = None

    # Searcher.FINISHED is a text, which the type of the base class leaves out.
    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]
        proposal = None if self.failed else self.proposals.ask()
        if proposal is None:
            return str(Searcher.FINISHED)
        self.asked[trial_id] = proposal
        # As text: Tune interprets slashes and lists.
        return {"settings": json.dumps(proposal[1])}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        # Failures come through `_Errors`, which gets the error itself.
        if not error:
            self.end(trial_id, result or {})

    def end(self, trial_id: str, report: dict[str, Any], reason: str = "") -> None:
        """Record the end of a trial. report: its last one. reason: of a failure."""
        if trial_id not in self.asked:
            return
        number, settings = self.asked.pop(trial_id)
        reason = reason or (str(report.get(_ERROR, "")) if report else _DIED)
        reached = None if reason else Rung(int(report[_STEPS]), float(report[_VALUE]))
        self.proposals.tell(number, reached.value if reached else None)
        seconds = float(report.get("time_total_s", 0.0))
        try:
            self.on_end(Outcome(number, settings, reached, reason, seconds))
        except Exception as error:
            # Tune would only log it and continue.
            self.failed = self.failed or error

    def save(self, checkpoint_path: str) -> None:
        return

    def restore(self, checkpoint_path: str) -> None:
        return


class _Errors(ray_tune.Callback):
    """Separates failed settings from failed storage, once a trial has used its retries; reports the
    start of trials."""

    def __init__(self, searcher: _ProposalSearcher, on_start: Callable[[], None]) -> None:
        self.searcher, self.on_start = searcher, on_start

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks to restore them later, which never happens here, and `on_start`
        # may hold a lock.
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.on_start()

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        own = None
        if (path := trial.pickled_error_file) is not None:
            # An error that cannot be unpickled comes from another library, not from our storage.
            with suppress(Exception), open(path, "rb") as file:
                own = find_engine_error(cloudpickle.load(file))
        if isinstance(own, StorageError):
            self.searcher.failed = self.searcher.failed or own
        else:
            self.searcher.end(trial.trial_id, {}, _DIED)


def tune(
    run: Try,
    proposals: Proposals,
    halving: Halving | None,
    resources: TrialResources,
    leaf: bool,
    on_start: Callable[[], None],
    on_end: Callable[[Outcome], None],
    folder: str,
    share: Share,
) -> None:
    """Try settings until none is proposed, as many at once as fit. Raises `StorageError` if storage
    still fails at a setting's last attempt."""
    # Its errors are stack dumps of trials that run again; those that count are raised.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    leaf, threads = leaf and resources.workers == 1, resources.threads

    def trial(config: dict[str, Any]) -> None:
        runtime: Runtime = InlineRuntime(threads, share) if leaf else Nested(share)
        try:
            for rung in run(json.loads(config["settings"]), runtime):
                ray_tune.report({_VALUE: rung.value, _STEPS: rung.steps})
        except StorageError:
            raise  # a retry may succeed
        except Exception as error:
            # A retry would fail in the same way, so Tune must not see a failure.
            ray_tune.report({_VALUE: float("-inf"), _STEPS: 0, _ERROR: one_line(error)})

    per_trial = {"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})}
    scheduler = None  # first in, first out
    if halving is not None:
        scheduler = ASHAScheduler(
            time_attr=_STEPS, metric=_VALUE, mode="max", max_t=halving.most,
            grace_period=halving.grace, reduction_factor=halving.reduction_factor,
        )  # fmt: skip
    searcher = _ProposalSearcher(proposals, on_end)
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(trial, per_trial if leaf else DRIVER),
        # Processes are reused: starting one costs more than a small fit.
        tune_config=ray_tune.TuneConfig(
            search_alg=searcher, scheduler=scheduler, num_samples=-1,
            max_concurrent_trials=None if leaf else resources.drivers, reuse_actors=True,
        ),
        run_config=ray_tune.RunConfig(
            name="tune", storage_path=folder, verbose=0, callbacks=[_Errors(searcher, on_start)],
            failure_config=ray_tune.FailureConfig(max_failures=resources.max_failures),
        ),
    )  # fmt: skip
    off_main_thread(tuner.fit)
    if searcher.failed is not None:
        raise searcher.failed from None
