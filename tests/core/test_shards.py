from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.errors import ResumeError, StorageError
from engine.core.shards import OK, Shard, ShardSet, ids_digest, image_column
from engine.core.store import Store
from engine.work.shard_worker import ShardWorker
from engine.work.stage import Batch, Device, Place

SCHEMA = pa.schema([(rows.IMAGE_ID, pa.string()), (rows.IMAGE, rows.IMAGE_TYPE)])


def ids(number: int, count: int = 5) -> list[str]:
    return [f"{number}-{row}" for row in range(count)]


def shard(number: int, count: int = 5) -> Shard:
    task = {"number": number, "ids_digest": ids_digest(ids(number, count))}
    return Shard(f"s{number}", count, task, {"label": "a"})


def table(number: int, content: bytes = b"pixels") -> pa.Table:
    names = ids(number)
    encoded = [content + name.encode() for name in names]
    return pa.table([pa.array(names), image_column(encoded, names, ".png")], schema=SCHEMA)


def test_commit_lists_every_row(store: Store) -> None:
    shards = ShardSet(store, "set")
    status = [OK, OK, "black", OK, OK]
    assert shards.commit(shard(1), table(1), status, {"device": "cpu"})
    assert shards.committed() == {"s1": 0}
    commit = shards.read("s1", 0)
    assert list(commit.image_id) == ids(1)
    assert list(commit.status) == status
    assert commit.kept == 4
    stored = pa.concat_tables(store.tables([commit.data.key]))
    assert stored[rows.IMAGE_ID].to_pylist() == [name for name in ids(1) if name != "1-2"]
    assert commit.data.tags == {"label": "a"}


def test_first_commit_wins_and_its_data_stays(store: Store) -> None:
    shards = ShardSet(store, "set")
    assert shards.commit(shard(1), table(1), [OK] * 5, {"attempt": 1})
    (first,) = store.listing("set/parts")
    # Equal bytes have one name, so a loser must not remove the winner's file.
    assert not shards.commit(shard(1), table(1), [OK] * 5, {"attempt": 2})
    assert store.listing("set/parts") == [first]
    assert not shards.commit(shard(1), table(1, b"other"), [OK] * 5, {"attempt": 3})
    assert shards.read("s1", 0).data.key == first
    assert [stored.num_rows for stored in store.tables([first])] == [5]


def test_shard_without_usable_rows_commits_their_reasons(store: Store) -> None:
    shards = ShardSet(store, "set")
    assert shards.commit(shard(1), table(1), ["black"] * 5, {})
    commit = shards.read("s1", 0)
    assert commit.data is None
    assert commit.kept == 0
    assert shards.collect([shard(1)]) == [commit]


def test_data_without_a_commit_is_ignored(store: Store) -> None:
    shards = ShardSet(store, "set")
    store.put_new("set/parts/s1-dead.parquet", b"half")
    assert shards.committed() == {}
    with pytest.raises(StorageError, match="no commit"):
        shards.collect([shard(1)])


def test_discard_voids_a_commit_and_the_next_generation_counts(store: Store) -> None:
    shards = ShardSet(store, "set")
    shards.commit(shard(1), table(1), [OK] * 5, {})
    assert shards.discard() == 1
    assert shards.committed() == {}
    assert shards.commit(shard(1), table(1, b"again"), [OK] * 5, {})
    assert shards.committed() == {"s1": 1}
    (commit,) = shards.collect([shard(1)])
    (stored,) = store.tables([commit.data.key])
    first = stored[rows.IMAGE][0]["bytes"].as_py()
    assert first == b"again" + ids(1)[0].encode()
    assert commit.sha256[0] == hashlib.sha256(first).hexdigest()[:32]


def test_removed_parts_take_their_commits_along_and_newer_ones_stay(store: Store) -> None:
    shards = ShardSet(store, "set")
    shards.commit(shard(1), table(1), [OK] * 5, {})
    shards.commit(shard(2), table(2), [OK] * 5, {})
    store.put_new("set/parts/s3-dead.parquet", b"half")  # of a killed attempt
    earlier = shards.parts()
    assert len(earlier) == 3
    # Another run commits meanwhile.
    shards.commit(shard(4), table(4), [OK] * 5, {})
    kept = shards.read("s1", 0).data.key
    shards.remove(earlier - {kept})
    assert shards.committed() == {"s1": 0, "s4": 0}
    assert shards.parts() == {kept, shards.read("s4", 0).data.key}


def test_other_fingerprint_is_rejected_with_the_difference(store: Store) -> None:
    shards = ShardSet(store, "set")
    shards.claim({"weights": "aaa", "steps": 20}, "--discard generate")
    shards.claim({"weights": "aaa", "steps": 20}, "--discard generate")
    with pytest.raises(ResumeError) as caught:
        shards.claim({"weights": "bbb", "steps": 20}, "--discard generate")
    assert "weights was 'aaa', is 'bbb'" in str(caught.value)
    assert "--discard generate" in str(caught.value)
    assert "steps" not in str(caught.value)


