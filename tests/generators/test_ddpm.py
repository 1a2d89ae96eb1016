from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.core.errors import StudyError
from engine.core.store import Store
from engine.data.images import Preprocess
from engine.generators import TrainingImages
from engine.generators.ddpm import Ddpm, DdpmSpec
from engine.nets.ddpm import denoise, guided_step, sampling_scheduler
from tests.generators import harness
from tests.generators.harness import Killed, batch, context, images_of

PREPROCESS = Preprocess(size=8, channels="L")


def spec(**fields: Any) -> DdpmSpec:
    small = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "train_steps": 6, "batch_size": 8,
        "learning_rate": 1e-2, "ema_decay": 0.5, "num_inference_steps": 4, "lr_warmup_steps": 1,
        "attention_resolution": 4,
    }  # fmt: skip
    return DdpmSpec(**{**small, **fields})


def images() -> TrainingImages:
    """Two classes that differ in their bright half."""
    pixels = np.zeros((12, 8, 8, 1), dtype=np.uint8)
    pixels[:6, :4], pixels[6:, 4:] = 255, 255
    return TrainingImages(
        pixels, [str(n) for n in range(12)], ["top"] * 6 + ["bottom"] * 6, [0, 1] * 6
    )


def fit(store: Store, made: DdpmSpec, attempt: str = "one", **fields: Any) -> dict[str, str]:
    return harness.fit(store, made, PREPROCESS, images(), attempt, **fields)


def loaded(store: Store, made: DdpmSpec, folder: Path) -> Ddpm:
    found: Ddpm = harness.loaded(store, made, PREPROCESS, folder)
    return found


def opened(kind: str, folder: Path) -> Any:
    """Open a part of a folder with plain diffusers."""
    import diffusers

    return getattr(diffusers, kind).from_pretrained(folder)


def test_killed_training_continues_to_bitwise_equal_weights(tmp_path: Path) -> None:
    whole = fit(Store(str(tmp_path / "whole")), spec(), checkpoint_every=2)
    store = Store(str(tmp_path / "killed"))

    def die(message: dict[str, Any]) -> None:
        if message["done"] >= 5:
            raise Killed

    with pytest.raises(Killed):
        fit(store, spec(), "one", checkpoint_every=2, on_report=die)
    assert [key for key in store.listing("work/x") if "checkpoint-00000004" in key]
    resumed = fit(store, spec(), "two", checkpoint_every=2)
    assert resumed == whole  # the history of the loss too


def test_dropout_is_reproduced_after_a_kill(tmp_path: Path) -> None:
    whole = fit(Store(str(tmp_path / "whole")), spec(dropout=0.3), checkpoint_every=2)
    store = Store(str(tmp_path / "killed"))

    def die(message: dict[str, Any]) -> None:
        if message["done"] >= 5:
            raise Killed

    with pytest.raises(Killed):
        fit(store, spec(dropout=0.3), "one", checkpoint_every=2, on_report=die)
    assert fit(store, spec(dropout=0.3), "two", checkpoint_every=2) == whole


