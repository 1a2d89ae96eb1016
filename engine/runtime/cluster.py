"""The connection to Ray: the only place that calls `ray.init`, and one of the few that read the
environment."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar

from engine.core.errors import EngineError, StorageError, StudyError
from engine.core.fit import FitContext
from engine.core.proposals import Halving, Proposals
from engine.core.resources import FitResources, StageResources, TrialResources
from engine.core.shards import Shard
from engine.runtime.base import Outcome, Trial, Try, Worker

_TEMP_PREFIX = "engine-ray-"


class RayRuntime:
    """Ray Data for `stream`, Ray Train for `fit`, Ray Tune for `search` and `tune`. Connects when
    there is work, not before.

    address: `local` for a private Ray of this process, else the cluster's (`auto` under `ray job
    submit`).
    """

    alone: ClassVar[bool] = False

    def __init__(self, address: str, num_cpus: int | None, *, warn: Callable[[str], None]) -> None:
        self.address, self.num_cpus, self.warn = address, num_cpus, warn
        self._temporary: Path | None = None
        self._connected = False
        # What the actors of streams remember across deaths; started with the first stream.
        self._registers: Any = None

    def stream(
        self, worker: Worker, shards: Sequence[Shard], resources: StageResources
    ) -> Iterator[dict[str, Any]]:
        self._connect()
        from engine.runtime.attendance import start_registers
        from engine.runtime.stream import stream

        if self._registers is None:
            self._registers = start_registers()
        return stream(worker, shards, resources, self._registers)

    def fit(
        self, train: Callable[[FitContext], None], context: FitContext, resources: FitResources
    ) -> None:
        self._connect()
        self._refuse_too_large(resources, "fit")
        from engine.runtime.fit import fit

        # Ray Train insists on a folder of its own; nothing of ours lies there.
        with tempfile.TemporaryDirectory(prefix=_TEMP_PREFIX) as folder:
            fit(train, context, resources, folder)

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

        with (
            tempfile.TemporaryDirectory(prefix=_TEMP_PREFIX) as folder,
            sharing(self.warn) as share,
        ):
            search(run, names, resources, on_end, folder, share)

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

        with (
            tempfile.TemporaryDirectory(prefix=_TEMP_PREFIX) as folder,
            sharing(self.warn) as share,
        ):
            tune(run, proposals, halving, resources, leaf, on_end, folder, share)

    def _refuse_too_large(
        self, resources: TrialResources | FitResources, what: str = "trial"
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
        # An interrupted run ends as one, and not with what there is so far.
        os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
        # A study's paths are relative to where it was started, in fits and trials too.
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        options: dict[str, Any] = {}
        if local:
            cpus = self.num_cpus or max(4, os.cpu_count() or 1)
            options = {"num_cpus": cpus, "include_dashboard": False}
        try:
            with _without_stderr() if local else nullcontext():
                ray.init(
                    address=self.address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **options,
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:300]
            raise StudyError(
                f"profile: address: cannot reach Ray at {self.address!r}: {text}"
            ) from None
        self._connected = True

    def _prepare_local(self) -> None:
        """Give this run a Ray of its own: an address left by another one costs 10 to 20 s for each
        fit."""
        _remove_stale()
        os.environ.pop("RAY_ADDRESS", None)
        # Short: Ray puts sockets below, and a socket's path has 107 characters at most.
        self._temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMP_PREFIX}{os.getpid()}-"))
        os.environ["RAY_TMPDIR"] = str(self._temporary)
        # Workers inherit the environment, credentials with it; on a cluster they have their nodes'
        # own.
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's own core writes a harmless error for each pool of actors to the terminal (ray
        # #53727).
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Else OpenMP's idle threads spin for those of a worker that waits for a core: with more
        # threads than cores, which decoding beside a network is, 3 to 5 times the CPU time.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def close(self) -> None:
        """Leave Ray; a private one ends, and its folder goes."""
        if self._connected:
            import ray

            self._registers = None
            ray.shutdown()
            self._connected = False
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None
            os.environ.pop("RAY_TMPDIR", None)


def refuse_too_large(
    resources: TrialResources | FitResources, there: Mapping[str, float], what: str = "trial"
) -> None:
    """Refuse trials or fits that a Ray with so many CPUs and GPUs could never place: they would
    wait for ever. Raises `StudyError`."""
    workers = resources.workers
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
    """Ray's core announces its log level on the terminal while it starts; its errors come as
    exceptions."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _remove_stale() -> None:
    """Remove folders of private Rays whose driver was killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_TEMP_PREFIX}*-*"):
        pid = folder.name.removeprefix(_TEMP_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc").exists():
            with suppress(OSError):
                shutil.rmtree(folder, ignore_errors=True)


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
