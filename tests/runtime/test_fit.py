"""What a fit does when Ray Train gives up. `test_ray.py` runs real fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.train import ControllerError

from engine.core.errors import DataError, EngineError
from engine.core.store import Store
from engine.runtime import fit as module
from engine.work.fit import FitContext
from engine.work.resources import FitResources


class Trainer:
    """Raises the given errors, one at each fit, and then succeeds."""

    failures: list[Exception] = []
    names: list[str] = []

    def __init__(self, loop: Any, run_config: Any, **_: Any) -> None:
        self.names.append(run_config.name)

    def fit(self) -> None:
        if self.failures:
            raise self.failures.pop(0)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type[Trainer]:
    monkeypatch.setattr(module, "TorchTrainer", Trainer)
    monkeypatch.setattr(Trainer, "failures", [])
    monkeypatch.setattr(Trainer, "names", [])
    return Trainer


def fit(tmp_path: Path, max_failures: int) -> None:
    context = FitContext(Store(str(tmp_path)), "work/k", output="out", attempt="a", inputs="")
    module.fit(lambda _: None, context, FitResources(max_failures=max_failures), str(tmp_path))


def died() -> ControllerError:
    return ControllerError(RuntimeError("The actor died"))


def test_worker_that_dies_while_it_starts_is_replaced(
    trainer: type[Trainer], tmp_path: Path
) -> None:
    trainer.failures[:] = [died(), died()]
    fit(tmp_path, max_failures=2)
    # Ray Train takes an earlier run of the same name for its own.
    assert len(set(trainer.names)) == 3


def test_workers_that_always_die_end_the_fit_in_one_line(
    trainer: type[Trainer], tmp_path: Path
) -> None:
    trainer.failures[:] = [died() for _ in range(9)]
    with pytest.raises(EngineError, match=r"work/k: .* died 3 times while they started") as caught:
        fit(tmp_path, max_failures=2)
    assert "\n" not in str(caught.value)


def test_own_error_is_raised_as_it_is(trainer: type[Trainer], tmp_path: Path) -> None:
    failure = died()
    failure.__cause__ = DataError("too few images")
    trainer.failures[:] = [failure]
    with pytest.raises(DataError, match="too few images"):
        fit(tmp_path, max_failures=2)
    assert len(trainer.names) == 1
