"""What a run says of a cluster that loses processes: two nodes on loopback, each of them killed in
part."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.jobs import Job, finish, running

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

RAY = Path(sys.executable).parent / "ray"
STUDY = {
    "generators": "{ddpm: null, traditional: {name: traditional}}",
    "request": "{ratio: null, classes: all, per_class: 2000, shard_size: 50}",
    "classifier": "null",
    "profile.stages.generate.cpus": "1",
    "profile.stages.generate.actors": "1",
    "profile.stages.generate.shards_per_call": "1",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """A head and a second node, each with one CPU."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    address: str = ""

    def start(self, *more: str) -> None:
        command = [
            str(RAY), "start", "--num-cpus=1", "--node-ip-address=127.0.0.1",
            "--object-store-memory=200000000", f"--dashboard-agent-listen-port={free_port()}",
        ]  # fmt: skip
        done = subprocess.run(
            [*command, *more], env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of both nodes with `name` in their command line, the oldest first."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                text = " ".join(process.cmdline())
                if str(self.folder) in text and name in text:
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def workers(self) -> list[psutil.Process]:
        """Members of a pool of actors."""
        return [
            process
            for raylet in self.processes("raylet/raylet")
            for process in raylet.children()
            if "MapWorker" in " ".join(process.cmdline())
        ]

    def close(self) -> None:
        found = self.processes("")
        for process in list(found):
            with suppress(psutil.Error):
                found += process.children(recursive=True)
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=5)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    # Short: Ray puts sockets below it.
    made = Cluster(Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp")))
    token = made.folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    made.environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    port = free_port()
    made.address = f"127.0.0.1:{port}"
    try:
        made.start(
            "--head", f"--port={port}", "--include-dashboard=false",
            f"--ray-client-server-port={free_port()}", f"--temp-dir={made.folder}",
        )  # fmt: skip
        made.start(f"--address={made.address}")
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def requested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("requested")
    inline = {**STUDY, "profile.runtime": "inline"}
    finish("run_study", storage, "--until", "request.traditional", **inline)
    return storage


def commits(storage: Path) -> int:
    return len(list(storage.glob("generated/*/commits/*.json")))


def wait_for_commits(job: Job, storage: Path) -> None:
    before, ends = commits(storage), time.monotonic() + 120
    while commits(storage) < before + 3:
        assert job.process.poll() is None, job.process.communicate()
        assert time.monotonic() < ends, "no commit came"
        time.sleep(0.1)


def test_a_killed_worker_is_replaced_and_ray_says_nothing(
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


def test_a_lost_node_is_a_line_and_the_run_ends_well(
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
    assert "a node was lost: 1 of 2 remain; its work is given to others" in rest
    assert "(raylet)" not in rest


@pytest.mark.parametrize(
    ("process", "name"),
    [("gcs/gcs_server", "the Ray head"), ("raylet/raylet", "this machine's raylet")],
)
def test_a_lost_head_or_raylet_is_one_line_and_exit_one(
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
    assert last.endswith("stopped answering; the same command continues from what is committed")
    assert "Traceback" not in rest
    assert "state-dump" not in rest
