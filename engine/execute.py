"""The walk over a plan: skip what is done, run the rest, commit a manifest for each.

A step is done while its manifest exists and the manifests of its inputs are those that it read.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from engine.context import Context, Work
from engine.core.errors import DamageError, EngineError, StorageError
from engine.core.manifest import Manifest, read_manifest, write_manifest
from engine.core.progress import say
from engine.core.registry import resolve
from engine.core.shards import ShardSet
from engine.core.spec import canonical
from engine.core.step import Step, upstream
from engine.core.store import Store
from engine.plan import trials_of
from engine.profile import Profile
from engine.results.comparison import TrainResult
from engine.runtime.base import Runtime
from engine.work.resources import FitResources

State = Literal["done", "missing", "out of date", "waits"]
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
    """Where a step stands, and why it is not done."""

    step: Step
    state: State
    why: str
    manifest: Manifest | None = None


def inspect(steps: Sequence[Step], store: Store) -> list[Status]:
    """Where each step of a plan stands; reads manifests and nothing else."""
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
        partly = f"; {shards} shards lie committed" if shards else ""
        if waiting:
            return Status(step, "waits", f"needs {_few(waiting)}{partly}")
        return Status(step, "missing", f"not computed yet{partly}")
    if waiting:
        return Status(step, "waits", f"needs {_few(waiting)}")
    changed = [
        status.step.label
        for name, status in inputs.items()
        if status.manifest is None or manifest.inputs.get(name) != status.manifest.digest
    ]
    if changed:
        return Status(step, "out of date", f"{_few(changed)} changed since", manifest)
    if reason := resolve("steps", step.kind)().outdated(step, manifest):
        return Status(step, "out of date", reason, manifest)
    return Status(step, "done", "", manifest)


def _few(labels: Sequence[str], most: int = 8) -> str:
    """Labels in a line; a search has hundreds of inputs."""
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more


def execute(
    steps: Sequence[Step], store: Store, runtime: Runtime, profile: Profile, quiet: bool = False
) -> dict[str, Manifest]:
    """Run what is not done, inputs first; returns the manifests by step key. quiet: nothing is said
    of what is done."""
    known: dict[str, Status] = {}
    with naming_damage(steps, store):
        for step in steps:
            known[step.key] = _walk(step, known, store, runtime, profile, quiet)
    return {key: status.manifest for key, status in known.items() if status.manifest is not None}


def _walk(
    step: Step, known: dict[str, Status], store: Store, runtime: Runtime, profile: Profile,
    quiet: bool,
) -> Status:  # fmt: skip
    """Run one step unless it is done."""
    status = _inspect(step, store, known)
    if status.state == "done":
        assert status.manifest is not None
        if not quiet:
            say(f"{step.label:<20} {step.key}  done: {_headline(status.manifest)}")
        return status
    say(f"{step.label:<20} {step.key}  {resolve('steps', step.kind).summary}")
    if status.manifest is not None:
        say(f"  {step.label}: again, for {status.why}")
    inputs = {name: known[needed.key].manifest for name, needed in step.inputs.items()}
    outdated = status.manifest is not None
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
    """Run one step whose inputs are done, and commit its manifest in place of an outdated one."""
    present = {name: manifest for name, manifest in inputs.items() if manifest is not None}
    if len(present) != len(inputs):
        raise EngineError(
            f"{step.label}: inputs are missing: {', '.join(sorted(set(inputs) - set(present)))}"
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
        # Another driver that ran the same step may have been first, and have removed what both
        # worked on.
        if (other := current_manifest(store, step, present)) is None:
            raise
        clear(store, step)
        return other
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
            "held": held(context.work, seconds, runtime, profile),
            "device": profile.device,
            "python": platform.python_version(),
            "versions": installed_versions(),
            **context.notes,
        },
    )
    if outdated and current_manifest(store, step, present) is None:
        # It was kept until there is a new one: it is the index of what was made.
        store.delete(store.manifest(step.kind, step.key))
    written = write_manifest(store, manifest)
    clear(store, step)
    return written


def current_manifest(
    store: Store, step: Step, inputs: Mapping[str, Manifest | None]
) -> Manifest | None:
    """The manifest of a step if it was made from these inputs and nothing else has changed."""
    manifest = read_manifest(store, step)
    if manifest is None or manifest.inputs != digests(inputs):
        return None
    return None if resolve("steps", step.kind)().outdated(step, manifest) else manifest


def held(
    work: Sequence[Work], seconds: float, runtime: Runtime, profile: Profile
) -> list[dict[str, Any]]:
    """What a step held of CPUs and GPUs, and for how long, as the profile grants it: a trial its
    own share, whatever it computes; else each pool and fit what its workers hold, and this process
    a CPU for the rest of the time."""
    if runtime.alone and profile.runtime == "ray":
        return [_holding("trial", 1, profile.trial.cpus, profile.trial.gpus, seconds)]
    found = []
    for one in work:
        each = profile.fit if one.name == "fit" else profile.stage(one.name)
        workers = each.workers if isinstance(each, FitResources) else min(each.actors, one.parts)
        gpus = each.gpus
        if runtime.alone:
            # This process is the only worker, and has the GPU to itself.
            workers, gpus = 1, float(profile.device == "cuda" and one.name != "decode")
        found.append(_holding(one.name, workers, each.cpus, gpus, one.seconds))
    rest = max(0.0, seconds - sum(one.seconds for one in work))
    return [*found, _holding("driver", 1, 1.0, 0.0, rest)]


def _holding(what: str, workers: int, cpus: float, gpus: float, seconds: float) -> dict[str, Any]:
    """CPUs and GPUs are of each worker."""
    return {"what": what, "workers": workers, "cpus": cpus, "gpus": gpus,
            "seconds": round(seconds, 3)}  # fmt: skip


@dataclass(frozen=True)
class Trials:
    """Runs steps in trials of the runtime. Their inputs must be done."""

    store: Store
    runtime: Runtime
    profile: Profile

    def find(self, steps: Sequence[Step]) -> dict[str, Manifest]:
        needed = upstream([needed for step in steps for needed in step.inputs.values()])
        found = inspect([*needed, *steps], self.store)
        wanted = {step.key for step in steps}
        return {
            status.step.key: status.manifest
            for status in found
            if status.step.key in wanted and status.state == "done" and status.manifest
        }

    def run(self, steps: Sequence[Step], on_end: Callable[[int], None]) -> dict[str, Manifest]:
        needed = {needed.key: needed for step in steps for needed in step.inputs.values()}
        inputs = {key: read_manifest(self.store, needed) for key, needed in needed.items()}
        # The name is what an error tells of a trial.
        by_name = {f"{step.label} ({step.key})": step for step in steps}
        trial = RunTrial(by_name, inputs, self.store, self.profile)
        self.runtime.search(trial, list(by_name), self.profile.trial, lambda _: on_end(1))
        made = {}
        for step in steps:
            manifest = read_manifest(self.store, step)
            if manifest is None:
                raise EngineError(f"{step.label}: its trial ended without a result")
            made[step.key] = manifest
        return made


@dataclass(frozen=True)
class RunTrial:
    """What a trial's process runs: one step, by its name."""

    steps: dict[str, Step]
    inputs: dict[str, Manifest | None]
    store: Store
    profile: Profile

    def __call__(self, name: str, runtime: Runtime) -> dict[str, float]:
        step = self.steps[name]
        inputs = {label: self.inputs[needed.key] for label, needed in step.inputs.items()}
        # Another driver's trial, or an attempt before this one, may have come first.
        manifest = current_manifest(self.store, step, inputs)
        if manifest is None:
            outdated = self.store.exists(self.store.manifest(step.kind, step.key))
            # A trial on a runtime with workers is a fit on them; any other is its own process.
            profile = self.profile if runtime.alone else _with_trial_as_fit(self.profile)
            try:
                manifest = run_step(step, inputs, self.store, runtime, profile, outdated)
            except EngineError as error:
                if str(error).startswith(step.label):
                    raise
                # The same error: its other fields, and its type, are for whoever catches it.
                error.args = (f"{step.label}: {error}",)
                raise
        return TrainResult.of(manifest).val.figures if manifest.kind == TrainResult.kind else {}


