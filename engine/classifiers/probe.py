"""A linear layer, optionally after one hidden layer, on the vectors of a frozen embedder (linear
probe, Alain and Bengio 2017): trains in seconds instead of minutes, for searches over many arms.

Vectors are computed once for all trials and standardised by the statistics of the real train split.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, SerializeAsAny

from engine.classifiers import Classifier, ClassifierSpec, checkpoint_in_words
from engine.core.errors import StudyError
from engine.core.registry import PluginField, resolve
from engine.core.spec import Spec
from engine.nets.pipelines import local_weights

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from engine.nets.classification import Training

_WEIGHTS = "model.safetensors"
_BATCH = 256
_CACHE_BYTES = 128 * 2**20


class ProbeSpec(ClassifierSpec):
    name: Literal["probe"] = "probe"
    embedder: Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("embedders"))] = Field(
        default={"name": "pixels"}, validate_default=True
    )
    # Width of the hidden layer; None: no hidden layer.
    hidden: Annotated[int, Field(ge=1, le=8192)] | None = None
    # Dropout before the last layer.
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Vectors:
    """An embedder with a cache of its most recent batches, up to 128 MiB: evaluation passes the
    same images to many probes."""

    def __init__(self, embedder: Any) -> None:
        self.embedder = embedder
        self.cache: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, channels) to float32 (n, width)."""
        key = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).digest()
        if key not in self.cache:
            self.cache[key] = self.embedder.embed(pixels)
        self.cache.move_to_end(key)
        while len(self.cache) > 1 and sum(v.nbytes for v in self.cache.values()) > _CACHE_BYTES:
            self.cache.popitem(last=False)
        return self.cache[key]


@lru_cache(maxsize=1)
def _vectors(name: str, fields: str, device: str) -> Vectors:
    """The vectors of an embedder, loaded once per process. fields: its spec as JSON."""
    kind = resolve("embedders", name)
    embedder = kind(kind.Spec.model_validate_json(fields))
    embedder.open()
    embedder.load(device)
    return Vectors(embedder)


class Probe(Classifier[ProbeSpec]):
    version = 1
    on_features = True

    @staticmethod
    def in_words(spec: ProbeSpec) -> str:
        embedder: Any = spec.embedder
        model = getattr(embedder, "model", None)
        of = f"{embedder.name} ({checkpoint_in_words(model)})" if model else embedder.name
        kind = f"a probe with a hidden layer of {spec.hidden}" if spec.hidden else "a linear probe"
        return f"{kind} on frozen vectors of {of}"

    @staticmethod
    def uses(spec: ProbeSpec) -> Sequence[tuple[str, Any]]:
        return [("embedders", spec.embedder)]

    def external_digests(self) -> Mapping[str, str]:
        # The fields in which embedders name their weights.
        return local_weights(self.spec.embedder, "model", "weights")

    def check(self, training: Training) -> None:
        if fields := training.pixel_settings():
            raise StudyError(
                f"training.{fields[0]}: changes pixels, but a probe trains on precomputed vectors;"
                " remove it, or choose another classifier"
            )

    def features(self, pixels: np.ndarray, device: str) -> np.ndarray:
        name = str(getattr(self.spec.embedder, "name", ""))
        vectors = _vectors(name, self.spec.embedder.model_dump_json(), device)
        pieces = [pixels[start : start + _BATCH] for start in range(0, len(pixels), _BATCH)]
        return np.concatenate([vectors.of(piece) for piece in pieces])

    def learn(self, train: np.ndarray) -> None:
        self.mean = train.mean(0, dtype=np.float64)
        squares = np.einsum("ij,ij->j", train, train, dtype=np.float64) / len(train)
        deviation = np.sqrt(np.maximum(squares - self.mean**2, 0))
        # A constant feature carries no information and must not be scaled up.
        self.deviation = np.where(deviation > 1e-6 * np.abs(self.mean) + 1e-12, deviation, 1.0)

    def build(self) -> Module:
        from torch import nn

        width, layers = len(self.mean), []
        if self.spec.hidden is not None:
            layers += [nn.Linear(width, self.spec.hidden), nn.ReLU()]
            width = self.spec.hidden
        return nn.Sequential(
            *layers, nn.Dropout(self.spec.dropout), nn.Linear(width, len(self.classes))
        )

    def prepare(self, pixels: Tensor) -> Tensor:
        import torch

        mean, deviation = (
            torch.from_numpy(value).to(pixels.device, torch.float32)
            for value in (self.mean, self.deviation)
        )
        return (pixels - mean) / deviation

    def save(self, network: Module, folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        named = {name: value.contiguous() for name, value in network.state_dict().items()}
        named |= {"mean": torch.from_numpy(self.mean), "std": torch.from_numpy(self.deviation)}
        save_file(named, folder / _WEIGHTS)

    def load(self, folder: Path) -> Module:
        from safetensors.torch import load_file

        named = load_file(folder / _WEIGHTS)
        self.mean, self.deviation = named.pop("mean").numpy(), named.pop("std").numpy()
        network = self.build()
        network.load_state_dict(named)
        return network.eval()
