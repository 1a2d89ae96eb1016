from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.errors import StudyError
from engine.core.store import Store
from engine.data.images import Preprocess
from engine.generators import Conditions
from engine.generators.pggan import Pggan, PgganSpec
from engine.nets import pggan
from engine.nets.adversarial import AdversarialTraining, ConditionedImages
from tests.generators import harness
from tests.generators.harness import Killed, batch, images_of
from tests.generators.test_dcgan import images

PREPROCESS = Preprocess(size=16, channels="L")


def spec(**fields: Any) -> PgganSpec:
    small = {
        "width": 8, "max_width": 16, "latent_dim": 8, "train_steps": 8, "batch_size": 8,
        "ema_decay": 0.5, "collapse_below": 0.0,
    }  # fmt: skip
    return PgganSpec(**{**small, **fields})


def fit(store: Store, made: PgganSpec, attempt: str = "one", **fields: Any) -> dict[str, str]:
    return harness.fit(store, made, PREPROCESS, images(), attempt, **fields)


def loaded(store: Store, made: PgganSpec, folder: Path) -> Pggan:
    found: Pggan = harness.loaded(store, made, PREPROCESS, folder)
    return found


def test_network_grows_and_fades_in_each_level() -> None:
    at = pggan.growth(100, levels=3, last_share=0.5)
    levels = [at(step)[0] for step in range(100)]
    assert levels == [0] * 25 + [1] * 25 + [2] * 50
    assert at(0) == (0, 1.0)
    shares = [at(step)[1] for step in range(25, 50)]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.1
    assert shares[12:] == [1.0] * 13
    assert at(99) == (2, 1.0)
    assert pggan.growth(10, levels=1, last_share=0.5)(9) == (0, 1.0)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_both_networks_work_at_every_level(level: int) -> None:
    shape: Any = {"classes": 3, "width": 8, "max_width": 16, "levels": 3, "channels": 3}
    generator, discriminator = pggan.Generator(8, **shape), pggan.Discriminator(**shape)
    classes = torch.tensor([0, 1, 2, 0])
    for share in (0.3, 1.0):
        for network in (generator, discriminator):
            network.level, network.share = level, share
        made = generator(torch.randn(4, 8), classes)
        assert made.shape == (4, 3, 4 * 2**level, 4 * 2**level)
        scores, misread = discriminator(made, classes)
        assert scores.shape == misread.shape == (4,)
        if level:
            resized = discriminator.at_stage(torch.rand(4, 3, 16, 16))
            assert resized.shape == made.shape


