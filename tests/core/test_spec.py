from __future__ import annotations

import enum
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.core.rng import derive_seed, generator
from engine.core.spec import ClassName, Spec, canonical, canonical_json, digest
from engine.core.step import Step, Subject, upstream


class Inner(Spec):
    rate: float = 0.5


class Outer(Spec):
    name: str
    inner: Inner = Inner()
    counts: dict[str, int] = {}


class Colour(enum.IntEnum):
    RED = 1


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda children: st.lists(children) | st.dictionaries(st.text(max_size=5), children),
    max_leaves=10,
)


def test_known_value_has_a_known_digest() -> None:
    # A change here changes every key of every study.
    value = {"b": [1, 2.5, None, True], "a": Outer(name="é", counts={"z": 1, "a": 2})}
    assert canonical_json(value) == (
        '{"a":{"counts":{"a":2,"z":1},"inner":{"rate":0.5},"name":"é"},"b":[1,2.5,null,true]}'
    )
    assert digest(value) == "699d68388484a15d"


def test_error_only_field_is_not_part_of_the_identity() -> None:
    class Told(Inner):
        unkeyed_fields: ClassVar[tuple[str, ...]] = ("words",)
        words: str = ""

    assert digest(Told(words="so")) == digest(Told()) == digest(Inner())
    assert digest(Told(rate=1.0)) != digest(Told())


def test_key_order_is_irrelevant() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("one", "other"),
    [({"a": 1}, {"a": 1.0}), ({"a": 1}, {"a": True}), ({"a": 1}, {"a": "1"}), ([1, 2], [2, 1])],
)
def test_types_and_list_order_matter(one: Any, other: Any) -> None:
    assert digest(one) != digest(other)


@given(json_values, json_values)
def test_equal_text_means_equal_values(one: Any, other: Any) -> None:
    assert canonical(canonical(one)) == canonical(one)
    if canonical_json(one) == canonical_json(other):
        assert one == other


@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.5),
        np.int64(1),
        Colour.RED,
        {1: "a"},
        {"a", "b"},
        b"bytes",
        object(),
        float("nan"),
        float("inf"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_without_a_unique_encoding_are_rejected(value: Any) -> None:
    with pytest.raises(TypeError, match="no canonical encoding"):
        digest({"field": [value]})


@pytest.mark.parametrize(
    "values", [{"name": "a", "other": 1}, {"name": "a", "inner": {"rate": float("nan")}}, {}]
)
def test_spec_rejects_unknown_missing_and_non_finite_fields(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Outer.model_validate(values)


def test_spec_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Inner().rate = 1.0  # type: ignore[misc]


def step(kind: str = "one", version: int = 1, name: str = "x", **inputs: Step) -> Step:
    return Step(kind, Subject(name), Inner(), {kind: version}, inputs)


def test_step_key_does_not_depend_on_its_subject() -> None:
    assert step(name="x") == step(name="y")
    assert hash(step(name="x")) == hash(step(name="y"))
    assert len({step(), step(kind="two"), step(version=2), step(needed=step())}) == 4


def test_upstream_change_reaches_every_key() -> None:
    def last(version: int) -> Step:
        return step("c", input=step("b", input=step("a", version)))

    assert last(1).key != last(2).key


def test_upstream_lists_inputs_first_and_once() -> None:
    first = step("a")
    left, right = step("b", input=first), step("c", input=first)
    end = step("d", left=left, right=right)
    assert [entry.kind for entry in upstream([end, right])] == ["a", "b", "c", "d"]


def test_seeds_depend_on_names_and_their_types() -> None:
    assert derive_seed(1, "a") == derive_seed(1, "a") == 9068971922568923937
    assert len({derive_seed(1, "a"), derive_seed("1", "a"), derive_seed(1, "a", ""),
                derive_seed("a", 1)}) == 4  # fmt: skip
    assert 0 <= derive_seed("x") < 2**63
    assert generator(1, "a").integers(2**40) == generator(1, "a").integers(2**40)


@pytest.mark.parametrize(
    ("subject", "label"),
    [
        (Subject(), "one"),
        (Subject("ddpm", 1, 2), "one.ddpm.fit1.2"),
        (Subject("ddpm", 1, filtered=False), "one.ddpm.fit1.unfiltered"),
        (Subject("ddpm unfiltered x1", number=0), "one.ddpm.unfiltered.x1.0"),
    ],
)
def test_label_names_the_subject(subject: Subject, label: str) -> None:
    assert Step("one", subject, Inner(), {}).label == label


class Chosen(Spec):
    classes: tuple[ClassName, ...] = ()


@pytest.mark.parametrize(
    ("written", "kind"),
    [("[no]", "bool"), ("[1.0]", "float"), ("[2020-01-31]", "date"), ("[null]", "NoneType")],
)
def test_class_names_that_yaml_reads_as_another_type_must_be_quoted(
    written: str, kind: str
) -> None:
    with pytest.raises(ValidationError, match=f"YAML reads this as {kind} .* quote it"):
        Chosen.model_validate({"classes": yaml.safe_load(written)})
    quoted = yaml.safe_load(written.replace("[", "['").replace("]", "']"))
    assert Chosen.model_validate({"classes": quoted}).classes == tuple(quoted)


def test_whole_numbers_are_class_names() -> None:
    assert Chosen.model_validate({"classes": [3, "4"]}).classes == ("3", "4")


def test_unknown_field_names_the_one_that_may_be_meant() -> None:
    with pytest.raises(ValidationError, match=r"did you mean classes\? \(fields: classes\)"):
        Chosen.model_validate({"clases": []})
