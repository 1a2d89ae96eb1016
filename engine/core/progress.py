"""Progress of long work: units done of the total, rate, time left.

On a terminal a live bar (rich); elsewhere a plain line at most every `interval` seconds, so that
log files stay readable. A long silence is reported too.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Bar:
    """The progress of one piece of work, counted by `advance`.

    done: units that were done before the start; they do not count towards the rate. total: None
    until `begin` sets it. quiet: seconds without progress after which a line reports the silence,
    and again each time that it has doubled.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        interval: float = 10.0,
        quiet: float = 30.0,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.initial, self.interval = done, done, interval
        # Time and count at the first news: before it, workers start and models load.
        self._first: tuple[float, int] | None = None
        self.note = ""
        self.stream = stream or sys.stderr
        self.started = self.printed = self.news = time.monotonic()
        self.quiet = self.silence = quiet
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.live: Progress | None = None
        if self.stream.isatty():
            self.live = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]} · {task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(file=self.stream),
                transient=True,
            )
            self.task = self.live.add_task(
                label, total=total, completed=done, unit=unit, rate="", note=""
            )

    def rate(self) -> float:
        """Units per second in this run, without the start; 0 until two reports have come. When all
        is done, with the start."""
        now = time.monotonic()
        if self.done == self.total or self._first is None:
            return (self.done - self.initial) / max(now - self.started, 1e-9)
        since, count = self._first
        return (self.done - count) / max(now - since, 1e-9)

    def line(self) -> str:
        """The state in one line."""
        if self.total is None:
            return f"{self.label}: not started yet"
        rate, left = self.rate(), self.total - self.done
        text = f"{self.label}: {self.done:,} of {self.total:,} {self.unit}"
        if rate > 0:
            text += (
                f" · {rate:,.1f}/s · {_clock(left / rate)} left" if left else f" · {rate:,.1f}/s"
            )
        return f"{text} · {self.note}" if self.note else text

    def begin(self, total: int, done: int) -> None:
        """Start the work, with `done` of `total` done already."""
        with self._lock:
            self.total, self.done, self.initial, self._first = total, done, done, None
            self.started = self.news = time.monotonic()
            self.silence = self.quiet
            if self.live is not None:
                self.live.update(self.task, total=total, completed=done)

    def advance(self, count: int, note: str = "") -> None:
        """Count `count` more units as done and show `note` with the bar."""
        with self._lock:
            if count or (note and note != self.note):
                self.news, self.silence = time.monotonic(), self.quiet
            self.done += count
            if count and self._first is None:
                self._first = (time.monotonic(), self.done)
            self.note = note or self.note
            self._show()

    def _show(self) -> None:
        if self.live is not None:
            self.live.update(
                self.task, completed=self.done, rate=f"{self.rate():,.1f}/s", note=self.note
            )
            return
        now = time.monotonic()
        if now - self.printed >= self.interval:
            self.printed = now
            print(f"  {self.line()}", file=self.stream, flush=True)

    def _remind(self) -> None:
        """Print a line after each long silence, until the work ends."""
        while not self._ended.wait(max(0.0, self.news + self.silence - time.monotonic())):
            with self._lock:
                silent = time.monotonic() - self.news
                if silent < self.silence or self._ended.is_set():
                    continue
                self.silence *= 2
                state = "not started yet"
                if self.total is not None:
                    state = f"{self.done:,} of {self.total:,} {self.unit}"
                line = f"  {self.label}: no progress for {silent:.0f} s; {state}"
                if self.live is not None:
                    self.live.console.print(line, markup=False, highlight=False)
                else:
                    print(line, file=self.stream, flush=True)

    def __enter__(self) -> Bar:
        _spoken.bars += 1
        if self.live is not None:
            self.live.start()
        threading.Thread(target=self._remind, daemon=True, name="reminder").start()
        return self

    def __exit__(self, *error: object) -> None:
        _spoken.bars -= 1
        _spoken.now()
        self._ended.set()
        if self.live is not None:
            self.live.stop()


def say(text: str, **options: Any) -> None:
    """Print one line about the run (on stderr; results go to stdout)."""
    _spoken.now()
    print(text, file=options.get("stream") or sys.stderr, flush=True)


class _Spoken:
    """When this process last printed, and how many bars are open."""

    def __init__(self) -> None:
        self.at, self.bars = time.monotonic(), 0

    def now(self) -> None:
        self.at = time.monotonic()


_spoken = _Spoken()


@contextmanager
def heartbeat(label: str, every: float = 30.0, stream: TextIO | None = None) -> Iterator[None]:
    """Print a line whenever nothing was printed for `every` seconds and no bar is open."""
    started, ended = time.monotonic(), threading.Event()

    def beat() -> None:
        while not ended.wait(max(0.05, _spoken.at + every - time.monotonic())):
            if _spoken.bars:
                _spoken.now()
            elif time.monotonic() - _spoken.at >= every:
                say(f"  {label}: computing for {time.monotonic() - started:.0f} s", stream=stream)

    _spoken.now()
    threading.Thread(target=beat, daemon=True, name="heartbeat").start()
    try:
        yield
    finally:
        ended.set()
