"""The examples in docs/adding-a-plugin.md, run as plugins of one small study."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from engine.core.errors import DataError, StudyError
from engine.core.manifest import Manifest
from engine.core.registry import available, resolve
from engine.core.store import Store
from engine.export import export
from engine.plan import plan
from engine.results.comparison import SearchResult
from engine.study import Study, validate

TEXT = (Path(__file__).parents[1] / "docs" / "adding-a-plugin.md").read_text("utf-8")
EXAMPLES = {
    (family, name): code
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    for family, name in re.findall(r"\A# engine/(\w+)/(\w+)\.py\n", code)
}
FAMILIES = {family for family, _ in EXAMPLES}
REQUIRED = {"npz": {"root": ".", "file": "scans.npz"}}


@pytest.fixture
def examples(tmp_path: Path) -> Iterator[None]:
    """Each example as a file of its family."""
    packages = {family: importlib.import_module(f"engine.{family}") for family in FAMILIES}
    for (family, name), code in EXAMPLES.items():
        (tmp_path / family).mkdir(exist_ok=True)
        (tmp_path / family / f"{name}.py").write_text(code)
        assert name not in available(family)
    for family, package in packages.items():
        package.__path__.append(str(tmp_path / family))
    importlib.invalidate_caches()
    yield
    for family, package in packages.items():
        package.__path__.remove(str(tmp_path / family))
    for family, name in EXAMPLES:
        sys.modules.pop(f"engine.{family}.{name}", None)


@pytest.fixture
def example_study(examples: None, tmp_path: Path) -> Study:
    """A study of two classes, dark and bright, in which every plugin is an example."""
    random = np.random.default_rng(0)
    labels = np.repeat(["bright", "dark"], 60)
    level = np.where(labels == "bright", 180, 60)[:, None, None]
    images = (level + random.normal(0, 20, (120, 16, 16))).clip(0, 255).astype(np.uint8)
    np.savez(tmp_path / "scans.npz", images=images, labels=labels)
    values = {
        "name": "examples",
        "reader": {"name": "npz", "root": str(tmp_path), "file": "scans.npz"},
        "preprocess": {"size": 16, "channels": "L"},
        "split": {"group": "none"},
        "embedder": {"name": "histogram"},
        "generators": {"eigen": {"name": "eigen", "components": 4}},
        "classifier": {"name": "linear"},
        "request": {"ratio": 0.5},
        "training": {"steps": 4, "batch_size": 16, "evaluate_every": 4},
        "curate": {"labeler": "centroid", "filters": ["agreement", {"name": "brightness"}]},
        "fidelity": {"enabled": False},
        "search": {"ratios": [0.5], "seeds": 2, "confirm_fits": 1, "arms": []},
    }
    return validate(Study, values, "the examples")


def test_every_python_block_is_a_plugin_and_every_family_has_one() -> None:
    assert len(EXAMPLES) == TEXT.count("```python")
    families = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert sorted(families) == sorted(FAMILIES)


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize(("family", "name"), EXAMPLES)
def test_example_is_found_by_name(family: str, name: str) -> None:
    assert name in available(family)
    if family != "exporters":
        assert resolve(family, name).Spec(**REQUIRED.get(name, {})).name == name


def test_examples_run_in_a_study(
    example_study: Study, run_until: Callable[[Study, str], Manifest], store: Store, tmp_path: Path
) -> None:
    result = SearchResult.of(run_until(example_study, "search"))
    assert {"real", "eigen x0.5"} <= result.arms.keys()
    target = Store(str(tmp_path / "out"))
    export(example_study, store, target, "eigen", "jsonl", ["train"])
    lines = [json.loads(line) for line in target.read("images.jsonl").splitlines()]
    assert {line["source"] for line in lines} == {"real", "eigen"}
    assert all(target.read(line["path"]) for line in lines)


@pytest.mark.usefixtures("examples")
def test_yaml_examples_plan(tmp_path: Path) -> None:
    np.savez(tmp_path / "scans.npz", images=np.zeros((2, 8, 8), np.uint8), labels=["a", "b"])
    base: dict[str, Any] = {"name": "x", "reader": "digits", "preprocess": {"size": 16}}
    for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL):
        values = {**base, "split": {"group": "none"}, **yaml.safe_load(block)}
        if values["reader"] != "digits" and "root" in values["reader"]:
            values["reader"]["root"] = str(tmp_path)
        assert plan(validate(Study, values, "adding-a-plugin.md"))


@pytest.mark.usefixtures("examples")
def test_reader_example_explains_a_missing_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "scans.npz", images=np.zeros((2, 8, 8), np.uint8))
    npz = resolve("readers", "npz")
    with pytest.raises(DataError, match=r"reader\.file: scans\.npz: .*labels"):
        npz(npz.Spec(root=str(tmp_path), file="scans.npz")).records()
    with pytest.raises(StudyError):
        validate(Study, {"name": "x", "reader": {"name": "npz", "rot": "."}}, "x")
