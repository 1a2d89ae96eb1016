"""Tiny pipelines of each family, adapted in each way, saved, loaded and sampled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.core.errors import StudyError
from engine.core.images import Preprocess
from engine.core.store import Store
from engine.generators import SampleBatch, TrainingImages, TrainingRows
from engine.generators.diffusion import Diffusion, DiffusionSpec
from engine.study import Study, validate
from tests.generators import harness
from tests.generators.harness import Killed, context
from tests.pipelines import LENGTH, save_pipeline

KINDS = ("sd", "sdxl", "sd3", "flux")
PREPROCESS = Preprocess(size=16)
# Enough to see a difference in pixels.
FAST = {"train_steps": 3, "batch_size": 2, "learning_rate": 0.05}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Of networks this small, threads would wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pipelines")
    return {kind: save_pipeline(kind, place) for kind in KINDS}


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
    weights = store.download("weights/one", tmp_path / "weights")
    generator = made(model, adapt)
    generator.load(weights, "cpu")
    return generator, weights


def plainly(pipeline: Any, generator: Diffusion, labels: list[str]) -> np.ndarray:
    """What diffusers alone makes of the same prompts and seeds, at the study's size."""
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
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, use_safetensors=True)


# Sampling


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_as_it_is_makes_what_plain_diffusers_makes(
    folders: dict[str, Path], kind: str
) -> None:
    generator = made(folders[kind])
    generator.load(None, "cpu")
    found = pixels(generator.sample(batch(generator, ["cat", "dog"])))
    assert found.shape == (2, 16, 16, 3)
    assert (found == plainly(checkpoint(folders[kind]), generator, ["cat", "dog"])).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_hangs_on_its_seed_and_not_on_its_neighbours(
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
    # The more noise there is, the less of the parents is left to tell their images apart.
    far = sampled(1.0)
    assert np.abs(near[0] - near[1]).mean() > np.abs(far[0] - far[1]).mean()


def test_strengths_of_one_batch_may_differ(folders: dict[str, Path]) -> None:
    generator = made(folders["sd"], mode="image2image", num_inference_steps=4)
    generator.load(None, "cpu")
    parents = images().pixels[:3]
    mixed = batch(generator, ["cat"] * 3, strengths=[0.3, 1.0, 0.3], parents=parents)
    alone = batch(generator, ["cat"], strengths=[1.0], parents=parents[1:2], seeds=[2])
    found = generator.sample(mixed)
    assert (found[1] == generator.sample(alone)[0]).all()  # type: ignore[union-attr]


def test_a_strength_of_32_bits_takes_as_many_steps(folders: dict[str, Path]) -> None:
    generator = made(folders["sd"], mode="image2image", num_inference_steps=10)
    generator.load(None, "cpu")
    parents = images().pixels[:1]
    one, other = (
        generator.sample(batch(generator, ["cat"], strengths=[strength], parents=parents))[0]
        for strength in (0.7, float(np.float32(0.7)))
    )
    assert (one == other).all()  # type: ignore[union-attr]


def test_what_is_painted_anew_is_where_the_mask_says(folders: dict[str, Path]) -> None:
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


def test_negative_prompts_change_what_is_made(folders: dict[str, Path]) -> None:
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
    # accelerate's hooks of single layers need a device of their own.
    ["model", pytest.param("sequential", marks=pytest.mark.gpu)],
)
def test_offloaded_networks_make_the_same_images(folders: dict[str, Path], offload: str) -> None:
    generator, plain = made(folders["sd"]), made(folders["sd"])
    generator.offload = offload  # type: ignore[assignment]
    device = "cpu" if offload == "model" else "cuda"
    generator.load(None, device)
    plain.load(None, device)
    asked = batch(plain, ["cat", "dog"])
    assert (pixels(generator.sample(asked)) == pixels(plain.sample(asked))).all()


def test_images_that_are_not_finite_are_named(folders: dict[str, Path]) -> None:
    import torch

    generator = made(folders["sd"])
    generator.load(None, "cpu")
    with torch.no_grad():
        generator.pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    assert generator.sample(batch(generator, ["cat"])) == ["not_finite"]


