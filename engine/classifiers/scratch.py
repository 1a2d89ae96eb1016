"""Known architectures with random weights, at their published sizes (configurations of
transformers): ResNet (He et al. 2016), EfficientNet (Tan and Le 2019), MobileNetV2 (Sandler et al.
2018), ViT (Dosovitskiy et al. 2021; tiny and small: Touvron et al. 2021), ConvNeXt (Liu et al.
2022), and the backbone of DINOv2 (Oquab et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from engine.classifiers import ClassifierSpec, at_size
from engine.classifiers._transformers import TransformersClassifier, logits_of
from engine.core.errors import StudyError
from engine.nets.images import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from torch.nn import Module

    from engine.nets.classification import Training

Architecture = Literal[
    "resnet18", "resnet50", "efficientnet_b0", "efficientnet_b1", "mobilenet_v2", "vit_tiny",
    "vit_small", "vit_base", "convnext_tiny", "dinov2_small",
]  # fmt: skip


def _transformer(width: int) -> dict[str, Any]:
    """A transformer with twelve layers and heads of width 64."""
    return {
        "hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width,
        "num_hidden_layers": 12,
    }  # fmt: skip


_EFFICIENTNET = {"width_coefficient": 1.0, "hidden_dim": 1280, "dropout_rate": 0.2}
# The name of the family in transformers, and its settings other than the defaults.
_CONFIGS: Mapping[Architecture, tuple[str, Mapping[str, Any]]] = {
    "resnet18": (
        "resnet",
        {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"},
    ),
    "resnet50": ("resnet", {}),
    "efficientnet_b0": ("efficientnet", {**_EFFICIENTNET, "depth_coefficient": 1.0}),
    "efficientnet_b1": ("efficientnet", {**_EFFICIENTNET, "depth_coefficient": 1.1}),
    "mobilenet_v2": ("mobilenet_v2", {"classifier_dropout_prob": 0.2}),
    "vit_tiny": ("vit", _transformer(192)),
    "vit_small": ("vit", _transformer(384)),
    "vit_base": ("vit", _transformer(768)),
    "convnext_tiny": ("convnext", {}),
    "dinov2_small": ("dinov2", {"hidden_size": 384, "num_attention_heads": 6}),
}
_NAMES: Mapping[Architecture, str] = {
    "resnet18": "ResNet-18", "resnet50": "ResNet-50", "efficientnet_b0": "EfficientNet-B0",
    "efficientnet_b1": "EfficientNet-B1", "mobilenet_v2": "MobileNetV2", "vit_tiny": "ViT-Ti",
    "vit_small": "ViT-S", "vit_base": "ViT-B", "convnext_tiny": "ConvNeXt-T",
    "dinov2_small": "the network of DINOv2 ViT-S",
}  # fmt: skip
# Published patch sizes, and the minimum number of patches along a side where no size is given.
_PATCHES = {"vit": 16, "dinov2": 14}
_FEWEST = 7
_LEAST_SIDE = {"convnext": 32}


class ScratchSpec(ClassifierSpec):
    name: Literal["scratch"] = "scratch"
    architecture: Architecture
    # Side in pixels; None: the study's own.
    input_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    # Side of a patch of vit and dinov2; None: 16 or 14, smaller for small pictures.
    patch_size: Annotated[int, Field(ge=1, le=64)] | None = None


class Scratch(TransformersClassifier[ScratchSpec]):
    version = 1

    @staticmethod
    def in_words(spec: ScratchSpec) -> str:
        return f"{_NAMES[spec.architecture]} trained from scratch{at_size(spec.input_size)}"

    @property
    def side(self) -> int:
        return self.spec.input_size or self.preprocess.size

    def check(self, training: Training) -> None:
        family = _CONFIGS[self.spec.architecture][0]
        least = _LEAST_SIDE.get(family, 1)
        if self.side < least:
            raise StudyError(
                f"classifier: {self.spec.architecture} needs at least {least} px, but images have"
                f" {self.side}; set input_size"
            )
        if family not in _PATCHES and self.spec.patch_size:
            raise StudyError(
                f"classifier.patch_size: {self.spec.architecture} has no patches; remove the field"
            )
        if family in _PATCHES:
            self.patch_size()

    def patch_size(self) -> int:
        """Side of a patch: that of the spec, else the largest size up to the published one with at
        least 7 patches along a side. Raises `StudyError` if it does not divide the picture."""
        side, requested = self.side, self.spec.patch_size
        divisors = [size for size in range(1, side + 1) if side % size == 0]
        if requested and requested not in divisors:
            choices = ", ".join(str(size) for size in divisors if 1 < size < side)
            raise StudyError(
                f"classifier.patch_size: {requested} px does not divide {side} px; choose"
                f" {choices or 'another input_size'}"
            )
        published = _PATCHES[_CONFIGS[self.spec.architecture][0]]
        usual = [size for size in divisors if 1 < size <= min(published, side // _FEWEST)]
        if not (requested or usual):
            raise StudyError(
                f"classifier.input_size: {side} px cannot be divided into patches of 2 to"
                f" {published} px with at least {_FEWEST} along a side; choose another size"
            )
        return requested or usual[-1]

    def build(self) -> Module:
        from torch import nn
        from transformers import AutoConfig, AutoModelForImageClassification

        family, settings = _CONFIGS[self.spec.architecture]
        if family in _PATCHES:
            settings = {**settings, "patch_size": self.patch_size()}
        config = AutoConfig.for_model(family, **settings, **self.labels())
        config.image_size = self.side
        auto: Any = AutoModelForImageClassification  # its `from_config` has no annotations
        model = auto.from_config(config)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                # Some configurations have TensorFlow's 0.99, which is 0.01 in torch.
                layer.momentum = 0.1
        self.size, self.mean, self.std = (self.side, self.side), IMAGENET_MEAN, IMAGENET_STD
        return logits_of(model)
