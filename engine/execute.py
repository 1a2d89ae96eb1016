"""Runs a plan: skips finished steps, runs the others in order, commits a manifest for each.

A step is done while its manifest exists and its inputs still have the manifests that it read.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

from engine.context import Context, Work
from engine.core.errors import DamageError, EngineError, StorageError
from engine.core.manifest import Manifest, read_manifest, write_manifest
from engine.core.progress import heartbeat, say
from engine.core.registry import resolve
from engine.core.shards import ShardSet, installed_versions
from engine.core.spec import canonical
from engine.core.step import Step, upstream
from engine.core.store import Store
from engine.plan import trials_of
from engine.profile import Profile
from engine.results.comparison import TrainResult
from engine.runtime.base import Runtime
from engine.work.resources import FitResources

State = Literal["done", "missing", "out of date", "waiting"]
_PACKAGES = (
    "ray",
    "torch",
    "diffusers",
    "transformers",
    "faiss-cpu",
    "faiss-gpu",
    "numpy",
    "pillow",
    "pyarrow",
)


@dataclass(frozen=True)
class Status:
    """The state of a step. why: the reason for any state other than done."""

    step: Step
    state: State
    why: str
    manifest: Manifest | None = None


def inspect(steps: Sequence[Step], store: Store) -> list[Status]:
    """The state of each step of a plan. Reads manifests and commit listings, no data."""
    statuses: dict[str, Status] = {}
    for step in steps:
        statuses[step.key] = _inspect(step, store, statuses)
    return [statuses[step.key] for step in steps]


def _inspect(step: Step, store: Store, known: dict[str, Status]) -> Status:
    inputs = {name: known[needed.key] for name, needed in step.inputs.items()}
    manifest = read_manifest(store, step)
    waiting = [status.step.label for status in inputs.values() if status.state != "done"]
    if manifest is None:
        shards = len(ShardSet(store, store.step(step.kind, step.key)).committed())
        for prefix in resolve("steps", step.kind)().shard_prefixes(store, step):
            shards += len(ShardSet(store, prefix).committed())
        partial = f"; {shards} shards are committed" if shards else ""
        if waiting:
            return Status(step, "waiting", f"needs {_few(waiting)}{partial}")
        return Status(step, "missing", f"not computed yet{partial}")
    if waiting:
        return Status(step, "waiting", f"needs {_few(waiting)}")
    changed = [
        status.step.label
        for name, status in inputs.items()
        if status.manifest is None or manifest.inputs.get(name) != status.manifest.digest
    ]
    if changed:
        return Status(step, "out of date", f"changed since: {_few(changed)}", manifest)
    if reason := resolve("steps", step.kind)().outdated(step, manifest, store):
        return Status(step, "out of date", reason, manifest)
    return Status(step, "done", "", manifest)


def _few(labels: Sequence[str], limit: int = 8) -> str:
    """Labels in one line, cut short: a search has hundreds of inputs."""
    more = f" and {len(labels) - limit} more" if len(labels) > limit else ""
    return ", ".join(labels[:limit]) + more


def execute(
    steps: Sequence[Step], store: Store, runtime: Runtime, profile: Profile, quiet: bool = False
) -> dict[str, Manifest]:
    """Run every step that is not done, inputs first; returns the manifests by step key. quiet: do
    not print steps that are done already."""
    known: dict[str, Status] = {}
    with naming_damage(steps, store):
        for step in steps:
            known[step.key] = _run_unless_done(step, known, store, runtime, profile, quiet)
    return {key: status.manifest for key, status in known.items() if status.manifest is not None}


def _run_unless_done(
    step: Step, known: dict[str, Status], store: Store, runtime: Runtime, profile: Profile,
    quiet: bool,
) -> Status:  # fmt: skip
    status = _inspect(step, store, known)
    if status.state == "done":
        assert status.manifest is not None
        if not quiet:
            say(f"{step.label:<20} {step.key}  done: {_headline(status.manifest)}")
        return status
    say(f"{step.label:<20} {step.key}  {resolve('steps', step.kind).summary}")
    if status.manifest is not None:
        say(f"  {step.label}: out of date ({status.why}); computing it again")
    inputs = {name: known[needed.key].manifest for name, needed in step.inputs.items()}
    outdated = status.manifest is not None
    with heartbeat(step.label):
        manifest = run_step(step, inputs, store, runtime, profile, outdated)
    say(f"  {step.label}: {_headline(manifest)}, {manifest.provenance['seconds']:.1f} s")
    return Status(step, "done", "", manifest)


def run_step(
    step: Step,
    inputs: dict[str, Manifest | None],
    store: Store,
    runtime: Runtime,
    profile: Profile,
    outdated: bool = False,
) -> Manifest:
    """Run one step whose inputs are done and commit its manifest. outdated: replace the manifest
    that exists."""
    present = {name: manifest for name, manifest in inputs.items() if manifest is not None}
    if len(present) != len(inputs):
        raise EngineError(
            f"{step.label}: missing inputs: {', '.join(sorted(set(inputs) - set(present)))};"
            " run their steps first"
        )
    started = time.time()
    context = Context(
        step=step,
        inputs=present,
        store=store,
        runtime=runtime,
        stage_resources=profile.stage,
        fit_resources=profile.fit,
        device=profile.device,
        runner=Trials(store, runtime, profile),
    )
    try:
        result = resolve("steps", step.kind)().run(context)
    except (FileNotFoundError, StorageError):
        # Another driver may have finished the same step and removed the scratch data of both.
        if (finished := current_manifest(store, step, present)) is None:
            raise
        clear_scratch(store, step)
        return finished
    seconds = time.time() - started
    manifest = Manifest(
        kind=step.kind,
        key=step.key,
        label=step.label,
        spec=canonical(step.spec),
        inputs=digests(present),
        parts=tuple(result.parts),
        rows=result.rows,
        # Fields that were not set are absent: a field that is added later changes no digest.
        metrics=result.result.model_dump(exclude_unset=True),
        provenance={
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(seconds, 3),
            "held": resource_use(context.work, seconds, runtime, profile),
            "device": profile.device,
            "python": platform.python_version(),
            "versions": installed_versions(*_PACKAGES),
            **context.notes,
        },
    )
    if outdated and current_manifest(store, step, present) is None:
        # The old manifest is the only index of the old parts, so it is kept until now.
        store.delete(store.manifest(step.kind, step.key))
    written = write_manifest(store, manifest)
    clear_scratch(store, step)
    return written


def current_manifest(
    store: Store, step: Step, inputs: Mapping[str, Manifest | None]
) -> Manifest | None:
    """The manifest of a step if it was computed from these inputs and is not outdated."""
    manifest = read_manifest(store, step)
    if manifest is None or manifest.inputs != digests(inputs):
        return None
    return None if resolve("steps", step.kind)().outdated(step, manifest, store) else manifest


def resource_use(
    work: Sequence[Work], seconds: float, runtime: Runtime, profile: Profile
) -> list[dict[str, Any]]:
    """CPUs and GPUs that a step reserved, and for how long, as the profile grants them.

    A trial reserves its own share for the whole time. Otherwise each pool and fit reserves its
    workers' share, and this process one CPU for the remaining time.
    """
    if runtime.in_process and profile.runtime == "ray":
        return [_reservation("trial", 1, profile.trial.cpus, profile.trial.gpus, seconds)]
    reservations = []
    for job in work:
        each = profile.fit if job.name == "fit" else profile.stage(job.name)
        workers = each.workers if isinstance(each, FitResources) else min(each.actors, job.parts)
        gpus = each.gpus
        if runtime.in_process:
            # This process is the only worker and has the GPU to itself.
            workers, gpus = 1, float(profile.device == "cuda" and job.name != "decode")
        reservations.append(_reservation(job.name, workers, each.cpus, gpus, job.seconds))
    remaining = max(0.0, seconds - sum(job.seconds for job in work))
    return [*reservations, _reservation("driver", 1, 1.0, 0.0, remaining)]


def _reservation(
    what: str, workers: int, cpus: float, gpus: float, seconds: float
) -> dict[str, Any]:
    """cpus, gpus: of each worker."""
    return {"what": what, "workers": workers, "cpus": cpus, "gpus": gpus,
            "seconds": round(seconds, 3)}  # fmt: skip


@dataclass(frozen=True)
class Trials:
    """Runs steps as trials of the runtime. Their inputs must be done."""

    store: Store
    runtime: Runtime
    profile: Profile

    def find(self, steps: Sequence[Step]) -> dict[str, Manifest]:
        needed = upstream([needed for step in steps for needed in step.inputs.values()])
        wanted = {step.key for step in steps}
        return {
            status.step.key: status.manifest
            for status in inspect([*needed, *steps], self.store)
            if status.step.key in wanted and status.state == "done" and status.manifest
        }

    def run(self, steps: Sequence[Step], on_end: Callable[[int], None]) -> dict[str, Manifest]:
        needed = {needed.key: needed for step in steps for needed in step.inputs.values()}
        inputs = {key: read_manifest(self.store, needed) for key, needed in needed.items()}
        # Errors name a trial by this text.
        by_name = {f"{step.label} ({step.key})": step for step in steps}
        trial = RunTrial(by_name, inputs, self.store, self.profile)
        self.runtime.search(trial, list(by_name), self.profile.trial, lambda _: on_end(1))
        manifests = {}
        for step in steps:
            manifest = read_manifest(self.store, step)
            if manifest is None:
                raise EngineError(
                    f"{step.label}: its trial ended without a result; run again to repeat it"
                )
            manifests[step.key] = manifest
        return manifests


@dataclass(frozen=True)
class RunTrial:
    """Runs one step, by its name, in the process of a trial. inputs: manifests by step key."""

    steps: dict[str, Step]
    inputs: dict[str, Manifest | None]
    store: Store
    profile: Profile

    def __call__(self, name: str, runtime: Runtime) -> dict[str, float]:
        step = self.steps[name]
        inputs = {label: self.inputs[needed.key] for label, needed in step.inputs.items()}
        # Another driver's trial or an earlier attempt may have finished the step.
        manifest = current_manifest(self.store, step, inputs)
        if manifest is None:
            outdated = self.store.exists(self.store.manifest(step.kind, step.key))
            # A trial on a runtime with workers runs its fit on them, with the trial's resources.
            profile = self.profile if runtime.in_process else _with_trial_as_fit(self.profile)
            try:
                manifest = run_step(step, inputs, self.store, runtime, profile, outdated)
            except EngineError as error:
                if str(error).startswith(step.label):
                    raise
                # Callers need the type and the other fields, so only the text changes.
                error.args = (f"{step.label}: {error}",)
                raise
        return TrainResult.of(manifest).val.figures if manifest.kind == TrainResult.kind else {}


def _with_trial_as_fit(profile: Profile) -> Profile:
    """The profile with the resources of a trial's workers as those of a fit."""
    trial = profile.trial
    fit = FitResources(
        workers=trial.workers, cpus=trial.cpus, gpus=trial.gpus, max_failures=trial.max_failures,
        checkpoint_every=profile.fit.checkpoint_every,
    )  # fmt: skip
    return profile.model_copy(update={"fit": fit})