class Prude:
    """A safety checker's answer: it holds back every second image, and blackens it as that does."""

    def __call__(self, images: Any, **_: Any) -> tuple[Any, list[bool]]:
        held = [row % 2 == 1 for row in range(len(images))]
        for row, flag in enumerate(held):
            if flag:
                images[row] = 0
        return images, held


def test_images_that_the_checkpoint_s_filter_holds_back_are_named(
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


# What is saved loads elsewhere


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [False, True], ids=["denoiser", "and text encoders"])
def test_lora_loads_by_load_lora_weights(
    folders: dict[str, Path], tmp_path: Path, kind: str, text: bool
) -> None:
    adapt = {"name": "lora", "rank": 2, "lora_alpha": 4, "train_text_encoder": text}
    generator, weights = trained(tmp_path, folders[kind], adapt)
    found = pixels(generator.sample(batch(generator, ["cat", "dog"])))
    pipeline = checkpoint(folders[kind])
    before = plainly(pipeline, generator, ["cat", "dog"])
    pipeline.load_lora_weights(weights / "adapted", weight_name="pytorch_lora_weights.safetensors")
    assert (plainly(pipeline, generator, ["cat", "dog"]) == found).all()
    assert (before != found).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_training_loads_by_from_pretrained(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    generator, weights = trained(tmp_path, folders[kind], {"name": "full", "ema_decay": 0.5})
    found = pixels(generator.sample(batch(generator, ["cat", "dog"])))
    opened = plainly(checkpoint(weights / "adapted"), generator, ["cat", "dog"])
    assert (opened == found).all()
    assert (plainly(checkpoint(folders[kind]), generator, ["cat", "dog"]) != found).any()


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("vectors", [1, 2])
def test_learnt_words_load_by_load_textual_inversion(
    folders: dict[str, Path], tmp_path: Path, kind: str, vectors: int
) -> None:
    adapt = {"name": "textual_inversion", "num_vectors": vectors, "learning_rate": 1.0}
    generator, weights = trained(tmp_path, folders[kind], adapt)
    found = pixels(generator.sample(batch(generator, ["cat", "dog"])))
    pipeline = checkpoint(folders[kind])
    before = plainly(pipeline, generator, ["cat", "dog"])
    for path in sorted((weights / "adapted").glob("*.safetensors")):
        second = path.name.endswith(".2.safetensors")
        pipeline.load_textual_inversion(
            path,
            text_encoder=pipeline.text_encoder_2 if second else pipeline.text_encoder,
            tokenizer=pipeline.tokenizer_2 if second else pipeline.tokenizer,
        )
    assert (plainly(pipeline, generator, ["cat", "dog"]) == found).all()
    assert (before != found).any()
    assert len(list((weights / "adapted").glob("*.safetensors"))) == 2 * (
        2 if kind == "sdxl" else 1
    )


def test_textual_inversion_moves_its_words_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    """The rest of the embeddings, and all other weights, are the checkpoint's."""
    generator, _ = trained(tmp_path, folders["sd"], {"name": "textual_inversion"})
    before = checkpoint(folders["sd"]).text_encoder.state_dict()
    after = generator.pipeline.text_encoder.state_dict()
    for name, value in before.items():
        assert (after[name][: len(value)] == value).all(), name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_dreambooth_learns_beside_what_the_checkpoint_makes(
    folders: dict[str, Path], tmp_path: Path, method: str
) -> None:
    adapt = {"name": "dreambooth", "method": method, "rank": 2, "num_class_images": 3}
    generator, _ = trained(tmp_path, folders["sd"], adapt)
    store = Store(str(tmp_path / "store"))
    made_beside = [key for key in store.listing("work/x") if "/prior/" in key]
    assert len(made_beside) == 2 * 3  # "a photo of cat", "a photo of dog"
    assert generator.prompts_of("cat", 0) == ["a photo of sks cat"]
    assert pixels(generator.sample(batch(generator, ["cat"]))).std() > 0


def test_the_weight_of_what_it_made_itself_counts(folders: dict[str, Path], tmp_path: Path) -> None:
    digests = [
        fit(
            Store(str(tmp_path / str(weight))),
            made(folders["sd"], {
                "name": "dreambooth", "rank": 2, "num_class_images": 2, "prior_loss_weight": weight,
            }),
        )["adapted/pytorch_lora_weights.safetensors"]
        for weight in (0.1, 2.0)
    ]  # fmt: skip
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    "adapt", [{"name": "lora", "rank": 2}, {"name": "full"}], ids=lambda adapt: adapt["name"]
)
def test_what_the_denoiser_learnt_to_predict_is_what_is_sampled(
    folders: dict[str, Path], tmp_path: Path, adapt: dict[str, Any]
) -> None:
    generator, _ = trained(tmp_path, folders["sd"], {**adapt, "prediction_type": "v_prediction"})
    assert generator.pipeline.scheduler.config.prediction_type == "v_prediction"


