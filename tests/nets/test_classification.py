from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from engine.classifiers.small import Small, SmallSpec
from engine.core.store import Store
from engine.data.images import Preprocess
from engine.nets.augmentation import Mixing, draw_mixing
from engine.nets.classification import (
    LabelledImages,
    Trained,
    Training,
    class_numbers,
    predict,
    train,
    with_synchronised_norms,
)
from engine.nets.training import balanced_weights, lr_schedule
from engine.work.fit import FitContext

PREPROCESS = Preprocess(size=8, channels="L")


def halves(count: int, seed: int) -> LabelledImages:
    """Images with a bright upper or lower half."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    pixels = random.integers(0, 60, (count, 8, 8, 1), dtype=np.uint8)
    for picture, label in zip(pixels, labels, strict=True):
        picture[4 * label : 4 * label + 4] += 120
    return LabelledImages(pixels, labels, np.ones(count))


class Watched(np.ndarray):
    """Pixels that record how many of them were copied at once."""

    most = 0

    def __getitem__(self, wanted: Any) -> Any:
        if isinstance(wanted, np.ndarray):
            Watched.most = max(Watched.most, len(wanted))
        return super().__getitem__(wanted)


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


def test_learnable_data_is_learned(tmp_path: Path) -> None:
    made = fit(Store(str(tmp_path)), steps=60, evaluate_every=10)
    assert score(halves(30, 2).labels, made.probabilities)["accuracy"] > 0.95
    assert made.history[-1]["loss"] < made.history[0]["loss"]


def test_evaluation_on_val_copies_no_pixels(tmp_path: Path) -> None:
    val = halves(300, 2)
    val = LabelledImages(val.all_pixels().view(Watched), val.labels, val.weights)
    small = Small(SmallSpec(channels=(4, 4)), PREPROCESS, ("up", "down"))
    context = FitContext(Store(str(tmp_path)), "work/c", "weights/one", "one", "inputs", threads=1)
    settings = Training(steps=2, batch_size=8, evaluate_every=1)
    made = train(
        context, small.build, small.prepare, halves(40, 1), val, score, settings, seed=3
    )  # fmt: skip
    assert len(made.probabilities) == 300
    assert Watched.most == 0
    part = LabelledImages(val.pixels, val.labels[:2], val.weights[:2], np.asarray([5, 1]))
    np.testing.assert_array_equal(part.all_pixels(), val.pixels[np.asarray([5, 1])])


def test_weights_are_those_with_the_best_score_on_val(tmp_path: Path) -> None:
    # A rate that ruins the network late: the last weights are not the best.
    made = fit(
        Store(str(tmp_path)), steps=30, learning_rate=0.3, lr_scheduler="constant_with_warmup"
    )
    best = max(entry["val_macro_f1"] for entry in made.history)
    reached = next(e["step"] for e in made.history if e["val_macro_f1"] == best)
    assert made.best_step == reached
    assert score(halves(30, 2).labels, made.probabilities)["macro_f1"] == best


def test_fits_of_different_precisions_follow_one_another(tmp_path: Path) -> None:
    first, half, again = (
        fit(Store(str(tmp_path / str(number))), precision=precision)
        for number, precision in enumerate(("fp32", "bf16", "fp32"))
    )
    assert again.history == first.history
    np.testing.assert_array_equal(again.probabilities, first.probabilities)
    assert half.history[-1]["loss"] != first.history[-1]["loss"]
    assert half.history[-1]["loss"] == pytest.approx(first.history[-1]["loss"], abs=0.05)


def test_val_is_scored_like_test(tmp_path: Path) -> None:
    shown: list[np.ndarray] = []

    def note(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
        shown.append(probabilities)
        return score(labels, probabilities)

    small, val = Small(SmallSpec(channels=(4, 4)), PREPROCESS, ("up", "down")), halves(30, 2)
    context = FitContext(Store(str(tmp_path)), "work/c", "weights/one", "one", "inputs", threads=1)
    made = train(
        context, small.build, small.prepare, halves(40, 1), val, note,
        Training(steps=6, batch_size=8, evaluate_every=6, precision="bf16"), seed=3,
    )  # fmt: skip
    small.save(made.network, tmp_path)
    again = predict(small.load(tmp_path), small.prepare, val.all_pixels(), "cpu")
    np.testing.assert_array_equal(made.probabilities, again)
    np.testing.assert_array_equal(shown[-1], again)


class Killed(Exception):
    pass


def looking_context(store: Store, attempt: str) -> FitContext:
    return FitContext(
        store, "work/c", f"weights/{attempt}", attempt, "inputs", threads=1, checkpoint_every=2
    )


def looks(store: Store, losses: list[float], attempt: str = "one") -> Trained:
    """A training whose evaluations differ only in their losses, killed when there are no more."""
    left = list(losses)

    def alike(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
        if not left:
            raise Killed
        return {"worst_class_recall": 0.0, "loss": left.pop(0)}

    small = Small(SmallSpec(channels=(4, 4)), PREPROCESS, ("up", "down"))
    settings = Training(steps=8, batch_size=8, evaluate_every=2, objective="worst_class_recall")
    return train(
        looking_context(store, attempt), small.build, small.prepare, halves(40, 1), halves(30, 2),
        alike, settings, seed=3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "best"), [([3, 1, 2, 1], 4), ([1, 1, 1, 1], 2), ([4, 3, 2, 1], 8)]
)
def test_tied_scores_keep_the_evaluation_with_the_lowest_loss(
    tmp_path: Path, losses: list[float], best: int
) -> None:
    assert looks(Store(str(tmp_path)), losses).best_step == best


@pytest.mark.parametrize(("noted", "loss", "best"), [(True, 2, 4), (True, 0.5, 8), (False, 0.5, 4)])
def test_lowest_loss_survives_a_kill_and_old_checkpoints_are_adopted(
    tmp_path: Path, noted: bool, loss: float, best: int
) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(Killed):
        looks(store, [3, 1, 2])
    if not noted:
        found = looking_context(store, "one").latest_checkpoint()
        assert found is not None
        step, tensors, state = found
        del tensors["best_loss"]
        looking_context(store, "one").save_checkpoint(step, tensors, state)
    resumed = looks(store, [loss], "two")
    assert resumed.best_step == best
    assert [entry["val_loss"] for entry in resumed.history] == [3, 1, 2, loss]


def test_killed_training_continues_to_equal_weights(tmp_path: Path) -> None:
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


def test_augmentation_changes_inputs_and_is_reproducible(tmp_path: Path) -> None:
    plain, moved, again = (
        fit(Store(str(tmp_path / str(number))), crop_padding=border).history
        for number, border in enumerate((0, 2, 2))
    )
    assert moved == again
    assert moved != plain


def test_class_numbers_follow_the_order_of_names() -> None:
    assert class_numbers(["b", "a", "b"], ["a", "b"]).tolist() == [1, 0, 1]


def test_mixup_and_cutmix_mix_by_the_returned_share() -> None:
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


def test_mixing_is_drawn_per_step_only_if_requested() -> None:
    def drawn(count: int, mixup: float = 0.0, cutmix: float = 0.0) -> list[Mixing]:
        mixings = [draw_mixing(mixup, cutmix, np.random.default_rng(n)) for n in range(count)]
        return [mixing for mixing in mixings if mixing is not None]

    assert drawn(3) == []
    assert len(drawn(20, mixup=0.4)) == 20
    assert all(found.corner is None for found in drawn(20, mixup=0.4))
    both = drawn(40, mixup=0.4, cutmix=1.0)
    assert both == drawn(40, mixup=0.4, cutmix=1.0)
    assert 8 <= sum(found.corner is None for found in both) <= 32


def test_training_with_mixing_learns_and_continues_after_a_kill(tmp_path: Path) -> None:
    mixing: dict[str, Any] = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}
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


EVERYTHING: dict[str, Any] = {
    "rotate": 10.0, "brightness": 0.2, "augment": "trivial_augment", "class_weights": "balanced",
    "loss": "focal",
}  # fmt: skip


def test_augmentation_draws_depend_on_the_position_in_the_whole_batch(tmp_path: Path) -> None:
    # A network whose output for an image depends on no other image and no random draw.
    def build() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))

    def trained(pieces: int, **settings: Any) -> list[float]:
        context = FitContext(Store(str(tmp_path / f"{pieces}{len(settings)}")), "w", "o", "a", "i")
        made = train(
            context, build, lambda images: images.float() / 255, halves(40, 1), halves(30, 2),
            score,
            Training(
                steps=4, batch_size=8, evaluate_every=1, learning_rate=0.02,
                gradient_accumulation_steps=pieces, **settings,
            ),
            seed=3,
        )  # fmt: skip
        return [entry["loss"] for entry in made.history]

    # Divided as for four workers.
    assert trained(4, **EVERYTHING) == pytest.approx(trained(1, **EVERYTHING), rel=1e-5)
    assert trained(1, **EVERYTHING) != pytest.approx(trained(1, loss="focal"), rel=1e-3)


def test_killed_training_with_augmentation_continues_to_equal_weights(tmp_path: Path) -> None:
    whole = fit(Store(str(tmp_path / "whole")), lr_scheduler="step", **EVERYTHING)

    def die(message: dict[str, Any]) -> None:
        if message["done"] >= 9:
            raise Killed

    store = Store(str(tmp_path / "killed"))
    with pytest.raises(Killed):
        fit(store, on_report=die, lr_scheduler="step", **EVERYTHING)
    again = fit(store, "two", lr_scheduler="step", **EVERYTHING)
    assert again.history == whole.history
    np.testing.assert_array_equal(again.probabilities, whole.probabilities)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"batch_size": 64, "gradient_accumulation_steps": 3}, "batch_size: 64 must be a mult"),
        ({"steps": 10, "lr_warmup_steps": 10}, "lr_warmup_steps: 10 is not below steps 10"),
    ],
)
def test_impossible_training_is_rejected_when_it_is_read(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Training(**fields)
    Training(batch_size=64, gradient_accumulation_steps=4, steps=10, lr_warmup_steps=9)


def test_shared_array_is_trained_on_without_being_written(
    tmp_path: Path,
) -> None:
    data = halves(40, 1)
    pixels = data.all_pixels()
    before = pixels.copy()
    pixels.flags.writeable = False
    small = Small(SmallSpec(channels=(4, 4)), PREPROCESS, ("up", "down"))
    context = FitContext(Store(str(tmp_path)), "work/c", "weights/one", "one", "inputs", threads=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not writable")
        made = train(
            context, small.build, small.prepare, data, data, score,
            Training(steps=2, batch_size=8, evaluate_every=1), seed=3,
        )  # fmt: skip
        vectors = np.ones((3, 64), np.float32)
        vectors.flags.writeable = False
        head = torch.nn.Linear(64, 2)
        # A function that writes into its input.
        predict(head, lambda images: images.add_(1), vectors, "cpu")
    assert len(made.probabilities) == 40
    np.testing.assert_array_equal(data.pixels, before)
    np.testing.assert_array_equal(vectors, 1)


def test_trained_norms_are_synchronised_and_saved_as_before(
    tmp_path: Path,
) -> None:
    small = Small(SmallSpec(channels=(4, 4)), PREPROCESS, ("up", "down"))
    network = with_synchronised_norms(small.build())
    kinds = [type(layer) for layer in network.children() if "Norm" in type(layer).__name__]
    assert kinds == [torch.nn.SyncBatchNorm] * 2
    small.save(network, tmp_path)
    loaded = small.load(tmp_path)
    images = small.prepare(torch.from_numpy(halves(5, 0).pixels).permute(0, 3, 1, 2))
    torch.testing.assert_close(loaded(images), network.eval()(images))


def test_learning_rate_drops_at_shares_of_any_number_of_steps() -> None:
    for steps in (20, 40):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        settings = Training(
            steps=steps, lr_scheduler="step", lr_milestones=(0.5, 0.75), lr_gamma=0.1,
            lr_warmup_steps=4,
        )  # fmt: skip
        schedule, rates = lr_schedule(optimizer, settings), []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates[:5] == [0, 0.25, 0.5, 0.75, 1]
        expected = [1.0] * (steps // 4) + [0.1] * (steps // 4) + [0.01] * (steps // 4)
        assert rates[steps // 4 :] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("class_weights", "oversampled", "expected"),
    # Balanced draws get no additional weights.
    [("none", False, 0.1), ("balanced", False, 0.5), ("none", True, 0.5), ("balanced", True, 0.5)],
)
def test_identical_images_get_the_class_weights_as_probabilities(
    tmp_path: Path, class_weights: str, oversampled: bool, expected: float
) -> None:
    labels = np.asarray([0] * 36 + [1] * 4)
    drawn = balanced_weights([str(label) for label in labels], float(oversampled))
    black = np.zeros((40, 8, 8, 1), np.uint8)
    data = LabelledImages(black, labels, drawn)
    made = train(
        FitContext(Store(str(tmp_path)), "w", "o", "a", "i", threads=1),
        lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)),
        lambda images: images.float(), data, data,
        lambda _, probabilities: {"macro_f1": -abs(float(probabilities[0, 1]) - expected)},
        Training.model_validate(
            {"steps": 150, "batch_size": 64, "learning_rate": 0.03, "evaluate_every": 150,
             "class_weights": class_weights}
        ),
        seed=3,
    )  # fmt: skip
    assert made.probabilities[0, 1] == pytest.approx(expected, abs=0.04)


class Noted(np.ndarray):
    """Pixels that record which of them are read for each batch."""

    read: list[set[int]] = []

    def __getitem__(self, wanted: Any) -> Any:
        if isinstance(wanted, np.ndarray):
            Noted.read.append(set(wanted.tolist()))
        return super().__getitem__(wanted)


def test_a_first_phase_draws_its_own_images_and_none_of_its_checkpoints_is_chosen(
    tmp_path: Path,
) -> None:
    data, small = halves(40, 1), Small(SmallSpec(channels=(4, 4)), PREPROCESS, ("up", "down"))
    first = (np.arange(40) < 10).astype(float)
    phases = LabelledImages(
        data.all_pixels().view(Noted), data.labels, 1 - first, first_weights=first
    )
    scores = iter([0.9, 0.8, 0.3, 0.4])
    Noted.read = []
    made = train(
        FitContext(Store(str(tmp_path)), "work/c", "weights/one", "one", "inputs", threads=1),
        small.build, small.prepare, phases, halves(30, 2),
        lambda labels, probabilities: {"macro_f1": next(scores)},
        Training(steps=12, batch_size=8, evaluate_every=3, first_share=0.5, choose_after=0.5),
        seed=3,
    )  # fmt: skip
    assert len(Noted.read) == 12
    assert all(rows <= set(range(10)) for rows in Noted.read[:6])
    assert all(rows <= set(range(10, 40)) for rows in Noted.read[6:])
    # The best of the second half, though the first half scored higher.
    assert made.best_step == 12


def test_a_short_training_always_has_a_checkpoint_to_choose(tmp_path: Path) -> None:
    made = fit(Store(str(tmp_path)), steps=3, evaluate_every=1000, choose_after=0.99)
    assert made.best_step == 3
