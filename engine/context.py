"""What `execute` hands to a step: its inputs, the store, and the runtime behind two verbs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from engine.core.errors import EngineError
from engine.core.manifest import Manifest, Part, read_manifest, write_part
from engine.core.progress import Bar, say
from engine.core.registry import resolve
from engine.core.shards import Commit, Shard, ShardSet
from engine.core.spec import digest
from engine.core.step import Step, upstream
from engine.core.store import Store, attempt_name
from engine.results.base import StepResult
from engine.runtime.base import Runtime
from engine.work.attendance import DIED, HUNG
from engine.work.fit import FitContext, read_progress, read_result
from engine.work.resources import FitResources, StageResources
from engine.work.shard_worker import ShardWorker
from engine.work.stage import Place, Stage

# Figures of a training that its line of progress has room for.
_NOTED = 6
# Rows that killed their worker that a line has room for.
_LOST_SHOWN = 10


R = TypeVar("R", bound=StepResult)


@dataclass(frozen=True)
class Output:
    """What a step's `run` returns; `execute` makes the manifest of it."""

    parts: Sequence[Part]
    rows: int
    result: StepResult


class TrialRunner(Protocol):
    """Computes steps whose inputs are done, each in a trial; by key."""

    def find(self, steps: Sequence[Step]) -> dict[str, Manifest]:
        """Those that are done."""
        ...

    def run(self, steps: Sequence[Step], on_end: Callable[[int], None]) -> dict[str, Manifest]: ...


@dataclass(frozen=True)
class Work:
    """Something that a step had done for it: a stage's shards, by its name, or a `fit`."""

    name: str
    # Shards; of a fit, 1.
    parts: int
    seconds: float


