"""External predictions are evaluated like the study's own; unpaired ones are rejected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from engine.cli import run_evaluate
from engine.comparison.predictions import score
from engine.core import rows
from engine.core.errors import DataError
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.data.dataset import split_index
from engine.results.data import IngestResult
from engine.study import Study

# Only what differs from the finished study of bars is computed.
pytestmark = pytest.mark.usefixtures("resumed")

Run = Callable[[Study, str], Manifest]


def write(path: Path, columns: dict[str, Any]) -> Path:
    table = pa.table(columns)
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    return path


@pytest.fixture
def test_split(bars_study, run_until: Run, store: Store) -> tuple[Manifest, pa.Table]:
    ingest = run_until(bars_study(), "ingest")
    return ingest, split_index(store, ingest, "class", "test")


def test_own_predictions_of_a_study_give_the_same_verdict(
    bars_study, run_until: Run, store: Store, tmp_path: Path
) -> None:
    evaluated = run_until(bars_study(), "evaluate")
    path = tmp_path / "own.parquet"
    pq.write_table(pa.concat_tables(store.tables(evaluated.keys(table="predictions"))), path)
    ingest = run_until(bars_study(), "ingest")
    baseline = evaluated.metrics["baseline"]
    found = score(bars_study(), store, ingest, "class", path, baseline)
    (want,) = evaluated.metrics["contrasts"]
    (same,) = (one for one in found.contrasts if one.arm == want["arm"])
    (pair,) = (pair for pair in want["baselines"] if pair["against"] == baseline)
    assert same.effect.model_dump() == pair["effect"]
    assert same.bootstrap.model_dump() == pair["bootstrap"]
    want_arm = evaluated.metrics["arms"][baseline]
    assert found.arms[baseline].model_dump()["figures"] == want_arm["figures"]
    # Another opening of the same test images.
    assert found.test.opened == evaluated.metrics["test"]["opened"] + 1
    again = score(bars_study(), store, ingest, "class", path, baseline)
    assert again.test.opened == found.test.opened


def test_command_line_scores_a_table_of_uris_and_classes(
    bars_study, test_split: tuple[Manifest, pa.Table], store: Store, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ingest, test = test_split
    images = pa.concat_tables(store.tables(ingest.keys(split="test"), [rows.URI, "label.class"]))
    random = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {"uri": [], "arm": [], "seed": [], "predicted": []}
    for arm, wrong in (("real", 0.4), ("mine", 0.05)):
        for seed in range(6):
            for uri, label in zip(*(images[name].to_pylist() for name in images.column_names),
                                  strict=True):  # fmt: skip
                other = "down" if label == "across" else "across"
                columns["uri"].append(uri)
                columns["arm"].append(arm)
                columns["seed"].append(seed)
                columns["predicted"].append(other if random.random() < wrong else label)
    path = write(tmp_path / "mine.csv", columns)
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps(bars_study().model_dump(mode="json")))
    code = run_evaluate(
        [str(study), "--predictions", str(path), "--set", f"profile.storage={store.url}",
         "--set", "profile.runtime=inline", "--set", "training.objective=accuracy"]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed
    assert "mine helps with this one trained generator: accuracy +" in printed.out
    (page,) = (key for key in store.listing("pages") if "/predictions-mine" in key)
    result = json.loads(store.read(page))
    assert result["test"]["images"] == len(test)
    assert result["contrasts"][0]["generator_fits"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda good: {**good, "image_id": ["x", *good["image_id"][1:]]}, "'x' is not a test"),
        (lambda good: {name: good[name][1:] for name in good}, "appears 0 times"),
        (lambda good: {name: [*good[name], good[name][0]] for name in good}, "appears 2 times"),
        (lambda good: {**good, "predicted": ["up", *good["predicted"][1:]]}, "is not a class"),
        (lambda good: {name: good[name] for name in good if name != "predicted"}, "no class col"),
        (lambda good: {name: good[name] for name in good if name != "arm"}, "has no column arm"),
        (
            lambda good: {
                **{name: good[name] for name in good if name != "predicted"},
                "probability.across": [80.0] * len(good["arm"]),
                "probability.down": [20.0] * len(good["arm"]),
            },
            "add up to 100, not 1",
        ),
        (
            # Fits of three classifiers and of one.
            lambda good: {
                **{name: values * 2 for name, values in good.items()},
                "seed": [*good["seed"], *(seed + 2 for seed in good["seed"])],
                "generator_fit": [
                    *[0] * len(good["arm"]),
                    *(
                        int(arm == "mine" and seed == 1)
                        for arm, seed in zip(good["arm"], good["seed"], strict=True)
                    ),
                ],
            },
            "needs 2 generator fits with the same number of",
        ),
        (
            lambda good: {
                **{name: good[name] for name in good if name != "predicted"},
                "probability.across": [float("nan")] * len(good["arm"]),
                "probability.down": [0.5] * len(good["arm"]),
            },
            "negative or not a finite number",
        ),
    ],
)
def test_unpaired_predictions_are_rejected_in_one_line(
    bars_study, test_split: tuple[Manifest, pa.Table], store: Store, tmp_path: Path,
    change: Callable[[dict[str, list[Any]]], dict[str, list[Any]]], message: str,
) -> None:  # fmt: skip
    ingest, test = test_split
    assert IngestResult.of(ingest).classes == ("across", "down")
    ids = test[rows.IMAGE_ID].to_pylist()
    good = {
        "image_id": ids * 4, "arm": ["real"] * 2 * len(ids) + ["mine"] * 2 * len(ids),
        "seed": ([0] * len(ids) + [1] * len(ids)) * 2, "predicted": ["across"] * 4 * len(ids),
    }  # fmt: skip
    path = write(tmp_path / "theirs.parquet", change(good))
    with pytest.raises(DataError, match=message) as refused:
        score(bars_study(), store, ingest, "class", path, "real")
    assert "\n" not in str(refused.value)
    assert not store.listing("openings")  # a refused file does not open test
