"""The register, with a worker that the test restarts after each death."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.errors import DataError, EngineError
from engine.core.shards import OK, Commit, Shard, ShardSet, ids_digest, image_column
from engine.core.store import Store
from engine.work.attendance import DIED, HUNG, History, Pace, Piece, Register, hang_limit
from engine.work.resources import StageResources
from engine.work.shard_worker import ShardWorker
from engine.work.stage import Batch, Device, Place

RESOURCES = StageResources()
SCHEMA = pa.schema([(rows.IMAGE_ID, pa.string()), (rows.IMAGE, rows.IMAGE_TYPE)])


class Death(BaseException):
    """Represents the death of a process."""


class Hang(Death):
    """Represents the end of a hanging process by the watchdog."""


class Lethal:
    """A stage that paints rows and dies on some. A row's pixels depend on the batch's shape and on
    the row's place in it."""

    reads: ClassVar[tuple[str, ...]] = (rows.IMAGE_ID,)
    writes: tuple[str, ...] = (rows.IMAGE, rows.STATUS)
    device: ClassVar[Device] = "cpu"

    def __init__(self, fates: Mapping[str, type[Death]], refused: Sequence[str] = ()) -> None:
        self.fates, self.refused = dict(fates), refused
        # Computed rows, including the copies that fill a batch.
        self.computed: list[str] = []

    def load(self, place: Place) -> None:
        return

    def __call__(self, batch: Batch) -> Batch:
        ids = batch[rows.IMAGE_ID].to_pylist()
        for name in ids:
            if name in self.fates:
                raise self.fates[name]
        self.computed += ids
        painted = [f"{name} {place} of {len(ids)}".encode() for place, name in enumerate(ids)]
        status = ["refused" if name in self.refused else OK for name in ids]
        return {**batch, rows.IMAGE: image_column(painted, ids, ".png"), rows.STATUS: status}


class Attended:
    """`Attendance` of one simulated process, with a register in this process."""

    node = "node-1"

    def __init__(self, register: Register, process: str) -> None:
        self.register, self.process = register, process
        # The calls in order: a number of micro-batches, "first", "long", or "" for unwatch.
        self.watched: list[int | str] = []
        self.watching = False

    def history(self, shards: Sequence[str]) -> list[History]:
        return self.register.history(shards)

    def begin(self, shard: str) -> None:
        self.register.begin("actor", self.process, shard)

    def end(self, shard: str, pace: Pace) -> None:
        self.register.end("actor", self.process, shard, pace)

    def next_piece(
        self, shard: str, rows: int, batch_size: int, done: Piece | None, pace: Pace
    ) -> History:
        answer = self.register.next_piece(
            "actor", self.process, shard, rows, batch_size, done, pace
        )
        return answer[0]

    def watch(self, batches: int, first: bool = False) -> None:
        self.watched.append("first" if first else batches)
        self.watching = True

    def watch_long(self) -> None:
        self.watched.append("long")
        self.watching = True

    def unwatch(self) -> None:
        self.watched.append("")
        self.watching = False


def shard(number: int, count: int) -> Shard:
    ids = [f"{number}-{row}" for row in range(count)]
    return Shard(f"s{number}", count, {"ids": ids, "ids_digest": ids_digest(ids)}, {})


def rows_of(store: Store, task: Mapping[str, Any]) -> pa.Table:
    return pa.table({rows.IMAGE_ID: task["ids"]})


def restarted(
    store: Store,
    stage: Any,
    shards: list[Shard],
    register: Register,
    batch_size: int = 8,
    rows_of: Any = rows_of,
) -> int:
    """Call a worker as Ray does, in one process after another; returns how many died."""
    hung: bool | None = None
    for number in range(100):
        if stop := register.arrive("actor", f"process-{number}", "node-1", hung):
            raise EngineError(stop)
        worker = ShardWorker(
            ShardSet(store, "set"), rows_of, [stage], SCHEMA, Place("cpu", 1, batch_size), "paint",
            Attended(register, f"process-{number}"),
        )  # fmt: skip
        worker.load()
        register.loaded("actor", f"process-{number}")
        try:
            for _ in worker(shards):
                assert not worker.attendance.watching, "the consumer of a summary may take any time"
            return number
        except Death as death:
            hung = isinstance(death, Hang)
    raise AssertionError("the worker died 100 times")


def lose_shard(register: Register) -> None:
    """Two processes die on shard 0 as a whole; from then on it is computed in pieces."""
    for process in ("early-1", "early-2"):
        register.arrive("actor", process, "node-1", False)
        register.loaded("actor", process)
        register.begin("actor", process, "s0")


