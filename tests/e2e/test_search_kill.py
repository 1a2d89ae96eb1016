"""Kills during `search` on a real Ray: only trials without a result run again, and the table is
that of an undisturbed search."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
TRIALS = 5 * 3


def command(storage: Path, *more: str) -> list[str]:
    sets = {
        "generators": "{ddpm: null, traditional: {name: traditional}}",
        "request": "{ratio: 1, shard_size: 16}",
        "search": "{ratios: [1, 2], seeds: 3, confirm_fits: 1}",
        "training.steps": "40",
        "profile.storage": str(storage),
        "profile.mlflow": "none",
    }
    pairs = [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
    study = str(ROOT / "configs" / "digits.yaml")
    job = str(ROOT / "jobs" / "search.py")
    return [sys.executable, job, study, *pairs, *more]


def finish(storage: Path, *more: str) -> None:
    done = subprocess.run(command(storage, *more), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def finished(storage: Path) -> set[str]:
    return {path.parent.name for path in storage.glob("steps/train/*/manifest.json")}


def searched(storage: Path) -> tuple[dict, dict]:
    (path,) = storage.glob("steps/search/*/manifest.json")
    manifest = json.loads(path.read_text())["record"]
    (part,) = manifest["parts"]
    table = pq.read_table(storage / part["key"])
    return manifest, table.to_pydict()


def wait_for(storage: Path, count: int, driver: subprocess.Popen) -> None:
    ends = time.monotonic() + 400
    while len(finished(storage)) < count:
        assert driver.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < ends
        time.sleep(0.05)


def trial_processes(driver: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "ImplicitFunc" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    storage = tmp_path_factory.mktemp("undisturbed")
    finish(storage, "--set", "profile.runtime=inline")
    return searched(storage)[1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_driver_and_killed_trial_cost_only_work_in_flight(
    tmp_path: Path, undisturbed: dict
) -> None:
    driver = subprocess.Popen(command(tmp_path), stderr=subprocess.DEVNULL)
    wait_for(tmp_path, 4, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(5)  # its private Ray dies with it
    kept = finished(tmp_path)

    again = subprocess.Popen(command(tmp_path), stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path, len(kept) + 3, again)
    killed = trial_processes(again)
    assert killed
    killed[0].kill()
    _, told = again.communicate(timeout=280)
    assert again.returncode == 0, told
    manifest, table = searched(tmp_path)
    assert manifest["provenance"]["trials"] == {"found": len(kept), "made": TRIALS - len(kept)}
    assert table == undisturbed
