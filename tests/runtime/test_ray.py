"""Tests that need a real Ray: workers in other processes, and their errors."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.errors import DataError, EngineError, StorageError
from engine.core.registry import resolve
from engine.core.shards import Shard, ShardSet
from engine.core.store import Store
from engine.data.images import Preprocess
from engine.generators import GeneratorSpec, TrainingImages
from engine.generators.dcgan import DcganSpec
from engine.generators.ddpm import DdpmSpec
from engine.generators.diffusion import DiffusionSpec
from engine.generators.pggan import PgganSpec
from engine.runtime.cluster import RayRuntime
from engine.runtime.errors import find_engine_error
from engine.work.fit import FitContext, read_result
from engine.work.resources import FitResources, StageResources, TrialResources
from engine.work.shard_worker import ShardWorker
from engine.work.stage import Batch, Device, Place
from tests.pipelines import save_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runtime() -> Iterator[RayRuntime]:
    ray_runtime = RayRuntime("local", 4, warn=print)
    yield ray_runtime
    ray_runtime.close()


@dataclass(frozen=True)
class TrainGenerator:
    """A fit of a few steps of a small network on random images."""

    spec: GeneratorSpec

    def __call__(self, context: FitContext) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)
        labels = ["a", "b", "c"] * 8
        data = TrainingImages(pixels, [str(n) for n in range(24)], labels, [0] * 24)
        kind = resolve("generators", self.spec.name)
        kind(self.spec, Preprocess(size=8, channels="L")).fit(context, data, seed=4)


ADAPTED = {
    "sd": {"name": "textual_inversion", "learning_rate": 1e-2},
    "sdxl": {"name": "lora", "rank": 2, "train_text_encoder": True, "learning_rate": 1e-2},
    # Its workers divide the generation of the class images.
    "sd3": {"name": "dreambooth", "rank": 2, "num_class_images": 3, "learning_rate": 1e-2},
    "flux": {"name": "full", "learning_rate": 1e-3},
}


STEPS = 50
SMALL = [
    DdpmSpec(
        block_out_channels=(8, 16), layers_per_block=1, attention_resolution=4, train_steps=STEPS,
        batch_size=8, learning_rate=1e-3, lr_warmup_steps=1, ema_decay=0.9,
    ),
    DcganSpec(
        width=16, max_width=16, latent_dim=8, train_steps=STEPS, batch_size=8, collapse_below=0,
        generator_norm="group", discriminator_normalisation="spectral", augment="ada",
        r1_weight=1.0, r1_interval=4,
    ),
    PgganSpec(
        width=8, max_width=16, latent_dim=8, train_steps=STEPS, batch_size=8, collapse_below=0,
        # Where gradients vanish, Adam turns rounding errors into full steps. A low learning rate
        # keeps fifty of them small.
        generator_learning_rate=1e-4, discriminator_learning_rate=1e-4,
    ),
]  # fmt: skip


def losses(runtime: RayRuntime, store: Store, spec: GeneratorSpec, workers: int) -> np.ndarray:
    """The losses (steps, kinds) with a number of workers, at the same global batch size."""
    name = f"{workers}-workers"
    context = FitContext(store, f"work/{name}", f"weights/{name}", name, "inputs")
    runtime.fit(TrainGenerator(spec), context, FitResources(workers=workers, cpus=1))
    parts, _ = read_result(store, context.work, name)
    (history,) = [part.key for part in parts if part.tags["file"].endswith("history.json")]
    return np.array(
        [
            [value for name, value in entry.items() if name.endswith("loss")]
            for entry in json.loads(store.read(history))
        ]
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.name) for spec in SMALL])
def test_two_workers_train_like_one(
    runtime: RayRuntime, tmp_path: Path, spec: GeneratorSpec
) -> None:
    store = Store(str(tmp_path))
    one, two = (losses(runtime, store, spec, workers) for workers in (1, 2))
    assert len(one) >= 20
    assert np.abs(one - two).max() <= 1e-4


# Three new processes import torch, diffusers and transformers, half a minute each on a busy
# machine, and Ray restarts workers that are not up within a minute.
@pytest.mark.timeout(900)
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "sd", "sd3", "flux"])
def test_two_workers_adapt_a_checkpoint_like_one(
    runtime: RayRuntime, tmp_path: Path, kind: str
) -> None:
    spec = DiffusionSpec(
        model=str(save_pipeline(kind, tmp_path)), precision="fp32", resolution=32,
        num_inference_steps=1, adapt={"train_steps": 12, "batch_size": 4, **ADAPTED[kind]},
    )  # fmt: skip
    store = Store(str(tmp_path / "store"))
    one, two = (losses(runtime, store, spec, workers) for workers in (1, 2))
    assert len(one) == 12
    assert np.ptp(one) > 0.01
    assert np.abs(one - two).max() <= 1e-4


@dataclass(frozen=True)
class NoteWhere:
    """A fit and a trial that record their working folder."""

    store: Store

    def __call__(self, where: FitContext | str, runtime: Any = None) -> dict[str, float]:
        if isinstance(where, str):
            self.store.put(where, str(Path.cwd()).encode())
            return {}
        where.publish(Path(tempfile.mkdtemp()), {"folder": str(Path.cwd())})
        return {}


@pytest.mark.ray
@pytest.mark.slow
def test_fits_and_trials_run_in_the_folder_of_the_driver(
    runtime: RayRuntime, tmp_path: Path
) -> None:
    """Otherwise a relative path of a checkpoint or of data would point elsewhere."""
    store = Store(str(tmp_path))
    context = FitContext(store, "work/where", "weights/where", "where", "inputs")
    runtime.fit(NoteWhere(store), context, FitResources(cpus=1))
    assert read_result(store, "work/where", "where")[1] == {"folder": str(Path.cwd())}
    runtime.search(NoteWhere(store), ["noted"], TrialResources(cpus=1), print)
    assert store.read("noted").decode() == str(Path.cwd())


@dataclass(frozen=True)
class RefuseData:
    """A trial whose data cannot be used."""

    store: Store

    def __call__(self, name: str, runtime: Any) -> dict[str, float]:
        self.store.put(f"tried/{name}/{time.monotonic_ns()}", b"")
        raise DataError(f"{name}: no image of any class")


@pytest.mark.ray
def test_rejected_trial_gives_its_reason_and_is_not_retried(
    runtime: RayRuntime, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(EngineError, match=r"^train\.real\.0: no image of any class$"):
        runtime.search(RefuseData(store), ["train.real.0"], TrialResources(cpus=1), print)
    assert len(store.listing("tried")) == 1


@dataclass(frozen=True)
class FailIn:
    """A fit whose workers fail in different ways."""

    errors: tuple[EngineError, ...]

    def __call__(self, context: FitContext) -> None:
        raise self.errors[context.rank]


@pytest.mark.ray
@pytest.mark.slow
def test_engine_error_in_a_worker_is_raised_unchanged(runtime: RayRuntime, tmp_path: Path) -> None:
    context = FitContext(Store(str(tmp_path)), "work/fails", "weights", "one", "inputs")
    fails = FailIn((StorageError("one line that says what to change"),))
    with pytest.raises(StorageError, match=r"^one line that says what to change$"):
        runtime.fit(fails, context, FitResources(cpus=0.5, max_failures=0))


def test_one_permanent_error_of_several_workers_is_reported() -> None:
    class Failed(Exception):
        """An error like Ray Train's report about its workers."""

        worker_failures: ClassVar[dict[int, Exception]] = {
            0: StorageError("gone"), 1: RuntimeError("elsewhere"), 2: DataError("no image"),
        }  # fmt: skip

    assert str(find_engine_error(Failed())) == "no image"
    assert find_engine_error(RuntimeError("elsewhere")) is None


