from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.core.errors import StudyError
from engine.core.registry import resolve
from engine.embedders import Embedder
from engine.embedders.clip import Clip, ClipSpec
from engine.embedders.cnn import Cnn, CnnSpec
from engine.embedders.dino import Dino, DinoSpec
from engine.embedders.pixels import Pixels, PixelsSpec

WEIGHTS = Path("../shared/weights/mobilenet_v2")
# Sizes of tiny transformers.
VIT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
CROPPED = {"size": {"shortest_edge": 40}, "do_center_crop": True,
           "crop_size": {"height": 32, "width": 32}, "resample": 3}  # fmt: skip
SQUARE = {"size": {"height": 32, "width": 32}, "resample": 2}


def pictures(count: int = 4, side: int = 48, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def tiny_clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    text = {key: VIT[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    return CLIPModel(
        CLIPConfig(
            vision_config={**VIT, "projection_dim": 16},
            text_config={**text, "num_hidden_layers": 1, "vocab_size": 99, "projection_dim": 16},
            projection_dim=16,
        )
    )


def tiny_siglip() -> Any:
    from transformers import SiglipConfig, SiglipModel

    text = {key: VIT[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    return SiglipModel(
        SiglipConfig(vision_config=VIT, text_config={**text, "num_hidden_layers": 1,
                                                     "vocab_size": 99})
    )  # fmt: skip


def tiny_dino() -> Any:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**VIT, mlp_ratio=2))


def tiny_dino3() -> Any:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(DINOv3ViTConfig(**VIT, num_register_tokens=2))


def tiny_resnet() -> Any:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )


def tiny_efficientnet() -> Any:
    from transformers import EfficientNetConfig, EfficientNetModel

    return EfficientNetModel(
        EfficientNetConfig(
            width_coefficient=0.25,
            depth_coefficient=0.2,
            hidden_dim=320,
            image_size=32,
            initializer_range=0.45,
        )
    )


def tiny_convnext() -> Any:
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]))


def tiny_vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**VIT))


def class_token(output: Any) -> torch.Tensor:
    return output.last_hidden_state[:, 0]


def pooled(output: Any) -> torch.Tensor:
    return output.pooler_output.flatten(1)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors)


class Kind:
    """A checkpoint, the embedder that reads it, and the output of plain transformers."""

    def __init__(
        self, build: Callable[[], Any], embedder: str, processor: str, geometry: dict[str, Any],
        vectors: Callable[[Any, torch.Tensor], torch.Tensor],
    ) -> None:  # fmt: skip
        self.build, self.embedder, self.processor = build, embedder, processor
        self.geometry, self.vectors = geometry, vectors

    def save(self, folder: Path) -> Path:
        torch.manual_seed(0)
        self.build().save_pretrained(folder)
        save_processor(folder, self.processor, **self.geometry)
        return folder


def save_processor(folder: Path, name: str, **settings: Any) -> None:
    values = {
        "image_processor_type": name, "do_resize": True, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28], **settings,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


KINDS = {
    "clip": Kind(
        tiny_clip, "clip", "CLIPImageProcessor", CROPPED,
        lambda model, inputs: unit(model.visual_projection(pooled(model.vision_model(inputs)))),
    ),
    "siglip": Kind(
        tiny_siglip, "clip", "SiglipImageProcessor", SQUARE,
        lambda model, inputs: unit(pooled(model.vision_model(inputs))),
    ),
    "dinov2": Kind(
        tiny_dino, "dino", "BitImageProcessor", CROPPED,
        lambda model, inputs: unit(class_token(model(inputs))),
    ),
    "resnet": Kind(
        tiny_resnet, "cnn", "ConvNextImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_pct": 0.875, "resample": 3},
        lambda model, inputs: pooled(model(inputs)),
    ),
    "efficientnet": Kind(
        tiny_efficientnet, "cnn", "EfficientNetImageProcessor",
        {**SQUARE, "include_top": True, "rescale_offset": True},
        lambda model, inputs: pooled(model(inputs)),
    ),
    "convnext": Kind(
        tiny_convnext, "cnn", "ConvNextImageProcessor",
        {"size": {"shortest_edge": 64}, "crop_pct": 0.8, "resample": 2},
        lambda model, inputs: pooled(model(inputs)),
    ),
    # Its checkpoint has no pooler: the classifier gets the class token.
    "vit": Kind(
        tiny_vit, "cnn", "ViTImageProcessor", SQUARE,
        lambda model, inputs: class_token(model.vit(inputs)),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: kind.save(tmp_path_factory.mktemp(name)) for name, kind in KINDS.items()}


