"""The training of a class-conditional diffusion, in pixels or in the latents of an autoencoder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from torch import Tensor

from engine.core.errors import StudyError
from engine.core.rng import derive_seed
from engine.data.images import grid
from engine.generators import Conditions, TrainingImages
from engine.nets.autoencoder import encode, open_autoencoder, to_signed, train_autoencoder
from engine.nets.ddpm import (
    DdpmSettings,
    build_unet,
    check_halvings,
    denoise,
    predict,
    sampling_scheduler,
)
from engine.nets.images import or_black
from engine.nets.noise import noise_loss
from engine.nets.training import (
    TrainState,
    WeightedSampler,
    balanced_weights,
    make_accelerator,
    run,
    share_of_batch,
    strip_prefix,
)
from engine.work.fit import FitContext

# A sample grid: conditions, images of each, and steps to sample them.
_CONDITIONS, _EACH, _SAMPLING_STEPS = 10, 2, 10


def fit(spec: DdpmSettings, context: FitContext, data: TrainingImages, seed: int) -> None:
    """Train and publish; with an autoencoder of its own, train that first."""
    autoencoder, part = None, context
    _, side, _, channels = shape = data.pixels.shape
    if spec.latent is not None and spec.latent.model is not None:
        autoencoder = open_autoencoder(spec.latent)
        factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
        if side % factor:
            raise StudyError(
                f"generators: ddpm: latent.model shrinks images {factor} times, which {side} px"
                " does not allow; change preprocess.size"
            )
        check_halvings(spec, side // factor)
    elif spec.latent is not None:
        total = spec.latent.train_steps + spec.train_steps
        autoencoder = train_autoencoder(
            context.part("autoencoder", 0, total), spec.latent, data.pixels, data.image_ids,
            balanced_weights(data.labels, spec.class_balance), spec.precision,
            derive_seed(seed, "autoencoder"),
        )  # fmt: skip
        part = context.part("diffusion", spec.latent.train_steps, total)
    training = Training(part, spec, data, seed, autoencoder)

    def sample_grid() -> bytes:
        count = min(_CONDITIONS, len(training.conditions))
        with training.averaged():
            images = denoise(
                spec, training.unet, sampling_scheduler(spec, training.noise_scheduler.config),
                autoencoder, np.repeat(np.arange(count), _EACH), len(training.conditions),
                [derive_seed(seed, "look", number) for number in range(count * _EACH)],
                training.device, min(spec.num_inference_steps, _SAMPLING_STEPS), channels,
            )  # fmt: skip
        cells = or_black(images, shape[1:])
        return grid([cells[row::_EACH] for row in range(_EACH)])

    history = run(
        part, training, spec.train_steps, checkpoint_every=context.checkpoint_every,
        report_every=max(1, min(20, spec.train_steps // 20)), sample_grid=sample_grid,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        training.save(Path(folder))
        (Path(folder) / "history.json").write_text(json.dumps(history))
        context.publish(Path(folder), {"loss": history[-1]["loss"], "steps": spec.train_steps})


class Training:
    """One training in progress, for `engine.nets.training.run`."""

    def __init__(
        self,
        context: FitContext,
        spec: DdpmSettings,
        data: TrainingImages,
        seed: int,
        autoencoder: Any = None,
    ) -> None:
        self.spec, self.data, self.seed, self.autoencoder = spec, data, seed, autoencoder
        slices = share_of_batch(
            spec.batch_size, context.rank, context.world_size, spec.gradient_accumulation_steps
        )
        self.sampler = WeightedSampler(
            balanced_weights(data.labels, spec.class_balance), spec.batch_size, seed
        )
        self.conditions = Conditions.of(data, spec.condition)
        self.condition_of = self.conditions.numbered(data.labels, data.clusters)
        accelerator = make_accelerator(context, spec.precision, spec.gradient_accumulation_steps)
        self.device = str(accelerator.device)
        _, side, _, channels = data.pixels.shape
        self.latents = None
        if autoencoder is not None:
            self.latents = self._encode(autoencoder.to(self.device).eval())
            channels, side = self.latents[0].shape[1:3]

        torch.manual_seed(derive_seed(seed, "weights") % 2**63)
        unet = build_unet(spec, side, channels, len(self.conditions) + 1)
        self.state = TrainState(
            context, accelerator, unet,
            torch.optim.AdamW(unet.parameters(), lr=spec.learning_rate, foreach=True),
            lambda optimizer: get_scheduler(
                spec.lr_scheduler, optimizer, num_warmup_steps=spec.lr_warmup_steps,
                num_training_steps=spec.train_steps,
            ),
            slices, max_grad_norm=spec.max_grad_norm, ema_decay=spec.ema_decay,
        )  # fmt: skip
        self.unet = accelerator.unwrap_model(self.state.model)
        # Published for 1000 timesteps (Ho et al. 2020): fewer add the same noise in total.
        scale = 1000 / spec.num_train_timesteps
        self.noise_scheduler: Any = DDPMScheduler(
            spec.num_train_timesteps, beta_start=1e-4 * scale, beta_end=0.02 * scale,
            beta_schedule=spec.beta_schedule, prediction_type=spec.prediction_type,
        )  # fmt: skip

    def _encode(self, autoencoder: Any) -> tuple[Tensor, Tensor]:
        """Means and deviations of all latents, scaled for the diffusion."""
        means, deviations = encode(autoencoder, self.data.pixels)
        if self.spec.latent is not None and self.spec.latent.model is None:
            # Scaled to a deviation of 1, like the noise (Rombach et al. 2022).
            autoencoder.register_to_config(scaling_factor=1 / float(means.std()))
        shift, factor = autoencoder.config.shift_factor or 0.0, autoencoder.config.scaling_factor
        return (means - shift) * factor, deviations * factor

    def update(self, step: int) -> dict[str, float]:
        rows = self.sampler.rows(step)
        return {
            "loss": self.state.optimizer_step(
                self.seed, step, lambda piece: self._loss(step, rows, piece)
            )
        }

    def _loss(self, step: int, rows: np.ndarray, piece: slice) -> Tensor:
        clean, noise, timesteps, conditions = self._batch(step, rows, piece)
        noisy = self.noise_scheduler.add_noise(clean, noise, timesteps)
        with self.state.accelerator.autocast():
            predicted = predict(
                self.state.model, noisy, timesteps, conditions, self.spec.patch_size
            )
        return noise_loss(
            self.noise_scheduler, predicted, clean, noise, timesteps, self.spec.snr_gamma
        ).mean()

    def _batch(
        self, step: int, rows: np.ndarray, piece: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images or latents, noise, timesteps and conditions. Every draw is a function of image,
        position in the batch and step."""
        chosen = rows[piece]
        draws = [
            torch.Generator().manual_seed(
                derive_seed(self.seed, "noise", self.data.image_ids[row], place, step)
            )
            for place, row in zip(range(piece.start, piece.stop), chosen, strict=True)
        ]
        if self.latents is None:
            clean = to_signed(self.data.pixels[chosen])
        else:
            means, deviations = (values[chosen] for values in self.latents)
            drawn = [torch.randn(means.shape[1:], generator=draw) for draw in draws]
            clean = means + deviations * torch.stack(drawn)
        noise, timesteps, conditions = [], [], []
        for row, draw in zip(chosen, draws, strict=True):
            noise.append(torch.randn(clean.shape[1:], generator=draw))
            timesteps.append(
                int(torch.randint(self.spec.num_train_timesteps, (1,), generator=draw))
            )
            dropped = float(torch.rand(1, generator=draw)) < self.spec.condition_dropout
            conditions.append(len(self.conditions) if dropped else int(self.condition_of[row]))
        return (
            clean.to(self.device), torch.stack(noise).to(self.device),
            torch.tensor(timesteps, device=self.device),
            torch.tensor(conditions, device=self.device),
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        named = {f"unet.{name}": value for name, value in self.unet.state_dict().items()}
        return named | self.state.tensors()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.unet.load_state_dict(strip_prefix("unet.", tensors))
        self.state.restore(tensors)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network has its averaged weights and is in evaluation mode."""
        ema, parameters = self.state.ema, self.state.parameters
        assert ema is not None
        ema.store(parameters)
        ema.copy_to(parameters)
        self.unet.eval()
        try:
            yield
        finally:
            ema.restore(parameters)
            self.unet.train()

    def save(self, folder: Path) -> None:
        """Write the averaged network as a diffusers folder, the noise schedule, the conditions, and
        the autoencoder."""
        assert self.state.ema is not None
        self.state.ema.copy_to(self.state.parameters)
        self.unet.save_pretrained(folder / "unet", safe_serialization=True)
        self.noise_scheduler.save_pretrained(folder / "scheduler")
        if self.autoencoder is not None:
            self.autoencoder.save_pretrained(folder / "vae", safe_serialization=True)
        self.conditions.save(folder)
