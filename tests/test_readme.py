"""The examples and paths in README are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from engine.plan import plan
from engine.study import Study, validate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
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