def embedder_of(name: str, folder: Path, **fields: Any) -> Embedder:
    kind = resolve("embedders", KINDS[name].embedder)
    found: Embedder = kind(kind.Spec(model=str(folder), **fields))
    found.load("cpu")
    return found


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("side", [24, 48])
def test_embedder_equals_the_checkpoint_s_processor_and_network(
    folders: dict[str, Path], name: str, side: int
) -> None:
    from transformers import AutoImageProcessor

    embedder = embedder_of(name, folders[name])
    images = pictures(side=side)
    vectors = embedder.embed(images)
    assert vectors.shape == (4, embedder.width)
    processor = AutoImageProcessor.from_pretrained(folders[name], backend="pil")
    inputs = processor(list(images), return_tensors="pt")["pixel_values"]
    plain = KINDS[name].build().from_pretrained(folders[name]).eval()
    with torch.inference_mode():
        expected = KINDS[name].vectors(plain, inputs).numpy()
    # Random weights of deep networks shrink or amplify activations, and rounding errors too.
    scale = np.abs(expected).max()
    assert np.abs(vectors - expected).max() < 1e-5 * scale
    assert vectors.std(axis=0).max() > 1e-3 * scale


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_cosine_embedders_give_unit_vectors(folders: dict[str, Path], name: str) -> None:
    vectors = embedder_of(name, folders[name]).embed(pictures())
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_dinov3_gives_its_class_token(tmp_path: Path) -> None:
    """Its processor has no class for Pillow: size, mean and deviation are read from its file."""
    torch.manual_seed(0)
    tiny_dino3().save_pretrained(tmp_path)
    save_processor(tmp_path, "DINOv3ViTImageProcessor", **SQUARE)
    embedder = Dino(DinoSpec(model=str(tmp_path)))
    embedder.load("cpu")
    images = pictures(side=32)
    values = torch.tensor(images).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])
    with torch.inference_mode():
        plain = tiny_dino3().from_pretrained(tmp_path).eval()
        expected = plain((values - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state
    assert np.abs(embedder.embed(images) - unit(expected[:, 0]).numpy()).max() < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_input_size_resizes_the_whole_image(folders: dict[str, Path], name: str) -> None:
    embedder = embedder_of(name, folders[name], input_size=32)
    bordered = np.zeros((64, 64, 3), np.uint8)
    bordered[0] = 255
    prepared = embedder.prepare(bordered)
    assert prepared.shape == (3, 32, 32)
    assert prepared[:, 0].mean() > 60  # a crop would remove the white border


LARGER: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "clip": lambda model, inputs: unit(
        model.visual_projection(pooled(model.vision_model(inputs, interpolate_pos_encoding=True)))
    ),
    "siglip": lambda model, inputs: unit(
        pooled(model.vision_model(inputs, interpolate_pos_encoding=True))
    ),
    "dinov2": lambda model, inputs: unit(class_token(model(inputs))),
    "vit": lambda model, inputs: class_token(model.vit(inputs, interpolate_pos_encoding=True)),
}


@pytest.mark.parametrize("name", LARGER)
def test_positions_are_interpolated_at_another_size(folders: dict[str, Path], name: str) -> None:
    embedder = embedder_of(name, folders[name], input_size=48)
    images = pictures(2)
    prepared = np.stack([embedder.prepare(image) for image in images])
    assert prepared.shape == (2, 3, 48, 48)
    plain = KINDS[name].build().from_pretrained(folders[name]).eval()
    with torch.inference_mode():
        expected = LARGER[name](plain, embedder.input.values(prepared, "cpu")).numpy()
    assert np.abs(embedder.embed(images) - expected).max() < 1e-5 * np.abs(expected).max()


def test_unsupported_input_size_is_rejected(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**{**VIT, "patch_size": 32})
    ViTForImageClassification(config).save_pretrained(tmp_path)
    save_processor(tmp_path, "ViTImageProcessor", **SQUARE)
    with pytest.raises(StudyError, match=r"^embedder\.input_size: .* accept images of 16 px: .*$"):
        Cnn(CnnSpec(model=str(tmp_path), input_size=16)).load("cpu")


def test_grey_images_are_embedded_as_colour(folders: dict[str, Path]) -> None:
    embedder = embedder_of("resnet", folders["resnet"])
    grey = pictures(2, side=20, channels=1)
    as_rgb = np.repeat(grey, 3, axis=-1)
    assert np.allclose(embedder.embed(grey), embedder.embed(as_rgb), atol=1e-6)


def test_batch_embeds_like_its_rows(folders: dict[str, Path]) -> None:
    embedder = embedder_of("resnet", folders["resnet"])
    together = embedder.embed(pictures())
    alone = np.concatenate([embedder.embed(pictures()[row : row + 1]) for row in range(4)])
    assert np.allclose(together, alone, atol=1e-5)


def test_large_batch_embeds_like_small_ones(folders: dict[str, Path]) -> None:
    embedder = embedder_of("resnet", folders["resnet"], input_size=160)
    images = pictures(23, side=20)
    together = embedder.embed(images)
    assert np.allclose(together[20:], embedder.embed(images[20:]), atol=1e-5)
    assert len(together) == 23


@pytest.mark.parametrize("channels", [1, 3])
def test_image_of_the_network_s_size_equals_the_processor_output(
    folders: dict[str, Path], channels: int
) -> None:
    embedder = embedder_of("efficientnet", folders["efficientnet"], input_size=48)
    image = pictures(channels=channels)[0]
    assert isinstance(embedder, Cnn)
    colour = np.repeat(image, 3 // channels, axis=-1)
    assert np.array_equal(embedder.prepare(image), embedder.input._processed(colour))
    assert np.array_equal(embedder.prepare(image), colour.transpose(2, 0, 1))


def test_half_precision_is_close(folders: dict[str, Path]) -> None:
    whole = embedder_of("clip", folders["clip"]).embed(pictures())
    half = embedder_of("clip", folders["clip"], precision="bf16").embed(pictures())
    assert (whole * half).sum(axis=1).min() > 0.999
    assert half.dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "spec"), [(Cnn, CnnSpec), (Clip, ClipSpec), (Dino, DinoSpec)], ids=lambda item: ""
)
def test_missing_model_is_one_line_that_names_it(kind: Any, spec: Any, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"embedder\.model") as caught:
        kind(spec(model=str(tmp_path / "nowhere"))).load("cpu")
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_rejected(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import ResNetModel

    model = ResNetModel.from_pretrained(folders["resnet"])
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    save_processor(tmp_path, "ConvNextImageProcessor", size={"shortest_edge": 32})
    with pytest.raises(StudyError, match=r"embedder\.model"):
        Cnn(CnnSpec(model=str(tmp_path))).load("cpu")


def test_network_without_text_is_not_clip(folders: dict[str, Path]) -> None:
    with pytest.raises(StudyError, match="resnet has no joint space with text"):
        Clip(ClipSpec(model=str(folders["resnet"]))).load("cpu")


@pytest.mark.skipif(not WEIGHTS.exists(), reason="../shared/weights/mobilenet_v2 is not here")
def test_real_network_separates_similar_images_from_others() -> None:
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


def test_pixels_ignore_brightness_and_contrast() -> None:
    embedder = Pixels(PixelsSpec(side=8))
    embedder.load("cpu")
    image = pictures(1, side=16)
    dim = (image * 0.5 + 20).astype(np.uint8)
    first, second = embedder.embed(np.concatenate([image, dim]))
    assert first @ second > 0.99
    assert np.isclose(np.linalg.norm(first), 1, atol=1e-5)


def test_uniform_image_is_the_zero_vector() -> None:
    embedder = Pixels(PixelsSpec())
    embedder.load("cpu")
    assert not embedder.embed(np.full((1, 16, 16, 1), 90, dtype=np.uint8)).any()


def test_checkpoint_with_missing_weights_is_rejected(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["dinov2"], tmp_path / "part")
    weights = load_file(folders["dinov2"] / "model.safetensors")
    weights.pop(next(name for name in weights if "attention" in name))
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StudyError, match=r"embedder.model: .*part lacks weights .* \(1, such as"):
        embedder_of("dinov2", tmp_path / "part")
