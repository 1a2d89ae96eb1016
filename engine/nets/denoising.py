"""Training of the denoisers of diffusers' pipelines.

The pipeline's own `encode_prompt` encodes the prompts, in training as in sampling. So a family of
checkpoints differs here only in the call of its denoiser.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from engine.core.errors import StudyError
from engine.core.rng import derive_seed
from engine.nets.noise import Diffusion, Flow
from engine.nets.pipelines import DenoisingSettings, Family
from engine.nets.training import (
    TrainState,
    WeightedSampler,
    make_accelerator,
    share_of_batch,
    strip_prefix,
)
from engine.work.fit import FitContext

# Encoded prompts: tensors whose first axis is the batch.
PromptEmbeddings = dict[str, Tensor]
# Bytes of latents that a worker caches.
_CACHE = 4 * 2**30


class Denoiser(nn.Module):
    """A pipeline's denoiser, with its text encoders if they are trained too: one module, so that
    workers average all gradients together."""

    def __init__(self, pipeline: Any, family: Family, train_text_encoders: bool) -> None:
        super().__init__()
        self.denoiser: Any = getattr(pipeline, family.denoiser)
        names = [name for name, _ in family.text_encoders] if train_text_encoders else []
        self.text_encoders = nn.ModuleList([getattr(pipeline, name) for name in names])
        # In a tuple, so that torch does not register the pipeline's networks as submodules.
        self._pipeline = (pipeline, family)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, text: PromptEmbeddings | Sequence[str], side: int
    ) -> Tensor:
        """The prediction for noisy latents (n, channels, height, width).

        text: encoded prompts, or the prompts themselves if text encoders are trained. side: of the
        images, in pixels.
        """
        pipeline, family = self._pipeline
        if not isinstance(text, dict):
            text = encode_prompts(pipeline, list(text), noisy.device)
        return predict(pipeline, family, self.denoiser, noisy, timesteps, text, side)


def encode_prompts(pipeline: Any, prompts: list[str], device: torch.device) -> PromptEmbeddings:
    """Prompts as the pipeline's text encoders encode them."""
    accepted = inspect.signature(pipeline.encode_prompt).parameters
    # Families name their second and third prompts differently; None repeats the first.
    arguments = {"prompt": prompts, "device": device, "num_images_per_prompt": 1,
                 "do_classifier_free_guidance": False, "prompt_2": None,
                 "prompt_3": None}  # fmt: skip
    encoded = pipeline.encode_prompt(
        **{name: value for name, value in arguments.items() if name in accepted}
    )
    embeddings = {"embeds": encoded[0]}
    if len(encoded) == 4:
        embeddings["pooled"] = encoded[2]
    elif len(encoded) == 3:
        embeddings["pooled"] = encoded[1]
    return embeddings


def predict(
    pipeline: Any,
    family: Family,
    denoiser: nn.Module,
    noisy: Tensor,
    timesteps: Tensor,
    text: PromptEmbeddings,
    side: int,
) -> Tensor:
    """Call the denoiser of a family as its pipeline does."""
    if family.name == "Stable Diffusion":
        return torch.as_tensor(denoiser(noisy, timesteps, text["embeds"]).sample)
    if family.name == "Stable Diffusion XL":
        # It is conditioned on size, crop and target size (Podell et al. 2023).
        sizes = torch.tensor([[side, side, 0, 0, side, side]], device=noisy.device)
        added = {"time_ids": sizes.expand(len(noisy), -1).to(text["pooled"].dtype),
                 "text_embeds": text["pooled"]}  # fmt: skip
        predicted = denoiser(noisy, timesteps, text["embeds"], added_cond_kwargs=added)
        return torch.as_tensor(predicted.sample)
    common = {"encoder_hidden_states": text["embeds"], "pooled_projections": text["pooled"],
              "return_dict": False}  # fmt: skip
    if family.name == "Stable Diffusion 3":
        predicted = denoiser(hidden_states=noisy, timestep=timesteps, **common)
        return torch.as_tensor(predicted[0])
    count, _, height, width = noisy.shape
    rows, columns = height // 2, width // 2
    # Squares of 2 x 2 latents are tokens, which carry their row and column.
    tokens = pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2).contiguous()
    positions = torch.zeros(rows, columns, 3, device=noisy.device, dtype=noisy.dtype)
    positions[..., 1] = torch.arange(rows, device=noisy.device)[:, None]
    positions[..., 2] = torch.arange(columns, device=noisy.device)
    # Guidance that was distilled into the checkpoint takes no part in training.
    distilled = pipeline.transformer.config.guidance_embeds
    predicted = denoiser(
        hidden_states=tokens,
        timestep=timesteps / 1000,
        guidance=torch.ones(count, device=noisy.device) if distilled else None,
        txt_ids=torch.zeros(text["embeds"].shape[1], 3, device=noisy.device),
        img_ids=positions.flatten(0, 1),
        **common,
    )[0]
    return pixel_shuffle(predicted.transpose(1, 2).unflatten(2, (rows, columns)), 2)


