"""Kills during `generate`: nothing is lost, duplicated or recomputed, and bytes are equal."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.store import Store

ROOT = Path(__file__).resolve().parents[2]
PER_CLASS, SHARD_SIZE = 250, 25
SHARDS = 10 * PER_CLASS // SHARD_SIZE


def command(storage: Path, *more: str) -> list[str]:
    """A study whose generation takes long enough to be killed: many small shards."""
    sets = {
        "generators": "{ddpm: null, traditional: {name: traditional}}",
        "request": f"{{ratio: null, classes: all, per_class: {PER_CLASS},"
        f" shard_size: {SHARD_SIZE}}}",
        "classifier": "null",
        "profile.storage": str(storage),
        "profile.stages.generate.batch_size": "25",
        "profile.stages.generate.actors": "2",
        "profile.stages.generate.cpus": "0.5",
    }
    pairs = [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
    study = str(ROOT / "configs" / "digits.yaml")
    return [sys.executable, str(ROOT / "jobs" / "run_study.py"), study, *pairs, *more]


def finish(storage: Path, *more: str) -> str:
    done = subprocess.run(command(storage, *more), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stderr


def commits(storage: Path) -> set[str]:
    found = storage.glob("generated/*/commits/*.json")
    return {path.name for path in found}


def result(storage: Path) -> dict[str, str]:
    """Id and digest of the bytes of every image in the finished step."""
    manifest = read_manifest(storage)
    keys = [part["key"] for part in manifest["parts"] if part["key"].endswith(".parquet")]
    table = pa.concat_tables(Store(str(storage)).tables(keys))
    ids = table[rows.IMAGE_ID].to_pylist()
    assert len(ids) == len(set(ids)) == manifest["rows"] == 10 * PER_CLASS
    images = [image["bytes"] for image in table[rows.IMAGE].to_pylist()]
    return {i: hashlib.sha256(data).hexdigest() for i, data in zip(ids, images, strict=True)}


def read_manifest(storage: Path) -> dict:
    (path,) = storage.glob("steps/generate/*/manifest.json")
    return json.loads(path.read_text())["record"]


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    """A storage with every step but `generate` done: keys do not depend on the runtime."""
    storage = tmp_path_factory.mktemp("planned") / "storage"
    finish(storage, "--set", "profile.runtime=inline", "--until", "request")
    return storage


@pytest.fixture(scope="module")
def undisturbed(planned: Path, tmp_path_factory) -> dict[str, str]:
    """The same study without Ray and without a kill."""
    storage = tmp_path_factory.mktemp("undisturbed") / "storage"
    shutil.copytree(planned, storage)
    finish(storage, "--set", "profile.runtime=inline")
    return result(storage)


@pytest.fixture
def storages(planned: Path, tmp_path: Path) -> Iterator[Path]:
    """Fresh storages, one after another, each ready to generate."""

    def copies() -> Iterator[Path]:
        for number in itertools.count():
            shutil.copytree(planned, tmp_path / str(number))
            yield tmp_path / str(number)

    return copies()


def start_and_wait(storage: Path, dice: random.Random) -> tuple[subprocess.Popen[bytes], int]:
    """Start a run and return at a random moment of its `generate`."""
    before = len(commits(storage))
    driver = subprocess.Popen(
        command(storage),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    # Mostly early, so that many kills fit into one run.
    wanted = before + dice.randint(1, max(1, (SHARDS - before) // 4))
    deadline = time.monotonic() + 400
    while len(commits(storage)) < min(wanted, SHARDS) and driver.poll() is None:
        assert time.monotonic() < deadline, "no commit came"
        time.sleep(0.005)
    time.sleep(dice.random() * 0.1)
    return driver, before


def kill_driver(driver: subprocess.Popen[bytes]) -> None:
    """SIGKILL the driver, and wait until its private Ray is gone."""
    family = psutil.Process(driver.pid).children(recursive=True)
    ray = [process for process in family if "raylet/raylet" in " ".join(process.cmdline())]
    assert ray
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(ray, timeout=60)
    assert not alive, "the private Ray outlived its driver"
    # Ray's agents take a minute to notice, too late for the next run.
    for process in family:
        if process.is_running():
            process.kill()
    psutil.wait_procs(family, timeout=10)


def kill_worker(driver: subprocess.Popen[bytes], dice: random.Random) -> bool:
    """SIGKILL one actor of the pool; False if the run has ended."""
    try:
        family = psutil.Process(driver.pid).children(recursive=True)
        actors = [p for p in family if "MapWorker" in " ".join(p.cmdline())]
    except psutil.NoSuchProcess:
        return False
    if not actors:
        return False
    os.kill(dice.choice(actors).pid, signal.SIGKILL)
    return True


def kill_drivers(storage: Path, kills: int, seed: int) -> int:
    """Kill the driver at random moments until `kills` hit or the study is done; returns the
    hits."""
    dice = random.Random(seed)
    hits = 0
    while hits < kills and len(commits(storage)) < SHARDS:
        driver, _ = start_and_wait(storage, dice)
        if driver.poll() is None:
            kill_driver(driver)
            hits += 1
    return hits


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("seed", [11])
def test_killed_driver_costs_only_work_in_flight(storages, undisturbed, seed: int) -> None:
    print(f"seed {seed}")
    storage = next(storages)
    assert kill_drivers(storage, 2, seed) >= 1
    standing = commits(storage)
    finish(storage)
    counts = read_manifest(storage)["provenance"]["shards.generate"]
    assert counts == {"found": len(standing), "made": SHARDS - len(standing)}
    assert standing <= commits(storage)
    assert result(storage) == undisturbed


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("seed", [12])
def test_killed_worker_is_replaced_within_the_run(storages, undisturbed, seed: int) -> None:
    print(f"seed {seed}")
    dice = random.Random(seed)
    storage = next(storages)
    driver, _ = start_and_wait(storage, dice)
    assert kill_worker(driver, dice)
    assert driver.wait(timeout=250) == 0
    assert result(storage) == undisturbed


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", [101, 102])
def test_many_kills_of_the_driver(storages, undisturbed, seed: int) -> None:
    print(f"seed {seed}")
    hits = 0
    while hits < 6:
        storage = next(storages)
        hits += kill_drivers(storage, 6 - hits, seed + hits)
        finish(storage)
        assert result(storage) == undisturbed
    print(f"{hits} kills hit")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", [201, 202])
def test_many_kills_of_workers(storages, undisturbed, seed: int) -> None:
    print(f"seed {seed}")
    dice = random.Random(seed)
    hits = 0
    while hits < 6:
        storage = next(storages)
        driver, _ = start_and_wait(storage, dice)
        while driver.poll() is None:
            hits += kill_worker(driver, dice)
            # A new actor needs seconds to start: give it a chance to do something.
            time.sleep(4 + dice.random() * 4)
        assert driver.wait() == 0
        assert result(storage) == undisturbed
    print(f"{hits} kills hit")