def test_checkpoints_of_other_inputs_are_ignored_and_kept(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    fit(store, spec(), "one", checkpoint_every=2)
    other = context(store, "two")
    other.inputs = "retaken images"
    # A new training begins below the steps that the old one had reached.
    other.save_checkpoint(1, {}, {})
    found = other.latest_checkpoint()
    assert found is not None
    assert found[0] == 1
    own = context(store).latest_checkpoint()
    assert own is not None
    assert own[0] == 4


def test_checkpoint_of_other_inputs_is_not_adopted(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    fit(store, spec(), "one", checkpoint_every=2)
    assert context(store).latest_checkpoint() is not None
    other = context(store)
    other.inputs = "retaken images"
    assert other.latest_checkpoint() is None


def test_truncated_newest_checkpoint_falls_back_to_the_previous_one(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    fit(store, spec(), "one", checkpoint_every=2)
    (newest,) = [key for key in store.listing("work/x") if key.endswith("00000004.safetensors")]
    store.put(newest, store.read(newest)[:-7])
    found = context(store).latest_checkpoint()
    assert found is not None
    assert found[0] == 2


def test_loss_decreases(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    made = spec(train_steps=60)
    Ddpm(made, PREPROCESS).fit(context(store), images(), seed=5)
    import json

    history = json.loads(harness.published(store, "history.json"))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["step"] == 60


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_weighted_by_signal_to_noise_ratio(tmp_path: Path, prediction_type: str) -> None:
    import torch

    from engine.generators._ddpm_fit import Training
    from engine.nets.noise import noise_loss

    made = spec(prediction_type=prediction_type, snr_gamma=5.0)
    training = Training(context(Store(str(tmp_path))), made, images(), 0)
    clean, noise = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    timesteps = torch.tensor([2, 900])  # nearly clean, nearly noise
    alphas = training.noise_scheduler.alphas_cumprod[timesteps].view(2, 1, 1, 1)
    noisy = training.noise_scheduler.add_noise(clean, noise, timesteps)
    # A network that is wrong about the clean image by 0.1 everywhere.
    wrong = clean + 0.1
    predicted = (noisy - alphas.sqrt() * wrong) / (1 - alphas).sqrt()
    if prediction_type == "v_prediction":
        predicted = alphas.sqrt() * predicted - (1 - alphas).sqrt() * wrong
    ratio = (alphas / (1 - alphas)).flatten()
    expected = (ratio.clamp(max=5.0) * 0.01).mean()
    found = noise_loss(
        training.noise_scheduler, predicted, clean, noise, timesteps, made.snr_gamma
    ).mean()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_velocity_is_sampled_as_it_was_trained(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    made = spec(train_steps=250, num_inference_steps=10, block_out_channels=(16, 32),
                prediction_type="v_prediction", snr_gamma=5.0)  # fmt: skip
    fit(store, made)
    for scheduler in ("ddim", "dpmsolver++"):
        again = made.model_copy(update={"scheduler": scheduler})
        sampled = images_of(
            loaded(store, again, tmp_path / scheduler),
            batch(["top"] * 4 + ["bottom"] * 4, list(range(8))),
        )
        for label, found in zip(["top"] * 4 + ["bottom"] * 4, sampled, strict=True):
            assert (found[:4].mean() > found[4:].mean()) == (label == "top")


def test_neighbours_order_and_batch_position_change_no_pixel(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    fit(store, spec())
    generator = loaded(store, spec(), tmp_path / "weights")
    together = generator.sample(batch(["top", "bottom", "top", "top"], [1, 2, 3, 4]))
    shuffled = generator.sample(batch(["top", "top", "bottom", "bottom"], [3, 1, 9, 2]))
    assert np.array_equal(together[0], shuffled[1])
    assert np.array_equal(together[1], shuffled[3])
    assert np.array_equal(together[2], shuffled[0])
    assert not np.array_equal(together[0], together[2])


def test_images_of_each_sampler_show_their_class(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    made = spec(train_steps=250, num_inference_steps=10, block_out_channels=(16, 32))
    fit(store, made)
    for scheduler in ("ddim", "dpmsolver++"):
        sampled = made.model_copy(update={"scheduler": scheduler})
        generator = loaded(store, sampled, tmp_path / "weights")
        labels = ["top"] * 8 + ["bottom"] * 8
        pixels = np.stack(generator.sample(batch(labels, list(range(16))))).astype(float)
        # The class's half is brighter by most of the range: neither noise nor grey.
        contrast = pixels[:, :4].mean(axis=(1, 2, 3)) - pixels[:, 4:].mean(axis=(1, 2, 3))
        assert (contrast[:8] > 100).sum() >= 7, (scheduler, contrast)
        assert (contrast[8:] < -100).sum() >= 7, (scheduler, contrast)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_samplers_return_the_shape_of_the_study(
    tmp_path: Path, scheduler: Any, guidance_scale: float
) -> None:
    store = Store(str(tmp_path))
    fit(store, spec(train_steps=2))
    made = spec(train_steps=2, scheduler=scheduler, guidance_scale=guidance_scale)
    found = images_of(loaded(store, made, tmp_path / "weights"), batch(["top"], [1]))
    assert found[0].shape == (8, 8, 1)
    assert found[0].dtype == np.uint8


def test_broken_weights_give_reasons_instead_of_images(tmp_path: Path) -> None:
    import torch

    store = Store(str(tmp_path))
    fit(store, spec(train_steps=2))
    generator = loaded(store, spec(), tmp_path / "weights")
    with torch.no_grad():
        generator.unet.conv_out.bias.fill_(float("nan"))
    assert generator.sample(batch(["top", "bottom"], [1, 2])) == ["not_finite", "not_finite"]


def test_each_cluster_of_a_class_has_its_own_condition(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    made = spec(condition="cluster", train_steps=2)
    fit(store, made)
    generator = loaded(store, made, tmp_path / "weights")
    assert generator.conditions.pairs == [(a, b) for a in ("bottom", "top") for b in (0, 1)]
    first, second = generator.sample(batch(["top", "top"], [7, 7], [0, 1]))
    assert not np.array_equal(first, second)


def test_plain_diffusers_opens_the_weights(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    fit(store, spec(train_steps=2))
    folder = harness.weights(store, tmp_path / "weights")
    assert not list(folder.rglob("*.bin"))
    assert opened("UNet2DModel", folder / "unet").config.num_class_embeds == 3
    assert opened("DDPMScheduler", folder / "scheduler").config.num_train_timesteps == 1000


def test_indivisible_size_is_rejected_when_the_study_is_read() -> None:
    with pytest.raises(StudyError, match="halves the image 2 times, which 10 px"):
        Ddpm(spec(block_out_channels=(8, 8, 8)), Preprocess(size=10)).check()


def test_indivisible_batch_error_names_the_multiple(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="make it a multiple of 3"):
        fit(Store(str(tmp_path)), spec(), world_size=3)


def test_diverging_training_stops_with_an_error(tmp_path: Path) -> None:
    from engine.core.errors import EngineError

    with pytest.raises(EngineError, match="lower the learning rate"):
        fit(Store(str(tmp_path)), spec(learning_rate=1e30, max_grad_norm=1e30, train_steps=20))


def test_patches_cost_less_and_lose_nothing(tmp_path: Path) -> None:
    """The network sees 4 x 4 positions of 2 x 2 pixels, and predicts each pixel."""
    store = Store(str(tmp_path / "store"))
    made = spec(patch_size=2, attention_resolution=2)
    fit(store, made)
    generator = loaded(store, made, tmp_path / "weights")
    assert generator.unet.config.sample_size == 4
    assert generator.unet.config.in_channels == 4
    (image,) = generator.sample(batch(["top"], [1]))
    assert isinstance(image, np.ndarray)
    assert image.shape == (8, 8, 1)


def test_invalid_patch_size_is_rejected() -> None:
    with pytest.raises(StudyError, match="in squares of 4 px 2 times"):
        Ddpm(spec(patch_size=4, block_out_channels=(8, 8, 8)), PREPROCESS).check()


LATENT = {"block_out_channels": (8, 16), "train_steps": 5, "batch_size": 8}


def test_latents_of_a_trained_autoencoder_are_diffused_and_decoded(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    made = spec(latent=LATENT, attention_resolution=2, prediction_type="v_prediction")
    published = fit(store, made, checkpoint_every=2)
    assert {"unet/config.json", "vae/config.json"} <= set(published)
    assert [name for name in published if name.startswith("samples/autoencoder-")]
    assert [name for name in published if name.startswith("samples/diffusion-")]
    generator = loaded(store, made, tmp_path / "weights")
    assert generator.unet.config.sample_size == 4
    autoencoder = opened("AutoencoderKL", tmp_path / "weights" / "vae")
    assert autoencoder.config.scaling_factor != 0.18215  # measured on the training images
    (image,) = generator.sample(batch(["top"], [1]))
    assert isinstance(image, np.ndarray)
    assert image.shape == (8, 8, 1)


@pytest.mark.parametrize("last", [3, 8], ids=["in the autoencoder", "in the diffusion"])
def test_killed_latent_training_continues_to_bitwise_equal_weights(
    tmp_path: Path, last: int
) -> None:
    made = spec(latent=LATENT, prediction_type="v_prediction")
    whole = fit(Store(str(tmp_path / "whole")), made, checkpoint_every=2)
    store = Store(str(tmp_path / "killed"))

    def die(message: dict[str, Any]) -> None:
        if message["done"] >= last:
            raise Killed

    with pytest.raises(Killed):
        fit(store, made, "one", checkpoint_every=2, on_report=die)
    reported: list[int] = []
    resumed = fit(
        store, made, "two", checkpoint_every=2,
        on_report=lambda message: reported.append(message["done"]),
    )  # fmt: skip
    assert resumed == whole
    assert min(reported) >= last - 1


@pytest.mark.parametrize("whole", [True, False], ids=["a pipeline's", "by itself"])
def test_given_autoencoder_is_used_unchanged(tmp_path: Path, whole: bool) -> None:
    import torch

    from tests.pipelines import save_pipeline

    folder = save_pipeline("sd", tmp_path)
    model = folder if whole else folder / "vae"
    store = Store(str(tmp_path / "store"))
    made = spec(
        latent={"model": str(model)}, attention_resolution=2, prediction_type="v_prediction"
    )
    Ddpm(made, PREPROCESS).check()
    fit(store, made)
    generator = loaded(store, made, tmp_path / "weights")
    given = opened("AutoencoderKL", folder / "vae").state_dict()
    for name, value in generator.autoencoder.state_dict().items():
        assert torch.equal(value, given[name]), name
    (image,) = generator.sample(batch(["top"], [1]))
    assert isinstance(image, np.ndarray)
    assert image.shape == (8, 8, 1)  # grey, although the autoencoder has colours


def test_missing_autoencoder_is_named(tmp_path: Path) -> None:
    made = spec(latent={"model": str(tmp_path / "nowhere")}, prediction_type="v_prediction")
    with pytest.raises(StudyError, match=r"latent\.model: .*nowhere"):
        fit(Store(str(tmp_path / "store")), made)


def test_latents_with_too_many_halvings_are_rejected() -> None:
    made = spec(
        latent={"block_out_channels": (8, 8)},
        block_out_channels=(8, 8, 8, 8),
        prediction_type="v_prediction",
    )
    with pytest.raises(StudyError, match="3 times, which the latent of 4 px"):
        Ddpm(made, PREPROCESS).check()


def test_training_writes_sample_images(tmp_path: Path) -> None:
    import io

    from PIL import Image

    store = Store(str(tmp_path))
    shown = [name for name in fit(store, spec()) if name.startswith("samples/")]
    assert "samples/00000006.png" in shown
    picture = Image.open(io.BytesIO(harness.published(store, "samples/00000006.png")))
    assert picture.size == (2 * 8, 2 * 8)  # two classes, two images of each


class Overdriven:
    """A network that predicts black with a condition, and something lighter without."""

    def __init__(self, kept: Any) -> None:
        self.config = SimpleNamespace(in_channels=1, sample_size=8)
        self.kept = kept
        self.seen: list[tuple[float, Any]] = []

    def __call__(self, images: Any, timestep: Any, conditions: Any) -> Any:
        import torch

        kept = self.kept[timestep]
        self.seen.append((float(kept), images[conditions < 2]))
        clean = torch.where(conditions < 2, -1.0, -0.6).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=(images - kept.sqrt() * clean) / (1 - kept).sqrt())


def test_guidance_overshoot_is_clipped() -> None:
    """Otherwise every step would brighten the input of the next, more so with more steps."""
    settings = spec(guidance_scale=3.0, num_inference_steps=10)
    trained = {
        "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "beta_start": 1e-4,
        "beta_end": 0.02, "prediction_type": "epsilon",
    }  # fmt: skip
    scheduler = sampling_scheduler(settings, trained)
    network = Overdriven(scheduler.alphas_cumprod)
    (image,) = denoise(
        settings, network, scheduler, None, np.asarray([0]), 2, [5], "cpu", 10, 1
    )  # fmt: skip
    assert isinstance(image, np.ndarray)
    assert not image.any()
    drawn = network.seen[0][1]
    for kept, seen in network.seen[1:]:
        # Only black and the initial noise.
        noise = (seen + kept**0.5) / (1 - kept) ** 0.5
        np.testing.assert_allclose(noise, drawn, atol=0.02)


def test_guidance_without_clipping_is_as_published() -> None:
    import torch

    trained = {
        "num_train_timesteps": 100, "beta_schedule": "linear", "beta_start": 1e-3,
        "beta_end": 0.05, "prediction_type": "v_prediction",
    }  # fmt: skip
    scheduler = sampling_scheduler(spec(num_inference_steps=5), trained)
    scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(5)
    draw = torch.Generator().manual_seed(1)
    images, given, guided = (torch.randn(2, 1, 8, 8, generator=draw) for _ in range(3))
    for timestep in scheduler.timesteps:
        torch.testing.assert_close(
            guided_step(scheduler, given, guided, timestep, images),
            scheduler.step(guided, timestep, images).prev_sample, atol=1e-5, rtol=1e-5,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"latent": {}}, "latent needs prediction_type: v_prediction"),
        ({"beta_schedule": "linear", "num_train_timesteps": 40}, "linear needs 50"),
        (
            {"scheduler": "dpmsolver++", "num_train_timesteps": 50, "num_inference_steps": 50},
            "at most 0.8 num_train_timesteps",
        ),
    ],
)
def test_invalid_settings_are_rejected(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        spec(**fields)


def test_short_linear_schedule_also_ends_in_noise(tmp_path: Path) -> None:
    made = spec(beta_schedule="linear", num_train_timesteps=100)
    store = Store(str(tmp_path))
    fit(store, made)
    folder = harness.weights(store, tmp_path / "weights")
    scheduler = opened("DDPMScheduler", folder / "scheduler")
    assert float(scheduler.alphas_cumprod[-1]) < 1e-3


def test_given_autoencoder_must_divide_the_image(tmp_path: Path) -> None:
    import diffusers

    kind: Any = diffusers.AutoencoderKL
    kind(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=2,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    made = spec(latent={"model": str(tmp_path / "vae")}, block_out_channels=(8, 8, 8),
                prediction_type="v_prediction", attention_resolution=0)  # fmt: skip
    with pytest.raises(StudyError, match="2 times, which the latent of 5 px"):
        harness.fit(Store(str(tmp_path / "s")), made, Preprocess(size=10, channels="L"),
                    TrainingImages(np.zeros((4, 10, 10, 1), np.uint8), list("abcd"), ["x"] * 4,
                                   [0] * 4))  # fmt: skip
