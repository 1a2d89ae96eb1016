"""From what strength on does the audit warn of a confounder, and how often without one?

One class of `../shared/data/clothing` and of mnist comes from another source with a probability of
60% to 100%, every other class with the rest: its files are smaller by a quarter, have an even frame
of 3% of the side, or another format. "warned" counts the repetitions in which the audit's check
warns of that class; each uses another class. On clean data, labels are shuffled as well: every
warning there is false.

`python -m benchmarks.confounding [--repeats N] [--images N] [--quick]`
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from benchmarks.timing import machine, print_table
from engine.core import rows
from engine.core.rng import generator
from engine.data.decoding import decode
from engine.data.images import Preprocess, preprocess
from engine.data.near_duplicates import SIDE, thumbnail
from engine.stages.confounding import Confounding, find_confounding

DATA = Path(__file__).parents[2] / "shared" / "data"
STRENGTHS = (0.6, 0.7, 0.8, 0.9, 1.0)
Encoded = list[tuple[bytes, str]]


def load(name: str, images: int) -> Encoded:
    """Encoded images and their classes."""
    if name == "mnist":
        table = pq.read_table(DATA / name / "train.parquet").slice(0, images)
        (column,) = set(table.column_names) - {"label"}
        return [
            (picture["bytes"], f"digit{label}")
            for picture, label in zip(
                table[column].to_pylist(), table["label"].to_pylist(), strict=True
            )
        ]
    files = sorted((DATA / name).rglob("*.jpg"))
    return [(path.read_bytes(), path.parent.name)
            for path in files[:: max(1, len(files) // images)]]  # fmt: skip


def changed(data: bytes, what: str) -> bytes:
    image = Image.open(io.BytesIO(data))
    made = image.format
    if what == "size":
        image = image.resize((round(image.width * 0.75), round(image.height * 0.75)))
    elif what == "frame":
        border = max(1, round(0.03 * max(image.size)))
        inner = image.resize((image.width - 2 * border, image.height - 2 * border))
        image = ImageOps.expand(inner, border, 128)
    else:
        made = "PNG" if made == "JPEG" else "BMP"
    target = io.BytesIO()
    image.save(target, made, **({"quality": 92} if made == "JPEG" else {}))
    return target.getvalue()


class Features:
    """What the check reads of a file."""

    def __init__(self, data: bytes) -> None:
        image = decode(data)
        spec = Preprocess(size=SIDE, channels="RGB")
        pixels = preprocess(image, spec)
        self.size = image.size
        self.acquisition = sorted(image.info["acquisition"].items())
        self.thumbnail = thumbnail(pixels, *image.size, padded=False).ravel()
        self.appearance = np.concatenate([pixels.mean((0, 1)), pixels.std((0, 1))])


def check(features: list[Features], labels: list[str], seed: int) -> Confounding:
    count = len(features)
    columns: dict[str, Any] = {
        rows.IMAGE_ID: [str(number) for number in range(count)],
        rows.GROUP_ID: [str(number) for number in range(count)],
        rows.SPLIT: ["train"] * count,
        rows.label_column("class"): labels,
        rows.WIDTH: [one.size[0] for one in features],
        rows.HEIGHT: [one.size[1] for one in features],
        rows.ACQUISITION: pa.array(
            [one.acquisition for one in features], pa.map_(pa.string(), pa.string())
        ),
    }
    return find_confounding(
        pa.table(columns), "class", np.stack([one.thumbnail for one in features]),
        np.stack([one.appearance for one in features]).astype(np.float32), seed,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="few images and repetitions")
    arguments = parser.parse_args()
    repeats, images = (1, 400) if arguments.quick else (arguments.repeats, arguments.images)
    print(machine())
    for name in ("clothing", "mnist"):
        encoded = load(name, images)
        labels = [label for _, label in encoded]
        classes = sorted(set(labels))
        plain = [Features(data) for data, _ in encoded]
        lines = []
        for what in ("size", "frame", "format"):
            other = [Features(changed(data, what)) for data, _ in encoded]
            cells = []
            for strength in STRENGTHS:
                warned, areas = 0, []
                for repeat in range(repeats):
                    target = classes[repeat % len(classes)]
                    draws = generator(repeat, "confounding").random(len(labels))
                    mixed = [
                        other[row] if draw < (strength if label == target else 1 - strength)
                        else plain[row]
                        for row, (draw, label) in enumerate(zip(draws, labels, strict=True))
                    ]  # fmt: skip
                    found = {one.label: one for one in check(mixed, labels, repeat).acquisition}
                    warned += found[target].suspicious
                    areas.append(found[target].auc)
                cells.append(f"{warned}/{repeats} ({np.median(areas):.2f})")
            lines.append([what, *cells])
        clean = check(plain, labels, 0)
        false = 0
        for repeat in range(4 * repeats):
            shuffled = generator(repeat, "shuffled").permutation(labels).tolist()
            false += any(one.suspicious for one in check(plain, shuffled, repeat).acquisition)
        print_table(
            f"{name}, {len(labels):,} images in {len(classes)} classes: warned (median AUC)",
            ["confounder", *(f"{strength:.0%}" for strength in STRENGTHS)], lines,
        )  # fmt: skip
        warned_clean = [one.label for one in clean.acquisition if one.suspicious]
        print(f"clean: warned of {', '.join(warned_clean) or 'no class'}; with shuffled labels"
              f" {false} of {4 * repeats} checks warned")  # fmt: skip


if __name__ == "__main__":
    main()
