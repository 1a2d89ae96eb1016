"""The quality of each generator, trained from scratch on this machine.

Generators are trained on images of `../shared/data`, sampled, and compared with held-out real
images:

    accuracy   the share of images in which a classifier sees the requested class (it was trained on
               real images; its accuracy on real test images is printed above the table)
    FD, KID    Fréchet and kernel distance in the space of ../shared/weights/mobilenet_v2
    precision, recall, density, coverage: by nearest neighbours in that space

The line `real` is a second set of real images of the same size, the best that a generator could
reach. Values for different numbers of images or another embedder are not comparable.

`python -m benchmarks.generators [--data mnist|clothing] [--only NAME …] [--steps N] [--images N]
[--sheets FOLDER] [--weights FOLDER] [--quick]`

With `--weights`, trained weights are kept there and reused, so that other sampling settings need no
training.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from benchmarks.timing import machine, print_table
from engine.classifiers.small import Small, SmallSpec
from engine.core.manifest import copy_files
from engine.core.progress import Bar
from engine.core.registry import resolve
from engine.core.rng import derive_seed, generator
from engine.core.spec import digest, without
from engine.core.store import Store
from engine.data.decoding import decode
from engine.data.images import Preprocess, preprocess
from engine.embedders.cnn import Cnn, CnnSpec
from engine.generators import SampleBatch, TrainingImages
from engine.metrics.classification import METRICS, confusion
from engine.metrics.frechet import frechet_distance
from engine.metrics.kernel import kernel_distance
from engine.metrics.prdc import prdc
from engine.nets.classification import LabelledImages, Training, class_numbers, predict, train
from engine.report.sheet import contact_sheet
from engine.work.fit import FitContext, read_result

SHARED = Path(__file__).parents[2] / "shared"
WEIGHTS = SHARED / "weights" / "mobilenet_v2"
SEED = 7
SAMPLE_BATCH = 50

# Steps chosen so that each trains for 20 to 30 minutes on two cores.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "mnist": {
        "dcgan": {
            "width": 32, "max_width": 128, "train_steps": 6000, "batch_size": 64,
            "class_balance": 0.0,
        },
        "pggan": {
            "width": 16, "max_width": 128, "train_steps": 7000, "batch_size": 32,
            "last_level_share": 0.5, "class_balance": 0.0,
        },
        "ddpm": {
            "patch_size": 2, "block_out_channels": [48, 96, 128], "layers_per_block": 1,
            "attention_resolution": 4, "resnet_time_scale_shift": "scale_shift",
            "prediction_type": "v_prediction", "train_steps": 3200, "batch_size": 64,
            "learning_rate": 1e-3, "ema_decay": 0.995, "precision": "bf16",
            "num_inference_steps": 25, "guidance_scale": 1.5, "class_balance": 0.0,
        },
    },
    "clothing": {
        "dcgan": {
            "width": 32, "max_width": 256, "train_steps": 6000, "batch_size": 64,
            "augment": "diffaugment",
        },
        "pggan": {
            "width": 16, "max_width": 128, "train_steps": 7000, "batch_size": 32,
            "last_level_share": 0.5,
        },
        "ddpm": {
            "patch_size": 2, "block_out_channels": [48, 96, 128], "layers_per_block": 1,
            "attention_resolution": 4, "resnet_time_scale_shift": "scale_shift",
            "prediction_type": "v_prediction", "train_steps": 3200, "batch_size": 64,
            "learning_rate": 1e-3, "ema_decay": 0.995, "precision": "bf16",
            "num_inference_steps": 25, "guidance_scale": 1.5,
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """pixels: uint8 (n, height, width, channels)."""

    pixels: np.ndarray
    labels: list[str]


@dataclass(frozen=True)
class Data:
    """train: training images of the generators. held_out: real images for comparison. second: the
    same number of real images from train, as the best possible result."""

    preprocess: Preprocess
    train: Pictures
    held_out: Pictures
    second: Pictures


def read_mnist(count: int, held_out: int) -> Data:
    """`count` training digits, padded from 28 to 32 px, and `held_out` others."""
    shape = Preprocess(size=32, channels="L")

    def split(name: str, first: int, wanted: int) -> Pictures:
        table = pq.read_table(SHARED / "data" / "mnist" / f"{name}.parquet")
        order = generator(SEED, "mnist", name).permutation(table.num_rows)[first : first + wanted]
        held = table.take(order)
        pixels = [
            np.pad(np.asarray(Image.open(io.BytesIO(entry["bytes"])).convert("L")), 2)[..., None]
            for entry in held["image"].to_pylist()
        ]
        return Pictures(np.stack(pixels), [str(label) for label in held["label"].to_pylist()])

    return Data(shape, split("train", 0, count), split("test", 0, held_out),
                split("train", count, held_out))  # fmt: skip


def read_clothing(count: int, held_out: int) -> Data:
    """The training photographs at 32 px, and at most `held_out` of validation and test. There are
    no others, so `second` is the training photographs themselves."""
    shape = Preprocess(size=32, channels="RGB", fit="pad")

    def split(*names: str) -> Pictures:
        paths = sorted(
            path for name in names for path in (SHARED / "data" / "clothing" / name).rglob("*.jpg")
        )
        pixels = [preprocess(decode(path.read_bytes()), shape) for path in paths]
        return Pictures(np.stack(pixels), [path.parent.name for path in paths])

    train = split("train")
    chosen = generator(SEED, "clothing").permutation(len(train.labels))
    first, second = (
        Pictures(train.pixels[rows], [train.labels[row] for row in rows])
        for rows in (chosen[:count], chosen[:count])
    )
    others = split("validation", "test")
    order = generator(SEED, "compared with").permutation(len(others.labels))
    chosen = np.sort(order[:held_out])
    unseen = Pictures(others.pixels[chosen], [others.labels[row] for row in chosen])
    return Data(shape, first, unseen, second)


class Reader:
    """A classifier trained on real images, applied to generated ones."""

    def __init__(self, data: Data, steps: int) -> None:
        self.classes = tuple(sorted(set(data.train.labels)))
        self.small = Small(SmallSpec(channels=(32, 64, 128)), data.preprocess, self.classes)
        held = Pictures(
            np.concatenate([data.train.pixels, data.second.pixels]),
            data.train.labels + data.second.labels,
        )

        def score(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
            matrix = confusion(labels, probabilities.argmax(1), len(self.classes))
            return {name: float(metric(matrix)) for name, metric in METRICS.items()}

        with tempfile.TemporaryDirectory() as folder:
            context = FitContext(Store(folder), "work/r", "weights/r", "r", "inputs")
            made = train(
                context, self.small.build, self.small.prepare, self._labelled(held),
                self._labelled(data.held_out), score,
                Training(steps=steps, batch_size=128, learning_rate=2e-3, evaluate_every=steps),
                seed=SEED,
            )  # fmt: skip
        self.network = made.network.eval()
        self.accuracy = self.reads(data.held_out)

    def _labelled(self, held: Pictures) -> LabelledImages:
        labels = class_numbers(held.labels, self.classes)
        return LabelledImages(held.pixels, labels, np.ones(len(labels)))

    def reads(self, made: Pictures) -> float:
        """The share of images in which the classifier sees their class."""
        seen = predict(self.network, self.small.prepare, made.pixels, "cpu").argmax(1)
        return float((seen == class_numbers(made.labels, self.classes)).mean())


@dataclass(frozen=True)
class Trained:
    images: Pictures
    train_seconds: float
    images_per_second: float


def train_and_sample(
    name: str, fields: dict[str, Any], data: Data, labels: Sequence[str], kept: Path | None
) -> Trained:
    """Fit a generator on train, or load it from `kept`, and make an image for each of `labels`."""
    kind = resolve("generators", name)
    made = kind(kind.Spec(name=name, **fields), data.preprocess)
    made.check()
    with tempfile.TemporaryDirectory() as temporary:
        store = Store(str(kept) if kept else temporary)
        learnt = digest([without(made.spec, kind.sampling_fields), data.train.labels])
        folder = f"{name}-{learnt}"
        if not store.exists(f"{folder}/seconds"):
            seconds = fit(made, store, folder, data)
            store.put(f"{folder}/seconds", str(seconds).encode())
        train_seconds = float(store.read(f"{folder}/seconds"))
        parts, _ = read_result(store, f"{folder}/work", name)
        made.load(copy_files(store, parts, Path(temporary) / "loaded"), "cpu")
    pixels = []
    started = time.perf_counter()
    for first in range(0, len(labels), SAMPLE_BATCH):
        held = list(labels[first : first + SAMPLE_BATCH])
        nothing = [None] * len(held)
        seeds = [derive_seed(SEED, "image", first + row) for row in range(len(held))]
        pixels += made.sample(SampleBatch(held, nothing, nothing, nothing, nothing, nothing, seeds))
    rate = len(labels) / (time.perf_counter() - started)
    return Trained(Pictures(np.stack(pixels), list(labels)), train_seconds, rate)


def fit(made: Any, store: Store, folder: str, data: Data) -> float:
    """Train, with weights in `folder`; returns the CPU seconds."""
    name, count = made.spec.name, len(data.train.labels)
    # One process has one precision; each generator may have another.
    AcceleratorState._reset_state(True)
    images = TrainingImages(
        data.train.pixels, [str(row) for row in range(count)], data.train.labels, [0] * count
    )
    with Bar(name, made.spec.train_steps, "steps", interval=60) as bar:

        def tell(message: dict[str, Any]) -> None:
            rest = {key: value for key, value in message.items() if key != "done"}
            note = ", ".join(f"{key} {value:.3g}" for key, value in rest.items())
            bar.advance(message["done"] - bar.done, note)

        context = FitContext(
            store, f"{folder}/work", f"{folder}/weights", name, "inputs",
            checkpoint_every=500, on_report=tell,
        )  # fmt: skip
        started = time.process_time()
        made.fit(context, images, SEED)
    return time.process_time() - started


def figures(real: np.ndarray, made: np.ndarray) -> list[str]:
    """Columns of the table: distances and shares, from embeddings."""
    kernel = kernel_distance(real, made, SEED, subsets=30)
    shares = prdc(real, made)
    return [
        f"{frechet_distance(real, made):.2f}",
        f"{1000 * kernel.estimate:.2f} [{1000 * kernel.low:.2f}, {1000 * kernel.high:.2f}]",
        *(
            f"{value:.2f}"
            for value in (shares.precision, shares.recall, shares.density, shares.coverage)
        ),
    ]


def embed(embedder: Cnn, pictures: Pictures) -> np.ndarray:
    return np.concatenate(
        [
            embedder.embed(pictures.pixels[start : start + 100])
            for start in range(0, len(pictures.labels), 100)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="generators trained from scratch, compared")
    parser.add_argument("--data", choices=sorted(SETTINGS), default="mnist")
    parser.add_argument("--only", nargs="+", help="names of generators")
    parser.add_argument("--steps", type=int, help="training steps of each; default: its own")
    parser.add_argument("--images", type=int, default=2000, help="images per generator")
    parser.add_argument("--train", type=int, default=20_000, help="real images to learn from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sheets", type=Path, help="a folder for image sheets")
    parser.add_argument("--weights", type=Path, help="a folder that keeps trained weights")
    parser.add_argument("--quick", action="store_true", help="few steps and images")
    arguments = parser.parse_args()
    if not WEIGHTS.is_dir() or not (SHARED / "data" / arguments.data).is_dir():
        raise SystemExit(f"{WEIGHTS} and {SHARED / 'data' / arguments.data} are needed")
    if arguments.quick:
        arguments.steps, arguments.images, arguments.train = 4, 16, 500
    torch.set_num_threads(arguments.threads)
    settings = SETTINGS[arguments.data]
    if unknown := set(arguments.only or ()) - set(settings):
        raise SystemExit(f"--only: {sorted(unknown)} unknown; there are {sorted(settings)}")
    print(machine("torch", "diffusers"))
    data = {"mnist": read_mnist, "clothing": read_clothing}[arguments.data](
        arguments.train, 500 if arguments.quick else 10_000
    )
    reader = Reader(data, 20 if arguments.quick else 1200)
    embedder = Cnn(CnnSpec(model=str(WEIGHTS), input_size=96))
    embedder.load("cpu")
    count = min(arguments.images, len(data.held_out.labels))
    chosen = generator(SEED, "compared").permutation(len(data.held_out.labels))[:count]
    held_out = Pictures(data.held_out.pixels[chosen], [data.held_out.labels[row] for row in chosen])
    second = Pictures(data.second.pixels[:count], data.second.labels[:count])
    real = embed(embedder, held_out)
    print(
        f"{arguments.data}: {len(data.train.labels):,} images to learn from, {count:,} made and"
        f" compared, at {data.preprocess.size} px; the classifier is right on"
        f" {reader.accuracy:.4f} of real images that it never saw", flush=True,
    )  # fmt: skip
    rows = [["real", "", "", f"{reader.reads(held_out):.3f}",
             *figures(real, embed(embedder, second))]]  # fmt: skip
    for name in arguments.only or settings:
        fields = dict(settings[name])
        if arguments.steps:
            fields["train_steps"] = arguments.steps
        if arguments.quick:
            fields["batch_size"] = 8
            if "num_inference_steps" in fields:
                fields["num_inference_steps"] = 3
        made = train_and_sample(name, fields, data, held_out.labels, arguments.weights)
        rows.append(
            [name, f"{made.train_seconds:,.0f}", f"{made.images_per_second:.1f}",
             f"{reader.reads(made.images):.3f}", *figures(real, embed(embedder, made.images))]
        )  # fmt: skip
        if arguments.sheets:
            arguments.sheets.mkdir(parents=True, exist_ok=True)
            (arguments.sheets / f"{arguments.data}-{name}.png").write_bytes(
                sheet(held_out, made.images)
            )
    print_table(
        f"{count:,} images each, mobilenet_v2 at 96 px",
        ["generator", "train CPU s", "image/s", "accuracy", "FD", "KID x1000", "precision",
         "recall", "density", "coverage"],
        rows,
    )  # fmt: skip


def sheet(real: Pictures, made: Pictures, per_class: int = 8) -> bytes:
    def first(held: Pictures, label: str) -> list[np.ndarray]:
        rows = [row for row, name in enumerate(held.labels) if name == label][:per_class]
        return [held.pixels[row] for row in rows]

    labels = sorted(set(real.labels))
    return contact_sheet({label: (first(real, label), first(made, label)) for label in labels})


if __name__ == "__main__":
    main()
