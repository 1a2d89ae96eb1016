"""A probe on vectors: what it computes once, what it learns, and what it rejects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.classifiers.probe import Probe, ProbeSpec, Vectors
from engine.core.errors import StudyError
from engine.core.step import make_step
from engine.core.store import Store
from engine.data.images import Preprocess
from engine.embedders.pixels import Pixels, PixelsSpec
from engine.nets.classification import LabelledImages, Training, predict, train
from engine.work.fit import FitContext

PREPROCESS = Preprocess(size=16, channels="L")
CLASSES = ("up", "down")


def halves(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images with a bright upper or lower half."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    pixels = random.integers(0, 200, (count, 16, 16, 1), dtype=np.uint8)
    for picture, label in zip(pixels, labels, strict=True):
        picture[8 * label : 8 * label + 8] += 50
    return pixels, labels


def probe(**fields: object) -> Probe:
    spec = ProbeSpec.model_validate({"embedder": {"name": "pixels", "side": 8}, **fields})
    return Probe(spec, PREPROCESS, CLASSES)


def test_features_are_embeddings_independent_of_the_batch() -> None:
    pixels, _ = halves(300, 1)
    found = probe().features(pixels, "cpu")
    assert found.shape == (300, 64)
    np.testing.assert_array_equal(found, Pixels(PixelsSpec(side=8)).encode(pixels))
    np.testing.assert_array_equal(probe().features(pixels[290:], "cpu"), found[290:])


class Counting:
    """An embedder that records how many images it embedded."""

    def __init__(self) -> None:
        self.shown = 0

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        self.shown += len(pixels)
        return np.asarray(pixels.mean((1, 2, 3))[:, None], np.float32)


def test_recently_seen_images_are_not_embedded_again() -> None:
    embedder = Counting()
    vectors = Vectors(embedder)
    (first, _), (second, _) = halves(20, 1), halves(20, 2)
    found = [vectors.of(pixels) for pixels in (first, second, first.copy(), second)]
    assert embedder.shown == 40
    np.testing.assert_array_equal(found[2], found[0])
    assert not np.array_equal(found[1], found[0])
    # Equal bytes with another shape are another batch.
    vectors.of(first.reshape(10, 16, 32, 1))
    assert embedder.shown == 50


def test_vectors_are_standardised_by_the_train_split() -> None:
    random = np.random.default_rng(0)
    train_vectors = (random.normal(size=(500, 5)) * [1, 10, 0.1, 3, 0] + 7).astype(np.float32)
    made = probe()
    made.learn(train_vectors)
    seen = made.prepare(torch.from_numpy(train_vectors)).numpy()
    np.testing.assert_allclose(seen.mean(0), 0, atol=1e-3)
    # A constant feature is not amplified.
    np.testing.assert_allclose(seen.std(0), [1, 1, 1, 1, 0], atol=1e-3)


@pytest.mark.parametrize("hidden", [None, 16])
def test_saved_probe_predicts_the_same_after_loading(tmp_path: Path, hidden: int | None) -> None:
    classifier = probe(hidden=hidden)
    (pixels, labels), (val_pixels, val_labels) = halves(300, 1), halves(200, 2)
    vectors, val_vectors = (classifier.features(p, "cpu") for p in (pixels, val_pixels))
    classifier.learn(vectors)

    def score(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
        return {"macro_f1": float((probabilities.argmax(1) == truth).mean())}

    made = train(
        FitContext(Store(str(tmp_path / "store")), "work/c", "weights/a", "a", "inputs", threads=1),
        classifier.build, classifier.prepare,
        LabelledImages(vectors, labels, np.ones(300)),
        LabelledImages(val_vectors, val_labels, np.ones(200)), score,
        Training(steps=40, learning_rate=0.01, mixup_alpha=0.2), seed=1,
    )  # fmt: skip
    assert score(val_labels, made.probabilities)["macro_f1"] > 0.95
    classifier.save(made.network, tmp_path)
    again = probe(hidden=hidden)
    loaded = again.load(tmp_path)
    fed = again.features(val_pixels, "cpu")
    np.testing.assert_allclose(
        predict(loaded, again.prepare, fed, "cpu"), made.probabilities, atol=1e-6
    )


@pytest.mark.parametrize(
    "fields",
    [{"crop_padding": 2}, {"horizontal_flip": True}, {"rotate": 5.0}, {"cutmix_alpha": 1.0},
     {"augment": "rand_augment"}, {"brightness": 0.1}, {"contrast": 0.1}, {"saturation": 0.1}],
)  # fmt: skip
def test_pixel_augmentation_is_rejected(fields: dict[str, object]) -> None:
    name = next(iter(fields))
    with pytest.raises(StudyError, match=rf"training\.{name}: changes pixels, but a probe"):
        probe().check(Training.model_validate(fields))
    probe().check(Training(mixup_alpha=0.2, class_weights="balanced"))


def test_embedder_version_is_part_of_the_key_of_a_probe() -> None:
    spec = {"settings": {}, "task": "class", "tasks": {}, "seed": 0}
    step = make_step("cluster", spec, plugins=[("classifiers", ProbeSpec())])
    assert step.code["embedders.pixels"] == Pixels.version
    assert step.code["classifiers.probe"] == Probe.version
