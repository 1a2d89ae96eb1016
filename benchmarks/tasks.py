"""Studies with several labels per image, on mnist of `../shared/data`, from files to their pages.

    two tasks     digit and parity; every tenth image has no parity
    pairs         two digits side by side: which digits are there (several labels per image)

Each study has a synthetic arm whose images are requested by combination. Prints the figures of each
task on test, next to scikit-learn's on the exported predictions, and the largest difference.

`python -m benchmarks.tasks [--images N] [--steps N] [--keep FOLDER] [--only NAME …] [--quick]`
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from sklearn import metrics

from benchmarks.timing import machine, print_table
from engine.core import rows
from engine.core.rng import generator
from engine.core.store import Store
from engine.execute import execute
from engine.plan import plan
from engine.profile import Profile
from engine.results.comparison import EvaluateResult, TaskResult
from engine.runtime.inline import InlineRuntime
from engine.study import Study, validate

DATA = Path(__file__).parents[2] / "shared" / "data"
SIZES = {"two tasks": 28, "pairs": 32}
TASKS: dict[str, dict[str, Any]] = {
    "two tasks": {"digit": {"weight": 1}, "parity": {"weight": 1}},
    "pairs": {"digits": {"weight": 1}},
}
# Every n-th image has no parity.
UNLABELLED = 10


def mnist(count: int) -> tuple[list[np.ndarray], list[int]]:
    """Images uint8 (28, 28) and their digits."""
    table = pq.read_table(DATA / "mnist" / "train.parquet").slice(0, count)
    pictures = [np.asarray(Image.open(io.BytesIO(image["bytes"])))
                for image in table["image"].to_pylist()]  # fmt: skip
    return pictures, [int(label) for label in table["label"].to_pylist()]


def write(name: str, root: Path, count: int) -> None:
    """The data of a study as one Parquet file."""
    if name == "two tasks":
        pictures, digits = mnist(count)
        labels = {
            "digit": pa.array(map(str, digits)),
            "parity": pa.array(
                [None if number % UNLABELLED == 3 else ("even", "odd")[digit % 2]
                 for number, digit in enumerate(digits)]
            ),
        }  # fmt: skip
    else:
        singles, digits = mnist(2 * count)
        order = generator(0, "pairs").permutation(2 * count)
        pairs = [(int(a), int(b)) for a, b in order.reshape(-1, 2)]
        pictures = [np.hstack([singles[a], singles[b]]) for a, b in pairs]
        labels = {"digits": pa.array([sorted({str(digits[a]), str(digits[b])}) for a, b in pairs])}
    root.mkdir(parents=True, exist_ok=True)
    images = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    table = pa.table({"image": pa.array(images, rows.IMAGE_TYPE), **labels})
    pq.write_table(table, root / "images.parquet", row_group_size=500)


def study_of(name: str, root: Path, steps: int) -> Study:
    """The study on the data below `root`."""
    values: dict[str, Any] = {
        "name": name.replace(" ", "_"), "seed": 5,
        "reader": {
            "name": "parquet", "root": str(root / "data"),
            "labels": {task: task for task in TASKS[name]},
            "multi": ["digits"] if name == "pairs" else [],
        },
        "tasks": TASKS[name],
        # Pairs are twice as wide as high; stretched, both digits stay whole.
        "preprocess": {"size": SIZES[name], "channels": "L", "fit": "stretch"},
        "split": {"val": 0.2, "test": 0.3, "group": "none"},
        "audit": {"on_leak": "drop"}, "cluster": {"k": 1},
        "generators": {
            "ddpm": {
                "name": "ddpm", "patch_size": 2, "block_out_channels": [16, 32],
                "layers_per_block": 1, "attention_resolution": SIZES[name] // 4,
                "train_steps": 2 * steps, "batch_size": 16, "learning_rate": 1e-3,
                "num_inference_steps": 10,
            },
        },
        "request": {"ratio": 1.0},
        # A small ddpm of a few minutes: what its filters drop would have to be made up for.
        "curate": {"filters": []},
        "classifier": {"name": "small", "channels": [16, 32, 64]},
        "training": {
            "steps": steps, "batch_size": 64, "learning_rate": 2e-3,
            "evaluate_every": max(1, steps // 4), "crop_padding": 2,
        },
        "search": {"ratios": [1.0], "seeds": 2, "confirm_fits": 2, "arms": ["oversampled"]},
    }  # fmt: skip
    return validate(Study, values, name)


def run(name: str, root: Path, count: int, steps: int) -> tuple[EvaluateResult, pa.Table, Path]:
    """The verdict, the predictions on test, and the page."""
    write(name, root / "data", count)
    study = study_of(name, root, steps)
    store, profile = Store(str(root / "runs")), Profile.model_validate({"runtime": "inline"})
    done = plan(study)
    manifests = execute(done, store, InlineRuntime(), profile)
    (evaluate,) = [manifests[step.key] for step in done if step.kind == "evaluate"]
    table = pa.concat_tables(store.tables(evaluate.keys(table="predictions")))
    (page,) = [part for step in done if step.kind == "report"
               for part in manifests[step.key].parts if part.key.endswith(".html")]  # fmt: skip
    return EvaluateResult.of(evaluate), table, Path(store.location(page.key))


def scored(table: pa.Table, task: str, result: TaskResult) -> dict[str, float]:
    """scikit-learn's scores of one classifier in one task."""
    labels = table[rows.label_column(task)].to_pylist()
    known = np.asarray([label is not None for label in labels])
    classes = result.classes
    decided = table[rows.decided_column(task)].to_pylist()
    values = np.asarray(table[rows.probabilities_column(task)].to_pylist())[known]
    if result.kind == "single":
        truth = [label for label in labels if label is not None]
        made = [one for one, there in zip(decided, known, strict=True) if there]
        binary = np.asarray([[label == name for name in classes] for label in truth])
        accuracy = metrics.accuracy_score(truth, made)
    else:
        binary = np.asarray([[name in one for name in classes]
                             for one in labels if one is not None])  # fmt: skip
        chosen = [one for one, there in zip(decided, known, strict=True) if there]
        truth, made = binary, np.asarray([[name in one for name in classes] for one in chosen])
        accuracy = 1 - metrics.hamming_loss(truth, made)
    options = {"average": "macro", "zero_division": 0}
    return {
        "accuracy": accuracy,
        "macro_precision": metrics.precision_score(truth, made, **options),
        "macro_recall": metrics.recall_score(truth, made, **options),
        "macro_f1": metrics.f1_score(truth, made, **options),
        "roc_auc": metrics.roc_auc_score(binary, values, average="macro"),
    }


