"""A small variational autoencoder (Kingma and Welling 2014) for diffusion in its latents (Rombach
et al. 2022). The network is diffusers' `AutoencoderKL`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import l1_loss
from torch.nn.utils import clip_grad_norm_

from engine.core.errors import StudyError, brief
from engine.core.paths import local_path
from engine.core.rng import derive_seed
from engine.data.images import grid
from engine.nets.images import or_black, to_pixels
from engine.nets.pipelines import LatentSpec
from engine.nets.training import (
    WeightedSampler,
    average_gradients,
    make_accelerator,
    optimizer_tensors,
    restore_optimizer,
    run,
    share_of_batch,
    strip_prefix,
)
from engine.work.fit import FitContext

_BLOCK = 64  # images encoded at once
_SAMPLES = 12  # images in a sample grid


def open_autoencoder(spec: LatentSpec) -> Any:
    """The `AutoencoderKL` that the study names. Raises `StudyError` if it cannot be read."""
    assert spec.model is not None
    folder = local_path(spec.model)
    # A pipeline keeps it in a subfolder.
    inner = {"subfolder": "vae"} if (folder / "model_index.json").is_file() else {}
    try:
        return AutoencoderKL.from_pretrained(
            str(folder), revision=spec.revision, use_safetensors=True, **inner
        )
    except (OSError, ValueError, KeyError) as error:
        raise StudyError(f"generators: latent.model: {spec.model}: {brief(error)}") from None


def train_autoencoder(
    context: FitContext,
    spec: LatentSpec,
    pixels: np.ndarray,
    image_ids: Sequence[str],
    weights: np.ndarray,
    precision: str,
    seed: int,
) -> Any:
    """Train an `AutoencoderKL` on uint8 images (n, height, width, channels), from its newest
    checkpoint if there is one. weights: how often each image is drawn, relative to the others."""
    training = _Training(context, spec, pixels, image_ids, weights, precision, seed)
    run(
        context, training, spec.train_steps, checkpoint_every=context.checkpoint_every,
        report_every=max(1, min(20, spec.train_steps // 20)), sample_grid=training.sample_grid,
        keep_last=True,
    )  # fmt: skip
    return training.network.eval().requires_grad_(False)


@torch.no_grad()
def encode(network: Any, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Means and deviations (n, channels, height, width) of the latents of uint8 images, on the
    CPU."""
    means, deviations = [], []
    for start in range(0, len(pixels), _BLOCK):
        images = to_signed(pixels[start : start + _BLOCK], network.config.in_channels)
        posterior = network.encode(images.to(network.device, network.dtype)).latent_dist
        means.append(posterior.mean.float().cpu())
        deviations.append(posterior.std.float().cpu())
    return torch.cat(means), torch.cat(deviations)


def to_signed(pixels: np.ndarray, channels: int | None = None) -> Tensor:
    """uint8 (n, height, width, channels) to float (n, channels, height, width) in [-1, 1]; grey
    images are repeated to `channels`."""
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if channels is not None and images.shape[1] < channels:
        images = images.expand(-1, channels, -1, -1)
    return images


class _Training:
    """One training in progress, for `engine.nets.training.run`."""

    def __init__(
        self,
        context: FitContext,
        spec: LatentSpec,
        pixels: np.ndarray,
        image_ids: Sequence[str],
        weights: np.ndarray,
        precision: str,
        seed: int,
    ) -> None:
        self.spec, self.pixels, self.image_ids, self.seed = spec, pixels, image_ids, seed
        self.slices = share_of_batch(spec.batch_size, context.rank, context.world_size, 1)
        self.sampler = WeightedSampler(weights, spec.batch_size, derive_seed(seed, "rows"))
        torch.manual_seed(derive_seed(seed, "weights") % 2**63)
        levels, channels = len(spec.block_out_channels), pixels.shape[-1]
        network: Any = AutoencoderKL(
            in_channels=channels, out_channels=channels,
            block_out_channels=spec.block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=spec.latent_channels, norm_num_groups=8, layers_per_block=1,
            mid_block_add_attention=False, sample_size=pixels.shape[1],
        )  # fmt: skip
        self.accelerator = make_accelerator(context, precision, 1)
        # In fp16 the gradients, which are means over all pixels, would vanish.
        self.autocast = nullcontext if precision == "fp16" else self.accelerator.autocast
        self.network = network.to(self.accelerator.device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=spec.learning_rate, foreach=True
        )

    def update(self, step: int) -> dict[str, float]:
        (piece,) = self.slices
        rows = self.sampler.rows(step)[piece]
        images = to_signed(self.pixels[rows]).to(self.accelerator.device)
        draws = [
            torch.Generator().manual_seed(
                derive_seed(self.seed, "latents", self.image_ids[row], place, step)
            )
            for place, row in zip(range(piece.start, piece.stop), rows, strict=True)
        ]
        with self.autocast():
            posterior, decoded = self._reconstruct(images, draws)
        reconstruction = l1_loss(decoded.float(), images)
        # Per pixel, so that the weight means the same at every size.
        divergence = posterior.kl().float().mean() / images[0].numel()
        loss = reconstruction + self.spec.kl_weight * divergence
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.accelerator, self.network)
        clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        return {"reconstruction": float(self.accelerator.reduce(reconstruction.detach(), "mean"))}

    def _reconstruct(self, images: Tensor, draws: list[torch.Generator]) -> tuple[Any, Tensor]:
        posterior = self.network.encode(images).latent_dist
        noise = torch.stack(
            [torch.randn(posterior.mean.shape[1:], generator=draw) for draw in draws]
        )
        latents = posterior.mean + posterior.std * noise.to(images.device)
        return posterior, self.network.decode(latents).sample

    def sample_grid(self) -> bytes:
        """Images above their reconstructions, as PNG."""
        originals = self.pixels[:_SAMPLES]
        with torch.no_grad():
            images = to_signed(originals).to(self.accelerator.device)
            decoded = self.network.decode(self.network.encode(images).latent_dist.mean).sample
        decoded_pixels = or_black(to_pixels(decoded), originals.shape[1:])
        return grid([list(originals), decoded_pixels])

    def tensors(self) -> dict[str, Tensor]:
        named = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        return named | optimizer_tensors(self.optimizer, "optimizer.")

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict(strip_prefix("network.", tensors))
        restore_optimizer(self.optimizer, "optimizer.", tensors)
