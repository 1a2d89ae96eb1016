"""Checkpoints of each family, adapted by each method, saved, and loaded elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.core.store import Store
from tests.generators import harness
from tests.generators.diffusion.tiny import (
    KINDS,
    batch,
    checkpoint,
    fit,
    images,
    made,
    pixels,
    plainly,
    trained,
)
from tests.generators.harness import Killed, context


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
def test_full_training_loads_by_from_pretrained(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    generator, weights = trained(tmp_path, folders[kind], {"name": "full", "ema_decay": 0.5})
    found = pixels(generator.sample(batch(generator, ["cat", "dog"])))
    opened = plainly(checkpoint(weights / "adapted"), generator, ["cat", "dog"])
    assert (opened == found).all()
    assert (plainly(checkpoint(folders[kind]), generator, ["cat", "dog"]) != found).any()


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("vectors", [1, 2])
def test_learned_words_load_by_load_textual_inversion(
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


def test_textual_inversion_changes_only_its_words(folders: dict[str, Path], tmp_path: Path) -> None:
    """The other embeddings, and all other weights, are unchanged."""
    generator, _ = trained(tmp_path, folders["sd"], {"name": "textual_inversion"})
    before = checkpoint(folders["sd"]).text_encoder.state_dict()
    after = generator.pipeline.text_encoder.state_dict()
    for name, value in before.items():
        assert (after[name][: len(value)] == value).all(), name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_dreambooth_also_learns_from_prior_images(
    folders: dict[str, Path], tmp_path: Path, method: str
) -> None:
    adapt = {"name": "dreambooth", "method": method, "rank": 2, "num_class_images": 3}
    generator, _ = trained(tmp_path, folders["sd"], adapt)
    store = Store(str(tmp_path / "store"))
    prior_images = [key for key in store.listing("work/x") if "/prior/" in key]
    assert len(prior_images) == 2 * 3  # "a photo of cat", "a photo of dog"
    assert generator.prompts_of("cat", 0) == ["a photo of sks cat"]
    assert pixels(generator.sample(batch(generator, ["cat"]))).std() > 0


def test_prior_loss_weight_matters(folders: dict[str, Path], tmp_path: Path) -> None:
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
def test_prediction_type_is_the_same_in_training_and_sampling(
    folders: dict[str, Path], tmp_path: Path, adapt: dict[str, Any]
) -> None:
    generator, _ = trained(tmp_path, folders["sd"], {**adapt, "prediction_type": "v_prediction"})
    assert generator.pipeline.scheduler.config.prediction_type == "v_prediction"


def test_default_learning_rate_of_full_training_is_below_that_of_lora() -> None:
    rates = [
        made("owner/model", {"name": "dreambooth", "method": method, "learning_rate": None})
        for method in ("lora", "full")
    ]
    found = [held.adaptation.settings.learning_rate for held in rates if held.adaptation]
    assert found == [1e-4, 5e-6]


def test_training_of_another_checkpoint_is_not_continued(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Neither its weights nor its prior images are reused."""
    store = Store(str(tmp_path))
    adapt = {"name": "dreambooth", "rank": 2, "num_class_images": 1}
    fit(store, made(folders["sd"], adapt))
    other = context(store, "two")
    other.inputs = "another checkpoint"
    made(folders["sd"], adapt).fit(other, images(), seed=5)
    assert len([key for key in store.listing("work/x") if "/prior/" in key]) == 2 * 2


# one for all, one per class, one per cluster


