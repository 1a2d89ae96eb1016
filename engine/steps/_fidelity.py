"""What the page shows of fidelity: a table for each generator, real images beside its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.context import Context
from engine.steps.fidelity import FRECHET_LEAST, LEAST, NEAR

_NAMES = {
    "kept": "generated, kept", "generated": "generated, before curation",
    "real": "real, from train",
}  # fmt: skip


def fidelity_tables(context: Context, generators: Sequence[str]) -> list[dict[str, Any]]:
    """Of each generator that was measured: its scopes, each with a row for each set, and what a
    reader must know."""
    found = []
    for name in generators:
        manifest = context.inputs.get(f"fidelity.{name}")
        if manifest is None:
            continue
        embedder = manifest.spec["embedder"]
        found.append(
            {
                "generator": name,
                "embedder": " ".join(str(embedder[key]) for key in ("name", "model")
                                     if key in embedder),
                "k": manifest.spec["k"],
                "scopes": [scope_rows(scope) for scope in manifest.metrics["scopes"]],
                "warnings": manifest.metrics["warnings"],
                "least": LEAST, "frechet_least": FRECHET_LEAST, "near": NEAR,
            }
        )  # fmt: skip
    return found


def scope_rows(scope: Mapping[str, Any]) -> dict[str, Any]:
    """A scope as the page shows it."""
    sets = scope["sets"]
    return {
        "title": ", ".join(scope["classes"]), "whole": len(scope["classes"]) > 1,
        "val": scope["val"], "few": scope["few"],
        "rows": [{"set": _NAMES[name], "real": name == "real", **sets[name]}
                 for name in _NAMES if name in sets],
    }  # fmt: skip