def collected(store: Store, shards: list[Shard]) -> list[Commit]:
    return ShardSet(store, "set").collect(shards)


def fates_of(commit: Commit) -> dict[str, str]:
    pairs = zip(commit.image_id, commit.status, strict=True)
    return {image_id: status for image_id, status in pairs if status != OK}


def by_id(commits: Sequence[Commit]) -> dict[str, str]:
    return {i: s for commit in commits for i, s in zip(commit.image_id, commit.sha256, strict=True)}


@pytest.mark.parametrize("lethal", ["0-0", "0-5", "0-7", "0-16", "0-19"])
def test_killing_row_is_set_aside_and_its_neighbours_are_unchanged(tmp_path, lethal: str) -> None:
    clean, store, planned = Store(str(tmp_path / "a")), Store(str(tmp_path / "b")), [shard(0, 20)]
    assert restarted(clean, Lethal({}), planned, Register("paint", RESOURCES)) == 0
    stage = Lethal({lethal: Death}, refused=("0-3",))
    deaths = restarted(store, stage, planned, Register("paint", RESOURCES))
    (commit,) = collected(store, planned)
    assert fates_of(commit) == {lethal: DIED, "0-3": "refused"}
    expected = by_id(collected(clean, planned))
    expected[lethal] = ""
    assert by_id([commit]) == expected
    stored = pa.concat_tables(store.tables([commit.data.key]))
    assert stored[rows.IMAGE_ID].to_pylist() == [
        name for name in commit.image_id if name not in (lethal, "0-3")
    ]
    batch = 8 if int(lethal[2:]) < 16 else 4
    # Two with the shard, one for each half, two alone.
    assert deaths == 2 + int(math.log2(batch)) + 2
    assert commit.provenance["deaths"] == deaths
    assert "hangs" not in commit.provenance
    assert commit.provenance["node"] == "node-1"
    assert commit.provenance["host"]
    assert store.listing("set/pieces") == []


def test_several_killing_rows_and_a_hang_in_one_shard(tmp_path) -> None:
    store, planned = Store(str(tmp_path)), [shard(0, 32)]
    fates = {"0-1": Death, "0-2": Hang, "0-3": Death, "0-30": Hang}
    deaths = restarted(store, Lethal(fates), planned, Register("paint", RESOURCES))
    (commit,) = collected(store, planned)
    assert fates_of(commit) == {"0-1": DIED, "0-2": HUNG, "0-3": DIED, "0-30": HUNG}
    assert commit.kept == 28
    assert commit.provenance["deaths"] + commit.provenance["hangs"] == deaths


def test_shard_whose_rows_all_kill_keeps_their_reasons(tmp_path) -> None:
    store, planned = Store(str(tmp_path)), [shard(0, 3), shard(1, 3)]
    fates = {f"0-{row}": Death for row in range(3)}
    restarted(store, Lethal(fates), planned, Register("paint", RESOURCES), batch_size=2)
    first, second = collected(store, planned)
    assert (first.kept, first.data, second.kept) == (0, None, 3)
    assert set(first.status) == {DIED}


def test_finished_pieces_are_not_computed_again(tmp_path) -> None:
    store, planned = Store(str(tmp_path)), [shard(0, 64)]
    register = Register("paint", RESOURCES)
    stage = Lethal({"0-63": Death})
    lose_shard(register)
    restarted(store, stage, planned, register)
    # Every row of the first seven batches once, and the padded halves of the last that succeeded.
    early = [name for name in stage.computed if int(name[2:]) < 56]
    assert sorted(early) == sorted(f"0-{row}" for row in range(56))
    assert len(stage.computed) == 56 + 3 * 8


def test_deaths_caused_by_the_machine_set_no_row_aside(tmp_path) -> None:
    store, planned = Store(str(tmp_path)), [shard(0, 16)]
    register = Register("paint", RESOURCES)
    lose_shard(register)
    # A node is lost under a batch, under its half and its quarter, and under a row alone.
    for number in range(4):
        process = f"piece-{number}"
        register.arrive("actor", process, "node-1", False)
        register.loaded("actor", process)
        register.next_piece("actor", process, "s0", 16, 8, None, Pace())
    assert restarted(store, Lethal({}), planned, register) == 0
    (commit,) = collected(store, planned)
    assert commit.kept == 16
    assert commit.provenance["deaths"] == 6


