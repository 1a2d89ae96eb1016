"""Each filter on images with a known answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.core.notice import Notice
from engine.core.registry import available, resolve
from engine.filters import Judgement, Scores, class_limits
from engine.filters.agreement import Agreement, AgreementSpec, confidence_of, confidences
from engine.filters.duplicates import leaders
from engine.metrics.memorization import CopyLimits
from tests.text_image import save_clip

CLASSES = ("a", "b")


def images(count: int, seed: int, prefix: str = "i", **fields: Any) -> Scores:
    random = np.random.default_rng(seed)
    return Scores(
        np.asarray([f"{prefix}{number:04d}" for number in range(count)], dtype=object),
        np.asarray(random.choice(CLASSES, count), dtype=object),
        random.normal(size=(count, 12)).astype(np.float32),
        random.integers(0, 2**63, count, dtype=np.uint64), **fields,
    )  # fmt: skip


TRAIN, VAL, MADE = images(400, 1, "t"), images(200, 2, "v"), images(50, 3, "m")


def made_of(*parts: tuple[Scores, list[int]]) -> Scores:
    """Rows of several sets, concatenated, with new ids."""
    whole = {
        name: np.concatenate([getattr(held, name)[rows] for held, rows in parts])
        for name in ("labels", "vectors", "hashes")
    }
    count = len(whole["labels"])
    return Scores(np.asarray([f"m{number:04d}" for number in range(count)], object), **whole)


def judge(
    name: str, made: Scores, train: Scores = TRAIN, val: Scores = VAL,
    kept: np.ndarray | None = None, **fields: Any,
) -> Judgement:  # fmt: skip
    kind = resolve("filters", name)
    kept = np.ones(len(made), bool) if kept is None else kept
    found: Judgement = kind(kind.Spec(**fields), CLASSES).judge(made, train, val, kept)
    assert found.drop.shape == (len(made),)
    return found


def test_every_filter_has_a_drop_reason_and_known_judging_fields() -> None:
    for name in available("filters"):
        kind = resolve("filters", name)
        assert kind.drop_reason
        assert set(kind.judging_fields) <= set(kind.Spec.model_fields)


# Agreement ----------------------------------------------------------------------------------------


def probable(labels: np.ndarray, right: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """Probabilities that name the class of `labels` where `right`, with the confidence `sure`."""
    number = np.asarray([CLASSES.index(label) for label in labels])
    named = np.where(right, number, 1 - number)
    found = np.empty((len(labels), 2), np.float32)
    found[np.arange(len(labels)), named] = sure
    found[np.arange(len(labels)), 1 - named] = 1 - sure
    return found


def test_confident_other_class_is_dropped_or_relabelled() -> None:
    right = np.arange(50) % 5 > 0
    sure = np.where(np.arange(50) < 25, 0.95, 0.6)
    made = replace(MADE, probabilities=probable(MADE.labels, right, sure))
    val = replace(VAL, probabilities=probable(VAL.labels, np.ones(200, bool), np.full(200, 0.9)))
    assert (judge("agreement", made, val=val).drop == ~right).all()  # val was never contradicted
    by_hand = judge("agreement", made, val=val, confidence=0.9)
    assert (by_hand.drop == (~right & (sure > 0.9))).all()
    assert by_hand.limits == {"confidence": 0.9}
    assert (judge("agreement", made, val=val, label_from="agree").drop == ~right).all()
    relabelled = judge("agreement", made, val=val, label_from="labeler")
    assert not relabelled.drop.any()
    assert relabelled.labels is not None
    assert ((relabelled.labels == MADE.labels) == right).all()


def test_confidence_follows_the_labeler_s_errors_on_val() -> None:
    sure = np.linspace(0.5, 0.995, 100).astype(np.float32)
    limit = confidence_of(np.ones(100, bool), sure)
    assert (sure >= limit).sum() == 2
    assert confidence_of(np.zeros(100, bool), sure) == 0.0
    assert confidence_of(np.ones(100, bool), np.ones(100, np.float32)) > 1.0


def test_class_that_the_labeler_rarely_predicts_is_not_dropped() -> None:
    labels = np.asarray(["a"] * 980 + ["b"] * 20, dtype=object)
    wrong = labels == "b"  # the labeler is wrong about every one of them
    sure = np.full(1000, 0.8, np.float32)
    limits = confidences(wrong, sure, labels, CLASSES)
    assert limits["a"] == 0.0  # one in fifty of all images
    assert limits["b"] > 0.8


# Copies and duplicates ----------------------------------------------------------------------------


def test_copies_name_the_training_image_and_strict_stops_export() -> None:
    made = made_of((MADE, list(range(40))), (TRAIN, [7, 30, 200]))
    found = judge("copies", made)
    assert found.drop.nonzero()[0].tolist() == [40, 41, 42]
    assert found.columns["nearest_id"][40:].tolist() == ["t0007", "t0030", "t0200"]
    assert found.columns["distance"][40:].max() < 1e-6
    assert not found.stops
    assert judge("copies", made, strict=True).stops == Notice.of("copies", copies=3, images=43)
    assert not judge("copies", MADE, strict=True).stops


def test_one_of_several_repetitions_is_kept() -> None:
    made = made_of((MADE, [0, 1, 2, 0, 0, 3, 1]))
    found = judge("duplicates", made)
    assert found.drop.tolist() == [False, False, False, True, True, False, True]
    assert found.columns["duplicate_of"].tolist()[3:] == ["m0000", "m0000", None, "m0001"]
    assert found.columns["distance"][found.drop].max() < 1e-6
    assert np.isnan(found.columns["distance"][~found.drop]).all()
    # The first of the three was dropped before, so the next one is kept.
    kept = np.asarray([False, True, True, True, True, True, True])
    again = judge("duplicates", made, kept=kept)
    assert again.drop.tolist() == [False, False, False, False, True, False, True]


def test_pool_larger_than_train_is_not_thinned_by_its_size() -> None:
    def draw(count: int, seed: int) -> Scores:
        random = np.random.default_rng(seed)
        held = images(count, seed)
        return replace(
            held, vectors=random.normal(size=(count, 4)).astype(np.float32),
            hashes=np.zeros(count, np.uint64),
        )  # fmt: skip

    train = draw(300, 1)
    small, large = draw(300, 2), draw(1500, 2)  # five times as many
    asked = judge("duplicates", large, train=train, quantile=0.15)
    assert asked.limits == judge("duplicates", small, train=train, quantile=0.03).limits
    assert asked.drop.mean() < 0.15


def test_copies_are_found_even_if_val_contains_training_images() -> None:
    val = made_of((VAL, list(range(190))), (TRAIN, [1, 2, 3, 4, 5]))
    made = made_of((MADE, list(range(40))), (TRAIN, list(range(100, 140))))
    # The same images up to rounding.
    made = replace(made, vectors=made.vectors * np.float32(1.0000001) * 3)
    found = judge("copies", made, val=val)
    assert found.limits["distance"] < 1e-6
    assert found.drop.tolist() == [False] * 40 + [True] * 40


def test_leaders_equal_those_of_a_plain_loop() -> None:
    random = np.random.default_rng(0)
    centres = random.normal(size=(300, 6))
    of = random.integers(0, 300, 2500)
    vectors = (centres[of] + random.normal(size=(2500, 6)) * 0.02).astype(np.float32)
    hashes = random.integers(0, 2**63, 300, dtype=np.uint64)[of]
    limits = CopyLimits(distance=0.004, bits=0)
    found = leaders(vectors, hashes, np.arange(2500), limits)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    standing: list[int] = []
    for row in range(2500):
        alike = [
            lead for lead in standing
            if 1 - unit[lead] @ unit[row] <= 0.004 and hashes[lead] == hashes[row]
        ]  # fmt: skip
        assert (found[row] >= 0) == bool(alike)
        assert found[row] < 0 or found[row] in alike
        if not alike:
            standing.append(row)
    assert 300 <= len(standing) < 2000


def test_generator_that_repeats_one_image_keeps_one() -> None:
    made = made_of((MADE, [5] * 3000))
    assert (~judge("duplicates", made).drop).sum() == 1


# Realism ------------------------------------------------------------------------------------------


def test_image_far_from_all_real_images_is_unrealistic() -> None:
    far = replace(images(10, 4), vectors=images(10, 4).vectors + 40)
    made = made_of((MADE, list(range(40))), (far, list(range(10))))
    found = judge("realism", made)
    assert found.drop[40:].all()
    assert found.drop[:40].mean() < 0.1
    assert found.columns["density"][40:].max() == 0
    limits = found.limits["realism"]
    assert (found.columns["realism"][40:] < min(limits.values())).all()
    assert not judge("realism", made, least=0).drop.any()


def test_unusual_rare_class_is_not_dropped() -> None:
    random = np.random.default_rng(6)
    labels = np.asarray(["a"] * 1000 + ["b"] * 8, dtype=object)
    values = np.concatenate([random.normal(10, 1, 1000), random.normal(2, 1, 8)])
    few = class_limits(values, labels, CLASSES, 0.01)
    assert few["a"] == pytest.approx(np.quantile(values[:1000], 0.01))
    assert few["b"] == values[1000:].min()
    # Incomparable values do not influence each other's limits.
    alone = class_limits(values[:1000], labels[:1000], CLASSES, 0.01, comparable=False)
    assert alone == {"a": few["a"], "b": -np.inf}
    # If the few are higher than the rest, the rest set the limit.
    high = class_limits(values + 20 * (labels == "b"), labels, CLASSES, 0.01)
    assert high["b"] == pytest.approx(few["a"], abs=0.5)


def test_realism_is_the_largest_ratio_of_radius_to_distance() -> None:
    from scipy.spatial.distance import cdist

    between = cdist(TRAIN.vectors, TRAIN.vectors)
    radius = np.sort(between, 1)[:, 5]
    dense = radius <= np.median(radius)
    distance = cdist(MADE.vectors, TRAIN.vectors)
    found = judge("realism", MADE)
    expected = (radius[dense] / distance[:, dense]).max(1)
    np.testing.assert_allclose(found.columns["realism"], expected, rtol=1e-5)
    inside = (distance < radius).sum(1) / 5
    np.testing.assert_allclose(found.columns["density"], inside, rtol=1e-5)


# Blank, similarity --------------------------------------------------------------------------------


def measured(name: str, held: Scores, pixels: np.ndarray, **fields: Any) -> Scores:
    kind = resolve("filters", name)
    one = kind(kind.Spec(**fields), CLASSES)
    one.load("cpu")
    figures = one.measure(pixels, held.labels.tolist())
    assert set(figures) == set(kind.measures)
    return replace(held, measured=figures)


def test_black_empty_and_blurred_images_are_dropped() -> None:
    from PIL import Image, ImageFilter

    random = np.random.default_rng(0)
    real = random.integers(0, 256, (200, 24, 24, 3), dtype=np.uint8)
    new = random.integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)
    new[1], new[2] = 0, 200
    new[3] = np.asarray(Image.fromarray(new[3]).filter(ImageFilter.GaussianBlur(3)))
    found = judge(
        "blank", measured("blank", images(5, 5), new), val=measured("blank", VAL, real)
    )  # fmt: skip
    assert found.drop.tolist() == [False, True, True, True, False]
    assert found.columns["contrast"][1] == found.columns["sharpness"][2] == 0


def test_images_unlike_the_words_for_their_class_are_dropped(tmp_path: Path) -> None:
    folder = str(save_clip(tmp_path))
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    fields = {"model": folder, "words": {"a": "cat", "b": "dog"}}
    val = measured("similarity", VAL, pixels, **fields)
    made = measured("similarity", MADE, pixels[:50], **fields)
    found = judge("similarity", made, val=val, quantile=0.5, **fields)
    for label in CLASSES:
        limit = np.median(val.measured["similarity"][VAL.labels == label])
        assert found.limits["similarity"][label] == pytest.approx(limit)
        of_class = MADE.labels == label
        below = made.measured["similarity"][of_class] < limit
        assert (found.drop[of_class] == below).all()
    assert judge("similarity", made, val=val, least=1, **fields).drop.all()
    assert not judge("similarity", made, val=val, least=-1, **fields).drop.any()


@pytest.mark.parametrize(
    ("match", "dropped"),
    [
        ("all", [False, True, True, True]), ("any", [False, False, False, True]),
        (("digit",), [False, False, True, True]), (("tone", "digit"), [False, True, True, True]),
    ],
)  # fmt: skip
def test_agreement_compares_the_tasks_that_it_names(match: Any, dropped: list[bool]) -> None:
    classes = ["0, dark", "0, light", "1, dark", "1, light"]
    agreement = Agreement(AgreementSpec(label_from="agree", match=match), classes)
    agreement.cells = {name: dict(zip(("digit", "tone"), name.split(", "), strict=True))
                   for name in classes}  # fmt: skip
    # All images are requested as "0, dark"; the labeler sees each class once.
    made = replace(
        images(4, 0), labels=np.asarray(["0, dark"] * 4, dtype=object),
        probabilities=np.eye(4, dtype=np.float32),
    )  # fmt: skip
    assert agreement.judge(made, made, made, np.ones(4, bool)).drop.tolist() == dropped
