"""Inception with random weights: the reference values are those of torch-fidelity 0.4.0 (its
`FeatureExtractorInceptionV3`, the port that torchmetrics also uses) for the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.core.errors import StudyError
from engine.core.registry import resolve
from engine.embedders.inception import Inception, InceptionSpec
from engine.nets.inception import Inception as Network
from engine.nets.inception import resized


def drawn() -> dict[str, torch.Tensor]:
    """Weights that keep feature maps at about the same scale; equal on every machine."""
    random, found = np.random.default_rng(0), {}
    for name, value in sorted(Network().state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue  # the files of 2015 have none
        noise = random.standard_normal(value.shape).astype(np.float32)
        if name.endswith("conv.weight"):
            noise *= np.sqrt(2 / np.prod(value.shape[1:]))
        elif name.endswith("running_var"):
            noise = 1 + 0.1 * np.abs(noise)
        else:
            noise = 0.1 * noise + float(name.endswith("bn.weight"))
        found[name] = torch.from_numpy(noise.astype(np.float32))
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    classes = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    save_file({**drawn(), **classes}, path)
    return path


def test_features_equal_those_of_torch_fidelity(weights: Path) -> None:
    kind = resolve("embedders", "inception")
    embedder = kind(kind.Spec(weights=str(weights)))
    embedder.load("cpu")
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 40, 52), dtype=np.uint8)
    found = embedder.embed(pixels.transpose(0, 2, 3, 1))
    assert found.shape == (2, embedder.width) == (2, 2048)
    first = [0.65946913, 0.82105970, 0.03298641, 0.51965475]
    assert found[0, :4].tolist() == pytest.approx(first, abs=1e-5)
    second = [0.02501836, 1.30984247, 1.69079137]
    assert found[1, [100, 1000, 2047]].tolist() == pytest.approx(second, abs=1e-5)
    assert float(found.mean()) == pytest.approx(0.26915237, abs=1e-5)
    grey = pixels[:1, :1].transpose(0, 2, 3, 1)
    assert embedder.embed(grey) == pytest.approx(
        embedder.embed(np.repeat(grey, 3, axis=-1)), abs=1e-5
    )


def test_images_are_resized_like_tensorflow_1() -> None:
    row = torch.tensor([0.0, 10.0, 20.0, 30.0]).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    # Twice as large: every other pixel is a given one, and the last is repeated.
    assert resized(row, 8)[0, 0, 5].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    assert resized(row, 2)[0, 0, 0].tolist() == [0, 20]  # pixels in between are ignored


def test_weights_of_other_networks_are_rejected(tmp_path: Path) -> None:
    def refusal(tensors: dict[str, torch.Tensor] | None) -> str:
        path = tmp_path / "w.safetensors"
        if tensors is None:
            path.write_bytes(b"no weights")
        else:
            save_file(tensors, path)
        with pytest.raises(StudyError, match=r"embedder\.weights: ") as caught:
            Inception(InceptionSpec(weights=str(path))).load("cpu")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "an Inception of 1000 classes" in refusal({"fc.bias": torch.zeros(1000)})
    assert "holds another network" in refusal({"conv.weight": torch.zeros(3)})
    assert "w.safetensors" in refusal(None)
    with pytest.raises(StudyError, match="no such file"):
        Inception(InceptionSpec(weights=str(tmp_path / "none"))).load("cpu")
