"""The examples and paths in README are valid, and docs/study.md describes every field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from engine.core.registry import available, resolve
from engine.core.spec import Spec
from engine.plan import plan
from engine.profile import Profile
from engine.study import Study, validate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CHAPTERS = (ROOT / "docs" / "study.md").read_text().split("\n## ")
FAMILIES = ("readers", "embedders", "generators", "classifiers", "labelers", "filters")
BLOCKS = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
STUDIES = [values for block in BLOCKS if "reader" in (values := yaml.safe_load(block))]


def test_explained_study_is_the_one_that_runs() -> None:
    config = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())
    assert config in STUDIES


@pytest.mark.parametrize("values", STUDIES, ids=lambda values: values["name"])
def test_every_study_can_be_planned(values: dict) -> None:
    assert plan(validate(Study, values, "README.md"))


def test_every_named_file_exists() -> None:
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"(?:configs|jobs|docs)/[\w/]+\.(?:yaml|py|md|png)", README):
        # mine.yaml is written by the user.
        assert (ROOT / name).exists() or name.endswith("mine.yaml"), name


def sections(annotation: Any) -> Iterator[type[Spec]]:
    """The specs in a type; not those of plugins, which are declared as `Spec`."""
    if isinstance(annotation, type) and issubclass(annotation, Spec) and annotation is not Spec:
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)


def fields(spec: type[Spec]) -> set[str]:
    """Names of the fields of a spec and of its sections."""
    inner = (kind for field in spec.model_fields.values() for kind in sections(field.annotation))
    return spec.model_fields.keys() | {name for kind in inner for name in fields(kind)}


@pytest.mark.parametrize("chapter", ["study", "profile", *FAMILIES])
def test_every_field_is_documented(chapter: str) -> None:
    specs = {"study": [Study], "profile": [Profile]}.get(chapter) or [
        resolve(chapter, name).Spec for name in available(chapter)
    ]
    # A labeler's training has the fields of the study's.
    titles = ("study", chapter)
    texts = [text for text in CHAPTERS if text.partition("\n")[0].lower() in titles]
    documented = {"name", *re.findall(r"`(\w+)`", " ".join(texts))}
    assert {name for spec in specs for name in fields(spec)} - documented == set()
