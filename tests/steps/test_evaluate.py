"""Evaluate: who opens test, which trials it reads, and which arms it contrasts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.comparison.arms import Arm, planned_trials
from engine.core.errors import ResumeError, StorageError, StudyError
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.execute import discard
from engine.plan import named, plan
from engine.results.comparison import EvaluateResult
from engine.steps.evaluate import declared, untrained
from engine.study import Study
from tests.results import confirm_result, search_result

# Only what differs from the finished study of bars is computed.
pytestmark = pytest.mark.usefixtures("resumed")

Run = Callable[[Study, str], Manifest]


def test_only_evaluate_opens_test_and_openings_are_counted(
    bars_study, run_until: Run, store: Store, tmp_path: Path
) -> None:
    confirmed = run_until(bars_study(), "confirm")
    assert confirmed.metrics["trials"]
    assert not store.listing("openings")
    assert run_until(bars_study(), "evaluate").metrics["test"]["opened"] == 1
    other = bars_study(evaluate={"bootstrap_draws": 201})
    assert run_until(other, "evaluate").metrics["test"]["opened"] == 2
    # Other data of an arm: another evaluation opens test.
    folder = tmp_path / "good" / "down"
    (folder / "0000.png").rename(folder / "00000.png")
    assert run_until(bars_study(), "evaluate").metrics["test"]["opened"] == 3


def test_no_step_before_evaluate_can_read_test(bars_study, run_until: Run, store: Store) -> None:
    ingest = run_until(bars_study(), "ingest")
    kept = {key: store.read(key) for key in ingest.keys(split="test")}
    for key in kept:
        store.put(key, b"a canary: whoever reads test cannot go on")
    confirmed = run_until(bars_study(), "confirm")
    assert confirmed.metrics["trials"]
    with pytest.raises(StorageError, match="is not a readable Parquet file"):
        run_until(bars_study(), "evaluate")
    for key, data in kept.items():
        store.put(key, data)
    assert run_until(bars_study(), "evaluate").metrics["headline"]


def test_evaluate_reads_only_the_trials_of_the_confirmation(
    bars_study, run_until: Run, store: Store
) -> None:
    run_until(bars_study(), "confirm")
    confirm = named(plan(bars_study()), "confirm")[0]
    trial = planned_trials(confirm)[0].step
    discard(trial, store)
    with pytest.raises(ResumeError, match=r"train.real.2 is not the trial .* --discard confirm"):
        run_until(bars_study(), "evaluate")


def test_each_synthetic_family_is_contrasted_with_all_baselines_and_its_twin() -> None:
    fields: dict[str, Any] = {"mixes": ("m",), "ratio": 1.0, "generators": ("g",)}
    planned = [
        Arm(name="real", family="real", mixes=("m",)),
        Arm(name="g x1", family="g", role="compared", **fields),
        Arm(name="g x2", family="g", role="compared", **{**fields, "ratio": 2.0}),
        Arm(name="g unfiltered x2", family="g unfiltered", role="shown", twin_of="g x2", **fields),
        Arm(name="moved x1", family="moved", **fields),
        Arm(name="moved x2", family="moved", **fields),
    ]
    tested = {arm.name: arm for arm in planned if arm.name not in ("g x1", "moved x2")}
    search = search_result(baseline="moved x1", chosen=["real", "g x2", "moved x1"])
    confirm = confirm_result(twins={"g unfiltered x2": "g x2"})
    with_baselines, with_twin = declared(planned, search, confirm, tested, {"g x2"})
    assert (with_baselines.arm, with_baselines.baselines) == ("g x2", ("real", "moved x1"))
    assert (with_baselines.best, with_baselines.real) == ("moved x1", "real")
    # Both families had two ratios to choose from on val; the twin took its arm's.
    assert with_baselines.tries == {
        "real": 1, "g x2": 2, "moved x1": 2, "g unfiltered x2": 1
    }  # fmt: skip
    assert (with_twin.arm, with_twin.baselines, with_twin.twin) == (
        "g x2",
        ("g unfiltered x2",),
        True,
    )
    assert with_baselines.drawn
    assert with_baselines.ratio == 2.0


def test_fits_of_untrained_generators_are_only_draws(bars_study) -> None:
    generators = {"d": {"name": "ddpm"}, "t": {"name": "traditional"}}
    combine = {"both": ["d", "t"]}
    study = bars_study(
        generators=generators, search={"ratios": [1], "seeds": 2, "combine": combine}
    )
    (search,) = named(plan(study), "search")
    assert untrained(search) == {"t x1"}


def test_the_comparison_is_repeated_within_the_values_of_a_column(
    bars_study, run_until: Run, tmp_path: Path
) -> None:
    names = sorted(
        path.relative_to(tmp_path / "real").as_posix()
        for path in (tmp_path / "real").rglob("*.png")
    )
    lines = [
        f"{name},{name.split('/')[0]},{'old' if number % 2 else 'new'}"
        for number, name in enumerate(names)
    ]
    (tmp_path / "real" / "labels.csv").write_text("\n".join(["path,label,device", *lines]))
    reader = {
        "name": "csv", "root": str(tmp_path / "real"), "file": "labels.csv", "path": "path",
        "labels": {"class": "label", "device": "device"},
    }  # fmt: skip

    def by(column: str) -> Study:
        whole = bars_study(evaluate={"bootstrap_draws": 200, "subgroups": [column]})
        values = whole.model_dump(mode="json")
        return Study.model_validate({**values, "reader": reader, "task": "class"})

    found = EvaluateResult.of(run_until(by("device"), "evaluate"))
    assert [(part.column, part.value) for part in found.subgroups] == [
        ("device", "new"), ("device", "old"),
    ]  # fmt: skip
    assert sum(part.images for part in found.subgroups) == found.test.images
    with pytest.raises(StudyError, match="'sex' is not another single-label task of the reader"):
        plan(by("sex"))
