"""Specs and their identity.

A `Spec` is a frozen section of a study. The result of a step is a function of its spec, its code
version and its inputs, so the step's identity is a digest of the canonical JSON of these three. The
encoder accepts only JSON types and `Spec`, and raises on everything else: a type whose text changes
between two library versions must never leak into a key.
"""

from __future__ import annotations

import datetime
import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Generic, LiteralString, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypeVar


class Spec(BaseModel):
    """A frozen section of a study. Unknown fields, NaN and infinity are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )

    # Fields added after keys were in use: not part of the identity while at their defaults.
    later_fields: ClassVar[tuple[str, ...]] = ()
    # Fields that only change the text of errors: never part of the identity.
    unkeyed_fields: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        """Refuse an unknown field with the names that it may have been meant for."""
        if isinstance(values, dict) and cls.model_config.get("extra") == "forbid":
            for name in values:
                if name not in cls.model_fields:
                    raise explained("{text}", text=_unknown(str(name), cls), place=str(name))
        return values


def _unknown(name: str, model: type[Spec]) -> str:
    known = list(model.model_fields)
    close = difflib.get_close_matches(name[:60], known, 1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"no such field{meant} (fields: {', '.join(known)})" if known else "no such field"


S = TypeVar("S", bound=Spec, default=Any)


class Configured(Generic[S]):
    """A class with settings of its own: `class X(Base[XSpec])` has them as `X.Spec`."""

    Spec: ClassVar[type[Any]]
    spec: S

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in cls.__dict__.get("__orig_bases__", ()):
            for kind in get_args(base):
                if isinstance(kind, type) and "Spec" not in cls.__dict__:
                    cls.Spec = kind


def explained(template: LiteralString, /, **values: object) -> PydanticCustomError:
    """A validation error with a text of our own. values: the text of each {name} in the
    template."""
    return PydanticCustomError("explained", template, values or None)


def as_text(value: Any) -> Any:
    """Class names are text. YAML reads 3 as a number, which has one spelling; what it reads as
    another type may have been written differently."""
    if type(value) is int:
        return str(value)
    if value is None or isinstance(value, bool | float | datetime.date):
        raise explained(
            "YAML reads this as {kind} ({value}), not as text; quote it as the data writes it",
            kind=type(value).__name__, value=str(value),
        )  # fmt: skip
    return value


ClassName = Annotated[str, BeforeValidator(as_text)]


def without(spec: S, fields: Sequence[str]) -> S:
    """The spec with these fields at their defaults, for the key of a step that does not read
    them."""
    return spec.model_copy(update={name: type(spec).model_fields[name].default for name in fields})


def canonical(value: Any) -> Any:
    """Reduce `value` to JSON types. Raises `TypeError` on a type without a fixed encoding."""
    if value is None or isinstance(value, bool | int | str):
        # Enums and numpy scalars subclass these; only the exact types have a fixed encoding.
        if type(value) not in (bool, int, str, type(None)):
            raise TypeError(f"no canonical encoding for {type(value).__name__}: convert it first")
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise TypeError(f"no canonical encoding for {value}")
        return value
    if isinstance(value, Spec):
        return {
            name: canonical(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if name not in value.unkeyed_fields
            and (name not in value.later_fields or getattr(value, name) != field.default)
        }
    if isinstance(value, Mapping):
        if not all(type(key) is str for key in value):
            raise TypeError("no canonical encoding for a mapping whose keys are not strings")
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    raise TypeError(f"no canonical encoding for {type(value).__name__}")


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces. Equal values give equal text."""
    return json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any, length: int = 16) -> str:
    """The first `length` hex digits of the SHA-256 of `value`'s canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]
