from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.classifiers.small import Small, SmallSpec
from engine.core.fit import FitContext
from engine.core.images import Preprocess
from engine.core.store import Store
from engine.nets.augmentation import Mixing, draw_mixing
from engine.nets.classification import LabelledImages, Trained, Training, class_numbers, train

PREPROCESS = Preprocess(size=8, channels="L")


def halves(count: int, seed: int) -> LabelledImages:
    """Pictures whose upper or lower half is bright."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    pixels = random.integers(0, 60, (count, 8, 8, 1), dtype=np.uint8)
    for picture, label in zip(pixels, labels, strict=True):
        picture[4 * label : 4 * label + 4] += 120
    return LabelledImages(pixels, labels, np.ones(count))


def score(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    right = float((probabilities.argmax(1) == labels).mean())
    return {"accuracy": right, "macro_f1": right}


def fit(store: Store, attempt: str = "one", on_report: Any = None, **settings: Any) -> Trained:
    context = FitContext(
        store, "work/c", f"weights/{attempt}", attempt, "inputs", threads=1, checkpoint_every=4,
        on_report=on_report,
    )  # fmt: skip
    small = Small(SmallSpec(channels=(4, 4), dropout=0.2), PREPROCESS, ("up", "down"))
    values = {"steps": 12, "batch_size": 8, "learning_rate": 0.02, "evaluate_every": 3, **settings}
    return train(
        context, small.build, small.prepare, halves(40, 1), halves(30, 2), score,
        Training(**values), seed=3,
    )  # fmt: skip


def test_what_can_be_learned_is_learned(tmp_path: Path) -> None:
    made = fit(Store(str(tmp_path)), steps=60, evaluate_every=10)
    assert score(halves(30, 2).labels, made.probabilities)["accuracy"] > 0.95
    assert made.history[-1]["loss"] < made.history[0]["loss"]


def test_the_weights_are_those_that_scored_best_on_val(tmp_path: Path) -> None:
    # A rate that ruins the network late: the last weights are not the best.
    made = fit(
        Store(str(tmp_path)), steps=30, learning_rate=0.3, lr_scheduler="constant_with_warmup"
    )
    best = max(entry["val_macro_f1"] for entry in made.history)
    reached = next(e["step"] for e in made.history if e["val_macro_f1"] == best)
    assert made.best_step == reached
    assert score(halves(30, 2).labels, made.probabilities)["macro_f1"] == best


class Killed(Exception):
    pass


def test_a_killed_training_goes_on_to_equal_weights(tmp_path: Path) -> None:
    whole = fit(Store(str(tmp_path / "whole")), crop_padding=1, horizontal_flip=True)

    def die(message: dict[str, Any]) -> None:
        if message["done"] >= 9:
            raise Killed

    store = Store(str(tmp_path / "killed"))
    with pytest.raises(Killed):
        fit(store, on_report=die, crop_padding=1, horizontal_flip=True)
    assert store.listing("work/c")
    resumed = fit(store, "two", crop_padding=1, horizontal_flip=True)
    np.testing.assert_array_equal(resumed.probabilities, whole.probabilities)
    assert resumed.history == whole.history
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name


def test_augmentation_changes_what_is_seen_and_not_whether_it_repeats(tmp_path: Path) -> None:
    plain, moved, again = (
        fit(Store(str(tmp_path / str(number))), crop_padding=border).history
        for number, border in enumerate((0, 2, 2))
    )
    assert moved == again
    assert moved != plain


def test_class_numbers_follow_the_order_of_names() -> None:
    assert class_numbers(["b", "a", "b"], ["a", "b"]).tolist() == [1, 0, 1]


def test_mixup_and_cutmix_give_the_share_that_they_say() -> None:
    first, second = torch.full((3, 1, 10, 10), 200.0), torch.zeros(3, 1, 10, 10)
    made, share = Mixing(0.7, None).mix(first, second)
    assert share == 0.7
    assert float(made.mean()) == pytest.approx(140)
    made, share = Mixing(0.7, (1.0, 0.0)).mix(first, second)
    # A box of 5 by 5 in the lower left corner.
    assert share == 0.75
    assert float(made.mean()) == pytest.approx(150)
    assert (made[:, :, 5:, :5] == 0).all()
    assert (made[:, :, :5] == 200).all()


def test_mixing_is_drawn_by_step_and_only_where_it_is_asked_for() -> None:
    def drawn(count: int, mixup: float = 0.0, cutmix: float = 0.0) -> list[Mixing | None]:
        return [draw_mixing(mixup, cutmix, np.random.default_rng(step)) for step in range(count)]

    assert drawn(3) == [None] * 3
    assert all(found.corner is None for found in drawn(20, mixup=0.4))
    both = drawn(40, mixup=0.4, cutmix=1.0)
    assert both == drawn(40, mixup=0.4, cutmix=1.0)
    assert 8 <= sum(found.corner is None for found in both) <= 32


def test_a_training_that_mixes_learns_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    mixing = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}
    made = fit(Store(str(tmp_path / "long")), steps=90, evaluate_every=10, **mixing)
    assert score(halves(30, 2).labels, made.probabilities)["accuracy"] > 0.9
    whole = fit(Store(str(tmp_path / "whole")), **mixing)

    def die(message: dict[str, Any]) -> None:
        if message["done"] >= 9:
            raise Killed

    store = Store(str(tmp_path / "killed"))
    with pytest.raises(Killed):
        fit(store, on_report=die, **mixing)
    again = fit(store, "two", **mixing)
    assert again.history == whole.history
