"""A private Ray: what it rejects, what it waits for, and where its folder is."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.errors import StudyError
from engine.core.shards import Shard, ShardSet
from engine.core.store import Store
from engine.runtime import monitor
from engine.runtime.cluster import RayRuntime
from engine.work.resources import StageResources
from engine.work.shard_worker import ShardWorker
from engine.work.stage import Place

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ray


def rows_of(store: Store, task: Mapping[str, Any]) -> pa.Table:
    return pa.table({rows.IMAGE_ID: ["a", "b"]})


@pytest.fixture
def worker(tmp_path: Path) -> ShardWorker:
    schema = pa.schema([(rows.IMAGE_ID, pa.string())])
    return ShardWorker(
        ShardSet(Store(str(tmp_path)), "set"), rows_of, [], schema, Place("cpu", 1, 2)
    )


@pytest.fixture
def ray_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], tuple[RayRuntime, list]]]:
    """A function that makes a runtime of two CPUs and the list of its lines."""
    monkeypatch.setattr(monitor, "PATIENCE", 0.0)
    lines: list[str] = []
    runtime = RayRuntime("local", 2, warn=lines.append)
    yield lambda: (runtime, lines)
    runtime.close()


def test_missing_gpu_is_rejected_and_busy_cpus_are_waited_for(ray_with, worker) -> None:
    import ray

    runtime, lines = ray_with()
    with pytest.raises(
        StudyError, match=r"^profile: stages\.shards\.gpus: 1 requested, this Ray has 0"
    ):
        runtime.stream(worker, [Shard("s", 2, {}, {})], StageResources(gpus=1))

    class Holder:
        def ready(self) -> None: ...

    holder = ray.remote(Holder).options(num_cpus=2).remote()
    ray.get(holder.ready.remote())
    summaries: list[dict[str, Any]] = []
    stream = runtime.stream(worker, [Shard("s", 2, {}, {})], StageResources(cpus=1))
    thread = threading.Thread(target=lambda: summaries.extend(stream), daemon=True)
    thread.start()
    ends = time.monotonic() + 60
    while lines != ["waiting for 1 CPU: all 2 are in use"]:
        assert not summaries
        assert time.monotonic() < ends, lines
        time.sleep(0.2)
    ray.kill(holder)
    thread.join(timeout=120)
    assert [summary["shard"] for summary in summaries] == ["s"]
    assert len(lines) == 1


@pytest.mark.slow
def test_long_temporary_folder_works(image_folder: Any, tmp_path: Path) -> None:
    root = image_folder({"cat": 8, "dog": 8})
    study = tmp_path / "study.yaml"
    study.write_text(
        f"name: toy\nreader: {{name: imagefolder, root: {root}}}\npreprocess: {{size: 16}}\n"
        "split: {group: none}\n"
    )
    long = tmp_path / ("x" * 150)
    long.mkdir()
    storage = ["--set", f"profile.storage={tmp_path}/runs", "--set", "profile.num_cpus=2"]
    done = subprocess.run(
        [sys.executable, "jobs/run_study.py", str(study), "--until", "ingest", *storage],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={**os.environ, "TMPDIR": str(long)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"TMPDIR {long} is too long for Ray's sockets; using /tmp for Ray" in done.stderr
    assert not list(long.iterdir())
