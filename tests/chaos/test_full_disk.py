"""A disk that is full at a random moment: the run stops with one line, and continues when there is
space. CHAOS_DISKS sets the number (default 4)."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.core.store import Store
from engine.maintenance import fsck
from tests.chaos.storages import differences
from tests.chaos.studies import command, run

DISKS = int(os.environ.get("CHAOS_DISKS", "4"))
_WHOLE = 12_000  # KiB that the tiny study fills


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, one page in size."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs rights that this user does not have")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def resize(place: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_run_stops_on_a_full_disk_and_continues_when_there_is_space(
    disk: Path, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    dice = random.Random(seed)
    undisturbed, store = Store(str(tmp_path / "undisturbed")), Store(str(disk / "runs"))
    run(undisturbed.url)
    for size in sorted(dice.randrange(8, _WHOLE) for _ in range(DISKS)):
        resize(disk, size)
        done = subprocess.run(command(store.url), capture_output=True, text=True, timeout=1200)
        last = done.stderr.strip().splitlines()[-1]
        print(f"{size} KiB: exit {done.returncode}, {last[:150]}")
        assert "Traceback" not in done.stderr
        if done.returncode:
            assert done.returncode == 1
            assert last.startswith("error: storage ")
            assert "No space left on device" in last
    resize(disk, 400_000)
    run(store.url)
    assert list(differences(undisturbed, store)) == []
    assert fsck.verify(store).faults == ()
