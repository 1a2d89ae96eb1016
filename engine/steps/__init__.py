"""Step kinds: the building blocks of a study. The step `x` is the class `X(StepKind)` in
`engine/steps/x.py`."""

from __future__ import annotations

from typing import ClassVar

from engine.context import Context, Output
from engine.core.manifest import Manifest
from engine.core.spec import Configured, S
from engine.core.step import Step
from engine.core.store import Store


class StepKind(Configured[S]):
    """`version` is part of every key: raise it when the step's results change for the same spec."""

    version: ClassVar[int]
    # What the step does, as the printed plan says it.
    summary: ClassVar[str]
    # Step kinds that it runs as trials; their versions are part of its key.
    runs: ClassVar[tuple[str, ...]] = ()
    # Folders under its prefix that only a running step needs; removed once it has its manifest.
    scratch: ClassVar[tuple[str, ...]] = ()

    def run(self, context: Context) -> Output:
        """Compute the step and write its parts; `execute` writes the manifest."""
        raise NotImplementedError

    def outdated(self, step: Step, manifest: Manifest, store: Store) -> str | None:
        """The reason why a finished step with unchanged inputs is out of date, or None."""
        return None

    def trials(self, step: Step) -> list[Step]:
        """The steps that this step runs itself; they are not in the plan."""
        return []

    def shard_prefixes(self, store: Store, step: Step) -> list[str]:
        """Prefixes of shards that `--discard` deletes with this step, in addition to its own."""
        return []
