"""The context of a running step: its inputs, the store, and the runtime behind `compute`, `fit` and
`trials`."""

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
from engine.core.names import attempt_name
from engine.core.notice import Notice
from engine.core.progress import Bar, say
from engine.core.registry import resolve
from engine.core.shards import Commit, Shard, ShardSet
from engine.core.spec import digest
from engine.core.step import Step, upstream
from engine.core.store import Store
from engine.results.base import StepResult
from engine.runtime.base import Runtime
from engine.wording import notice_in_words
from engine.work.attendance import DIED, HUNG
from engine.work.fit import FitContext, read_progress, read_result
from engine.work.resources import FitResources, StageResources
from engine.work.shard_worker import ShardWorker
from engine.work.stage import Place, Stage

# Training metrics shown on a progress line.
_MAX_METRICS = 6
# Ids of lost rows shown in one message.
_MAX_LOST = 10


R = TypeVar("R", bound=StepResult)


@dataclass(frozen=True)
class Output:
    """The output of a step's `run`; `execute` turns it into the manifest."""

    parts: Sequence[Part]
    rows: int
    result: StepResult


class TrialRunner(Protocol):
    """Computes steps whose inputs are done, each as a trial."""

    def find(self, steps: Sequence[Step]) -> dict[str, Manifest]:
        """The manifests of the steps that are done, by step key."""

    def run(self, steps: Sequence[Step], on_end: Callable[[int], None]) -> dict[str, Manifest]:
        """Compute all steps; returns their manifests by step key. on_end: called with the number of
        trials that just ended."""


@dataclass(frozen=True)
class Work:
    """Work that a step gave to the runtime. name: of the stage, or `fit`."""

    name: str
    # Number of shards; 1 for a fit.
    parts: int
    seconds: float


