"""The driver is killed again and again, in any step: nothing is lost or stored twice, and the final
manifests equal those of an undisturbed run. CHAOS_KILLS sets the number (default 12)."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.store import Store
from engine.maintenance import fsck
from tests.chaos.kills import kill_until_done
from tests.chaos.storages import differences, manifests
from tests.chaos.studies import command, run

KILLS = int(os.environ.get("CHAOS_KILLS", "12"))
RAY = {"profile.runtime": "ray"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    url = str(tmp_path_factory.mktemp("undisturbed") / "runs")
    run(url)
    return Store(url)


def check(undisturbed: Store, store: Store) -> None:
    """Check for equal manifests, no duplicate images, and intact bytes."""
    assert list(differences(undisturbed, store)) == []
    for manifest in manifests(store).values():
        if manifest.kind == "generate":
            keys = [part.key for part in manifest.parts if "label" in part.tags]
            ids = pa.concat_tables(store.tables(keys, [rows.IMAGE_ID]))[rows.IMAGE_ID].to_pylist()
            assert len(ids) == len(set(ids)) == manifest.rows
    assert fsck.verify(store).faults == ()


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_kills_of_the_driver_in_any_step(undisturbed: Store, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    dice = random.Random(seed)
    kills = number = 0
    while kills < KILLS:
        store = Store(str(tmp_path / str(number)))
        kills += kill_until_done(command(store.url), dice, KILLS - kills)
        check(undisturbed, store)
        number += 1
    print(f"{kills} kills, {number} studies")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_kills_of_a_driver_with_a_private_ray(undisturbed: Store, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    store = Store(str(tmp_path / "runs"))
    kills = kill_until_done(command(store.url, sets=RAY), random.Random(seed), KILLS // 4)
    check(undisturbed, store)
    print(f"{kills} kills")
