"""Class-conditional diffusion (Ho et al. 2020) in pixels or in latents (Rombach et al. 2022), with
classifier-free guidance (Ho and Salimans 2022).

An image is conditioned on its class, or on its cluster within the class. The weights are diffusers
folders: `UNet2DModel` with the averaged weights, and `AutoencoderKL` for diffusion in latents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.core.errors import StudyError
from engine.generators import Conditions, Generator, GeneratorSpec, SampleBatch, TrainingImages
from engine.nets.ddpm import DdpmSettings, check_halvings, denoise, sampling_scheduler
from engine.work.fit import FitContext


class DdpmSpec(DdpmSettings, GeneratorSpec):
    name: Literal["ddpm"] = "ddpm"


class Ddpm(Generator[DdpmSpec]):
    version = 4
    trainable = True
    sampling_fields = (
        "scheduler",
        "num_inference_steps",
        "guidance_scale",
    )

    def check(self) -> None:
        latent, size = self.spec.latent, self.preprocess.size
        if latent is not None and latent.model is not None:
            return  # the given autoencoder defines the size of its latents
        if latent is not None:
            factor = 2 ** (len(latent.block_out_channels) - 1)
            if size % factor:
                raise StudyError(
                    f"generators: ddpm: latent.block_out_channels shrinks images {factor} times,"
                    f" which {size} px does not allow; change preprocess.size or the number of"
                    " channels"
                )
            size //= factor
        check_halvings(self.spec, size)

    def uses_clusters(self) -> bool:
        return self.spec.condition == "cluster"

    def fingerprint(self) -> dict[str, Any]:
        return {name: getattr(self.spec, name) for name in (*self.sampling_fields, "precision")}

    def fit(self, context: FitContext, data: TrainingImages, seed: int) -> None:
        from engine.generators._ddpm_fit import fit

        fit(self.spec, context, data, seed)

    def load(self, weights: Path | None, device: str) -> None:
        import torch
        from diffusers import AutoencoderKL, UNet2DModel

        if weights is None:
            raise StudyError("generators: ddpm has no weights to load; train it first")
        self.device = device
        unet: Any = UNet2DModel.from_pretrained(weights / "unet", use_safetensors=True)
        self.unet = unet.to(device).eval()
        self.autoencoder: Any = None
        if self.spec.latent is not None:
            self.autoencoder = AutoencoderKL.from_pretrained(weights / "vae", use_safetensors=True)
            self.autoencoder.to(device).eval()
        if device == "cuda":
            self.unet.to(memory_format=torch.channels_last)
        self.conditions = Conditions.load(weights, self.spec.condition)
        trained = json.loads((weights / "scheduler" / "scheduler_config.json").read_text())
        self.scheduler = sampling_scheduler(self.spec, trained)

    def sample(self, batch: SampleBatch) -> list[np.ndarray | str]:
        return denoise(
            self.spec, self.unet, self.scheduler, self.autoencoder,
            self.conditions.numbered(batch.labels, batch.clusters), len(self.conditions),
            batch.seeds, self.device, self.spec.num_inference_steps, self.preprocess.shape[2],
        )  # fmt: skip
