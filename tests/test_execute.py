"""Records of how a step ran: resource use, provenance, digests."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest

from engine.comparison.arms import planned_trials
from engine.context import Context, Work
from engine.core.manifest import Manifest, read_manifest, write_part
from engine.core.progress import Bar
from engine.core.spec import Spec
from engine.core.step import Step, Subject
from engine.core.store import Store
from engine.execute import Trials, execute, resource_use
from engine.plan import named, plan, until
from engine.profile import Profile
from engine.runtime.cluster import RayRuntime
from engine.runtime.inline import InlineRuntime
from engine.work.resources import FitResources, StageResources, TrialResources
from tests.core.test_progress import Lines

RAY_CLUSTER = Profile(
    device="cuda",
    stages={
        "embed": StageResources(actors=8, cpus=2, gpus=0.5),
        "decode": StageResources(actors=2, cpus=0.5),
        "default": StageResources(gpus=1),
    },
    fit=FitResources(workers=4, cpus=3, gpus=1), trial=TrialResources(cpus=2, gpus=0.25),
)  # fmt: skip


RAY = RayRuntime("local", None, warn=print)
WORK = [Work("embed", 3, 100.0), Work("decode", 9, 10.0), Work("fit", 1, 50.0)]


def test_reserved_resources_are_those_of_pools_and_this_process() -> None:
    by_name = {entry.pop("what"): entry for entry in resource_use(WORK, 170.0, RAY, RAY_CLUSTER)}
    assert by_name == {
        # No more actors than shards.
        "embed": {"workers": 3, "cpus": 2.0, "gpus": 0.5, "seconds": 100.0},
        "decode": {"workers": 2, "cpus": 0.5, "gpus": 0.0, "seconds": 10.0},
        "fit": {"workers": 4, "cpus": 3.0, "gpus": 1.0, "seconds": 50.0},
        "driver": {"workers": 1, "cpus": 1.0, "gpus": 0.0, "seconds": 10.0},
    }


def test_trial_reserves_its_share_whatever_it_computes() -> None:
    (share,) = resource_use(WORK, 170.0, InlineRuntime(threads=1), RAY_CLUSTER)
    assert share == {"what": "trial", "workers": 1, "cpus": 2.0, "gpus": 0.25, "seconds": 170.0}


class Workers(InlineRuntime):
    """Computes in this process, and records the resources of each fit."""

    in_process = False

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[FitResources] = []

    def search(self, run, names, resources, on_end) -> None:
        for name in names:
            run(name, self)

    def fit(self, train, context, resources) -> None:
        self.asked.append(resources)
        super().fit(train, context, resources)


def test_trial_on_workers_reserves_like_a_fit(bars_study, store: Store, profile: Profile) -> None:
    steps = plan(bars_study(generators={}))
    execute(until(steps, "mix.real"), store, InlineRuntime(), profile)
    trial = planned_trials(named(steps, "search")[0])[0].step
    granted = TrialResources(workers=3, cpus=2, max_failures=5)
    runtime, profile = Workers(), profile.model_copy(update={"runtime": "ray", "trial": granted})
    (trained,) = Trials(store, runtime, profile).run([trial], print).values()
    every = profile.fit.checkpoint_every
    asked = FitResources(workers=3, cpus=2, max_failures=5, checkpoint_every=every)
    assert runtime.asked == [asked]
    fit, driver = trained.provenance["held"]
    assert (fit["what"], fit["workers"], fit["cpus"]) == ("fit", 3, 2.0)
    assert driver["what"] == "driver"


def test_fit_stuck_before_its_first_step_is_reported(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Lines()

    class Stuck(InlineRuntime):
        def fit(self, train, context, resources) -> None:
            assert log.written.acquire(timeout=60)
            raise LookupError("stuck")

    monkeypatch.setattr("engine.context.Bar", partial(Bar, stream=log, quiet=0.05))
    context = Context(
        step=Step("finetune", Subject(), Spec(), {}), inputs={}, store=store, runtime=Stuck(),
        stage_resources=lambda name: StageResources(), fit_resources=FitResources(), device="cpu",
    )  # fmt: skip
    with pytest.raises(LookupError):
        context.fit(print, "steps")
    assert log.getvalue().startswith("  finetune: no progress for 0 s; not started yet")


def test_inline_run_reserves_the_whole_gpu() -> None:
    inline = RAY_CLUSTER.model_copy(update={"runtime": "inline"})
    by_name = {entry["what"]: entry for entry in resource_use(WORK, 170.0, InlineRuntime(), inline)}
    assert [by_name[name]["workers"] for name in ("embed", "fit")] == [1, 1]
    assert [by_name[name]["gpus"] for name in ("embed", "decode", "fit")] == [1.0, 0.0, 1.0]


def test_reserved_resources_are_in_every_manifest_and_outdate_none(
    bars_study, store: Store, profile: Profile
) -> None:
    study = bars_study()
    steps = plan(study)
    manifests = execute(steps, store, InlineRuntime(), profile)
    for manifest in manifests.values():
        entries = manifest.provenance["held"]
        assert sum(entry["seconds"] for entry in entries) == pytest.approx(
            manifest.provenance["seconds"], abs=0.01
        )
    ingest, embed = (manifests[named(steps, kind)[0].key] for kind in ("ingest", "embed"))
    assert [entry["what"] for entry in ingest.provenance["held"]] == ["decode", "embed", "driver"]
    assert [entry["what"] for entry in embed.provenance["held"]] == ["embed", "driver"]
    trials = [trial.step for trial in planned_trials(named(steps, "search")[0])]
    for trained in Trials(store, InlineRuntime(), profile).find(trials).values():
        assert [entry["what"] for entry in trained.provenance["held"]] == ["fit", "driver"]
    other = {**ingest.provenance, "held": [], "seconds": 1e6, "python": "9"}
    assert ingest.model_copy(update={"provenance": other}).digest == ingest.digest


class Beaten(Store):
    """Storage on which another driver runs the same steps to their end, as soon as this driver
    reads the decoded images of both."""

    steps: ClassVar[list[Step]] = []
    beaten = False

    def parquet(self, key: str) -> Any:
        if "/decoded/" in key and not self.beaten:
            self.beaten = True
            execute(self.steps, Store(self.url), InlineRuntime(), Profile(storage=self.url))
        return super().parquet(key)


def test_driver_continues_with_results_of_another_driver(bars_study, store: Store) -> None:
    Beaten.steps = until(plan(bars_study()), "embed")
    mine = Beaten(store.url)
    found = execute(Beaten.steps, mine, InlineRuntime(), Profile(storage=store.url))
    assert mine.beaten
    others = execute(Beaten.steps, store, InlineRuntime(), Profile(storage=store.url))
    assert {key: one.digest for key, one in found.items()} == {
        key: one.digest for key, one in others.items()
    }
    decoded = [key for key in store.listing("steps/ingest") if "/decoded/" in key]
    assert decoded == []


def test_returned_manifest_equals_the_stored_one(bars_study, store: Store) -> None:
    steps = until(plan(bars_study()), "ingest")
    (made,) = execute(steps, store, InlineRuntime(), Profile(storage=store.url)).values()
    read = read_manifest(store, steps[0])
    # The same types and the same order, because a page lists classes in this order.
    assert repr(made) == repr(read)


def test_times_are_not_part_of_the_identity_of_a_result(store: Store, bars_study) -> None:
    steps = until(plan(bars_study()), "ingest")
    (made,) = execute(steps, store, InlineRuntime(), Profile(storage=store.url)).values()

    def with_part(data: bytes, timed: bool) -> Manifest:
        part = write_part(store, "parts", "cost", "csv", data, timed=timed)
        return made.model_copy(update={"parts": (*made.parts, part)})

    assert with_part(b"3 s", True).digest == with_part(b"4 s", True).digest == made.digest
    assert with_part(b"3 s", False).digest != with_part(b"4 s", False).digest
