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
from engine.nets.heads import SeveralTasks


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
        outputs = self.space.outputs if self.space else self.classes
        self.classifier = kind_of("classifiers", spec)(spec, self.preprocess, outputs)
        self.network = self.classifier.load(weights / "weights").to(device)
        self.device = device

    def label(self, images: np.ndarray) -> np.ndarray:
        inputs = self.classifier.features(images, self.device)
        prepare = self.classifier.prepare
        if self.space is None:
            return predict(self.network, prepare, inputs, self.device)
        outputs = predict(self.network, prepare, inputs, self.device, SeveralTasks(self.space))
        # Incomplete and rare combinations are never what an image shows.
        probabilities = np.zeros((len(images), len(self.classes)), np.float32)
        columns = [self.classes.index(cell) for cell in self.space.cells]
        probabilities[:, columns] = self.space.cell_probabilities(outputs)
        return probabilities
