"""Request: how many images of which class, and the rows that ask for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.errors import DataError, StudyError
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.execute import execute
from engine.generators import TrainingRows
from engine.generators.traditional import Traditional, TraditionalSpec
from engine.plan import named, plan
from engine.profile import Profile
from engine.results.images import ClassFunnel
from engine.runtime.inline import InlineRuntime
from engine.settings import Request
from engine.steps.request import (
    RequestSpec,
    count_per_class,
    overlaps,
    request_table,
    top_up,
)
from engine.study import Study

Run = Callable[[Study, str], Manifest]
TRADITIONAL = {"t": {"name": "traditional"}}


def requested(study: Study, label: str, count: int) -> pa.Table:
    (step,) = named(plan(study), "request")
    spec = step.spec_as(RequestSpec)
    generator = Traditional(TraditionalSpec(), study.preprocess)
    train = TrainingRows([f"image {number}" for number in range(5)], [0, 0, 1, 1, 1])
    return request_table(spec, generator, label, count, train)


def test_larger_request_starts_with_the_rows_of_a_smaller_one(study) -> None:
    small, large = (requested(study(), "cat", count) for count in (8, 30))
    assert large.slice(0, 8).equals(small)
    assert len(set(large[rows.IMAGE_ID].to_pylist())) == 30
    assert len(set(large[rows.SEED].to_pylist())) == 30


def test_every_fit_and_class_requests_its_own_images(study) -> None:
    ids = set(requested(study(), "cat", 8)[rows.IMAGE_ID].to_pylist())
    assert not ids & set(requested(study(), "dog", 8)[rows.IMAGE_ID].to_pylist())
    assert not ids & set(requested(study(seed=4), "cat", 8)[rows.IMAGE_ID].to_pylist())


def test_request_is_divided_into_shards_of_one_class(study, run_until: Run, store: Store) -> None:
    manifest = run_until(study(request={"per_class": 10, "shard_size": 4}), "request")
    assert manifest.metrics["counts"] == {"cat": 10, "dog": 10}
    # A file for each class, a row group for each shard.
    files = manifest.keys(table="requests")
    assert [table.num_rows for table in store.tables(files)] == [4, 4, 2, 4, 4, 2]
    (shards,) = store.tables(manifest.keys(table="shards"))
    assert shards.num_rows == 6


def test_invalid_request_is_reported_before_any_training(study, run_until: Run) -> None:
    network = {"name": "ddpm", "block_out_channels": [8, 8], "train_steps": 10**6}
    with pytest.raises(StudyError, match="unknown class 'x'"):
        run_until(study(generators={"d": network}, request={"per_class": 2, "classes": ["x"]}),
                  "generate")  # fmt: skip


def test_folder_with_too_few_images_never_gets_the_name_of_more(
    study, image_folder: Callable[..., Path], run_until: Run
) -> None:
    other = image_folder({"cat": 5, "dog": 3}, below="made-elsewhere")
    generators = {"f": {"name": "folder", "reader": {"name": "imagefolder", "root": str(other)}}}
    with pytest.raises(DataError, match="5 images of 'dog' are requested, the folder has 3"):
        run_until(study(generators=generators, request={"per_class": 5}), "generate")


@pytest.mark.parametrize(
    ("request_fields", "expected"),
    [
        ({"ratio": 0.5}, {"a": 50, "b": 2}),
        ({"balance_to": 100}, {"a": 0, "b": 95}),
        ({"per_class": 7}, {"a": 7, "b": 7}),
        ({"per_class": 7, "classes": ["b"]}, {"b": 7}),
    ],
)
def test_counts_follow_the_real_training_images(
    request_fields: dict[str, Any], expected: dict[str, int]
) -> None:
    assert count_per_class(Request(**request_fields), {"a": 100, "b": 5}) == expected


def test_unknown_class_and_too_many_images_are_rejected() -> None:
    with pytest.raises(StudyError, match=r"request\.classes: unknown class 'x'; choose from a"):
        count_per_class(Request(per_class=1, classes=("x",)), {"a": 5})
    with pytest.raises(StudyError, match="request fewer"):
        count_per_class(Request(ratio=1000), {"a": 10**9})


def test_next_round_requests_more_at_the_kept_share() -> None:
    funnel = {
        name: ClassFunnel(requested=40, generated=40, kept=kept, reasons={})
        for name, kept in (("a", 20), ("b", 40), ("c", 0))
    }
    needed = {"a": 40, "b": 40, "c": 40}
    assert top_up(needed, funnel, None) == {"a": 90, "b": 40, "c": 540}
    assert top_up(needed, funnel, {"a": 50, "b": 40, "c": 0}) == {"a": 50, "b": 40, "c": 40}


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        ({"rare": ["dwon"]}, r"request\.class_groups\.rare: unknown class 'dwon'; .* down"),
        ({"across": ["down"]}, r"request\.class_groups: 'across' is the name of a class"),
    ],
)
def test_groups_that_do_not_fit_the_data_are_rejected_before_generation(
    bars_study, store: Store, profile: Profile, groups: Any, why: str
) -> None:
    study = bars_study(
        request={"ratio_by_class": dict.fromkeys(groups, 1), "class_groups": groups},
        generators={"moved": {"name": "traditional"}},
    )  # fmt: skip
    with pytest.raises(StudyError, match=why):
        execute(plan(study), store, InlineRuntime(), profile)
    assert not store.listing("generated")


@pytest.mark.parametrize(
    ("available", "counts", "percent"),
    [
        (None, {"a": 10}, None), ({"a": 10, "b": 40}, {"a": 5, "b": 10}, None),
        ({"a": 10, "b": 40}, {"a": 10, "b": 10}, 100), ({"a": 10, "b": 40}, {"b": 30}, 75),
    ],
)  # fmt: skip
def test_draws_that_have_most_images_in_common_are_noticed(
    available: dict[str, int] | None, counts: dict[str, int], percent: int | None
) -> None:
    notices = overlaps(available, counts)
    assert [notice.fields["percent"] for notice in notices] == ([percent] if percent else [])
