"""Somebody else's predictions of a study's test images, judged as the study judges its own.

A file (Parquet or CSV) has a row for each test image and classifier:

    image_id, or uri        the image, as the study's export and its predictions name it
    arm                     what the classifier was trained on
    seed, generator_fit     which of the arm's classifiers; 0 where it has one column or none
    probabilities           a list in the order of the classes (Parquet), or a column
                            `probability.<class>` for each, or the class itself as `predicted`

The table `predictions` that a study's own `evaluate` leaves is such a file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from engine.core import rows
from engine.core.errors import DataError, StudyError
from engine.core.manifest import Manifest
from engine.core.spec import digest
from engine.core.store import Store
from engine.data.dataset import split_index
from engine.metrics.probabilities import PROBABILITY_METRICS
from engine.nets.classification import class_numbers
from engine.results.comparison import OpenedTest, ScoredPredictions
from engine.results.data import IngestResult
from engine.steps._verdict import DeclaredContrast, Predictions, compare, figures_of, in_words
from engine.steps.evaluate import record_opening
from engine.study import Study

PREDICTED = "predicted"
# What rounding to a few digits, or half precision, leaves of a sum of 1.
_SUM_TOLERANCE = 0.02


def score(
    study: Study, store: Store, ingest: Manifest, task: str, path: Path, baseline: str
) -> ScoredPredictions:
    """Figures of every arm and its contrast with `baseline`; opens test. Raises `StudyError`,
    `DataError`."""
    classes = IngestResult.of(ingest).classes
    test = split_index(store, ingest, task, "test")
    predictions = to_predictions(read_table(path), path, test, uris(store, ingest), task, classes)
    arms = list(predictions.probabilities)
    if baseline not in arms:
        raise StudyError(f"--baseline {baseline!r}: {path} has the arms {', '.join(arms)[:300]}")
    if predictions.replicates < 2:
        raise DataError(
            f"{path}: each arm has one classifier; an interval needs two, which {rows.SEED} or"
            f" {rows.GENERATOR_FIT} tells apart"
        )
    objective = study.training.objective
    held = predictions.probabilities.values()
    if objective in PROBABILITY_METRICS and all(((one == 0) | (one == 1)).all() for one in held):
        raise DataError(
            f"{path}: names classes alone, and {objective} needs probabilities; say"
            " --set training.objective=macro_f1"
        )
    # The same file by another measure or against another arm is another look.
    opener = digest(
        [hashlib.sha256(path.read_bytes()).hexdigest(), objective, baseline, study.evaluate]
    )
    opened = record_opening(store, test, opener)
    contrasts = compare(
        predictions, [DeclaredContrast(arm, baseline) for arm in arms if arm != baseline],
        objective, study.evaluate, study.seed,
    )  # fmt: skip
    return ScoredPredictions(
        study=study.name, file=path.name, objective=objective, baseline=baseline,
        classes=list(classes),
        test=OpenedTest(
            images=len(predictions.labels), groups=len(np.unique(predictions.groups)),
            opened=opened,
        ),
        arms={
            arm: figures_of(
                predictions, arm, arm, None, "baseline" if arm == baseline else "compared"
            )
            for arm in arms
        },
        contrasts=contrasts, verdict=in_words(contrasts, objective, baseline),
    )  # fmt: skip


def read_table(path: Path) -> pa.Table:
    """The rows of a file. Raises `DataError`."""
    try:
        if path.suffix.lower() == ".csv":
            text = dict.fromkeys((rows.IMAGE_ID, rows.URI, rows.ARM, PREDICTED), pa.string())
            options = pyarrow.csv.ConvertOptions(column_types=text)
            return pyarrow.csv.read_csv(path, convert_options=options)
        return pq.read_table(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: is no Parquet or CSV file that can be read: {error}") from None


def uris(store: Store, ingest: Manifest) -> dict[str, str]:
    """Ids of the test images by the name that their files have."""
    tables = store.tables(ingest.keys(split="test"), [rows.IMAGE_ID, rows.URI])
    held = pa.concat_tables(tables)
    return dict(zip(held[rows.URI].to_pylist(), held[rows.IMAGE_ID].to_pylist(), strict=True))


def to_predictions(
    table: pa.Table, path: Path, test: pa.Table, id_of: Mapping[str, str], task: str,
    classes: Sequence[str],
) -> Predictions:  # fmt: skip
    """Each classifier's probabilities of the test images in their order. Raises `DataError` where
    an image is missing, unknown or there twice, and where the arms cannot be paired."""
    if rows.SPLIT in table.column_names:
        table = table.filter(pc.equal(table[rows.SPLIT], "test"))
    if rows.IMAGE_ID in table.column_names:
        ids = table[rows.IMAGE_ID].to_pylist()
    elif rows.URI in table.column_names:
        ids = [id_of.get(uri, uri) for uri in table[rows.URI].to_pylist()]
    else:
        raise DataError(f"{path}: has neither a column {rows.IMAGE_ID} nor {rows.URI}")
    if rows.ARM not in table.column_names:
        raise DataError(f"{path}: has no column {rows.ARM}, which says what was compared")
    place = {image_id: row for row, image_id in enumerate(test[rows.IMAGE_ID].to_pylist())}
    unknown = next((one for one in ids if one not in place), None)
    if unknown is not None:
        raise DataError(f"{path}: {unknown!r} is no test image of the study")
    at = np.asarray([place[one] for one in ids], dtype=np.int64)
    values = probabilities_of(table, path, classes)
    classifiers = list(
        zip(
            table[rows.ARM].to_pylist(),
            *(_numbers(table, name) for name in (rows.GENERATOR_FIT, rows.SEED)),
            strict=True,
        )
    )
    found: dict[tuple[str, int, int], list[int]] = {}
    for row, classifier in enumerate(classifiers):
        found.setdefault(classifier, []).append(row)
    by_arm: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    for (arm, fit, seed), held in found.items():
        seen = np.bincount(at[held], minlength=len(place))
        if (seen != 1).any():
            wrong = int((seen != 1).argmax())
            raise DataError(
                f"{path}: arm {arm!r}, {rows.GENERATOR_FIT} {fit}, {rows.SEED} {seed}: image"
                f" {test[rows.IMAGE_ID][wrong].as_py()} stands there {seen[wrong]} times, and must"
                " once"
            )
        ordered = np.empty((len(place), len(classes)), np.float32)
        ordered[at[held]] = values[held]
        by_arm.setdefault(arm, {})[fit, seed] = ordered
    counts = {arm: len(of_arm) for arm, of_arm in by_arm.items()}
    if len(set(counts.values())) != 1:
        told = ", ".join(f"{arm} {count}" for arm, count in counts.items())
        raise DataError(f"{path}: arms are compared pair by pair and differ in number: {told}")
    # Real images are there once for all fits: their classifiers are paired by their order.
    fits = max(len({fit for fit, _ in of_arm}) for of_arm in by_arm.values())
    for arm, of_arm in by_arm.items():
        each = Counter(fit for fit, _ in of_arm)
        if len(set(each.values())) > 1 or (len(each) > 1 and len(each) != fits):
            told = ", ".join(f"fit {fit} {count}" for fit, count in sorted(each.items()))
            raise DataError(
                f"{path}: arm {arm!r}: generator fits are replicates and differ in their number of"
                f" classifiers, or are fewer than another arm's {fits}: {told}"
            )
    if next(iter(counts.values())) % fits:
        raise DataError(f"{path}: the {fits} generator fits differ in their number of classifiers")
    return Predictions(
        classes=classes,
        labels=class_numbers(test[rows.label_column(task)].to_pylist(), classes),
        groups=np.asarray(test[rows.GROUP_ID].to_pylist(), dtype=str),
        probabilities={
            arm: np.stack([of_arm[key] for key in sorted(of_arm)]) for arm, of_arm in by_arm.items()
        },
        generator_fits=fits,
    )


def probabilities_of(table: pa.Table, path: Path, classes: Sequence[str]) -> np.ndarray:
    """float32 (rows, classes). Raises `DataError`."""
    columns = [f"probability.{name}" for name in classes]
    if rows.PROBABILITIES in table.column_names:
        lists = table[rows.PROBABILITIES].to_pylist()
        if any(one is None or len(one) != len(classes) for one in lists):
            raise DataError(f"{path}: {rows.PROBABILITIES} must be {len(classes)} numbers each")
        values = np.asarray(lists, np.float32)
    elif set(columns) <= set(table.column_names):
        values = np.stack([table[name].to_numpy() for name in columns], 1).astype(np.float32)
    elif PREDICTED in table.column_names:
        named = table[PREDICTED].to_pylist()
        unknown = next((name for name in named if name not in classes), None)
        if unknown is not None:
            raise DataError(f"{path}: {PREDICTED} {unknown!r} is no class of the study")
        values = np.eye(len(classes), dtype=np.float32)[class_numbers(named, classes)]
    else:
        raise DataError(
            f"{path}: says no class: it has neither {rows.PROBABILITIES}, nor probability.<class>"
            f" for each of {', '.join(classes)[:200]}, nor {PREDICTED}"
        )
    if not np.isfinite(values).all() or (values < 0).any():
        raise DataError(f"{path}: a probability is negative or no number")
    sums = values.sum(1)
    if (np.abs(sums - 1) > _SUM_TOLERANCE).any():
        row = int(np.abs(sums - 1).argmax())
        raise DataError(f"{path}: the probabilities of row {row} add up to {sums[row]:.4g}, not 1")
    return values


def _numbers(table: pa.Table, name: str) -> list[int]:
    """A column of whole numbers; 0 where it is missing or empty."""
    if name not in table.column_names:
        return [0] * table.num_rows
    return [int(value or 0) for value in table[name].to_pylist()]