@dataclass
class Refuse:
    """A stage that meets unusable data, or cannot even be loaded."""

    in_load: bool
    reads: ClassVar[tuple[str, ...]] = (rows.IMAGE_ID,)
    writes: ClassVar[tuple[str, ...]] = ()
    device: ClassVar[Device] = "cpu"

    def load(self, place: Place) -> None:
        if self.in_load:
            raise DataError("one line that says what to change")

    def __call__(self, batch: Batch) -> Batch:
        raise DataError("one line that says what to change")


def rows_of(store: Store, task: Mapping[str, Any]) -> pa.Table:
    return pa.table({rows.IMAGE_ID: ["a", "b"]})


@pytest.mark.ray
@pytest.mark.parametrize("in_load", [False, True])
def test_engine_error_in_an_actor_is_raised_unchanged(
    runtime: RayRuntime, tmp_path: Path, in_load: bool
) -> None:
    shards = ShardSet(Store(str(tmp_path)), "set")
    schema = pa.schema([(rows.IMAGE_ID, pa.string())])
    worker = ShardWorker(shards, rows_of, [Refuse(in_load)], schema, Place("cpu", 1, 2))
    with pytest.raises(DataError, match=r"^one line that says what to change$"):
        list(runtime.stream(worker, [Shard("s", 2, {}, {})], StageResources(cpus=0.5)))
    assert shards.committed() == {}


def test_ray_is_not_imported_if_there_is_nothing_to_do(image_folder: Any, tmp_path: Path) -> None:
    root = image_folder({"cat": 8, "dog": 8})
    study = tmp_path / "study.yaml"
    study.write_text(
        f"name: toy\nreader: {{name: imagefolder, root: {root}}}\npreprocess: {{size: 16}}\n"
        "split: {group: none}\n"
    )
    script = (
        "import sys; from engine.cli import run_study; code = run_study(sys.argv[1:]);"
        "print(code, any(name.partition('.')[0] == 'ray' for name in sys.modules))"
    )
    storage = ["--set", f"profile.storage={tmp_path}/runs"]

    def run(*more: str) -> str:
        command = [sys.executable, "-c", script, str(study), *storage, *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    assert run("--set", "profile.runtime=inline") == "0 False"
    assert run("--set", "profile.runtime=ray") == "0 False"
