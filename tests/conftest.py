"""Shared by all tests: toy images, a profile without Ray, running a study."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image

from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.data.sandbox import Sandbox
from engine.execute import execute
from engine.metrics import confounding
from engine.plan import plan, until
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.study import Study, validate

Classes = Mapping[str, int]
# The package has a function of the same name.
PLANES = import_module("engine.report.sections.embedding")

# Slow examples on a busy machine are not a fault of the code.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")


def toy_picture(number: int, side: int = 24) -> Image.Image:
    """A smooth image unlike any other: coarse noise, enlarged."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell's background processes ignore SIGINT, and so would the jobs of tests."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Idle decoding processes by their settings, the one that was used last at the end.
IDLE: dict[str, subprocess.Popen[bytes]] = {}


@pytest.fixture(autouse=True)
def warm_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding process serves the tests one after the other: starting one takes a second. A
    module whose tests are about these processes overrides this."""
    exchange, kill = Sandbox._exchange, Sandbox.close

    def exchange_warm(self: Any, header: Any, body: bytes) -> Any:
        if self._child is None:
            idle = IDLE.pop(json.dumps(self.settings), None)
            # The garbage collector closes the pipes of what it finds in a cycle.
            if idle is not None and idle.stdin is not None and not idle.stdin.closed:
                self._child = idle
        self.in_exchange = True
        reply = exchange(self, header, body)
        self.in_exchange = False
        return reply

    def keep(self: Any) -> None:
        key = json.dumps(self.settings)
        healthy = self._child is not None and self._child.poll() is None and not self.in_exchange
        if not healthy or key in IDLE:
            kill(self)
            return
        IDLE[key], self._child = self._child, None
        if len(IDLE) > 4:
            oldest = IDLE.pop(next(iter(IDLE)))
            oldest.kill()
            oldest.wait()

    monkeypatch.setattr(Sandbox, "_exchange", exchange_warm)
    monkeypatch.setattr(Sandbox, "close", keep)


@pytest.fixture(scope="session", autouse=True)
def cheap_extras() -> Iterator[None]:
    """The plane of UMAP is for slow tests, because compiling it takes each process half a minute;
    and most tests that read images are about something else than confounders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PLANES, "find_spec", lambda name: None)
        patch.setattr(confounding, "_TREES", 20)
        yield


@pytest.fixture(autouse=True)
def umap_in_slow_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("slow"):
        monkeypatch.setattr(PLANES, "find_spec", find_spec)


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes `count` images of each class; returns the folder of the classes."""
    written = 0

    def write(classes: Classes, below: str = "data", side: int = 24) -> Path:
        nonlocal written
        root = tmp_path / below
        for name, count in classes.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                toy_picture(written, side).save(root / name / f"{number:03d}.png")
                written += 1
        return root

    return write


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return Profile(storage=str(tmp_path / "runs"), runtime="inline")


@pytest.fixture
def store(profile: Profile) -> Store:
    return Store(profile.storage)


def toy_values(reader: Mapping[str, Any] | Path, **fields: Any) -> dict[str, Any]:
    if isinstance(reader, Path):
        reader = {"name": "imagefolder", "root": str(reader)}
    return {
        "name": "toy", "seed": 3, "reader": dict(reader), "preprocess": {"size": 16},
        "split": {"group": "none"}, **fields,
    }  # fmt: skip


@pytest.fixture
def toy_study() -> Callable[..., Study]:
    """A function that makes a study of small images; the given fields override its own."""

    def make(reader: Mapping[str, Any] | Path, **fields: Any) -> Study:
        return validate(Study, toy_values(reader, **fields), "toy study")

    return make


@pytest.fixture
def run_until(profile: Profile, store: Store) -> Callable[[Study, str], Manifest]:
    """A function that runs a study up to a step, in this process; returns its manifest."""

    def run(study: Study, last: str) -> Manifest:
        steps = until(plan(study), last)
        return execute(steps, store, InlineRuntime(), profile)[steps[-1].key]

    return run


BARS = {"across": 0, "down": 1}


def bar(kind: str, seed: int, contrast: int = 120) -> Image.Image:
    """A bright horizontal or vertical bar on noise, somewhere in 16 px."""
    random = np.random.default_rng([seed, BARS[kind]])
    pixels = random.integers(0, 100, (16, 16), dtype=np.uint8)
    place = int(random.integers(1, 13))
    pixels[place : place + 3] += np.uint8(contrast)
    return Image.fromarray(pixels if kind == "across" else pixels.T)


def write_bars(
    folder: Path, counts: dict[str, int], first: int, shown: dict[str, str] | None = None
) -> None:
    """`counts` images of each class; `shown` maps a class to what is drawn instead."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture = bar((shown or {}).get(name, name), first + number)
            picture.save(folder / name / f"{number:04d}.png")


def write_bars_data(root: Path) -> None:
    write_bars(root / "real", {"across": 100, "down": 30}, 0)
    write_bars(root / "good", {"down": 60}, 5000)


def bars_values(root: Path, folder: str = "good", **fields: Any) -> dict[str, Any]:
    """The fields of a study of bars; the right answer is the direction of the bar."""
    reader = {"name": "imagefolder", "root": str(root / folder)}
    values = {
        "preprocess": {"size": 16, "channels": "L"}, "split": {"group": "none", "test": 0.3},
        "generators": {"more": {"name": "folder", "reader": reader}},
        "request": {"ratio": 1, "classes": ["down"], "shard_size": 16},
        "classifier": {"name": "small", "channels": [8, 8]},
        "training": {"steps": 12, "batch_size": 16, "learning_rate": 0.01, "evaluate_every": 4},
        "search": {"ratios": [1, 2], "seeds": 2},
        "curate": {
            "filters": [{"name": "agreement", "confidence": 0.9}, "copies"], "max_rounds": 1,
        },
        "evaluate": {"bootstrap_draws": 200},
        **fields,
    }  # fmt: skip
    # New fits of every generator would take most of the time of these tests.
    values["search"] = {"confirm_fits": 1, **values["search"]}
    return values


@pytest.fixture
def bars_study(
    tmp_path: Path, toy_study: Callable[..., Study], request: pytest.FixtureRequest
) -> Callable[..., Study]:
    write_bars_data(tmp_path)
    # A root as it is written is part of the keys.
    root = Path() if "resumed" in request.fixturenames else tmp_path

    def make(folder: str = "good", **fields: Any) -> Study:
        return toy_study(root / "real", **bars_values(root, folder, **fields))

    return make


@pytest.fixture(scope="session")
def finished_bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a finished `bars_study()` that no page has opened test for: up to the
    confirmation."""
    root = tmp_path_factory.mktemp("bars")
    write_bars_data(root)
    values = toy_values(Path("real"), **bars_values(Path()))
    profile = Profile(storage=str(root / "runs"), runtime="inline")
    with contextlib.chdir(root):
        steps = until(plan(validate(Study, values, "toy study")), "confirm")
        execute(steps, Store(profile.storage), InlineRuntime(), profile)
    return root / "runs"


@pytest.fixture
def resumed(finished_bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in a folder whose storage has what `bars_study()` computes before it opens
    test; only what differs is computed. For modules that look at results, not at how they come
    about."""
    shutil.copytree(finished_bars, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
    )
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield os.environ["AWS_ENDPOINT_URL"]
    server.stop()
    os.environ.clear()
    os.environ.update(before)
