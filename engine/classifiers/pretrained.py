"""Any image classifier of transformers (ResNet, EfficientNet, MobileNet, ViT, ConvNeXt, DINOv2 …),
fine-tuned from a hub id or a local folder with a new head.

What is saved is a transformers folder: `pipeline("image-classification", folder)` opens it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from engine.classifiers import Classifier, ClassifierSpec
from engine.nets.checkpoints import image_processor_settings, load_model
from engine.nets.images import normalised

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class PretrainedSpec(ClassifierSpec):
    name: Literal["pretrained"] = "pretrained"
    model: str
    revision: str | None = None
    # Side in pixels; None: what the checkpoint was trained at.
    input_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    # all: every weight is trained. head: the new linear layer alone.
    trained: Literal["all", "head"] = "all"
    # Keep the statistics of batch normalisation as they were learnt: those of small batches are
    # poor ones, several workers would each have their own, and some checkpoints (folded ones) die
    # of new ones.
    freeze_batch_norm: bool = True
    # Dropout before the new head; None: what the checkpoint says, which may be 0.8.
    head_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None


class Pretrained(Classifier):
    version: ClassVar[int] = 2
    Spec: ClassVar[type[ClassifierSpec]] = PretrainedSpec
    spec: PretrainedSpec

    def build(self) -> Module:
        from transformers import AutoModelForImageClassification

        self._read_processor(self.spec.model, self.spec.revision)
        model, _ = load_model(
            "classifier",
            AutoModelForImageClassification,
            self.spec.model,
            self.spec.revision,
            # A checkpoint without a head, or with one of another number of classes, gets a new one.
            fresh=lambda made, name: not name.startswith(f"{made.base_model_prefix}."),
            num_labels=len(self.classes),
            id2label=dict(enumerate(self.classes)),
            label2id={name: number for number, name in enumerate(self.classes)},
            ignore_mismatched_sizes=True,
        )
        if self.spec.head_dropout is not None:
            _set_head_dropout(model, self.spec.head_dropout)
        return _logits_of(model, self.spec.trained == "head", self.spec.freeze_batch_norm)

    def prepare(self, pixels: Tensor) -> Tensor:
        return normalised(pixels, self.size, self.mean, self.std)

    def save(self, network: Module, folder: Path) -> None:
        network.model.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True, "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255,
            "size": {"height": self.size[0], "width": self.size[1]}, "resample": 3,
            "image_mean": list(self.mean), "image_std": list(self.std),
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))

    def load(self, folder: Path) -> Module:
        from transformers import AutoModelForImageClassification

        self._read_processor(str(folder), None)
        model = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True)
        return _logits_of(model, frozen=True, freeze_batch_norm=True).eval()

    def _read_processor(self, model: str, revision: str | None) -> None:
        settings = image_processor_settings("classifier", model, revision)
        self.size, self.mean, self.std = settings["size"], settings["mean"], settings["std"]
        if self.spec.input_size:
            self.size = (self.spec.input_size, self.spec.input_size)


def _set_head_dropout(model: Any, share: float) -> None:
    from torch import nn

    of_base = set(model.base_model.modules())
    for layer in model.modules():
        if isinstance(layer, nn.Dropout) and layer not in of_base:
            layer.p = share


def _logits_of(model: Any, frozen: bool, freeze_batch_norm: bool) -> Module:
    """A module that answers with logits alone; of a frozen one, only the head is trained."""
    from torch import nn

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            if frozen:
                self.model.base_model.requires_grad_(False)

        def train(self, mode: bool = True) -> Logits:
            super().train(mode)
            if frozen:  # batch normalisation must not follow the new data either
                self.model.base_model.eval()
            elif freeze_batch_norm:
                for layer in self.model.modules():
                    if isinstance(
                        layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
                    ):
                        layer.eval()
            return self

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.model(images).logits
            return logits

    return Logits()
