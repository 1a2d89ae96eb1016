"""Test sets from elsewhere: read, evaluated once with test, and shown next to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core.errors import DataError, StudyError
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.execute import discard
from engine.plan import named, plan
from engine.results.comparison import EvaluateResult
from engine.results.data import ExternalResult
from engine.study import Study
from tests.conftest import write_bars

# Only what differs from the finished study of bars is computed.
pytestmark = pytest.mark.usefixtures("resumed")

Make = Callable[..., Study]
Run = Callable[[Study, str], Manifest]


@pytest.fixture
def elsewhere(tmp_path: Path, bars_study: Make) -> Make:
    """A function that makes the study with another hospital's images, some of which it has too."""
    write_bars(tmp_path / "clinic", {"across": 20, "down": 20}, 9000)
    for number in range(3):
        known = tmp_path / "real" / "down" / f"{number:04d}.png"
        (tmp_path / "clinic" / "down" / f"known{number}.png").write_bytes(known.read_bytes())

    def make(**reader: Any) -> Study:
        clinic = {"name": "imagefolder", "root": str(tmp_path / "clinic"), **reader}
        return bars_study(evaluate={"bootstrap_draws": 200, "external": {"clinic": clinic}})

    return make


def test_an_external_test_set_is_shown_beside_the_own_one(
    elsewhere: Make, bars_study: Make, run_until: Run, store: Store
) -> None:
    study = elsewhere()
    read = ExternalResult.of(run_until(study, "external.clinic"))
    assert read.counts == {"across": 20, "down": 20}
    assert read.set_aside == {"seen": 3}
    assert [notice.code for notice in read.warnings] == ["external_seen"]
    assert not store.listing("openings")
    evaluated = EvaluateResult.of(run_until(study, "evaluate"))
    (part,) = evaluated.external
    assert (part.value, part.images) == ("clinic", 40)
    assert list(part.to_real) == [evaluated.contrasts[0].arm]
    # The study's own test set and this one.
    assert len(store.listing("openings")) == 2
    # No verdict rests on it: without it the same contrast results.
    alone = EvaluateResult.of(run_until(bars_study(), "evaluate"))
    assert alone.contrasts == evaluated.contrasts


def test_nothing_before_evaluate_depends_on_it(elsewhere: Make, bars_study: Make) -> None:
    with_it = {step.key for step in plan(elsewhere())}
    changed = {step.kind for step in plan(bars_study()) if step.key not in with_it}
    assert changed == {"evaluate", "report"}


def test_what_does_not_fit_the_study_is_refused(
    elsewhere: Make, run_until: Run, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "clinic" / "aslant").mkdir()
    known = tmp_path / "clinic" / "down" / "9001.png"
    new = next(path for path in (tmp_path / "clinic" / "down").iterdir() if path != known)
    (tmp_path / "clinic" / "aslant" / "a.png").write_bytes(new.read_bytes())
    with pytest.raises(DataError, match="'aslant', which is not a class of the study"):
        run_until(elsewhere(), "external.clinic")
    study = elsewhere(classes=["across", "down"])
    assert run_until(study, "external.clinic").rows == 40
    # Other data under the same name.
    (tmp_path / "clinic" / "down" / "new.png").write_bytes(new.read_bytes())
    with pytest.raises(DataError, match=r"--discard external\.clinic"):
        run_until(study, "external.clinic")
    (step,) = named(plan(study), "external.clinic")
    discard(step, store)
    read = ExternalResult.of(run_until(study, "external.clinic"))
    assert read.set_aside == {"seen": 3, "duplicate": 1}


def test_a_set_that_lies_in_the_study_s_own_data_is_refused(
    elsewhere: Make, run_until: Run, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no image is left"):
        run_until(elsewhere(root=str(tmp_path / "real")), "external.clinic")


def test_a_set_with_several_tasks_must_have_the_study_s(elsewhere: Make, tmp_path: Path) -> None:
    table = tmp_path / "clinic" / "labels.csv"
    table.write_text("path,what,device\ndown/known0.png,down,old\n")
    reader = {
        "name": "csv", "file": "labels.csv", "path": "path",
        "labels": {"what": "what", "device": "device"},
    }  # fmt: skip
    with pytest.raises(StudyError, match="has the tasks what, device; name the study's, class"):
        plan(elsewhere(**reader))
