"""One flipped bit in each of many parts: every reader notices it, and fsck names exactly these
parts. CHAOS_FLIPS sets the number (default 200)."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from engine.core.errors import DamageError
from engine.core.store import Store
from engine.maintenance import fsck
from tests.chaos.storages import differences, flip_bit, manifests
from tests.chaos.studies import run

FLIPS = int(os.environ.get("CHAOS_FLIPS", "200"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_flipped_bit_in_any_part_is_detected_by_reader_and_fsck(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    dice = random.Random(seed)
    sound = Store(str(tmp_path / "sound"))
    run(sound.url)
    kind_of = {part.key: manifest.kind for manifest in manifests(sound).values()
               for part in manifest.parts}  # fmt: skip
    flipped: Counter[str] = Counter()
    number = 0
    while (left := FLIPS - flipped.total()) > 0:
        # A new storage each time, because a process verifies each part only once.
        store = Store(str(tmp_path / str(number)))
        number += 1
        shutil.copytree(sound.url, store.url)
        chosen = dice.sample(sorted(kind_of), min(left, len(kind_of)))
        for key in chosen:
            flip_bit(store, key, dice)
            with pytest.raises(DamageError):
                store.parquet(key) if key.endswith(".parquet") else store.read(key)
        report = fsck.verify(store)
        assert sorted(fault.key for fault in report.faults) == sorted(chosen)
        flipped.update(kind_of[key] for key in chosen)
        if number == 1:
            fsck.repair(store, report.faults)
            run(store.url)
            assert fsck.verify(store).faults == ()
            assert list(differences(sound, store)) == []
        shutil.rmtree(store.url)
    print(f"{flipped.total()} flips, all noticed: {dict(sorted(flipped.items()))}")