def test_fading_starts_at_the_previous_level_and_ends_at_its_own() -> None:
    generator = pggan.Generator(8, 2, 8, 16, 3, 1)
    latents, classes = torch.randn(4, 8), torch.tensor([0, 1, 0, 1])
    generator.level = 1
    before = generator(latents, classes)
    generator.level, generator.share = 2, 1e-6
    torch.testing.assert_close(
        generator(latents, classes), torch.nn.functional.interpolate(before, scale_factor=2),
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip


def test_every_layer_starts_at_the_same_scale() -> None:
    """The equalised learning rate: activations keep their scale through the network."""
    torch.manual_seed(0)
    discriminator = pggan.Discriminator(2, 16, 64, 3, 1)
    scores, _ = discriminator(torch.randn(64, 1, 16, 16), torch.zeros(64, dtype=torch.long))
    assert 0.05 < float(scores.detach().std()) < 20
    weight = discriminator.get_parameter("from_image.0.weight")
    assert float(weight.detach().std()) == pytest.approx(1, abs=0.2)


def test_killed_training_continues_to_bitwise_equal_weights(tmp_path: Path) -> None:
    whole = fit(Store(str(tmp_path / "whole")), spec(), checkpoint_every=3)
    store = Store(str(tmp_path / "killed"))

    def die(message: dict[str, Any]) -> None:
        if message["done"] >= 5:
            raise Killed

    with pytest.raises(Killed):
        fit(store, spec(), "one", checkpoint_every=3, on_report=die)
    assert fit(store, spec(), "two", checkpoint_every=3) == whole


@pytest.mark.slow
def test_images_show_their_class(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    made = spec(train_steps=400, batch_size=16, ema_decay=0.9, generator_learning_rate=3e-3,
                discriminator_learning_rate=3e-3)  # fmt: skip
    fit(store, made)
    labels = ["top"] * 8 + ["bottom"] * 8
    generator = loaded(store, made, tmp_path / "weights")
    sampled = images_of(generator, batch(labels, list(range(16))))
    right = [
        (found[:8].mean() > found[8:].mean()) == (label == "top")
        for label, found in zip(labels, sampled, strict=True)
    ]
    assert sum(right) >= 15
    assert sampled[0].shape == PREPROCESS.shape


def test_neighbours_and_order_change_no_pixel(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    fit(store, spec())
    generator = loaded(store, spec(), tmp_path / "weights")
    together = generator.sample(batch(["top", "bottom", "top"], [1, 2, 3]))
    shuffled = generator.sample(batch(["top", "top", "bottom"], [3, 1, 2]))
    assert np.array_equal(together[0], shuffled[1])
    assert np.array_equal(together[1], shuffled[2])
    assert not np.array_equal(together[0], together[2])


def test_sizes_other_than_powers_of_two_are_rejected() -> None:
    with pytest.raises(StudyError, match="64, 128 or 256 px, not 48"):
        Pggan(spec(), Preprocess(size=48)).check()


def in_training(folder: Path, made: PgganSpec) -> AdversarialTraining:
    data = images()
    classes = Conditions.of(data, "class").numbered(data.labels, data.clusters)
    held = ConditionedImages(data.pixels, classes, np.ones(len(classes)), data.image_ids)
    return AdversarialTraining(
        harness.context(Store(str(folder))), lambda: Pggan(made, PREPROCESS).networks(2),
        "wasserstein", held, made, 0, gradient_penalty=10.0,
    )  # fmt: skip


def test_minibatch_statistics_compare_images_of_one_class(tmp_path: Path) -> None:
    """Otherwise a generator with one image per class would pass as diverse."""
    training = in_training(tmp_path, spec(batch_size=16))
    classes = training.data.classes
    drawn = [training._rows(step) for step in range(20)]
    for rows in drawn:
        groups = classes[rows].reshape(-1, 4)
        assert (groups == groups[:, :1]).all()
    assert len(np.unique(np.concatenate(drawn))) == len(classes)
    assert 0.3 < classes[np.concatenate(drawn)].mean() < 0.7


def test_discriminator_may_take_more_steps(tmp_path: Path) -> None:
    training = in_training(tmp_path, spec(discriminator_steps=3))
    for step in range(2):
        training.update(step)
    taken = {
        name: {int(state["step"]) for state in optimizer.state.values()}
        for name, optimizer in training.optimizers.items()
    }
    assert taken == {"generator": {2}, "discriminator": {6}}


def test_both_networks_reduce_the_classification_loss(tmp_path: Path) -> None:
    training = in_training(
        tmp_path,
        spec(
            batch_size=16,
            train_steps=1000,
            generator_learning_rate=3e-3,
            discriminator_learning_rate=3e-3,
        ),
    )
    fake, seen = training._latents("deceive", 0, np.arange(8), slice(0, 8)), np.arange(8) % 2

    def misread() -> float:
        with torch.no_grad():
            made = training.generator(fake, torch.from_numpy(seen))
            return float(training.discriminator(made, torch.from_numpy(seen))[1].mean())

    before = misread()
    for step in range(150):
        training.update(step)
    assert misread() < 0.5 * before


def test_batches_that_mix_classes_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="batch_size: 10 is not a multiple of 4"):
        in_training(tmp_path, spec(batch_size=10))
    with pytest.raises(StudyError, match="1 workers x 4 accumulation steps"):
        in_training(tmp_path, spec(batch_size=8, gradient_accumulation_steps=4))


def test_ada_is_rejected() -> None:
    with pytest.raises(ValueError, match="pggan does not support augment: ada; set diffaugment"):
        spec(augment="ada")
