"""The study (what to compute), and the functions that read studies and profiles from YAML.

    base: other.yaml      the file to start from, relative to this one; this file overrides it
    a: null               removes a field that the base file sets
    a: {b: {c: 1}}        where a is a list of plugins: changes the plugin named b
    --set a.b=c           overrides both files; the value is read as YAML

The same study on the same data has the same step keys under every profile.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from engine.core.errors import StudyError
from engine.core.labels import Task
from engine.core.registry import explain
from engine.core.spec import Spec, as_text, explained
from engine.data.images import Preprocess
from engine.nets.classification import Training
from engine.profile import Profile
from engine.settings import (
    Audit,
    ClassifierField,
    Cluster,
    Curate,
    EmbedderField,
    Evaluate,
    Fidelity,
    GeneratorField,
    Match,
    ReaderField,
    Reduce,
    Request,
    Search,
    Select,
    Split,
)
from engine.settings_labels import Relabel
from engine.tuning.settings import Tune

S = TypeVar("S", bound=Spec)
# Names that a generator or a combination must not take: arms and splits.
RESERVED = (
    "real", "real_double", "oversampled", "class_weighted", "mixup", "cutmix", "reduced",
    "repeated", "train", "val", "test",
)  # fmt: skip

_LABEL = re.compile(r"[a-z][a-z0-9_]{0,31}")


class Study(Spec):
    """What to compute. `docs/study.md` explains every field."""

    later_fields: ClassVar[tuple[str, ...]] = ("tune", "notes", "tasks", "rare_below", "relabel")

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    # Terms of use of the images; written into every export.
    licence: Annotated[str, Field(max_length=2000)] = ""
    reader: ReaderField
    # The task with the classes; needed if the reader has several.
    task: str | None = None
    # Replaces `task`: the tasks that are learned together, by name.
    tasks: dict[str, Task] = {}
    # With several labels per image: combinations of fewer images are pooled.
    rare_below: Annotated[int, Field(ge=2, le=1_000_000)] = 10
    preprocess: Preprocess
    split: Split = Split()
    audit: Audit = Audit()
    # Correct labels before anything learns from them.
    relabel: Relabel | None = None
    embedder: EmbedderField = Field(default={"name": "pixels"}, validate_default=True)
    cluster: Cluster = Cluster()
    select: Select = Select()
    match: dict[str, Match] = {}
    reduce: Reduce | None = None
    generators: dict[str, GeneratorField] = {}
    request: Request = Request(ratio=1.0)
    # What the comparison trains. Without a classifier the study ends with its images.
    classifier: ClassifierField | None = None
    training: Training = Training()
    curate: Curate = Curate()
    fidelity: Fidelity = Fidelity()
    search: Search = Search()
    evaluate: Evaluate = Evaluate()
    # Read only by jobs/tune.py: what it tries, and how many settings this study was chosen from.
    tune: Tune = Tune()
    # What a reader of the results must know about the data; printed on the page.
    notes: tuple[Annotated[str, Field(min_length=1, max_length=2000)], ...] = ()

    @model_validator(mode="after")
    def _one_way(self) -> Study:
        if self.tasks and self.task is not None:
            raise explained("task and tasks exclude each other; remove one")
        return self

    @model_validator(mode="after")
    def _labels(self) -> Study:
        for section, labels in (
            ("generators", self.generators), ("match", self.match),
            ("search.combine", self.search.combine),
        ):  # fmt: skip
            for label in labels:
                if not _LABEL.fullmatch(label):
                    raise explained(
                        "{section}.{label}: a name is a lowercase letter, then at most 31 lowercase"
                        " letters, digits or _; rename it",
                        section=section,
                        label=label,
                    )
        for section, labels, taken in (
            ("generators", self.generators, RESERVED),
            ("search.combine", self.search.combine, (*RESERVED, *self.generators)),
        ):
            for label in labels:
                if label in taken:
                    raise explained(
                        "{section}.{label}: the name is already an arm or a split; choose another",
                        section=section,
                        label=label,
                    )
        for label, parts in self.search.combine.items():
            known = [*self.generators, *(["reduced"] if self.reduce else [])]
            unknown = [part for part in parts if part not in known]
            if unknown:
                raise explained(
                    "search.combine.{label}: unknown part {part}; choose from {known}",
                    label=label, part=repr(unknown[0]), known=", ".join(known),
                )  # fmt: skip
        return self


def validate(model: type[S], values: Any, where: str) -> S:
    """Build `model` from plain values.

    Raises `StudyError`: one line that names the file, the field and the fix.
    """
    if not isinstance(values, dict):
        raise StudyError(
            _one_line(f"{where}: must be a mapping of fields, not {type(values).__name__}")
        )
    try:
        spec = model.model_validate(values)
        if field := _too_large(values):
            raise StudyError(_one_line(f"{where}: {field}: the number must be below 2**63"))
        return spec
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        if inner := (first.get("ctx") or {}).get("place"):
            place.append(inner)
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        name = ".".join(place) or "study"
        raise StudyError(_one_line(f"{where}: {name}: {explain(first)}{more}")) from None
    except RecursionError:
        raise StudyError(_one_line(f"{where}: nested too deeply")) from None


def _too_large(values: Any, place: str = "") -> str:
    """The field of an integer beyond 64 bits, or "".

    Fields without a limit accept such a number, and writing it to a table fails later.
    """
    if isinstance(values, int):
        return place if abs(values) >= 2**63 else ""
    if isinstance(values, dict):
        items: Iterable[tuple[Any, Any]] = values.items()
    elif isinstance(values, list | tuple):
        items = enumerate(values)
    else:
        return ""
    fields = (_too_large(value, f"{place}.{key}" if place else str(key)) for key, value in items)
    return next((field for field in fields if field), "")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise StudyError(_one_line(f"{path}: no such file")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(_one_line(f"{path}: cannot be read: {error}")) from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise StudyError(_one_line(f"{path}: must be a mapping of fields"))
    return values


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that also refuses text without a UTF-8 form (`"\\ud800"`), because it
    has no digest."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Integer keys become text; a repeated key is an error."""
        values = super().construct_mapping(node, deep=deep)
        mapping = {as_text(key): value for key, value in values.items()}
        if len(mapping) < len(node.value) and not any(
            key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value
        ):
            names = [key.value for key, _ in node.value]
            twice = next((name for name in names if names.count(name) > 1), names[0])
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice!r} appears twice in one mapping", node.start_mark
            )
        return mapping

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str):
            value.encode()
        return value


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # `!!bool x` raises KeyError, IndexError and others
        raise StudyError(_one_line(f"{where}: not valid YAML: {error}")) from None


