"""Rows that kill or hang their worker, in a real pool of actors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from engine.core import rows
from engine.core.errors import EngineError
from engine.core.store import Store
from engine.runtime.attendance import RayAttendance
from engine.runtime.cluster import RayRuntime
from engine.runtime.inline import InlineRuntime
from engine.work.attendance import DIED, HUNG
from engine.work.resources import StageResources
from engine.work.stage import Batch, Device, Place
from tests.chaos.lethal import Lethal, compute, make_context, painted, plan, set_aside

# One row per batch, so that few processes have to die before a row is alone.
QUICK = StageResources(
    actors=2, cpus=0.5, batch_size=1, hang_floor=3, hang_first=5, shards_per_call=1
)


@pytest.fixture(scope="module")
def runtime() -> Iterator[RayRuntime]:
    ray_runtime = RayRuntime("local", 4, warn=print)
    yield ray_runtime
    ray_runtime.close()


@pytest.mark.ray
@pytest.mark.slow
def test_only_killing_and_hanging_rows_are_set_aside(
    runtime: RayRuntime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = plan(64, 8)
    clean = make_context(Store(str(tmp_path / "clean")), InlineRuntime(), QUICK)
    neighbours = painted(compute(clean, shards, Lethal()))
    store = Store(str(tmp_path / "lethal"))
    context = make_context(store, runtime, QUICK)
    commits = compute(context, shards, Lethal({"row-0003": "kill", "row-0012": "spin"}))
    assert set_aside(commits) == {"row-0003": DIED, "row-0012": HUNG}
    del neighbours["row-0003"], neighbours["row-0012"]
    assert painted(commits) == neighbours
    # Twice with its shard, twice alone; a busy machine may add some.
    lost = [(c.provenance.get("deaths", 0), c.provenance.get("hangs", 0)) for c in commits]
    assert lost[0][0] >= 4
    assert lost[1][1] >= 4
    retries = sum(map(sum, lost))
    assert context.notes["shards.generate"] == {"found": 0, "made": 8, "retries": retries}
    said = capsys.readouterr().err
    line = "2 rows killed or hung their worker and were set aside: row-0003, row-0012"
    assert line in said
    assert {c.provenance["host"] for c in commits} == {os.uname().nodename}
    assert all(c.provenance["node"] for c in commits)
    assert store.listing(f"{context.prefix}/pieces") == []


class FakeRay:
    """An actor's view of Ray, and the registers' actor, which has no answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.call = self

    def get_actor_id(self) -> str:
        return "actor"

    def get_node_id(self) -> str:
        return "node"

    def get_temp_dir(self) -> str:
        return str(self.folder)

    def get_session_name(self) -> str:
        return "session"

    def remote(self, *arguments: object) -> str:
        return ""


def test_watch_file_is_in_the_session_folder_of_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRay(tmp_path)
    monkeypatch.setattr("ray.get_runtime_context", lambda: fake)
    monkeypatch.setattr("ray.get", lambda answer: answer)
    session = tmp_path / "session"
    session.mkdir()
    attendance = RayAttendance(fake, "stream", "stage", StageResources())
    attendance.arrive()
    attendance.watch_long()
    assert [path.name for path in session.iterdir()] == ["engine-watch-actor"]
    attendance.unwatch()
    assert list(session.iterdir()) == []


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
@pytest.mark.slow
def test_workers_that_die_while_loading_end_the_stream(runtime: RayRuntime, tmp_path: Path) -> None:
    context = make_context(Store(str(tmp_path)), runtime, QUICK)
    with pytest.raises(EngineError, match=r"^stage generate: its workers died 5 times while load"):
        compute(context, plan(8, 8), DiesInLoad())
