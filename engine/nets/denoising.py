"""Training of the denoisers of diffusers' pipelines, and the losses of diffusion and of flow.

The pipeline's own `encode_prompt` reads the prompts, in training as in sampling, so that each
family of checkpoints is told here only how its denoiser is called.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.core.errors import StudyError
from engine.core.rng import derive_seed
from engine.nets.pipelines import DenoisingSettings, Family
from engine.nets.training import (
    WeightedSampler,
    below,
    descend,
    make_accelerator,
    optimizer_tensors,
    restore_optimizer,
    restore_scaler,
    restore_schedule,
    scaler_tensors,
    seed_dropout,
    share_of_batch,
)
from engine.work.fit import FitContext

# What a denoiser is told of a prompt: tensors whose first axis is the batch.
Text = dict[str, Tensor]
# Bytes of latents that a worker keeps.
_CACHE = 4 * 2**30


def noise_loss(
    scheduler: Any,
    predicted: Tensor,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    snr_gamma: float | None,
) -> Tensor:
    """Losses (n,) of what a denoiser predicts of images (n, …), by the scheduler's
    `prediction_type`.

    snr_gamma: weigh noise levels by min(SNR, gamma) (Hang et al. 2023); None: all alike.
    """
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(clean, noise, timesteps) if velocity else noise
    losses = (predicted.float() - target.float()).square().flatten(1).mean(1)
    if snr_gamma is None:
        return losses
    kept = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    ratio = kept / (1 - kept)
    # Of the clean image's loss; in terms of noise or velocity it is divided by SNR or SNR + 1.
    return losses * ratio.clamp(max=snr_gamma) / (ratio + 1 if velocity else ratio)


class Diffusion:
    """Noise is added by the steps of a DDPM, and its denoiser is a UNet (Stable Diffusion 1, 2,
    XL)."""

    def __init__(self, pipeline: Any, settings: DenoisingSettings) -> None:
        from diffusers import DDPMScheduler

        changed = {"prediction_type": settings.prediction_type} if settings.prediction_type else {}
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **changed)
        self.kind = self.scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction"):
            raise StudyError(
                f"generators: the checkpoint predicts {self.kind!r}; epsilon and v_prediction can"
                " be trained"
            )
        self.snr_gamma, self.steps = settings.snr_gamma, self.scheduler.config.num_train_timesteps

    def levels(self, draws: Sequence[torch.Generator]) -> Tensor:
        """A timestep for each image, drawn evenly."""
        drawn = [torch.randint(self.steps, (1,), generator=draw) for draw in draws]
        return torch.cat(drawn)

    def noisy(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        return torch.as_tensor(self.scheduler.add_noise(clean, noise, levels))

    def timesteps(self, levels: Tensor) -> Tensor:
        return levels

    def losses(self, predicted: Tensor, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        return noise_loss(self.scheduler, predicted, clean, noise, levels, self.snr_gamma)

    def keep(self, pipeline: Any) -> None:
        """Make the pipeline sample what was learnt."""
        config = pipeline.scheduler.config
        if config.prediction_type != self.kind:
            pipeline.scheduler = type(pipeline.scheduler).from_config(
                config, prediction_type=self.kind
            )


class Flow:
    """Rectified flow: straight lines from images to noise, and the denoiser tells their direction
    (Esser et al. 2024; Stable Diffusion 3, FLUX)."""

    def __init__(self, pipeline: Any, settings: DenoisingSettings) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        self.settings = settings

    def levels(self, draws: Sequence[torch.Generator]) -> Tensor:
        """An index into the scheduler's noise levels for each image."""
        settings, found = self.settings, []
        for draw in draws:
            if settings.weighting_scheme == "logit_normal":
                normal = torch.randn(1, generator=draw)
                place = torch.sigmoid(settings.logit_mean + settings.logit_std * normal)
            else:
                place = torch.rand(1, generator=draw)
            found.append((place * len(self.scheduler.sigmas[:-1])).long())
        return torch.cat(found).clamp(max=len(self.scheduler.timesteps) - 1)

    def _sigmas(self, levels: Tensor, like: Tensor) -> Tensor:
        sigmas = self.scheduler.sigmas.to(levels.device)[levels]
        return torch.as_tensor(sigmas.view(-1, *[1] * (like.ndim - 1)))

    def noisy(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
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

    def keep(self, pipeline: Any) -> None:
        return


class Denoiser(nn.Module):
    """A pipeline's denoiser, with its text encoders where those are trained too: one module, so
    that its workers' gradients are averaged as one."""

    def __init__(self, pipeline: Any, family: Family, reads: bool) -> None:
        super().__init__()
        self.denoiser: nn.Module = getattr(pipeline, family.denoiser)
        names = [name for name, _ in family.text_encoders] if reads else []
        self.text_encoders = nn.ModuleList([getattr(pipeline, name) for name in names])
        # Hidden from the module: it is no part of what is trained.
        self._held = (pipeline, family)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, text: Text | Sequence[str], side: int
    ) -> Tensor:
        """What is predicted for noisy latents (n, channels, height, width).

        text: what `read` gave, or the prompts themselves where text encoders are trained. side: of
        the images in pixels.
        """
        pipeline, family = self._held
        held = text if isinstance(text, dict) else read(pipeline, list(text), noisy.device)
        return predict(pipeline, family, self.denoiser, noisy, timesteps, held, side)


