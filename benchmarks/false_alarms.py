"""How often does a warning come where nothing is wrong, and how often where something is?

Samples of the images of `../shared/data` (clothing, cxr_pneumonia, mnist), other ones in each
repetition:

    audit        the notices of the audit on an unchanged sample, with the share of samples that got
                 each, and its findings by kind
    generators   the alarm that a generator learnt nothing, for a `folder` of real images that the
                 study lacks (never wanted), of the same images under a wrong class, of the mean
                 image of each class and of noise (always wanted)

Some findings on unchanged data are true: these data have copies and wrong labels of their own.

`python -m benchmarks.false_alarms [--data NAME …] [--repeats N] [--images N] [--quick]`
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.near import put
from benchmarks.timing import machine, print_table
from engine.core.progress import Bar
from engine.core.rng import generator
from engine.core.store import Store
from engine.execute import execute
from engine.plan import named, plan, plan_audit
from engine.profile import Profile
from engine.results.data import AuditResult
from engine.results.images import CurateResult
from engine.runtime.inline import InlineRuntime
from engine.study import Study

DATA = Path(__file__).parents[2] / "shared" / "data"
WEIGHTS = DATA.parent / "weights" / "mobilenet_v2"
SIZES = {"clothing": 64, "cxr_pneumonia": 64, "mnist": 28}
FOLDERS = ("real", "wrong class", "class mean", "noise")
Labelled = list[tuple[bytes, str]]


def load(name: str) -> Labelled:
    """Encoded images and their classes, each picture once."""
    if name == "mnist":
        table = pq.read_table(DATA / name / "train.parquet")
        images = [image["bytes"] for image in table["image"].to_pylist()]
        labels = [f"digit{label}" for label in table["label"].to_pylist()]
        pairs = list(zip(images, labels, strict=True))
    else:
        with (DATA / name / "labels.csv").open() as lines:
            pairs = [((DATA / name / row["path"]).read_bytes(), row["label"])
                     for row in csv.DictReader(lines)]  # fmt: skip
    return list({data: (data, label) for data, label in pairs}.values())


def sample(images: Labelled, count: int, seed: int) -> tuple[Labelled, Labelled]:
    """`count` images, and the others, in random order."""
    order = generator(seed, "false alarms").permutation(len(images)).tolist()
    chosen = [images[number] for number in order]
    return chosen[:count], chosen[count:]


def write(root: Path, images: Labelled) -> None:
    for number, (data, label) in enumerate(images):
        suffix = "png" if data.startswith(b"\x89PNG") else "jpg"
        put(root / label / f"{number:05d}.{suffix}", data)


def study_of(root: Path, name: str, seed: int, **fields: Any) -> Study:
    cnn = {"name": "cnn", "model": str(WEIGHTS), "input_size": 96}
    values: dict[str, Any] = {
        "name": "alarms", "seed": seed,
        "reader": {"name": "imagefolder", "root": str(root / "data")},
        "preprocess": {"size": SIZES[name], "channels": "L" if name == "mnist" else "RGB"},
        "split": {"val": 0.3, "test": 0.2, "group": "none"},
        "audit": {"on_leak": "drop", "on_contradiction": "drop"},
        "embedder": {"name": "pixels"} if name == "mnist" else cnn, "cluster": {"k": 1},
        **fields,
    }  # fmt: skip
    return Study.model_validate(values)


def run(steps: Sequence[Any], root: Path) -> Any:
    """The manifest of the last step."""
    store, profile = Store(str(root / "runs")), Profile.model_validate({"runtime": "inline"})
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return execute(list(steps), store, InlineRuntime(), profile)[steps[-1].key]


def audited(name: str, images: Labelled, count: int, seed: int) -> AuditResult:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write(root / "data", sample(images, count, seed)[0])
        return AuditResult.of(run([plan_audit(study_of(root, name, seed))], root))


def pictures(folder: str, others: Labelled, seed: int) -> Labelled:
    """What a generator that is `folder` makes."""
    classes = sorted({label for _, label in others})
    if folder == "real":
        return others
    if folder == "wrong class":
        follows = dict(zip(classes, [*classes[1:], classes[0]], strict=True))
        return [(data, follows[label]) for data, label in others]
    random, drawn = generator(seed, "noise"), []
    mean = {
        label: np.mean([pixels(data) for data, own in others if own == label], 0)
        for label in classes
    }
    for _, label in others:
        noise = random.integers(0, 256, (64, 64, 3))
        # No two are equal.
        image = noise if folder == "noise" else mean[label] + noise / 32 - 4
        target = io.BytesIO()
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(target, "PNG")
        drawn.append((target.getvalue(), label))
    return drawn


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((64, 64)), np.float64)


def generator_name(folder: str) -> str:
    return f"of_{folder.replace(' ', '_')}"


def alarmed(
    name: str, images: Labelled, count: int, seed: int, folders: Sequence[str]
) -> dict[str, list[str]]:
    """The alarms of each folder."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        own, others = sample(images, count, seed)
        write(root / "data", own)
        classes = sorted({label for _, label in own})
        of_class = {label: [one for one in others if one[1] == label] for label in classes}
        each = min(60, *(len(members) for members in of_class.values()))
        reserve = [one for members in of_class.values() for one in members[:each]]
        for folder in folders:
            write(root / folder, pictures(folder, reserve, seed))
        study = study_of(
            root, name, seed,
            generators={
                generator_name(folder): {
                    "name": "folder",
                    "reader": {"name": "imagefolder", "root": str(root / folder)},
                }
                for folder in folders
            },
            request={"per_class": each // 2, "classes": "all"}, curate={"max_rounds": 1},
            classifier={"name": "probe", "hidden": 64} if name == "mnist" else
            {"name": "probe", "embedder": {"name": "cnn", "model": str(WEIGHTS), "input_size": 96}},
            training={"steps": 300, "batch_size": 32, "learning_rate": 3e-3, "evaluate_every": 100},
            search={"ratios": [0.1]},
        )  # fmt: skip
        steps = plan(study)
        found = {}
        for folder in folders:
            curate = next(step for step in named(steps, "curate")
                          if step.subject.name == generator_name(folder))  # fmt: skip
            result = CurateResult.of(run(steps[: steps.index(curate) + 1], root))
            assert result.usefulness is not None
            found[folder] = [notice.code for notice in result.usefulness.notices()]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--images", type=int, default=1000, help="of each sample")
    parser.add_argument("--quick", action="store_true", help="one sample of 200 digits")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.data, arguments.repeats, arguments.images = ["mnist"], 1, 200
    print(machine("torch"))
    notices: dict[str, Counter[str]] = {}
    findings: dict[str, Counter[str]] = {}
    alarms: dict[str, Counter[str]] = {}
    for name in arguments.data:
        images = load(name)
        notices[name], findings[name], alarms[name] = Counter(), Counter(), Counter()
        with Bar(name, arguments.repeats, "samples") as bar:
            for seed in range(arguments.repeats):
                audit = audited(name, images, arguments.images, seed)
                notices[name].update({notice.code for notice in audit.warnings})
                findings[name].update(audit.found)
                kinds = FOLDERS[-1:] if arguments.quick else FOLDERS
                found = alarmed(name, images, arguments.images, seed, kinds)
                for folder, codes in found.items():
                    alarms[name].update(f"{folder}: {code}" for code in codes)
                    alarms[name][f"{folder}: any"] += bool(codes)
                bar.advance(1)
    of = f"of {arguments.repeats} samples of {arguments.images:,} images"
    table(f"Notices of the audit on unchanged images, {of}", notices, 1)
    table(f"Findings of the audit per sample, mean {of}", findings, arguments.repeats)
    table(f"Alarms for generators, {of}", alarms, 1)


def table(title: str, counts: dict[str, Counter[str]], share: int) -> None:
    whats = sorted({what for counter in counts.values() for what in counter})
    lines = [[what, *(f"{counter[what] / share:g}" for counter in counts.values())]
             for what in whats]  # fmt: skip
    print_table(title, ["", *counts], lines)


if __name__ == "__main__":
    main()
