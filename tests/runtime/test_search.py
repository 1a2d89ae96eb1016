"""Trials and settings on both runtimes: a failure affects only itself, and is named."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.comparison.arms import planned_trials
from engine.core import rows
from engine.core.errors import DataError, EngineError, StorageError, StudyError
from engine.core.manifest import Manifest, read_manifest
from engine.core.store import Store
from engine.data.arrays import matrix_of
from engine.execute import execute
from engine.plan import plan, until
from engine.profile import Profile
from engine.runtime.base import Outcome, Runtime
from engine.runtime.cluster import RayRuntime, refuse_too_large
from engine.runtime.inline import InlineRuntime
from engine.steps.train import PREDICTIONS
from engine.tuning.proposals import Halving, Proposals, Rung, Settings
from engine.tuning.tune import tune
from engine.work.resources import FitResources, TrialResources

PROBE = {"name": "probe", "embedder": {"name": "pixels", "side": 16}, "hidden": 24}
RUNTIMES = ["inline", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])]


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, Runtime]]:
    runtimes: dict[str, Runtime] = {
        "inline": InlineRuntime(), "ray": RayRuntime("local", 4, warn=print)
    }  # fmt: skip
    yield runtimes
    for runtime in runtimes.values():
        runtime.close()


@dataclass(frozen=True)
class Fails:
    """Trials; the named one raises, or ends its process if `dies` is set."""

    store: Store
    name: str
    dies: bool = False

    def __call__(self, name: str, runtime: Runtime) -> dict[str, float]:
        if name == self.name and self.dies:
            os._exit(1)
        if name == self.name:
            raise DataError(f"{name}: no image of any class")
        self.store.put(f"made/{name}", b"")
        return {}


@pytest.mark.parametrize("kind", RUNTIMES)
def test_other_trials_finish_if_one_fails_and_it_is_named(
    started: dict[str, Runtime], tmp_path: Path, kind: str
) -> None:
    store, ended = Store(str(tmp_path)), list[str]()
    names = ["train.real.0", "train.real.1", "train.real.2"]
    resources = TrialResources(max_failures=0)
    with pytest.raises(EngineError, match=r"^train\.real\.0: no image of any class$"):
        started[kind].search(Fails(store, names[0]), names, resources, ended.append)
    assert store.listing("made") == [f"made/{name}" for name in names[1:]]
    assert set(names[1:]) <= set(ended)
    if kind == "ray":
        with pytest.raises(EngineError, match=r"^train\.real\.1 failed: "):
            started[kind].search(Fails(store, names[1], True), names, resources, ended.append)
        assert store.listing("made") == [f"made/{name}" for name in names]


@dataclass(frozen=True)
class NotesProcess:
    """Trials that record the process that computed them."""

    store: Store

    def __call__(self, name: str, runtime: Runtime) -> dict[str, float]:
        self.store.put(f"made/{name}", str(os.getpid()).encode())
        return {}


@pytest.mark.ray
@pytest.mark.slow
def test_process_death_between_trials_costs_no_trial(
    started: dict[str, Runtime], tmp_path: Path
) -> None:
    store, ended = Store(str(tmp_path)), list[str]()

    def on_end(name: str) -> None:
        if not ended:
            os.kill(int(store.read(f"made/{name}")), signal.SIGKILL)
        ended.append(name)

    # One at a time: the process takes the next trial when the first has ended.
    resources = TrialResources(cpus=4, max_failures=1)
    names = ["train.real.0", "train.real.1", "train.real.2"]
    started["ray"].search(NotesProcess(store), names, resources, on_end)
    assert ended[0] == names[0]
    assert sorted(ended) == names
    assert store.listing("made") == [f"made/{name}" for name in names]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"cpus": 8}, r"^profile: trial\.cpus: 8 requested, this Ray has 4; .* raise num_cpus$"),
        ({"gpus": 0.5}, r"^profile: trial\.gpus: 0\.5 requested, this Ray has 0; request fewer$"),
        (
            {"cpus": 1.5, "workers": 3},
            r"^profile: trial\.cpus: 1\.5 for each of 3 workers requested, .* 4; .* num_cpus$",
        ),
    ],
)
def test_unplaceable_trials_are_rejected(asked: dict[str, float], why: str) -> None:
    refuse_too_large(TrialResources(cpus=4), {"CPU": 4.0})
    refuse_too_large(TrialResources(cpus=1, gpus=0.5), {"CPU": 4.0, "GPU": 1.0})
    refuse_too_large(TrialResources(cpus=2, workers=2), {"CPU": 4.0})
    with pytest.raises(StudyError, match=why):
        refuse_too_large(TrialResources(**asked), {"CPU": 4.0})
    with pytest.raises(StudyError, match=why.replace("trial", "fit")):
        refuse_too_large(FitResources(**asked), {"CPU": 4.0}, "fit")


@pytest.mark.ray
@pytest.mark.slow
def test_private_ray_rejects_trials_that_do_not_fit(
    started: dict[str, Runtime], tmp_path: Path
) -> None:
    ray, large = started["ray"], TrialResources(cpus=8)
    store, why = Store(str(tmp_path)), r"trial\.cpus: 8 requested, this Ray has 4"
    with pytest.raises(StudyError, match=why):
        ray.search(Fails(store, ""), ["train.real.0"], large, list[str]().append)
    proposals = Proposals({"x": (1, 2)}, "grid", 2, seed=0)
    for leaf in (True, False):
        with pytest.raises(StudyError, match=why):
            ray.tune(Climbs(store, 0), proposals, None, large, leaf, list[Outcome]().append)


@dataclass(frozen=True)
class Climbs:
    """A setting that reaches `x` at each of three budgets and fails at x = 3. At x = 4 it ends its
    process the first time, unless it runs in this one."""

    store: Store
    driver: int

    def __call__(self, settings: Settings, runtime: Runtime) -> Iterator[Rung]:
        x = settings.get("x", 0)
        for steps in (2, 4, 8):
            if x == 3:
                raise ValueError("no\nsuch number")
            first = not self.store.exists("died")
            if x == 4 and first and os.getpid() != self.driver:
                self.store.put("died", b"")
                os._exit(1)
            yield Rung(steps, float(x))


@pytest.mark.parametrize("kind", RUNTIMES)
@pytest.mark.parametrize("halving", [None, Halving(2, 2, 8)], ids=["all", "asha"])
def test_settings_finish_whatever_happens_to_others(
    started: dict[str, Runtime], tmp_path: Path, kind: str, halving: Halving | None
) -> None:
    outcomes: dict[int, Outcome] = {}
    proposals = Proposals({"x": (5, 3, 4, 1, 2)}, "grid", 5, seed=0)

    def on_end(outcome: Outcome) -> None:
        outcomes[outcome.number] = outcome

    run = Climbs(Store(str(tmp_path)), os.getpid())
    # One at a time, so that what came before is known.
    resources = TrialResources(cpus=4, max_failures=1)
    started[kind].tune(run, proposals, halving, resources, True, on_end)
    assert sorted(outcomes) == [0, 1, 2, 3, 4, 5]
    assert outcomes[2].error == "ValueError: no such number"
    assert outcomes[2].reached is None
    reached = {number: outcome.reached for number, outcome in outcomes.items() if number != 2}
    assert not any(outcomes[number].error for number in reached)
    assert reached[1] == (8, 5.0)
    assert reached[3] == (8, 4.0)
    assert reached[4] == ((8, 1.0) if halving is None else (2, 1.0))


@dataclass(frozen=True)
class Unreachable:
    """Settings that need a storage which fails at x = 2, a given number of times."""

    store: Store
    times: int

    def __call__(self, settings: Settings, runtime: Runtime) -> Iterator[Rung]:
        x, failed = settings.get("x", 0), len(self.store.listing("failed"))
        if x == 2 and failed < self.times:
            self.store.put(f"failed/{failed}", b"")
            raise StorageError("s3://bucket cannot be written now")
        yield Rung(1, float(x))


@pytest.mark.parametrize("kind", RUNTIMES)
def test_storage_failure_is_retried_and_fails_no_setting(
    started: dict[str, Runtime], tmp_path: Path, kind: str
) -> None:
    def tries(times: int) -> tuple[dict[int, Outcome], int, str]:
        store, outcomes, why = Store(str(tmp_path / str(times))), dict[int, Outcome](), ""
        proposals = Proposals({"x": tuple(range(1, 9))}, "grid", 8, seed=0)

        def on_end(outcome: Outcome) -> None:
            outcomes[outcome.number] = outcome

        try:
            started[kind].tune(
                Unreachable(store, times), proposals, None,
                TrialResources(cpus=4, max_failures=1), True, on_end,
            )  # fmt: skip
        except StorageError as error:
            why = str(error)
        return outcomes, len(store.listing("failed")), why

    outcomes, failed, why = tries(9)
    # Tune has the next one ready while one is tried.
    assert {0, 1} <= set(outcomes) < set(range(6)) - {2}
    assert why == "s3://bucket cannot be written now"
    assert failed == (2 if kind == "ray" else 1)
    if kind == "ray":
        outcomes, failed, why = tries(1)
        assert (failed, why) == (1, "")
        assert [outcomes[number].reached for number in range(9)] == [(1, x) for x in range(9)]


@pytest.mark.parametrize("kind", RUNTIMES)
def test_unrecordable_outcome_ends_the_run(
    started: dict[str, Runtime], tmp_path: Path, kind: str
) -> None:
    numbers: list[int] = []

    def on_end(outcome: Outcome) -> None:
        numbers.append(outcome.number)
        raise StorageError("s3://bucket cannot be read now")

    proposals = Proposals({"x": tuple(range(1, 9))}, "grid", 8, seed=0)
    with pytest.raises(StorageError, match="cannot be read now"):
        started[kind].tune(
            Unreachable(Store(str(tmp_path)), 0), proposals, None, TrialResources(cpus=4), True,
            on_end,
        )  # fmt: skip
    assert numbers[0] == 0
    assert len(numbers) < 5


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("knobs", "arm", "trial"),
    [
        ({"training.learning_rate": [0.01, 0.03]}, "real", TrialResources(cpus=2)),
        (
            {"curate.filters.agreement.confidence": [0.8, 0.95]}, "more x1",
            TrialResources(cpus=2),
        ),
        ({"training.learning_rate": [0.01, 0.03]}, "real", TrialResources(workers=2)),
    ],
    ids=["leaf", "driver", "workers"],
)  # fmt: skip
@pytest.mark.timeout(600)
def test_settings_give_equal_results_on_ray_and_inline(
    started: dict[str, Runtime], bars_study: Any, tmp_path: Path, knobs: dict[str, Any], arm: str,
    trial: TrialResources,
) -> None:  # fmt: skip
    # Several workers give the same result only without batch normalisation.
    alike = {"classifier": PROBE} if trial.workers > 1 else {}
    study = bars_study(tune={"knobs": knobs, "arm": arm}, **alike)
    values = study.model_dump(mode="json")
    values["request"] = {"ratio": 1, "classes": ["down"], "shard_size": 16}
    found = {}
    for kind, runtime in started.items():
        profile = Profile(storage=str(tmp_path / kind), trial=trial)
        tried = tune(values, Store(profile.storage), runtime, profile)
        found[kind] = [(row["try"], row["state"], row["scores"]) for row in tried.tries]
    assert found["inline"] == found["ray"]
    assert [state for _, state, _ in found["ray"]] == ["ok"] * 3


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_search_on_two_workers_equals_one_process(
    started: dict[str, Runtime], bars_study: Any, tmp_path: Path
) -> None:
    training = {"steps": 12, "batch_size": 16, "learning_rate": 0.01, "evaluate_every": 4}
    study = bars_study(
        classifier=PROBE, training={**training, "class_weights": "balanced"}, generators={},
        search={"ratios": [1], "seeds": 2, "arms": ["mixup"]},
    )  # fmt: skip
    steps = until(plan(study), "search")
    trials = [trial.step for trial in planned_trials(steps[-1])]
    found: dict[str, list[Manifest]] = {}
    for kind, runtime in started.items():
        store = Store(str(tmp_path / kind))
        profile = Profile(storage=store.url, trial=TrialResources(workers=2, drivers=2))
        search = execute(steps, store, runtime, profile)[steps[-1].key]
        found[kind] = [search, *(read_manifest(store, step) for step in trials)]
        probabilities = [
            matrix_of(table, rows.PROBABILITIES)
            for manifest in found[kind][1:]
            for table in store.tables(manifest.keys(file=PREDICTIONS))
        ]
        if kind == "inline":
            alone = np.stack(probabilities)
    assert len(alone) == len(trials) > 4
    # The trials learn something, and each something else.
    assert np.ptp(alone, axis=0).max() > 0.01
    np.testing.assert_allclose(np.stack(probabilities), alone, atol=1e-4)
    one, two = found["inline"], found["ray"]
    assert one[0].metrics["chosen"] == two[0].metrics["chosen"]
    assert one[0].metrics["baseline"] == two[0].metrics["baseline"]
    for manifest in two[1:]:
        fit, _ = manifest.provenance["held"]
        assert (fit["what"], fit["workers"], fit["cpus"]) == ("fit", 2, 1.0)
