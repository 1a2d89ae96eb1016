"""The loop that every fit shares, on a training of one number; batches, weights and optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.errors import EngineError, StudyError
from engine.core.store import Store
from engine.nets.training import (
    WeightedSampler,
    balanced_weights,
    make_accelerator,
    optimizer_tensors,
    restore_optimizer,
    run,
    seed_dropout,
    share_of_batch,
    strip_prefix,
)
from engine.work.fit import SAMPLES, FitContext


class Killed(Exception):
    """Stands for the end of a process."""


class Sum:
    """Adds up the squares of the steps; dies before the step `dies_at`."""

    def __init__(self, dies_at: int | None = None, loss: float = 1.0) -> None:
        self.value, self.dies_at, self.loss = torch.zeros(1), dies_at, loss
        self.updates: list[int] = []

    def update(self, step: int) -> dict[str, float]:
        if step == self.dies_at:
            raise Killed
        self.updates.append(step)
        self.value += step**2
        return {"loss": self.loss * step}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"value": self.value}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.value = tensors["value"].clone()


def context(store: Store, attempt: str = "one", **fields: Any) -> FitContext:
    return FitContext(store, "work/sum", f"weights/{attempt}", attempt, "inputs", **fields)


def train(store: Store, trainable: Sum, attempt: str = "one", **fields: Any) -> Any:
    settings: dict[str, Any] = {"checkpoint_every": 4, "report_every": 3, **fields}
    return run(context(store, attempt), trainable, 10, **settings)


def test_reports_have_means_since_the_last_report(tmp_path: Path) -> None:
    history = train(Store(str(tmp_path)), Sum(), measure=lambda done: {"doubled": 2.0 * done})
    assert history == [
        {"step": 3, "loss": 1.0, "doubled": 6.0}, {"step": 6, "loss": 4.0, "doubled": 12.0},
        {"step": 9, "loss": 7.0, "doubled": 18.0}, {"step": 10, "loss": 9.0, "doubled": 20.0},
    ]  # fmt: skip


def test_killed_training_continues_from_its_last_checkpoint_to_the_same_end(
    tmp_path: Path,
) -> None:
    whole = Sum()
    history = train(Store(str(tmp_path / "whole")), whole)
    store = Store(str(tmp_path / "killed"))
    # Between two reports, so that the sums of the figures must survive too.
    with pytest.raises(Killed):
        train(store, Sum(dies_at=9))
    resumed = Sum()
    assert train(store, resumed, "two") == history
    assert resumed.updates == [8, 9]
    assert torch.equal(resumed.value, whole.value)


def test_only_a_training_followed_by_another_keeps_its_end(tmp_path: Path) -> None:
    for keep_last, kept in ((False, 8), (True, 10)):
        store = Store(str(tmp_path / str(keep_last)))
        train(store, Sum(), keep_last=keep_last)
        found = context(store, "two").latest_checkpoint()
        assert found is not None
        assert found[0] == kept


def test_diverging_training_stops_with_its_step(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"diverged at step 3: .*lower the learning rate"):
        train(Store(str(tmp_path)), Sum(loss=float("inf")))


def test_samples_are_drawn_at_most_eight_times_and_more_often_early(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    run(context(store), Sum(), 640, checkpoint_every=1000, report_every=1000,
        sample_grid=lambda: b"png")  # fmt: skip
    names = sorted(store.listing(f"work/sum/{SAMPLES}"))
    drawn = [int(Path(name).stem) for name in names]
    assert drawn == [10, 40, 90, 160, 250, 360, 490, 640]


def test_shares_of_a_batch_are_disjoint_and_cover_it() -> None:
    shares = [share_of_batch(24, rank, 3, 2) for rank in range(3)]
    rows = [row for slices in shares for piece in slices for row in range(24)[piece]]
    assert rows == list(range(24))
    assert {len(range(24)[piece]) for slices in shares for piece in slices} == {4}
    with pytest.raises(StudyError, match=r"batch_size: 10 .* make it a multiple of 6"):
        share_of_batch(10, 0, 3, 2)


def test_batches_depend_on_seed_and_step_and_follow_the_weights() -> None:
    weights = np.asarray([1.0, 0.0, 3.0])
    sampler = WeightedSampler(weights, 4000, seed=1)
    drawn = sampler.rows(5)
    np.testing.assert_array_equal(drawn, WeightedSampler(weights, 4000, seed=1).rows(5))
    assert (drawn != sampler.rows(6)).any()
    assert (drawn != WeightedSampler(weights, 4000, seed=2).rows(5)).any()
    shares = np.bincount(drawn, minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.25, 0, 0.75], atol=0.03)


def test_balance_moves_draws_from_images_to_classes() -> None:
    labels = ["a"] * 16 + ["b"] * 4

    def share_of_b(balance: float) -> float:
        weights = balanced_weights(labels, balance)
        return float(weights[16:].sum() / weights.sum())

    assert [share_of_b(balance) for balance in (0, 0.5, 1)] == pytest.approx([0.2, 1 / 3, 0.5])


def test_restored_optimizer_takes_the_same_next_step() -> None:
    def stepped(steps: int, tensors: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of a training after more steps, from those of an earlier one."""
        network = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.ones_(network.weight)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        if tensors is not None:
            network.load_state_dict(strip_prefix("net.", tensors))
            restore_optimizer(optimizer, "optimizer.", tensors)
        for _ in range(steps):
            optimizer.zero_grad()
            network.weight.square().sum().backward()
            optimizer.step()
        named = {f"net.{name}": value.clone() for name, value in network.state_dict().items()}
        return named | optimizer_tensors(optimizer, "optimizer.")

    at_three, at_four = stepped(3), stepped(4)
    torch.testing.assert_close(stepped(1, at_three), at_four)
    forgotten = stepped(1, {"net.weight": at_three["net.weight"]})
    assert not torch.allclose(forgotten["net.weight"], at_four["net.weight"])


def test_dropout_depends_only_on_its_parts() -> None:
    def drawn(*parts: int | str) -> torch.Tensor:
        seed_dropout("cpu", *parts)
        return torch.rand(8)

    assert torch.equal(drawn(1, "dropout", 3), drawn(1, "dropout", 3))
    assert not torch.equal(drawn(1, "dropout", 3), drawn(1, "dropout", 4))


def test_half_precision_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="precision: fp16 needs a GPU; set bf16 or fp32"):
        make_accelerator(context(Store(str(tmp_path))), "fp16", 1)
