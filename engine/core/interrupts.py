"""SIGINT and SIGTERM in a job: one line of output, exit code 130 or 143, no process left behind.

The first signal raises in the main thread, so that `finally` blocks run. That is not enough: a
library may swallow the exception, replace the handler (Ray does, for SIGTERM), or stay in a long
call. So a thread reads every signal from a pipe that the interpreter's own C handler writes to
(`signal.set_wakeup_fd`), whichever Python handler is installed, and ends the process if closing
takes longer than `GRACE`.
"""

from __future__ import annotations

import ctypes
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import psutil

T = TypeVar("T")

# Seconds for closing. `ray job stop` sends SIGKILL 3 s after SIGTERM.
GRACE: Mapping[int, float] = {signal.SIGINT: 5.0, signal.SIGTERM: 2.0}
INTERRUPTED = "interrupted: run the same command again to continue from the committed results"

# Clears the line of a progress bar and shows the cursor that it hid.
_RESET_TERMINAL = b"\r\x1b[K\x1b[?25h"

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>

_job: Job | None = None
# Processes that an interrupt kills before anything else.
_killed_first: list[int] = []
# Called once all children have ended, if the process ends before its `finally` blocks have run.
_clean_up: Callable[[], None] | None = None


class Terminated(KeyboardInterrupt):
    """SIGTERM. A KeyboardInterrupt, so that `except Exception` does not catch it."""


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """The exit code that a shell reports for this signal: 128 + its number."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def kill_first(processes: Collection[int]) -> None:
    """Kill these children first on an interrupt. A raylet that receives SIGTERM (which may be sent
    to the whole process group) tells its driver to exit, and Ray's core then exits at once."""
    _killed_first[:] = processes


def at_end(clean_up: Callable[[], None] | None) -> None:
    """Call `clean_up` if the job ends before its `finally` blocks have run."""
    global _clean_up
    _clean_up = clean_up


def received() -> bool:
    """Whether the job of this process has received a signal to end."""
    return _job is not None and _job.first is not None


def end_now(line: str, code: int) -> None:
    """Print `line` and end the job's process and its children, from any thread. Without a job, only
    print the line."""
    if _job is None:
        print(line, file=sys.stderr, flush=True)
    else:
        _job.end(line, code)


def announce() -> None:
    """Print once that the run was interrupted."""
    if _job is None:
        print(INTERRUPTED, file=sys.stderr, flush=True)
    else:
        _job.announce()


@contextmanager
def job() -> Iterator[Job]:
    """The running job of this process, or a new one."""
    if _job is not None:
        yield _job
    else:
        with Job() as new:
            yield new


