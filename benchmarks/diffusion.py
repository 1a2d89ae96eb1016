"""The cost of the engine compared with plain diffusers: sampling a pipeline, and training a LoRA.

On a GPU: the architectures of Stable Diffusion 1.5 and XL with random weights (no checkpoint is
needed), at their own resolution in bf16. Elsewhere: a tiny pipeline with the same structure. Engine
and plain loop alternate in one process, with the same prompts, seeds, steps and batch:

    sampling    `Diffusion.sample` against a call of the pipeline
    training    `PipelineTraining.update` against explicit forward, backward, clip and step
    of peak     FLOPs of the denoiser and the decoder, as counted by torch, divided by the engine's
                seconds and by --peak

`python -m benchmarks.diffusion [--kind tiny|sd15|sdxl] [--batch N] [--steps N] [--rounds N]
[--quick]`
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import in_turn, machine, print_table, ratios
from engine.core.store import Store
from engine.data.images import Preprocess
from engine.generators import SampleBatch
from engine.generators.diffusion import Diffusion, DiffusionSpec
from engine.nets.denoising import Examples, PipelineTraining, encode_prompts, predict
from engine.nets.pipelines import checkpoint_of
from engine.work.fit import FitContext
from tests.pipelines import clip_tokenizer, save_pipeline

PROMPT = "a photo of a cat"
SIDES = {"tiny": 32, "sd15": 512, "sdxl": 1024}


def build(kind: str, folder: Path) -> Path:
    """Save a pipeline with random weights; returns its folder."""
    if kind == "tiny":
        return save_pipeline("sd", folder)
    torch.manual_seed(0)
    made = _sd15(folder) if kind == "sd15" else _sdxl(folder)
    made.to(torch.bfloat16).save_pretrained(folder / kind, safe_serialization=True)
    return folder / kind


def _text(tokenizer: Any, width: int, layers: int, heads: int, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=49_408, hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=77,
        projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=512,
    )  # fmt: skip


def _sd15(folder: Path) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer(folder / "words", 77)
    return StableDiffusionPipeline(
        vae=_vae(), text_encoder=_text(tokenizer, 768, 12, 12), tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(folder: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer(folder / "words", 77)
    return StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=_text(tokenizer, 768, 12, 12), tokenizer=tokenizer,
        text_encoder_2=_text(tokenizer, 1280, 32, 20, projected=True), tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )  # fmt: skip


def turns(
    engine: Callable[[], Any], plain: Callable[[], Any], rounds: int, device: str
) -> tuple[float, float, str]:
    """Median seconds of both, and their ratio as text, after a warm-up round."""

    def finished(work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            work()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    costs = in_turn({"engine": finished(engine), "plain": finished(plain)}, rounds + 1)
    first, second = (costs[name][1:] for name in ("engine", "plain"))
    wall, _ = ratios(first, second)
    medians = (statistics.median(cost.wall for cost in held) for held in (first, second))
    return next(medians), next(medians), wall.show()


def sampling(spec: DiffusionSpec, side: int, batch: int, rounds: int, device: str) -> list[Any]:
    """A row of the table: images/s of both, their ratio, and FLOPs of one image."""
    from diffusers import AutoPipelineForText2Image

    generator = Diffusion(spec, Preprocess(size=side))
    generator.load(None, device)
    plain = AutoPipelineForText2Image.from_pretrained(
        spec.model, torch_dtype=generator.pipeline.dtype, use_safetensors=True
    ).to(device)
    plain.set_progress_bar_config(disable=True)
    nothing, seeds = [None] * batch, list(range(batch))
    asked = SampleBatch(
        ["cat"] * batch, nothing, [PROMPT] * batch, nothing, nothing, nothing, seeds
    )

    def ours() -> None:
        found = generator.sample(asked)
        assert all(isinstance(image, np.ndarray) for image in found), found

    def theirs() -> None:
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        plain(
            [PROMPT] * batch, height=side, width=side, generator=draws, output_type="np",
            num_inference_steps=spec.num_inference_steps, guidance_scale=spec.guidance_scale,
        )  # fmt: skip

    first, second, ratio = turns(ours, theirs, rounds, device)
    flops = count_flops(theirs) / batch
    return [batch / first, batch / second, ratio, flops * batch / first]


def count_flops(work: Callable[[], Any]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def training(spec: DiffusionSpec, side: int, batch: int, rounds: int, device: str) -> list[Any]:
    """A row of the table: LoRA steps/s of both, their ratio, and FLOPs a second."""
    from peft import LoraConfig

    generator = Diffusion(spec, Preprocess(size=side))
    pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    pipeline = generator.open_pipeline(None, "text2image")
    assert generator.adaptation is not None
    generator.adaptation.attach(pipeline, {("cat", 0): "cat"})
    family = checkpoint_of(pipeline, spec.model).family
    assert family is not None
    with tempfile.TemporaryDirectory() as folder:
        context = FitContext(Store(folder), "w", "o", "a", "i", device=device)
        ids = [str(row) for row in range(batch)]
        examples = Examples(pixels, ids, [[PROMPT]] * batch, np.ones(batch))
        settings = generator.adaptation.spec
        ours = PipelineTraining(
            context, pipeline, family, examples, settings, spec.precision, side, 0
        )
        steps = iter(range(10**9))

        plain = generator.open_pipeline(None, "text2image").to(device)
        unet = plain.unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=list(family.lora_targets)))
        trained = [value for value in unet.parameters() if value.requires_grad]
        for value in trained:
            value.data = value.data.float()
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        with torch.no_grad():
            text = encode_prompts(plain, [PROMPT] * batch, torch.device(device))
        latents = torch.randn(batch, 4, side // plain.vae_scale_factor,
                              side // plain.vae_scale_factor, device=device)  # fmt: skip

        def theirs() -> None:
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (batch,), device=device)
            noisy = ours.objective.add_noise(latents, noise, timesteps)
            dtype, kind = plain.unet.dtype, torch.device(device).type
            with torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16):
                made = predict(plain, family, unet, noisy, timesteps, text, side)
            torch.nn.functional.mse_loss(made.float(), noise).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        first, second, ratio = turns(lambda: ours.update(next(steps)), theirs, rounds, device)
        return [1 / first, 1 / second, ratio, count_flops(theirs) / first]


def main() -> None:
    parser = argparse.ArgumentParser(description="the engine against plain diffusers")
    parser.add_argument("--kind", choices=sorted(SIDES), default="tiny")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="inference steps of each image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of the GPU in bf16")
    parser.add_argument("--quick", action="store_true", help="2 steps and rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps = arguments.rounds = 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = SIDES[arguments.kind]
    print(machine("torch", "diffusers", "transformers", "peft"))
    with tempfile.TemporaryDirectory() as folder:
        model = build(arguments.kind, Path(folder))
        common = {
            "model": str(model), "precision": "fp32" if arguments.kind == "tiny" else "bf16",
            "resolution": side, "num_inference_steps": arguments.steps, "guidance_scale": 5.0,
        }  # fmt: skip
        rows = []
        for name, measure, adapt in (
            ("sampling, images/s", sampling, None),
            ("LoRA, steps/s", training, {"name": "lora", "batch_size": arguments.batch}),
        ):
            found = measure(
                DiffusionSpec(**common, adapt=adapt), side, arguments.batch, arguments.rounds,
                device,
            )  # fmt: skip
            engine, plain, ratio, flops = found
            peak = f"{flops / 1e12 / arguments.peak:.1%}" if device == "cuda" else "no GPU"
            rows.append([name, f"{engine:.2f}", f"{plain:.2f}", ratio, f"{flops / 1e12:.3f}", peak])
    print_table(
        f"{arguments.kind} at {side} px on {device}, batch {arguments.batch},"
        f" {arguments.steps} steps",
        ["what", "engine", "plain", "seconds engine / plain", "TFLOP/s", "of peak"],
        rows,
    )


if __name__ == "__main__":
    main()
