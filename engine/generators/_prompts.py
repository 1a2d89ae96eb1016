"""Prompt templates: text with placeholders that are filled in for each image."""

from __future__ import annotations

import string
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from engine.core.spec import explained

_PLACEHOLDERS = ("label", "cluster", "token")


def placeholders(template: str) -> set[str]:
    """The placeholders of a template. Raises `ValueError` for a single brace."""
    return {name for _, name, *_ in string.Formatter().parse(template) if name is not None}


def _checked(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    fault = None
    try:
        unknown = placeholders(text) - set(_PLACEHOLDERS)
        if unknown:
            known = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
            fault = f"has the unknown placeholder {{{min(unknown)}}}; use {known}"
    except ValueError as error:
        fault = f"has a single brace ({error}); write {{{{ for a brace"
    if fault:
        message = f"the prompt {text[:60]!r} {fault}"
        raise explained("{text}", text=message)
    return text


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Template = Annotated[str, BeforeValidator(_checked), Field(min_length=1)]
# One or several, used in turn.
Templates = Annotated[tuple[Template, ...], BeforeValidator(_listed), Field(min_length=1)]
