"""One training: what it is fed, computed once, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from engine.classifiers import Classifier, ClassifierSpec
from engine.classifiers.probe import Probe
from engine.core import rows
from engine.core.arrays import matrix_of, read_pixels
from engine.core.errors import StudyError
from engine.core.images import Preprocess
from engine.core.manifest import Manifest, read_manifest
from engine.core.store import Store
from engine.execute import execute
from engine.nets.classification import predict
from engine.plan import named, plan
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.steps.measure import write_parts
from engine.steps.search import trial_steps
from engine.steps.train import fed
from engine.study import Study

Run = Callable[[Study, str], Manifest]
PROBE = {"name": "probe", "embedder": {"name": "pixels", "side": 16}, "hidden": 24}


@pytest.fixture
def probed(bars_study) -> Callable[..., Study]:
    def make(**fields: object) -> Study:
        training = {"steps": 40, "batch_size": 16, "learning_rate": 0.01, "evaluate_every": 8}
        return bars_study(**{"classifier": PROBE, "training": training, **fields})

    return make


def test_a_study_with_a_probe_goes_to_its_verdict_on_what_was_saved(
    probed: Callable[..., Study], store: Store, profile: Profile, tmp_path: Path
) -> None:
    study = probed(search={"ratios": [1], "seeds": 2}, curate={"filters": []})
    steps = plan(study)
    manifests = execute(steps, store, InlineRuntime(), profile)
    evaluated = manifests[named(steps, "evaluate")[0].key]
    first = trial_steps(named(steps, "search")[0])[0]
    arm, number, trial = first.arm, first.number, first.step
    trained = read_manifest(store, trial)
    assert trained is not None
    folder = write_parts(store, trained.parts, tmp_path / "weights")
    classifier = Probe(study.classifier, study.preprocess, ("across", "down"))
    network = classifier.load(folder / "weights")
    ingest = manifests[named(steps, "ingest")[0].key]
    pixels, ids = read_pixels(store, ingest.keys(split="test"), study.preprocess.shape)
    ours = predict(network, classifier.prepare, classifier.features(pixels, "cpu"), "cpu")
    table = pa.concat_tables(store.tables(evaluated.keys(table="predictions")))
    held = [a == arm.name and s == number for a, s in zip(
        table[rows.ARM].to_pylist(), table[rows.SEED].to_pylist(), strict=True)]  # fmt: skip
    table = table.filter(pa.array(held))
    assert table[rows.IMAGE_ID].to_pylist() == ids
    np.testing.assert_allclose(matrix_of(table, rows.PROBABILITIES), ours, atol=1e-5)


def test_the_history_has_loss_accuracy_f1_and_auc_on_val(
    probed: Callable[..., Study], run_until: Run, store: Store
) -> None:
    trained = run_until(probed(), "train.labeler")
    (key,) = trained.keys(file="history.json")
    history = json.loads(store.read(key))
    assert [entry["step"] for entry in history] == [8, 16, 24, 32, 40]
    (table,) = store.tables(trained.keys(file="predictions.parquet"))
    probabilities = matrix_of(table, rows.PROBABILITIES)
    labels = np.asarray([label == "down" for label in table["label.class"].to_pylist()])
    best = next(entry for entry in history if entry["step"] == trained.metrics["best_step"])
    assert best["val_roc_auc"] == pytest.approx(roc_auc_score(labels, probabilities[:, 1]))
    assert best["val_loss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
    assert best["val_accuracy"] == pytest.approx((probabilities.argmax(1) == labels).mean())
    assert {"val_loss", "val_accuracy", "val_macro_f1", "val_roc_auc"} < set(best)


class Mean(Classifier):
    """A classifier of mean grey levels, which notes how many images it was shown."""

    on_features = True

    def __init__(self, weight: float, shown: list[int]) -> None:
        super().__init__(ClassifierSpec(name=f"mean-{weight}"), Preprocess(size=16), ("a", "b"))
        self.weight, self.shown = weight, shown

    def features(self, pixels: np.ndarray, device: str) -> np.ndarray:
        self.shown.append(len(pixels))
        return np.asarray(self.weight * pixels.mean((1, 2, 3))[:, None], np.float32)


def test_features_are_computed_once_for_a_spec_and_one_part_after_the_other(
    bars_study, run_until: Run, store: Store
) -> None:
    ingest = run_until(bars_study(preprocess={"size": 16}), "ingest")
    parts = tuple(key for split in ("train", "val") for key in ingest.keys(split=split))
    shown: list[int] = []
    found, ids = fed(store, parts, Mean(1.0, shown), "cpu")
    # A second trial, with an object of its own.
    again, _ = fed(store, parts, Mean(1.0, shown), "cpu")
    assert again is found
    assert len(shown) == len(parts) > 1
    assert sum(shown) == len(ids) == len(found)
    pixels, _ = read_pixels(store, parts, (16, 16, 3))
    np.testing.assert_allclose(found[:, 0], pixels.mean((1, 2, 3)), rtol=1e-5)
    other, _ = fed(store, parts, Mean(2.0, shown), "cpu")
    np.testing.assert_allclose(other, 2 * found, rtol=1e-5)


def test_what_a_classifier_cannot_use_stops_the_study_when_it_is_read(
    probed: Callable[..., Study], bars_study
) -> None:
    with pytest.raises(StudyError, match=r"training\.rotate: changes pixels, and a probe"):
        plan(probed(training={"steps": 4, "rotate": 10}))
    # The labeler's own classifier as well.
    labeler = {"name": "classifier", "classifier": PROBE, "training": {"crop_padding": 2}}
    with pytest.raises(StudyError, match=r"training\.crop_padding: changes pixels, and a probe"):
        plan(bars_study(curate={"labeler": labeler, "max_rounds": 1}))
