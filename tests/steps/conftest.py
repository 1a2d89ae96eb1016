"""Shared by the tests of request and generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.study import Study


@pytest.fixture
def study(
    image_folder: Callable[..., Path], toy_study: Callable[..., Study]
) -> Callable[..., Study]:
    """A function from fields to a study of two classes that requests ten images of each."""
    root = image_folder({"cat": 12, "dog": 20})

    def make(**fields: Any) -> Study:
        generators = {"t": {"name": "traditional"}}
        return toy_study(root, **{"generators": generators, "request": {"per_class": 10}, **fields})

    return make
