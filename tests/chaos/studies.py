"""The digits study with tiny networks, as a command: what the attacks run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "generators.ddpm.block_out_channels": "[8, 16]",
    "generators.ddpm.train_steps": "6",
    "generators.ddpm.num_inference_steps": "2",
    "curate": "{filters: [copies], max_rounds: 1}",
    "request": "{ratio: 1, classes: [3, 5, 8, 9], shard_size: 5}",
    "classifier.channels": "[8, 8]",
    "training.steps": "8",
    "training.evaluate_every": "4",
    "search": "{ratios: [1], seeds: 2}",
    "evaluate.bootstrap_draws": "200",
}


def command(
    storage: str, *more: str, job: str = "run_study", sets: Mapping[str, str] | None = None
) -> list[str]:
    """A job on the tiny study, in this process alone unless `sets` says otherwise."""
    values = {**TINY, "profile.storage": storage, "profile.runtime": "inline", **(sets or {})}
    pairs = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    study = str(ROOT / "configs" / "digits.yaml")
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), study, *pairs, *more]


def run(
    storage: str, *more: str, job: str = "run_study", sets: Mapping[str, str] | None = None,
    code: int = 0,
) -> str:  # fmt: skip
    """Run a job to its end; returns what it printed."""
    done = subprocess.run(
        command(storage, *more, job=job, sets=sets),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout
