from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.errors import EngineError, StudyError
from engine.core.store import Store
from engine.data.images import Preprocess
from engine.generators import TrainingImages
from engine.generators.dcgan import Dcgan, DcganSpec
from engine.nets.diffaugment import DRAWS, diffaugment
from tests.generators import harness
from tests.generators.harness import Killed, batch, images_of

PREPROCESS = Preprocess(size=16, channels="L")


def spec(**fields: Any) -> DcganSpec:
    small = {
        "width": 16, "max_width": 32, "latent_dim": 8, "train_steps": 6, "batch_size": 8,
        "collapse_below": 0.0,
        "ema_decay": 0.5,
    }  # fmt: skip
    return DcganSpec(**{**small, **fields})


def images(count: int = 32) -> TrainingImages:
    """Two classes that differ in their bright half; each image has its own grey level."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 60, (count, 16, 16, 1), dtype=np.uint8)
    bright = random.integers(150, 250, (count, 1, 1, 1), dtype=np.uint8)
    half = count // 2
    pixels[:half, :8], pixels[half:, 8:] = bright[:half], bright[half:]
    labels = ["top"] * half + ["bottom"] * half
    return TrainingImages(pixels, [str(n) for n in range(count)], labels, [0, 1] * half)


def fit(store: Store, made: DcganSpec, attempt: str = "one", **fields: Any) -> dict[str, str]:
    return harness.fit(store, made, PREPROCESS, images(), attempt, **fields)


def loaded(store: Store, made: DcganSpec, folder: Path) -> Dcgan:
    found: Dcgan = harness.loaded(store, made, PREPROCESS, folder)
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"augment": "ada", "r1_weight": 1.0, "r1_interval": 2, "generator_norm": "group",
         "discriminator_normalisation": "none", "loss": "non_saturating"},
        {"augment": "diffaugment", "gradient_accumulation_steps": 2,
         "discriminator_normalisation": "batch"},
    ],
    ids=["default", "ada and r1", "diffaugment, accumulated"],
)  # fmt: skip
def test_killed_training_continues_to_bitwise_equal_weights(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    made = spec(**fields)
    whole = fit(Store(str(tmp_path / "whole")), made, checkpoint_every=2)
    store = Store(str(tmp_path / "killed"))

    def die(message: dict[str, Any]) -> None:
        if message["done"] >= 5:
            raise Killed

    with pytest.raises(Killed):
        fit(store, made, "one", checkpoint_every=2, on_report=die)
    assert fit(store, made, "two", checkpoint_every=2) == whole


def test_accumulated_slices_equal_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    """With norms that do not depend on the batch."""
    tensors = []
    for parts in (1, 4):
        store = Store(str(tmp_path / str(parts)))
        made = spec(generator_norm="group", discriminator_normalisation="group",
                    gradient_accumulation_steps=parts, train_steps=3)  # fmt: skip
        fit(store, made)
        network = loaded(store, made, tmp_path / f"weights-{parts}").loaded
        tensors.append(network.state_dict())
    for name, value in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], value, atol=1e-4, rtol=1e-3)


def test_images_show_their_class(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    made = spec(
        train_steps=300, batch_size=16, generator_learning_rate=1e-3,
        discriminator_learning_rate=1e-3, ema_decay=0.9,
    )  # fmt: skip
    fit(store, made)
    generator = loaded(store, made, tmp_path / "weights")
    sampled = images_of(generator, batch(["top"] * 8 + ["bottom"] * 8, list(range(16))))
    for label, found in zip(["top"] * 8 + ["bottom"] * 8, sampled, strict=True):
        upper, lower = found[:8].mean(), found[8:].mean()
        assert (upper > lower) == (label == "top")
    history = json.loads(harness.published(store, "history.json"))
    assert history[-1]["variety"] > 0.3


def test_neighbours_and_order_change_no_pixel(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    fit(store, spec())
    generator = loaded(store, spec(), tmp_path / "weights")
    together = images_of(generator, batch(["top", "bottom", "top"], [1, 2, 3]))
    shuffled = generator.sample(batch(["top", "top", "bottom"], [3, 1, 2]))
    assert np.array_equal(together[0], shuffled[1])
    assert np.array_equal(together[1], shuffled[2])
    assert not np.array_equal(together[0], together[2])
    assert together[0].shape == PREPROCESS.shape


def test_each_cluster_has_its_own_condition(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    made = spec(condition="cluster", generator_learning_rate=1e-2, discriminator_learning_rate=1e-2)
    assert Dcgan(made, PREPROCESS).uses_clusters()
    fit(store, made)
    generator = loaded(store, made, tmp_path / "weights")
    assert len(generator.conditions) == 4
    # With equal latents, only the cluster can make these images differ.
    first, second, again = generator.sample(batch(["top"] * 3, [7, 7, 7], [0, 1, 0]))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, again)


def test_collapse_stops_the_training_with_an_error(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    # Without latents, nothing can differ.
    made = spec(latent_dim=1, train_steps=40, generator_learning_rate=1e-9, collapse_below=0.9)
    with pytest.raises(EngineError, match=r"collapsed at step \d+.* augment: ada"):
        fit(store, made)


def test_sizes_other_than_powers_of_two_are_rejected() -> None:
    with pytest.raises(StudyError, match="8, 16, 32, 64 or 128 px, not 28"):
        Dcgan(spec(), Preprocess(size=28)).check()
    Dcgan(spec(), Preprocess(size=128)).check()


def test_truncation_does_not_retrain_and_makes_images_more_similar(tmp_path: Path) -> None:
    assert Dcgan.sampling_fields == ("truncation",)
    store = Store(str(tmp_path))
    fit(store, spec())
    spread = []
    for truncation in (1.0, 0.1):
        generator = loaded(store, spec(truncation=truncation), tmp_path / f"at {truncation}")
        made = np.stack(generator.sample(batch(["top"] * 16, list(range(16)))))
        spread.append(made.astype(float).std(0).mean())
    assert spread[1] < 0.5 * spread[0]


def draws(count: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, DRAWS))


def test_diffaugment_leaves_unchosen_images_unchanged_and_passes_gradients() -> None:
    pictures = torch.rand(64, 3, 16, 16) * 2 - 1
    held = draws(64)
    assert torch.equal(diffaugment(pictures, held, 0.0), pictures)
    half = diffaugment(pictures, held, 0.5)
    changed = (half != pictures).flatten(1).any(1)
    assert changed.tolist() == (held[:, 0] < 0.5).tolist()
    pictures.requires_grad_(True)
    (gradient,) = torch.autograd.grad(diffaugment(pictures, held, 1.0).sum(), pictures)
    assert (gradient != 0).any()


def test_diffaugment_shifts_by_whole_pixels_and_cuts_a_square() -> None:
    still = np.full((1, DRAWS), 0.5)
    still[0, 0] = 0.0
    picture = torch.rand(1, 1, 16, 16) + 0.5

    def augmented(**changed: float) -> torch.Tensor:
        held = still.copy()
        for name, value in changed.items():
            held[0, int(name[1:])] = value
        return diffaugment(picture, held, 1.0)[0, 0]

    cut = augmented(d6=0.0, d7=0.0)  # around the upper left corner
    torch.testing.assert_close(cut[4:, 4:], picture[0, 0, 4:, 4:])
    assert (cut[:4, :4] == 0).all()
    moved = augmented(d4=0.999, d6=0.999, d7=0.999)  # down by two, the cut out of the way
    torch.testing.assert_close(moved[0:9, 0:9], picture[0, 0, 2:11, 0:9])