def read(pipeline: Any, prompts: list[str], device: torch.device) -> Text:
    """What the pipeline's text encoders make of prompts."""
    accepted = inspect.signature(pipeline.encode_prompt).parameters
    # Families name their second and third prompts differently; None stands for the first.
    given = {"prompt": prompts, "device": device, "num_images_per_prompt": 1,
             "do_classifier_free_guidance": False, "prompt_2": None, "prompt_3": None}  # fmt: skip
    made = pipeline.encode_prompt(**{name: given[name] for name in accepted if name in given})
    found = {"embeds": made[0]}
    if len(made) == 4:
        found["pooled"] = made[2]
    elif len(made) == 3:
        found["pooled"] = made[1]
    return found


def predict(
    pipeline: Any,
    family: Family,
    denoiser: nn.Module,
    noisy: Tensor,
    timesteps: Tensor,
    text: Text,
    side: int,
) -> Tensor:
    """Call the denoiser of a family the way its pipeline does."""
    if family.name == "Stable Diffusion":
        return torch.as_tensor(denoiser(noisy, timesteps, text["embeds"]).sample)
    if family.name == "Stable Diffusion XL":
        # Size, crop and target size, on which it is conditioned (Podell et al. 2023).
        sizes = torch.tensor([[side, side, 0, 0, side, side]], device=noisy.device)
        added = {"time_ids": sizes.expand(len(noisy), -1).to(text["pooled"].dtype),
                 "text_embeds": text["pooled"]}  # fmt: skip
        made = denoiser(noisy, timesteps, text["embeds"], added_cond_kwargs=added)
        return torch.as_tensor(made.sample)
    common = {"encoder_hidden_states": text["embeds"], "pooled_projections": text["pooled"],
              "return_dict": False}  # fmt: skip
    if family.name == "Stable Diffusion 3":
        made = denoiser(hidden_states=noisy, timestep=timesteps, **common)
        return torch.as_tensor(made[0])
    count, channels, height, width = noisy.shape
    # What is distilled into the checkpoint as guidance is kept out of training.
    guidance = (
        torch.ones(count, device=noisy.device)
        if pipeline.transformer.config.guidance_embeds
        else None
    )
    made = denoiser(
        hidden_states=pipeline._pack_latents(noisy, count, channels, height, width),
        timestep=timesteps / 1000,
        guidance=guidance,
        txt_ids=torch.zeros(text["embeds"].shape[1], 3, device=noisy.device),
        img_ids=pipeline._prepare_latent_image_ids(
            count, height // 2, width // 2, noisy.device, noisy.dtype
        ),
        **common,
    )[0]
    factor = pipeline.vae_scale_factor
    unpacked = pipeline._unpack_latents(made, height * factor, width * factor, factor)
    return torch.as_tensor(unpacked)


@dataclass(frozen=True)
class Examples:
    """What is learnt: uint8 pixels (n, height, width, channels), the prompts of which one is drawn
    for each image, and how often each image is drawn, relative to the others."""

    pixels: np.ndarray
    image_ids: Sequence[str]
    prompts: Sequence[Sequence[str]]
    weights: np.ndarray


