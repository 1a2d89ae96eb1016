"""Prompts: filling, order, and truncation warnings."""

from __future__ import annotations

from pathlib import Path

from engine.generators import TrainingRows
from tests.generators.diffusion.tiny import (
    made,
)
from tests.pipelines import LENGTH


def rows(count: int = 6, clusters: int = 1) -> TrainingRows:
    return TrainingRows(
        [str(row) for row in range(count)], [row % clusters for row in range(count)]
    )


def test_prompts_are_filled_and_take_turns() -> None:
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


def test_classes_and_clusters_may_have_their_own_prompts() -> None:
    generator = made(
        "owner/model", prompt="a photo of {label}", prompts={"dog": "a dog outside"},
        cluster_prompts={"dog": {"1": ["a dog at night", "a dog at dusk"]}},
    )  # fmt: skip
    assert generator.uses_clusters()
    assert generator.prompts_of("cat", 1) == ["a photo of cat"]
    assert generator.prompts_of("dog", 0) == ["a dog outside"]
    assert generator.prompts_of("dog", 1) == ["a dog at night", "a dog at dusk"]


def test_clusters_and_templates_cycle_independently() -> None:
    generator = made("owner/model", prompt=["one {label} {cluster}", "two {label} {cluster}"])
    found = {request.prompt for request in generator.plan("cat", 8, rows(8, clusters=2), 0)}
    assert found == {"one cat 0", "two cat 0", "one cat 1", "two cat 1"}


def test_image_belongs_to_the_cluster_of_its_parent() -> None:
    generator = made("owner/model", mode="image2image", prompt="{label} {cluster}")
    for request in generator.plan("cat", 8, rows(8, clusters=3), 0):
        assert request.cluster == int(request.parent_id or "x") % 3
        assert request.strength == 0.5


def test_truncated_prompt_gives_a_warning(folders: dict[str, Path]) -> None:
    generator = made(folders["sd"])
    assert generator.prompt_warnings(["a photo of cat"]) == []
    room = LENGTH - 2  # without the start and end tokens
    fits = " ".join(["cat"] * room)
    assert generator.prompt_warnings([fits]) == []
    (warning,) = generator.prompt_warnings(["a photo of cat", f"{fits} dog"])
    assert warning.fields | {"first": ""} == {
        "truncated": 1, "prompts": 2, "limit": 16, "first": "", "rest": "'dog'"
    }  # fmt: skip


def test_learned_word_counts_as_its_embeddings(folders: dict[str, Path]) -> None:
    room = LENGTH - 2
    for vectors, fits in ((1, True), (4, False)):
        adapt = {"name": "textual_inversion", "num_vectors": vectors}
        generator = made(folders["sd"], adapt, prompt=" ".join(["cat"] * (room - 1)) + " {token}")
        assert (generator.prompt_warnings(generator.prompts_of("cat", 0)) == []) == fits


def test_longer_text_encoder_avoids_truncation(
    folders: dict[str, Path],
) -> None:
    prompt = "a b c d e f g h i j k l m n o p"
    assert made(folders["sdxl"]).prompt_warnings([prompt])
    assert not made(folders["flux"]).prompt_warnings([prompt])