def digests(inputs: Mapping[str, Manifest | None]) -> dict[str, str]:
    """Digests of the inputs by name, as a manifest records them."""
    return {name: manifest.digest for name, manifest in inputs.items() if manifest is not None}


def clear_scratch(store: Store, step: Step) -> None:
    """Remove data that only a running step needs: checkpoints (many times the size of the weights)
    and decoded images."""
    store.delete_all(store.work(step.key))
    for folder in resolve("steps", step.kind).scratch:
        store.delete_all(store.join(store.step(step.kind, step.key), folder))


def prefixes_of(step: Step, store: Store) -> list[str]:
    """All prefixes that a step writes to: its own, and those of shards that it shares."""
    own = store.step(step.kind, step.key)
    return [own, *resolve("steps", step.kind)().shard_prefixes(store, step)]


def discard(step: Step, store: Store, steps: Sequence[Step] = ()) -> int:
    """Discard a step's manifest, and the commits of its shards by tombstone. Returns the number of
    shards.

    steps: the plan. A step that ran this one as a trial is discarded too, so that it chooses again.
    """
    for chooser in steps:
        if step.key in {trial.key for trial in trials_of([chooser])}:
            store.delete(store.manifest(chooser.kind, chooser.key))
    store.delete(store.manifest(step.kind, step.key))
    clear_scratch(store, step)
    return sum(ShardSet(store, prefix).discard() for prefix in prefixes_of(step, store))


