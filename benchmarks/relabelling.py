"""Do voters find wrong labels, and do they replace them by right ones?

A share of the labels of mnist (`../shared/data`) is moved to another class, drawn by the seed. The
voters are k-NN on vectors, a probe and a small network. Prints, for train and val together: the
share of moved labels that are flagged, the share of changes that are right, and the share of wrong
labels before and after. The X-rays (`--data cxr_pneumonia`) have no known truth: only numbers of
changes.

`python -m benchmarks.relabelling [--data NAME] [--images N] [--noise SHARE] [--steps N] [--seed N]
[--keep FOLDER] [--quick]`
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.false_alarms import Labelled, load
from benchmarks.near import put
from benchmarks.timing import machine, print_table
from engine.core import rows
from engine.core.rng import generator
from engine.core.store import Store
from engine.execute import execute
from engine.plan import plan, until
from engine.profile import Profile
from engine.results.data import RelabelResult
from engine.runtime.inline import InlineRuntime
from engine.study import Study, validate

SIZES = {"mnist": 28, "cxr_pneumonia": 64}


def with_noise(images: Labelled, share: float, seed: int) -> tuple[Labelled, dict[int, str]]:
    """The images with some labels moved to another class, and the true label of these by number."""
    random = generator(seed, "noise")
    classes = sorted({label for _, label in images})
    moved = random.permutation(len(images))[: round(share * len(images))].tolist()
    truth = {number: images[number][1] for number in moved}
    noisy = list(images)
    for number, label in truth.items():
        others = [name for name in classes if name != label]
        noisy[number] = (images[number][0], others[int(random.integers(len(others)))])
    return noisy, truth


def study_of(name: str, root: Path, steps: int) -> Study:
    """A study whose labels are voted on."""
    training = {
        "steps": steps, "batch_size": 64, "learning_rate": 2e-3,
        "evaluate_every": max(1, steps // 4),
    }  # fmt: skip
    values: dict[str, Any] = {
        "name": "relabelling", "seed": 3,
        "reader": {"name": "imagefolder", "root": str(root / "data")},
        "preprocess": {"size": SIZES[name], "channels": "L"},
        "split": {"val": 0.2, "test": 0.1, "group": "none"},
        "audit": {"on_leak": "drop", "on_contradiction": "drop"}, "cluster": {"k": 1},
        "training": training,
        "relabel": {
            "voters": {
                "knn": {"labeler": "knn"},
                "probe": {"classifier": {"name": "probe", "hidden": 256}},
                "small": {
                    "classifier": {"name": "small", "channels": [16, 32, 64]},
                    "training": {**training, "crop_padding": 2},
                },
            },
        },
    }  # fmt: skip
    return validate(Study, values, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=sorted(SIZES), default="mnist")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1, help="of the sample and the noise")
    parser.add_argument("--keep", type=Path, help="a folder for data, results and pages")
    parser.add_argument("--quick", action="store_true", help="few images, few steps")
    arguments = parser.parse_args()
    count, steps = (400, 20) if arguments.quick else (arguments.images, arguments.steps)
    print(machine())
    every = load(arguments.data)
    order = generator(arguments.seed, "relabelling").permutation(len(every)).tolist()
    images = [every[number] for number in order[:count]]
    noisy, truth = with_noise(images, arguments.noise, arguments.seed)
    kept = arguments.keep
    with nullcontext(str(kept)) if kept else tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        # Names do not say which labels were moved.
        for number, (data, label) in enumerate(noisy):
            suffix = "png" if data.startswith(b"\x89PNG") else "jpg"
            put(root / "data" / label / f"{number:05d}.{suffix}", data)
        study = study_of(arguments.data, root, steps)
        store, profile = Store(str(root / "runs")), Profile.model_validate({"runtime": "inline"})
        steps_of = until(plan(study), "revise")
        manifests = execute(steps_of, store, InlineRuntime(), profile)
        (relabel,) = [manifests[step.key] for step in steps_of if step.kind == "relabel"]
        votes = pa.concat_tables(store.tables(relabel.keys(table="votes")))
        (page,) = [part for part in relabel.parts if part.key.endswith(".html")]
        print(f"\npage: {store.location(page.key)}")
        report(votes, RelabelResult.of(relabel), truth)


def report(votes: pa.Table, result: RelabelResult, truth: dict[int, str]) -> None:
    """The figures, with the truth where labels were moved."""
    numbers = [int(Path(uri).stem) for uri in votes[rows.URI].to_pylist()]
    was, now = votes[rows.LABEL_WAS].to_pylist(), votes[rows.LABEL].to_pylist()
    flagged, changed = (np.asarray(votes[name].to_pylist()) for name in ("flagged", "changed"))
    moved = np.asarray([number in truth for number in numbers])
    true = [truth.get(number, label) for number, label in zip(numbers, was, strict=True)]
    right = np.asarray([one == label for one, label in zip(now, true, strict=True)])
    voters = next(iter(result.splits.values())).agreement
    agreement = {
        name: np.average(
            [split.agreement[name] for split in result.splits.values()],
            weights=[split.images for split in result.splits.values()],
        )
        for name in voters
    }
    lines = [
        ["labels", f"{len(was):,}", ""],
        ["moved labels", f"{moved.sum():,}", ""],
        ["flagged", f"{flagged.sum():,}", ""],
        ["share of moved labels that are flagged", share(flagged[moved]), ">= 0.9"],
        ["changed", f"{changed.sum():,}", ""],
        ["share of changes that are right", share(right[changed]), ">= 0.95"],
        ["wrong labels before", share(moved), ""],
        ["wrong labels after", share(~right), "<= 0.01"],
        *[[f"{name} agrees with", f"{value:.3f}", ""] for name, value in agreement.items()],
    ]
    print_table("labels of train and val", ["", "measured", "target"], lines)


def share(where: np.ndarray) -> str:
    return f"{where.mean():.4f}" if len(where) else "none"


if __name__ == "__main__":
    main()
