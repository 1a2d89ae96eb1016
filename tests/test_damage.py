"""One flipped bit or a missing part: detected by every reader, reported with the remedy, and
recomputed with the same result."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from engine.core.errors import DamageError, StorageError
from engine.core.manifest import Manifest, write_manifest, write_part
from engine.core.sealed import unseal
from engine.core.shards import ShardSet
from engine.core.step import Step, upstream
from engine.core.store import Store
from engine.execute import discard, execute, writer_of
from engine.maintenance import fsck
from engine.maintenance.inventory import take_inventory
from engine.plan import named, plan, trials_of
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.steps.generate import Generate
from engine.study import Study, validate
from tests.chaos.storages import differences, flip_bit, manifests
from tests.conftest import write_bars

# For people or other studies: no step of this study reads them.
FILES_UNREAD = ("sheet.png", "list.csv", "history.json", "samples/")
TABLES_UNREAD = {
    ("ingest", "records"), ("ingest", "leaks"), ("cluster", "centroids"),
    ("select", "representatives"), ("search", "trials"), ("confirm", "trials"),
    ("evaluate", "predictions"),
}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Small images, a network trained on them, and all steps up to the report."""
    root = tmp_path_factory.mktemp("bars")
    write_bars(root, {"across": 60, "down": 30}, 0)
    values = {
        "name": "damage", "seed": 3, "reader": {"name": "imagefolder", "root": str(root)},
        "preprocess": {"size": 16, "channels": "L"}, "split": {"group": "none", "test": 0.3},
        "embedder": {"name": "pixels"}, "cluster": {"k": 2},
        "generators": {
            "ddpm": {"name": "ddpm", "block_out_channels": [8, 16], "layers_per_block": 1,
                     "attention_resolution": 4, "train_steps": 2, "batch_size": 8,
                     "num_inference_steps": 2},
        },
        "request": {"ratio": 1, "classes": ["down"], "shard_size": 8},
        "curate": {"filters": ["copies"], "max_rounds": 1},
        "classifier": {"name": "small", "channels": [8, 8]},
        "training": {"steps": 6, "batch_size": 16, "learning_rate": 0.01, "evaluate_every": 3},
        "search": {"ratios": [1], "seeds": 2, "confirm_fits": 1},
        "evaluate": {"bootstrap_draws": 200},
    }  # fmt: skip
    return validate(Study, values, "damage study")


