"""One training: its inputs, computed once, and its outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import log_loss, roc_auc_score

from engine.classifiers import Classifier, ClassifierSpec
from engine.classifiers.pretrained import Pretrained, PretrainedSpec
from engine.classifiers.probe import Probe, ProbeSpec, _vectors
from engine.classifiers.vgg import Vgg, VggSpec
from engine.comparison.arms import planned_trials
from engine.core import rows
from engine.core.errors import ResumeError
from engine.core.manifest import Manifest, copy_files, read_manifest
from engine.core.store import Store
from engine.data.arrays import matrix_of, read_pixels
from engine.data.images import Preprocess
from engine.execute import execute, inspect, run_step
from engine.nets.classification import predict
from engine.nets.pipelines import weights_digest
from engine.plan import named, plan, until
from engine.profile import Profile
from engine.results.comparison import SearchResult
from engine.results.data import IngestResult
from engine.runtime.inline import InlineRuntime
from engine.stages.classify import Classify, changed_weights, classifier_inputs
from engine.stages.measuring import MeasurePixels
from engine.study import Study
from engine.work.stage import Place

Run = Callable[[Study, str], Manifest]
PROBE = {"name": "probe", "embedder": {"name": "pixels", "side": 16}, "hidden": 24}


@pytest.fixture
def probed(bars_study) -> Callable[..., Study]:
    def make(**fields: object) -> Study:
        training = {"steps": 40, "batch_size": 16, "learning_rate": 0.01, "evaluate_every": 8}
        return bars_study(**{"classifier": PROBE, "training": training, **fields})

    return make


def test_study_with_a_probe_reaches_its_verdict_from_saved_weights(
    probed: Callable[..., Study], store: Store, profile: Profile, tmp_path: Path
) -> None:
    study = probed(search={"ratios": [1], "seeds": 2}, curate={"filters": []})
    steps = plan(study)
    manifests = execute(steps, store, InlineRuntime(), profile)
    evaluated = manifests[named(steps, "evaluate")[0].key]
    first = planned_trials(named(steps, "confirm")[0])[0]
    arm, number, trial = first.arm, first.number, first.step
    trained = read_manifest(store, trial)
    assert trained is not None
    folder = copy_files(store, trained.parts, tmp_path / "weights")
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


def test_history_has_loss_accuracy_f1_and_auc_on_val(
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
    """A classifier of mean grey levels, which records how many images it was given."""

    on_features = True

    def __init__(self, weight: float, shown: list[int]) -> None:
        super().__init__(ClassifierSpec(name=f"mean-{weight}"), Preprocess(size=16), ("a", "b"))
        self.weight, self.shown = weight, shown

    def features(self, pixels: np.ndarray, device: str) -> np.ndarray:
        self.shown.append(len(pixels))
        return np.asarray(self.weight * pixels.mean((1, 2, 3))[:, None], np.float32)


def test_features_are_computed_once_per_spec_part_by_part(
    bars_study, run_until: Run, store: Store
) -> None:
    ingest = run_until(bars_study(preprocess={"size": 16}), "ingest")
    parts = tuple(key for split in ("train", "val") for key in ingest.keys(split=split))
    shown: list[int] = []
    found, ids = classifier_inputs(store, parts, Mean(1.0, shown), "cpu")
    # A second trial with its own object.
    again, _ = classifier_inputs(store, parts, Mean(1.0, shown), "cpu")
    assert again is found
    assert len(shown) == len(parts) > 1
    assert sum(shown) == len(ids) == len(found)
    pixels, _ = read_pixels(store, parts, (16, 16, 3))
    np.testing.assert_allclose(found[:, 0], pixels.mean((1, 2, 3)), rtol=1e-5)
    other, _ = classifier_inputs(store, parts, Mean(2.0, shown), "cpu")
    np.testing.assert_allclose(other, 2 * found, rtol=1e-5)


def test_other_weights_in_the_same_folder_retrain(
    bars_study, run_until: Run, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()

    def write(seed: int) -> None:
        torch.manual_seed(seed)
        start = Vgg(VggSpec(depth=11, hidden=8), Preprocess(size=16, channels="L"), ("a", "b"))
        save_file(start.build().state_dict(), folder / "model.safetensors")
        weights_digest.cache_clear()  # as in another process

    study = bars_study(
        classifier={"name": "vgg", "depth": 11, "hidden": 8, "weights": str(folder)},
        generators={}, search={"ratios": [1], "seeds": 2, "arms": []},
        training={"steps": 1, "batch_size": 4, "evaluate_every": 1},
    )  # fmt: skip
    write(1)
    steps = until(plan(study), "search")
    search = steps[-1]
    trials = [trial.step for trial in planned_trials(search)]
    first = run_until(study, "search")
    before = [read_manifest(store, step) for step in trials]
    assert run_until(study, "search") == first
    write(2)
    status = inspect(steps, store)[-1]
    assert (status.state, status.why) == (
        "out of date", "the weights that classifier vgg starts from changed"
    )  # fmt: skip
    second = run_until(study, "search")
    assert second.metrics["outside"].keys() == {"weights"}
    assert second.metrics["outside"] != first.metrics["outside"]
    for old, step in zip(before, trials, strict=True):
        new = read_manifest(store, step)
        assert old is not None
        assert new is not None
        assert new.metrics["outside"] == second.metrics["outside"] != old.metrics["outside"]
    # Trainings from before digests were recorded remain valid.
    unrecorded = {name: value for name, value in first.metrics.items() if name != "outside"}
    bare = first.model_copy(update={"metrics": unrecorded})
    assert changed_weights(search.spec, SearchResult.of(bare).outside) is None
    assert changed_weights(search.spec, SearchResult.of(first).outside) is not None


def save_embedder(folder: Path, seed: int) -> None:
    """A checkpoint of the embedder of a probe, as another process finds it."""
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    weights_digest.cache_clear()
    _vectors.cache_clear()


def test_probe_is_not_used_with_other_weights_than_it_was_trained_on(
    probed: Callable[..., Study], store: Store, profile: Profile, tmp_path: Path
) -> None:
    save_embedder(tmp_path / "own", 1)
    study = probed(
        classifier={"name": "probe", "embedder": {"name": "cnn", "model": str(tmp_path / "own")}},
        search={"ratios": [1], "seeds": 2, "arms": []},
        training={"steps": 4, "batch_size": 16, "evaluate_every": 4},
    )
    steps = plan(study)
    labeler, measure, search, confirm, evaluate = (
        named(steps, label)[0]
        for label in ("train.labeler", "measure.val", "search", "confirm", "evaluate")
    )
    made = execute(steps[: steps.index(confirm) + 1], store, InlineRuntime(), profile)
    spec, place = evaluate.spec, Place("cpu", 1, 16)
    data = IngestResult(counts={"train": {"across": 1, "down": 1}})
    kinds = [
        Classify(store, spec.classifier, spec.preprocess, data.classes, made[labeler.key]),
        MeasurePixels(store, measure.spec, data, made[labeler.key]),
    ]
    for stage in kinds:
        stage.load(place)
    # During this run, earlier results count as done.
    save_embedder(tmp_path / "own", 2)
    for stage in kinds:
        with pytest.raises(ResumeError, match=r"^classifier probe: .* changed since"):
            stage.load(place)
    inputs = {name: made[step.key] for name, step in evaluate.inputs.items()}
    with pytest.raises(ResumeError, match=r"evaluate: train\..*: the weights .* --discard confirm"):
        run_step(evaluate, inputs, store, InlineRuntime(), profile)
    assert not store.listing("openings")
    # The next run retrains and evaluates the new network.
    again = execute(steps, store, InlineRuntime(), profile)
    for step in (search, confirm):
        assert again[step.key].metrics["outside"] != made[step.key].metrics["outside"]
    assert again[evaluate.key].metrics["test"]["opened"] == 1


def test_classifiers_report_their_local_initial_weights(tmp_path: Path) -> None:
    preprocess = Preprocess(size=16, channels="L")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    held = weights_digest(str(tmp_path))
    assert held
    assert held != weights_digest(str(tmp_path / "nothing"))
    local = {"name": "cnn", "model": str(tmp_path)}
    pretrained = Pretrained(PretrainedSpec(model=str(tmp_path)), preprocess, ())
    assert pretrained.external_digests() == {"model": held}
    assert Probe(ProbeSpec(embedder=local), preprocess, ()).external_digests() == {"model": held}
    file = str(tmp_path / "model.safetensors")
    inception = ProbeSpec(embedder={"name": "inception", "weights": file})
    assert Probe(inception, preprocess, ()).external_digests() == {"weights": weights_digest(file)}
    # Weights from a hub are identified by their revision.
    assert Pretrained(PretrainedSpec(model="timm/none"), preprocess, ()).external_digests() == {}
    assert Probe(ProbeSpec(), preprocess, ()).external_digests() == {}
