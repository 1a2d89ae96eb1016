"""A step: one unit of a plan, identified by its computation and its inputs.

The key is a digest of the kind, the hand-bumped code versions (of the step and of each plugin that
it names), the spec and the keys of the inputs. The profile (where and how a step runs) is not part
of it, so results computed on a laptop are valid on a Ray cluster.
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
class Subject:
    """What distinguishes a step from others of its kind.

    name: a generator, an arm, a classifier; empty if a plan has one step of the kind. fit: the
    fit of the generator, from 0. round: of requesting more images, from 1. number: of a classifier
    among those of its arm. filtered: whether filters looked at the images.
    """

    name: str = ""
    fit: int = 0
    round: int = 1
    number: int | None = None
    filtered: bool = True

    @property
    def label(self) -> str:
        """The subject as part of a label; of the first fit and round, the name alone."""
        parts = [self.name.replace(" ", ".")]
        parts += [f"fit{self.fit}"] if self.fit else []
        parts += [str(self.round)] if self.round > 1 else []
        parts += [str(self.number)] if self.number is not None else []
        parts += [] if self.filtered else ["unfiltered"]
        return ".".join(parts)


@dataclass(frozen=True)
class Step:
    """One unit of a plan. subject: for display, not part of the identity."""

    kind: str
    subject: Subject
    spec: Spec
    code: Mapping[str, int]
    inputs: Mapping[str, Step] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The step's name for people: `ingest`, `generate.ddpm.fit1`."""
        return f"{self.kind}.{self.subject.label}" if self.subject.name else self.kind

    @cached_property
    def key(self) -> str:
        """16 hex digits, equal for equal computations."""
        return digest(
            {
                "kind": self.kind,
                "code": dict(self.code),
                "spec": self.spec,
                "inputs": {name: step.key for name, step in self.inputs.items()},
            }
        )

    def spec_as(self, kind: type[S]) -> S:
        """The spec, typed as the spec of the step's kind."""
        assert isinstance(self.spec, kind), f"{self.label}: {type(self.spec).__name__}"
        return self.spec

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and other.key == self.key


def make_step(
    kind: str,
    spec: Mapping[str, Any],
    inputs: Mapping[str, Step] | None = None,
    plugins: Sequence[tuple[str, Any]] = (),
    subject: Subject = Subject(),
) -> Step:
    """A step of `kind`. Its code versions are those of the kind, of the kinds that it runs, and of
    each plugin (family, spec) with the plugins that it uses."""
    step_kind = resolve("steps", kind)
    code = {name: resolve("steps", name).version for name in (kind, *step_kind.runs)}
    code |= _versions(plugins)
    return Step(kind, subject, step_kind.Spec(**spec), code, dict(inputs or {}))


def _versions(plugins: Sequence[tuple[str, Any]]) -> dict[str, int]:
    versions = {}
    for family, spec in plugins:
        plugin = resolve(family, spec.name)
        versions[f"{family}.{spec.name}"] = plugin.version
        if uses := getattr(plugin, "uses", None):
            versions |= _versions(uses(spec))
    return versions


def upstream(steps: list[Step]) -> list[Step]:
    """`steps` and all their direct and indirect inputs, each once, inputs first."""
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