@pytest.mark.parametrize(
    ("scope", "count", "name"),
    [
        ("class", 2, "full"),
        ("cluster", 4, "lora"),
        pytest.param("class", 2, "lora", marks=pytest.mark.slow),
        pytest.param("cluster", 4, "full", marks=pytest.mark.slow),
    ],
)
def test_each_class_or_cluster_has_its_own_adaptation(
    folders: dict[str, Path], tmp_path: Path, name: str, scope: str, count: int
) -> None:
    adapt = {"name": name, "scope": scope, **({"rank": 2} if name == "lora" else {})}
    generator, weights = trained(tmp_path, folders["sd"], adapt)
    assert len(
        [path for path in weights.iterdir() if path.is_dir() and path.name != "samples"]
    ) == (count)
    assert generator.uses_clusters() == (scope == "cluster")
    # The same prompt and seed with each adaptation, in one batch and alone.
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
        pytest.param({"name": "lora", "rank": 2, "scope": "class"}, marks=pytest.mark.slow),
    ],
    ids=lambda adapt: "-".join(str(value) for value in adapt.values()),
)
def test_killed_training_continues_to_bitwise_equal_weights(
    folders: dict[str, Path], tmp_path: Path, adapt: dict[str, Any]
) -> None:
    adapt = {**adapt, "train_steps": 5}
    whole = fit(Store(str(tmp_path / "whole")), made(folders["sd"], adapt), checkpoint_every=2)
    store = Store(str(tmp_path / "killed"))
    # The second of two parts is interrupted.
    last = 8 if adapt.get("scope") == "class" else 3

    def die(message: dict[str, Any]) -> None:
        if message["done"] >= last:
            raise Killed

    with pytest.raises(Killed):
        fit(store, made(folders["sd"], adapt), "one", checkpoint_every=2, on_report=die)
    reported: list[int] = []
    resumed = fit(
        store, made(folders["sd"], adapt), "two", checkpoint_every=2,
        on_report=lambda message: reported.append(message["done"]),
    )  # fmt: skip
    assert resumed == whole
    assert min(reported) > last - 2  # finished steps are not repeated


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_accumulated_parts_equal_the_step_of_the_whole_batch(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    losses = []
    for pieces in (1, 2):
        store = Store(str(tmp_path / str(pieces)))
        adapt = {"name": "lora", "rank": 2, "gradient_accumulation_steps": pieces, "batch_size": 4}
        reported: list[float] = []
        fit(
            store, made(folders[kind], adapt),
            on_report=lambda message, losses_of=reported: losses_of.append(message["loss"]),
        )  # fmt: skip
        losses.append(reported[-1])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


LORA = "adapted/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def without_settings(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    store = Store(str(tmp_path_factory.mktemp("plain")))
    return fit(store, made(folders["sd"], {"name": "lora", "rank": 2}))[LORA]


@pytest.mark.parametrize(
    "fields",
    [
        {"noise_offset": 0.3}, {"snr_gamma": 5.0}, {"prediction_type": "v_prediction"},
        {"proportion_empty_prompts": 0.9}, {"random_flip": True},
    ],
    ids=str,
)  # fmt: skip
def test_training_setting_has_an_effect(
    folders: dict[str, Path], without_settings: str, tmp_path: Path, fields: dict[str, Any]
) -> None:
    other = fit(Store(str(tmp_path)), made(folders["sd"], {"name": "lora", "rank": 2, **fields}))
    assert other[LORA] != without_settings


def test_cached_latents_equal_recomputed_ones(folders: dict[str, Path], tmp_path: Path) -> None:
    lora = {"name": "lora", "rank": 2, "random_flip": True}
    one, other = (
        fit(Store(str(tmp_path / str(kept))), made(folders["sd"], {**lora, "cache_latents": kept}))
        for kept in (True, False)
    )
    assert one == other


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_noise_levels_of_a_flow_are_weighted(
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
    """One process has one precision, and this test needs another than the rest."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("_new_accelerate")
def test_half_precision_keeps_trained_weights_in_full(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    store = Store(str(tmp_path / "store"))
    fit(store, made(folders["sdxl"], {"name": "lora", "rank": 2}, precision="bf16"))
    weights = harness.weights(store, tmp_path / "weights")
    held = load_file(weights / "adapted" / "pytorch_lora_weights.safetensors")
    assert {str(value.dtype) for value in held.values()} == {"torch.float32"}
    generator = made(folders["sdxl"], {"name": "lora", "rank": 2}, precision="bf16")
    generator.load(weights, "cpu")
    assert pixels(generator.sample(batch(generator, ["cat"]))).std() > 0


def test_trainings_write_sample_images(folders: dict[str, Path], tmp_path: Path) -> None:
    import io

    from PIL import Image

    store = Store(str(tmp_path))
    published = fit(store, made(folders["sd"], {"name": "lora", "rank": 2, "train_steps": 20}))
    shown = sorted(name for name in published if name.startswith("samples/"))
    assert shown[-1] == "samples/00000020.png"
    assert len(shown) >= 4
    picture = Image.open(io.BytesIO(harness.published(store, shown[-1])))
    assert picture.size == (2 * 16, 16)  # one for each prompt
