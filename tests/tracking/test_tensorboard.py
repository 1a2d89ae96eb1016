"""TensorBoard logs, read back by TensorBoard if it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from engine.core.store import Store
from engine.execute import execute
from engine.plan import plan
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.tracking.tensorboard import write_logs


def test_each_training_has_its_curves_once(bars_study, store: Store, profile: Profile) -> None:
    study = bars_study(search={"ratios": [1], "seeds": 2})
    steps = plan(study)
    said: list[str] = []
    write_logs(study, steps, store, said.append)
    assert (store.listing("tensorboard"), said) == ([], [])  # nothing is trained yet
    if find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    execute(steps, store, InlineRuntime(), profile)
    write_logs(study, steps, store, said.append)
    files = store.listing("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(files) == 4 * 2 + 5 * 2
    (file,) = (key for key in files if "train.more.x1.1-" in key)
    events = EventAccumulator(str(Path(store.location(file)).parent))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [4, 8, 12]
    assert 0 <= events.Scalars("val/macro_f1")[-1].value <= 1
    write_logs(study, steps, store, said.append)
    assert len(said) == 1
    assert store.listing("tensorboard") == files
