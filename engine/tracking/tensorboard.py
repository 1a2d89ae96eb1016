"""Training curves as TensorBoard logs, written if TensorBoard is installed.

MLflow has the same values. These logs need no server: run `tensorboard --logdir` on the folder.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from engine.comparison.arms import Trial, planned_trials
from engine.core.manifest import read_manifest
from engine.core.step import Step
from engine.core.store import Store
from engine.study import Study


def write_logs(
    study: Study, steps: Sequence[Step], store: Store, warn: Callable[[str], None]
) -> None:
    """Write the missing logs of trials, a folder for each. Does nothing without TensorBoard, and
    never raises: a failure becomes a warning.

    A log is built in a temporary folder and stored as a whole, so that a kill leaves no partial
    log.
    """
    trials = [trial for step in steps if step.kind in ("search", "confirm")
              for trial in planned_trials(step)]  # fmt: skip
    if not trials or find_spec("tensorboard") is None:
        return
    try:
        written = _write(study, trials, store)
    except Exception as error:  # another version, no rights: none of these may stop a study
        warn(
            f"warning: cannot write TensorBoard logs ({type(error).__name__}: {error}); nothing is"
            " lost, the next run of this study writes them"
        )
        return
    if written:
        folder = store.location(store.tensorboard(study.name))
        warn(f"TensorBoard: {written} trainings in {folder}")


def _write(study: Study, trials: Sequence[Trial], store: Store) -> int:
    """Write the missing logs; returns their number."""
    existing, written = set(store.listing(store.tensorboard(study.name))), 0
    for trial in trials:
        manifest = read_manifest(store, trial.step)
        if manifest is None:
            continue
        for key in manifest.keys(file="history.json"):
            run = f"{trial.step.label}-{manifest.digest[:8]}"
            log = store.tensorboard(study.name, run, "events.out.tfevents")
            if log not in existing:
                store.put(log, events(store.read(key)))
                written += 1
    return written


def events(history: bytes) -> bytes:
    """A training's history (JSON) as the content of an event file."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for entry in json.loads(history):
                for name, value in entry.items():
                    if name != "step":
                        # TensorBoard groups plots by the text before a slash.
                        tag = name.replace("val_", "val/", 1) if name[:4] == "val_" else name
                        writer.add_scalar(tag, value, int(entry["step"]))
        (file,) = Path(folder).iterdir()
        return file.read_bytes()
