"""Shared by embedders with a pretrained checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field
from typing_extensions import TypeVar

from engine.core.errors import StudyError, brief, one_line
from engine.embedders import Embedder, EmbedderSpec
from engine.nets.model_input import ModelInput
from engine.nets.positions import interpolate_positions
from engine.nets.pretrained import dtype_of, load_model

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


# Maximum pixels per forward pass on a CPU. Larger batches of a convolutional network need tensors
# beyond 32 MiB, which do not fit caches and are returned to the system and faulted in again on each
# pass (see `keep_freed_memory`).
_CPU_PIXELS = 2**18


class CheckpointSpec(EmbedderSpec):
    # Hub id or local folder.
    model: Annotated[str, Field(examples=["microsoft/resnet-50"])]
    revision: str | None = None
    # Side of the input in pixels; None: as in the checkpoint's own preprocessing.
    input_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"


C = TypeVar("C", bound=CheckpointSpec, default=Any)


class CheckpointEmbedder(Embedder[C]):
    """A subclass chooses the network and its output."""

    # Whether vectors are normalised to length 1, as their authors compare them.
    unit_length = False

    def open(self) -> None:
        spec = self.spec
        self.input = ModelInput.of("embedder", spec.model, spec.revision, spec.input_size)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        return self.input.fitted(image)

    def network(self) -> tuple[Module, Callable[[Module, Tensor], Tensor]]:
        """The network, and a function (network, images) -> vectors (n, width).

        May raise the errors of `from_pretrained`.
        """
        raise NotImplementedError

    def pretrained(self, kind: Any) -> tuple[Any, list[str]]:
        """The checkpoint as a transformers model, and the pooler weights that it lacks."""
        return load_model(
            "embedder", kind, self.spec.model, self.spec.revision,
            fresh=lambda model, name: "pooler" in name,
        )  # fmt: skip

    def load(self, device: str) -> None:
        if not hasattr(self, "input"):
            self.open()
        try:
            network, self.vectors = self.network()
        except (OSError, ValueError, KeyError) as error:
            raise StudyError(f"embedder.model: {self.spec.model}: {brief(error)}") from None
        if self.spec.input_size:
            interpolate_positions(network)
        self.device, self.dtype = device, dtype_of(self.spec.precision)
        self.loaded = network.to(device=device, dtype=self.dtype).eval().requires_grad_(False)
        grey = self.prepare(np.zeros((32, 32, 3), np.uint8))
        try:
            self.width = self.encode(grey[None]).shape[1]
        except (ValueError, RuntimeError) as error:
            if not self.spec.input_size:
                raise
            raise StudyError(
                f"embedder.input_size: {self.spec.model} does not accept images of"
                f" {self.spec.input_size} px: {one_line(error)}; remove input_size, or choose"
                " another checkpoint"
            ) from None

    def encode(self, prepared: np.ndarray) -> np.ndarray:
        if self.device != "cpu":
            return self._encode(prepared)
        # Pieces of nearly equal size, because the library plans the network again for each shape.
        pieces = -(-prepared[:, 0].size // _CPU_PIXELS)
        size = -(-len(prepared) // pieces)
        return np.concatenate(
            [self._encode(prepared[start : start + size])
             for start in range(0, len(prepared), size)]
        )  # fmt: skip

    def _encode(self, prepared: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            images = self.input.values(prepared, self.device).to(self.dtype)
            vectors = self.vectors(self.loaded, images).flatten(1).float()
            if self.unit_length:
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
            return np.asarray(vectors.cpu().numpy())
