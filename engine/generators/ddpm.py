"""Class-conditional diffusion (Ho et al. 2020) in pixels or in latents (Rombach et al. 2022), with
classifier-free guidance (Ho and Salimans 2022).

The UNet, the autoencoder and the samplers are diffusers'. An image is conditioned on its class, or
on its cluster within the class; one more embedding stands for "no condition". What is saved are
diffusers folders: `UNet2DModel` with the averaged weights, and `AutoencoderKL` where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from engine.core.errors import StudyError
from engine.generators import (
    Conditions,
    Generator,
    GeneratorSpec,
    SampleBatch,
    TrainingImages,
)
from engine.nets.checkpoints import dtype_of
from engine.nets.pipelines import LatentSpec
from engine.work.fit import FitContext


class DdpmSpec(GeneratorSpec):
    name: Literal["ddpm"] = "ddpm"
    # class: one embedding for each class. cluster: one for each cluster of each class.
    condition: Literal["class", "cluster"] = "class"
    # The network, in diffusers' names.
    block_out_channels: Annotated[tuple[int, ...], Field(min_length=1, max_length=6)] = (
        64,
        128,
        256,
    )
    layers_per_block: Annotated[int, Field(ge=1, le=4)] = 2
    # Self-attention at the levels whose feature maps are at most so wide.
    attention_resolution: Annotated[int, Field(ge=0)] = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # How time and condition enter each block: added to its maps, or as their scale and shift
    # (Dhariwal and Nichol 2021).
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    # Squares of so many pixels are one place to the network: about patch_size² times less work
    # (Luhman and Luhman 2022).
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
    # Weigh the loss of each noise level by min(SNR, gamma) (Hang et al. 2023, who take 5); None:
    # all alike.
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    # Share of rows trained without condition, for guidance.
    condition_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # How far rare classes are drawn more often: 0 not at all, 1 until all classes are drawn alike.
    class_balance: Annotated[float, Field(ge=0, le=1)] = 0.5
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # Sampling.
    scheduler: Literal["ddim", "dpmsolver++"] = "ddim"
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance_scale: Annotated[float, Field(ge=0, le=50)] = 1.5

    @model_validator(mode="after")
    def _fits(self) -> DdpmSpec:
        if any(width % 8 for width in self.block_out_channels):
            raise PydanticCustomError("explained", "block_out_channels must be multiples of 8")
        if self.num_inference_steps > self.num_train_timesteps:
            raise PydanticCustomError(
                "explained", "num_inference_steps exceeds num_train_timesteps"
            )
        if self.beta_schedule == "linear" and self.num_train_timesteps < 50:
            raise PydanticCustomError("explained", "beta_schedule: linear needs 50 timesteps")
        if (
            self.scheduler == "dpmsolver++"
            and self.num_inference_steps > 0.8 * self.num_train_timesteps
        ):
            # Its levels would fall together, and it divides by what lies between them.
            raise PydanticCustomError(
                "explained", "dpmsolver++ takes at most 0.8 num_train_timesteps steps"
            )
        if (
            self.latent is not None
            and self.prediction_type == "epsilon"
            and self.beta_schedule == "squaredcos_cap_v2"
        ):
            # At its end nothing of the image is left to divide by, and latents are not clipped.
            raise PydanticCustomError(
                "explained", "latent needs prediction_type: v_prediction, or beta_schedule: linear"
            )
        if self.guidance_scale != 1 and self.condition_dropout == 0:
            raise PydanticCustomError(
                "explained", "guidance needs condition_dropout > 0, or guidance_scale 1"
            )
        return self


class Ddpm(Generator):
    version: ClassVar[int] = 4
    Spec: ClassVar[type[GeneratorSpec]] = DdpmSpec
    trainable = True
    sampling_fields: ClassVar[tuple[str, ...]] = (
        "scheduler",
        "num_inference_steps",
        "guidance_scale",
    )
    spec: DdpmSpec

    def check(self) -> None:
        spec, size = self.spec, self.preprocess.size
        if spec.latent is not None and spec.latent.model is None:
            smaller = 2 ** (len(spec.latent.block_out_channels) - 1)
            if size % smaller:
                raise StudyError(
                    f"generators: ddpm's latent.block_out_channels make {smaller} px one, which"
                    f" {size} px does not allow; change preprocess.size or their number"
                )
            size //= smaller
        elif spec.latent is not None:
            return  # a given autoencoder says by itself how much smaller its latents are
        self.check_halvings(size)

    def check_halvings(self, size: int) -> None:
        """Raise `StudyError` where images, or latents of this side, cannot be halved as often as
        the network does it."""
        spec = self.spec
        halvings, patch = len(spec.block_out_channels) - 1, spec.patch_size
        if size % (2**halvings * patch):
            squares = f" in squares of {patch} px" if patch > 1 else ""
            latent = "the latent of " if spec.latent is not None else ""
            raise StudyError(
                f"generators: ddpm halves the image{squares} {halvings} times, which {latent}{size}"
                " px does not allow; change preprocess.size, patch_size or block_out_channels"
            )

    def uses_clusters(self) -> bool:
        return self.spec.condition == "cluster"

    def fingerprint(self) -> dict[str, Any]:
        return {name: getattr(self.spec, name) for name in (*self.sampling_fields, "precision")}

    def fit(self, context: FitContext, data: TrainingImages, seed: int) -> None:
        from engine.generators._ddpm_fit import fit

        fit(self, context, data, seed)

    def load(self, weights: Path | None, device: str) -> None:
        import torch
        from diffusers import AutoencoderKL, UNet2DModel

        if weights is None:
            raise StudyError("ddpm has no weights to load; train it first")
        self.device = device
        self.unet = (
            UNet2DModel.from_pretrained(weights / "unet", use_safetensors=True).to(device).eval()
        )
        self.autoencoder = None
        if self.spec.latent is not None:
            self.autoencoder = AutoencoderKL.from_pretrained(weights / "vae", use_safetensors=True)
            self.autoencoder.to(device).eval()
        if device == "cuda":
            self.unet.to(memory_format=torch.channels_last)
        self.conditions = Conditions.load(weights, self.spec.condition)
        settings = json.loads((weights / "scheduler" / "scheduler_config.json").read_text())
        self.scheduler = self.make_scheduler(settings)

    def make_scheduler(self, trained: Mapping[str, Any]) -> Any:
        """What samples, from the configuration of what the network was trained with."""
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        kind = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}[
            self.spec.scheduler
        ]
        names = (
            "num_train_timesteps",
            "beta_schedule",
            "beta_start",
            "beta_end",
            "prediction_type",
        )
        kept = {name: trained[name] for name in names}
        # Pixels live in [-1, 1], latents anywhere; clipping the predicted clean image keeps
        # guidance from burning it out.
        pixels = self.spec.latent is None
        if self.spec.scheduler == "ddim":
            kept |= {
                "clip_sample": pixels,
                "set_alpha_to_one": True,
                "timestep_spacing": "trailing",
            }
        else:
            # Near pure noise the clean image is a small difference divided by almost nothing:
            # start a little later on the cosine schedule, and clip, as is advised for pixels.
            kept |= {
                "algorithm_type": "dpmsolver++",
                "final_sigmas_type": "zero",
                "lambda_min_clipped": -5.1,
                "thresholding": pixels,
            }
        return kind(**kept)

    def sample(self, batch: SampleBatch) -> list[np.ndarray | str]:
        return self.denoise(
            self.unet, self.scheduler, self.autoencoder,
            self.conditions.numbered(batch.labels, batch.clusters), len(self.conditions),
            batch.seeds, self.device, self.spec.num_inference_steps,
        )  # fmt: skip

    def denoise(
        self,
        unet: Any,
        scheduler: Any,
        autoencoder: Any,
        numbers: np.ndarray,
        nobody: int,
        seeds: Sequence[int],
        device: str,
        steps: int,
    ) -> list[np.ndarray | str]:
        """An image for each condition number and seed, or the reason why there is none. `nobody` is
        the number of no condition."""
        import torch

        from engine.generators._ddpm_fit import predict

        spec = self.spec
        conditions = torch.from_numpy(numbers).to(device)
        channels = unet.config.in_channels // spec.patch_size**2
        side = unet.config.sample_size * spec.patch_size
        # On the CPU, one generator for each image: neighbours, batch size and device change no
        # draw.
        noise = torch.stack(
            [
                torch.randn(channels, side, side, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        )
        images = noise.to(device) * scheduler.init_noise_sigma
        without_condition = torch.full_like(conditions, nobody)
        scheduler.set_timesteps(steps, device=device)
        # A look at a training knows no settings of sampling: what has no "no condition" has no
        # guidance.
        guidance = spec.guidance_scale if spec.condition_dropout else 1.0
        dtype = dtype_of(spec.precision)
        kind = torch.device(device).type
        with torch.inference_mode(), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            for timestep in scheduler.timesteps:
                inputs = scheduler.scale_model_input(images, timestep)
                if guidance != 1:
                    both = predict(
                        unet, torch.cat([inputs, inputs]), timestep,
                        torch.cat([conditions, without_condition]), spec.patch_size,
                    )  # fmt: skip
                    given, without = both.float().chunk(2)
                    guided = without + guidance * (given - without)
                    images = guided_step(scheduler, given, guided, timestep, images)
                else:
                    given = predict(unet, inputs, timestep, conditions, spec.patch_size).float()
                    images = scheduler.step(given, timestep, images).prev_sample
        if autoencoder is not None:
            # In full precision: some autoencoders leave the range of halves.
            shift = autoencoder.config.shift_factor or 0.0
            with torch.inference_mode():
                latents = images.float() / autoencoder.config.scaling_factor + shift
                images = autoencoder.decode(latents).sample.float()
            if self.preprocess.shape[2] < images.shape[1]:
                images = images.mean(1, keepdim=True)
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        shown = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        pixels = shown.permute(0, 2, 3, 1).cpu().numpy()
        return [image if good else "not_finite" for image, good in zip(pixels, finite, strict=True)]


def guided_step(scheduler: Any, given: Any, guided: Any, timestep: Any, images: Any) -> Any:
    """One step of a sampler by a guided prediction, `given` being the one without guidance.

    Of DDIM, the step of `given`, moved by what guidance changes of the clipped clean image, and the
    noise with it. Where a guided image alone is clipped, what was cut off stays in the noise and
    comes back as light, step by step, until a 1 reads as an 8; and noise made anew from the clipped
    image keeps the grain of a network that is not trained to its end. Without clipping it is the
    guided step itself.
    """
    from diffusers import DDIMScheduler

    if not isinstance(scheduler, DDIMScheduler):
        return scheduler.step(guided, timestep, images).prev_sample
    plain = scheduler.step(given, timestep, images)
    clean = scheduler.step(guided, timestep, images).pred_original_sample
    before = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    kept = scheduler.alphas_cumprod[timestep]
    kept_before = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    share = kept_before.sqrt() - ((1 - kept_before) * kept / (1 - kept)).sqrt()
    return plain.prev_sample + share * (clean - plain.pred_original_sample)
