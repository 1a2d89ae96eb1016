"""The exchange rate of a study, run at fractions of its real images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.comparison.exchange import Rate
from engine.core.errors import StudyError
from engine.core.manifest import read_manifest
from engine.core.store import Store
from engine.exchange import in_words, measure, run_exchange_rate
from engine.plan import named, plan
from engine.profile import Profile
from engine.results.data import IngestResult
from engine.runtime.inline import InlineRuntime
from engine.study import Study


def test_a_study_runs_at_every_fraction_and_gets_a_rate_for_each(
    bars_study: Callable[..., Study], store: Store, profile: Profile
) -> None:
    study = bars_study(
        search={"ratios": [1], "seeds": 2, "real_fractions": [0.5, 1]}, curate={"filters": []}
    )
    rates = measure(study, store, InlineRuntime(), profile)
    assert [(rate.arm, rate.fraction) for rate in rates] == [("more x1", 0.5), ("more x1", 1.0)]
    counts = {}
    for share in (0.5, 1.0):
        split = study.split.model_copy(update={"train_fraction": share})
        (ingest,) = named(plan(study.model_copy(update={"split": split})), "ingest")
        manifest = read_manifest(store, ingest)
        assert manifest is not None
        counts[share] = IngestResult.of(manifest)
    for name, whole in counts[1.0].train.items():
        assert counts[0.5].train[name] == round(whole / 2)
    assert counts[0.5].counts["test"] == counts[1.0].counts["test"]
    # Half as many real images of the target class get half as many synthetic ones.
    assert [rate.added for rate in rates] == [counts[share].train["down"] for share in (0.5, 1.0)]
    # Everything of the whole study is found done.
    assert len(store.listing("openings")) == 2


def test_a_study_without_classifiers_has_no_rate(
    bars_study: Callable[..., Study], store: Store, profile: Profile, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(StudyError, match="set classifier"):
        measure(bars_study(classifier=None), store, InlineRuntime(), profile)
    assert run_exchange_rate([str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_rates_are_told_with_open_ends() -> None:
    known = Rate("g x1", 0.25, 60, 0.5, 1.25, 0.4, 2.1, None)
    assert in_words(known) == (
        "g x1 at 25% of the real images (60 added): as good as 50% of them, so that a synthetic"
        " image is worth 1.25 real ones (95% interval 0.40 to 2.10)"
    )
    beyond = Rate("g x1", 1.0, 60, None, None, 0.4, float("inf"), "beyond the curve")
    assert in_words(beyond).endswith("(60 added): beyond the curve (at least 0.40)")
    unknown = Rate("g", 1.0, 60, None, None, -float("inf"), float("inf"), "beyond the curve")
    assert in_words(unknown).endswith("(nothing can be said: the interval is open)")
