from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.core.errors import StudyError
from engine.embedders.clip import Clip, ClipSpec
from engine.embedders.cnn import Cnn, CnnSpec
from engine.embedders.pixels import Pixels, PixelsSpec

WEIGHTS = Path("../shared/weights/mobilenet_v2")
CLIP_MEAN, CLIP_STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def pictures(count: int = 4, side: int = 32, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def save_preprocessor(folder: Path, side: int, mean: list[float], std: list[float]) -> None:
    settings = {
        "crop_size": {"height": side, "width": side}, "do_center_crop": True,
        "size": {"shortest_edge": side}, "image_mean": mean, "image_std": std,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8, "projection_dim": 16,
    }  # fmt: skip
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 99, "projection_dim": 16,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(
        CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    ).save_pretrained(folder)
    save_preprocessor(folder, 32, CLIP_MEAN, CLIP_STD)
    return folder


@pytest.fixture(scope="module")
def tiny_resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_channels=3
    )
    folder = tmp_path_factory.mktemp("resnet")
    ResNetModel(config).save_pretrained(folder)
    save_preprocessor(folder, 32, [0.5] * 3, [0.5] * 3)
    return folder


def normalised(pixels: np.ndarray, mean: list[float], std: list[float]) -> torch.Tensor:
    images = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def test_clip_equals_the_plain_model_and_has_length_one(tiny_clip: Path) -> None:
    from transformers import CLIPModel

    embedder = Clip(ClipSpec(model=str(tiny_clip)))
    embedder.load("cpu")
    vectors = embedder.embed(pictures())
    assert vectors.shape == (4, embedder.width) == (4, 16)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    plain = CLIPModel.from_pretrained(tiny_clip).eval()
    with torch.inference_mode():
        inputs = normalised(pictures(), CLIP_MEAN, CLIP_STD)
        expected = plain.visual_projection(plain.vision_model(inputs).pooler_output)
    assert np.abs(vectors - torch.nn.functional.normalize(expected).numpy()).max() < 1e-5


def test_cnn_equals_the_plain_model(tiny_resnet: Path) -> None:
    from transformers import ResNetModel

    embedder = Cnn(CnnSpec(model=str(tiny_resnet)))
    embedder.load("cpu")
    plain = ResNetModel.from_pretrained(tiny_resnet).eval()
    with torch.inference_mode():
        expected = plain(normalised(pictures(), [0.5] * 3, [0.5] * 3)).pooler_output.flatten(1)
    assert np.abs(embedder.embed(pictures()) - expected.numpy()).max() < 1e-5


def test_grey_images_and_other_sizes_are_brought_to_the_model(tiny_resnet: Path) -> None:
    embedder = Cnn(CnnSpec(model=str(tiny_resnet), input_size=48))
    embedder.load("cpu")
    grey = pictures(2, side=20, channels=1)
    as_rgb = np.repeat(grey, 3, axis=-1)
    assert np.allclose(embedder.embed(grey), embedder.embed(as_rgb), atol=1e-6)


def test_a_batch_embeds_as_its_rows_do(tiny_resnet: Path) -> None:
    embedder = Cnn(CnnSpec(model=str(tiny_resnet)))
    embedder.load("cpu")
    together = embedder.embed(pictures())
    alone = np.concatenate([embedder.embed(pictures()[row : row + 1]) for row in range(4)])
    assert np.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["cnn", "clip"])
def test_a_model_that_is_not_there_is_one_line_that_names_it(kind: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    embedder = Cnn(CnnSpec(model=missing)) if kind == "cnn" else Clip(ClipSpec(model=missing))
    with pytest.raises(StudyError, match=r"embedder\.model") as caught:
        embedder.load("cpu")
    assert "\n" not in str(caught.value)


def test_weights_as_pickle_are_refused(tiny_resnet: Path, tmp_path: Path) -> None:
    from transformers import ResNetModel

    model = ResNetModel.from_pretrained(tiny_resnet)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    save_preprocessor(tmp_path, 32, [0.5] * 3, [0.5] * 3)
    with pytest.raises(StudyError, match=r"embedder\.model"):
        Cnn(CnnSpec(model=str(tmp_path))).load("cpu")


@pytest.mark.skipif(not WEIGHTS.exists(), reason="../shared/weights/mobilenet_v2 is not here")
def test_a_real_network_tells_alike_pictures_from_others() -> None:
    embedder = Cnn(CnnSpec(model=str(WEIGHTS), input_size=96))
    embedder.load("cpu")
    assert embedder.width == 1280
    smooth = np.stack(
        [
            np.asarray(Image.fromarray(image).resize((96, 96), Image.Resampling.BICUBIC))
            for image in pictures(3, side=5)
        ]
    )
    darker = (smooth * 0.9).astype(np.uint8)
    vectors = embedder.embed(np.concatenate([smooth, darker]))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit[:3] @ unit[3:].T
    assert (similarity.argmax(axis=1) == np.arange(3)).all()


def test_pixels_know_shape_and_not_light() -> None:
    embedder = Pixels(PixelsSpec(side=8))
    embedder.load("cpu")
    image = pictures(1, side=16)
    dim = (image * 0.5 + 20).astype(np.uint8)
    first, second = embedder.embed(np.concatenate([image, dim]))
    assert first @ second > 0.99
    assert np.isclose(np.linalg.norm(first), 1, atol=1e-5)


def test_a_picture_of_one_colour_is_the_zero_vector() -> None:
    embedder = Pixels(PixelsSpec())
    embedder.load("cpu")
    assert not embedder.embed(np.full((1, 16, 16, 1), 90, dtype=np.uint8)).any()
