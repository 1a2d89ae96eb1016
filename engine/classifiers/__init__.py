"""Classifiers: what the comparison trains. To add one, write `engine/classifiers/<name>.py` with
`<Name>(Classifier)`.

A classifier defines its network and the inputs of the network; `engine.nets.classification` trains
it in the same way for every arm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from engine.core.paths import local_path
from engine.core.spec import Configured, S, Spec
from engine.data.images import Preprocess

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from engine.nets.classification import Training


class ClassifierSpec(Spec):
    name: str


class Classifier(Configured[S]):
    """`build` makes a network for training; `load` reads a network that `save` wrote."""

    version: ClassVar[int]
    # Whether the inputs of the network are `features` of the images, computed once for all trials.
    on_features: ClassVar[bool] = False

    def __init__(self, spec: S, preprocess: Preprocess, classes: Sequence[str]) -> None:
        self.spec, self.preprocess, self.classes = spec, preprocess, list(classes)

    @staticmethod
    def in_words(spec: Any) -> str:
        """The network as a paper would name it."""
        return f"the plugin {spec.name}"

    @staticmethod
    def uses(spec: Any) -> Sequence[tuple[str, Any]]:
        """The plugins of other families in a spec; their versions are part of the key."""
        return ()

    def external_digests(self) -> Mapping[str, str]:
        """Digests of local files with the initial weights, by field. Weights from a hub are
        identified by their revision."""
        return {}

    def check(self, training: Training) -> None:
        """Check the spec when the study is read. Raises `StudyError` if it cannot work."""

    def features(self, pixels: np.ndarray, device: str) -> np.ndarray:
        """The inputs that training does not change: the pixels, uint8 (n, height, width, channels),
        or vectors, float32 (n, width), each a function of its image only."""
        return pixels

    def learn(self, train: np.ndarray) -> None:
        """Compute statistics that `build` and `prepare` need, from the `features` of the real train
        split; the array is read-only and the same for every arm."""

    def build(self) -> Module:
        """A network from `prepare`d images to logits, float (n, classes). Random weights come from
        torch's global generator, which the caller has seeded."""
        raise NotImplementedError

    def prepare(self, pixels: Tensor) -> Tensor:
        """Images, uint8 (n, channels, height, width), or vectors (n, width), on the device, to the
        inputs of the network."""
        raise NotImplementedError

    def save(self, network: Module, folder: Path) -> None:
        """Write the network as safetensors and JSON."""
        raise NotImplementedError

    def load(self, folder: Path) -> Module:
        """The network that `save` wrote, on the CPU, for inference."""
        raise NotImplementedError


def checkpoint_in_words(model: str) -> str:
    """A hub id unchanged, or the last part of a local path."""
    local = model.startswith((".", "/", "~", "$"))
    return local_path(model).name or model if local else model


def at_size(input_size: int | None) -> str:
    """The input size as a phrase to append; empty for the study's own size."""
    return f", at {input_size} px" if input_size else ""
