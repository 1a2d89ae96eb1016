"""The training of a class-conditional diffusion, in pixels or in the latents of an autoencoder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from engine.core.errors import StudyError
from engine.core.rng import derive_seed
from engine.data.images import grid
from engine.generators import Conditions, TrainingImages
from engine.nets.autoencoder import encode, open_autoencoder, to_signed, train_autoencoder
from engine.nets.denoising import noise_loss
from engine.nets.training import (
    WeightedSampler,
    balanced_weights,
    below,
    descend,
    make_accelerator,
    optimizer_tensors,
    restore_optimizer,
    restore_scaler,
    restore_schedule,
    run,
    scaler_tensors,
    seed_dropout,
    share_of_batch,
)
from engine.work.fit import FitContext

if TYPE_CHECKING:
    from engine.generators.ddpm import Ddpm, DdpmSpec

# Of a look at a training: conditions, images of each, and steps to make them.
_SHOWN, _EACH, _LOOK_STEPS = 10, 2, 10


def fit(generator: Ddpm, context: FitContext, data: TrainingImages, seed: int) -> None:
    """Train, the autoencoder first where there is one to train, and publish."""
    spec = generator.spec
    autoencoder, part = None, context
    if spec.latent is not None and spec.latent.model is not None:
        autoencoder = open_autoencoder(spec.latent)
        smaller, side = 2 ** (len(autoencoder.config.block_out_channels) - 1), data.pixels.shape[1]
        if side % smaller:
            raise StudyError(
                f"generators: ddpm's latent.model makes {smaller} px one, which {side} px does not"
                " allow; change preprocess.size"
            )
        generator.check_halvings(side // smaller)
    elif spec.latent is not None:
        whole = spec.latent.train_steps + spec.train_steps
        autoencoder = train_autoencoder(
            context.part("autoencoder", 0, whole), spec.latent, data.pixels, data.image_ids,
            balanced_weights(data.labels, spec.class_balance), spec.precision,
            derive_seed(seed, "autoencoder"),
        )  # fmt: skip
        part = context.part("diffusion", spec.latent.train_steps, whole)
    training = Training(part, spec, data, seed, autoencoder)

    def look() -> bytes:
        conditions = training.conditions
        shown = range(min(_SHOWN, len(conditions)))
        with training.averaged():
            images = generator.denoise(
                training.unet, generator.make_scheduler(training.noise_scheduler.config),
                autoencoder, np.repeat(np.asarray(shown), _EACH), len(conditions),
                [derive_seed(seed, "look", number) for number in range(len(shown) * _EACH)],
                training.device, min(spec.num_inference_steps, _LOOK_STEPS),
            )  # fmt: skip
        black = np.zeros(generator.preprocess.shape, np.uint8)
        small = [black if isinstance(image, str) else image for image in images]
        return grid([small[row::_EACH] for row in range(_EACH)])

    history = run(
        part, training, spec.train_steps, checkpoint_every=context.checkpoint_every,
        report_every=max(1, min(20, spec.train_steps // 20)), look=look,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        training.save(Path(folder))
        (Path(folder) / "history.json").write_text(json.dumps(history))
        context.publish(Path(folder), {"loss": history[-1]["loss"], "steps": spec.train_steps})


class Training:
    """The state of one training: network, averaged network, optimizer."""

    def __init__(
        self,
        context: FitContext,
        spec: DdpmSpec,
        data: TrainingImages,
        seed: int,
        autoencoder: AutoencoderKL | None = None,
    ) -> None:
        self.spec, self.data, self.seed, self.autoencoder = spec, data, seed, autoencoder
        self.slices = share_of_batch(
            spec.batch_size, context.rank, context.world_size, spec.gradient_accumulation_steps
        )
        self.sampler = WeightedSampler(
            balanced_weights(data.labels, spec.class_balance), spec.batch_size, seed
        )
        self.conditions = Conditions.of(data, spec.condition)
        self.condition_of = self.conditions.numbered(data.labels, data.clusters)
        self.accelerator = make_accelerator(
            context, spec.precision, spec.gradient_accumulation_steps
        )
        self.device = str(self.accelerator.device)
        _, side, _, channels = data.pixels.shape
        self.latents = None
        if autoencoder is not None:
            self.latents = self._encode(autoencoder.to(self.device).eval())
            channels, side = self.latents[0].shape[1:3]

        torch.manual_seed(derive_seed(seed, "weights") % 2**63)
        unet = build(spec, side, channels, len(self.conditions) + 1)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=spec.learning_rate, foreach=True)
        # Alone, a worker needs no gradients of others: DDP would cost a third of its time on a CPU.
        self.model = self.accelerator.prepare_model(unet, evaluation_mode=context.world_size == 1)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.unet = self.accelerator.unwrap_model(self.model)
        self.ema = EMAModel(self.unet.parameters(), decay=spec.ema_decay, foreach=True)
        self.ema.to(self.device)
        # Stepped by hand: accelerate's own wrapper multiplies steps by the number of workers.
        self.lr_scheduler = get_scheduler(
            spec.lr_scheduler,
            optimizer,
            num_warmup_steps=spec.lr_warmup_steps,
            num_training_steps=spec.train_steps,
        )
        # Published for 1000 timesteps (Ho et al. 2020): fewer take as much noise in all.
        scale = 1000 / spec.num_train_timesteps
        self.noise_scheduler = DDPMScheduler(
            spec.num_train_timesteps,
            beta_start=1e-4 * scale,
            beta_end=0.02 * scale,
            beta_schedule=spec.beta_schedule,
            prediction_type=spec.prediction_type,
        )

    def _encode(self, autoencoder: AutoencoderKL) -> tuple[Tensor, Tensor]:
        """Means and deviations of all latents, scaled as diffusion wants them."""
        means, deviations = encode(autoencoder, self.data.pixels)
        if self.spec.latent is not None and self.spec.latent.model is None:
            # A deviation of 1, as the noise has (Rombach et al. 2022).
            autoencoder.register_to_config(scaling_factor=1 / float(means.std()))
        shift, factor = autoencoder.config.shift_factor or 0.0, autoencoder.config.scaling_factor
        return (means - shift) * factor, deviations * factor

    def update(self, step: int) -> dict[str, float]:
        total = 0.0
        # Dropout draws from torch's own generator: f(seed, step, rank), as all else.
        rank = self.accelerator.process_index
        seed_dropout(self.device, self.seed, "dropout", step, rank)
        rows = self.sampler.rows(step)
        for piece in self.slices:
            with self.accelerator.accumulate(self.model):
                clean, noise, timesteps, conditions = self._batch(step, rows, piece)
                noisy = self.noise_scheduler.add_noise(clean, noise, timesteps)
                with self.accelerator.autocast():
                    predicted = predict(
                        self.model, noisy, timesteps, conditions, self.spec.patch_size
                    )
                loss = noise_loss(
                    self.noise_scheduler, predicted, clean, noise, timesteps, self.spec.snr_gamma
                ).mean()
                descend(self.accelerator, self.model, self.optimizer, loss, self.spec.max_grad_norm)
            total += float(self.accelerator.reduce(loss.detach(), "mean")) / len(self.slices)
        self.lr_scheduler.step()
        self.ema.step(self.unet.parameters())
        return {"loss": total}

    def _batch(
        self, step: int, rows: np.ndarray, piece: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images or latents, noise, timesteps and conditions; every draw belongs to (image, place
        in the batch, step)."""
        held = rows[piece]
        draws = [
            torch.Generator().manual_seed(
                derive_seed(self.seed, "noise", self.data.image_ids[row], place, step)
            )
            for place, row in zip(range(piece.start, piece.stop), held, strict=True)
        ]
        if self.latents is None:
            clean = to_signed(self.data.pixels[held])
        else:
            means, deviations = (values[held] for values in self.latents)
            drawn = [torch.randn(means.shape[1:], generator=draw) for draw in draws]
            clean = means + deviations * torch.stack(drawn)
        noise, timesteps, conditions = [], [], []
        for row, draw in zip(held, draws, strict=True):
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
        named |= {f"ema.{index}": value for index, value in enumerate(self.ema.shadow_params)}
        named["ema_step"] = torch.tensor(self.ema.optimization_step)
        named["lr_step"] = torch.tensor(self.lr_scheduler.last_epoch)
        named |= scaler_tensors(self.accelerator)
        return named | optimizer_tensors(self.optimizer, "optimizer.")

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.unet.load_state_dict(below("unet.", tensors))
        self.ema.shadow_params = [
            tensors[f"ema.{index}"].to(self.device) for index in range(len(self.ema.shadow_params))
        ]
        self.ema.optimization_step = int(tensors["ema_step"])
        restore_scaler(self.accelerator, tensors)
        restore_optimizer(self.optimizer, "optimizer.", tensors)
        restore_schedule(self.lr_scheduler, int(tensors["lr_step"]))

    def averaged(self) -> _Averaged:
        """A context in which the network has its averaged weights and is in evaluation."""
        return _Averaged(self)

    def save(self, folder: Path) -> None:
        """Write the averaged network as a diffusers folder, the noise schedule, the conditions, and
        the autoencoder."""
        self.ema.copy_to(self.unet.parameters())
        self.unet.save_pretrained(folder / "unet", safe_serialization=True)
        self.noise_scheduler.save_pretrained(folder / "scheduler")
        if self.autoencoder is not None:
            self.autoencoder.save_pretrained(folder / "vae", safe_serialization=True)
        self.conditions.save(folder)


