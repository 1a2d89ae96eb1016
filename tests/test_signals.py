"""SIGINT and SIGTERM to a job without Ray: one line, 130 or 143, no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from engine.core.interrupts import INTERRUPTED

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = [
    pytest.param(number, code, times, id=f"{number.name}-{times}")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143))
    for times in (1, 2)
]


@dataclass
class Job:
    """A running job: its process and the lines that it has printed so far."""

    process: subprocess.Popen[str]
    lines: list[str]

    def wait_for(self, text: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if text in line:
                return
        raise AssertionError(f"{text!r} never came:\n{''.join(self.lines)}")

    def interrupt(self, number: int, times: int, group: bool = False) -> tuple[int, str]:
        """Its exit code and the rest of its lines; no process of its own is left."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        for _ in range(times):
            if group:
                os.killpg(self.process.pid, number)  # as Ctrl-C does
            else:
                self.process.send_signal(number)
            time.sleep(0.05)
        _, rest = self.process.communicate(timeout=60)
        _, left = psutil.wait_procs(family, timeout=0.5)
        assert [process.cmdline() for process in left] == []
        return self.process.returncode, rest


Start = Callable[..., Job]


@pytest.fixture
def start() -> Iterator[Start]:
    """A function that starts a job of `jobs/` on the digits, with settings laid over."""
    started: list[subprocess.Popen[str]] = []

    def run(job: str, storage: Path, **sets: str) -> Job:
        values = {"profile.storage": str(storage), "profile.mlflow": "none", **sets}
        pairs = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
        started.append(
            subprocess.Popen(
                [sys.executable, f"jobs/{job}.py", "configs/digits.yaml", *pairs],
                cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        )  # fmt: skip
        return Job(started[-1], [])

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


INLINE = {
    "profile.runtime": "inline",
    "generators": "{ddpm: null, traditional: {name: traditional}}",
    "request": "{ratio: null, classes: all, per_class: 2000, shard_size: 32}",
    "classifier": "null",
    "split": "{group: none, train_limit: null}",
}


@pytest.mark.parametrize(("number", "code", "times"), SIGNALS)
def test_a_job_without_ray_ends_in_one_line(
    start: Start, tmp_path: Path, number: int, code: int, times: int
) -> None:
    # SIGINT while files are decoded in a child process, SIGTERM in the next step.
    text = "ingest  " if number == signal.SIGINT else "embed  "
    job = start("generate", tmp_path, **INLINE)
    job.wait_for(text)
    returned, rest = job.interrupt(number, times, group=True)
    assert returned == code
    assert rest.splitlines()[-1] == INTERRUPTED
    assert rest.count("interrupted") == 1
    assert "Traceback" not in rest
    assert not list(tmp_path.glob("steps/generate/*/manifest.json"))


def test_a_signal_while_modules_are_imported_is_one_line_too(start: Start, tmp_path: Path) -> None:
    job = start("run_study", tmp_path, **INLINE)
    python = psutil.Process(job.process.pid)
    # The job's first import of weight is loaded once its handlers are there.
    while not any("pyarrow" in found.path for found in python.memory_maps()):
        time.sleep(0.01)
    assert job.interrupt(signal.SIGINT, 1) == (130, f"{INTERRUPTED}\n")