@dataclass
class Context:
    """Everything that a running step may use.

    inputs: manifests of the steps that this one needs, by the name of the input.
    """

    step: Step
    inputs: Mapping[str, Manifest]
    store: Store
    runtime: Runtime
    stage_resources: Callable[[str], StageResources]
    fit_resources: FitResources
    device: str
    # Runs the trials of a search.
    runner: TrialRunner | None = None
    # Seconds between two progress lines.
    interval: float = 10.0
    # Added to the manifest's provenance.
    notes: dict[str, Any] = field(default_factory=dict)
    # Work done by workers so far, for the record of resource use.
    work: list[Work] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        """Prefix of this step's data in the store."""
        return self.store.step(self.step.kind, self.step.key)

    def result(self, name: str, model: type[R]) -> R:
        """The result of the input `name`. Raises `EngineError` if the step has no such input."""
        if name not in self.inputs:
            raise EngineError(
                f"{self.step.label} reads {name}, which is not among its inputs"
                f" ({', '.join(self.inputs)}); add it where the step is planned"
            )
        return model.of(self.inputs[name])

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
                f"{self.step.label} reads {step.label}, which it does not depend on; plan it as an"
                " input"
            )
        return read_manifest(self.store, step)

    def progress(self, total: int, unit: str, done: int = 0) -> Bar:
        return Bar(self.step.label, total, unit, done=done, interval=self.interval)

    def say(self, text: str) -> None:
        say(f"  {self.step.label}: {text}")

    def warn(self, notices: Sequence[Notice]) -> None:
        for notice in notices:
            self.say(f"warning: {notice_in_words(notice)}")

    def table(
        self, name: str, rows: pa.Table, /, *, row_group_size: int | None = None, **tags: str
    ) -> Part:
        """Write a table of this step. row_group_size: rows that a worker reads at once."""
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd", row_group_size=row_group_size)
        folder, data = self.store.parts(self.prefix), sink.getvalue()
        return write_part(self.store, folder, name, "parquet", data, rows=rows.num_rows, tags=tags)

    def file(
        self, name: str, suffix: str, data: bytes, /, *, timed: bool = False, **tags: str
    ) -> Part:
        """Write any other file of this step. timed: the file contains times of this run."""
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
        """Stream the shards that have no commit yet through a pool of workers; returns all commits
        in the order of `shards`.

        replace: recompute shards of another fingerprint; otherwise they raise `ResumeError`.
        here: compute in this process, for work that is shorter than the start of a worker.
        """
        shard_set = ShardSet(self.store, prefix or self.prefix)
        shard_set.claim(fingerprint, discard=f"--discard {self.step.label}", replace=replace)
        committed = shard_set.committed()
        missing = [shard for shard in shards if shard.name not in committed]
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
        computed = {shard.name for shard in missing}
        self._note_losses(stage_name, [commit for commit in commits if commit.shard in computed])
        return commits

    def _note_losses(self, stage_name: str, commits: Sequence[Commit]) -> None:
        """Record how often shards were restarted because their process was lost, and report the
        rows that were set aside as the cause."""
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
            ids = ", ".join(lost[:_MAX_LOST]) + (", …" if len(lost) > _MAX_LOST else "")
            text = "1 row killed or hung its worker and was set aside"
            if len(lost) > 1:
                text = f"{len(lost)} rows killed or hung their worker and were set aside"
            self.say(f"{text}: {ids}")

    def trials(self, steps: Sequence[Step]) -> dict[str, Manifest]:
        """The manifests of these steps by key. Steps that are not done are computed as trials."""
        assert self.runner is not None, f"{self.step.label} has no trial runner"
        unique = list({step.key: step for step in steps}.values())
        manifests = self.runner.find(unique)
        missing = [step for step in unique if step.key not in manifests]
        # A step may call this several times, when its trials depend on earlier ones.
        before = self.notes.get("trials", {"found": 0, "made": 0})
        self.notes["trials"] = {
            "found": before["found"] + len(manifests), "made": before["made"] + len(missing)
        }  # fmt: skip
        if not missing:
            return manifests
        if manifests:
            self.say(f"{len(manifests)} of {len(unique)} trials are done already")
        with self.progress(len(unique), "trials", len(manifests)) as bar:
            manifests |= self.runner.run(missing, bar.advance)
        # The order must not depend on which were done already.
        return {step.key: manifests[step.key] for step in unique}

    def fit(
        self,
        train: Callable[[FitContext], None],
        unit: str,
        external: Mapping[str, str] | None = None,
    ) -> tuple[list[Part], dict[str, Any]]:
        """Fit on the runtime's workers, from the newest checkpoint if there is one; returns the
        weights and the metrics.

        external: digests of what the fit reads in addition to the step's inputs.
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
        ended, pace = threading.Event(), Pace()

        def watch() -> None:
            # The bar starts before the workers do, so that a fit stuck in startup is reported too.
            with Bar(self.step.label, None, unit, interval=self.interval) as bar:
                while not ended.wait(1.0):
                    state = read_progress(self.store, work, attempt)
                    if state is None:
                        continue
                    pace.saw(state.done, time.monotonic())
                    if bar.total is None:
                        bar.begin(state.total, state.done)
                    metrics = list(state.metrics.items())[:_MAX_METRICS]
                    note = ", ".join(f"{name} {value:.4g}" for name, value in metrics)
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
        if pace.seconds is not None:
            self.notes["seconds_per_step"] = pace.seconds
        return read_result(self.store, work, attempt)


@dataclass
class Pace:
    """Seconds of a step of a fit, from its reports: without the start of its processes."""

    first: tuple[int, float] | None = None
    last: tuple[int, float] | None = None

    def saw(self, done: int, now: float) -> None:
        """`done` steps were reported at the time `now`, in seconds."""
        if not done or (self.last and done <= self.last[0]):
            return
        self.first, self.last = self.first or (done, now), (done, now)

    @property
    def seconds(self) -> float | None:
        """None with fewer than two reports."""
        if self.first is None or self.last is None or self.first == self.last:
            return None
        return (self.last[1] - self.first[1]) / (self.last[0] - self.first[0])


def compute_here(worker: ShardWorker, shards: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    """Compute shards in this process; yields summaries as `Runtime.stream` does."""
    worker.load()
    yield from worker(shards)
