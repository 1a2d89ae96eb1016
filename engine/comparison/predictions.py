"""External predictions of a study's test images, evaluated as the study evaluates its own.

The file (Parquet or CSV) has one row per test image and classifier:

    image_id, or uri        the image, named as in the study's export and predictions
    arm                     what the classifier was trained on
    seed, generator_fit     which of the arm's classifiers; a missing column counts as 0
    probabilities           a list in the order of the classes (Parquet); or one column
                            `probability.<class>` per class; or the class itself as `predicted`

The table `predictions` of the step `evaluate` is such a file.
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

from engine.comparison.classified import Predictions
from engine.comparison.figures import Figures
from engine.comparison.openings import record_opening
from engine.comparison.verdict import DeclaredContrast, compare
from engine.core import rows
from engine.core.errors import DataError, StudyError, brief
from engine.core.manifest import Manifest
from engine.core.spec import digest
from engine.core.store import Store
from engine.data.dataset import split_index
from engine.metrics.probabilities import PROBABILITY_METRICS
from engine.nets.classification import class_numbers
from engine.results.comparison import ScoredPredictions
from engine.results.data import IngestResult
from engine.study import Study
from engine.wording import verdict_in_words

PREDICTED = "predicted"
# Allows for probabilities rounded to a few digits or stored in half precision.
_SUM_TOLERANCE = 0.02


def score(
    study: Study, store: Store, ingest: Manifest, task: str, path: Path, baseline: str
) -> ScoredPredictions:
    """Metrics of every arm and its contrast with `baseline`.

    Counts as an opening of test. Raises `StudyError`, `DataError`.
    """
    classes = IngestResult.of(ingest).classes
    test = split_index(store, ingest, task, "test")
    predictions = to_predictions(read_table(path), path, test, uris(store, ingest), task, classes)
    arms = list(predictions.probabilities)
    if baseline not in arms:
        known = ", ".join(arms)[:300]
        raise StudyError(f"--baseline {baseline!r}: not an arm of {path}; choose from {known}")
    if predictions.replicates < 2:
        raise DataError(
            f"{path}: an interval needs at least two classifiers per arm; number them in the column"
            f" {rows.SEED} or {rows.GENERATOR_FIT}"
        )
    objective = study.training.objective
    probabilities = predictions.probabilities.values()
    if objective in PROBABILITY_METRICS and all(np.isin(p, (0, 1)).all() for p in probabilities):
        raise DataError(
            f"{path}: has only predicted classes, but {objective} needs probabilities; add"
            " --set training.objective=macro_f1"
        )
    # The same file with another objective or baseline is another opening of test.
    opener = digest(
        [hashlib.sha256(path.read_bytes()).hexdigest(), objective, baseline, study.evaluate]
    )
    opened = record_opening(store, ingest, opener)
    figures = Figures(predictions, study.seed)
    contrasts = compare(
        figures,
        [
            DeclaredContrast(arm, (baseline,), baseline, baseline, claimed=True)
            for arm in arms if arm != baseline
        ],
        objective, study.evaluate,
    )  # fmt: skip
    return ScoredPredictions(
        study=study.name, file=path.name, objective=objective, baseline=baseline,
        classes=list(classes), test=opened,
        arms={
            arm: figures.of(arm, arm, None, "baseline" if arm == baseline else "compared")
            for arm in arms
        },
        contrasts=contrasts, verdict=verdict_in_words(contrasts, objective, baseline),
    )  # fmt: skip


def read_table(path: Path) -> pa.Table:
    """The rows of a file of predictions. Raises `DataError`."""
    try:
        if path.suffix.lower() == ".csv":
            text = dict.fromkeys((rows.IMAGE_ID, rows.URI, rows.ARM, PREDICTED), pa.string())
            options = pyarrow.csv.ConvertOptions(column_types=text)
            return pyarrow.csv.read_csv(path, convert_options=options)
        return pq.read_table(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: is not a readable Parquet or CSV file: {brief(error)}") from None


def uris(store: Store, ingest: Manifest) -> dict[str, str]:
    """Ids of the test images by uri."""
    tables = store.tables(ingest.keys(split="test"), [rows.IMAGE_ID, rows.URI])
    images = pa.concat_tables(tables)
    return dict(zip(images[rows.URI].to_pylist(), images[rows.IMAGE_ID].to_pylist(), strict=True))


def to_predictions(
    table: pa.Table, path: Path, test: pa.Table, id_of: Mapping[str, str], task: str,
    classes: Sequence[str],
) -> Predictions:  # fmt: skip
    """The probabilities of each classifier in the order of the test images.

    test: the index of the test split. id_of: ids by uri. Raises `DataError` if an image is
    missing, unknown or repeated, and if the arms cannot be paired.
    """
    if rows.SPLIT in table.column_names:
        table = table.filter(pc.equal(table[rows.SPLIT], "test"))
    if rows.IMAGE_ID in table.column_names:
        ids = table[rows.IMAGE_ID].to_pylist()
    elif rows.URI in table.column_names:
        ids = [id_of.get(uri, uri) for uri in table[rows.URI].to_pylist()]
    else:
        raise DataError(f"{path}: has no column {rows.IMAGE_ID} or {rows.URI}; add one")
    if rows.ARM not in table.column_names:
        raise DataError(f"{path}: has no column {rows.ARM}; add the arm of each prediction")
    place = {image_id: row for row, image_id in enumerate(test[rows.IMAGE_ID].to_pylist())}
    unknown = next((image_id for image_id in ids if image_id not in place), None)
    if unknown is not None:
        raise DataError(f"{path}: {unknown!r} is not a test image of the study; remove its rows")
    at = np.asarray([place[image_id] for image_id in ids], dtype=np.int64)
    values = probabilities_of(table, path, classes)
    classifiers = list(
        zip(
            table[rows.ARM].to_pylist(),
            *(_numbers(table, name) for name in (rows.GENERATOR_FIT, rows.SEED)),
            strict=True,
        )
    )
    rows_of: dict[tuple[str, int, int], list[int]] = {}
    for row, classifier in enumerate(classifiers):
        rows_of.setdefault(classifier, []).append(row)
    by_arm: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    for (arm, fit, seed), own in rows_of.items():
        occurrences = np.bincount(at[own], minlength=len(place))
        if (occurrences != 1).any():
            wrong = int((occurrences != 1).argmax())
            raise DataError(
                f"{path}: arm {arm!r}, {rows.GENERATOR_FIT} {fit}, {rows.SEED} {seed}: image"
                f" {test[rows.IMAGE_ID][wrong].as_py()} appears {occurrences[wrong]} times; each"
                " image must appear once"
            )
        ordered = np.empty((len(place), len(classes)), np.float32)
        ordered[at[own]] = values[own]
        by_arm.setdefault(arm, {})[fit, seed] = ordered
    counts = {arm: len(of_arm) for arm, of_arm in by_arm.items()}
    if len(set(counts.values())) != 1:
        listed = ", ".join(f"{arm} {count}" for arm, count in counts.items())
        raise DataError(f"{path}: all arms need the same number of classifiers, but have {listed}")
    # Arms without a generator have one fit; their classifiers are paired by order.
    fits = max(len({fit for fit, _ in of_arm}) for of_arm in by_arm.values())
    for arm, of_arm in by_arm.items():
        each = Counter(fit for fit, _ in of_arm)
        if len(set(each.values())) > 1 or (len(each) > 1 and len(each) != fits):
            listed = ", ".join(f"fit {fit} {count}" for fit, count in sorted(each.items()))
            raise DataError(
                f"{path}: arm {arm!r} needs {fits} generator fits with the same number of"
                f" classifiers, but has {listed}"
            )
    if (count := next(iter(counts.values()))) % fits:
        raise DataError(
            f"{path}: {count} classifiers per arm cannot be divided among {fits} generator fits"
        )
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
    """The probabilities of a table, float32 (rows, classes). Raises `DataError`."""
    columns = [f"probability.{name}" for name in classes]
    if rows.PROBABILITIES in table.column_names:
        lists = table[rows.PROBABILITIES].to_pylist()
        if any(values is None or len(values) != len(classes) for values in lists):
            raise DataError(f"{path}: {rows.PROBABILITIES} needs {len(classes)} numbers per row")
        values = np.asarray(lists, np.float32)
    elif set(columns) <= set(table.column_names):
        values = np.stack([table[name].to_numpy() for name in columns], 1).astype(np.float32)
    elif PREDICTED in table.column_names:
        named = table[PREDICTED].to_pylist()
        unknown = next((name for name in named if name not in classes), None)
        if unknown is not None:
            raise DataError(f"{path}: {PREDICTED} {unknown!r} is not a class of the study")
        values = np.eye(len(classes), dtype=np.float32)[class_numbers(named, classes)]
    else:
        raise DataError(
            f"{path}: has no class column: add {rows.PROBABILITIES}, or probability.<class> for"
            f" each of {', '.join(classes)[:200]}, or {PREDICTED}"
        )
    if not np.isfinite(values).all() or (values < 0).any():
        raise DataError(f"{path}: a probability is negative or not a finite number")
    sums = values.sum(1)
    if (np.abs(sums - 1) > _SUM_TOLERANCE).any():
        row = int(np.abs(sums - 1).argmax())
        raise DataError(f"{path}: the probabilities of row {row} add up to {sums[row]:.4g}, not 1")
    return values


def _numbers(table: pa.Table, name: str) -> list[int]:
    """A column of integers; 0 if the column or a value is missing."""
    if name not in table.column_names:
        return [0] * table.num_rows
    return [int(value or 0) for value in table[name].to_pylist()]
