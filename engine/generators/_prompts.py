"""Templates of prompts: text with places that are filled in for each image."""

from __future__ import annotations

import string
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

_PLACES = ("label", "cluster", "token")


def places(template: str) -> set[str]:
    """The places that a template names. Raises `ValueError` at a lone brace."""
    return {name for _, name, *_ in string.Formatter().parse(template) if name is not None}


def _checked(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    fault = None
    try:
        unknown = places(text) - set(_PLACES)
        if unknown:
            known = ", ".join(f"{{{place}}}" for place in _PLACES)
            fault = f"names {{{min(unknown)}}}; there are {known}"
    except ValueError as error:
        fault = f"has a lone brace ({error}); write {{{{ for a brace"
    if fault:
        shown = f"the prompt {text[:60]!r} {fault}"
        raise PydanticCustomError("explained", "{text}", {"text": shown})
    return text


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Template = Annotated[str, BeforeValidator(_checked), Field(min_length=1)]
# One or several, taken in turn.
Templates = Annotated[tuple[Template, ...], BeforeValidator(_listed), Field(min_length=1)]
