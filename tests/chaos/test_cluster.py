"""Workers and whole nodes of a Ray cluster are killed at random while a study runs on it: the same
run succeeds, with the result of an undisturbed run."""

from __future__ import annotations

import os
import random
import subprocess
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from engine.core.store import Store
from engine.maintenance import fsck
from tests.chaos.storages import differences
from tests.chaos.studies import ROOT, command, run
from tests.loopback import Cluster, loopback_cluster

NODES = 3
PROFILE = ROOT / "configs" / "profiles" / "cluster.yaml"
KILLS = int(os.environ.get("CHAOS_KILLS", "12"))
# Seconds between kills: a worker needs some to start, and one that is killed before it has done
# anything makes no progress.
_LEAST, _MOST = 15, 40


def kill_something(cluster: Cluster, dice: random.Random, kills: Counter[str]) -> None:
    """A worker of any kind, or a node that is not the driver's; another node takes its place."""
    _, *others = cluster.processes("raylet/raylet")
    if others and dice.random() < 0.3:
        dice.choice(others).kill()
        kills["nodes"] += 1
        cluster.add_node()
        return
    workers = [
        process for raylet in cluster.processes("raylet/raylet") for process in raylet.children()
        if any(name in " ".join(process.cmdline()) for name in ("MapWorker", "RayTrainWorker",
                                                                "ImplicitFunc"))
    ]  # fmt: skip
    if workers:
        with suppress(psutil.Error):
            dice.choice(workers).kill()
            kills["workers"] += 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_of_workers_and_nodes(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    dice, kills = random.Random(seed), Counter[str]()
    undisturbed, store = Store(str(tmp_path / "undisturbed")), Store(str(tmp_path / "runs"))
    # On Ray too: a worker's libraries use as many threads as it has CPUs, and sums depend on these.
    alone = {"profile.runtime": "ray", "profile.address": "local"}
    run(undisturbed.url, "--profile", str(PROFILE), sets=alone)
    with loopback_cluster(NODES) as cluster, open(tmp_path / "log", "w+") as log:
        sets = {"profile.runtime": "ray", "profile.address": cluster.address,
                "profile.fit.max_failures": "8", "profile.trial.max_failures": "8"}  # fmt: skip
        driver = subprocess.Popen(
            # A node has one CPU.
            command(store.url, "--profile", str(PROFILE), sets=sets), stdout=log,
            stderr=subprocess.STDOUT, env=cluster.environment,
        )  # fmt: skip
        try:
            while driver.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    driver.wait(dice.uniform(_LEAST, _MOST))
                if driver.poll() is None and kills.total() < KILLS:
                    kill_something(cluster, dice, kills)
        finally:
            driver.kill()
            driver.wait()
        log.seek(0)
        text = log.read()
    print(f"killed: {dict(kills)}")
    assert driver.returncode == 0, text[-3000:]
    assert kills["workers"]
    assert kills["nodes"]
    assert "Traceback" not in text
    assert list(differences(undisturbed, store)) == []
    assert fsck.verify(store).faults == ()