@contextmanager
def naming_damage(steps: Sequence[Step], store: Store) -> Iterator[None]:
    """Add to a `DamageError` which of these steps or their inputs wrote the damaged data, and how
    to recompute it."""
    try:
        yield
    except DamageError as error:
        candidates = [] if error.named else [*upstream(list(steps)), *trials_of(steps)]
        if writer := writer_of(error.key, candidates, store):
            error.named = True
            error.args = (
                f"{error}; {writer.label} wrote it: run again with --discard {writer.label}, or use"
                " jobs/fsck.py --repair to discard only this",
            )
        raise


def writer_of(key: str, steps: Sequence[Step], store: Store) -> Step | None:
    """The step that wrote the data at a key, or None.

    The longest matching prefix decides: curate's measurements are stored below generate's images.
    Where steps share a prefix, as rounds of a generator do, the first whose manifest names the key.
    """
    writers: dict[str, list[Step]] = {}
    for step in steps:
        for prefix in prefixes_of(step, store):
            if key.startswith(f"{prefix}/"):
                writers.setdefault(prefix, []).append(step)
    if not writers:
        return None
    sharing = writers[max(writers, key=len)]
    for step in sharing:
        with suppress(StorageError):
            manifest = read_manifest(store, step)
            if manifest is not None and any(part.key == key for part in manifest.parts):
                return step
    return sharing[0]


def _headline(manifest: Manifest) -> str:
    return str(manifest.metrics.get("headline") or f"{manifest.rows:,} rows")
