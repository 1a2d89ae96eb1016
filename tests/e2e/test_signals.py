"""SIGINT and SIGTERM to a job with a private Ray, in each of its steps: one line, exit code 130 or
143, and no process or folder is left; the same command then continues."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.core.interrupts import INTERRUPTED
from engine.runtime.scratch import PREFIX
from tests.jobs import finish, running
from tests.test_signals import SIGNALS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

# Only images.
IMAGES = {
    "generators": "{ddpm: {train_steps: 400, batch_size: 8}, traditional: {name: traditional}}",
    "request": "{ratio: 1, classes: all, shard_size: 8}",
    "classifier": "null",
}
# The comparison, with the second generator.
COMPARISON = {
    "generators": "{ddpm: null, traditional: {name: traditional}}",
    "request": "{ratio: 1, shard_size: 16}",
    "search": "{ratios: [1], seeds: 3, confirm_fits: 1}",
    "curate": "{filters: []}",
    "training.steps": "40",
}
# The prerequisites of a step, its study, and the process that shows it is running on Ray.
STEPS = {
    "ingest": ((), IMAGES, "MapWorker"),
    "embed": (("ingest",), IMAGES, "MapWorker"),
    "finetune.ddpm": (("request.ddpm",), IMAGES, "RayTrainWorker"),
    "generate.traditional": (("request.traditional",), IMAGES, "MapWorker"),
    "search": (
        ("mix.real", "mix.oversampled", "mix.traditional.x1"), COMPARISON, "ImplicitFunc"
    ),
    "confirm": (("search",), COMPARISON, "ImplicitFunc"),
}  # fmt: skip


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """A function that makes a storage in a folder, with every step but one done."""
    root = tmp_path_factory.mktemp("prepared")

    def make(step: str, folder: Path) -> Path:
        needs, sets, _ = STEPS[step]
        if not (root / step).exists():
            (root / step).mkdir()
            for label in needs:
                inline = {**sets, "profile.runtime": "inline"}
                finish("run_study", root / step, "--until", label, **inline)
        return shutil.copytree(root / step, folder / "storage")

    return make


Prepare = Callable[[str, Path], Path]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A separate temporary folder for the job, because other runs on this machine have theirs."""
    # Short, because Ray creates sockets in it.
    with tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp") as folder:
        yield Path(folder)


def folders(temporary: Path) -> list[Path]:
    return list(temporary.glob(f"{PREFIX}*"))


@pytest.mark.parametrize(("number", "code", "times"), SIGNALS)
@pytest.mark.parametrize("step", STEPS)
def test_interrupt_in_every_step_ends_in_one_line(
    prepare: Prepare, tmp_path: Path, temporary: Path, step: str, number: int, code: int, times: int
) -> None:
    _, sets, process = STEPS[step]
    storage = prepare(step, tmp_path)
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with running("run_study", storage, "--until", step, environment=environment, **sets) as job:
        job.wait_for(f"{step} ")
        job.wait_for_process(process)
        # To the job only, or to its group like Ctrl-C.
        group = times == 2 and number == signal.SIGINT
        returned, rest = job.interrupt(number, times, group=group)
    assert returned == code, rest
    assert rest.splitlines()[-1] == INTERRUPTED
    assert rest.count("interrupted") == 1
    assert "Traceback" not in rest
    assert "raylet" not in rest
    assert not list(storage.glob(f"steps/{step.partition('.')[0]}/*/manifest.json"))
    assert folders(temporary) == []


@pytest.mark.parametrize(("number", "code", "times"), SIGNALS)
def test_interrupt_in_a_step_after_a_training(
    prepare: Prepare, tmp_path: Path, number: int, code: int, times: int
) -> None:
    """Ray Train used to leave a handler behind that ignored two interrupts."""
    short = "{ddpm: {train_steps: 2, batch_size: 8}, traditional: {name: traditional}}"
    storage = prepare("embed", tmp_path)
    sets = {**IMAGES, "generators": short}
    with running("run_study", storage, "--until", "generate.ddpm", **sets) as job:
        job.wait_for("generate.ddpm ")
        job.wait_for_process("MapWorker")
        returned, rest = job.interrupt(number, times)
    assert (returned, rest.splitlines()[-1]) == (code, INTERRUPTED)
    assert not list(storage.glob("steps/generate/*/manifest.json"))


@pytest.mark.parametrize(("number", "code", "times"), SIGNALS)
def test_interrupt_while_ray_starts(
    tmp_path: Path, temporary: Path, number: int, code: int, times: int
) -> None:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with running("run_study", tmp_path, environment=environment, **IMAGES) as job:
        job.wait_for_process("gcs_server")
        returned, rest = job.interrupt(number, times)
    assert (returned, rest.splitlines()[-1]) == (code, INTERRUPTED)
    assert "Traceback" not in rest
    assert folders(temporary) == []


def test_interrupted_run_continues(prepare: Prepare, tmp_path: Path) -> None:
    step = "generate.traditional"
    storage = prepare(step, tmp_path)
    with running("run_study", storage, "--until", step, **IMAGES) as job:
        job.wait_for_process("MapWorker")
        assert job.interrupt(signal.SIGINT, 1)[0] == 130
    assert "done in" in finish("run_study", storage, "--until", step, **IMAGES)
