from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BeforeValidator, SerializeAsAny, ValidationError

from engine.core.errors import StudyError
from engine.core.registry import PluginField, available, explain, resolve
from engine.core.spec import Spec
from engine.readers.digits import Digits, DigitsSpec


class Holder(Spec):
    reader: Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("readers"))]


@pytest.fixture
def more_readers(tmp_path: Path) -> Any:
    """A folder whose modules count as readers, like those of another distribution."""
    package = importlib.import_module("engine.readers")
    package.__path__.append(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    package.__path__.remove(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("engine.readers.toy")]:
        del sys.modules[name]


def test_plugin_is_found_by_name() -> None:
    assert resolve("readers", "digits") is Digits
    assert {"csv", "digits", "imagefolder"} <= set(available("readers"))


def test_new_file_is_a_new_plugin(more_readers: Path) -> None:
    (more_readers / "toy_reader.py").write_text("class ToyReader:\n    version = 5\n")
    assert resolve("readers", "toy_reader").version == 5
    assert "toy_reader" in available("readers")


def test_failing_import_is_not_reported_as_unknown_plugin(more_readers: Path) -> None:
    (more_readers / "toy_broken.py").write_text("import there_is_no_such_library\n")
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_library"):
        resolve("readers", "toy_broken")


@pytest.mark.parametrize("name", ["nope", "", "../csv", "csv.Csv", "__init__", "Digits", "a\nb"])
def test_unknown_name_lists_available_names(name: str) -> None:
    with pytest.raises(StudyError, match=r"no reader named .*csv, dicom, digits"):
        resolve("readers", name)


def test_every_plugin_has_a_version_and_a_spec_with_its_name() -> None:
    for family in ("readers", "embedders", "generators"):
        for name in available(family):
            plugin = resolve(family, name)
            assert isinstance(plugin.version, int)
            assert plugin.Spec.model_fields["name"].default == name


def test_field_accepts_a_name_a_mapping_or_a_spec() -> None:
    spec = DigitsSpec()
    assert Holder(reader="digits").reader == spec  # type: ignore[arg-type]
    assert Holder.model_validate({"reader": {"name": "digits"}}).reader == spec
    assert Holder(reader=spec).reader is spec


@pytest.mark.parametrize(
    ("value", "place", "text"),
    [
        (None, None, "must name its plugin, as in name: x"),
        ({"root": "x"}, None, "must name its plugin, as in name: x"),
        ({"name": 3}, None, "must name its plugin, as in name: x"),
        ({"name": "imagefolder"}, "root", "is missing"),
        ({"name": "digits", "{x}": 1}, "{x}", "no such field"),
        ({"name": "imagefolder", "root": 3}, "root", "must be a valid string, is 3"),
    ],
)
def test_error_inside_a_plugin_keeps_its_path(value: Any, place: Any, text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Holder.model_validate({"reader": value})
    error = caught.value.errors()[0]
    assert error["loc"] == ("reader",)
    assert error.get("ctx", {}).get("place") == place
    assert explain(error).startswith(text)


@pytest.mark.parametrize(
    ("shown", "value"),
    [
        pytest.param("is 'xxx", "x" * 10_000, id="text"),
        pytest.param("is a number of thousands of digits", 16**5_000, id="number"),
        pytest.param("is [['a'], ", [["a"]] * 10_000, id="list"),
    ],
)
def test_explanation_shortens_the_value(shown: str, value: Any) -> None:
    text = explain({"type": "x", "msg": "Input should be small", "input": value})
    assert text.startswith(f"must be small, {shown}")
    assert len(text) < 100
