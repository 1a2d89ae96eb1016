from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from engine.core import registry, rows
from engine.core.errors import ResumeError
from engine.core.manifest import Manifest
from engine.core.rng import derive_seed
from engine.core.sealed import seal, unseal
from engine.core.shards import OK
from engine.core.store import Store
from engine.data.images import Preprocess, decode_own
from engine.execute import discard, execute
from engine.generators import Generator, GeneratorSpec, SampleBatch
from engine.plan import named, plan
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.steps.generate import GenerateSpec, Sample
from engine.study import Study
from engine.work.stage import Place

Run = Callable[[Study, str], Manifest]
TRADITIONAL = {"t": {"name": "traditional"}}


def made(store: Store, manifest: Manifest) -> pa.Table:
    keys = [part.key for part in manifest.parts if part.key.endswith(".parquet")]
    return pa.concat_tables(store.tables(keys))


def test_every_request_becomes_one_marked_image(study, run_until: Run, store: Store) -> None:
    manifest = run_until(study(), "generate")
    table = made(store, manifest)
    assert table.num_rows == manifest.rows == 20
    assert len(set(table[rows.IMAGE_ID].to_pylist())) == 20
    assert table["label.class"].to_pylist().count("cat") == 10
    row = table.slice(3, 1).to_pylist()[0]
    image = Image.open(io.BytesIO(row[rows.IMAGE]["bytes"]))
    assert image.size == (16, 16)
    mark = json.loads(image.text["synthetic"])
    assert mark["image_id"] == row[rows.IMAGE_ID]
    assert mark["generator_key"] == row[rows.GENERATOR_KEY]
    assert mark["parent_id"] == row[rows.PARENT_ID]
    assert mark["seed"] == row[rows.SEED]
    assert "digitalsourcetype/algorithmicallyEnhanced" in image.text["XML:com.adobe.xmp"]


def test_parents_are_training_images(study, run_until: Run, store: Store) -> None:
    ingest = run_until(study(), "ingest")
    table = made(store, run_until(study(), "generate"))
    keys = ingest.keys(split="train")
    train = set(pa.concat_tables(store.tables(keys))[rows.IMAGE_ID].to_pylist())
    assert set(table[rows.PARENT_ID].to_pylist()) <= train


def test_larger_request_reuses_the_full_shards_of_a_smaller_one(
    study, run_until: Run, store: Store
) -> None:
    small = made(store, run_until(study(request={"per_class": 8, "shard_size": 4}), "generate"))
    larger = run_until(study(request={"per_class": 14, "shard_size": 4}), "generate")
    # 8 of 14 are two full shards of 4; two more shards for each of the two classes.
    assert larger.provenance["shards.generate"] == {"found": 4, "made": 4}
    images = {row[rows.IMAGE_ID]: row[rows.IMAGE] for row in made(store, larger).to_pylist()}
    assert all(images[row[rows.IMAGE_ID]] == row[rows.IMAGE] for row in small.to_pylist())


def test_second_run_computes_nothing(study, run_until: Run, store: Store) -> None:
    first = run_until(study(), "generate")
    before = store.listing("")
    assert run_until(study(), "generate").digest == first.digest
    assert store.listing("") == before


def test_retrained_weights_are_rejected_until_the_shards_are_discarded(
    study, store: Store, profile: Profile
) -> None:
    network = {
        "name": "ddpm", "block_out_channels": [8, 8], "layers_per_block": 1, "train_steps": 2,
        "batch_size": 4, "num_inference_steps": 2,
    }  # fmt: skip
    steps = plan(study(generators={"d": network}, request={"per_class": 2}))
    execute(steps, store, InlineRuntime(), profile)
    (finetune,) = named(steps, "finetune")
    weights = unseal(store.read(store.manifest("finetune", finetune.key)))
    # As if the training had been repeated with another result.
    store.delete(store.manifest("finetune", finetune.key))
    weights["parts"][0]["sha256"] = "0" * 64
    store.put(store.manifest("finetune", finetune.key), seal(weights))
    with pytest.raises(ResumeError, match=r"weights was .* --discard generate\.d"):
        execute(steps, store, InlineRuntime(), profile)
    (generate,) = named(steps, "generate")
    assert discard(generate, store) == 2
    execute(steps, store, InlineRuntime(), profile)


def test_existing_images_keep_their_labels(
    study, image_folder: Callable[..., Path], run_until: Run, store: Store
) -> None:
    other = image_folder({"cat": 5, "dog": 5}, below="made-elsewhere")
    (other / "cat" / "000.png").write_bytes(b"no image")
    generators = {"f": {"name": "folder", "reader": {"name": "imagefolder", "root": str(other)}}}
    manifest = run_until(study(generators=generators, request={"per_class": 5}), "generate")
    assert manifest.metrics["quarantined"] == {"not_decodable": 1}
    table = made(store, manifest)
    assert sorted(table["label.class"].to_pylist()) == ["cat"] * 4 + ["dog"] * 5
    for uri, label in zip(
        table[rows.URI].to_pylist(), table["label.class"].to_pylist(), strict=True
    ):
        assert uri.startswith(f"{label}/")


