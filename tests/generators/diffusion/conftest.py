"""Pipelines of each family, built once per module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.generators.diffusion.tiny import KINDS
from tests.pipelines import save_pipeline


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """With networks this small, threads would wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pipelines")
    return {kind: save_pipeline(kind, place) for kind in KINDS}
