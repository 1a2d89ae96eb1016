"""Shared by the tests of `diffusion`: generators with tiny pipelines, their fits, their batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine.core.store import Store
from engine.data.images import Preprocess
from engine.generators import SampleBatch, TrainingImages
from engine.generators.diffusion import Diffusion, DiffusionSpec
from tests.generators import harness

KINDS = ("sd", "sdxl", "sd3", "flux")
PREPROCESS = Preprocess(size=16)
# Enough to see a difference in pixels.
FAST = {"train_steps": 3, "batch_size": 2, "learning_rate": 0.05}


def made(model: Path | str, adapt: Any = None, **fields: Any) -> Diffusion:
    small = {"precision": "fp32", "resolution": 32, "num_inference_steps": 2}
    if isinstance(adapt, dict):
        adapt = {**FAST, **adapt}
    spec = DiffusionSpec(model=str(model), adapt=adapt, **{**small, **fields})
    return Diffusion(spec, fields.pop("preprocess", PREPROCESS))


def images() -> TrainingImages:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)
    return TrainingImages(
        pixels, [str(row) for row in range(8)], ["cat"] * 4 + ["dog"] * 4, [0, 1] * 4
    )


def fit(store: Store, generator: Diffusion, attempt: str = "one", **fields: Any) -> dict[str, str]:
    return harness.fit(store, generator.spec, PREPROCESS, images(), attempt, **fields)


def batch(generator: Diffusion, labels: list[str], **columns: Any) -> SampleBatch:
    nothing = [None] * len(labels)
    prompts = [generator.prompts_of(label, 0)[0] for label in labels]
    held = {
        "labels": labels, "clusters": nothing, "prompts": prompts, "negative_prompts": nothing,
        "strengths": nothing, "uris": nothing, "seeds": list(range(1, len(labels) + 1)),
    }  # fmt: skip
    return SampleBatch(**{**held, **columns})


def pixels(found: list[np.ndarray | str]) -> np.ndarray:
    assert not [image for image in found if isinstance(image, str)]
    return np.stack(found)


def trained(tmp_path: Path, model: Path, adapt: dict[str, Any]) -> tuple[Diffusion, Path]:
    """A generator that was fitted and loaded, and the folder of its weights."""
    store = Store(str(tmp_path / "store"))
    generator = made(model, adapt)
    generator.check()
    fit(store, generator)
    weights = harness.weights(store, tmp_path / "weights")
    generator = made(model, adapt)
    generator.load(weights, "cpu")
    return generator, weights


def plainly(pipeline: Any, generator: Diffusion, labels: list[str]) -> np.ndarray:
    """The output of plain diffusers for the same prompts and seeds, at the study's size."""
    import torch
    from PIL import Image

    prompts = [generator.prompts_of(label, 0)[0] for label in labels]
    draws = [torch.Generator().manual_seed(seed + 1) for seed in range(len(labels))]
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        prompts, height=32, width=32, num_inference_steps=2, generator=draws, output_type="np"
    ).images
    shown = (found.clip(0, 1) * 255).round().astype(np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC))
         for image in shown]
    )  # fmt: skip


def checkpoint(folder: Path) -> Any:
    import diffusers

    kind: Any = diffusers.DiffusionPipeline
    return kind.from_pretrained(folder, use_safetensors=True)
