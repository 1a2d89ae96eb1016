"""Registers (`engine.work.attendance`) in a Ray actor, and a worker's connection to them.

`faulthandler` ends a hanging process: its timer is a C thread that needs no GIL, so that it also
ends native code that holds the GIL. It writes the tracebacks of all threads to a file in Ray's
session folder on this machine. From this file the actor's next process knows that its predecessor
hung. If Ray restarts the actor on another machine, the elapsed time decides.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.work.attendance import Attendance, History, Pace, Piece, Register, hang_limit
from engine.work.resources import StageResources


class Registers:
    """The actor with the registers of all streams of a runtime. A process for each stream would
    cost two seconds of CPU every time."""

    def __init__(self) -> None:
        self.registers: dict[str, Register] = {}

    def call(
        self, stream: str, name: str, resources: StageResources, method: str, *arguments: Any
    ) -> Any:
        """Call a method of a stream's register, which is created if needed. A restarted actor
        starts with empty registers; that costs work but sets no row aside.

        Ray repeats a call whose answer was lost, so every method is idempotent: a loss is cleared
        when it is counted, and `arrive` recognises its process.
        """
        if stream not in self.registers:
            self.registers[stream] = Register(name, resources)
        return getattr(self.registers[stream], method)(*arguments)

    def forget(self, stream: str) -> None:
        self.registers.pop(stream, None)


def start_registers() -> Any:
    """A handle of the actor, which ends with the last handle or with this process."""
    # On the node of this process, because workers' nodes come and go.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(Registers).options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
    )
    return actor.remote()


@dataclass
class RayAttendance(Attendance):
    """`engine.work.attendance.Attendance` on Ray. Each process of the pool calls `arrive` first.

    registers: a handle of the actor. stream: unique name of the stream. name: of the stage.
    """

    registers: Any
    stream: str
    name: str
    resources: StageResources
    node: str = ""
    pace: Pace = field(default_factory=Pace)
    actor: str = ""
    process: str = ""
    # Ray's session folder on this node.
    folder: str = ""
    _calls: ThreadPoolExecutor | None = field(default=None, repr=False)
    _trace: Any = None

    def arrive(self) -> str:
        """Announce this process; returns why the stream must end, or an empty text."""
        context = ray.get_runtime_context()
        self.actor, self.node = context.get_actor_id() or "", context.get_node_id()
        self.process = uuid.uuid4().hex
        self.folder = str(Path(context.get_temp_dir(), context.get_session_name()))
        # In a thread of its own: during ray.get in an actor's thread, Ray lends out its CPUs.
        self._calls = ThreadPoolExecutor(1, thread_name_prefix="attendance")
        hung: bool | None = None
        with suppress(FileNotFoundError):
            hung = self._path.stat().st_size > 0
            self._path.unlink()
        place = f"node {self.node[:8]}, host {socket.gethostname()}"
        stop: str = self._ask("arrive", place, hung)
        return stop

    def loaded(self) -> None:
        self._ask("loaded")

    def history(self, shards: Sequence[str]) -> list[History]:
        histories: list[History] = self._get(self._call("history", list(shards)))
        return histories

    def begin(self, shard: str) -> None:
        self.pace = self._ask("begin", shard)

    def end(self, shard: str, pace: Pace) -> None:
        self.pace = self.pace.slower(pace)
        # Not awaited: if the call is lost, the committed shard does not start again anyway.
        self._call("end", self.actor, self.process, shard, pace)

    def next_piece(
        self, shard: str, rows: int, batch_size: int, done: Piece | None, pace: Pace
    ) -> History:
        history: History
        history, self.pace = self._ask("next_piece", shard, rows, batch_size, done, pace)
        return history

    def watch(self, batches: int, first: bool = False) -> None:
        self._end_after(hang_limit(self.resources, self.pace, batches, first))

    def watch_long(self) -> None:
        self._end_after(self.resources.hang_first)

    def _end_after(self, seconds: float) -> None:
        self.unwatch()
        try:
            self._path.unlink(missing_ok=True)
            # O_EXCL: the name is predictable, so a link planted there must not be followed.
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            self._trace = os.fdopen(os.open(self._path, flags, 0o600), "wb")
        except OSError:
            # On a full disk the hang is ended without a trace.
            self._trace = open(os.devnull, "wb")
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._trace)

    def unwatch(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._trace is not None:
            self._trace.close()
            self._trace = None
            with suppress(OSError):
                self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        """The trace file of a hang. It exists while the process is watched, empty unless it
        hangs."""
        return Path(self.folder, f"engine-watch-{self.actor}")

    def _call(self, method: str, *arguments: Any) -> Any:
        return self.registers.call.remote(
            self.stream, self.name, self.resources, method, *arguments
        )

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self._get(self._call(method, self.actor, self.process, *arguments))

    def _get(self, answer: Any) -> Any:
        assert self._calls is not None, "call arrive first"
        return self._calls.submit(ray.get, answer).result()


@contextmanager
def attending(registers: Any, name: str, resources: StageResources) -> Iterator[RayAttendance]:
    """The attendance of one stream, for its workers. name: of the stage."""
    stream = uuid.uuid4().hex
    try:
        yield RayAttendance(registers, stream, name, resources)
    finally:
        with suppress(Exception):
            registers.forget.remote(stream)
