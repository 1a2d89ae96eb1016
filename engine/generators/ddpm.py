"""Class-conditional pixel diffusion (Ho et al., 2020) with classifier-free guidance (Ho & Salimans,
2022).

The UNet and the samplers are diffusers'. An image is conditioned on its class, or on its cluster
within the class; one more embedding stands for "no condition". What is saved is a diffusers
`UNet2DModel` folder
of the averaged weights.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from engine.core.errors import StudyError
from engine.core.fit import FitContext
from engine.core.rng import derive_seed
from engine.generators import (
    Conditions,
    Generator,
    GeneratorSpec,
    SampleBatch,
    TrainingImages,
)
from engine.nets.training import (
    WeightedSampler,
    balanced_weights,
    below,
    descend,
    make_accelerator,
    optimizer_tensors,
    restore_optimizer,
    restore_schedule,
    run,
    seed_dropout,
    share_of_batch,
)

if TYPE_CHECKING:
    from torch import Tensor


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
    # Squares of so many pixels are one place to the network: about patch_size² times less work
    # (Luhman and Luhman 2022).
    patch_size: Literal[1, 2, 4] = 1
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
        if self.guidance_scale != 1 and self.condition_dropout == 0:
            raise PydanticCustomError(
                "explained", "guidance needs condition_dropout > 0, or guidance_scale 1"
            )
        return self


class Ddpm(Generator):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[GeneratorSpec]] = DdpmSpec
    trainable = True
    sampling_fields: ClassVar[tuple[str, ...]] = (
        "scheduler",
        "num_inference_steps",
        "guidance_scale",
    )
    spec: DdpmSpec

    def check(self) -> None:
        halvings, patch = len(self.spec.block_out_channels) - 1, self.spec.patch_size
        if self.preprocess.size % (2**halvings * patch):
            squares = f" in squares of {patch} px" if patch > 1 else ""
            raise StudyError(
                f"generators: ddpm halves the image{squares} {halvings} times, which"
                f" {self.preprocess.size} px"
                " does not allow; change preprocess.size, patch_size or block_out_channels"
            )

    def uses_clusters(self) -> bool:
        return self.spec.condition == "cluster"

    def fingerprint(self) -> dict[str, Any]:
        return {name: getattr(self.spec, name) for name in (*self.sampling_fields, "precision")}

    def fit(self, context: FitContext, data: TrainingImages, seed: int) -> None:
        training = _Training(context, self.spec, self.preprocess.shape, data, seed)
        report_every = max(1, min(20, self.spec.train_steps // 20))
        history = run(
            context, training, self.spec.train_steps,
            checkpoint_every=context.checkpoint_every, report_every=report_every,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            training.save(Path(folder))
            (Path(folder) / "history.json").write_text(json.dumps(history))
            context.publish(
                Path(folder), {"loss": history[-1]["loss"], "steps": self.spec.train_steps}
            )

    def load(self, weights: Path | None, device: str) -> None:
        import torch
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DModel

        if weights is None:
            raise StudyError("ddpm has no weights to load; train it first")
        self.device = device
        self.unet = (
            UNet2DModel.from_pretrained(weights / "unet", use_safetensors=True).to(device).eval()
        )
        if device == "cuda":
            self.unet.to(memory_format=torch.channels_last)
        self.conditions = Conditions.load(weights, self.spec.condition)
        kind = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}[
            self.spec.scheduler
        ]
        settings = json.loads((weights / "scheduler" / "scheduler_config.json").read_text())
        names = (
            "num_train_timesteps",
            "beta_schedule",
            "beta_start",
            "beta_end",
            "prediction_type",
        )
        kept = {name: settings[name] for name in names}
        if self.spec.scheduler == "ddim":
            # Pixels live in [-1, 1]; clipping the predicted clean image keeps guidance from
            # burning it out.
            kept |= {"clip_sample": True, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
        else:
            # Near pure noise the clean image is a small difference divided by almost nothing:
            # start a little later on the cosine schedule, and clip, as is advised for pixels.
            kept |= {
                "algorithm_type": "dpmsolver++",
                "final_sigmas_type": "zero",
                "lambda_min_clipped": -5.1,
                "thresholding": True,
            }
        self.scheduler = kind(**kept)

    def sample(self, batch: SampleBatch) -> list[np.ndarray | str]:
        import torch

        conditions = torch.from_numpy(self.conditions.numbered(batch.labels, batch.clusters)).to(
            self.device
        )
        height, width, channels = self.preprocess.shape
        # On the CPU, one generator for each image: neighbours, batch size and device change no
        # draw.
        noise = torch.stack(
            [
                torch.randn(channels, height, width, generator=torch.Generator().manual_seed(seed))
                for seed in batch.seeds
            ]
        )
        images = noise.to(self.device) * self.scheduler.init_noise_sigma
        guided = self.spec.guidance_scale != 1
        nobody = torch.full_like(conditions, len(self.conditions))
        self.scheduler.set_timesteps(self.spec.num_inference_steps, device=self.device)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            self.spec.precision
        ]
        with (
            torch.inference_mode(),
            torch.autocast(self.device, dtype, enabled=dtype != torch.float32),
        ):
            for timestep in self.scheduler.timesteps:
                inputs = self.scheduler.scale_model_input(images, timestep)
                if guided:
                    both = _predict(
                        self.unet, torch.cat([inputs, inputs]), timestep,
                        torch.cat([conditions, nobody]), self.spec.patch_size,
                    )  # fmt: skip
                    with_condition, without = both.float().chunk(2)
                    predicted = without + self.spec.guidance_scale * (with_condition - without)
                else:
                    predicted = _predict(
                        self.unet, inputs, timestep, conditions, self.spec.patch_size
                    ).float()
                images = self.scheduler.step(predicted, timestep, images).prev_sample
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        pixels = (
            ((images.clamp(-1, 1) + 1) * 127.5)
            .round()
            .to(torch.uint8)
            .permute(0, 2, 3, 1)
            .cpu()
            .numpy()
        )
        return [image if good else "not_finite" for image, good in zip(pixels, finite, strict=True)]


def _predict(
    unet: Any, images: Tensor, timesteps: Tensor, conditions: Tensor, patch: int
) -> Tensor:
    """What the network says of noisy images (n, channels, height, width)."""
    from torch.nn.functional import pixel_shuffle, pixel_unshuffle

    if patch == 1:
        return unet(images, timesteps, conditions).sample  # type: ignore[no-any-return]
    made = unet(pixel_unshuffle(images, patch), timesteps, conditions).sample
    return pixel_shuffle(made, patch)


class _Training:
    """The state of one training: network, averaged network, optimizer."""

    def __init__(
        self,
        context: FitContext,
        spec: DdpmSpec,
        shape: tuple[int, int, int],
        data: TrainingImages,
        seed: int,
    ) -> None:
        import torch
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.spec, self.data, self.seed, self.torch = spec, data, seed, torch
        size, _, channels = shape
        self.slices = share_of_batch(
            spec.batch_size, context.rank, context.world_size, spec.gradient_accumulation_steps
        )
        self.sampler = WeightedSampler(
            balanced_weights(data.labels, spec.class_balance), spec.batch_size, seed
        )
        self.conditions = Conditions.of(data, spec.condition)
        self.condition_of = self.conditions.numbered(data.labels, data.clusters)

        torch.manual_seed(derive_seed(seed, "weights") % 2**63)
        side, channels = size // spec.patch_size, channels * spec.patch_size**2
        levels = [side >> level for level in range(len(spec.block_out_channels))]
        attends = [width <= spec.attention_resolution for width in levels]
        unet = UNet2DModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=spec.block_out_channels,
            layers_per_block=spec.layers_per_block,
            down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
            up_block_types=[
                "AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)
            ],
            num_class_embeds=len(self.conditions) + 1,
            norm_num_groups=8,
            attention_head_dim=8 if any(attends) else None,
            add_attention=any(attends),
            dropout=spec.dropout,
        ).to(memory_format=torch.channels_last)
        self.accelerator = make_accelerator(
            context, spec.precision, spec.gradient_accumulation_steps
        )
        optimizer = torch.optim.AdamW(unet.parameters(), lr=spec.learning_rate, foreach=True)
        # Alone, a worker needs no gradients of others: DDP would cost a third of its time on a CPU.
        self.model = self.accelerator.prepare_model(unet, evaluation_mode=context.world_size == 1)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.unet = self.accelerator.unwrap_model(self.model)
        self.ema = EMAModel(self.unet.parameters(), decay=spec.ema_decay, foreach=True)
        self.ema.to(self.accelerator.device)
        # Stepped by hand: accelerate's own wrapper multiplies steps by the number of workers.
        self.lr_scheduler = get_scheduler(
            spec.lr_scheduler,
            optimizer,
            num_warmup_steps=spec.lr_warmup_steps,
            num_training_steps=spec.train_steps,
        )
        self.noise_scheduler = DDPMScheduler(
            spec.num_train_timesteps,
            beta_schedule=spec.beta_schedule,
            prediction_type=spec.prediction_type,
        )

    def update(self, step: int) -> dict[str, float]:
        from engine.nets.denoising import noise_loss

        total = 0.0
        # Dropout draws from torch's own generator: f(seed, step, rank), as all else.
        rank = self.accelerator.process_index
        seed_dropout(str(self.accelerator.device), self.seed, "dropout", step, rank)
        rows = self.sampler.rows(step)
        for piece in self.slices:
            with self.accelerator.accumulate(self.model):
                clean, noise, timesteps, conditions = self._batch(step, rows, piece)
                noisy = self.noise_scheduler.add_noise(clean, noise, timesteps)
                with self.accelerator.autocast():
                    predicted = _predict(
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
        """Images, noise, timesteps and conditions; every draw belongs to (image, place in the
        batch, step)."""
        torch, device = self.torch, self.accelerator.device
        held = rows[piece]
        pixels = torch.from_numpy(np.ascontiguousarray(self.data.pixels[held])).permute(0, 3, 1, 2)
        clean = pixels.to(device).float() / 127.5 - 1
        noise, timesteps, conditions = [], [], []
        for place, row in zip(range(piece.start, piece.stop), held, strict=True):
            draw = torch.Generator().manual_seed(
                derive_seed(self.seed, "noise", self.data.image_ids[row], place, step)
            )
            noise.append(torch.randn(clean.shape[1:], generator=draw))
            timesteps.append(
                int(torch.randint(self.spec.num_train_timesteps, (1,), generator=draw))
            )
            dropped = float(torch.rand(1, generator=draw)) < self.spec.condition_dropout
            conditions.append(len(self.conditions) if dropped else int(self.condition_of[row]))
        return (
            clean, torch.stack(noise).to(device),
            torch.tensor(timesteps, device=device), torch.tensor(conditions, device=device),
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        named = {f"unet.{name}": value for name, value in self.unet.state_dict().items()}
        named |= {f"ema.{index}": value for index, value in enumerate(self.ema.shadow_params)}
        named["ema_step"] = self.torch.tensor(self.ema.optimization_step)
        named["lr_step"] = self.torch.tensor(self.lr_scheduler.last_epoch)
        return named | optimizer_tensors(self.optimizer, "optimizer.")

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.unet.load_state_dict(below("unet.", tensors))
        self.ema.shadow_params = [
            tensors[f"ema.{index}"].to(self.accelerator.device)
            for index in range(len(self.ema.shadow_params))
        ]
        self.ema.optimization_step = int(tensors["ema_step"])
        restore_optimizer(self.optimizer, "optimizer.", tensors)
        restore_schedule(self.lr_scheduler, int(tensors["lr_step"]))

    def save(self, folder: Path) -> None:
        """Write the averaged network as a diffusers folder, the noise schedule and the
        conditions."""
        self.ema.copy_to(self.unet.parameters())
        self.unet.save_pretrained(folder / "unet", safe_serialization=True)
        self.noise_scheduler.save_pretrained(folder / "scheduler")
        self.conditions.save(folder)
