"""Two drivers start on one empty storage at about the same moment: both succeed, with the result of
a single driver. CHAOS_ROUNDS sets the number (default 4)."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
import traceback
from pathlib import Path

import pytest

from engine.core.store import Store
from engine.execute import execute
from engine.plan import plan, until
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.study import Study, validate
from tests.chaos.storages import differences
from tests.conftest import write_bars

PRELOADED = [
    "torch", "accelerate", "diffusers", "faiss", "sklearn.metrics", "cleanlab", "kornia",
    "scipy.stats", "engine.nets.denoising", "engine.nets.training", "engine.generators.ddpm",
    "engine.classifiers.small", "engine.steps.evaluate", "engine.steps.fidelity",
]  # fmt: skip
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "4"))


def study_of(root: Path) -> Study:
    """A comparison of real images with turned ones: every step but trained generators."""
    values = {
        "name": "twice", "seed": 3, "reader": {"name": "imagefolder", "root": str(root)},
        "preprocess": {"size": 16, "channels": "L"}, "split": {"group": "none", "test": 0.3},
        "embedder": {"name": "pixels"}, "cluster": {"k": 2},
        "generators": {
            "turned": {"name": "traditional", "rotate": 10},
            "ddpm": {"name": "ddpm", "block_out_channels": [8, 16], "layers_per_block": 1,
                     "attention_resolution": 4, "train_steps": 2, "batch_size": 8,
                     "num_inference_steps": 2},
        },
        "request": {"ratio": 1, "classes": ["down"], "shard_size": 4},
        "curate": {"filters": ["copies"], "max_rounds": 1},
        "classifier": {"name": "small", "channels": [8, 8]},
        "training": {"steps": 4, "batch_size": 16, "learning_rate": 0.01, "evaluate_every": 2},
        "search": {"ratios": [1], "seeds": 2, "confirm_fits": 1},
        "evaluate": {"bootstrap_draws": 200},
    }  # fmt: skip
    return validate(Study, values, "twice study")


def run(study: Study, url: str) -> None:
    import torch

    torch.set_num_threads(1)
    steps = until(plan(study), "evaluate")
    execute(steps, Store(url), InlineRuntime(), Profile(storage=url), quiet=True)


def driver(study: Study, url: str, delay: float, failures: multiprocessing.Queue) -> None:
    time.sleep(delay)
    try:
        run(study, url)
    except BaseException:
        failures.put(traceback.format_exc())
        raise SystemExit(1) from None


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_drivers_on_an_empty_storage_both_finish(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}, {ROUNDS} rounds")
    dice = random.Random(seed)
    write_bars(tmp_path / "bars", {"across": 60, "down": 30}, 0)
    study = study_of(tmp_path / "bars")
    # Processes that start with everything imported, so that the drivers meet in every step.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *PRELOADED])
    failures: multiprocessing.Queue = context.Queue()
    urls = [str(tmp_path / "alone"), *(str(tmp_path / f"{n}") for n in range(ROUNDS))]
    for number, url in enumerate(urls):
        drivers = [
            context.Process(target=driver, args=(study, url, delay, failures))
            for delay in ([0.0] if number == 0 else [0.0, dice.random() * 0.6])
        ]
        for process in drivers:
            process.start()
        for process in drivers:
            process.join(600)
        assert [process.exitcode for process in drivers] == [0] * len(drivers), failures.get()
        if number:
            assert list(differences(Store(urls[0]), Store(url))) == []