def test_other_fingerprint_is_accepted_after_a_discard(store: Store) -> None:
    shards = ShardSet(store, "set")
    shards.claim({"weights": "aaa"}, "")
    shards.discard()
    shards.claim({"weights": "bbb"}, "")


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"not json",
        b"[]",
        b'{"format": 1}',
        b'{"format": 1, "shard": "s1", "data": null, "rows": {}, "provenance": {}}',
        b'{"sha256":"' + b"0" * 64 + b'","record":{"format": 1, "shard": "s1"}}',
    ],
)
def test_foreign_commit_record_stops_with_its_path(store: Store, record: bytes) -> None:
    shards = ShardSet(store, "set")
    store.put_new("set/commits/s1.0.json", record)
    with pytest.raises(StorageError, match=r"s1\.0\.json"):
        shards.collect([shard(1)])


def test_flipped_bit_in_a_commit_record_is_detected(tmp_path) -> None:
    store = Store(str(tmp_path))
    shards = ShardSet(store, "set")
    shards.commit(shard(1), table(1), [OK] * 5, {})
    path = tmp_path / "set" / "commits" / "s1.0.json"
    data = bytearray(path.read_bytes())
    for place in range(0, len(data), 17):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(StorageError, match="damaged"):
            shards.read("s1", 0)
    path.write_bytes(data)
    assert shards.read("s1", 0).kept == 5


def test_commit_of_unplanned_rows_is_rejected(store: Store) -> None:
    shards = ShardSet(store, "set")
    shards.commit(shard(1), table(1), [OK] * 5, {})
    other = Shard("s1", 5, {"ids_digest": ids_digest(ids(2))}, {})
    with pytest.raises(StorageError, match="other rows"):
        shards.collect([other])


def test_leftover_temporary_file_is_not_a_commit(tmp_path) -> None:
    store = Store(str(tmp_path))
    store.put_new("set/commits/s1.0.json.0123456789abcdef.tmp", b"half")
    assert ShardSet(store, "set").committed() == {}


class Paint:
    """A stage that paints every row, and rejects the rows named in `refused`."""

    reads: ClassVar[tuple[str, ...]] = (rows.IMAGE_ID,)
    writes: ClassVar[tuple[str, ...]] = (rows.IMAGE, rows.STATUS)
    device: ClassVar[Device] = "accelerator"

    def __init__(self, refused: tuple[str, ...] = ()) -> None:
        self.refused = refused
        self.sizes: list[int] = []

    def load(self, place: Place) -> None:
        self.place = place

    def __call__(self, batch: Batch) -> Batch:
        names = batch[rows.IMAGE_ID].to_pylist()
        self.sizes.append(len(names))
        status = ["refused" if name in self.refused else OK for name in names]
        encoded = [name.encode() for name in names]
        return {**batch, rows.IMAGE: image_column(encoded, names, ".png"), rows.STATUS: status}


def rows_of(store: Store, task: Mapping[str, Any]) -> pa.Table:
    return pa.table({rows.IMAGE_ID: ids(task["number"])})


def run(store: Store, stage: Any, shards: list[Shard], batch_size: int = 2) -> list[dict[str, Any]]:
    worker = ShardWorker(
        ShardSet(store, "set"), rows_of, [stage], SCHEMA, Place("cuda", 1, batch_size)
    )
    worker.load()
    return list(worker(shards))


def test_worker_commits_each_shard_and_batches_never_span_shards(store: Store) -> None:
    stage = Paint(refused=("1-3",))
    summaries = run(store, stage, [shard(0), shard(1)])
    assert [summary["shard"] for summary in summaries] == ["s0", "s1"]
    assert stage.sizes == [2, 2, 1, 2, 2, 1]
    assert stage.place.device == "cuda"
    assert summaries[1]["reasons"] == {"refused": 1}
    commits = ShardSet(store, "set").collect([shard(0), shard(1)])
    assert [commit.kept for commit in commits] == [5, 4]


def test_repeated_call_reports_committed_shards_and_computes_the_rest(store: Store) -> None:
    run(store, Paint(refused=("0-1",)), [shard(0)])
    again = Paint()
    summaries = run(store, again, [shard(0), shard(1)])
    won = {summary["shard"]: summary["won"] for summary in summaries}
    assert won == {"s0": False, "s1": True}
    assert summaries[0]["reasons"] == {"refused": 1}
    assert again.sizes == [2, 2, 1]


def test_batch_size_does_not_change_bytes(tmp_path) -> None:
    digests = []
    for batch_size in (1, 2, 5, 64):
        store = Store(str(tmp_path / str(batch_size)))
        run(store, Paint(), [shard(0)], batch_size)
        digests.append(ShardSet(store, "set").collect([shard(0)])[0].sha256)
    assert len(set(digests)) == 1


class Broken(Paint):
    def __call__(self, batch: Batch) -> Batch:
        if batch[rows.IMAGE_ID][0].as_py().startswith("1-"):
            raise RuntimeError("the model broke")
        return super().__call__(batch)


def test_exception_keeps_earlier_shards_committed(store: Store) -> None:
    worker = ShardWorker(ShardSet(store, "set"), rows_of, [Broken()], SCHEMA, Place("cpu", 1, 2))
    worker.load()
    summaries: Iterator[dict[str, Any]] = worker([shard(0), shard(1), shard(2)])
    with pytest.raises(RuntimeError, match="the model broke"):
        list(summaries)
    assert set(ShardSet(store, "set").committed()) == {"s0"}


def test_plan_with_changed_rows_is_rejected(store: Store) -> None:
    with pytest.raises(StorageError, match="has 5 rows, planned were 7"):
        run(store, Paint(), [shard(0, 7)])
