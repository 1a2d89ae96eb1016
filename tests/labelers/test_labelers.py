"""Labelers against plain libraries on the same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.classifiers.probe import Probe, ProbeSpec
from engine.core.registry import available, resolve
from engine.data.images import Preprocess
from engine.labelers.classifier import Classifier, ClassifierSpec
from engine.labelers.clip import Clip, ClipSpec
from engine.labelers.knn import Knn, KnnSpec
from engine.nets.classification import predict
from tests.text_image import save_clip

CLASSES = ("a", "b", "c")
PREPROCESS = Preprocess(size=32)


def clouds(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    centres = np.random.default_rng(9).normal(size=(3, 8))
    return (centres[labels] + random.normal(size=(count, 8)) / 2).astype(np.float32), labels


@pytest.mark.parametrize("name", available("labelers"))
def test_every_labeler_keeps_the_contract(name: str) -> None:
    kind = resolve("labelers", name)
    assert kind.reads in ("pixels", "embedding")
    # The step that trains a labeler's classifier reads these fields.
    assert not kind.trained or {"classifier", "training"} <= set(kind.Spec.model_fields)


def test_probe_labels_by_the_vectors_that_it_was_trained_on(tmp_path: Path) -> None:
    preprocess = Preprocess(size=16, channels="L")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 1), dtype=np.uint8)
    probe = Probe(ProbeSpec(), preprocess, CLASSES)
    vectors = probe.features(pixels, "cpu")
    probe.learn(vectors)
    network = probe.build().eval()
    (tmp_path / "weights").mkdir()
    probe.save(network, tmp_path / "weights")
    labeler = Classifier(ClassifierSpec(classifier=ProbeSpec()), preprocess, CLASSES)
    labeler.load(tmp_path, "cpu")
    expected = predict(network, probe.prepare, vectors, "cpu")
    np.testing.assert_allclose(labeler.label(pixels), expected, atol=1e-6)


def test_neighbour_vote_equals_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    (train, labels), (images, _) = clouds(200, 1), clouds(40, 2)
    ours = Knn(KnnSpec(k=7, temperature=0.1), PREPROCESS, CLASSES)
    ours.learn(train, labels)
    theirs = KNeighborsClassifier(
        7, metric="cosine", weights=lambda distance: np.exp(-distance / 0.1)
    ).fit(train, labels)
    np.testing.assert_allclose(ours.label(images), theirs.predict_proba(images), atol=1e-4)


def test_neighbours_of_a_tiny_set_vote() -> None:
    ours = Knn(KnnSpec(k=50, temperature=0.001), PREPROCESS, CLASSES)
    ours.learn(np.eye(3, dtype=np.float32), np.asarray([2, 0, 0]))
    found = ours.label(np.asarray([[1, 0.1, 0], [0, 0, -1]], np.float32))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    assert found[0].argmax() == 2


def test_zero_shot_is_a_softmax_of_cosines_to_the_classes(tmp_path: Path) -> None:
    folder = str(save_clip(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 1), dtype=np.uint8)
    found = {}
    for scale in (None, 1.0):
        labeler = Clip(ClipSpec(model=folder, logit_scale=scale), PREPROCESS, ("cat", "dog"))
        labeler.load(None, "cpu")
        found[scale] = labeler.label(pixels)
    cosines = labeler.model.images(pixels) @ labeler.texts.T
    soft = np.exp(cosines) / np.exp(cosines).sum(1, keepdims=True)
    np.testing.assert_allclose(found[1.0], soft, atol=1e-6)
    # The checkpoint's own scale is sharper and gives the same classes.
    assert (found[None].argmax(1) == found[1.0].argmax(1)).all()
    assert (found[None].max(1) >= found[1.0].max(1)).all()
