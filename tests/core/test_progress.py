from __future__ import annotations

import io
import threading

import pytest

from engine.core.progress import Bar, heartbeat


class Lines(io.StringIO):
    """A log that can be waited on."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Semaphore(0)

    def write(self, text: str) -> int:
        count = super().write(text)
        if text.endswith("\n"):
            self.written.release()
        return count


def test_line_shows_progress() -> None:
    log = Lines()
    with Bar("embed", 40, "images", done=10, stream=log, interval=0) as bar:
        bar.advance(10)
        bar.advance(10, "quarantined: 1 blank")
    first, line = log.getvalue().splitlines()
    assert first == "  embed: 20 of 40 images"
    assert line.startswith("  embed: 30 of 40 images · ")
    assert line.endswith(" left · quarantined: 1 blank")


def test_rate_leaves_out_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("engine.core.progress.time.monotonic", lambda: clock[0])
    bar = Bar("generate", 100, "images", stream=io.StringIO())
    # A model loads for 90 s, then 10 images take 10 s each time.
    for seconds, count in ((100, 10), (110, 10), (120, 10)):
        clock[0] = seconds
        bar.advance(count)
    assert bar.rate() == 1.0
    assert "1:10 left" in bar.line()
    clock[0] = 190
    bar.advance(70)
    assert bar.rate() == 100 / 190


def test_silence_without_a_bar_is_ended_by_a_line() -> None:
    log = Lines()
    with heartbeat("evaluate", every=0.05, stream=log):
        assert log.written.acquire(timeout=60)
    assert log.getvalue().startswith("  evaluate: computing for 0 s")


def test_a_bar_speaks_for_itself() -> None:
    log = Lines()
    with heartbeat("embed", every=0.05, stream=log), Bar("embed", 9, "images", stream=log):
        assert not log.written.acquire(timeout=0.5)


def test_stalled_work_is_reported_repeatedly() -> None:
    log = Lines()
    with Bar("embed", 40, "images", done=10, stream=log, interval=1e9, quiet=0.05) as bar:
        for _ in range(2):
            assert log.written.acquire(timeout=60)
            bar.advance(0)
    first, second = log.getvalue().splitlines()[:2]
    assert first.startswith("  embed: no progress for 0 s; 10 of 40 images")
    assert second.startswith("  embed: no progress for ")


def test_new_progress_resets_the_stall_timer() -> None:
    bar = Bar("embed", 40, "images", stream=io.StringIO(), interval=1e9, quiet=5.0)
    bar.silence = 20.0
    bar.advance(0, "")
    assert bar.silence == 20.0
    before = bar.news
    bar.advance(0, "loss 0.5")
    assert (bar.silence, bar.news >= before) == (5.0, True)
    bar.silence = 20.0
    bar.advance(0, "loss 0.5")
    assert bar.silence == 20.0
    bar.advance(1, "loss 0.5")
    assert bar.silence == 5.0


def test_bar_reports_work_that_has_not_started_and_earlier_progress() -> None:
    log = Lines()
    with Bar("fit", None, "steps", stream=log, interval=1e9, quiet=0.05) as bar:
        assert log.written.acquire(timeout=60)
        bar.begin(40, 10)
    assert log.getvalue().splitlines()[0] == "  fit: no progress for 0 s; not started yet"
    assert (bar.rate(), bar.silence) == (0, 0.05)
    assert bar.line() == "fit: 10 of 40 steps"


def test_finished_bar_is_silent() -> None:
    log = Lines()
    with Bar("embed", 40, "images", stream=log, interval=1e9, quiet=0.2):
        pass
    assert not log.written.acquire(timeout=0.5)
