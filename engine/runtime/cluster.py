"""The connection to Ray: the only place that calls `ray.init`, and one of the few that read the
environment."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from engine.core import interrupts
from engine.core.errors import EngineError, StorageError, StudyError
from engine.core.shards import Shard
from engine.runtime import scratch
from engine.runtime.base import Outcome, Trial, Try, Worker
from engine.runtime.monitor import RECONNECT, Demand, Monitor, RayCluster
from engine.runtime.scratch import Scratch
from engine.tuning.proposals import Halving, Proposals
from engine.work.fit import FitContext, read_progress
from engine.work.resources import FitResources, StageResources, TrialResources

# How often a private Ray is started before the run stops: on a busy machine its raylet may take
# longer than the half a minute that Ray waits for it.
_STARTS = 3
_SLOW_START = "timed out during startup"


class RayRuntime:
    """Ray Data for `stream`, Ray Train for `fit`, Ray Tune for `search` and `tune`. Connects when
    there is work, not before.

    address: `local` for a private Ray of this process, else the cluster's (`auto` under `ray job
    submit`). warn: prints a line. on_lost: called from another thread, with a line, when the Ray
    head stopped answering: Ray's core will end this process with a stack dump, or nothing happens
    any more.
    """

    in_process: ClassVar[bool] = False

    def __init__(
        self,
        address: str,
        num_cpus: int | None,
        *,
        warn: Callable[[str], None],
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self.address, self.num_cpus, self.warn = address, num_cpus, warn
        self.on_lost = on_lost or warn
        self._scratch: Scratch | None = None
        self._monitor: Monitor | None = None
        self._connected = False
        # What the actors of streams remember across deaths; started with the first stream.
        self._registers: Any = None

    def stream(
        self, worker: Worker, shards: Sequence[Shard], resources: StageResources
    ) -> Iterator[dict[str, Any]]:
        self._connect()
        self._refuse_too_large(resources, "stages")
        return self._stream(worker, shards, resources)

    def _stream(
        self, worker: Worker, shards: Sequence[Shard], resources: StageResources
    ) -> Iterator[dict[str, Any]]:
        from engine.runtime.attendance import start_registers
        from engine.runtime.stream import stream

        if self._registers is None:
            self._registers = start_registers()
        running = threading.Event()
        summaries = stream(worker, shards, resources, self._registers)
        with self._waiting(resources, 1, running.is_set):
            for summary in interrupts.iterate_off_main_thread(summaries):
                running.set()
                yield summary

    def fit(
        self, train: Callable[[FitContext], None], context: FitContext, resources: FitResources
    ) -> None:
        self._connect()
        self._refuse_too_large(resources, "fit")
        from engine.runtime.fit import fit

        def reports() -> bool:
            return read_progress(context.store, context.work, context.attempt) is not None

        # Ray Train insists on a folder of its own; nothing of ours lies there.
        with self._folder() as folder, self._waiting(resources, resources.workers, reports):
            fit(train, context, resources, str(folder))

    def search(
        self,
        run: Trial,
        names: Sequence[str],
        resources: TrialResources,
        on_end: Callable[[str], None],
    ) -> None:
        self._connect()
        self._refuse_too_large(resources)
        from engine.runtime.search import search
        from engine.runtime.share import sharing

        running = threading.Event()
        with (
            self._folder() as folder,
            sharing(self.warn) as share,
            self._waiting(resources, resources.workers, running.is_set),
        ):
            search(run, names, resources, running.set, on_end, str(folder), share)

    def tune(
        self,
        run: Try,
        proposals: Proposals,
        halving: Halving | None,
        resources: TrialResources,
        leaf: bool,
        on_end: Callable[[Outcome], None],
    ) -> None:
        self._connect()
        self._refuse_too_large(resources)
        from engine.runtime.share import sharing
        from engine.runtime.tune import tune

        running = threading.Event()
        with (
            self._folder() as folder,
            sharing(self.warn) as share,
            self._waiting(resources, resources.workers, running.is_set),
        ):
            tune(
                run, proposals, halving, resources, leaf, running.set, on_end, str(folder), share
            )  # fmt: skip

    @contextmanager
    def _waiting(
        self,
        resources: StageResources | FitResources | TrialResources,
        workers: int,
        started: Callable[[], bool],
    ) -> Iterator[None]:
        """Meanwhile, report what this work waits for before it has `started`."""
        if self._monitor is None:
            yield
            return
        each = {"CPU": resources.cpus, "GPU": resources.gpus}
        with self._monitor.waiting(Demand(each, workers, started)):
            yield

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """A folder for what Ray Train and Ray Tune write down, removed afterwards."""
        if self._scratch is None:
            with scratch.folder(Path(tempfile.gettempdir())) as path:
                yield path
        else:
            # What is left by a kill goes with the folder that it lies in.
            with tempfile.TemporaryDirectory(
                dir=self._scratch.path, ignore_cleanup_errors=True
            ) as path:
                yield Path(path)

    def _refuse_too_large(
        self, resources: TrialResources | FitResources | StageResources, what: str = "trial"
    ) -> None:
        """Raises `StudyError`. A private Ray grows no further, while a cluster may."""
        if self.address == "local":
            import ray

            refuse_too_large(resources, ray.cluster_resources(), what)

    def _connect(self) -> None:
        if self._connected:
            return
        local = self.address == "local"
        if local:
            self._prepare_local()
        elif os.environ.get("RAY_AUTH_MODE") != "token":
            self.warn(
                "warning: this Ray cluster takes jobs from anybody who reaches its ports;"
                " set RAY_AUTH_MODE=token on the head and for the submitter"
            )
        # Train asks its workers whether they live every 2 s by default, and waits as long for the
        # first answer.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        # Progress and results are the engine's to tell and to keep.
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        # What Ray's core writes to the terminal, such as a harmless error for each pool of actors
        # (ray #53727), and what its raylets send there, such as each retry of a lost worker's task.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^")
        # A study's paths are relative to where it was started, in fits and trials too.
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if local:
            self._start_local()
        else:
            self._join()
        self._connected = True
        cluster = RayCluster(os.environ.get(RECONNECT, ""))
        self._monitor = Monitor(cluster, self.warn, self.on_lost)
        self._monitor.start()

    def _join(self) -> None:
        """Connect to a cluster. Raises `StudyError`."""
        try:
            _init(address=self.address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:300]
            raise StudyError(
                f"profile: address: cannot reach Ray at {self.address!r}: {text}"
            ) from None

    def _start_local(self) -> None:
        """Start a private Ray, again where its raylet did not come up in time. Raises
        `EngineError`."""
        cpus = self.num_cpus or max(4, os.cpu_count() or 1)
        for left in reversed(range(_STARTS)):
            self._make_scratch()
            before = interrupts.children()
            try:
                _init(address="local", num_cpus=cpus, include_dashboard=False)
                interrupts.kill_first(interrupts.children(recursive=False) - before)
                return
            # Ray raises a plain Exception where its raylet is slow.
            except Exception as error:
                text = " ".join(str(error).split())[:300]
            # `ray.shutdown` knows nothing of a node that did not come up.
            interrupts.end_children(spare=before)
            self._remove_scratch()
            if _SLOW_START not in text or not left:
                raise EngineError(f"Ray did not start on this machine: {text}")
            self.warn("Ray took too long to start on this machine; starting it again")

    def _make_scratch(self) -> None:
        temporary = Path(tempfile.gettempdir())
        self._scratch = Scratch(scratch.parent_for_sockets(temporary, self.warn))
        interrupts.at_end(self._scratch.close)
        os.environ["RAY_TMPDIR"] = str(self._scratch.path)

    def _remove_scratch(self) -> None:
        if self._scratch is not None:
            interrupts.kill_first(())
            interrupts.at_end(None)
            self._scratch.close()
            self._scratch = None
            os.environ.pop("RAY_TMPDIR", None)

    def _prepare_local(self) -> None:
        """Give this run a Ray of its own: an address left by another one costs 10 to 20 s for each
        fit."""
        os.environ.pop("RAY_ADDRESS", None)
        # Workers inherit the environment, credentials with it; on a cluster they have their nodes'
        # own.
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Else OpenMP's idle threads spin for those of a worker that waits for a core: with more
        # threads than cores, which decoding beside a network is, 3 to 5 times the CPU time.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def close(self) -> None:
        """Leave Ray; a private one ends, and its folder goes."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        if self._connected:
            import ray

            self._registers = None
            if not interrupts.received():
                ray.shutdown()
            else:
                # Asking its processes to end takes longer than `ray job stop` waits, and Ray's
                # core would report what it lost. A cluster ends a job whose driver is gone.
                interrupts.silence()
                if self._scratch is not None:
                    interrupts.end_children()
            self._connected = False
        self._remove_scratch()


def _init(**options: Any) -> None:
    """`ray.init`, without output and without its signal handlers."""
    import ray

    with _without_stderr(), interrupts.preserved_handlers():
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)


def refuse_too_large(
    resources: TrialResources | FitResources | StageResources,
    there: Mapping[str, float],
    what: str = "trial",
) -> None:
    """Refuse work that a Ray with so many CPUs and GPUs could never place: it would wait for ever.
    Of a stage it is one actor that must fit, of trials and fits all workers. Raises
    `StudyError`."""
    workers = 1 if isinstance(resources, StageResources) else resources.workers
    for field, name, each, remedy in (
        ("cpus", "CPU", resources.cpus, "ask for fewer, or raise num_cpus"),
        ("gpus", "GPU", resources.gpus, "ask for fewer"),
    ):
        if workers * each > (held := there.get(name, 0.0)):
            asked = f"{each:g}" if workers == 1 else f"{each:g} by each of {workers} workers"
            raise StudyError(
                f"profile: {what}.{field}: {asked} asked, this Ray has {held:g}; {remedy}"
            )


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray's core announces its log level on the terminal while it starts, and dumps its stack on a
    SIGTERM; its errors come as exceptions."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def ray_error_text(error: BaseException) -> EngineError | None:
    """The engine's own error inside an error of Ray, or None. Where workers failed in several ways,
    one that another attempt would come to again."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        # Ray Train keeps what its workers raised by their rank.
        workers = getattr(current, "worker_failures", None) or {}
        own = [found for one in workers.values() if (found := ray_error_text(one)) is not None]
        if own:
            return min(own, key=lambda found: isinstance(found, StorageError))
        # Ray makes errors of a class that is its own and ours, whose text is a traceback.
        if isinstance(current, EngineError) and not hasattr(current, "cause"):
            return current
        current = getattr(current, "cause", None) or current.__cause__ or current.__context__
    return None
