"""Rows that kill or hang their worker, in a real pool of actors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from engine.core import rows
from engine.core.attendance import DIED, HUNG
from engine.core.errors import DataError, EngineError
from engine.core.resources import StageResources
from engine.core.stage import Batch, Device, Place
from engine.core.store import Store
from engine.runtime.cluster import RayRuntime
from engine.runtime.inline import InlineRuntime
from tests.chaos.lethal import Lethal, compute, make_context, painted, plan, set_aside

QUICK = StageResources(
    cpus=0.5, batch_size=8, hang_multiple=20, hang_floor=3, hang_first=5, shards_per_call=2
)


@pytest.fixture(scope="module")
def runtime() -> Iterator[RayRuntime]:
    found = RayRuntime("local", 4, warn=print)
    yield found
    found.close()


@pytest.mark.ray
def test_a_row_that_kills_and_one_that_hangs_are_set_aside_and_no_other(
    runtime: RayRuntime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = plan(64, 16)
    clean = compute(
        make_context(Store(str(tmp_path / "clean")), InlineRuntime(), QUICK), shards, Lethal()
    )
    store = Store(str(tmp_path / "lethal"))
    context = make_context(store, runtime, QUICK)
    commits = compute(context, shards, Lethal({"row-0021": "kill", "row-0050": "spin"}))
    assert set_aside(commits) == {"row-0021": DIED, "row-0050": HUNG}
    neighbours = painted(clean)
    del neighbours["row-0021"], neighbours["row-0050"]
    assert painted(commits) == neighbours
    # Twice with its shard, once as a batch of 8, 4 and 2, twice alone.
    lost = [
        {name: c.provenance[name] for name in ("deaths", "hangs") if name in c.provenance}
        for c in commits
    ]
    assert lost == [{}, {"deaths": 7}, {}, {"hangs": 7}]
    assert context.notes["shards.generate"] == {"found": 0, "made": 4, "retries": 14}
    assert (
        "2 rows killed or hung the worker, set aside: row-0021, row-0050" in capsys.readouterr().err
    )
    assert {c.provenance["host"] for c in commits} == {os.uname().nodename}
    assert all(c.provenance["node"] for c in commits)
    assert store.listing(f"{context.prefix}/pieces") == []


@dataclass
class DiesInLoad:
    reads: ClassVar[tuple[str, ...]] = (rows.IMAGE_ID,)
    writes: ClassVar[tuple[str, ...]] = (rows.STATUS,)
    device: ClassVar[Device] = "cpu"

    def load(self, place: Place) -> None:
        os._exit(1)

    def __call__(self, batch: Batch) -> Batch:
        raise AssertionError("it never loads")


@pytest.mark.ray
def test_workers_that_die_while_loading_end_the_stream(runtime: RayRuntime, tmp_path: Path) -> None:
    context = make_context(Store(str(tmp_path)), runtime, QUICK)
    with pytest.raises(
        EngineError, match=r"^the workers of stage generate died 5 times while load"
    ):
        compute(context, plan(8, 8), DiesInLoad())


@dataclass
class NeedsEveryRow(Lethal):
    writes: ClassVar[tuple[str, ...]] = (rows.IMAGE,)


@pytest.mark.ray
def test_where_every_row_is_needed_the_one_that_kills_is_named(
    runtime: RayRuntime, tmp_path: Path
) -> None:
    context = make_context(Store(str(tmp_path)), runtime, QUICK)
    with pytest.raises(DataError, match=r"row-0003 \(shard s0000\) killed its worker twice"):
        compute(context, plan(8, 8), NeedsEveryRow({"row-0003": "exit"}))