def compared(result: EvaluateResult, table: pa.Table) -> list[list[str]]:
    """A row for each arm and task: our figures, and the largest difference from scikit-learn's."""
    entries = []
    for task, of_task in result.tasks.items():
        for arm, figures in of_task.arms.items():
            of_arm = table.filter(pc.equal(table[rows.ARM], arm))
            seeds = dict.fromkeys(
                zip(of_arm[rows.SEED].to_pylist(), of_arm[rows.GENERATOR_FIT].to_pylist(),
                    strict=True)
            )  # fmt: skip
            theirs: list[Mapping[str, float]] = []
            for seed, _ in seeds:
                theirs.append(
                    scored(of_arm.filter(pc.equal(of_arm[rows.SEED], seed)), task, of_task)
                )
            gap = max(
                abs(figures.figures[name].mean - float(np.mean([one[name] for one in theirs])))
                for name in theirs[0]
            )
            shown = [f"{figures.figures[name].mean:.4f}" for name in theirs[0]]
            entries.append([task, arm, *shown, f"{gap:.1e}"])
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--keep", type=Path, help="a folder for data, results and pages")
    parser.add_argument("--only", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--quick", action="store_true", help="few images, few steps")
    arguments = parser.parse_args()
    count, steps = (600, 8) if arguments.quick else (arguments.images, arguments.steps)
    print(machine())
    for name in arguments.only[:1] if arguments.quick else arguments.only:
        folder = tempfile.TemporaryDirectory() if arguments.keep is None else nullcontext(
            str(arguments.keep)
        )  # fmt: skip
        with folder as scratch:
            result, table, page = run(name, Path(scratch) / name.replace(" ", "_"), count, steps)
            print(f"\npage: {page}")
            print_table(
                f"{name}: {result.headline}",
                ["task", "arm", "accuracy", "precision", "recall", "macro F1", "ROC-AUC",
                 "largest gap to scikit-learn"],
                compared(result, table),
            )  # fmt: skip


if __name__ == "__main__":
    main()
