"""Kills a run, with its child processes, at a random moment."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

# Maximum number of lines before a kill. A run prints a few lines for each computed step.
_LINES = 12
# Marks the lines of steps that an earlier attempt has done.
_DONE = "  done: "
_MOST_SECONDS = 600


@dataclass
class Killed:
    """The end of a run. line: the last line before a kill. code: the exit code; None after a
    kill."""

    line: str
    code: int | None


def run_and_kill(command: Sequence[str], dice: random.Random) -> Killed:
    """Start a job, and SIGKILL its driver a random time after a random line about a computed
    step."""
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
        # Ray's agents take a minute to notice the loss of their driver, too late for the next run.
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
    """Run a job again and again until it is done, with at most `most` kills; returns the number of
    kills."""
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
