"""Settings of a study on Ray Tune.

What a setting computes lies in the store, so Tune's own state is thrown away and never restored. A
trial whose setting needs small fits alone computes them in its own process, which goes on to the
next (`leaf`). Any other drives streams and fits that hold CPUs and GPUs of their own, and holds
none itself (`engine.runtime.nested`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray import cloudpickle
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher

from engine.core.errors import StorageError, one_line
from engine.core.interrupts import off_main_thread
from engine.runtime.base import Outcome, Runtime, Try
from engine.runtime.cluster import ray_error_text
from engine.runtime.inline import InlineRuntime
from engine.runtime.nested import DRIVER, Nested
from engine.tuning.proposals import Halving, Proposals, Rung, Settings
from engine.work.resources import TrialResources
from engine.work.share import Share

_VALUE, _STEPS, _ERROR = "objective", "steps", "refused"
_DIED = "its process died"


class _Ask(Searcher):
    """Hands out proposals, and tells them what was reached."""

    def __init__(self, proposals: Proposals, on_end: Callable[[Outcome], None]) -> None:
        super().__init__(metric=_VALUE, mode="max")
        self.proposals, self.on_end = proposals, on_end
        self.asked: dict[str, tuple[int, Settings]] = {}
        # What ends the run and is no setting's fault. Those that Tune has been given go on: what
        # they compute is there for the next run.
        self.failed: Exception | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        asked = None if self.failed else self.proposals.ask()
        if asked is None:
            return str(Searcher.FINISHED)
        self.asked[trial_id] = asked
        # As text: Tune reads meaning into / and lists.
        return {"settings": json.dumps(asked[1])}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        # Of an error, Tune tells a callback which it was.
        if not error:
            self.ends(trial_id, result or {})

    def ends(self, trial_id: str, told: dict[str, Any], why: str = "") -> None:
        """What became of a trial: a report, or why there is none."""
        if trial_id not in self.asked:
            return
        number, settings = self.asked.pop(trial_id)
        why = why or (str(told.get(_ERROR, "")) if told else _DIED)
        reached = None if why else Rung(int(told[_STEPS]), float(told[_VALUE]))
        self.proposals.tell(number, reached.value if reached else None)
        seconds = float(told.get("time_total_s", 0.0))
        try:
            self.on_end(Outcome(number, settings, reached, why, seconds))
        except Exception as error:
            # Tune would log it, and go on as if the setting had not been.
            self.failed = self.failed or error

    def save(self, checkpoint_path: str) -> None:
        return

    def restore(self, checkpoint_path: str) -> None:
        return


class _Errors(ray_tune.Callback):
    """Tells a setting that failed from storage that did, once there is no other attempt; passes on
    that trials have started."""

    def __init__(self, ask: _Ask, on_start: Callable[[], None]) -> None:
        self.ask, self.on_start = ask, on_start

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.on_start()

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        own = None
        if (held := trial.pickled_error_file) is not None:
            # What cannot be read is of another library: no storage of ours.
            with suppress(Exception), open(held, "rb") as file:
                own = ray_error_text(cloudpickle.load(file))
        if isinstance(own, StorageError):
            self.ask.failed = self.ask.failed or own
        else:
            self.ask.ends(trial.trial_id, {}, _DIED)


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
    """Try settings until none is proposed, as many at once as there is room for. Raises
    `StorageError` where storage still fails at a setting's last attempt."""
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    leaf, threads = leaf and resources.workers == 1, resources.threads

    def trial(config: dict[str, Any]) -> None:
        runtime: Runtime = InlineRuntime(threads, share) if leaf else Nested(share)
        try:
            for rung in run(json.loads(config["settings"]), runtime):
                ray_tune.report({_VALUE: rung.value, _STEPS: rung.steps})
        except StorageError:
            raise  # may be gone at the next attempt
        except Exception as error:
            # Another attempt would come to the same: Tune is not told of a failure.
            told = {_VALUE: float("-inf"), _STEPS: 0, _ERROR: one_line(error)}
            ray_tune.report(told)

    held = {"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})}
    scheduler = FIFOScheduler()
    if halving is not None:
        scheduler = ASHAScheduler(
            time_attr=_STEPS, metric=_VALUE, mode="max", max_t=halving.most,
            grace_period=halving.grace, reduction_factor=halving.reduction_factor,
        )  # fmt: skip
    ask = _Ask(proposals, on_end)
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(trial, held if leaf else DRIVER),
        # One process goes on from setting to setting: starting one costs more than a small fit.
        tune_config=ray_tune.TuneConfig(
            search_alg=ask, scheduler=scheduler, num_samples=-1,
            max_concurrent_trials=None if leaf else resources.drivers, reuse_actors=True,
        ),
        run_config=ray_tune.RunConfig(
            name="tune", storage_path=folder, verbose=0, callbacks=[_Errors(ask, on_start)],
            failure_config=ray_tune.FailureConfig(max_failures=resources.max_failures),
        ),
    )  # fmt: skip
    off_main_thread(tuner.fit)
    if ask.failed is not None:
        raise ask.failed from None
