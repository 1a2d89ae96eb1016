"""Starting Ray and rejecting work, with a fake Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core.errors import EngineError, StudyError
from engine.runtime.cluster import RayRuntime, refuse_too_large
from engine.work.resources import FitResources, StageResources, TrialResources

SLOW = (
    "The current node timed out during startup. This could happen because some of the raylet"
    " failed to startup or the GCS has become overloaded."
)


class FakeInit:
    """A `ray.init` that fails with each error in turn, then succeeds. As Ray's, it leaves processes
    behind when it fails, and always installs signal handlers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.folders: list[Path] = []
        self.children: list[subprocess.Popen[bytes]] = []

    def __call__(self, **options: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        self.folders.append(Path(os.environ["RAY_TMPDIR"]))
        self.home = os.environ["HOME"]
        if self.errors:
            self.children.append(subprocess.Popen(["sleep", "1000"]))
            raise self.errors.pop(0)


Starts = Callable[..., tuple[FakeInit, RayRuntime, list[str]]]


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Starts:
    """A function that returns a private Ray whose start fails with the given errors."""

    def make(*errors: Exception) -> tuple[FakeInit, RayRuntime, list[str]]:
        import ray

        init, lines = FakeInit(*errors), []
        for name, value in os.environ.items():
            monkeypatch.setenv(name, value)  # restored afterwards
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr("engine.runtime.scratch.SOCKET_PATH", 1000)
        monkeypatch.setattr(ray, "init", init)
        return init, RayRuntime("local", 1, warn=lines.append), lines

    return make


def test_slow_raylet_is_started_again(starts: Starts, tmp_path: Path) -> None:
    init, runtime, lines = starts(Exception(SLOW), Exception(SLOW))
    before = signal.getsignal(signal.SIGTERM)
    runtime._start_local()
    assert len(set(init.folders)) == 3
    assert list(tmp_path.iterdir()) == init.folders[-1:]
    assert lines == ["Ray took too long to start on this machine; starting it again"] * 2
    assert [child.wait(timeout=10) for child in init.children] == [-signal.SIGKILL] * 2
    assert signal.getsignal(signal.SIGTERM) is before
    runtime.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("errors", "tries"), [([Exception(SLOW)] * 3, 3), ([OSError("no space left on device")], 1)]
)
def test_ray_start_failure_is_one_line(
    starts: Starts, tmp_path: Path, errors: list[Exception], tries: int
) -> None:
    init, runtime, _ = starts(*errors)
    with pytest.raises(EngineError, match=r"^Ray did not start on this machine \(") as error:
        runtime._start_local()
    assert "\n" not in str(error.value)
    assert len(init.folders) == tries
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("resources", "what", "text"),
    [
        (
            StageResources(gpus=1),
            "stages.embed",
            r"stages\.embed\.gpus: 1 requested, this Ray has 0; r",
        ),
        (
            StageResources(cpus=3, actors=9),
            "stages.embed",
            r"stages\.embed\.cpus: 3 requested, this Ray has 2",
        ),
        (FitResources(cpus=1, workers=3), "fit", r"fit\.cpus: 1 for each of 3 workers requested"),
        (TrialResources(gpus=0.5), "trial", r"trial\.gpus: 0\.5 requested, this Ray has 0"),
    ],
)
def test_unplaceable_actors_are_rejected(resources: Any, what: str, text: str) -> None:
    with pytest.raises(StudyError, match=f"^profile: {text}"):
        refuse_too_large(resources, {"CPU": 2.0}, what)


def test_actors_are_accepted_if_one_fits() -> None:
    refuse_too_large(StageResources(cpus=2, actors=9), {"CPU": 2.0}, "stages")
