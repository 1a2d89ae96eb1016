"""`ray start --head`, then `ray job submit`, exactly as in README, with token authentication."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """A head on loopback with a token; yields the submitter's environment."""
    # Short, because Ray creates sockets in it.
    folder = Path(tempfile.mkdtemp(prefix="rj-"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    dashboard = free_port()
    head = subprocess.Popen(
        [
            str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4",
            "--node-ip-address=127.0.0.1", f"--port={free_port()}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}",
            f"--ray-client-server-port={free_port()}", f"--temp-dir={folder}",
        ],
        env=environment,
        stdout=(folder / "head.log").open("w"),
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                break
        time.sleep(0.3)
    else:
        pytest.fail((folder / "head.log").read_text())
    yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    family = psutil.Process(head.pid).children(recursive=True)
    head.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs([psutil.Process(head.pid), *family], timeout=20)
    for process in alive:
        process.kill()
    head.wait()
    shutil.rmtree(folder, ignore_errors=True)


def submit(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_study_runs_as_a_submitted_job(cluster: dict[str, str], tmp_path: Path) -> None:
    study = (
        "python", "jobs/run_study.py", "configs/digits.yaml",
        "--profile", "configs/profiles/cluster.yaml",
        "--set", f"profile.storage={tmp_path}",
        "--set", "generators.ddpm.train_steps=6",
        "--set", "generators.ddpm.num_inference_steps=2",
        "--set", "request.shard_size=30",
        "--set", "training.steps=6",
        "--set", "search={ratios: [1], seeds: 2, confirm_fits: 1}",
        "--set", "curate.filters=[]",
    )  # fmt: skip
    nobody = {
        name: value for name, value in cluster.items() if not name.startswith("RAY_AUTH_TOKEN")
    }
    refused = submit({**nobody, "RAY_AUTH_TOKEN": "wrong"}, *study)
    assert refused.returncode != 0
    assert not list(tmp_path.iterdir()), "a job without the token must not run"

    done = submit(cluster, *study)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "accepts jobs from anyone" not in done.stdout
    assert list(tmp_path.glob("steps/generate/*/manifest.json"))
    pages = tmp_path / "pages" / "digits"
    assert (pages / "generate.ddpm.png").stat().st_size > 1000
    assert "Do synthetic images help?" in (pages / "report.html").read_text()
    assert "conditional on one generator" in done.stdout
