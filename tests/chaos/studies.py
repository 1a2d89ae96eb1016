"""The digits study with tiny networks, as a command for the attacks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from engine import cli

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
    "search": "{ratios: [1], seeds: 2, confirm_fits: 1}",
    "evaluate.bootstrap_draws": "200",
}
JOBS = {"run_study": cli.run_study, "audit": cli.run_audit, "export": cli.run_export}


def command(
    storage: str, *more: str, job: str = "run_study", sets: Mapping[str, str] | None = None
) -> list[str]:
    """A job on the tiny study, in one process unless `sets` says otherwise."""
    python = [sys.executable, str(ROOT / "jobs" / f"{job}.py")]
    return [*python, *arguments(storage, *more, sets=sets)]


def arguments(storage: str, *more: str, sets: Mapping[str, str] | None = None) -> list[str]:
    values = {**TINY, "profile.storage": storage, "profile.runtime": "inline", **(sets or {})}
    pairs = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    return [str(ROOT / "configs" / "digits.yaml"), *pairs, *more]


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


def run_here(
    storage: str, *more: str, job: str = "run_study", sets: Mapping[str, str] | None = None
) -> str:
    """Like `run`, but in this process: imports take longer than the tiny study."""
    output = StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        code = JOBS[job](arguments(storage, *more, sets=sets))
    assert code == 0, output.getvalue()
    return output.getvalue()
