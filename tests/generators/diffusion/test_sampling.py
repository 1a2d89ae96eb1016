"""Checkpoints of each family, sampled: from text, from images, inpainting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.images import Preprocess
from engine.generators.diffusion import Diffusion, DiffusionSpec
from engine.work.stage import Offload
from tests.generators.diffusion.tiny import (
    KINDS,
    batch,
    checkpoint,
    images,
    made,
    pixels,
    plainly,
)


@pytest.mark.parametrize("kind", KINDS)
def test_unadapted_checkpoint_equals_plain_diffusers(folders: dict[str, Path], kind: str) -> None:
    generator = made(folders[kind])
    generator.load(None, "cpu")
    found = pixels(generator.sample(batch(generator, ["cat", "dog"])))
    assert found.shape == (2, 16, 16, 3)
    assert (found == plainly(checkpoint(folders[kind]), generator, ["cat", "dog"])).all()


@pytest.mark.parametrize("kind", KINDS)
def test_image_depends_on_its_seed_and_not_on_its_neighbours(
    folders: dict[str, Path], kind: str
) -> None:
    generator = made(folders[kind])
    generator.load(None, "cpu")
    one = pixels(generator.sample(batch(generator, ["cat", "dog"], seeds=[1, 2])))
    two = pixels(generator.sample(batch(generator, ["cat", "cat"], seeds=[1, 3])))
    assert (one[0] == two[0]).all()
    assert (one[1] != two[1]).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["image2image", "inpainting"])
def test_images_start_from_their_parents(folders: dict[str, Path], kind: str, mode: str) -> None:
    generator = made(folders[kind], mode=mode, num_inference_steps=4)
    generator.load(None, "cpu")
    parents = np.zeros((2, 16, 16, 3), np.uint8)
    parents[1] = 255

    def sampled(strength: float) -> np.ndarray:
        asked = batch(
            generator, ["cat"] * 2, strengths=[strength] * 2, parents=parents, seeds=[1, 1]
        )
        return pixels(generator.sample(asked)).astype(float)

    near = sampled(0.3)
    assert (near[0] != near[1]).any()
    # With more noise, the images of different parents are harder to distinguish.
    far = sampled(1.0)
    assert np.abs(near[0] - near[1]).mean() > np.abs(far[0] - far[1]).mean()


def test_strengths_in_one_batch_may_differ(folders: dict[str, Path]) -> None:
    generator = made(folders["sd"], mode="image2image", num_inference_steps=4)
    generator.load(None, "cpu")
    parents = images().pixels[:3]
    mixed = batch(generator, ["cat"] * 3, strengths=[0.3, 1.0, 0.3], parents=parents)
    alone = batch(generator, ["cat"], strengths=[1.0], parents=parents[1:2], seeds=[2])
    assert (pixels(generator.sample(mixed))[1] == pixels(generator.sample(alone))[0]).all()


def test_32_bit_strength_takes_the_same_number_of_steps(folders: dict[str, Path]) -> None:
    generator = made(folders["sd"], mode="image2image", num_inference_steps=10)
    generator.load(None, "cpu")
    parents = images().pixels[:1]
    one, other = (
        pixels(generator.sample(batch(generator, ["cat"], strengths=[strength], parents=parents)))
        for strength in (0.7, float(np.float32(0.7)))
    )
    assert (one == other).all()


def test_repainted_region_follows_the_mask(folders: dict[str, Path]) -> None:
    masks = {}
    for name in ("center", "surroundings", "anywhere"):
        generator = made(folders["sd"], mode="inpainting", mask=name)
        generator.load(None, "cpu")
        masks[name] = np.asarray(generator._mask(3)) > 0
    assert masks["center"][8:24, 8:24].all()
    assert masks["center"].sum() == 16 * 16
    assert (masks["surroundings"] == ~masks["center"]).all()
    assert masks["anywhere"].sum() == 16 * 16
    assert (masks["anywhere"] != masks["center"]).any()


def test_negative_prompts_change_images(folders: dict[str, Path]) -> None:
    generator = made(folders["sd"], guidance_scale=5.0)
    generator.load(None, "cpu")
    plain = pixels(generator.sample(batch(generator, ["cat"])))
    against = pixels(generator.sample(batch(generator, ["cat"], negative_prompts=["blurry"])))
    assert (plain != against).any()


def test_grey_studies_get_grey_images(folders: dict[str, Path]) -> None:
    spec = DiffusionSpec(
        model=str(folders["sd"]), precision="fp32", resolution=32, num_inference_steps=2
    )
    generator = Diffusion(spec, Preprocess(size=16, channels="L"))
    generator.load(None, "cpu")
    assert pixels(generator.sample(batch(generator, ["cat"]))).shape == (1, 16, 16, 1)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++", "euler", "unipc"])
def test_another_scheduler_samples_the_same_checkpoint(
    folders: dict[str, Path], scheduler: str
) -> None:
    generator = made(folders["sd"], scheduler=scheduler, num_inference_steps=4)
    generator.load(None, "cpu")
    assert generator.pipeline.scheduler.config.beta_end == 0.012
    assert pixels(generator.sample(batch(generator, ["cat"]))).std() > 0


@pytest.mark.parametrize(
    "offload",
    # accelerate's hooks of single layers need an accelerator.
    ["model", pytest.param("sequential", marks=pytest.mark.gpu)],
)
def test_offloaded_networks_make_the_same_images(
    folders: dict[str, Path], offload: Offload
) -> None:
    generator, plain = made(folders["sd"]), made(folders["sd"])
    generator.offload = offload
    device = "cpu" if offload == "model" else "cuda"
    generator.load(None, device)
    plain.load(None, device)
    asked = batch(plain, ["cat", "dog"])
    assert (pixels(generator.sample(asked)) == pixels(plain.sample(asked))).all()


def test_non_finite_images_are_reported(folders: dict[str, Path]) -> None:
    import torch

    generator = made(folders["sd"])
    generator.load(None, "cpu")
    with torch.no_grad():
        generator.pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    assert generator.sample(batch(generator, ["cat"])) == ["not_finite"]


class Prude:
    """The answer of a safety checker that withholds every second image and blackens it."""

    def __call__(self, images: Any, **_: Any) -> tuple[Any, list[bool]]:
        held = [row % 2 == 1 for row in range(len(images))]
        for row, flag in enumerate(held):
            if flag:
                images[row] = 0
        return images, held


def test_images_withheld_by_the_safety_checker_are_reported(
    folders: dict[str, Path],
) -> None:
    from transformers import CLIPImageProcessor

    generator = made(folders["sd"])
    generator.load(None, "cpu")
    generator.pipeline.register_modules(feature_extractor=CLIPImageProcessor())
    generator.pipeline.safety_checker = Prude()
    found = generator.sample(batch(generator, ["cat", "dog", "cat"]))
    assert isinstance(found[0], np.ndarray)
    assert found[1] == "safety_filtered"
    assert isinstance(found[2], np.ndarray)