class Job:
    """The signal handlers of a job's process, from `with` to `finish`.

    A signal that is ignored when the job starts stays ignored: a shell sets that for background
    processes.
    """

    def __init__(
        self, grace: Mapping[int, float] = GRACE, leave: Callable[[int], Any] = os._exit
    ) -> None:
        self.grace, self.leave = grace, leave
        # The first signal received.
        self.first: int | None = None
        self._ends: float | None = None
        self._closing = False
        self._announced = False
        self._lock = threading.RLock()
        self._forking = threading.local()
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def __enter__(self) -> Job:
        global _job
        import psutil  # loaded now, because importing may fail while the process ends

        del psutil
        # Standard error may be redirected by the time the last line is written.
        self._terminal = os.dup(2)
        self._signals, self._wakeup = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(self._wakeup, False)
        self._before = {
            number: signal.getsignal(number)
            for number in self.grace
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in self._before:
            signal.signal(number, self._interrupt)
        # A forked child must not write its own signals into this pipe.
        os.register_at_fork(
            before=self._block, after_in_parent=self._unblock, after_in_child=self._forget
        )
        _job = self
        threading.Thread(target=self._watch, daemon=True, name="signals").start()
        return self

    def __exit__(self, *error: object) -> None:
        """End an interrupted process, even if a library swallowed the interrupt; otherwise restore
        the previous handlers."""
        global _job
        self._ignore_signals()
        self._read()
        if self.first is not None:
            self.finish(self.code)
        _job = None
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._wakeup)

    @property
    def code(self) -> int:
        """The exit code of an interrupted job."""
        assert self.first is not None
        return 128 + self.first

    def announce(self, line: str = INTERRUPTED) -> None:
        """Print the job's last line once."""
        with self._lock:
            if not self._announced:
                self._announced = True
                with suppress(OSError):
                    os.write(self._terminal, line.encode() + b"\n")

    def finish(self, code: int) -> None:
        """End the process. An interrupted job always ends with the code of its signal: a library
        that swallowed the interrupt may have left work undone."""
        self._ignore_signals()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # a closed pipe
                stream.flush()
        self._read()
        if self.first is not None:
            self.announce()
            code = self.code
        end_children()
        self.leave(code)

    def _ignore_signals(self) -> None:
        """Keep any library's handler from raising while the process ends."""
        self._closing = True
        for number in self._before:
            signal.signal(number, _do_nothing)

    def end(self, line: str, code: int) -> None:
        """End the process from any thread, whatever the main thread is doing. An interrupted job
        ends with the code of its signal."""
        with self._lock:
            if not self._announced and os.isatty(self._terminal):
                with suppress(OSError):
                    os.write(self._terminal, _RESET_TERMINAL)
            self.announce(line)
            end_children()
            if _clean_up is not None:
                with suppress(Exception):
                    _clean_up()
            self.leave(code if self.first is None else self.code)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # The pipe keeps the order of arrival; Python calls handlers in the order of the numbers.
        self._read()
        self._note(number)
        if self._closing:
            return
        self._closing = True
        # Errors in other threads during shutdown are noise.
        sys.unraisablehook = threading.excepthook = _do_nothing
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def _watch(self) -> None:
        while True:
            left = None if self._ends is None else max(0.0, self._ends - time.monotonic())
            ready, _, _ = select.select([self._signals], [], [], left)
            if not ready:
                self.end(INTERRUPTED, self.code)
                return
            if not self._read():
                os.close(self._signals)
                return

    def _read(self) -> bool:
        """Record the signals that have arrived; returns False once the job is over."""
        with self._lock:
            try:
                arrived = os.read(self._signals, 512)
            except BlockingIOError:
                return True
            for number in arrived:
                if number in self._before:
                    self._note(number)
                    ends = time.monotonic() + self.grace[number]
                    self._ends = ends if self._ends is None else min(ends, self._ends)
            return bool(arrived)

    def _note(self, number: int) -> None:
        if self.first is None:
            self.first = number
            with suppress(OSError):
                os.write(self._wakeup, b"\0")  # wakes the thread, which had no time limit so far
            self._adopt_orphans()
            for process in _killed_first:
                with suppress(OSError):
                    os.kill(process, signal.SIGKILL)

    def _adopt_orphans(self) -> None:
        """Become the parent of the children of dying children, so that `end_children` finds
        them."""
        if self._libc is not None:
            self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def _block(self) -> None:
        if _job is self:
            self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._before)

    def _unblock(self) -> None:
        if _job is self:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def _forget(self) -> None:
        global _job
        if _job is self:
            _job = None
            signal.set_wakeup_fd(-1)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)


def _do_nothing(*_: object) -> None:
    return


def children(recursive: bool = True) -> frozenset[int]:
    """Ids of this process's children. recursive: all descendants."""
    return frozenset(process.pid for process in _descendants(recursive))


def _descendants(recursive: bool = True) -> list[psutil.Process]:
    import psutil

    with suppress(psutil.Error):
        return list(psutil.Process().children(recursive=recursive))
    return []


def end_children(spare: Collection[int] = ()) -> None:
    """SIGKILL all descendants of this process except `spare`: decoders, and the processes of a
    private Ray."""
    ends = time.monotonic() + 1.0
    while time.monotonic() < ends:
        # Repeated, because processes may start meanwhile or be inherited from a dying one.
        processes = [process for process in _descendants() if process.pid not in spare]
        if not any(map(_runs, processes)):
            return
        for process in processes:
            with suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    """Whether the process runs and is not a zombie."""
    import psutil

    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def silence() -> None:
    """Discard what libraries still write to standard error. The job's last line still appears."""
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


@contextmanager
def preserved_handlers() -> Iterator[None]:
    """Restore the handlers of SIGINT and SIGTERM afterwards: `ray.init` installs its own, in Python
    and in C++."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in GRACE}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def iterate_off_main_thread(items: Iterable[T]) -> Iterator[T]:
    """Iterate in a thread, so that an interrupt ends the wait for the next item at once. Ray Data,
    interrupted itself, would spend seconds on stopping its work."""
    arrived: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    abandoned = threading.Event()

    def run() -> None:
        try:
            for item in items:
                arrived.put((True, item))
                if abandoned.is_set():
                    return
            arrived.put((False, None))
        except BaseException as error:
            arrived.put((False, error))

    threading.Thread(target=run, daemon=True, name="ray").start()
    try:
        while True:
            more, item = arrived.get()
            if more:
                yield item
            elif item is not None:
                raise item
            else:
                return
    finally:
        abandoned.set()


def off_main_thread(call: Callable[[], T]) -> T:
    """Call in a thread and wait. In the main thread, Ray Train and Ray Tune install handlers of
    SIGINT: Train does not restore the previous one, and ends the process with 0."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="ray").start()
    return future.result()