class PipelineTraining:
    """The state of one training of a pipeline: what is trained, its average, the optimizer.

    Of the pipeline's networks those parameters are trained that require gradients.

    precision, side: of the pipeline, and of the images in pixels. reads: text encoders are trained
    too. prior: other images, of which as many are learnt in each step, and the weight of their loss
    (DreamBooth, Ruiz et al. 2023).
    """

    def __init__(
        self,
        context: FitContext,
        pipeline: Any,
        family: Family,
        examples: Examples,
        settings: DenoisingSettings,
        precision: str,
        side: int,
        seed: int,
        *,
        reads: bool = False,
        prior: tuple[Examples, float] | None = None,
    ) -> None:
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel, cast_training_params

        self.pipeline, self.family, self.examples = pipeline, family, examples
        self.settings, self.side, self.seed, self.reads = settings, side, seed, reads
        self.prior = prior
        self.slices = share_of_batch(
            settings.batch_size, context.rank, context.world_size,
            settings.gradient_accumulation_steps,
        )  # fmt: skip
        self.samplers = [
            WeightedSampler(held.weights, settings.batch_size, derive_seed(seed, number))
            for number, held in enumerate([examples, *(prior[:1] if prior else ())])
        ]
        # Of a text encoder the last layer may go unread: pipelines take the one before it.
        self.accelerator = make_accelerator(
            context, precision, settings.gradient_accumulation_steps, some_unused=reads
        )
        device = self.accelerator.device
        pipeline.to(device)
        # In half precision the VAE of Stable Diffusion XL makes NaN of ordinary images.
        if pipeline.vae.dtype != torch.float32:
            pipeline.vae.to(dtype=torch.float32)
        pipeline.vae.eval().requires_grad_(False)
        denoiser = Denoiser(pipeline, family, reads).train()
        # Half-precision weights are too coarse for small steps.
        cast_training_params([denoiser], dtype=torch.float32)
        if settings.gradient_checkpointing:
            denoiser.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        self.named = {
            name: value for name, value in denoiser.named_parameters() if value.requires_grad
        }
        if not self.named:
            raise StudyError("generators: adapt trains nothing of this checkpoint")
        optimizer = torch.optim.AdamW(
            list(self.named.values()), lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay, foreach=True,
        )  # fmt: skip
        self.model = self.accelerator.prepare_model(
            denoiser, evaluation_mode=context.world_size == 1
        )
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        # Stepped by hand: accelerate's own wrapper multiplies steps by the number of workers.
        self.lr_scheduler = get_scheduler(
            settings.lr_scheduler, optimizer, num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.train_steps,
        )  # fmt: skip
        self.ema = (
            EMAModel(list(self.named.values()), decay=settings.ema_decay, foreach=True)
            if settings.ema_decay
            else None
        )
        self.objective = (Flow if family.flow else Diffusion)(pipeline, settings)
        self.objective.keep(pipeline)
        self._latents: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}
        self._texts: dict[str, Text] = {}
        self._kept = 0

    def update(self, step: int) -> dict[str, float]:
        total = 0.0
        rank = self.accelerator.process_index
        # Dropout draws from torch's own generator: f(seed, step, rank), as all else.
        seed_dropout(str(self.accelerator.device), self.seed, "dropout", step, rank)
        rows = [sampler.rows(step) for sampler in self.samplers]
        for piece in self.slices:
            with self.accelerator.accumulate(self.model):
                loss = self._loss(step, self.examples, rows[0], piece)
                if self.prior is not None:
                    kept, weight = self.prior
                    loss = loss + weight * self._loss(step, kept, rows[1], piece)
                descend(
                    self.accelerator, self.model, self.optimizer, loss,
                    self.settings.max_grad_norm,
                )  # fmt: skip
            reduced = self.accelerator.reduce(loss.detach(), "mean")
            total += float(reduced) / len(self.slices)
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(list(self.named.values()))
        return {"loss": total}

    def _loss(self, step: int, examples: Examples, rows: np.ndarray, piece: slice) -> Tensor:
        """The mean loss of the images of one piece; every draw belongs to (image, place in the
        batch, step)."""
        settings, device = self.settings, self.accelerator.device
        held = rows[piece]
        places = range(piece.start, piece.stop)
        draws = [
            torch.Generator().manual_seed(
                derive_seed(self.seed, "noise", examples.image_ids[row], place, step)
            )
            for place, row in zip(places, held, strict=True)
        ]
        latents, noise, prompts = [], [], []
        levels = self.objective.levels(draws).to(device)
        for row, draw in zip(held, draws, strict=True):
            choice, dropped, mirrored = torch.rand(3, generator=draw).tolist()
            texts = examples.prompts[row]
            empty = dropped < settings.proportion_empty_prompts
            prompts.append("" if empty else texts[int(choice * len(texts))])
            mean, std = self._encoded(examples, int(row), settings.random_flip and mirrored < 0.5)
            latents.append(mean + std * torch.randn(mean.shape, generator=draw).to(device))
            offset = torch.randn(mean.shape[0], 1, 1, generator=draw) * settings.noise_offset
            noise.append(torch.randn(mean.shape, generator=draw) + offset)
        clean, drawn = torch.stack(latents), torch.stack(noise).to(device)
        noisy = self.objective.noisy(clean, drawn, levels)
        text: Text | list[str] = prompts if self.reads else self._read(prompts)
        with self.accelerator.autocast():
            predicted = self.model(noisy, self.objective.timesteps(levels), text, self.side)
        return self.objective.losses(predicted, clean, drawn, levels).mean()

    @torch.no_grad()
    def _encoded(self, examples: Examples, row: int, mirrored: bool) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of one image, scaled."""
        key = (examples.image_ids[row], mirrored)
        if key in self._latents:
            mean, std = self._latents[key]
            return mean.to(self.accelerator.device), std.to(self.accelerator.device)
        vae = self.pipeline.vae
        image = to_square(examples.pixels[row], self.side).to(self.accelerator.device)
        image = image.flip(2) if mirrored else image
        # One by one: what an image becomes does not hang on its neighbours.
        found = vae.encode(image[None]).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        mean = (found.mean[0] - shift) * vae.config.scaling_factor
        std = found.std[0] * vae.config.scaling_factor
        size = 2 * mean.numel() * mean.element_size()
        if self.settings.cache_latents and self._kept + size <= _CACHE:
            self._kept += size
            self._latents[key] = (mean.cpu(), std.cpu())
        return mean, std

    @torch.no_grad()
    def _read(self, prompts: list[str]) -> Text:
        device = self.accelerator.device
        for prompt in prompts:
            if prompt not in self._texts:
                self._texts[prompt] = {
                    name: value[0].cpu()
                    for name, value in read(self.pipeline, [prompt], device).items()
                }
        names = self._texts[prompts[0]]
        return {
            name: torch.stack([self._texts[prompt][name] for prompt in prompts]).to(device)
            for name in names
        }

    def tensors(self) -> dict[str, Tensor]:
        named = {f"trained.{name}": value for name, value in self.named.items()}
        if self.ema is not None:
            named |= {f"ema.{index}": value for index, value in enumerate(self.ema.shadow_params)}
            named["ema_step"] = torch.tensor(self.ema.optimization_step)
        named["lr_step"] = torch.tensor(self.lr_scheduler.last_epoch)
        named |= scaler_tensors(self.accelerator)
        return named | optimizer_tensors(self.optimizer, "optimizer.")

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, value in below("trained.", tensors).items():
            self.named[name].copy_(value)
        if self.ema is not None:
            self.ema.shadow_params = [
                tensors[f"ema.{index}"].to(self.accelerator.device)
                for index in range(len(self.ema.shadow_params))
            ]
            self.ema.optimization_step = int(tensors["ema_step"])
        restore_scaler(self.accelerator, tensors)
        restore_optimizer(self.optimizer, "optimizer.", tensors)
        restore_schedule(self.lr_scheduler, int(tensors["lr_step"]))

    def finish(self) -> None:
        """Put the averaged weights in place; the pipeline then samples what was learnt."""
        if self.ema is not None:
            self.ema.copy_to(list(self.named.values()))
        for value in self._networks():
            value.eval()

    def sampling(self) -> Any:
        """A context in which the pipeline may sample between two steps."""
        return _Sampling(self)

    def _networks(self) -> Iterator[nn.Module]:
        for value in self.pipeline.components.values():
            if isinstance(value, nn.Module):
                yield value


class _Sampling:
    """Puts all networks into evaluation, and back."""

    def __init__(self, training: PipelineTraining) -> None:
        self.training = training

    def __enter__(self) -> None:
        self.modes = {value: value.training for value in self.training._networks()}
        for value in self.modes:
            value.eval()
        self.autocast = self.training.accelerator.autocast()
        self.autocast.__enter__()
        vae = self.training.pipeline.vae
        decode, kind = vae.decode, self.training.accelerator.device.type

        def in_full(latents: Tensor, *more: Any, **named: Any) -> Any:
            # It is kept in 32 bits, for it makes NaN in 16.
            with torch.autocast(kind, enabled=False):
                return decode(latents.float(), *more, **named)

        vae.decode = in_full

    def __exit__(self, *error: Any) -> None:
        del self.training.pipeline.vae.decode
        self.autocast.__exit__(*error)
        for value, mode in self.modes.items():
            value.train(mode)


def to_square(pixels: np.ndarray, side: int) -> Tensor:
    """uint8 (height, width, channels) to float (3, side, side) in [-1, 1]; grey ones thrice."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 127.5 - 1
    if image.shape[-1] != side:
        image = nn.functional.interpolate(
            image[None], (side, side), mode="bicubic", antialias=True
        )[0].clamp(-1, 1)
    return image.expand(3, -1, -1)
