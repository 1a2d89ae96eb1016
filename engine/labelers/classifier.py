"""A classifier trained on the train split: the study's, or another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, SerializeAsAny

from engine.core.registry import PluginField, kind_of
from engine.core.spec import Spec
from engine.labelers import Labeler, LabelerSpec
from engine.nets.classification import Training, predict


class ClassifierSpec(LabelerSpec):
    name: Literal["classifier"] = "classifier"
    # None: the classifier and the training of the comparison.
    classifier: (
        Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("classifiers"))] | None
    ) = None
    training: Training | None = None


class Classifier(Labeler[ClassifierSpec]):
    version = 1
    trained = True

    def load(self, weights: Path | None, device: str) -> None:
        assert weights is not None, "a trained labeler has weights"
        spec: Any = self.spec.classifier
        self.classifier = kind_of("classifiers", spec)(spec, self.preprocess, self.classes)
        self.network = self.classifier.load(weights / "weights").to(device)
        self.device = device

    def label(self, images: np.ndarray) -> np.ndarray:
        inputs = self.classifier.features(images, self.device)
        return predict(self.network, self.classifier.prepare, inputs, self.device)