@dataclass
class Context:
    """The world as one step sees it. `inputs` are the manifests of the steps that this one
    needs."""

    step: Step
    inputs: Mapping[str, Manifest]
    store: Store
    runtime: Runtime
    stage_resources: Callable[[str], StageResources]
    fit_resources: FitResources
    device: str
    # How a search runs its trials; given to every step, used by one.
    runner: TrialRunner | None = None
    interval: float = 10.0
    # What the manifest's provenance says of how this run went.
    notes: dict[str, Any] = field(default_factory=dict)
    # What workers did for the step, for the record of what they held.
    work: list[Work] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        """Where this step's data lies."""
        return self.store.step(self.step.kind, self.step.key)

    def result(self, name: str, model: type[R]) -> R:
        """The result of the input `name`. Raises `EngineError` if the step has no such input."""
        if name not in self.inputs:
            raise EngineError(
                f"{self.step.label} reads {name}, which is not among its inputs"
                f" ({', '.join(self.inputs)}); add it where the step is planned"
            )
        return model.of(self.inputs[name])

    def results(self, model: type[R]) -> dict[str, R]:
        """The results of all inputs of a kind, by name of the input."""
        return {
            name: model.of(manifest)
            for name, manifest in self.inputs.items()
            if manifest.kind == model.kind
        }

    @cached_property
    def _readable(self) -> set[str]:
        """Keys of all steps that this one rests on, and of the trials that these ran."""
        steps = upstream([self.step])
        trials = (trial for step in steps for trial in resolve("steps", step.kind)().trials(step))
        return {step.key for step in (*steps, *trials)}

    def manifest(self, step: Step) -> Manifest | None:
        """The manifest of a step that this one rests on, however indirectly, or of a trial of one;
        None if it is not done. Raises `EngineError` for any other step."""
        if step.key not in self._readable:
            raise EngineError(
                f"{self.step.label} reads {step.label}, on which it does not rest; plan it as an"
                " input"
            )
        return read_manifest(self.store, step)

    def progress(self, total: int, unit: str, done: int = 0) -> Bar:
        return Bar(self.step.label, total, unit, done=done, interval=self.interval)

    def say(self, text: str) -> None:
        say(f"  {self.step.label}: {text}")

    def table(
        self, name: str, rows: pa.Table, /, *, row_group_size: int | None = None, **tags: str
    ) -> Part:
        """Write a table of this step; `row_group_size` rows are read at once by workers."""
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd", row_group_size=row_group_size)
        folder, data = self.store.parts(self.prefix), sink.getvalue()
        return write_part(
            self.store, folder, name, "parquet", data, rows=rows.num_rows, tags=tags
        )

    def file(
        self, name: str, suffix: str, data: bytes, /, *, timed: bool = False, **tags: str
    ) -> Part:
        """Write another file of this step. timed: it contains times of this run."""
        folder = self.store.parts(self.prefix)
        return write_part(self.store, folder, name, suffix, data, timed=timed, tags=tags)

    def compute(
        self,
        stage_name: str,
        shards: Sequence[Shard],
        *,
        rows_of: Callable[[Store, Mapping[str, Any]], pa.Table],
        stages: Sequence[Stage],
        schema: pa.Schema | Callable[[], pa.Schema],
        fingerprint: Mapping[str, Any],
        prefix: str | None = None,
        unit: str = "images",
        replace: bool = False,
        here: bool = False,
    ) -> list[Commit]:
        """Stream the shards that have no commit yet through a pool of workers; returns all commits,
        in order.

        replace: shards of another fingerprint are made again; else they are kept, and the run
        stops. here: in this process, for what is done sooner than workers have started.
        """
        shard_set = ShardSet(self.store, prefix or self.prefix)
        shard_set.claim(fingerprint, discard=f"--discard {self.step.label}", replace=replace)
        standing = shard_set.committed()
        missing = [shard for shard in shards if shard.name not in standing]
        total = sum(shard.rows for shard in shards)
        resources = self.stage_resources(stage_name)
        reasons: dict[str, int] = {}
        done = total - sum(shard.rows for shard in missing)
        self.notes[f"shards.{stage_name}"] = {
            "found": len(shards) - len(missing),
            "made": len(missing),
        }
        if done and missing:
            self.say(f"{len(shards) - len(missing)} of {len(shards)} shards are committed already")
        if missing:
            place = Place(self.device, resources.threads, resources.batch_size, resources.offload)
            worker = ShardWorker(shard_set, rows_of, stages, schema, place, stage_name)
            started = time.monotonic()
            with self.progress(total, unit, done) as bar:
                for summary in (
                    compute_here(worker, missing)
                    if here
                    else self.runtime.stream(worker, missing, resources)
                ):
                    for reason, count in summary["reasons"].items():
                        reasons[reason] = reasons.get(reason, 0) + count
                    quarantined = ", ".join(
                        f"{count} {reason}" for reason, count in reasons.items()
                    )
                    bar.advance(summary["rows"], f"quarantined: {quarantined}" if reasons else "")
            if not here:
                self.work.append(Work(stage_name, len(missing), time.monotonic() - started))
        commits = shard_set.collect(shards)
        made = {shard.name for shard in missing}
        self._note_losses(stage_name, [commit for commit in commits if commit.shard in made])
        return commits

    def _note_losses(self, stage_name: str, commits: Sequence[Commit]) -> None:
        """Note how often shards were begun again because their process was lost, and say which
        rows were set aside for it."""
        names = ("deaths", "hangs")
        if retries := sum(commit.provenance.get(name, 0) for commit in commits for name in names):
            self.notes[f"shards.{stage_name}"]["retries"] = retries
        lost = [
            image_id
            for commit in commits
            for image_id, status in zip(commit.image_id, commit.status, strict=True)
            if status in (DIED, HUNG)
        ]
        if lost:
            shown = ", ".join(lost[:_LOST_SHOWN]) + (", …" if len(lost) > _LOST_SHOWN else "")
            what = "1 row killed or hung its worker and was set aside"
            if len(lost) > 1:
                what = f"{len(lost)} rows killed or hung their worker and were set aside"
            self.say(f"{what}: {shown}")

    def trials(self, steps: Sequence[Step]) -> dict[str, Manifest]:
        """The manifests of these steps by key; each that has none is computed in a trial."""
        assert self.runner is not None, f"{self.step.label} was given no way to run trials"
        unique = list({step.key: step for step in steps}.values())
        found = self.runner.find(unique)
        missing = [step for step in unique if step.key not in found]
        # A step may run trials that depend on those before.
        before = self.notes.get("trials", {"found": 0, "made": 0})
        self.notes["trials"] = {
            "found": before["found"] + len(found), "made": before["made"] + len(missing)
        }  # fmt: skip
        if not missing:
            return found
        if found:
            self.say(f"{len(found)} of {len(unique)} trials are done already")
        with self.progress(len(unique), "trials", len(found)) as bar:
            found |= self.runner.run(missing, bar.advance)
        # In the order that was asked for, whichever were there.
        return {step.key: found[step.key] for step in unique}

    def fit(
        self,
        train: Callable[[FitContext], None],
        unit: str,
        external: Mapping[str, str] | None = None,
    ) -> tuple[list[Part], dict[str, Any]]:
        """Fit on the runtime's workers, from the newest checkpoint if there is one; returns weights
        and figures.

        external: digests of what the fit reads beside the step's inputs.
        """
        attempt, work = attempt_name(), self.store.work(self.step.key)
        read = {name: manifest.digest for name, manifest in self.inputs.items()}
        inputs = digest({**read, **(external or {})})
        output = self.store.join(self.prefix, "weights")
        context = FitContext(
            self.store,
            work,
            attempt=attempt,
            output=output,
            inputs=inputs,
            device=self.device,
            checkpoint_every=self.fit_resources.checkpoint_every,
        )
        ended = threading.Event()

        def watch() -> None:
            # A fit that hangs while its workers start says so too.
            with Bar(self.step.label, None, unit, interval=self.interval) as bar:
                while not ended.wait(1.0):
                    state = read_progress(self.store, work, attempt)
                    if state is None:
                        continue
                    if bar.total is None:
                        bar.begin(state.total, state.done)
                    noted = list(state.metrics.items())[:_NOTED]
                    note = ", ".join(f"{name} {value:.4g}" for name, value in noted)
                    bar.advance(state.done - bar.done, note)

        watcher = threading.Thread(target=watch, daemon=True, name="progress")
        watcher.start()
        started = time.monotonic()
        try:
            self.runtime.fit(train, context, self.fit_resources)
        finally:
            ended.set()
            watcher.join()
        self.work.append(Work("fit", 1, time.monotonic() - started))
        return read_result(self.store, work, attempt)


def compute_here(worker: ShardWorker, shards: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    """Summaries of shards, as a runtime streams them, from this process."""
    worker.load()
    yield from worker(shards)