def test_shards_run_one_by_one_after_a_death_and_innocent_ones_stay_whole(
    tmp_path,
) -> None:
    store, planned = Store(str(tmp_path)), [shard(number, 8) for number in range(4)]
    register = Register("paint", RESOURCES)
    restarted(store, Lethal({"1-4": Death}), planned, register)
    commits = collected(store, planned)
    assert [fates_of(commit) for commit in commits] == [{}, {"1-4": DIED}, {}, {}]
    # Shards begun at the same time share the first death, and no other.
    for commit in (commits[0], commits[2], commits[3]):
        assert commit.provenance.get("deaths", 0) <= 1
    assert commits[1].provenance["deaths"] == 2 + 3 + 2


class NeedsEveryRow(Lethal):
    writes = (rows.IMAGE,)


def test_stages_without_a_status_name_the_killing_row(tmp_path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(DataError, match=r"paint: row 0-3 \(shard s0\) killed its worker twice"):
        restarted(store, NeedsEveryRow({"0-3": Death}), [shard(0, 8)], Register("paint", RESOURCES))


def test_rows_are_not_blamed_if_none_succeeds(tmp_path) -> None:
    fates = {f"0-{row}": Death for row in range(16)}
    with pytest.raises(EngineError, match="the rows are probably not the cause"):
        restarted(Store(str(tmp_path)), Lethal(fates), [shard(0, 16)], Register("paint", RESOURCES))


def test_deaths_outside_rows_end_the_stream(tmp_path) -> None:
    def unreadable(store: Store, task: Mapping[str, Any]) -> pa.Table:
        raise Death

    with pytest.raises(EngineError, match="died 5 times while reading or storing shard s0"):
        restarted(
            Store(str(tmp_path)), Lethal({}), [shard(0, 8)], Register("paint", RESOURCES),
            rows_of=unreadable,
        )  # fmt: skip


def test_restarted_register_costs_work_and_sets_nothing_aside(tmp_path) -> None:
    store, planned = Store(str(tmp_path)), [shard(0, 16)]
    register = Register("paint", RESOURCES)
    # The piece comes from an earlier register: half of a batch.
    history, _ = register.next_piece("actor", "p", "s0", 16, 8, Piece(0, 4, key="gone"), Pace(1.0))
    assert history.pieces == (Piece(0, 8), Piece(8, 16))
    register.end("actor", "p", "s0", Pace(later=1.0))
    assert restarted(store, Lethal({}), planned, register) == 0
    assert collected(store, planned)[0].kept == 16


def test_shard_given_to_another_actor_means_the_first_died() -> None:
    register = Register("paint", RESOURCES)
    register.begin("a", "1", "s0")
    register.begin("b", "1", "s0")
    assert register.history(["s0"]) == [History(deaths=1)]
    # And its own process continues.
    register.begin("b", "1", "s1")
    assert register.history(["s0", "s1"]) == [History(deaths=1), History()]


def test_call_repeated_by_ray_counts_no_death_twice() -> None:
    register = Register("paint", RESOURCES)
    register.begin("a", "1", "s0")
    for process in range(2, 6):
        for _ in range(2):
            assert not register.arrive("a", str(process), "node-1", False)
        assert register.history(["s0"]) == [History(deaths=1)]


def test_finished_shard_is_not_blamed_for_a_death() -> None:
    register = Register("paint", RESOURCES)
    register.begin("a", "1", "s0")
    register.end("a", "1", "s0", Pace(later=2.0))
    register.arrive("a", "2", "node-1", False)
    assert register.history(["s0"]) == [History()]


def test_time_separates_a_hang_from_a_death_without_other_evidence() -> None:
    now = [0.0]
    register = Register("paint", StageResources(hang_floor=60), clock=lambda: now[0])
    register.begin("a", "1", "s0")
    register.end("a", "1", "s0", Pace(later=1.0))
    for seconds, expected in ((59.0, History(deaths=1)), (61.0, History(deaths=1, hangs=1))):
        register.begin("a", "1", "s1")
        now[0] += seconds
        register.arrive("a", "2", "node-1", None)
        assert register.history(["s1"]) == [expected]


def test_deaths_while_loading_are_counted_until_a_process_has_loaded() -> None:
    register = Register("paint", RESOURCES)
    for number in range(5):
        assert not register.arrive("a", str(number), f"node-{number}", None)
    register.loaded("a", "4")
    for number in range(5):
        assert not register.arrive("a", f"again-{number}", f"node-{number}", None)
        assert not register.arrive("b", f"again-{number}", "node-9", None)
        register.loaded("b", f"again-{number}")
    stop = register.arrive("a", "again-5", "node-5", None)
    assert stop.startswith(
        "stage paint: its workers died 9 times while loading (the last on node-4)"
    )


def test_limit_follows_the_slowest_micro_batch() -> None:
    resources = StageResources(hang_multiple=10, hang_floor=60, hang_first=900)
    assert hang_limit(resources, Pace(), 4) == 900
    assert hang_limit(resources, Pace(9.0, 0.5), 4) == 60
    assert hang_limit(resources, Pace(9.0, 3.0), 4) == 120
    # The first micro-batch of a process follows those of other processes.
    assert hang_limit(resources, Pace(later=3.0), 1, first=True) == 900
    assert hang_limit(resources, Pace(9.0, 3.0), 1, first=True) == 90
    assert hang_limit(resources, Pace(9.0), 2) == 180


def test_stages_are_limited_by_their_pace_and_storage_by_the_long_limit(
    tmp_path,
) -> None:
    register = Register("paint", RESOURCES)
    attended = Attended(register, "p")
    store = Store(str(tmp_path))
    reading: list[Any] = []
    storing: list[Any] = []
    finished = threading.Event()

    def slow_rows(store: Store, task: Mapping[str, Any]) -> pa.Table:
        if task["ids"][0].startswith("1"):
            # Only after the previous shard is committed and its summary taken.
            assert finished.wait(timeout=60)
            wait_for(lambda: attended.watching)
        reading.append(attended.watched[-1])
        return rows_of(store, task)

    class Committing(ShardSet):
        def commit(self, *arguments: Any) -> bool:
            storing.append(attended.watched[-1])
            return super().commit(*arguments)

    worker = ShardWorker(
        Committing(store, "set"), slow_rows, [Lethal({})], SCHEMA, Place("cpu", 1, 8), "paint",
        attended,
    )  # fmt: skip
    worker.load()
    for _ in worker([shard(0, 20), shard(1, 8)]):
        assert not attended.watching
        finished.set()
    assert reading == ["long", "long"]
    assert storing == ["long", "long"]
    assert not attended.watching
    calls = [entry for entry in attended.watched if entry not in ("long", "")]
    assert calls == ["first", 2, 1]
    assert register.pace.first > 0
    assert register.pace.later > 0


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)


