"""Does the audit find new encodings, sizes and slight crops, also where pictures are alike?

Copies are planted in photographs (clothing), chest X-rays (cxr), which all look alike, and
handwritten digits (mnist) of `../shared/data`, each next to its original in another split:

    encoded         JPEG of quality 50 to 95
    resized         3% smaller or larger, JPEG of quality 90
    cropped         by 2% of each side, JPEG of quality 90
    contradictory   encoded as above, and in another class

and the audit runs on them with its default embedder, `pixels`. A pair is a false accusation if
nothing was planted in it. The data has duplicates of its own, so these are printed, and pairs of
one patient are counted apart: they may be taken moments apart.

`python -m benchmarks.near [--data NAME …] [--images N] [--seed N] [--quick]`
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.timing import machine, print_table
from engine.core.rng import generator
from engine.core.store import Store
from engine.execute import execute
from engine.plan import plan_audit
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.study import load_study

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
KINDS = {"encoded": 50, "resized": 50, "cropped": 50, "contradictory": 20}
# Digits of 28 px have too few pixels for the others.
OF = {"clothing": tuple(KINDS), "cxr_pneumonia": tuple(KINDS),
      "mnist": ("encoded", "contradictory")}  # fmt: skip


def write(root: Path, name: str, images: int) -> None:
    """The images of a data set as `train/<class>/<number>.jpg` or png."""
    if name == "mnist":
        table = pq.read_table(DATA / name / "train.parquet").slice(0, images)
        (column,) = set(table.column_names) - {"label"}
        for number, (picture, label) in enumerate(
            zip(table[column].to_pylist(), table["label"].to_pylist(), strict=True)
        ):
            put(root / "train" / f"digit{label}" / f"{number:05d}.png", picture["bytes"])
        return
    files = sorted((DATA / name).rglob("*.jpg"))
    for number, path in enumerate(files[:: max(1, len(files) // images)]):
        put(root / "train" / path.parent.name / f"{number:05d}-{path.stem}.jpg", path.read_bytes())


def patients(name: str) -> dict[str, str]:
    """The patient of each original file, by the stem of its name; empty if none are known."""
    table = DATA / name / "labels.csv"
    if not table.is_file():
        return {}
    with table.open() as lines:
        return {
            Path(row["path"]).stem: row["group"]
            for row in csv.DictReader(lines)
            if row.get("group")
        }


def key(uri: str) -> str:
    """The stem of the original file."""
    return re.sub(r"^([0-9]+-)+", "", Path(uri).stem)


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def plant(root: Path, kinds: dict[str, int], seed: int) -> dict[str, set[frozenset[str]]]:
    """Plant copies in val and test; returns the pairs by kind."""
    random = generator(seed, "near")
    files = sorted(root.glob("train/*/*"))
    order = iter(random.permutation(len(files)).tolist())
    classes = sorted(path.name for path in (root / "train").iterdir())
    # Splits need images of their own: a tenth each.
    for number, split in [
        (number, ("val", "test")[number % 2]) for number in range(len(files) // 5)
    ]:
        path = files[next(order)]
        put(root / split / path.parent.name / f"{number}-{path.name}", path.read_bytes())
        path.unlink()
    planted: dict[str, set[frozenset[str]]] = {}
    for kind, count in kinds.items():
        for number in range(count):
            path = files[next(order)]
            label = path.parent.name
            if kind == "contradictory":
                label = str(random.choice([name for name in classes if name != label]))
            image, quality = Image.open(path), 90
            width, height = image.size
            if kind == "resized":
                factor = 1 + random.choice((-0.03, 0.03))
                image = image.resize(
                    (round(width * factor), round(height * factor)), Image.Resampling.BICUBIC
                )
            elif kind == "cropped":
                left, top = round(0.02 * width), round(0.02 * height)
                image = image.crop((left, top, width - left, height - top))
            else:
                quality = int(random.integers(50, 96))
            target = io.BytesIO()
            image.save(target, "JPEG", quality=quality)
            copy = root / ("val", "test")[number % 2] / label / f"{kind}{number:03d}.jpg"
            put(copy, target.getvalue())
            pair = frozenset(one.relative_to(root).as_posix() for one in (path, copy))
            planted.setdefault(kind, set()).add(pair)
    return planted


def audit(root: Path, size: int) -> tuple[pa.Table, dict[str, float]]:
    """The findings of the audit, and its times in seconds."""
    sets = [f"reader={{name: imagefolder, root: {root}}}", f"preprocess.size={size}", "split={}",
            "embedder=pixels", "audit={}"]  # fmt: skip
    study = load_study(ROOT / "configs" / "digits.yaml", sets)
    store = Store(str(root.parent / "runs"))
    step = plan_audit(study)
    profile = Profile(storage=store.url, runtime="inline")
    manifest = execute([step], store, InlineRuntime(), profile)[step.key]
    found = pa.concat_tables(store.tables(manifest.keys(table="findings")))
    return found, manifest.provenance["timings"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", nargs="+", choices=tuple(OF), default=list(OF))
    parser.add_argument("--images", type=int, default=10_000, help="at most, of each data set")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a twentieth of images and copies")
    arguments = parser.parse_args()
    images = 400 if arguments.quick else arguments.images
    print(machine())
    for name in arguments.data:
        groups = patients(name)
        kinds = {kind: KINDS[kind] // (10 if arguments.quick else 1) for kind in OF[name]}
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch) / "data"
            write(root, name, images)
            planted = plant(root, kinds, arguments.seed)
            total = sum(1 for path in root.rglob("*") if path.is_file())
            started = time.monotonic()
            found, timings = audit(root, 28 if name == "mnist" else 128)
            seconds = time.monotonic() - started
        accused = {
            frozenset((entry["uri"], entry["other_uri"]))
            for entry in found.to_pylist()
            if entry["kind"].startswith(("near", "exact"))
        }
        touched = {uri for pairs in planted.values() for pair in pairs for uri in pair}
        false = [pair for pair in accused if not pair & touched]
        share = 100 * len({uri for pair in false for uri in pair}) / (total - len(touched))
        lines = [
            [kind, str(len(pairs)), str(len(pairs & accused)),
             f"{100 * len(pairs & accused) / len(pairs):.0f}%"]
            for kind, pairs in planted.items()
        ]  # fmt: skip
        print_table(
            f"{name}: {total:,} images, {seconds:.0f} s"
            f" (near duplicates {timings.get('near duplicates', 0)} s)",
            ["planted", "number", "found", ""], lines,
        )  # fmt: skip
        same = [pair for pair in false if len({groups.get(key(uri), uri) for uri in pair}) == 1]
        print(f"accused without a plant: {len(false)} pairs, {share:.2f}% of the clean images;"
              f" {len(same)} of the pairs are of one patient")  # fmt: skip
        false = [pair for pair in false if pair not in same]
        for pair in false[:10]:
            print("   ", " and ".join(sorted(pair)))


if __name__ == "__main__":
    main()
