"""Plugins, looked up by naming convention.

The plugin `name` of a `family` is the class `CamelCase(name)` of the module
`engine.<family>.<name>`, or an entry point `name` in the group `engine.<family>` of any installed
distribution. This module lists no plugin: adding a generator means adding one file. Plugin modules
import nothing heavy at module level, so that a study can be read, checked and planned without
torch.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import reprlib
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from engine.core.errors import StudyError
from engine.core.spec import Spec, explained

_NAME = re.compile(r"[a-z][a-z0-9_]*")


def resolve(family: str, name: str) -> Any:
    """The class of the plugin. Raises `StudyError`, which lists the available names."""
    if _NAME.fullmatch(name):
        module_name = f"engine.{family}.{name}"
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name:  # the plugin exists; one of its own imports does not
                raise
        else:
            return getattr(module, "".join(part.capitalize() for part in name.split("_")))
        for point in entry_points(group=f"engine.{family}", name=name):
            return point.load()
    raise StudyError(
        f"no {family.removesuffix('s').replace('.', ' ')} named {name!r}; choose from"
        f" {', '.join(available(family))}"
    )


def name_of(spec: Spec) -> str:
    """The name of the plugin that a spec belongs to."""
    return str(getattr(spec, "name", ""))


def kind_of(family: str, spec: Spec) -> Any:
    """The class of the plugin that a spec belongs to. Raises `StudyError`."""
    return resolve(family, name_of(spec))


def available(family: str) -> list[str]:
    """Names of all plugins of a family, sorted."""
    package = importlib.import_module(f"engine.{family}")
    names = {
        module.name
        for module in pkgutil.iter_modules(package.__path__)
        # Modules with a leading _ are shared by plugins; a package is a family of its own.
        if not module.ispkg and not module.name.startswith("_")
    }
    names |= {point.name for point in entry_points(group=f"engine.{family}")}
    return sorted(names)


class PluginField:
    """Validates `{name: x, …}` with the spec of the family's plugin x. An error keeps the path of
    the field inside the plugin.

    Used as `Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("readers"))]`.
    """

    def __init__(self, family: str) -> None:
        self.family = family

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Spec):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise explained("must name its plugin, as in name: x")
        spec: type[Spec] | None = None
        try:
            spec = resolve(self.family, value["name"]).Spec
            return spec.model_validate(value)
        except StudyError as error:
            raise explained("{text}", text=str(error)) from None
        except ValidationError as error:
            first = error.errors()[0]
            inner = (first.get("ctx") or {}).get("place")
            place = ".".join(str(part) for part in (*first["loc"], inner) if part is not None)
            text = explain(first)
            field = spec.model_fields.get(place) if spec and first["type"] == "missing" else None
            if field is not None and field.examples:
                text += f"; for example {field.examples[0]}"
            raise explained("{text}", text=text, place=place) from None


def explain(error: Any) -> str:
    """One of pydantic's errors in words: what the value must be, and what it is."""
    text = str(error["msg"])
    if error["type"] == "explained":
        return text
    if error["type"] == "extra_forbidden":
        return "no such field"
    if error["type"] == "missing":
        return "is missing"
    try:
        value = reprlib.repr(error.get("input"))  # bounded: YAML aliases make exponential values
    except ValueError:
        value = "a number of thousands of digits"
    text = text.removeprefix("Value error, ").removeprefix("Input should be ")
    value = value if len(value) < 60 else value[:57] + "..."
    kind, should, demand = text.partition(" should ")
    if should and " " not in kind:  # "Tuple should have at least 1 item", "String should match"
        return f"must {demand.replace(' after validation', '')}, is {value}"
    return f"must be {text[:1].lower()}{text[1:]}, is {value}"
