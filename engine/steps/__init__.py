"""Steps: the kinds of work a study is made of. The step `x` is the class `X(StepKind)` of
`engine/steps/x.py`."""

from __future__ import annotations

from typing import ClassVar

from engine.context import Context, Output
from engine.core.manifest import Manifest
from engine.core.spec import Spec
from engine.core.step import Step
from engine.core.store import Store


class StepKind:
    """`version` is part of every key: raise it when the step's results change for the same spec."""

    version: ClassVar[int]
    Spec: ClassVar[type[Spec]]
    # What the step does, for the plan that a person reads.
    summary: ClassVar[str]
    # Kinds of steps that it runs, whose versions belong to its key too.
    runs: ClassVar[tuple[str, ...]] = ()
    # Folders below its prefix that only a running step needs: removed once its manifest is there.
    scratch: ClassVar[tuple[str, ...]] = ()

    def run(self, context: Context) -> Output:
        """Compute the step and write its parts; `execute` writes the manifest."""
        raise NotImplementedError

    def outdated(self, step: Step, manifest: Manifest) -> str | None:
        """Why a finished step no longer counts although its inputs are the same, or None."""
        return None

    def trials(self, step: Step) -> list[Step]:
        """Steps that this one runs and that are not in the plan."""
        return []

    def shard_prefixes(self, store: Store, step: Step) -> list[str]:
        """Prefixes of shards that `--discard` throws away with this step, beside the step's own."""
        return []
