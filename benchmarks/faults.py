"""Does the audit find the faults in a dataset, and what are its false positives?

Faults are planted in a copy of `../shared/data/clothing`, the audit runs on it as a user runs it
(`jobs/audit.py`), and its findings are compared with what was planted:

    exact      images copied into another split, unchanged or as PNG
    near       images cropped by 3% to 10% of each side and saved as JPEG of quality 60 to 80, in
               another split
    label      training and validation images moved to another class, sampled evenly
    broken     files emptied, truncated, replaced by HTML or by noise, or with a wrong extension

False positives are images in which nothing was planted. The data has faults of its own, so some of
them may be correct; they are printed by name. The truth about labels that were not moved is
unknown: for labels the table has the share of planted ones among the first 100 suspects, a lower
bound.

`python -m benchmarks.faults [--seed N] [--keep FOLDER] [--quick]`
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.timing import machine, print_table
from engine.core.manifest import read_manifest
from engine.core.rng import generator
from engine.core.store import Store
from engine.plan import plan_audit
from engine.study import load_study

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "clothing"
CONFIG = Path("configs") / "clothing.yaml"
COUNTS = {"exact": 50, "near": 50, "label": 40, "broken": 20}
FIRST = 100
HTML = b"<!doctype html><html><body><h1>404 Not Found</h1></body></html>"


@dataclass
class Planted:
    """pairs: of (original, copy) by kind. rows: files by kind."""

    pairs: dict[str, set[frozenset[str]]] = field(default_factory=dict)
    rows: dict[str, set[str]] = field(default_factory=dict)

    @property
    def touched(self) -> set[str]:
        held = [*self.rows.values(), *(pair for pairs in self.pairs.values() for pair in pairs)]
        return {uri for group in held for uri in group}


def plant(root: Path, counts: dict[str, int], seed: int) -> Planted:
    """Plant faults in the image folder `root`, each in different files."""
    random = generator(seed, "faults")
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg"))
    order = iter(random.permutation(len(files)).tolist())
    splits = sorted({uri.split("/")[0] for uri in files})
    classes = sorted({uri.split("/")[1] for uri in files})
    planted = Planted({"exact": set(), "near": set()}, {"label": set(), "broken": set()})

    def another(names: list[str], but: str) -> str:
        return str(random.choice([name for name in names if name != but]))

    for kind in ("exact", "near"):
        for number in range(counts[kind]):
            uri = files[next(order)]
            split, name, _ = uri.split("/")
            suffix = "png" if kind == "exact" and number % 2 else "jpg"
            copy = f"{another(splits, split)}/{name}/{kind}{number:03d}.{suffix}"
            if kind == "near":
                (root / copy).write_bytes(cropped(root / uri, random))
            elif suffix == "png":
                Image.open(root / uri).save(root / copy)
            else:
                shutil.copy(root / uri, root / copy)
            planted.pairs[kind].add(frozenset((uri, copy)))
    while len(planted.rows["label"]) < counts["label"]:
        uri = files[next(order)]
        split, name, _ = uri.split("/")
        if split == "test":
            continue
        moved = f"{split}/{another(classes, name)}/label{len(planted.rows['label']):03d}.jpg"
        (root / uri).rename(root / moved)
        planted.rows["label"].add(moved)
    for number in range(counts["broken"]):
        uri = files[next(order)]
        whole = (root / uri).read_bytes()
        png = io.BytesIO()
        Image.open(root / uri).save(png, "PNG")
        noise = random.bytes(len(whole))
        made = (b"", whole[: len(whole) // 2], HTML, noise, png.getvalue())[number % 5]
        (root / uri).write_bytes(made)
        planted.rows["broken"].add(uri)
    return planted


def cropped(path: Path, random: np.random.Generator) -> bytes:
    image = Image.open(path)
    left, top, right, bottom = random.uniform(0.03, 0.10, 4)
    width, height = image.size
    box = (left * width, top * height, width - right * width, height - bottom * height)
    target = io.BytesIO()
    image.crop(tuple(round(edge) for edge in box)).save(
        target, "JPEG", quality=int(random.integers(60, 81))
    )
    return target.getvalue()


def audit(root: Path, storage: Path) -> tuple[pa.Table, dict[str, Any], float]:
    """Run the job; returns its findings, its timings, and the total time in seconds."""
    sets = [f"reader.root={root}"]
    given = [*sets, f"profile.storage={storage}", "profile.runtime=inline"]
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "jobs/audit.py", str(CONFIG), *(a for s in given for a in ("--set", s))],
        cwd=ROOT, check=True, stdout=sys.stderr,
    )  # fmt: skip
    seconds = time.monotonic() - started
    store = Store(str(storage))
    manifest = read_manifest(store, plan_audit(load_study(ROOT / CONFIG, sets)))
    assert manifest is not None
    found = pa.concat_tables(store.tables(manifest.keys(table="findings")))
    return found, manifest.provenance["timings"], seconds


def rows(planted: Planted, found: pa.Table, clean: int) -> tuple[list[list[str]], list[str]]:
    """A line for each kind, and the false positives."""
    held = found.to_pylist()
    lines, accused = [], []
    for kind, pairs in planted.pairs.items():
        told = {
            frozenset((entry["uri"], entry["other_uri"])): entry["score"]
            for entry in held
            if entry["kind"].startswith(kind)
        }
        false = {uri for pair in set(told) - pairs for uri in pair} - planted.touched
        lines.append(line(kind, pairs, pairs & set(told), len(false), share(len(false), clean)))
        accused += [
            f"{kind}: {' and '.join(sorted(pair))} ({score:.3f})"
            for pair, score in told.items()
            if pair not in pairs
        ]
    broken = {entry["uri"] for entry in held if entry["kind"] == "broken"}
    false = broken - planted.rows["broken"]
    lines.append(
        line("broken", planted.rows["broken"], broken & planted.rows["broken"], len(false),
             share(len(false), clean))
    )  # fmt: skip
    suspects = [entry["uri"] for entry in held if entry["kind"] == "label"]
    moved = planted.rows["label"]
    for name, listed in ((f"label, first {FIRST}", suspects[:FIRST]), ("label, all", suspects)):
        hit = moved & set(listed)
        said = f"{len(listed)} named, {share(len(hit), len(listed), 0)} planted"
        lines.append(line(name, moved, hit, len(listed) - len(hit), said))
    return lines, accused


def line(name: str, planted: set[Any], hit: set[Any], false: int, said: str) -> list[str]:
    return [name, str(len(planted)), str(len(hit)), str(len(planted - hit)), str(false), said]


def share(part: int, whole: int, digits: int = 2) -> str:
    return f"{100 * part / max(1, whole):.{digits}f}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--keep", type=Path, help="an empty folder for the copy and the page")
    parser.add_argument("--quick", action="store_true", help="a fifth of images and faults")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        root = folder / "data"
        step = 5 if arguments.quick else 1
        for path in sorted(DATA.rglob("*.jpg"))[::step]:
            target = root / path.relative_to(DATA)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        planted = plant(root, {kind: n // step for kind, n in COUNTS.items()}, arguments.seed)
        total = sum(1 for path in root.rglob("*") if path.is_file())
        found, timings, seconds = audit(root, folder / "runs")
        clean = total - len(planted.touched)
        lines, accused = rows(planted, found, clean)
    print(machine())
    title = f"clothing, {total:,} files, {clean:,} of them clean, seed {arguments.seed}"
    print_table(title, ["fault", "planted", "found", "missed", "false", "of clean"], lines)
    kinds = Counter(found["kind"].to_pylist())
    print(f"\nall findings: {', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))}")
    print("\n".join(["accused, not planted:", *(f"  {text}" for text in accused)]))
    shown = ", ".join(f"{name} {value:g}" for name, value in timings.items())
    print(f"\n{seconds:.0f} s in all: {shown}")


if __name__ == "__main__":
    main()
