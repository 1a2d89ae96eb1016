from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.classifiers import Classifier
from engine.classifiers.pretrained import Pretrained, PretrainedSpec
from engine.classifiers.small import Small, SmallSpec
from engine.core.errors import StudyError
from engine.core.registry import available, resolve
from engine.data.images import Preprocess
from engine.nets.classification import Training, predict

CLASSES = ("cat", "dog", "eel")


@pytest.fixture(scope="module")
def tiny_resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=7
    )
    folder = tmp_path_factory.mktemp("resnet")
    ResNetForImageClassification(config).save_pretrained(folder)
    settings = {
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5] * 3,
        "image_std": [0.2] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def pictures(count: int, preprocess: Preprocess) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *preprocess.shape), dtype=np.uint8)


@pytest.mark.parametrize("name", available("classifiers"))
def test_every_classifier_keeps_the_contract(name: str) -> None:
    kind = resolve("classifiers", name)
    assert issubclass(kind, Classifier)
    assert isinstance(kind.version, int)


@pytest.mark.parametrize("channels", ["L", "RGB"])
def test_saved_network_predicts_the_same_after_loading(
    tmp_path: Path, tiny_resnet: Path, channels: str
) -> None:
    preprocess = Preprocess(size=16, channels=channels)
    images = pictures(5, preprocess)
    for spec, kind in (
        (SmallSpec(channels=(8, 8)), Small), (PretrainedSpec(model=str(tiny_resnet)), Pretrained)
    ):  # fmt: skip
        classifier = kind(spec, preprocess, CLASSES)
        torch.manual_seed(1)
        network = classifier.build().eval()
        folder = tmp_path / spec.name
        folder.mkdir(exist_ok=True)
        classifier.save(network, folder)
        assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
        again = kind(spec, preprocess, CLASSES)
        loaded = again.load(folder)
        before = predict(network, classifier.prepare, images, "cpu")
        np.testing.assert_allclose(predict(loaded, again.prepare, images, "cpu"), before, atol=1e-6)
        assert before.shape == (5, 3)
        np.testing.assert_allclose(before.sum(1), 1, atol=1e-5)


def test_fine_tuned_checkpoint_opens_with_plain_transformers(
    tmp_path: Path, tiny_resnet: Path
) -> None:
    from PIL import Image
    from transformers import pipeline

    classifier = Pretrained(
        PretrainedSpec(model=str(tiny_resnet), trained=1), Preprocess(size=32), CLASSES
    )
    network = classifier.build().eval()
    classifier.save(network, tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    assert classify.model.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    images = pictures(2, Preprocess(size=32))
    ours = predict(network, classifier.prepare, images, "cpu")
    for picture, probabilities in zip(images, ours, strict=True):
        theirs = {entry["label"]: entry["score"] for entry in classify(Image.fromarray(picture))}
        np.testing.assert_allclose([theirs[name] for name in CLASSES], probabilities, atol=1e-4)


def test_frozen_backbone_trains_only_the_head(tiny_resnet: Path) -> None:
    spec = PretrainedSpec(model=str(tiny_resnet), trained="head")
    network = Pretrained(spec, Preprocess(size=32), CLASSES).build()
    learning = [name for name, value in network.named_parameters() if value.requires_grad]
    assert learning
    assert all("classifier" in name for name in learning)
    network.train()
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_missing_checkpoint_error_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"classifier\.model"):
        Pretrained(PretrainedSpec(model=str(tmp_path)), Preprocess(size=32), CLASSES).build()


def test_more_halvings_than_the_image_allows_are_rejected() -> None:
    with pytest.raises(StudyError, match="shorten channels"):
        Small(SmallSpec(channels=(8, 8, 8, 8)), Preprocess(size=8), CLASSES).check(Training())


def test_batch_norm_statistics_are_kept_unless_unfrozen(tiny_resnet: Path) -> None:
    preprocess = Preprocess(size=16)
    images = torch.from_numpy(pictures(8, preprocess)).permute(0, 3, 1, 2)
    for freeze in (True, False):
        spec = PretrainedSpec(model=str(tiny_resnet), freeze_batch_norm=freeze)
        classifier = Pretrained(spec, preprocess, CLASSES)
        network = classifier.build().train()
        before = {name: value.clone() for name, value in network.named_buffers()}
        network(classifier.prepare(images))
        kept = all(torch.equal(before[name], value) for name, value in network.named_buffers())
        assert kept == freeze
        # The trained part still learns.
        assert all(value.requires_grad for value in network.parameters())


