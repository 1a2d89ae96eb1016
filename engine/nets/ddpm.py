"""Class-conditional diffusion (Ho et al. 2020): settings, network and sampling.

The UNet and the samplers are diffusers'. Conditions are numbers; the number after the last one
means "no condition".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from engine.core.errors import StudyError
from engine.core.spec import Spec, explained
from engine.nets.images import seeded_noise, to_pixels
from engine.nets.pipelines import LatentSpec
from engine.nets.pretrained import dtype_of

if TYPE_CHECKING:
    from torch import Tensor


class DdpmSettings(Spec):
    """How the network is built, trained and sampled."""

    # class: one embedding for each class. cluster: one for each cluster of each class.
    condition: Literal["class", "cluster"] = "class"
    # The network, in diffusers' names.
    block_out_channels: Annotated[tuple[int, ...], Field(min_length=1, max_length=6)] = (
        64,
        128,
        256,
    )
    layers_per_block: Annotated[int, Field(ge=1, le=4)] = 2
    # Self-attention at the levels whose feature maps are at most this wide.
    attention_resolution: Annotated[int, Field(ge=0)] = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # How time and condition enter each block: added to its maps, or as their scale and shift
    # (Dhariwal and Nichol 2021).
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    # The network sees squares of this many pixels as one position: about patch_size² times less
    # work (Luhman and Luhman 2022).
    patch_size: Literal[1, 2, 4] = 1
    # Diffusion in the latents of an autoencoder; None: in pixels.
    latent: LatentSpec | None = None
    # Training.
    train_steps: Annotated[int, Field(ge=1)] = 20_000
    batch_size: Annotated[int, Field(ge=1)] = 64
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 50
    lr_scheduler: Literal["constant_with_warmup", "cosine"] = "cosine"
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    num_train_timesteps: Annotated[int, Field(ge=10, le=4000)] = 1000
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    # What the network predicts: the noise, or the velocity (Salimans and Ho 2022).
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    # Weight of each noise level's loss: min(SNR, gamma) (Hang et al. 2023, who use 5); None: equal
    # weights.
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    # Share of rows trained without condition, for guidance.
    condition_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # How much more often rare classes are drawn: 0 not at all, 1 until all classes are equal.
    class_balance: Annotated[float, Field(ge=0, le=1)] = 0.5
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # Sampling.
    scheduler: Literal["ddim", "dpmsolver++"] = "ddim"
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance_scale: Annotated[float, Field(ge=0, le=50)] = 1.5

    @model_validator(mode="after")
    def _consistent(self) -> DdpmSettings:
        if any(width % 8 for width in self.block_out_channels):
            raise explained("block_out_channels must be multiples of 8")
        if self.num_inference_steps > self.num_train_timesteps:
            raise explained("num_inference_steps exceeds num_train_timesteps")
        if self.beta_schedule == "linear" and self.num_train_timesteps < 50:
            raise explained("beta_schedule: linear needs 50 timesteps")
        if (
            self.scheduler == "dpmsolver++"
            and self.num_inference_steps > 0.8 * self.num_train_timesteps
        ):
            # Its noise levels would coincide, and it divides by their differences.
            raise explained("dpmsolver++ takes at most 0.8 num_train_timesteps steps")
        if (
            self.latent is not None
            and self.prediction_type == "epsilon"
            and self.beta_schedule == "squaredcos_cap_v2"
        ):
            # The last timestep keeps nothing of the image to divide by, and latents are not
            # clipped.
            raise explained("latent needs prediction_type: v_prediction, or beta_schedule: linear")
        if self.guidance_scale != 1 and self.condition_dropout == 0:
            raise explained("guidance needs condition_dropout > 0, or guidance_scale 1")
        return self


def check_halvings(settings: DdpmSettings, size: int) -> None:
    """Raise `StudyError` if the network cannot halve images, or latents, of this side."""
    halvings, patch = len(settings.block_out_channels) - 1, settings.patch_size
    if size % (2**halvings * patch):
        squares = f" in squares of {patch} px" if patch > 1 else ""
        latent = "the latent of " if settings.latent is not None else ""
        raise StudyError(
            f"generators: ddpm halves the image{squares} {halvings} times, which {latent}{size}"
            " px does not allow; change preprocess.size, patch_size or block_out_channels"
        )


def build_unet(settings: DdpmSettings, side: int, channels: int, conditions: int) -> Any:
    """The `UNet2DModel` for images or latents of a side, with an embedding for each condition."""
    import torch
    from diffusers import UNet2DModel

    side, channels = side // settings.patch_size, channels * settings.patch_size**2
    levels = [side >> level for level in range(len(settings.block_out_channels))]
    attends = [width <= settings.attention_resolution for width in levels]
    unet: Any = UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=settings.block_out_channels,
        layers_per_block=settings.layers_per_block,
        down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        num_class_embeds=conditions,
        norm_num_groups=8,
        attention_head_dim=8 if any(attends) else None,
        add_attention=any(attends),
        dropout=settings.dropout,
        resnet_time_scale_shift=settings.resnet_time_scale_shift,
    )
    return unet.to(memory_format=torch.channels_last)


def predict(unet: Any, images: Tensor, timesteps: Tensor, conditions: Tensor, patch: int) -> Tensor:
    """The network's prediction for noisy images (n, channels, height, width)."""
    import torch

    if patch == 1:
        return torch.as_tensor(unet(images, timesteps, conditions).sample)
    patches = torch.nn.functional.pixel_unshuffle(images, patch)
    predicted = unet(patches, timesteps, conditions).sample
    return torch.nn.functional.pixel_shuffle(predicted, patch)


