"""Signals of a job, in separate processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engine.core.interrupts import (
    INTERRUPTED,
    Terminated,
    end_now,
    exit_code,
    iterate_off_main_thread,
    off_main_thread,
    preserved_handlers,
    received,
)

ROOT = Path(__file__).parents[2]
BEGIN = """
import os, signal, subprocess, sys, time
from engine.core import interrupts
from engine.core.interrupts import Job

def ready(*more):
    print("ready", *more, flush=True)

short = {signal.SIGINT: 0.5, signal.SIGTERM: 0.5}
"""


def start(script: str) -> tuple[subprocess.Popen[str], list[str]]:
    """A process that runs `script`, and the words after `ready` in its first line."""
    code = BEGIN + textwrap.dedent(script)
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    first = process.stdout.readline().split()
    assert first[:1] == ["ready"], process.communicate()
    return process, first[1:]


def ends(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, error = process.communicate(timeout=60)
    return process.returncode, error


WORKS = """
with Job() as job:
    try:
        ready()
        time.sleep(100)
    except KeyboardInterrupt:
        interrupts.announce()
        job.finish(0)
"""
SWALLOWS = """
with Job(grace=short) as job:
    try:
        ready()
        time.sleep(100)
    except BaseException:
        time.sleep(100)
    job.finish(0)
"""
REPLACES = """
with Job(grace=short) as job:
    for number in short:
        signal.signal(number, lambda *_: None)
    ready()
    for _ in range(1000):
        time.sleep(0.1)
    job.finish(0)
"""
EXITS = """
def handler(*_):
    sys.exit(0)

with Job() as job:
    for number in short:
        signal.signal(number, handler)
    ready()
    time.sleep(100)
"""
COMPLETES = """
with Job() as job:
    try:
        ready()
        time.sleep(100)
    except KeyboardInterrupt:
        pass
    job.finish(0)
"""
SCRIPTS = {
    "works": WORKS, "swallows": SWALLOWS, "replaces": REPLACES, "exits": EXITS,
    "completes": COMPLETES,
}  # fmt: skip


@pytest.mark.parametrize(
    ("number", "code", "times"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2)]
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_interrupted_job_ends_in_one_line_whatever_a_library_does(
    script: str, number: int, code: int, times: int
) -> None:
    process, _ = start(SCRIPTS[script])
    for _ in range(times):
        process.send_signal(number)
    assert ends(process) == (code, f"{INTERRUPTED}\n")


def pending(pid: int) -> bool:
    """Whether a process has a signal that it has not received yet."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return any(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd"))


def test_first_signal_decides_the_exit_code() -> None:
    process, _ = start(SWALLOWS)
    process.send_signal(signal.SIGTERM)
    # Of two pending signals Linux delivers the one with the lower number first.
    while pending(process.pid):
        threading.Event().wait(0.01)
    # The thread that reads signals is woken by each.
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        threading.Event().wait(0.1)
    assert ends(process)[0] == 143


@pytest.mark.parametrize("script", [
    """
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    with Job() as job:
        ready(child.pid)
        time.sleep(100)
    """,
    """
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    with Job(grace=short) as job:
        signal.signal(signal.SIGTERM, lambda *_: None)
        ready(child.pid)
        for _ in range(1000):
            time.sleep(0.1)
    """,
])  # fmt: skip
def test_no_child_process_is_left(script: str) -> None:
    process, (child,) = start(script)
    running = psutil.Process(int(child))
    process.send_signal(signal.SIGTERM)
    assert ends(process)[0] == 143
    assert not running.is_running() or running.status() == psutil.STATUS_ZOMBIE


def test_cleanup_runs_if_closing_takes_too_long(tmp_path: Path) -> None:
    remains = tmp_path / "remains"
    remains.touch()
    process, _ = start(f"""
        interrupts.at_end(lambda: os.unlink({str(remains)!r}))
        with Job(grace=short) as job:
            signal.signal(signal.SIGTERM, lambda *_: None)
            ready()
            for _ in range(1000):
                time.sleep(0.1)
    """)
    process.send_signal(signal.SIGTERM)
    assert ends(process)[0] == 143
    assert not remains.exists()


def test_grandchildren_of_a_killed_child_are_killed() -> None:
    """A raylet is killed first, and its workers are no longer children of the driver."""
    process, (grandchild,) = start("""
        child = subprocess.Popen(
            ["sh", "-c", "setsid sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True
        )
        interrupts.kill_first([child.pid])
        with Job() as job:
            ready(child.stdout.readline())
            time.sleep(100)
    """)
    running = psutil.Process(int(grandchild))
    process.send_signal(signal.SIGTERM)
    assert ends(process)[0] == 143
    assert not running.is_running() or running.status() == psutil.STATUS_ZOMBIE


def test_forked_child_handles_its_own_signals() -> None:
    process, _ = start("""
        with Job(grace=short) as job:
            child = os.fork()
            if not child:
                time.sleep(100)
            os.kill(child, signal.SIGTERM)
            _, status = os.waitpid(child, 0)
            ready()
            time.sleep(1.5)
            job.finish(os.WTERMSIG(status))
    """)
    assert ends(process) == (signal.SIGTERM, "")


def test_ignored_signal_stays_ignored() -> None:
    process, _ = start("""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Job() as job:
            ready()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            job.finish(7)
    """)
    assert ends(process) == (7, "")


def test_any_thread_can_end_a_job() -> None:
    process, _ = start("""
        import threading
        with Job() as job:
            ready()
            threading.Timer(0.1, interrupts.end_now, ("gone", 1)).start()
            time.sleep(100)
    """)
    assert ends(process) == (1, "gone\n")


def test_job_ended_by_another_thread_keeps_its_exit_code() -> None:
    process, _ = start("""
        with Job() as job:
            try:
                ready()
                time.sleep(100)
            except KeyboardInterrupt:
                interrupts.end_now("gone", 1)
    """)
    process.send_signal(signal.SIGINT)
    assert ends(process) == (130, "gone\n")


def test_outside_a_job_a_signal_only_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    end_now("gone", 1)
    assert capsys.readouterr().err == "gone\n"
    assert not received()


def test_exit_codes_follow_the_shell() -> None:
    assert exit_code(KeyboardInterrupt()) == 130
    assert exit_code(Terminated()) == 143


def test_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with preserved_handlers():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is before


def test_handlers_cannot_be_installed_off_the_main_thread() -> None:
    with pytest.raises(ValueError, match="main thread"):
        off_main_thread(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert off_main_thread(lambda: threading.current_thread() is threading.main_thread()) is False


def test_items_and_errors_come_from_another_thread() -> None:
    def items() -> Iterator[bool]:
        yield threading.current_thread() is threading.main_thread()
        yield True
        raise LookupError("no more")

    results = iterate_off_main_thread(items())
    assert (next(results), next(results)) == (False, True)
    with pytest.raises(LookupError, match="no more"):
        next(results)
    assert list(iterate_off_main_thread([1, 2, 3])) == [1, 2, 3]


def test_unconsumed_items_are_not_produced() -> None:
    go_on, ended = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        try:
            yield 1
            go_on.wait(timeout=60)
            yield 2
            yield 3
        finally:
            ended.set()

    results = iterate_off_main_thread(items())
    assert next(results) == 1
    results.close()
    go_on.set()
    assert ended.wait(timeout=60)


def test_waiting_for_another_thread_can_be_interrupted() -> None:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        off_main_thread(threading.Event().wait)
