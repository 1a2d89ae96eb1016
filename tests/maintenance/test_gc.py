"""Old files that no record names are removed; files that a record names are kept."""

from __future__ import annotations

import os
import random
import time

import pytest

from engine.core.errors import StorageError
from engine.core.step import Step
from engine.core.store import Store
from engine.execute import discard, execute
from engine.maintenance import fsck, gc
from engine.plan import named, plan
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.study import Study
from tests.chaos.storages import flip_bit

DAY = 86_400.0


@pytest.fixture
def study(toy_study, image_folder) -> Study:
    root = image_folder({"a": 12, "b": 8})
    generators = {"turned": {"name": "traditional", "rotate": 10}}
    return toy_study(
        root, generators=generators, request={"ratio": 1, "classes": ["b"], "shard_size": 2}
    )


@pytest.fixture
def steps(study: Study, store: Store, profile: Profile) -> list[Step]:
    """A finished study, written ten days ago."""
    steps = plan(study)
    execute(steps, store, InlineRuntime(), profile, quiet=True)
    age(store)
    return steps


def yesterday() -> float:
    return time.time() - DAY


def age(store: Store) -> None:
    then = time.time() - 10 * DAY
    for key in store.modified_times(""):
        os.utime(store.location(key), (then, then))


@pytest.mark.usefixtures("steps")
def test_finished_study_has_no_garbage(store: Store) -> None:
    assert gc.find_garbage(store, yesterday()).keys == ()


@pytest.mark.usefixtures("steps")
def test_old_unnamed_files_are_removed(store: Store) -> None:
    orphans = [
        "steps/embed/0123456789abcdef/parts/000.00000000000000000000000000000000.parquet",
        "generated/0123456789abcdef/parts/x-000.00000000000000000000000000000000.parquet",
        "generated/0123456789abcdef/pieces/x.00000000000000000000000000000000.arrow",
        "steps/embed/0123456789abcdef/commits/x.0.json.0123456789abcdef.tmp",
        "previews/0123456789abcdef/parts/cat.parquet",
        "probe/0123456789abcdef",
    ]
    for key in orphans:
        store.put_new(key, b"left behind")
    assert gc.find_garbage(store, yesterday()).keys == ()  # they may belong to a running study
    age(store)
    before = set(store.modified_times(""))
    garbage = gc.remove(store, yesterday())
    assert set(garbage.keys) == set(orphans) == before - set(store.modified_times(""))
    assert garbage.bytes == len(orphans) * len(b"left behind")


def test_data_of_discarded_shards_is_removed_and_recomputed(
    steps: list[Step], store: Store, profile: Profile
) -> None:
    (generate,) = named(steps, "generate")
    assert discard(generate, store) > 0
    garbage = gc.remove(store, yesterday())
    assert garbage.keys
    assert all(store.area(key) in ("generated", "steps") for key in garbage.keys)
    execute(steps, store, InlineRuntime(), profile, quiet=True)
    assert fsck.verify(store).faults == ()


def test_checkpoints_of_an_unfinished_fit_are_kept(store: Store) -> None:
    store.put("work/0123456789abcdef/one/checkpoint-00000005.json", b"{}")
    age(store)
    assert gc.find_garbage(store, yesterday()).keys == ()


@pytest.mark.usefixtures("steps")
def test_nothing_is_removed_while_a_record_is_damaged(store: Store) -> None:
    (key,) = (k for k in store.listing("steps/generate") if k.endswith("/manifest.json"))
    flip_bit(store, key, random.Random(3))
    with pytest.raises(StorageError, match=r"fsck\.py --repair"):
        gc.remove(store, yesterday())
