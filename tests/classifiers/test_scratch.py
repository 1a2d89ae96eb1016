"""Architectures from random weights: their published sizes, small images, and the saved folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.classifiers.scratch import Architecture, Scratch, ScratchSpec
from engine.core.errors import StudyError
from engine.data.images import Preprocess
from engine.nets.classification import Training, predict

CLASSES = ("cat", "dog", "eel")
# Of 1,000 classes at 224 px, as torchvision and timm have them; of DINOv2, its backbone with fewer
# positions (256 patches for 1,369) and a linear layer on the class token and the patches' mean.
PUBLISHED = {
    "resnet18": 11_689_512, "resnet50": 25_557_032, "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184, "mobilenet_v2": 3_504_872, "vit_tiny": 5_717_416,
    "vit_small": 22_050_664, "vit_base": 86_567_656, "convnext_tiny": 28_589_128,
    "dinov2_small": 22_056_576 - (1_369 - 256) * 384 + (2 * 384 + 1) * 1_000,
}  # fmt: skip


def scratch(size: int, architecture: Architecture, **fields: int) -> Scratch:
    spec = ScratchSpec(architecture=architecture, **fields)
    return Scratch(spec, Preprocess(size=size), CLASSES)


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_architecture_has_its_published_size(architecture: Architecture) -> None:
    names = [str(number) for number in range(1000)]
    classifier = Scratch(ScratchSpec(architecture=architecture), Preprocess(size=224), names)
    with torch.device("meta"):
        network = classifier.build()
    assert sum(value.numel() for value in network.parameters()) == PUBLISHED[architecture]


@pytest.mark.parametrize(
    ("size", "fitting"), [(224, 16), (128, 16), (96, 12), (64, 8), (32, 4), (28, 4)]
)
def test_patch_size_is_published_or_fits_a_small_image(size: int, fitting: int) -> None:
    assert scratch(size, "vit_tiny").patch_size() == fitting


def test_impossible_settings_are_rejected_when_the_study_is_read() -> None:
    for classifier, message in (
        (scratch(32, "vit_tiny", patch_size=5), r"5 px does not divide 32 px; choose 2, 4, 8, 16$"),
        (scratch(97, "dinov2_small"), r"97 px cannot be divided into patches of 2 to 14"),
        (scratch(28, "convnext_tiny"), r"needs at least 32 px, but images have 28"),
        (scratch(32, "resnet18", patch_size=4), r"patch_size: resnet18 has no patches"),
    ):
        with pytest.raises(StudyError, match=message):
            classifier.check(Training())
    for classifier in (
        scratch(28, "convnext_tiny", input_size=32), scratch(28, "resnet50"),
        scratch(97, "vit_tiny", input_size=96), scratch(32, "vit_tiny", patch_size=8),
    ):  # fmt: skip
        classifier.check(Training())


@pytest.mark.parametrize("architecture", ["mobilenet_v2", "efficientnet_b0"])
def test_batch_norm_statistics_change_slowly(architecture: Architecture) -> None:
    # transformers' MobileNetV2 and EfficientNet would keep nothing but the last batch.
    with torch.device("meta"):
        network = scratch(32, architecture).build()
    norms = [one for one in network.modules() if isinstance(one, torch.nn.BatchNorm2d)]
    assert norms
    assert {one.momentum for one in norms} == {0.1}


@pytest.mark.parametrize("architecture", ["mobilenet_v2", "vit_tiny"])
def test_pipeline_opens_the_saved_network_and_predicts_the_same(
    tmp_path: Path, architecture: Architecture
) -> None:
    from transformers import pipeline

    torch.manual_seed(0)
    classifier = scratch(32, architecture)
    network = classifier.build().eval()
    classifier.save(network, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    ours = predict(network, classifier.prepare, pixels, "cpu")
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    for picture, probabilities in zip(pixels, ours, strict=True):
        theirs = {entry["label"]: entry["score"] for entry in classify(Image.fromarray(picture))}
        np.testing.assert_allclose([theirs[name] for name in CLASSES], probabilities, atol=1e-4)
    again = scratch(32, architecture)
    loaded = again.load(tmp_path)
    np.testing.assert_allclose(predict(loaded, again.prepare, pixels, "cpu"), ours, atol=1e-6)