@dataclass(frozen=True)
class Examples:
    """Training images: uint8 pixels (n, height, width, channels), the prompts of each image, of
    which every step draws one, and how often each image is drawn, relative to the others."""

    pixels: np.ndarray
    image_ids: Sequence[str]
    prompts: Sequence[Sequence[str]]
    weights: np.ndarray


class PipelineTraining:
    """One training of a pipeline in progress, for `engine.nets.training.run`.

    Trains those parameters of the pipeline's networks that require gradients. precision: of the
    pipeline. side: of the images, in pixels. prior: other images, as many in each
    step, and the weight of their loss (DreamBooth, Ruiz et al. 2023).
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
        train_text_encoders: bool = False,
        prior: tuple[Examples, float] | None = None,
    ) -> None:
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import cast_training_params

        self.pipeline, self.family, self.examples = pipeline, family, examples
        self.settings, self.side, self.seed, self.prior = settings, side, seed, prior
        self.train_text_encoders = train_text_encoders
        slices = share_of_batch(
            settings.batch_size, context.rank, context.world_size,
            settings.gradient_accumulation_steps,
        )  # fmt: skip
        self.samplers = [
            WeightedSampler(learnt.weights, settings.batch_size, derive_seed(seed, number))
            for number, learnt in enumerate([examples, *(prior[:1] if prior else ())])
        ]
        # Pipelines may skip the last layer of a text encoder.
        self.accelerator = make_accelerator(
            context, precision, settings.gradient_accumulation_steps,
            unused_parameters=train_text_encoders,
        )  # fmt: skip
        device = self.accelerator.device
        pipeline.to(device)
        # In half precision the VAE of Stable Diffusion XL turns ordinary images into NaN.
        if pipeline.vae.dtype != torch.float32:
            pipeline.vae.to(dtype=torch.float32)
        pipeline.vae.eval().requires_grad_(False)
        denoiser = Denoiser(pipeline, family, train_text_encoders).train()
        # Half-precision weights are too coarse for small steps.
        cast_training_params([denoiser], dtype=torch.float32)
        if settings.gradient_checkpointing:
            denoiser.denoiser.enable_gradient_checkpointing()
        self.trained: dict[str, Tensor] = {
            name: value for name, value in denoiser.named_parameters() if value.requires_grad
        }
        if not self.trained:
            raise StudyError("generators: adapt: finds nothing to train; choose another checkpoint")
        optimizer = torch.optim.AdamW(
            list(self.trained.values()), lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay, foreach=True,
        )  # fmt: skip
        self.state = TrainState(
            context, self.accelerator, denoiser, optimizer,
            lambda optimizer: get_scheduler(
                settings.lr_scheduler, optimizer, num_warmup_steps=settings.lr_warmup_steps,
                num_training_steps=settings.train_steps,
            ),
            slices, max_grad_norm=settings.max_grad_norm, ema_decay=settings.ema_decay or None,
        )  # fmt: skip
        self.objective = (Flow if family.flow else Diffusion)(pipeline, settings)
        self.objective.configure(pipeline)
        self._latents: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}
        self._cached_bytes = 0
        self._embeddings: dict[str, PromptEmbeddings] = {}

    def update(self, step: int) -> dict[str, float]:
        rows = [sampler.rows(step) for sampler in self.samplers]

        def loss_of(piece: slice) -> Tensor:
            loss = self._loss(step, self.examples, rows[0], piece)
            if self.prior is None:
                return loss
            examples, weight = self.prior
            return loss + weight * self._loss(step, examples, rows[1], piece)

        return {"loss": self.state.optimizer_step(self.seed, step, loss_of)}

    def _loss(self, step: int, examples: Examples, rows: np.ndarray, piece: slice) -> Tensor:
        """The mean loss of a slice of the batch. Every draw is a function of image, position in the
        batch and step."""
        settings, device = self.settings, self.accelerator.device
        chosen = rows[piece]
        places = range(piece.start, piece.stop)
        draws = [
            torch.Generator().manual_seed(
                derive_seed(self.seed, "noise", examples.image_ids[row], place, step)
            )
            for place, row in zip(places, chosen, strict=True)
        ]
        latents, noise, prompts = [], [], []
        levels = self.objective.levels(draws).to(device)
        for row, draw in zip(chosen, draws, strict=True):
            choice, dropped, mirrored = torch.rand(3, generator=draw).tolist()
            texts = examples.prompts[row]
            empty = dropped < settings.proportion_empty_prompts
            prompts.append("" if empty else texts[int(choice * len(texts))])
            mean, std = self._encoded(examples, int(row), settings.random_flip and mirrored < 0.5)
            latents.append(mean + std * torch.randn(mean.shape, generator=draw).to(device))
            offset = torch.randn(mean.shape[0], 1, 1, generator=draw) * settings.noise_offset
            noise.append(torch.randn(mean.shape, generator=draw) + offset)
        clean, drawn = torch.stack(latents), torch.stack(noise).to(device)
        noisy = self.objective.add_noise(clean, drawn, levels)
        text = prompts if self.train_text_encoders else self._encoded_prompts(prompts)
        with self.accelerator.autocast():
            predicted = self.state.model(noisy, self.objective.timesteps(levels), text, self.side)
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
        # One by one, so that latents do not depend on neighbours in the batch.
        posterior = vae.encode(image[None]).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        mean = (posterior.mean[0] - shift) * vae.config.scaling_factor
        std = posterior.std[0] * vae.config.scaling_factor
        size = 2 * mean.numel() * mean.element_size()
        if self.settings.cache_latents and self._cached_bytes + size <= _CACHE:
            self._cached_bytes += size
            self._latents[key] = (mean.cpu(), std.cpu())
        return mean, std

    @torch.no_grad()
    def _encoded_prompts(self, prompts: list[str]) -> PromptEmbeddings:
        device, cache = self.accelerator.device, self._embeddings
        for prompt in prompts:
            if prompt not in cache:
                encoded = encode_prompts(self.pipeline, [prompt], device)
                cache[prompt] = {name: value[0].cpu() for name, value in encoded.items()}
        return {
            name: torch.stack([cache[prompt][name] for prompt in prompts]).to(device)
            for name in cache[prompts[0]]
        }

    def tensors(self) -> dict[str, Tensor]:
        named = {f"trained.{name}": value for name, value in self.trained.items()}
        return named | self.state.tensors()

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, value in strip_prefix("trained.", tensors).items():
            self.trained[name].copy_(value)
        self.state.restore(tensors)

    def finish(self) -> None:
        """Put the averaged weights in place, so that the pipeline samples with them."""
        if self.state.ema is not None:
            self.state.ema.copy_to(self.state.parameters)
        for network in self._networks():
            network.eval()

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """The pipeline may sample between two steps: all its networks are in evaluation mode."""
        modes = {network: network.training for network in self._networks()}
        for network in modes:
            network.eval()
        vae, kind = self.pipeline.vae, self.accelerator.device.type
        decode = vae.decode

        def decode_in_fp32(latents: Tensor, *more: Any, **named: Any) -> Any:
            # The VAE keeps 32 bits, because it yields NaN in 16.
            with torch.autocast(kind, enabled=False):
                return decode(latents.float(), *more, **named)

        vae.decode = decode_in_fp32
        try:
            with self.accelerator.autocast():
                yield
        finally:
            del vae.decode
            for network, mode in modes.items():
                network.train(mode)

    def _networks(self) -> Iterator[nn.Module]:
        components = self.pipeline.components.values()
        return (value for value in components if isinstance(value, nn.Module))


def to_square(pixels: np.ndarray, side: int) -> Tensor:
    """uint8 (height, width, channels) to float (3, side, side) in [-1, 1]; grey is repeated."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 127.5 - 1
    if image.shape[-1] != side:
        image = nn.functional.interpolate(
            image[None], (side, side), mode="bicubic", antialias=True
        )[0].clamp(-1, 1)
    return image.expand(3, -1, -1)
