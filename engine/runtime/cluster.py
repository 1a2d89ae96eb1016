"""The Ray runtime and its connection: the only module that calls `ray.init`, and one of the few
that read the environment."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.core import interrupts
from engine.core.errors import EngineError, StudyError, brief
from engine.core.shards import Shard
from engine.runtime import scratch
from engine.runtime.base import Outcome, Runtime, Trial, Try, Worker
from engine.runtime.monitor import RECONNECT, Demand, Monitor, RayCluster
from engine.runtime.scratch import Scratch
from engine.tuning.proposals import Halving, Proposals
from engine.work.fit import FitContext, read_progress
from engine.work.resources import FitResources, StageResources, TrialResources
from engine.work.share import Share

# Attempts to start a private Ray: on a busy machine its raylet may take longer than the half a
# minute that Ray waits for it.
_STARTS = 3
_SLOW_START = "timed out during startup"


def home_is_usable() -> bool:
    """Whether the user has a home folder that can be written to."""
    try:
        return os.access(Path.home(), os.W_OK | os.X_OK)
    except RuntimeError:  # no HOME, and no entry in passwd
        return False


class RayRuntime(Runtime):
    """Ray Data for `stream`, Ray Train for `fit`, Ray Tune for `search` and `tune`. Connects with
    the first work.

    address: `local` for a private Ray of this process, otherwise of a Ray cluster (`auto` under
    `ray job submit`). warn: prints a line. on_lost: called from another thread, with a line, when
    the Ray head has stopped answering. Afterwards Ray's core ends this process with a stack dump,
    or hangs.
    """

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
        # The home folder of the user, while another one is set.
        self._home: str | None = None
        self._monitor: Monitor | None = None
        self._connected = False
        # The actor with the registers of streams; started with the first stream.
        self._registers: Any = None

    def stream(
        self, worker: Worker, shards: Sequence[Shard], resources: StageResources
    ) -> Iterator[dict[str, Any]]:
        self._connect()
        self._refuse_too_large(resources, f"stages.{worker.name}")
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

        # Ray Train needs a folder of its own; the engine stores nothing there.
        with self._folder() as folder, self._waiting(resources, resources.workers, reports):
            fit(train, context, resources, str(folder))

    def search(
        self,
        run: Trial,
        names: Sequence[str],
        resources: TrialResources,
        on_end: Callable[[str], None],
    ) -> None:
        with self._trials(resources) as (folder, share, started):
            from engine.runtime.search import search

            search(run, names, resources, started, on_end, folder, share)

    def tune(
        self,
        run: Try,
        proposals: Proposals,
        halving: Halving | None,
        resources: TrialResources,
        leaf: bool,
        on_end: Callable[[Outcome], None],
    ) -> None:
        with self._trials(resources) as (folder, share, started):
            from engine.runtime.tune import tune

            tune(run, proposals, halving, resources, leaf, started, on_end, folder, share)

    @contextmanager
    def _trials(self, resources: TrialResources) -> Iterator[tuple[str, Share, Callable[[], None]]]:
        """A folder for Ray Tune, the arrays that trials share, and a function to call when one has
        started."""
        self._connect()
        self._refuse_too_large(resources)
        from engine.runtime.share import sharing

        running = threading.Event()
        with (
            self._folder() as folder,
            sharing(self.warn) as share,
            self._waiting(resources, resources.workers, running.is_set),
        ):
            yield str(folder), share, running.set

    @contextmanager
    def _waiting(
        self,
        resources: StageResources | FitResources | TrialResources,
        workers: int,
        started: Callable[[], bool],
    ) -> Iterator[None]:
        """In the block, report the resources that this work waits for until it has `started`."""
        if self._monitor is None:
            yield
            return
        each = {"CPU": resources.cpus, "GPU": resources.gpus}
        with self._monitor.waiting(Demand(each, workers, started)):
            yield

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """A folder for the files of Ray Train and Ray Tune, removed afterwards."""
        if self._scratch is None:
            with scratch.folder(Path(tempfile.gettempdir())) as path:
                yield path
        else:
            # After a kill, it is removed with the run's scratch folder.
            with tempfile.TemporaryDirectory(
                dir=self._scratch.path, ignore_cleanup_errors=True
            ) as path:
                yield Path(path)

    def _refuse_too_large(
        self, resources: TrialResources | FitResources | StageResources, what: str = "trial"
    ) -> None:
        """Raise `StudyError` if the work can never be placed. A Ray cluster may still grow, so only
        a private Ray is checked."""
        if self.address == "local":
            import ray

            total = ray.cluster_resources()
            refuse_too_large(resources, total, what)

    def _connect(self) -> None:
        if self._connected:
            return
        local = self.address == "local"
        if local:
            self._prepare_local()
        elif os.environ.get("RAY_AUTH_MODE") != "token":
            self.warn(
                "warning: this Ray cluster accepts jobs from anyone who can reach its ports;"
                " set RAY_AUTH_MODE=token on the head and for the submitter"
            )
        # By default Train checks the health of its workers every 2 s, and waits as long for the
        # first answer.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        # The engine reports progress and stores results itself.
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        # Silences Ray's core on the terminal (such as a harmless error for each pool of actors, ray
        # #53727), and its raylets (such as each retry of a lost worker's task).
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^")
        # Keeps the working directory in fits and trials: a study's paths are relative to it.
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if local:
            self._start_local()
        else:
            self._join()
        self._connected = True
        ray_cluster = RayCluster(os.environ.get(RECONNECT, ""))
        self._monitor = Monitor(ray_cluster, self.warn, self.on_lost)
        self._monitor.start()

    def _join(self) -> None:
        """Connect to a Ray cluster. Raises `StudyError`."""
        try:
            _init(address=self.address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise StudyError(
                f"profile: address: cannot reach Ray at {self.address!r} ({brief(error, 300)});"
                " check the address and that the Ray cluster runs, or use local"
            ) from None

    def _start_local(self) -> None:
        """Start a private Ray, and again if its raylet is not up in time. Raises `EngineError`."""
        cpus = self.num_cpus or max(4, os.cpu_count() or 1)
        for left in reversed(range(_STARTS)):
            self._make_scratch()
            before = interrupts.children()
            try:
                _init(address="local", num_cpus=cpus, include_dashboard=False)
                interrupts.kill_first(interrupts.children(recursive=False) - before)
                return
            # Ray raises a plain Exception if its raylet is slow.
            except Exception as error:
                text = brief(error, 300)
            # `ray.shutdown` does not clean up a node that failed to start.
            interrupts.end_children(spare=before)
            self._remove_scratch()
            if _SLOW_START not in text or not left:
                raise EngineError(
                    f"Ray did not start on this machine ({text}); fix this, or set"
                    " profile.runtime=inline"
                )
            self.warn("Ray took too long to start on this machine; starting it again")

    def _make_scratch(self) -> None:
        temporary = Path(tempfile.gettempdir())
        self._scratch = Scratch(scratch.parent_for_sockets(temporary, self.warn))
        interrupts.at_end(self._scratch.close)
        os.environ["RAY_TMPDIR"] = str(self._scratch.path)
        if not home_is_usable():
            # Ray writes to ~/.ray, also where a container has no home. Models are still looked for
            # in the old one.
            self._home = os.environ.get("HOME")
            if self._home and "HF_HOME" not in os.environ:
                os.environ["HF_HOME"] = f"{self._home}/.cache/huggingface"
            os.environ["HOME"] = str(self._scratch.path)

    def _remove_scratch(self) -> None:
        if self._scratch is not None:
            interrupts.kill_first(())
            interrupts.at_end(None)
            self._scratch.close()
            self._scratch = None
            os.environ.pop("RAY_TMPDIR", None)
            if self._home is not None:
                os.environ["HOME"] = self._home

    def _prepare_local(self) -> None:
        """Set the environment for a private Ray. A leftover address of another Ray would cost 10 to
        20 s per fit."""
        os.environ.pop("RAY_ADDRESS", None)
        # Workers inherit this environment, credentials included; on a Ray cluster they have that of
        # their nodes.
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # By default OpenMP's idle threads spin. With more threads than cores, as when decoding runs
        # next to a network, that costs 3 to 5 times the CPU time.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def close(self) -> None:
        """Disconnect from Ray. A private Ray ends, and its folder is removed."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        if self._connected:
            import ray

            self._registers = None
            if not interrupts.received():
                ray.shutdown()
            else:
                # A regular shutdown takes longer than `ray job stop` waits, and Ray's core would
                # print errors. A Ray cluster ends a job whose driver is gone by itself.
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
    """Raise `StudyError` for work that would wait for ever, because Ray has too few CPUs or GPUs.

    One actor of a stage must fit; of a trial or fit, all workers. there: Ray's total resources.
    what: the section of the profile.
    """
    workers = 1 if isinstance(resources, StageResources) else resources.workers
    for field, name, each, remedy in (
        ("cpus", "CPU", resources.cpus, "request fewer, or raise num_cpus"),
        ("gpus", "GPU", resources.gpus, "request fewer"),
    ):
        if workers * each > (total := there.get(name, 0.0)):
            asked = f"{each:g}" if workers == 1 else f"{each:g} for each of {workers} workers"
            raise StudyError(
                f"profile: {what}.{field}: {asked} requested, this Ray has {total:g}; {remedy}"
            )


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard standard error. While it starts, Ray's core prints its log level, and a stack dump on
    SIGTERM; real errors are exceptions."""
    sys.stderr.flush()
    before, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(null)
