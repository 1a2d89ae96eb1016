"""Shared by all tests: toy images, a profile without Ray, running a study."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image

from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.execute import execute
from engine.plan import plan, until
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.study import Study, validate

Classes = Mapping[str, int]

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


@pytest.fixture
def toy_study() -> Callable[..., Study]:
    """A function that makes a study of small images; the given fields override its own."""

    def make(reader: Mapping[str, Any] | Path, **fields: Any) -> Study:
        if isinstance(reader, Path):
            reader = {"name": "imagefolder", "root": str(reader)}
        values = {
            "name": "toy", "seed": 3, "reader": dict(reader),
            "preprocess": {"size": 16}, "split": {"group": "none"},
        }  # fmt: skip
        return validate(Study, {**values, **fields}, "toy study")

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


@pytest.fixture
def bars_study(tmp_path: Path, toy_study: Callable[..., Study]) -> Callable[..., Study]:
    write_bars(tmp_path / "real", {"across": 100, "down": 30}, 0)
    write_bars(tmp_path / "good", {"down": 60}, 5000)

    # The right answer is the direction of the bar.
    def make(folder: str = "good", **fields: Any) -> Study:
        reader = {"name": "imagefolder", "root": str(tmp_path / folder)}
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
        return toy_study(tmp_path / "real", **values)

    return make


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
