"""VGG: the tensors of the original, and its weights under the names of torchvision and of timm."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.classifiers.vgg import Vgg, VggSpec
from engine.core.errors import StudyError
from engine.data.images import Preprocess
from engine.nets.classification import Training, predict
from engine.nets.vgg import VGG, initialise

CLASSES = ("cat", "dog", "eel")
TIMM = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2",
        "classifier.6": "head.fc"}  # fmt: skip


def vgg(size: int = 32, channels: str = "RGB", **fields: Any) -> Vgg:
    spec = VggSpec(**{"depth": 11, "hidden": 8, **fields})
    return Vgg(spec, Preprocess(size=size, channels=channels), CLASSES)


def original(classes: int, batch_norm: bool = False) -> dict[str, Tensor]:
    """Weights of a narrow VGG11 with torchvision's names."""
    torch.manual_seed(5)
    return initialise(VGG(11, classes, batch_norm, hidden=8)).state_dict()


def as_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as timm saves them: linear layers as convolutions, and no batch counts."""
    found = {}
    for name, value in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked":
            continue
        if kind == "weight" and layer == "classifier.0":
            value = value.view(-1, 512, 7, 7)
        if kind == "weight" and layer == "classifier.3":
            value = value.view(*value.shape, 1, 1)
        found[f"{TIMM.get(layer, layer)}.{kind}"] = value.clone()
    return found


def test_vgg19_has_torchvision_s_38_tensors_and_143_667_240_parameters() -> None:
    with torch.device("meta"):
        network = VGG(19, 1000)
    layers = [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34]
    names = [*(f"features.{n}" for n in layers), *(f"classifier.{n}" for n in (0, 3, 6))]
    expected = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    assert list(network.state_dict()) == expected
    assert len(expected) == 38
    assert sum(value.numel() for value in network.parameters()) == 143_667_240


@pytest.mark.parametrize(
    ("depth", "batch_norm", "parameters"),
    [(11, False, 132_863_336), (13, False, 133_047_848), (16, False, 138_357_544),
     (11, True, 132_868_840), (16, True, 138_365_992), (19, True, 143_678_248)],
)  # fmt: skip
def test_other_depths_have_their_published_size(
    depth: int, batch_norm: bool, parameters: int
) -> None:
    with torch.device("meta"):
        network = VGG(depth, 1000, batch_norm)
    assert sum(value.numel() for value in network.parameters()) == parameters


@pytest.mark.parametrize("names", ["torchvision", "timm"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_weights_with_either_names_load_and_the_last_layer_is_new(
    tmp_path: Path, names: str, batch_norm: bool
) -> None:
    tensors = original(10, batch_norm)
    saved = tensors if names == "torchvision" else as_timm(tensors)
    save_file(saved, tmp_path / "weights.safetensors")
    # A folder, or the file in it.
    path = tmp_path if batch_norm else tmp_path / "weights.safetensors"
    network = vgg(weights=str(path), batch_norm=batch_norm).build()
    for name, value in network.state_dict().items():
        if name.startswith("classifier.6"):
            assert value.shape[0] == 3
        elif not name.endswith("num_batches_tracked"):
            assert torch.equal(value, tensors[name]), name


def test_last_layer_with_the_right_number_of_classes_is_kept(tmp_path: Path) -> None:
    tensors = original(3)
    save_file(as_timm(tensors), tmp_path / "model.safetensors")
    found = vgg(weights=str(tmp_path)).build().state_dict()
    assert torch.equal(found["classifier.6.weight"], tensors["classifier.6.weight"])


def test_weights_of_a_hub_id_come_from_its_repository(tmp_path: Path) -> None:
    """The hub's cache after a download, in a process without a network."""
    tensors = original(3)
    commit = "0" * 40
    repository = tmp_path / "models--timm--vgg11.tiny"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    save_file(as_timm(tensors), repository / "snapshots" / commit / "model.safetensors")
    script = (
        "from tests.classifiers.test_vgg import Training, vgg\n"
        "import sys\n"
        "classifier = vgg(weights=sys.argv[1])\n"
        "classifier.check(Training())\n"
        "print(float(classifier.build().state_dict()['classifier.6.bias'].sum()))\n"
    )

    def run(name: str) -> subprocess.CompletedProcess[str]:
        here = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        return subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True,
                              env=here, cwd=Path(__file__).parents[2])  # fmt: skip

    assert float(run("timm/vgg11.tiny").stdout) == float(tensors["classifier.6.bias"].sum())
    told = run("timm/vgg11.none").stderr.splitlines()[-1]
    assert "StudyError: classifier.weights: timm/vgg11.none: no such file or folder, and" in told


def test_unusable_weights_error_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "vgg19.pth").write_bytes(b"a pickle")
    (tmp_path / "damaged.safetensors").write_bytes(b"no header")
    save_file(original(3), tmp_path / "narrow.safetensors")
    lacking = original(3)
    del lacking["features.3.bias"]
    save_file(lacking, tmp_path / "lacking.safetensors")
    for name, message in (("nowhere", "no such file"), ("empty", "contains no safetensors files")):
        with pytest.raises(StudyError, match=message):
            vgg(weights=str(tmp_path / name)).check(Training())
    for name, fields, message in (
        ("damaged.safetensors", {}, "cannot be read as safetensors"),
        ("lacking.safetensors", {}, r"features\.3\.bias is missing"),
        ("narrow.safetensors", {"hidden": 4}, r"classifier\.0\.weight has shape \(8, 25088\), exp"),
        ("narrow.safetensors", {"depth": 13}, "does not fit this VGG13: features"),
        ("narrow.safetensors", {"batch_norm": True}, r"features.* check depth, batch_norm"),
    ):
        with pytest.raises(StudyError, match=message):
            vgg(weights=str(tmp_path / name), **fields).build()


def test_saved_network_predicts_the_same_after_loading(tmp_path: Path) -> None:
    # Too small for five halvings: enlarged to 32 px.
    classifier = vgg(size=28, channels="L", batch_norm=True)
    torch.manual_seed(1)
    network = classifier.build().eval()
    classifier.save(network, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    again = vgg(size=28, channels="L", batch_norm=True)
    loaded = again.load(tmp_path)
    found = predict(loaded, again.prepare, images, "cpu")
    np.testing.assert_allclose(
        found, predict(network, classifier.prepare, images, "cpu"), atol=1e-6
    )
    assert found.shape == (3, 3)


@pytest.mark.parametrize(
    ("trained", "first"), [("head", "classifier.6"), (1, "classifier.3"), (3, "features.22")]
)
def test_only_the_chosen_part_is_trained(tmp_path: Path, trained: Any, first: str) -> None:
    save_file(original(10, batch_norm=True), tmp_path / "model.safetensors")
    network = vgg(weights=str(tmp_path), trained=trained, batch_norm=True).build().train()
    names = [name for name, _ in network.named_parameters()]
    learning = [name for name, value in network.named_parameters() if value.requires_grad]
    assert learning == names[names.index(f"{first}.weight") :]
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert layer.training == (f"{name}.weight" in learning), name


def test_freezing_random_weights_is_rejected() -> None:
    with pytest.raises(StudyError, match=r"classifier\.trained: head would freeze random weights"):
        vgg(trained="head").check(Training())
    with pytest.raises(StudyError, match="8 exceeds the 7 blocks"):
        vgg(trained=8).build()
