"""Local paths as users write them."""

from __future__ import annotations

import os
import re
from pathlib import Path


def expanded(path: str) -> str:
    """A local path with `~` and `$VARIABLES` replaced; URLs stay as they are."""
    return path if "://" in path else os.path.expanduser(os.path.expandvars(path))


def unset_variable(path: str) -> str | None:
    """The first variable of a local path, such as `$DATA`, that is not set."""
    if "://" in path:
        return None
    names = (a or b for a, b in re.findall(r"\$(?:\{(\w+)\}|(\w+))", path))
    return next(
        (f"${name}" for name in names if os.path.expandvars(f"${name}") == f"${name}"), None
    )


def local_path(name: str) -> Path:
    """As `expanded`, as a path; it may name something that is not local, such as a hub's model."""
    return Path(expanded(name))
