"""Are copies of training images, and repetitions, found among generated images?

Photographs of the test split of `../shared/data/clothing` serve as good generated images. Among
them are planted

    copies       training photographs, encoded again (JPEG of quality 60 to 80), every second one
                 also cropped by up to 3% of each side and made brighter or darker by up to 10%
    repeats      photographs of the set itself with the same changes

and the study's `curate` step filters all of them (generator `folder`, filters `copies` and
`duplicates` with their defaults, `mobilenet_v2`). False positives are images in which nothing was
planted.

`python -m benchmarks.copies [--seed N] [--quick]`
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageEnhance

from benchmarks.timing import machine, print_table
from engine.core import rows
from engine.core.rng import generator
from engine.core.store import Store
from engine.execute import execute
from engine.plan import named, plan, until
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.study import Study, load_study

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "clothing"
CLASSES = ("longsleeve", "pants", "shoes", "t-shirt")
GOOD, PLANTED = 40, 5  # of each class


def plant(root: Path, seed: int, good_count: int) -> None:
    """Write the images; the kind of each file is in its name."""
    random = generator(seed, "copies")
    for label in CLASSES:
        folder = root / label
        folder.mkdir(parents=True)
        good = sorted((DATA / "test" / label).iterdir())[:good_count]
        train = sorted((DATA / "train" / label).iterdir())
        for number, path in enumerate(good):
            Image.open(path).convert("RGB").save(folder / f"good{number:03d}.png")
        for kind, among in (("copies", train), ("repeats", good)):
            for number, chosen in enumerate(random.permutation(len(among))[:PLANTED]):
                image = Image.open(among[chosen]).convert("RGB")
                if number % 2:
                    image = changed(image, random)
                image.save(folder / f"{kind}{number:03d}.jpg", quality=int(random.integers(60, 81)))


def changed(image: Image.Image, random: np.random.Generator) -> Image.Image:
    left, top, right, bottom = random.uniform(0, 0.03, 4)
    width, height = image.size
    box = (left * width, top * height, width - right * width, height - bottom * height)
    cropped = image.crop(tuple(round(edge) for edge in box))
    return ImageEnhance.Brightness(cropped).enhance(float(random.uniform(0.9, 1.1)))


def study_of(root: Path, size: int, each: int) -> Study:
    """size: px of the images. each: generated images of a class."""
    sets = [
        f"generators={{ddpm: null, traditional: null, made: {{name: folder, reader: {{name:"
        f" imagefolder, root: {root}}}}}}}",
        f"request={{ratio: null, per_class: {each}, classes: [{', '.join(CLASSES)}]}}",
        f"reader.root={DATA}", "reduce=null", "audit={embedder: {name: pixels}, on_leak: drop}",
        "classifier={name: small}", "search={ratios: [0.01], seeds: 2}",
        f"preprocess.size={size}",
        "curate={labeler: knn, filters: [copies, duplicates], max_rounds: 1}",
    ]  # fmt: skip
    return load_study(ROOT / "configs" / "clothing.yaml", sets)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few and small images")
    arguments = parser.parse_args()
    good_count, size = (PLANTED, 32) if arguments.quick else (GOOD, 64)
    with tempfile.TemporaryDirectory() as scratch:
        plant(Path(scratch) / "made", arguments.seed, good_count)
        study = study_of(Path(scratch) / "made", size, good_count + 2 * PLANTED)
        store = Store(str(Path(scratch) / "runs"))
        profile = Profile(storage=store.url, runtime="inline")
        manifests = execute(until(plan(study), "curate"), store, InlineRuntime(), profile)
        step = named(plan(study), "curate")[0]
        made = manifests[step.inputs["generate"].key]
        keys = [part.key for part in made.parts if "label" in part.tags]
        name_of: dict[str, str] = {}
        for table in store.tables(keys, [rows.IMAGE_ID, rows.URI]):
            name_of |= dict(zip(*(column.to_pylist() for column in table.columns), strict=True))
        manifest = manifests[step.key]
        table = pa.concat_tables(store.tables(manifest.keys(table="curated")))
        limits = {told["name"]: told["limits"] for told in manifest.metrics["filters"]}
    fate: dict[str, list[str]] = {"copies": [], "repeats": [], "good": []}
    for image_id, reason in zip(
        table[rows.IMAGE_ID].to_pylist(), table[rows.REASON].to_pylist(), strict=True
    ):
        name = Path(name_of[image_id]).name
        fate[next(kind for kind in fate if name.startswith(kind))].append(reason)
    lines = []
    for kind, reason in (("copies", "copies"), ("repeats", "duplicates")):
        found = fate[kind].count(reason)
        # Of two that repeat each other either may stay: a good one then goes for its repetition.
        others = [one for other in fate if other != kind for one in fate[other]].count(reason)
        swapped = min(others, len(fate[kind]) - found) if kind == "repeats" else 0
        lines.append(
            [kind, str(len(fate[kind])), str(found + swapped),
             str(len(fate[kind]) - found - swapped), str(others - swapped),
             ", ".join(f"{name} {value:.3g}" for name, value in limits[reason].items())]
        )  # fmt: skip
    print(machine())
    title = f"{table.num_rows} images in {len(CLASSES)} classes, {len(fate['good'])} of them good"
    print_table(title, ["planted", "number", "found", "missed", "false positives", "limits"], lines)


if __name__ == "__main__":
    main()