class _Averaged:
    def __init__(self, training: Training) -> None:
        self.training = training

    def __enter__(self) -> None:
        parameters = list(self.training.unet.parameters())
        self.training.ema.store(parameters)
        self.training.ema.copy_to(parameters)
        self.training.unet.eval()

    def __exit__(self, *error: Any) -> None:
        self.training.ema.restore(list(self.training.unet.parameters()))
        self.training.unet.train()


def build(spec: DdpmSpec, side: int, channels: int, conditions: int) -> UNet2DModel:
    """The network for images or latents of a side and so many channels."""
    side, channels = side // spec.patch_size, channels * spec.patch_size**2
    levels = [side >> level for level in range(len(spec.block_out_channels))]
    attends = [width <= spec.attention_resolution for width in levels]
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=spec.block_out_channels,
        layers_per_block=spec.layers_per_block,
        down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        num_class_embeds=conditions,
        norm_num_groups=8,
        attention_head_dim=8 if any(attends) else None,
        add_attention=any(attends),
        dropout=spec.dropout,
        resnet_time_scale_shift=spec.resnet_time_scale_shift,
    ).to(memory_format=torch.channels_last)


def predict(unet: Any, images: Tensor, timesteps: Tensor, conditions: Tensor, patch: int) -> Tensor:
    """What the network says of noisy images (n, channels, height, width)."""
    if patch == 1:
        return torch.as_tensor(unet(images, timesteps, conditions).sample)
    patches = torch.nn.functional.pixel_unshuffle(images, patch)
    made = unet(patches, timesteps, conditions).sample
    return torch.nn.functional.pixel_shuffle(made, patch)
