"""What a step may read: its inputs, and the steps that they depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.context import Context, Pace
from engine.core.errors import EngineError, StorageError
from engine.core.manifest import Manifest, write_manifest
from engine.core.spec import Spec, canonical
from engine.core.step import Step, Subject
from engine.core.store import Store
from engine.results.data import EmbedResult, IngestResult
from engine.runtime.inline import InlineRuntime
from engine.work.resources import FitResources, StageResources

INGEST = Step("ingest", Subject(), Spec(), {"ingest": 1})
EMBED = Step("embed", Subject(), Spec(), {"embed": 1}, {"ingest": INGEST})
CLUSTER = Step("cluster", Subject(), Spec(), {"cluster": 1}, {"embed": EMBED})


def manifest(step: Step, **metrics: object) -> Manifest:
    return Manifest(
        kind=step.kind, key=step.key, label=step.label, spec=canonical(step.spec), inputs={},
        parts=(), rows=1, metrics=metrics, provenance={},
    )  # fmt: skip


def context(step: Step, store: Store, **inputs: Manifest) -> Context:
    return Context(
        step=step, inputs=inputs, store=store, runtime=InlineRuntime(),
        stage_resources=lambda _: StageResources(), fit_resources=FitResources(), device="cpu",
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def test_result_is_read_by_the_name_of_the_input(store: Store) -> None:
    step = context(CLUSTER, store, embed=manifest(EMBED, width=64, quarantined=0))
    assert step.result("embed", EmbedResult).width == 64


def test_undeclared_input_cannot_be_read(store: Store) -> None:
    step = context(CLUSTER, store, embed=manifest(EMBED, width=64, quarantined=0))
    with pytest.raises(EngineError, match=r"^cluster reads ingest, .* inputs \(embed\); add it"):
        step.result("ingest", IngestResult)


def test_result_has_the_model_of_its_kind(store: Store) -> None:
    step = context(CLUSTER, store, embed=manifest(EMBED, width=64, quarantined=0))
    with pytest.raises(StorageError, match="embed is of kind embed, not ingest"):
        step.result("embed", IngestResult)


def test_result_of_another_version_names_the_remedy(store: Store) -> None:
    step = context(CLUSTER, store, embed=manifest(EMBED, height=1))
    with pytest.raises(StorageError, match=r"another version of the engine; .* --discard embed"):
        step.result("embed", EmbedResult)


def test_manifest_is_read_only_by_dependent_steps(store: Store) -> None:
    write_manifest(store, manifest(INGEST, counts={}))
    assert context(CLUSTER, store).manifest(INGEST) == manifest(INGEST, counts={})
    assert context(CLUSTER, store).manifest(EMBED) is None
    with pytest.raises(EngineError, match=r"^embed reads cluster, which it does not depend on"):
        context(EMBED, store).manifest(CLUSTER)


def test_pace_of_a_fit_leaves_out_its_start() -> None:
    pace = Pace()
    pace.saw(0, 10.0)
    assert pace.seconds is None
    pace.saw(100, 40.0)
    assert pace.seconds is None
    # The same report is seen again.
    pace.saw(100, 41.0)
    pace.saw(300, 50.0)
    assert pace.seconds == 0.05
