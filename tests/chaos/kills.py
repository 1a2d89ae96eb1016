"""A run that is killed at a random moment: of its process family, no more than is its own."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

# A run prints a few lines at each step that it computes: after how many of them a kill comes, at
# most.
_LINES = 12
# What it prints of steps that an attempt before it has done.
_DONE = "  done: "
_MOST_SECONDS = 600


@dataclass
class Killed:
    """How a run ended: after which line, or by itself with an exit code."""

    line: str
    code: int | None


def run_and_kill(command: Sequence[str], dice: random.Random) -> Killed:
    """Start a job, and SIGKILL its driver a random while after a random one of the lines that are
    about what it computes.

    code: None where it was killed, else what it ended with before that."""
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wanted, lines = dice.randint(1, _LINES), []
    reached, ended = threading.Event(), threading.Event()

    def read() -> None:
        assert driver.stdout is not None
        for line in driver.stdout:
            if _DONE not in line:
                lines.append(line.rstrip())
            if len(lines) >= wanted:
                reached.set()
        ended.set()
        reached.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert reached.wait(_MOST_SECONDS), "\n".join(lines)
    ended.wait(dice.random())
    code = driver.poll()
    if code is None and not ended.is_set():
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
        # Ray's agents take a minute to notice that their driver is gone: the next run needs the
        # machine before that.
        for process in family:
            if process.is_running():
                process.kill()
        psutil.wait_procs(family, timeout=30)
    else:
        code = driver.wait(_MOST_SECONDS)
    reader.join(10)
    if code:
        raise AssertionError("\n".join(lines[-30:]))
    return Killed(lines[min(wanted, len(lines)) - 1] if lines else "", code)


def kill_until_done(command: Sequence[str], dice: random.Random, most: int) -> int:
    """Run a job again and again, killing it at most so often, until it is done; returns how often
    it was killed."""
    kills = 0
    while kills < most:
        started = time.monotonic()
        ended = run_and_kill(command, dice)
        if ended.code == 0:
            return kills
        kills += 1
        print(f"kill {kills} after {time.monotonic() - started:.1f} s at: {ended.line[:100]}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return kills
