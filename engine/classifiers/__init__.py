"""Classifiers: what the comparison trains. To add one, write `engine/classifiers/<name>.py` with
`<Name>(Classifier)`.

A classifier says what its network is and what the network is fed; the training that every arm
shares is `engine.nets.classification`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from engine.core.spec import Spec
from engine.data.images import Preprocess

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from engine.nets.classification import Training


class ClassifierSpec(Spec):
    name: str


class Classifier:
    """`build` makes a network for training, `load` brings back what `save` wrote."""

    version: ClassVar[int]
    Spec: ClassVar[type[ClassifierSpec]]
    # The network sees what `features` makes of images, computed once for all trials.
    on_features: ClassVar[bool] = False

    def __init__(self, spec: Any, preprocess: Preprocess, classes: Sequence[str]) -> None:
        self.spec, self.preprocess, self.classes = spec, preprocess, list(classes)

    @staticmethod
    def in_words(spec: Any) -> str:
        """The network as a paper names it: its plugin, where that says no more."""
        return f"the plugin {spec.name}"

    @staticmethod
    def uses(spec: Any) -> Sequence[tuple[str, Any]]:
        """Plugins of other families that a spec names, whose versions belong to the key as well."""
        return ()

    def outside(self) -> Mapping[str, str]:
        """Digests of the weights that it starts from, where they lie in local files: of a hub's,
        the revision tells."""
        return {}

    def check(self, training: Training) -> None:
        """Refuse what cannot work, when the study is read. Raises `StudyError`."""
        return

    def features(self, pixels: np.ndarray, device: str) -> np.ndarray:
        """What training does not change: uint8 (n, height, width, channels) as they are, or float32
        (n, width), each row a function of its image alone."""
        return pixels

    def learn(self, train: np.ndarray) -> None:
        """Learn from the `features` of the real train split, the same for every arm and open to
        reading alone, what `build` and `prepare` need of them."""
        return

    def build(self) -> Module:
        """A network from `prepare`d images to logits float (n, classes). Random weights are drawn
        from torch's global generator, which the caller has seeded."""
        raise NotImplementedError

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8 (n, channels, height, width), or vectors (n, width), on the device to what the
        network takes."""
        raise NotImplementedError

    def save(self, network: Module, folder: Path) -> None:
        """Write the network as safetensors and JSON."""
        raise NotImplementedError

    def load(self, folder: Path) -> Module:
        """The network that `save` wrote, on the CPU, for inference."""
        raise NotImplementedError


def checkpoint_in_words(model: str) -> str:
    """A hub's id as it is, and of a path its last part: where it lies says nothing of it."""
    local = model.startswith((".", "/", "~"))
    return Path(model).name or model if local else model


def at_size(input_size: int | None) -> str:
    return f", at {input_size} px" if input_size else ""