def test_pace_is_that_of_the_slowest_micro_batch(tmp_path) -> None:
    class Slow(Lethal):
        def __call__(self, batch: Batch) -> Batch:
            if "1-0" in batch[rows.IMAGE_ID].to_pylist():
                time.sleep(0.1)
                slow.set()
            return super().__call__(batch)

    slow = threading.Event()
    register = Register("paint", RESOURCES)
    worker = ShardWorker(
        ShardSet(Store(str(tmp_path)), "set"), rows_of, [Slow({})], SCHEMA, Place("cpu", 1, 8),
        "paint", Attended(register, "p"),
    )  # fmt: skip
    worker.load()
    for _ in worker([shard(0, 8), shard(1, 32)]):
        # Meanwhile the stages run ahead.
        assert slow.wait(timeout=60)
    assert register.pace.later >= 0.1


def test_pieces_and_storage_between_them_are_limited(tmp_path) -> None:
    store, register = Store(str(tmp_path)), Register("paint", RESOURCES)
    lose_shard(register)
    register.arrive("actor", "p", "node-1", False)
    attended = Attended(register, "p")
    worker = ShardWorker(
        ShardSet(store, "set"), rows_of, [Lethal({})], SCHEMA, Place("cpu", 1, 8), "paint", attended
    )
    worker.load()
    assert len(list(worker([shard(0, 16)]))) == 1
    assert attended.watched == ["long", "first", "long", 1, "long", ""]


@pytest.mark.parametrize("batch_size", [2, 8])
def test_machine_that_fails_after_good_shards_ends_the_stream(tmp_path, batch_size: int) -> None:
    store, planned = Store(str(tmp_path)), [shard(number, batch_size) for number in range(9)]
    fates = {f"{number}-{row}": Death for number in range(1, 9) for row in range(batch_size)}
    with pytest.raises(EngineError, match=r"died on 8 consecutive rows .*not the cause"):
        restarted(
            store, Lethal(fates), planned, Register("paint", RESOURCES), batch_size=batch_size
        )
    assert ShardSet(store, "set").find_commit("s0") is not None


def test_killing_rows_among_good_ones_do_not_end_the_stream(tmp_path) -> None:
    store, planned = Store(str(tmp_path)), [shard(0, 40)]
    fates = {f"0-{row}": Death for row in range(0, 40, 2)}
    restarted(store, Lethal(fates), planned, Register("paint", RESOURCES), batch_size=4)
    (commit,) = collected(store, planned)
    assert fates_of(commit) == dict.fromkeys(fates, DIED)
