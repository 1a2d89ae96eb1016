"""Noise levels and losses of diffusion and of rectified flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.core.errors import StudyError
from engine.nets.pipelines import DenoisingSettings


def noise_loss(
    scheduler: Any,
    predicted: Tensor,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    snr_gamma: float | None,
) -> Tensor:
    """Losses (n,) of a denoiser's prediction for images (n, …), by the scheduler's
    `prediction_type`.

    snr_gamma: noise levels have the weight min(SNR, gamma) (Hang et al. 2023); None: equal weights.
    """
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(clean, noise, timesteps) if velocity else noise
    losses: Tensor = (predicted.float() - target.float()).square().flatten(1).mean(1)
    if snr_gamma is None:
        return losses
    kept = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr: Tensor = kept / (1 - kept)
    # The weight is for the clean image's loss: for noise divide by SNR, for velocity by SNR + 1.
    return losses * snr.clamp(max=snr_gamma) / (snr + 1 if velocity else snr)


class Diffusion:
    """The noise of a DDPM, whose denoiser is a UNet (Stable Diffusion 1, 2, XL)."""

    def __init__(self, pipeline: Any, settings: DenoisingSettings) -> None:
        from diffusers import DDPMScheduler

        changed = {"prediction_type": settings.prediction_type} if settings.prediction_type else {}
        kind: Any = DDPMScheduler
        self.scheduler = kind.from_config(pipeline.scheduler.config, **changed)
        self.kind = self.scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction"):
            raise StudyError(
                f"generators: the checkpoint predicts {self.kind!r}, but only epsilon and"
                " v_prediction can be trained; set adapt.prediction_type"
            )
        self.snr_gamma, self.steps = settings.snr_gamma, self.scheduler.config.num_train_timesteps

    def levels(self, draws: Sequence[torch.Generator]) -> Tensor:
        """A uniformly drawn timestep for each image."""
        drawn = [torch.randint(self.steps, (1,), generator=draw) for draw in draws]
        return torch.cat(drawn)

    def add_noise(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        return torch.as_tensor(self.scheduler.add_noise(clean, noise, levels))

    def timesteps(self, levels: Tensor) -> Tensor:
        return levels

    def losses(self, predicted: Tensor, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        return noise_loss(self.scheduler, predicted, clean, noise, levels, self.snr_gamma)

    def configure(self, pipeline: Any) -> None:
        """Make the pipeline sample with the trained prediction type."""
        config = pipeline.scheduler.config
        if config.prediction_type != self.kind:
            pipeline.scheduler = type(pipeline.scheduler).from_config(
                config, prediction_type=self.kind
            )


class Flow:
    """Rectified flow: straight lines from images to noise, whose direction the denoiser predicts
    (Esser et al. 2024; Stable Diffusion 3, FLUX)."""

    def __init__(self, pipeline: Any, settings: DenoisingSettings) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        kind: Any = FlowMatchEulerDiscreteScheduler
        self.scheduler = kind.from_config(pipeline.scheduler.config)
        self.settings = settings

    def levels(self, draws: Sequence[torch.Generator]) -> Tensor:
        """An index into the scheduler's noise levels for each image."""
        settings, levels = self.settings, []
        for draw in draws:
            if settings.weighting_scheme == "logit_normal":
                normal = torch.randn(1, generator=draw)
                place = torch.sigmoid(settings.logit_mean + settings.logit_std * normal)
            else:
                place = torch.rand(1, generator=draw)
            levels.append((place * len(self.scheduler.sigmas[:-1])).long())
        return torch.cat(levels).clamp(max=len(self.scheduler.timesteps) - 1)

    def _sigmas(self, levels: Tensor, like: Tensor) -> Tensor:
        sigmas = self.scheduler.sigmas.to(levels.device)[levels]
        return torch.as_tensor(sigmas.view(-1, *[1] * (like.ndim - 1)))

    def add_noise(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        sigmas = self._sigmas(levels, clean)
        return (1 - sigmas) * clean + sigmas * noise

    def timesteps(self, levels: Tensor) -> Tensor:
        return torch.as_tensor(self.scheduler.timesteps.to(levels.device)[levels])

    def losses(self, predicted: Tensor, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        losses = (predicted.float() - (noise - clean).float()).square().flatten(1).mean(1)
        sigmas = self._sigmas(levels, losses)
        if self.settings.weighting_scheme == "sigma_sqrt":
            return losses / sigmas.square()
        if self.settings.weighting_scheme == "cosmap":
            return losses * 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas.square()))
        return losses

    def configure(self, pipeline: Any) -> None:
        """Nothing to change: a flow has one prediction type."""
