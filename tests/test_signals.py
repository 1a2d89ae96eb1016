"""SIGINT and SIGTERM to a job without Ray: one line, 130 or 143, no process left."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from engine.core.interrupts import INTERRUPTED
from tests.jobs import running

SIGNALS = [
    pytest.param(number, code, times, id=f"{number.name}-{times}")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143))
    for times in (1, 2)
]

INLINE = {
    "profile.runtime": "inline",
    "generators": "{ddpm: null, traditional: {name: traditional}}",
    "request": "{ratio: null, classes: all, per_class: 2000, shard_size: 32}",
    "classifier": "null",
    "split": "{group: none, train_limit: null}",
}


@pytest.mark.parametrize(("number", "code", "times"), SIGNALS)
def test_job_without_ray_ends_in_one_line(
    tmp_path: Path, number: int, code: int, times: int
) -> None:
    # SIGINT while files are decoded in a child process, SIGTERM in the next step.
    text = "ingest  " if number == signal.SIGINT else "embed  "
    with running("generate", tmp_path, **INLINE) as job:
        job.wait_for(text)
        returned, rest = job.interrupt(number, times, group=True)
    assert returned == code
    assert rest.splitlines()[-1] == INTERRUPTED
    assert rest.count("interrupted") == 1
    assert "Traceback" not in rest
    assert not list(tmp_path.glob("steps/generate/*/manifest.json"))


def test_signal_during_imports_is_one_line(tmp_path: Path) -> None:
    with running("run_study", tmp_path, **INLINE) as job:
        python = psutil.Process(job.process.pid)
        # The job's first heavy import comes after its handlers are installed.
        while not any("pyarrow" in found.path for found in python.memory_maps()):
            time.sleep(0.01)
        assert job.interrupt(signal.SIGINT, 1) == (130, f"{INTERRUPTED}\n")
