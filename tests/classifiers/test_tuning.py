"""Which weights of a checkpoint are trained: the last blocks of each family, and everything after
them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from engine.classifiers.pretrained import Pretrained, PretrainedSpec
from engine.core.errors import StudyError
from engine.data.images import Preprocess
from engine.nets.training import with_synchronised_norms
from engine.study import Study, validate

CLASSES = ("cat", "dog", "eel")
_SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32,
          "num_hidden_layers": 3, "patch_size": 8, "image_size": 32}  # fmt: skip
# For each family: a tiny network, its number of blocks, and the prefix of the last block's weights.
FAMILIES: dict[str, tuple[dict[str, Any], int, str]] = {
    "resnet": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        2, "resnet.encoder.stages.1.",
    ),
    "efficientnet": (
        {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320, "image_size": 32},
        10, "efficientnet.encoder.blocks.9.",
    ),
    "mobilenet_v2": ({"depth_multiplier": 0.25, "image_size": 32}, 16, "mobilenet_v2.layer.15."),
    "vit": (_SMALL, 3, "vit.layers.2."),
    "convnext": (
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, 4, "convnext.encoder.stages.3.",
    ),
    "dinov2": (_SMALL, 3, "dinov2.encoder.layer.2."),
}  # fmt: skip


def checkpoint(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, num_labels=5, **FAMILIES[family][0])
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    settings = {
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def built(folder: Path, trained: Any, **fields: Any) -> tuple[Pretrained, torch.nn.Module]:
    spec = PretrainedSpec(model=str(folder), trained=trained, **fields)
    classifier = Pretrained(spec, Preprocess(size=32), CLASSES)
    return classifier, classifier.build().train()


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_last_block_and_what_follows_are_trained(tmp_path: Path, family: str) -> None:
    _, blocks, last = FAMILIES[family]
    folder = checkpoint(tmp_path, family)
    classifier, network = built(folder, 1, freeze_batch_norm=False)
    names = [name.removeprefix("model.") for name, _ in network.named_parameters()]
    learning = [
        name.removeprefix("model.")
        for name, value in network.named_parameters()
        if value.requires_grad
    ]
    first = next(number for number, name in enumerate(names) if name.startswith(last))
    assert learning == names[first:]
    assert any("classifier" in name for name in learning)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    network(classifier.prepare(images)).square().sum().backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    moved = {
        name.removeprefix("model.")
        for name, value in network.state_dict().items()
        if not torch.equal(value, before[name])
    }
    # Frozen modules keep their weights and statistics.
    assert moved
    assert not [name for name in moved if name in names[:first]]
    frozen = {name.rpartition(".")[0] for name in names[:first]}
    assert not [name for name in moved if name.rpartition(".")[0] in frozen]
    with pytest.raises(StudyError, match=rf"trained: {blocks + 1} exceeds the {blocks} blocks"):
        built(folder, blocks + 1)


def test_network_without_blocks_trains_all_or_only_its_head() -> None:
    from engine.classifiers._tuning import block_list, freeze

    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert not block_list(network)
    with pytest.raises(StudyError, match="1 exceeds the 0 blocks of the network; use all or head"):
        freeze(network, 1, block_list(network), network[1].parameters())
    assert freeze(network, "head", (), network[1].parameters()) == [network[0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "pretrained"}, "classifier.model: is missing"),
        ({"name": "scratch"}, "classifier.architecture: is missing"),
        ({"name": "scratch", "architecture": "resnet18", "model": "x"}, "model: no such field"),
        ({"name": "pretrained", "model": "x", "trained": 0}, "classifier.trained"),
        ({"name": "pretrained", "model": "x", "trained": "tail"}, "classifier.trained"),
        ({"name": "scratch", "architecture": "resnet19"}, "classifier.architecture: must be"),
        ({"name": "vgg", "depth": 12}, "classifier.depth: must be"),
    ],
)
def test_invalid_classifier_is_rejected_in_one_line(fields: dict[str, Any], message: str) -> None:
    values = {
        "name": "toy", "reader": {"name": "digits"}, "preprocess": {"size": 16},
        "classifier": fields,
    }  # fmt: skip
    with pytest.raises(StudyError, match=message) as refused:
        validate(Study, values, "study.yaml")
    assert "\n" not in str(refused.value)


def test_frozen_norms_stay_frozen_on_several_gpus(tmp_path: Path) -> None:
    checkpoint(tmp_path, "resnet")

    def kinds(freeze: bool) -> list[tuple[str, bool]]:
        _, network = built(tmp_path, 1, freeze_batch_norm=freeze)
        network = with_synchronised_norms(network).train()
        return [
            (type(layer).__name__, layer.training)
            for layer in network.modules()
            if "BatchNorm" in type(layer).__name__
        ]

    still, learning = kinds(True), kinds(False)
    assert set(still) == {("BatchNorm2d", False)}
    # Only the last stage is trained.
    assert set(learning) == {("BatchNorm2d", False), ("SyncBatchNorm", True)}