def _with_trial_as_fit(profile: Profile) -> Profile:
    """The profile with what it grants a trial's workers as what it grants a fit's."""
    trial = profile.trial
    fit = FitResources(
        workers=trial.workers, cpus=trial.cpus, gpus=trial.gpus, max_failures=trial.max_failures,
        checkpoint_every=profile.fit.checkpoint_every,
    )  # fmt: skip
    return profile.model_copy(update={"fit": fit})


def digests(inputs: Mapping[str, Manifest | None]) -> dict[str, str]:
    """What a manifest records of the inputs that its step read."""
    return {name: manifest.digest for name, manifest in inputs.items() if manifest is not None}


def clear(store: Store, step: Step) -> None:
    """Remove what only a running step needs: checkpoints (of a large network, many times its
    weights) and decoded pictures."""
    store.delete_all(store.work(step.key))
    for folder in resolve("steps", step.kind).scratch:
        store.delete_all(store.join(store.step(step.kind, step.key), folder))


def installed_versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def prefixes_of(step: Step, store: Store) -> list[str]:
    """Prefixes of all that a step writes: its own, and those of shards that it shares."""
    own = store.step(step.kind, step.key)
    return [own, *resolve("steps", step.kind)().shard_prefixes(store, step)]


def discard(step: Step, store: Store, steps: Sequence[Step] = ()) -> int:
    """Throw away what a step left: its manifest, and its shards' commits by tombstone. Returns the
    shards.

    steps: of the plan. One that ran the step as a trial chose by its result, and chooses again.
    """
    for other in steps:
        if step.key in {trial.key for trial in trials_of([other])}:
            store.delete(store.manifest(other.kind, other.key))
    store.delete(store.manifest(step.kind, step.key))
    clear(store, step)
    return sum(ShardSet(store, prefix).discard() for prefix in prefixes_of(step, store))


@contextmanager
def naming_damage(steps: Sequence[Step], store: Store) -> Iterator[None]:
    """Let a `DamageError` say which of these steps, or of their inputs, wrote what is damaged, and
    how to have it made again."""
    try:
        yield
    except DamageError as error:
        every = [] if error.named else [*upstream(list(steps)), *trials_of(steps)]
        if writer := writer_of(error.key, every, store):
            error.named = True
            error.args = (
                f"{error}; {writer.label} wrote it: run again with --discard {writer.label}, or let"
                " jobs/fsck.py --repair throw away no more than this",
            )
        raise


def writer_of(key: str, steps: Sequence[Step], store: Store) -> Step | None:
    """The step that wrote what lies at a key.

    Of nested prefixes the longest counts: what curate measures lies below what generate made. Of
    steps that share a prefix, as rounds of a generator do, the first whose manifest names the key.
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