def test_dropout_before_the_head_can_be_set(tmp_path: Path) -> None:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=4)
    MobileNetV2ForImageClassification(config).save_pretrained(tmp_path)
    settings = '{"size": {"height": 32, "width": 32}, "image_mean": [0.5], "image_std": [0.5]}'
    (tmp_path / "preprocessor_config.json").write_text(settings)
    shares = []
    for asked in (None, 0.2):
        spec = PretrainedSpec(model=str(tmp_path), head_dropout=asked)
        network = Pretrained(spec, Preprocess(size=16), CLASSES).build()
        shares += [layer.p for layer in network.modules() if isinstance(layer, torch.nn.Dropout)]
    assert shares == [0.8, 0.2]


SMALL_VIT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def save_transformer(kind: str, folder: Path) -> Any:
    """A checkpoint with another number of classes at 32 px; returns the model."""
    from transformers import (
        CLIPConfig,
        CLIPForImageClassification,
        Dinov2Config,
        Dinov2ForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    torch.manual_seed(0)
    fields = {**SMALL_VIT, "image_size": 32, "patch_size": 8}
    model: Any
    if kind == "vit":
        model = ViTForImageClassification(ViTConfig(**fields, num_labels=7))
    elif kind == "dinov2":
        model = Dinov2ForImageClassification(Dinov2Config(**fields, num_labels=7))
    else:
        model = CLIPForImageClassification(CLIPConfig(vision_config=fields))
    model.save_pretrained(folder)
    settings = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model.eval()


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
@pytest.mark.parametrize("side", [48, 24, 44])
def test_transformer_can_be_tuned_at_another_size(tmp_path: Path, kind: str, side: int) -> None:
    from PIL import Image
    from transformers import pipeline

    plain = save_transformer(kind, tmp_path / "start")
    spec = PretrainedSpec(model=str(tmp_path / "start"), input_size=side)
    classifier = Pretrained(spec, Preprocess(size=side), CLASSES)
    classifier.check(Training())
    network: Any = classifier.build().eval()
    images = pictures(3, Preprocess(size=side))
    prepared = classifier.prepare(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert prepared.shape[2:] == (side, side)
    with torch.inference_mode():
        options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
        expected = plain.base_model(prepared, **options).last_hidden_state
        found = network.model.base_model(prepared).last_hidden_state
    torch.testing.assert_close(found, expected)
    network(prepared).sum().backward()
    positions = network.model.base_model.embeddings.position_embeddings
    assert positions.grad.abs().sum() > 0
    classifier.save(network, tmp_path / "tuned")
    classify = pipeline("image-classification", model=str(tmp_path / "tuned"), device="cpu")
    ours = predict(network, classifier.prepare, images, "cpu")
    for picture, probabilities in zip(images, ours, strict=True):
        theirs = {entry["label"]: entry["score"] for entry in classify(Image.fromarray(picture))}
        np.testing.assert_allclose([theirs[name] for name in CLASSES], probabilities, atol=1e-4)
    again = Pretrained(spec, Preprocess(size=side), CLASSES)
    loaded = again.load(tmp_path / "tuned")
    np.testing.assert_allclose(predict(loaded, again.prepare, images, "cpu"), ours, atol=1e-6)


def test_unsupported_input_size_is_rejected_when_the_study_is_read(
    tmp_path: Path,
) -> None:
    save_transformer("clip", tmp_path)

    def made(**fields: Any) -> Pretrained:
        spec = PretrainedSpec(model=str(tmp_path), **fields)
        return Pretrained(spec, Preprocess(size=32), CLASSES)

    for fields in ({}, {"input_size": 32}):
        made(**fields).check(Training())
        made(**fields).build()
    why = r"^classifier\.input_size: .* does not accept images of 48 px: .*; remove input_size"
    # A checkpoint that is not on this machine yet is rejected when it is loaded.
    with pytest.raises(StudyError, match=why) as raised:
        made(input_size=48).build()
    assert "\n" not in str(raised.value)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(StudyError, match=why):
        made(input_size=48).check(Training())


def test_images_smaller_than_a_patch_are_rejected(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SMALL_VIT, image_size=64, patch_size=32)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    spec = PretrainedSpec(model=str(tmp_path), input_size=16)
    with pytest.raises(StudyError, match=r"does not accept images of 16 px"):
        Pretrained(spec, Preprocess(size=16), CLASSES).check(Training())


def test_convolutional_checkpoint_accepts_any_size(tiny_resnet: Path) -> None:
    spec = PretrainedSpec(model=str(tiny_resnet), input_size=48)
    classifier = Pretrained(spec, Preprocess(size=16), CLASSES)
    classifier.check(Training())
    assert predict(
        classifier.build().eval(), classifier.prepare, pictures(2, Preprocess(size=16)), "cpu"
    ).shape == (2, 3)
