"""Any image classifier of transformers (ResNet, EfficientNet, MobileNet, ViT, ConvNeXt, DINOv2 …)
from a hub id or a local folder, with a new head. Fine-tunes all weights, the last blocks, or only
the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from engine.classifiers import ClassifierSpec, at_size, checkpoint_in_words
from engine.classifiers._transformers import TransformersClassifier, logits_of
from engine.classifiers._tuning import Trained, block_list, freeze, trained_in_words
from engine.core.errors import StudyError
from engine.nets.pipelines import local_weights
from engine.nets.positions import refusal, with_image_size
from engine.nets.pretrained import load_model

if TYPE_CHECKING:
    from torch.nn import Module

    from engine.nets.classification import Training


class PretrainedSpec(ClassifierSpec):
    name: Literal["pretrained"] = "pretrained"
    model: str
    revision: str | None = None
    # Side in pixels; None: that of the checkpoint. Learned positions of a ViT are interpolated.
    input_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    trained: Trained = "all"
    # Keep the checkpoint's batch-normalisation statistics: small batches give poor ones, workers
    # would each compute their own, and some checkpoints (with folded layers) break with new ones.
    freeze_batch_norm: bool = True
    # Dropout before the new head; None: that of the checkpoint, which may be as high as 0.8.
    head_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None


class Pretrained(TransformersClassifier[PretrainedSpec]):
    version = 2

    @staticmethod
    def in_words(spec: PretrainedSpec) -> str:
        tuned = f"{checkpoint_in_words(spec.model)}, {trained_in_words(spec.trained)}"
        return tuned + at_size(spec.input_size)

    def external_digests(self) -> Mapping[str, str]:
        return local_weights(self.spec, "model")

    def check(self, training: Training) -> None:
        if side := self.spec.input_size:
            why = refusal(self.spec.model, self.spec.revision, (side, side))
            if why:
                raise self._refused(why)

    def _refused(self, why: str) -> StudyError:
        return StudyError(
            f"classifier.input_size: {self.spec.model} does not accept images of"
            f" {self.spec.input_size} px: {why}; remove input_size, or choose another checkpoint"
        )

    def build(self) -> Module:
        from torch import nn
        from transformers import AutoModelForImageClassification

        self.read_processor(self.spec.model, self.spec.revision)
        model, _ = load_model(
            "classifier",
            AutoModelForImageClassification,
            self.spec.model,
            self.spec.revision,
            # A missing head, or one for another number of classes, is replaced by a new one.
            fresh=lambda model, name: not name.startswith(f"{model.base_model_prefix}."),
            ignore_mismatched_sizes=True,
            **self.labels(),
        )
        if self.spec.input_size:
            try:
                model = with_image_size(model, self.size)
            except ValueError as error:
                raise self._refused(str(error)) from None
        base_modules = set(model.base_model.modules())
        if self.spec.head_dropout is not None:
            for layer in model.modules():
                if isinstance(layer, nn.Dropout) and layer not in base_modules:
                    layer.p = self.spec.head_dropout
        base_weights = set(model.base_model.parameters())
        head = [weight for weight in model.parameters() if weight not in base_weights]
        frozen = freeze(model, self.spec.trained, block_list(model.base_model), head)
        if self.spec.freeze_batch_norm:
            norms = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
            frozen += [layer for layer in model.modules() if isinstance(layer, norms)]
        return logits_of(model, frozen)

    def read_processor(self, model: str, revision: str | None) -> None:
        super().read_processor(model, revision)
        if self.spec.input_size:
            self.size = (self.spec.input_size, self.spec.input_size)