def sampling_scheduler(settings: DdpmSettings, trained: Mapping[str, Any]) -> Any:
    """The scheduler that samples, from the configuration of the one used in training."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
    config = {name: trained[name] for name in names}
    # Pixels lie in [-1, 1], latents anywhere. Clipping the predicted clean image keeps guidance
    # from overexposing it.
    in_pixels = settings.latent is None
    if settings.scheduler == "ddim":
        scheduler: Any = DDIMScheduler(
            **config, clip_sample=in_pixels, set_alpha_to_one=True, timestep_spacing="trailing"
        )
        return scheduler
    # Near pure noise the clean image is a small difference divided by almost zero: start a little
    # later on the cosine schedule, and clip, as the authors advise for pixels.
    scheduler = DPMSolverMultistepScheduler(
        **config, algorithm_type="dpmsolver++", final_sigmas_type="zero",
        lambda_min_clipped=-5.1, thresholding=in_pixels,
    )  # fmt: skip
    return scheduler


def denoise(
    settings: DdpmSettings,
    unet: Any,
    scheduler: Any,
    autoencoder: Any,
    conditions: np.ndarray,
    unconditional: int,
    seeds: Sequence[int],
    device: str,
    steps: int,
    channels: int,
) -> list[np.ndarray | str]:
    """Sample one uint8 image (height, width, channels), or the reason why there is none, for each
    condition number and seed.

    unconditional: the number of "no condition". channels: 1 averages the autoencoder's colours.
    """
    import torch

    numbers = torch.from_numpy(conditions).to(device)
    side = unet.config.sample_size * settings.patch_size
    noise = seeded_noise(seeds, unet.config.in_channels // settings.patch_size**2, side, side)
    images = noise.to(device) * scheduler.init_noise_sigma
    without_condition = torch.full_like(numbers, unconditional)
    scheduler.set_timesteps(steps, device=device)
    # Sample grids of a training ignore the settings of sampling: a network that never trained "no
    # condition" has no guidance.
    guidance = settings.guidance_scale if settings.condition_dropout else 1.0
    dtype = dtype_of(settings.precision)
    kind = torch.device(device).type
    with torch.inference_mode(), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        for timestep in scheduler.timesteps:
            inputs = scheduler.scale_model_input(images, timestep)
            if guidance != 1:
                both = predict(
                    unet, torch.cat([inputs, inputs]), timestep,
                    torch.cat([numbers, without_condition]), settings.patch_size,
                )  # fmt: skip
                conditional, plain = both.float().chunk(2)
                guided = plain + guidance * (conditional - plain)
                images = guided_step(scheduler, conditional, guided, timestep, images)
            else:
                predicted = predict(unet, inputs, timestep, numbers, settings.patch_size).float()
                images = scheduler.step(predicted, timestep, images).prev_sample
    if autoencoder is not None:
        # In full precision: some autoencoders exceed the range of fp16.
        shift = autoencoder.config.shift_factor or 0.0
        with torch.inference_mode():
            latents = images.float() / autoencoder.config.scaling_factor + shift
            images = autoencoder.decode(latents).sample.float()
        if channels < images.shape[1]:
            images = images.mean(1, keepdim=True)
    return to_pixels(images)


def guided_step(
    scheduler: Any, conditional: Tensor, guided: Tensor, timestep: Any, images: Tensor
) -> Tensor:
    """One step of a sampler with a guided prediction; `conditional` is the one without guidance.

    For DDIM: the step of `conditional`, moved by the change that guidance makes to the clipped
    clean image, with its noise. If the guided image alone is clipped, the clipped part stays in the
    noise and returns as light, step by step, until a 1 reads as an 8; if the noise is recomputed
    from the clipped image, the grain of a network that is not fully trained stays. Without clipping
    this is the guided step itself.
    """
    import torch
    from diffusers import DDIMScheduler

    if not isinstance(scheduler, DDIMScheduler):
        return torch.as_tensor(scheduler.step(guided, timestep, images).prev_sample)
    sampler: Any = scheduler
    plain = sampler.step(conditional, timestep, images)
    clean = sampler.step(guided, timestep, images).pred_original_sample
    before = timestep - sampler.config.num_train_timesteps // sampler.num_inference_steps
    kept = sampler.alphas_cumprod[timestep]
    kept_before = sampler.alphas_cumprod[before] if before >= 0 else sampler.final_alpha_cumprod
    share = kept_before.sqrt() - ((1 - kept_before) * kept / (1 - kept)).sqrt()
    return torch.as_tensor(plain.prev_sample + share * (clean - plain.pred_original_sample))
