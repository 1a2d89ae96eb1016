"""VGG11, 13, 16 and 19 (Simonyan and Zisserman 2015), from scratch or from ImageNet weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from engine.classifiers import Classifier, ClassifierSpec, at_size, checkpoint_in_words
from engine.classifiers._tuning import Trained, freeze, trained_in_words
from engine.core.errors import StudyError, brief, one_line
from engine.core.paths import local_path
from engine.nets.images import IMAGENET_MEAN, IMAGENET_STD, normalised
from engine.nets.pipelines import local_weights

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from engine.nets.classification import Training
    from engine.nets.vgg import VGG

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The network halves its input five times.
_LEAST_SIDE = 32


class VggSpec(ClassifierSpec):
    later_fields: ClassVar[tuple[str, ...]] = ("revision",)

    name: Literal["vgg"] = "vgg"
    depth: Literal[11, 13, 16, 19] = 19
    batch_norm: bool = False
    # A safetensors file, a folder with one, or a hub id (its model.safetensors); tensors have the
    # names of torchvision or timm. None: from scratch.
    weights: str | None = None
    # Commit or tag, for a hub id.
    revision: str | None = None
    # A number counts the last of seven blocks: five of convolutions and two hidden linear layers.
    trained: Trained = "all"
    # Side in pixels; None: the study's own, at least 32.
    input_size: Annotated[int, Field(ge=_LEAST_SIDE, le=1024)] | None = None
    # Width of the two hidden linear layers; at 4096 they have 120 of 140 million weights.
    hidden: Annotated[int, Field(ge=1, le=4096)] = 4096
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5


class Vgg(Classifier[VggSpec]):
    version = 1

    @staticmethod
    def in_words(spec: VggSpec) -> str:
        network = f"VGG{spec.depth}{' with batch normalisation' if spec.batch_norm else ''}"
        if spec.weights is None:
            return f"{network} trained from scratch{at_size(spec.input_size)}"
        given = f"from the weights {checkpoint_in_words(spec.weights)}"
        return f"{network} {given}, {trained_in_words(spec.trained)}{at_size(spec.input_size)}"

    def check(self, training: Training) -> None:
        if self.spec.weights is not None:
            # Training downloads weights from the hub; planning does not.
            if not _on_hub(self.spec.weights):
                _file_of(self.spec.weights, None)
        elif self.spec.trained != "all":
            raise StudyError(
                f"classifier.trained: {self.spec.trained} would freeze random weights; set weights,"
                " or trained: all"
            )

    def external_digests(self) -> Mapping[str, str]:
        return local_weights(self.spec, "weights")

    def build(self) -> Module:
        from engine.nets.vgg import adopt, initialise

        self.side = self.spec.input_size or max(self.preprocess.size, _LEAST_SIDE)
        network = initialise(self._empty(self._settings()).to_empty(device="cpu"))
        if self.spec.weights is not None:
            path = _file_of(self.spec.weights, self.spec.revision)
            try:
                adopt(network, _read(path))
            except ValueError as error:
                raise StudyError(
                    f"classifier.weights: {path} does not fit this VGG{self.spec.depth}: {error};"
                    " check depth, batch_norm and hidden"
                ) from None
        head = network.classifier[6].parameters()
        network.keep_frozen(freeze(network, self.spec.trained, network.blocks(), head))
        return network

    def _settings(self) -> dict[str, Any]:
        """The arguments of the network, and the side of its input."""
        spec = self.spec
        return {
            "depth": spec.depth, "classes": len(self.classes), "batch_norm": spec.batch_norm,
            "hidden": spec.hidden, "dropout": spec.dropout, "input_size": self.side,
        }  # fmt: skip

    def _empty(self, settings: dict[str, Any]) -> VGG:
        import torch

        from engine.nets.vgg import VGG

        with torch.device("meta"):
            return VGG(**{name: value for name, value in settings.items() if name != "input_size"})

    def prepare(self, pixels: Tensor) -> Tensor:
        return normalised(pixels, (self.side, self.side), IMAGENET_MEAN, IMAGENET_STD)

    def save(self, network: Module, folder: Path) -> None:
        from safetensors.torch import save_file

        named = {name: value.contiguous() for name, value in network.state_dict().items()}
        save_file(named, folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps(self._settings()))

    def load(self, folder: Path) -> Module:
        from safetensors.torch import load_file

        settings = json.loads((folder / _CONFIG).read_text())
        self.side = settings["input_size"]
        network = self._empty(settings)
        network.load_state_dict(load_file(folder / _WEIGHTS), assign=True)
        return network.eval()


def _on_hub(name: str) -> bool:
    """Whether this is a hub id, such as timm/vgg19.tv_in1k, and not a path."""
    return bool(_HUB_ID.fullmatch(name)) and not local_path(name).exists()


def _file_of(name: str, revision: str | None) -> Path:
    """The safetensors file of a path or a hub id. Raises `StudyError`."""
    if _on_hub(name):
        return _downloaded(name, revision)
    path = local_path(name)
    if not path.exists():
        raise StudyError(f"classifier.weights: {name}: no such file or folder")
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    candidates = [file for file in files if file.name == _WEIGHTS] or files
    if len(candidates) != 1:
        raise StudyError(
            f"classifier.weights: {name} contains {len(files) or 'no'} safetensors files; name one"
            " file (pickles such as .pth are not read: save their tensors as safetensors)"
        )
    return candidates[0]


def _downloaded(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(name, _WEIGHTS, revision=revision))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise StudyError(
            f"classifier.weights: {name}: no such file or folder, and its {_WEIGHTS} cannot be"
            f" downloaded from the hub: {one_line(error)[:200]}"
        ) from None


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StudyError(
            f"classifier.weights: {path}: cannot be read as safetensors: {brief(error)}"
        ) from None