def _overlay(below: dict[Any, Any], above: dict[Any, Any]) -> dict[Any, Any]:
    merged = {**below, **{key: _overlaid(below.get(key), value) for key, value in above.items()}}
    # Only a null in `above` removes a field: a null in `below` stays.
    return {key: value for key, value in merged.items() if value is not None or key not in above}


def _overlaid(below: Any, above: Any) -> Any:
    if isinstance(below, list) and isinstance(above, dict):
        return _overlaid_by_name(below, above)
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    # Another plugin does not have the fields of the one below. A study's own name is not a plugin.
    if "name" in above and "name" in below and above["name"] != below["name"]:
        return above
    return _overlay(below, above)


def _overlaid_by_name(below: list[Any], above: dict[Any, Any]) -> Any:
    """A list of plugins in which those that `above` names are changed or removed."""
    plain = [entry if isinstance(entry, dict) else {"name": entry} for entry in below]
    names = [entry.get("name") for entry in plain]
    if not set(above) <= set(names):
        return above
    merged = [
        _overlaid(plain[place], above[name]) if name in above else below[place]
        for place, name in enumerate(names)
    ]
    return [entry for entry in merged if entry is not None]


def _load(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise StudyError(_one_line(f"{path}: base: the files form a circle; remove one base"))
    values = _read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or not base.isprintable():
        raise StudyError(_one_line(f"{path}: base: must be the path of a file"))
    below = _load(path.parent / base, (*seen, path))
    try:
        return _overlay(below, values)
    except RecursionError:
        raise StudyError(_one_line(f"{path}: nested too deeply")) from None


def apply_sets(values: dict[str, Any], sets: Sequence[str]) -> dict[str, Any]:
    """`values` with the settings `a.b=c` applied; c is read as YAML."""
    for setting in sets:
        name, equals, text = setting.partition("=")
        if not equals or not all(name.split(".")):
            raise StudyError(_one_line(f"--set {setting}: write it as field.subfield=value"))
        try:
            values = override(values, name, _parse_yaml(text, f"--set {setting}"))
        except RecursionError:
            raise StudyError(_one_line(f"--set {setting}: nested too deeply")) from None
    return values


def override(values: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """`values` with the field `name` (`a.b`) set to `value`."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return _overlay(values, value)


def load_values(path: Path, sets: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a study file and its base files. Raises `StudyError`."""
    return apply_sets(_load(path), sets)


def load_study(path: Path, sets: Sequence[str] = ()) -> Study:
    """Read a study. Raises `StudyError`."""
    return validate(Study, load_values(path, sets), str(path))


def load_profile(path: Path, sets: Sequence[str] = ()) -> Profile:
    """Read a profile. Raises `StudyError`."""
    return validate(Profile, apply_sets(_load(path), sets), str(path))
