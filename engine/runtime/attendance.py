"""Registers (`engine.work.attendance`) in a Ray actor, and a worker's side of them.

A hang is ended by `faulthandler`: its timer is a thread of C that needs no GIL, so that it also
ends native code that holds it. It leaves the tracebacks of all threads in a file in Ray's session
folder on this machine, by which the next process of the same actor knows that the one before it
hung. Where Ray restarts the actor on another machine, the time that passed decides.
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

from engine.work.attendance import History, Pace, Piece, Register, hang_limit
from engine.work.resources import StageResources


class Registers:
    """The actor: the registers of all streams of a runtime. A process for each stream would cost
    two seconds of CPU every time."""

    def __init__(self) -> None:
        self.registers: dict[str, Register] = {}

    def call(
        self, stream: str, name: str, resources: StageResources, method: str, *arguments: Any
    ) -> Any:
        """Call a method of a stream's register, a new one where there is none. That of an actor
        that was restarted knows nothing, which costs work and sets no row aside.

        Ray repeats a call whose answer was lost. Each method leaves the register as one call would:
        what is lost is cleared when it is counted, and `arrive` knows its process.
        """
        if stream not in self.registers:
            self.registers[stream] = Register(name, resources)
        return getattr(self.registers[stream], method)(*arguments)

    def forget(self, stream: str) -> None:
        self.registers.pop(stream, None)


def start_registers() -> Any:
    """A handle of the actor, which ends with the last handle or with this process."""
    # Where this process is, for workers' nodes come and go.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(Registers).options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
    )
    return actor.remote()


@dataclass
class RayAttendance:
    """`engine.work.attendance.Attendance`. `arrive` comes first in each process of the pool.

    registers: a handle of the actor. stream: the stream's own name. name: of the stage.
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
        """Returns why the stream has to end, or nothing."""
        context = ray.get_runtime_context()
        self.actor, self.node = context.get_actor_id() or "", context.get_node_id()
        self.process = uuid.uuid4().hex
        self.folder = str(Path(context.get_temp_dir(), context.get_session_name()))
        # A ray.get in an actor's own thread makes Ray lend the actor's CPUs to others meanwhile.
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
        found: list[History] = self._get(self._call("history", list(shards)))
        return found

    def begin(self, shard: str) -> None:
        self.pace = self._ask("begin", shard)

    def end(self, shard: str, pace: Pace) -> None:
        self.pace = self.pace.slower(pace)
        # Nobody waits for it: where it is lost, a shard that is committed is not begun again.
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
            # Its name is known to others: a link that somebody put there is not followed.
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            self._trace = os.fdopen(os.open(self._path, flags, 0o600), "wb")
        except OSError:
            # A full disk: the hang is ended all the same.
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
        """Where this process leaves word that it hung; there while it is watched."""
        return Path(self.folder, f"engine-watch-{self.actor}")

    def _call(self, method: str, *arguments: Any) -> Any:
        return self.registers.call.remote(
            self.stream, self.name, self.resources, method, *arguments
        )

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self._get(self._call(method, self.actor, self.process, *arguments))

    def _get(self, answer: Any) -> Any:
        assert self._calls is not None, "arrive comes first"
        return self._calls.submit(ray.get, answer).result()


@contextmanager
def attending(registers: Any, name: str, resources: StageResources) -> Iterator[RayAttendance]:
    """The attendance of one stream, to be handed to its workers. name: of the stage."""
    stream = uuid.uuid4().hex
    try:
        yield RayAttendance(registers, stream, name, resources)
    finally:
        with suppress(Exception):
            registers.forget.remote(stream)