def test_growing_folder_duplicates_no_image(
    study, image_folder: Callable[..., Path], run_until: Run, store: Store
) -> None:
    other = image_folder({"cat": 5, "dog": 5}, below="made-elsewhere")
    generators = {"f": {"name": "folder", "reader": {"name": "imagefolder", "root": str(other)}}}
    asked = {"per_class": 4, "shard_size": 2}
    run_until(study(generators=generators, request=asked), "generate")
    # Sorts before all others, so every image moves by one.
    (other / "cat" / "00.png").write_bytes((other / "dog" / "004.png").read_bytes())
    table = made(store, run_until(study(generators=generators, request=asked), "generate"))
    uris = table[rows.URI].to_pylist()
    assert len(set(uris)) == len(uris) == 8
    assert "cat/00.png" in uris


class Moody(Generator):
    """Fails depending on the seed: planned seeds give black or nothing, a retry succeeds."""

    version: ClassVar[int] = 1
    Spec: ClassVar[type[GeneratorSpec]] = GeneratorSpec
    batches: ClassVar[list[int]] = []
    always_black: ClassVar[set[int]] = set()
    once_broken: ClassVar[set[int]] = set()

    def load(self, weights: Path | None, device: str) -> None:
        type(self).batches = []

    def sample(self, batch: SampleBatch) -> list[np.ndarray | str]:
        type(self).batches.append(len(batch))
        found: list[np.ndarray | str] = []
        for seed in batch.seeds:
            good = np.random.default_rng(seed).integers(0, 256, (8, 8, 1), dtype=np.uint8)
            black = any(
                seed in (s, derive_seed(s, "again", 1), derive_seed(s, "again", 2))
                for s in self.always_black
            )
            found.append(
                np.zeros_like(good) if black else "not_finite" if seed in self.once_broken else good
            )
        return found


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the stage on a batch of seeds with the generator above, padded to 8 rows."""
    monkeypatch.setattr(registry, "resolve", lambda family, name: Moody)
    monkeypatch.setattr("engine.steps.generate.kind_of", lambda family, spec: Moody)

    def run(seeds: list[int]) -> dict[str, Any]:
        spec = GenerateSpec.model_construct(
            generator=GeneratorSpec(name="moody"), generator_key="k", task="class",
            preprocess=Preprocess(size=8, channels="L"), tasks={"class": "single"},
        )  # fmt: skip
        stage = Sample(Store(str(tmp_path)), spec, [])
        stage.load(Place("cpu", 1, 8))
        schema = rows.requests_schema({"class": "single"})
        values = {rows.IMAGE_ID: [str(seed) for seed in seeds], rows.SEED: seeds}
        table = pa.table(
            [pa.array(values.get(f.name, [None] * len(seeds)), f.type) for f in schema],
            schema=schema,
        )
        return stage({name: table[name] for name in table.column_names})

    return run


def test_batches_are_padded_to_the_planned_shape(sample) -> None:
    Moody.always_black, Moody.once_broken = set(), set()
    batch = sample([1, 2, 3])
    assert Moody.batches == [8]
    assert len(batch["pixels"]) == 3


def test_broken_image_is_retried_with_a_derived_seed(sample) -> None:
    Moody.always_black, Moody.once_broken = set(), {2}
    batch = sample([1, 2, 3])
    assert batch[rows.STATUS] == [OK, OK, OK]
    assert batch["attempt"] == [0, 1, 0]
    assert batch[rows.SEED] == [1, derive_seed(2, "again", 1), 3]
    assert Moody.batches == [8, 8]


def test_black_image_is_quarantined_after_two_retries(sample) -> None:
    Moody.always_black, Moody.once_broken = {3}, set()
    batch = sample([1, 2, 3])
    assert batch[rows.STATUS] == [OK, OK, "black"]
    assert Moody.batches == [8, 8, 8]


def test_every_codec_carries_the_mark(study, run_until: Run, store: Store) -> None:
    for codec in ("jpeg", "webp"):
        fields = {"preprocess": {"size": 16, "codec": codec}, "request": {"per_class": 1}}
        row = made(store, run_until(study(**fields), "generate")).to_pylist()[0]
        data = row[rows.IMAGE]["bytes"]
        assert b"digitalsourcetype/algorithmicallyEnhanced" in data
        assert decode_own(data).shape == (16, 16, 3)
