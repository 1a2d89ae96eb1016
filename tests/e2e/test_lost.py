"""What a run reports about a Ray cluster that loses processes: two nodes on loopback, of which
parts are killed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import Job, finish, running
from tests.loopback import Cluster, loopback_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

STUDY = {
    "generators": "{ddpm: null, traditional: {name: traditional}}",
    "request": "{ratio: null, classes: all, per_class: 2000, shard_size: 50}",
    "classifier": "null",
    "profile.stages.generate.cpus": "1",
    "profile.stages.generate.actors": "1",
    "profile.stages.generate.shards_per_call": "1",
}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with loopback_cluster(2) as made:
        yield made


@pytest.fixture(scope="module")
def requested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("requested")
    inline = {**STUDY, "profile.runtime": "inline"}
    finish("run_study", storage, "--until", "request.traditional", **inline)
    return storage


def commits(storage: Path) -> int:
    return len(list(storage.glob("generated/*/commits/*.json")))


def wait_for_commits(job: Job, storage: Path) -> None:
    before, ends = commits(storage), time.monotonic() + 400
    while commits(storage) < before + 3:
        assert job.process.poll() is None, job.process.communicate()
        assert time.monotonic() < ends, "no commit came"
        time.sleep(0.1)


def test_killed_worker_is_replaced_without_ray_messages(
    cluster: Cluster, requested: Path, tmp_path: Path
) -> None:
    storage = shutil.copytree(requested, tmp_path / "storage")
    sets = {**STUDY, "profile.address": cluster.address}
    with running("generate", storage, environment=cluster.environment, **sets) as job:
        job.wait_for("generate.traditional ")
        wait_for_commits(job, storage)
        workers = cluster.workers()
        assert workers
        for process in workers:
            process.kill()
        rest, _ = job.process.communicate(timeout=280)
    assert job.process.returncode == 0, rest
    for line in rest.splitlines():
        assert "raylet" not in line
        assert "retries" not in line


def test_lost_node_is_reported_and_the_run_finishes(
    cluster: Cluster, requested: Path, tmp_path: Path
) -> None:
    storage = shutil.copytree(requested, tmp_path / "storage")
    sets = {**STUDY, "profile.address": cluster.address, "profile.stages.generate.actors": "2"}
    with running("generate", storage, environment=cluster.environment, **sets) as job:
        job.wait_for("generate.traditional ")
        wait_for_commits(job, storage)
        _, second = cluster.processes("raylet/raylet")
        second.kill()
        rest, _ = job.process.communicate(timeout=280)
    assert job.process.returncode == 0, rest
    assert "lost 1 node of the Ray cluster: 1 of 2 remain and take over the work" in rest
    assert "(raylet)" not in rest


@pytest.mark.parametrize(
    ("process", "name"),
    [("gcs/gcs_server", "the Ray head"), ("raylet/raylet", "this machine's raylet")],
)
def test_lost_head_or_raylet_is_one_line_and_exit_code_1(
    cluster: Cluster, requested: Path, tmp_path: Path, process: str, name: str
) -> None:
    storage = shutil.copytree(requested, tmp_path / "storage")
    sets = {**STUDY, "profile.address": cluster.address}
    with running("generate", storage, environment=cluster.environment, **sets) as job:
        job.wait_for("generate.traditional ")
        wait_for_commits(job, storage)
        # The driver belongs to the first node.
        cluster.processes(process)[0].kill()
        rest, _ = job.process.communicate(timeout=280)
    assert job.process.returncode == 1, rest
    last = rest.splitlines()[-1]
    assert last.startswith(f"error: {name} at ")
    assert "stopped answering; run the same command again" in last
    assert "Traceback" not in rest
    assert "state-dump" not in rest
