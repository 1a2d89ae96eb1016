"""Local paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str) -> str:
    """A local path with `~` and `$VARIABLES` replaced; URLs stay as they are."""
    return path if "://" in path else os.path.expanduser(os.path.expandvars(path))


def local_path(name: str) -> Path:
    """As `expanded`, as a path; it may name something that is not local, such as a hub's model."""
    return Path(expanded(name))
