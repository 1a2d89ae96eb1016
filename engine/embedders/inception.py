"""Features of Inception v3, the usual input of published Fréchet and kernel distances.

`weights` is a safetensors file of pytorch-fid's weights (`pt_inception-2015-12-05-6726825d.pth`,
a pickle that must be converted once).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from engine.core.errors import StudyError, brief
from engine.core.paths import expanded, local_path
from engine.embedders import Embedder, EmbedderSpec
from engine.nets.pretrained import dtype_of

# Images of 299 by 299 pixels per forward pass on a CPU.
_CPU_BATCH = 8


class InceptionSpec(EmbedderSpec):
    name: Literal["inception"] = "inception"
    weights: str
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"


class Inception(Embedder[InceptionSpec]):
    version = 1

    def open(self) -> None:
        if not local_path(self.spec.weights).is_file():
            raise StudyError(f"embedder.weights: {self.spec.weights}: no such file")

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """uint8 (3, height, width); the network itself resizes images."""
        colour = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
        return np.ascontiguousarray(colour.transpose(2, 0, 1))

    def load(self, device: str) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from engine.nets.inception import WIDTH, load_inception

        self.open()
        try:
            network = load_inception(load_file(expanded(self.spec.weights)))
        except (SafetensorError, ValueError) as error:
            raise StudyError(
                f"embedder.weights: {self.spec.weights}: {brief(error, 240)}"
            ) from None
        self.device, self.dtype, self.width = device, dtype_of(self.spec.precision), WIDTH
        self.network: Any = network.to(device, self.dtype).eval().requires_grad_(False)

    def encode(self, prepared: np.ndarray) -> np.ndarray:
        import torch

        size = _CPU_BATCH if self.device == "cpu" else len(prepared)
        vectors = []
        with torch.inference_mode():
            for start in range(0, len(prepared), size):
                images = torch.from_numpy(prepared[start : start + size]).to(self.device)
                vectors.append(self.network(images.to(self.dtype)).float().cpu().numpy())
        return np.concatenate(vectors)
