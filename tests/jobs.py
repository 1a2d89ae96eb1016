"""Jobs of `jobs/` for tests that interrupt them: processes with their own storage."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Job:
    """A running job: its process and the lines that it has printed so far."""

    process: subprocess.Popen[str]
    lines: list[str]

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return
        raise AssertionError(f"{text!r} never came:\n{''.join(self.lines)}")

    def wait_for_process(self, name: str) -> None:
        """Wait until one of its processes has `name` in its command line."""
        ends = time.monotonic() + 400
        while True:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < ends, f"no process {name!r} came"
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if name in " ".join(process.cmdline()):
                        return
            time.sleep(0.05)

    def interrupt(self, number: int, times: int, group: bool = False) -> tuple[int, str]:
        """Its exit code and its remaining lines; checks that none of its processes is left."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        for _ in range(times):
            if group:
                os.killpg(self.process.pid, number)  # as Ctrl-C does
            else:
                self.process.send_signal(number)
            time.sleep(0.05)
        rest, _ = self.process.communicate(timeout=60)
        time.sleep(0.5)
        left = [text for process in family if (text := _command_line(process))]
        assert not left, left
        return self.process.returncode, rest


def _command_line(process: psutil.Process) -> str:
    """The child processes of a running process; empty if it has ended."""
    with suppress(psutil.Error):
        if process.status() != psutil.STATUS_ZOMBIE:
            return " ".join(process.cmdline()) or process.name()
    return ""


def command(job: str, storage: Path, *more: str, **sets: str) -> list[str]:
    """A job on the digits study, with settings overridden."""
    values = {"profile.storage": str(storage), "profile.mlflow": "none", **sets}
    pairs = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, f"jobs/{job}.py", "configs/digits.yaml", *pairs, *more]


@contextmanager
def running(
    job: str, storage: Path, *more: str, environment: dict[str, str] | None = None, **sets: str
) -> Iterator[Job]:
    """A started job with the lines of both streams; killed if the test leaves it running."""
    process = subprocess.Popen(
        command(job, storage, *more, **sets), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, env=environment,
    )  # fmt: skip
    try:
        yield Job(process, [])
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def finish(job: str, storage: Path, *more: str, **sets: str) -> str:
    """Run a job to its end; returns its lines."""
    done = subprocess.run(
        command(job, storage, *more, **sets), cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stderr