@pytest.fixture(scope="module")
def sound(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The storage of the study when it is done."""
    store = Store(str(tmp_path_factory.mktemp("sound") / "runs"))
    run(study, store)
    return store


@pytest.fixture
def store(sound: Store, tmp_path: Path) -> Store:
    """A copy to damage."""
    shutil.copytree(sound.url, tmp_path / "runs")
    return Store(str(tmp_path / "runs"))


def run(study: Study, store: Store) -> None:
    execute(plan(study), store, InlineRuntime(), Profile(storage=store.url), quiet=True)


def stop_of(study: Study, store: Store) -> str:
    """The text of the damage that stopped a run; empty if none did."""
    try:
        run(study, store)
    except DamageError as error:
        return str(error)
    return ""


def discard_readers(study: Study, store: Store, part: str) -> None:
    """Discard everything computed from a part, so that the next run reads it."""
    inventory = take_inventory(store)
    labels = set(inventory.dependents(inventory.named_by[part]))
    for step in every_step(study):
        if step.label in labels:
            discard(step, store)


def every_step(study: Study) -> list[Step]:
    steps = plan(study)
    return [*upstream(steps), *trials_of(steps)]


def part_of(store: Store, label: str) -> str:
    """The largest part that a step wrote: images, or weights."""
    (manifest,) = (one for one in manifests(store).values() if one.label == label)
    return max(manifest.parts, key=lambda part: part.bytes).key


def parts_read(store: Store) -> dict[str, str]:
    """A part of each kind that some step reads, with the label of the step that wrote it; for mixes
    that of an arm, which only trials read."""
    found: dict[tuple[str, ...], tuple[str, str]] = {}
    for manifest in sorted(manifests(store).values(), key=lambda one: one.label != "mix.ddpm.x1"):
        for part in manifest.parts:
            tags = [part.tags[name] for name in sorted(part.tags) if name != "label"]
            file = part.tags.get("file", "")
            # The weights that made the choice are read by no step: others are tested.
            chose = manifest.kind == "train" and manifest.label.endswith((".0", ".1"))
            if (
                manifest.kind != "report"
                and not chose
                and not file.startswith(FILES_UNREAD)
                and (manifest.kind, part.tags.get("table")) not in TABLES_UNREAD
            ):
                found.setdefault((manifest.kind, *tags), (part.key, manifest.label))
    return dict(found.values())


def test_flipped_bit_in_any_part_stops_the_step_that_reads_it(
    study: Study, sound: Store, tmp_path: Path
) -> None:
    dice = random.Random(5)
    parts = parts_read(sound)
    writers = {label.partition(".")[0] for label in parts.values()}
    assert writers >= {"ingest", "embed", "cluster", "request", "finetune", "generate", "curate",
                       "mix", "train"}  # fmt: skip
    unnoticed = []
    for number, (key, label) in enumerate(sorted(parts.items())):
        folder = tmp_path / str(number)
        shutil.copytree(sound.url, folder)
        store = Store(str(folder))
        discard_readers(study, store, key)
        flip_bit(store, key, dice)
        stopped = stop_of(study, store)
        if not (key in stopped and f"--discard {label}" in stopped):
            unnoticed.append(f"{label}, {key}: {stopped}")
        shutil.rmtree(folder)
    assert "\n".join(unnoticed) == ""


@pytest.mark.parametrize("writer", ["ingest", "generate.ddpm", "finetune.ddpm", "train.real.2"])
@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_named_discard_restores_the_result(
    study: Study, sound: Store, store: Store, writer: str, damage: str
) -> None:
    key = part_of(store, writer)
    discard_readers(study, store, key)
    if damage == "flip":
        flip_bit(store, key, random.Random(7))
    else:
        store.delete(key)
    with pytest.raises(DamageError, match=f"--discard {writer}"):
        run(study, store)
    steps = plan(study)
    for step in named(steps, writer):
        discard(step, store, steps)
    run(study, store)
    assert list(differences(sound, store)) == []


def test_fsck_names_each_flipped_file_and_what_depends_on_it(sound: Store, store: Store) -> None:
    dice = random.Random(9)
    parts = {part.key: manifest for manifest in manifests(store).values()
             for part in manifest.parts}  # fmt: skip
    chosen = dice.sample(sorted(parts), 10)
    for key in chosen:
        flip_bit(store, key, dice)
    faults = {fault.key: fault for fault in fsck.verify(store).faults}
    assert sorted(faults) == sorted(chosen)
    for key, fault in faults.items():
        assert parts[key].label in fault.writers
        if parts[key].kind == "ingest":
            assert {"embed", "search", "evaluate", "report"} <= set(fault.dependents)
    assert fsck.verify(sound).faults == ()


@pytest.mark.parametrize(
    ("below", "record"),
    [
        ("steps/ingest/", "/manifest.json"), ("steps/generate/", "/manifest.json"),
        ("steps/train/", "/manifest.json"), ("steps/search/", "/manifest.json"),
        ("generated/", "/fingerprint.json"), ("generated/", ".0.json"),
    ],
)  # fmt: skip
def test_fsck_finds_and_repairs_records(
    study: Study, sound: Store, store: Store, below: str, record: str
) -> None:
    dice = random.Random(11)
    key = dice.choice([key for key in store.listing(below) if key.endswith(record)])
    flip_bit(store, key, dice)
    report = fsck.verify(store)
    assert [fault.key for fault in report.faults] == [key]
    fsck.repair(store, report.faults)
    run(study, store)
    assert fsck.verify(store).faults == ()
    assert list(differences(sound, store)) == []


def test_fsck_repairs_exactly_what_is_damaged(study: Study, sound: Store, store: Store) -> None:
    dice = random.Random(13)
    (generate,) = (one for one in manifests(store).values() if one.kind == "generate")
    shard = dice.choice([part.key for part in generate.parts if "label" in part.tags])
    before = set(store.listing("generated"))
    flip_bit(store, shard, dice)
    store.delete(part_of(store, "train.real.1"))
    report = fsck.verify(store)
    assert len(report.faults) == 2
    fsck.repair(store, report.faults)
    gone = before - set(store.listing("generated"))
    assert gone == {shard}
    run(study, store)
    assert fsck.verify(store).faults == ()
    assert list(differences(sound, store)) == []


def test_fingerprint_with_a_flipped_bit_costs_no_shard(study: Study, store: Store) -> None:
    key = next(key for key in store.listing("generated") if key.endswith("/fingerprint.json"))
    before = store.read(key)
    flip_bit(store, key, random.Random(3))
    shards = ShardSet(store, key.rpartition("/")[0])
    count = len(shards.committed())
    shards.claim(unseal(before), discard="")  # its copy is read instead
    fsck.repair(store, fsck.verify(store).faults)
    assert store.read(key) == before
    assert len(shards.committed()) == count > 0


def test_recomputed_data_is_not_discarded(store: Store) -> None:
    key = part_of(store, "ingest")
    sound = store.read(key)
    flip_bit(store, key, random.Random(3))
    report = fsck.verify(store)
    store.put(key, sound)
    assert fsck.repair(store, report.faults) == 0
    assert fsck.verify(store).faults == ()
    assert store.read(key) == sound


def test_storage_of_another_version_is_not_discarded(store: Store) -> None:
    keys = [key for key in store.listing("steps") if key.endswith("/manifest.json")]
    for key in keys:
        store.put(key, json.dumps(unseal(store.read(key))).encode())
    report = fsck.verify(store)
    assert len(report.faults) == len(keys)
    with pytest.raises(StorageError, match="another version of the engine"):
        fsck.repair(store, report.faults)
    assert all(store.exists(key) for key in keys)


def test_shared_shard_is_attributed_to_the_round_that_names_it(
    study: Study, tmp_path: Path
) -> None:
    rounds = study.model_copy(update={"curate": study.curate.model_copy(update={"max_rounds": 2})})
    steps, store = plan(rounds), Store(str(tmp_path / "empty"))
    first, second = named(steps, "generate")
    prefix = Generate().shard_prefixes(store, first)[0]
    early, late = (write_part(store, store.parts(prefix), name, "parquet", b"x") for name in "ab")
    for step, parts in ((first, (early,)), (second, (early, late))):
        write_manifest(
            store,
            Manifest(kind=step.kind, key=step.key, label=step.label, spec={}, inputs={},
                     parts=parts, rows=0, metrics={}, provenance={}),
        )  # fmt: skip
    assert writer_of(early.key, steps, store) is first
    assert writer_of(late.key, steps, store) is second


def test_damage_to_a_checkpoint_is_found(store: Store) -> None:
    import torch

    from engine.work.fit import FitContext

    context = FitContext(store, "work/k", "weights", "one", "inputs")
    for step in (1, 2):
        context.save_checkpoint(step, {"w": torch.ones(4)}, {"step": step})
    assert fsck.verify(store).faults == ()
    newest = "work/k/one/checkpoint-00000002"
    flip_bit(store, f"{newest}.safetensors", random.Random(1))
    flip_bit(store, "work/k/one/checkpoint-00000001.json", random.Random(2))
    report = fsck.verify(store)
    assert {fault.key for fault in report.faults} == {
        f"{newest}.json", "work/k/one/checkpoint-00000001.json"
    }  # fmt: skip
    assert context.latest_checkpoint() is None
    fsck.repair(store, report.faults)
    assert fsck.verify(store).faults == ()
