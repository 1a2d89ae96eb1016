"""Any image classifier of transformers (ResNet, EfficientNet, MobileNet, ViT, ConvNeXt, DINOv2 …),
fine-tuned from a hub id or a local folder with a new head: as a whole, its last blocks, or the head
alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from engine.classifiers import ClassifierSpec, at_size, checkpoint_in_words
from engine.classifiers._transformers import TransformersClassifier, logits_of
from engine.classifiers._tuning import Trained, block_list, freeze, trained_in_words
from engine.core.errors import StudyError
from engine.nets.checkpoints import load_model
from engine.nets.pipelines import local_weights
from engine.nets.positions import refusal, with_image_size

if TYPE_CHECKING:
    from torch.nn import Module

    from engine.nets.classification import Training


class PretrainedSpec(ClassifierSpec):
    name: Literal["pretrained"] = "pretrained"
    model: str
    revision: str | None = None
    # Side in pixels; None: what the checkpoint was trained at. Positions that a ViT has learnt are
    # interpolated.
    input_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    trained: Trained = "all"
    # Keep the statistics of batch normalisation as they were learnt: those of small batches are
    # poor ones, several workers would each have their own, and some checkpoints (folded ones) die
    # of new ones.
    freeze_batch_norm: bool = True
    # Dropout before the new head; None: what the checkpoint says, which may be 0.8.
    head_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None


class Pretrained(TransformersClassifier):
    version: ClassVar[int] = 2
    Spec: ClassVar[type[ClassifierSpec]] = PretrainedSpec
    spec: PretrainedSpec

    @staticmethod
    def in_words(spec: PretrainedSpec) -> str:
        tuned = f"{checkpoint_in_words(spec.model)}, {trained_in_words(spec.trained)}"
        return tuned + at_size(spec.input_size)

    def outside(self) -> Mapping[str, str]:
        return local_weights(self.spec, "model")

    def check(self, training: Training) -> None:
        if side := self.spec.input_size:
            why = refusal(self.spec.model, self.spec.revision, (side, side))
            if why:
                raise self._refused(why)

    def _refused(self, why: str) -> StudyError:
        return StudyError(
            f"classifier.input_size: {self.spec.model} takes no images of {self.spec.input_size}"
            f" px: {why}; leave input_size out, or name another checkpoint"
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
            # A checkpoint without a head, or with one of another number of classes, gets a new one.
            fresh=lambda made, name: not name.startswith(f"{made.base_model_prefix}."),
            ignore_mismatched_sizes=True,
            **self.labels(),
        )
        if self.spec.input_size:
            try:
                model = with_image_size(model, self.size)
            except ValueError as error:
                raise self._refused(str(error)) from None
        of_base = set(model.base_model.modules())
        if self.spec.head_dropout is not None:
            for layer in model.modules():
                if isinstance(layer, nn.Dropout) and layer not in of_base:
                    layer.p = self.spec.head_dropout
        base = set(model.base_model.parameters())
        head = [one for one in model.parameters() if one not in base]
        still = freeze(model, self.spec.trained, block_list(model.base_model), head)
        if self.spec.freeze_batch_norm:
            norms = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
            still += [layer for layer in model.modules() if isinstance(layer, norms)]
        return logits_of(model, still)

    def read_processor(self, model: str, revision: str | None) -> None:
        super().read_processor(model, revision)
        if self.spec.input_size:
            self.size = (self.spec.input_size, self.spec.input_size)