def test_all_weights_are_moved_less_than_a_lora_s() -> None:
    rates = [
        made("owner/model", {"name": "dreambooth", "method": method, "learning_rate": None})
        for method in ("lora", "full")
    ]
    found = [held.adaptation.settings.learning_rate for held in rates if held.adaptation]
    assert found == [1e-4, 5e-6]


def test_a_training_of_another_checkpoint_is_not_gone_on_with(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Neither its weights nor the images that it made of its own are taken over."""
    store = Store(str(tmp_path))
    adapt = {"name": "dreambooth", "rank": 2, "num_class_images": 1}
    fit(store, made(folders["sd"], adapt))
    other = context(store, "two")
    other.inputs = "another checkpoint"
    made(folders["sd"], adapt).fit(other, images(), seed=5)
    assert len([key for key in store.listing("work/x") if "/prior/" in key]) == 2 * 2


# One for all, for each class, for each cluster


@pytest.mark.parametrize("name", ["lora", "full"])
@pytest.mark.parametrize(("scope", "count"), [("class", 2), ("cluster", 4)])
def test_each_class_or_cluster_has_its_own(
    folders: dict[str, Path], tmp_path: Path, name: str, scope: str, count: int
) -> None:
    adapt = {"name": name, "scope": scope, **({"rank": 2} if name == "lora" else {})}
    generator, weights = trained(tmp_path, folders["sd"], adapt)
    assert len([path for path in weights.iterdir() if path.is_dir() and path.name != "looks"]) == (
        count
    )
    assert generator.uses_clusters() == (scope == "cluster")
    # The same prompt and seed by each adaptation, in one batch and by itself.
    pairs = [("cat", 0), ("dog", 0)] if scope == "class" else [("cat", 0), ("cat", 1)]
    asked = batch(
        generator, [label for label, _ in pairs], clusters=[cluster for _, cluster in pairs],
        prompts=["a photo"] * 2, seeds=[1, 1],
    )  # fmt: skip
    found = pixels(generator.sample(asked))
    assert (found[0] != found[1]).any()
    assert (pixels(generator.sample(asked)) == found).all()


@pytest.mark.parametrize(
    "adapt",
    [
        {"name": "lora", "rank": 2, "lora_dropout": 0.2},
        {"name": "full", "ema_decay": 0.5, "train_text_encoder": True},
        {"name": "textual_inversion"},
        {"name": "dreambooth", "rank": 2, "num_class_images": 2},
        {"name": "lora", "rank": 2, "scope": "class"},
    ],
    ids=lambda adapt: "-".join(str(value) for value in adapt.values()),
)
def test_a_killed_training_goes_on_to_bitwise_equal_weights(
    folders: dict[str, Path], tmp_path: Path, adapt: dict[str, Any]
) -> None:
    adapt = {**adapt, "train_steps": 5}
    whole = fit(Store(str(tmp_path / "whole")), made(folders["sd"], adapt), checkpoint_every=2)
    store = Store(str(tmp_path / "killed"))
    # Of two parts, the second is cut off.
    last = 8 if adapt.get("scope") == "class" else 3

    def die(message: dict[str, Any]) -> None:
        if message["done"] >= last:
            raise Killed

    with pytest.raises(Killed):
        fit(store, made(folders["sd"], adapt), "one", checkpoint_every=2, on_report=die)
    told: list[int] = []
    resumed = fit(
        store, made(folders["sd"], adapt), "two", checkpoint_every=2,
        on_report=lambda message: told.append(message["done"]),
    )  # fmt: skip
    assert resumed == whole
    assert min(told) > last - 2  # what was trained is not trained again


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_accumulated_pieces_make_the_step_of_the_whole(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    losses = []
    for pieces in (1, 2):
        store = Store(str(tmp_path / str(pieces)))
        adapt = {"name": "lora", "rank": 2, "gradient_accumulation_steps": pieces, "batch_size": 4}
        told: list[float] = []
        fit(
            store, made(folders[kind], adapt),
            on_report=lambda message, held=told: held.append(message["loss"]),
        )  # fmt: skip
        losses.append(told[-1])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"noise_offset": 0.3}, {"snr_gamma": 5.0}, {"prediction_type": "v_prediction"},
        {"proportion_empty_prompts": 0.9}, {"random_flip": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_of_training_counts(
    folders: dict[str, Path], tmp_path: Path, fields: dict[str, Any]
) -> None:
    lora = {"name": "lora", "rank": 2}
    one, other = (
        fit(Store(str(tmp_path / name)), made(folders["sd"], {**lora, **more}))
        for name, more in (("one", {}), ("other", fields))
    )
    file = "adapted/pytorch_lora_weights.safetensors"
    assert one[file] != other[file]


def test_kept_latents_are_those_that_would_be_made_again(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    lora = {"name": "lora", "rank": 2, "random_flip": True}
    one, other = (
        fit(Store(str(tmp_path / str(kept))), made(folders["sd"], {**lora, "cache_latents": kept}))
        for kept in (True, False)
    )
    assert one == other


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_a_flow_s_noise_levels_are_weighed(
    folders: dict[str, Path], tmp_path: Path, scheme: str
) -> None:
    lora = {"name": "lora", "rank": 2}
    one, other = (
        fit(Store(str(tmp_path / name)), made(folders["sd3"], {**lora, "weighting_scheme": name}))
        for name in ("logit_normal", scheme)
    )
    file = "adapted/pytorch_lora_weights.safetensors"
    assert one[file] != other[file]


@pytest.fixture
def _new_accelerate() -> Iterator[None]:
    """One process has one precision; this test's is another than the others'."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("_new_accelerate")
def test_in_half_precision_what_is_trained_is_kept_in_full(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    store = Store(str(tmp_path / "store"))
    fit(store, made(folders["sdxl"], {"name": "lora", "rank": 2}, precision="bf16"))
    weights = store.download("weights/one", tmp_path / "weights")
    held = load_file(weights / "adapted" / "pytorch_lora_weights.safetensors")
    assert {str(value.dtype) for value in held.values()} == {"torch.float32"}
    generator = made(folders["sdxl"], {"name": "lora", "rank": 2}, precision="bf16")
    generator.load(weights, "cpu")
    assert pixels(generator.sample(batch(generator, ["cat"]))).std() > 0


def test_trainings_show_pictures_of_themselves(folders: dict[str, Path], tmp_path: Path) -> None:
    import io

    from PIL import Image

    store = Store(str(tmp_path))
    published = fit(store, made(folders["sd"], {"name": "lora", "rank": 2, "train_steps": 20}))
    shown = sorted(name for name in published if name.startswith("looks/"))
    assert shown[-1] == "looks/00000020.png"
    assert len(shown) >= 4
    picture = Image.open(io.BytesIO(store.read(f"weights/one/{shown[-1]}")))
    assert picture.size == (2 * 16, 16)  # one for each prompt


# Prompts


def rows(count: int = 6, clusters: int = 1) -> TrainingRows:
    return TrainingRows(
        [str(row) for row in range(count)], [row % clusters for row in range(count)]
    )


def test_prompts_are_filled_and_taken_in_turn() -> None:
    generator = made(
        "owner/model", prompt=["a photo of {label}", "{label}, close up"],
        class_names={"DR": "an eye with diabetic retinopathy"}, negative_prompt="blurry {label}",
    )  # fmt: skip
    found = list(generator.plan("DR", 3, rows(), 0))
    assert [request.prompt for request in found] == [
        "a photo of an eye with diabetic retinopathy",
        "an eye with diabetic retinopathy, close up",
        "a photo of an eye with diabetic retinopathy",
    ]
    assert found[0].negative_prompt == "blurry an eye with diabetic retinopathy"
    assert list(generator.plan("DR", 9, rows(), 0))[:3] == found
    assert generator.prompts_of("no_rain", 0)[0] == "a photo of no rain"


def test_classes_and_clusters_may_have_prompts_of_their_own() -> None:
    generator = made(
        "owner/model", prompt="a photo of {label}", prompts={"dog": "a dog outside"},
        cluster_prompts={"dog": {"1": ["a dog at night", "a dog at dusk"]}},
    )  # fmt: skip
    assert generator.uses_clusters()
    assert generator.prompts_of("cat", 1) == ["a photo of cat"]
    assert generator.prompts_of("dog", 0) == ["a dog outside"]
    assert generator.prompts_of("dog", 1) == ["a dog at night", "a dog at dusk"]


def test_clusters_and_templates_do_not_keep_step() -> None:
    generator = made("owner/model", prompt=["one {label} {cluster}", "two {label} {cluster}"])
    found = {request.prompt for request in generator.plan("cat", 8, rows(8, clusters=2), 0)}
    assert found == {"one cat 0", "two cat 0", "one cat 1", "two cat 1"}


def test_an_image_that_starts_from_another_is_of_its_cluster() -> None:
    generator = made("owner/model", mode="image2image", prompt="{label} {cluster}")
    for request in generator.plan("cat", 8, rows(8, clusters=3), 0):
        assert request.cluster == int(request.parent_id or "x") % 3
        assert request.strength == 0.5


def test_what_a_tokenizer_cuts_off_is_told(folders: dict[str, Path]) -> None:
    generator = made(folders["sd"])
    assert generator.prompt_warnings(["a photo of cat"]) == []
    room = LENGTH - 2  # a start and an end
    fits = " ".join(["cat"] * room)
    assert generator.prompt_warnings([fits]) == []
    (told,) = generator.prompt_warnings(["a photo of cat", f"{fits} dog"])
    assert "1 of 2 prompts are longer than the 16 tokens" in told
    assert "never sees 'dog'" in told


def test_a_learnt_word_counts_as_its_embeddings(folders: dict[str, Path]) -> None:
    room = LENGTH - 2
    for vectors, fits in ((1, True), (4, False)):
        adapt = {"name": "textual_inversion", "num_vectors": vectors}
        generator = made(folders["sd"], adapt, prompt=" ".join(["cat"] * (room - 1)) + " {token}")
        assert (generator.prompt_warnings(generator.prompts_of("cat", 0)) == []) == fits


def test_where_a_longer_text_encoder_reads_along_nothing_is_cut_off(
    folders: dict[str, Path],
) -> None:
    prompt = "a b c d e f g h i j k l m n o p"
    assert made(folders["sdxl"]).prompt_warnings([prompt])
    assert not made(folders["flux"]).prompt_warnings([prompt])


# What cannot work is refused when the study is read


def refused(model: Path | str, match: str, adapt: Any = None, **fields: Any) -> None:
    with pytest.raises(StudyError, match=match) as caught:
        made(model, adapt, **fields).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_words_cannot_be_learnt_where_no_pipeline_takes_them(
    folders: dict[str, Path], kind: str
) -> None:
    refused(folders[kind], "no place for new words", "textual_inversion")


def test_words_cannot_be_learnt_without_a_text_encoder(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    import json
    import shutil

    folder = tmp_path / "blind"
    shutil.copytree(folders["sd"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    refused(folder, "has no text_encoder", "textual_inversion")


def test_words_cannot_be_learnt_from_prompts_without_them(folders: dict[str, Path]) -> None:
    refused(
        folders["sd"], "lacks {token}, the word that textual_inversion learns",
        "textual_inversion", prompts={"cat": "a photo of {label}"},
    )  # fmt: skip
    made(folders["sd"], "textual_inversion", negative_prompt="blurry").check()


def test_what_reads_no_negative_prompt_is_given_none(folders: dict[str, Path]) -> None:
    refused(folders["flux"], "reads none; leave it out", negative_prompt="blurry")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"scheduler": ["diffusers", "EDMEulerScheduler"]}, "its EDMEulerScheduler is not known"),
        ({"requires_aesthetics_score": True}, "a refiner is not known"),
        ({"text_encoder_2": [None, None]}, "has no text_encoder_2 to train"),
    ],
    ids=["edm", "refiner", "no text encoder"],
)
def test_checkpoints_that_are_trained_otherwise_are_refused(
    folders: dict[str, Path], tmp_path: Path, changed: dict[str, Any], match: str
) -> None:
    import json
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(folders["sdxl"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changed}))
    refused(folder, match, {"name": "lora", "train_text_encoder": True})


