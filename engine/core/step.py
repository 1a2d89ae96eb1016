"""A step: one unit of a plan, identified by what it computes and from what.

The key holds the kind, the hand-bumped versions of the code (the step's own and each plugin's that
it names), the spec and the keys of the inputs. Where and how a step runs (the profile) is no part
of it, so a laptop and a cluster find each other's results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from engine.core.registry import resolve
from engine.core.spec import Spec, digest

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Step:
    """`label` is for people (`generate.ddpm`) and no part of the identity."""

    kind: str
    label: str
    spec: Spec
    code: Mapping[str, int]
    inputs: Mapping[str, Step] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """16 hex digits: equal for everybody who computes the same thing."""
        return digest(
            {
                "kind": self.kind,
                "code": dict(self.code),
                "spec": self.spec,
                "inputs": {name: step.key for name, step in self.inputs.items()},
            }
        )

    def spec_as(self, kind: type[S]) -> S:
        """The spec as what the step's kind knows it to be."""
        assert isinstance(self.spec, kind), f"{self.label}: {type(self.spec).__name__}"
        return self.spec

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and other.key == self.key


def make_step(
    kind: str,
    label: str,
    spec: Mapping[str, Any],
    inputs: Mapping[str, Step] | None = None,
    plugins: Sequence[tuple[str, Any]] = (),
) -> Step:
    """A step of `kind` with the code versions of the kind, of those that it runs, and of each
    (family, spec) in `plugins` and those that these use."""
    step_kind = resolve("steps", kind)
    code = {name: resolve("steps", name).version for name in (kind, *step_kind.runs)}
    code |= _versions(plugins)
    return Step(kind, label, step_kind.Spec(**spec), code, dict(inputs or {}))


def _versions(plugins: Sequence[tuple[str, Any]]) -> dict[str, int]:
    found = {}
    for family, plugin in plugins:
        made = resolve(family, plugin.name)
        found[f"{family}.{plugin.name}"] = made.version
        if uses := getattr(made, "uses", None):
            found |= _versions(uses(plugin))
    return found


def upstream(steps: list[Step]) -> list[Step]:
    """Return `steps` and all that they need, each once, inputs before what uses them."""
    ordered: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.key in ordered:
            return
        for needed in step.inputs.values():
            visit(needed)
        ordered[step.key] = step

    for step in steps:
        visit(step)
    return list(ordered.values())
