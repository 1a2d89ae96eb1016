"""A ratio for each class: what is requested, and what an arm adds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from engine.core.errors import DataError, StudyError
from engine.core.manifest import read_manifest
from engine.core.spec import canonical
from engine.core.store import Store
from engine.execute import execute
from engine.plan import named, plan, until
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.settings import Amount
from engine.steps.mix import wanted_images

# Only what differs from the finished study of bars is computed.
pytestmark = pytest.mark.usefixtures("resumed")


def by_class(study: Any, **ratios: float) -> Any:
    request = {"ratio_by_class": ratios, "shard_size": 16}
    # The largest ratio makes one pool of all: amounts are nested within a pool.
    return study(
        request=request, search={"ratios": [1, 2], "seeds": 2}, curate={"filters": []},
        generators={"moved": {"name": "traditional"}},
    )  # fmt: skip


def added(store: Store, profile: Profile, study: Any, name: str) -> dict[str, set[str]]:
    """Ids of the images that a mix adds, by class."""
    (mix,) = named(plan(study), name)
    manifest = execute(until(plan(study), name), store, InlineRuntime(), profile)[mix.key]
    table = pa.concat_tables(store.tables(manifest.keys(table="members"))).to_pydict()
    found: dict[str, set[str]] = {}
    columns = (table["image_id"], table["label.class"], table["source"])
    for image_id, label, source in zip(*columns, strict=True):
        if source != "real":
            found.setdefault(label, set()).add(image_id)
    return found


def test_each_class_gets_its_ratio_and_smaller_mixes_are_part_of_larger_ones(
    bars_study, store: Store, profile: Profile
) -> None:
    label = "mix.moved.by.class"
    few = added(store, profile, by_class(bars_study, down=0.5), label)
    both = added(store, profile, by_class(bars_study, down=2.0, across=0.25), label)
    even = added(store, profile, by_class(bars_study, down=2.0, across=0.25), "mix.moved.x1")
    counts = Counter({name: len(ids) for name, ids in even.items()})
    assert {name: len(ids) for name, ids in few.items()} == {"down": round(counts["down"] / 2)}
    assert {name: len(ids) for name, ids in both.items()} == {
        "across": round(counts["across"] / 4), "down": 2 * counts["down"]
    }  # fmt: skip
    assert few["down"] < even["down"] < both["down"]
    assert both["across"] < even["across"]


@pytest.mark.parametrize(
    ("asked", "name", "share"),
    [
        ({"ratio": 1}, "x1", lambda real: real),
        ({"balance_to": 80}, "to.80", lambda real: 80 - real),
    ],
)
def test_amounts_follow_all_real_images_even_if_an_arm_trains_on_fewer(
    bars_study, store: Store, profile: Profile, asked: Any, name: str, share: Any
) -> None:
    study = bars_study(
        request={**asked, "shard_size": 16}, curate={"filters": []},
        generators={"moved": {"name": "traditional"}},
        reduce={"method": "random", "balance_to": "smallest"},
        search={"ratios": [1], "seeds": 2, "combine": {"few": ["reduced", "moved"]}},
    )  # fmt: skip
    found = added(store, profile, study, f"mix.few.{name}")
    whole = added(store, profile, study, f"mix.moved.{name}")
    assert found == whole
    (ingest,) = named(plan(study), "ingest")
    counts = read_manifest(store, ingest).metrics["counts"]["train"]
    assert counts["across"] > counts["down"]
    assert {label: len(ids) for label, ids in found.items()} == {
        label: share(real) for label, real in counts.items()
    }


def test_unnamed_classes_get_nothing() -> None:
    amount = Amount(ratio_by_class={"a": 0.5, "c": 0.0})
    assert wanted_images({"a": 5, "b": 100, "c": 3}, amount, "all") == {"a": 2, "b": 0, "c": 0}


def test_impossible_amounts_are_rejected(bars_study, store: Store, profile: Profile) -> None:
    with pytest.raises(StudyError, match=r"ratio_by_class: unknown class 'dwon'; .* down"):
        added(store, profile, by_class(bars_study, dwon=1.0), "mix.moved.by.class")
    with pytest.raises(DataError, match=r"ratio_by_class rounds to no image of any class"):
        added(store, profile, by_class(bars_study, down=0.001), "mix.moved.by.class")
    with pytest.raises(StudyError, match=r"request: ratio_by_class adds to no class"):
        by_class(bars_study, down=0)
    with pytest.raises(StudyError, match=r"ratio_by_class: 'across' is not in classes"):
        bars_study(request={"ratio_by_class": {"across": 1}, "classes": ["down"]})


def test_ratio_for_a_class_that_is_not_a_target_is_rejected(bars_study) -> None:
    with pytest.raises(StudyError, match=r"request: ratio_by_class adds to no class"):
        by_class(bars_study, down=0)
    with pytest.raises(StudyError, match=r"ratio_by_class: 'across' is not in classes"):
        bars_study(request={"ratio_by_class": {"across": 1}, "classes": ["down"]})


def test_later_field_changes_no_key_until_it_is_used(bars_study) -> None:
    (before,) = named(plan(bars_study(request={"ratio": 1})), "request")
    (after,) = named(plan(bars_study(request={"ratio_by_class": {"down": 1}})), "request")
    assert "ratio_by_class" not in canonical(before.spec)["request"]
    assert canonical(after.spec)["request"]["ratio_by_class"] == {"down": 1.0}


def test_each_class_of_a_group_gets_the_ratio_of_its_own_images(
    bars_study, store: Store, profile: Profile
) -> None:
    study = bars_study(
        request={"ratio_by_class": {"both": 0.5}, "shard_size": 16,
                 "class_groups": {"both": ["across", "down"]}},
        curate={"filters": []}, generators={"moved": {"name": "traditional"}},
    )  # fmt: skip
    found = added(store, profile, study, "mix.moved.by.class")
    (ingest,) = named(plan(study), "ingest")
    real = read_manifest(store, ingest).metrics["counts"]["train"]
    assert {name: len(ids) for name, ids in found.items()} == {
        name: round(count / 2) for name, count in real.items()
    }


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (
            {"class_groups": {"a": ["x", "y"], "b": ["y"]}, "ratio_by_class": {"a": 1, "b": 2}},
            "ratio_by_class: class 'y' has two ratios, of 'a' and of 'b'",
        ),
        (
            {"class_groups": {"a": ["x", "y"]}, "ratio_by_class": {"a": 1, "y": 2}},
            "ratio_by_class: class 'y' has two ratios, of 'a' and of 'y'",
        ),
        (
            {"class_groups": {"a": ["x"], "x": ["y"]}, "ratio": 1},
            "class_groups: 'x' is the name of a class",
        ),
        ({"class_groups": {"a": []}, "ratio": 1}, r"class_groups\.a: "),
        (
            {"class_groups": {"a": ["x", "y"]}, "ratio_by_class": {"a": 1}, "classes": ["x"]},
            r"ratio_by_class: 'y' \(of the group 'a'\) is not in classes",
        ),
    ],
)
def test_invalid_groups_are_rejected_when_the_study_is_read(
    bars_study, asked: Any, why: str
) -> None:
    with pytest.raises(StudyError, match=why) as raised:
        bars_study(request=asked)
    assert "\n" not in str(raised.value)


def members(store: Store, profile: Profile, study: Any, name: str) -> pa.Table:
    (mix,) = named(plan(study), name)
    manifest = execute(until(plan(study), name), store, InlineRuntime(), profile)[mix.key]
    return pa.concat_tables(store.tables(manifest.keys(table="members")))


def test_repeated_images_weigh_as_much_as_the_added_ones(
    bars_study, store: Store, profile: Profile
) -> None:
    study = bars_study(
        generators={"moved": {"name": "traditional"}},
        search={"ratios": [1, 2], "seeds": 2, "arms": ["repeated"]},
    )
    repeated = members(store, profile, study, "mix.repeated.x2")
    moved = members(store, profile, study, "mix.moved.x2")
    assert set(repeated["source"].to_pylist()) == {"real"}

    def shares(table: pa.Table) -> dict[str, float]:
        sums: Counter[str] = Counter()
        for label, weight in zip(
            table["label.class"].to_pylist(), table["weight"].to_pylist(), strict=True
        ):
            sums[label] += weight
        return {label: weight / sums.total() for label, weight in sums.items()}

    assert shares(repeated) == pytest.approx(shares(moved))


def test_replaced_images_leave_as_many_as_are_added(
    bars_study, store: Store, profile: Profile
) -> None:
    study = bars_study(search={"ratios": [0.5, 1], "seeds": 2, "use": ["add", "replace"]})
    whole = Counter(members(store, profile, study, "mix.real")["label.class"].to_pylist())
    kept: dict[str, set[str]] = {}
    for name in ("more.replace.x0.5", "more.replace.x1"):
        table = members(store, profile, study, f"mix.{name}")
        assert Counter(table["label.class"].to_pylist()) == whole
        real = table.filter(pc.equal(table["source"], "real"))
        kept[name] = set(real["image_id"].to_pylist())
        assert len(table) - len(real) == len(
            members(store, profile, study, f"mix.{name.replace('.replace', '')}")
        ) - sum(whole.values())  # fmt: skip
    assert kept["more.replace.x1"] < kept["more.replace.x0.5"]


def test_pretraining_draws_generated_images_first_and_real_ones_then(
    bars_study, store: Store, profile: Profile
) -> None:
    study = bars_study(search={"ratios": [1], "seeds": 2, "use": ["pretrain"]})
    table = members(store, profile, study, "mix.more.pretrain.x1").to_pydict()
    for source, first, then in zip(
        table["source"], table["first_weight"], table["weight"], strict=True
    ):
        assert (first, then) == ((0.0, 1.0) if source == "real" else (1.0, 0.0))