def test_other_pipelines_are_sampled_and_not_adapted(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    made(tmp_path).check()
    refused(tmp_path, "is a KandinskyPipeline; leave adapt out", "lora")


def test_inpainting_checkpoints_are_neither_adapted_nor_sampled_from_text(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    import json
    import shutil

    folder = tmp_path / "inpaint"
    shutil.copytree(folders["sd"], folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    refused(folder, "takes a mask beside the image", "lora")
    refused(folder, "say mode: inpainting")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"resolution": 33}, "33 px is no multiple of 2"),
        ({"prompt": "a photo of {token}"}, "has {token}, which dreambooth"),
    ],
)
def test_what_the_checkpoint_cannot_do_is_refused(
    folders: dict[str, Path], fields: dict[str, Any], match: str
) -> None:
    refused(folders["sd"], match, **fields)


def test_a_flow_takes_no_scheduler_of_diffusion(folders: dict[str, Path]) -> None:
    refused(folders["sd3"], "learnt a flow; say scheduler: checkpoint", scheduler="ddim")


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "there is no such folder")
    refused(tmp_path, "has no model_index.json")
    made("owner/never-fetched").check()  # what is not here yet cannot be judged


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"prompt": "a {colour} cat"}, "names {colour}; there are {label}"),
        ({"prompt": "a {label"}, "lone brace .* write {{ for a brace"),
        ({"prompt": []}, "at least 1 item"),
        ({"adapt": "lore"}, "no generators adapt named 'lore'; there are: dreambooth, full, lora"),
        ({"adapt": {"name": "dreambooth", "class_prompt": "a {x}"}}, "class_prompt: .* names {x}"),
        ({"adapt": {"name": "lora", "rank": 0}}, "adapt.rank: must be greater than or equal to 1"),
        ({"mode": "image2image", "num_inference_steps": 2, "strength": 0.3}, "no step to take"),
        ({"cluster_prompts": {"cat": {"first": "x"}}}, "cluster_prompts"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(fields: dict[str, Any], match: str) -> None:
    study = {
        "name": "x", "reader": "digits", "preprocess": {"size": 16},
        "generators": {"sd": {"name": "diffusion", "model": "owner/model", **fields}},
    }  # fmt: skip
    with pytest.raises(StudyError, match=match):
        validate(Study, study, "x.yaml")


def test_adapt_none_is_the_checkpoint_as_it_is() -> None:
    for adapt in (None, "none", {"name": "none"}):
        assert not made("owner/model", adapt and (adapt if adapt == "none" else None)).trainable
        assert DiffusionSpec(model="owner/model", adapt=adapt) == DiffusionSpec(model="owner/model")
