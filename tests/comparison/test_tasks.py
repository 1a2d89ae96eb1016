"""Figures of several tasks from predictions."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import accuracy_score, f1_score

from engine.comparison.figures import TaskFigures
from engine.comparison.joint import joint_result
from engine.comparison.subgroups import part_of
from engine.comparison.tasks import targets_of, task_predictions
from engine.comparison.verdict import DeclaredContrast, compare
from engine.core import rows
from engine.core.labels import LabelSpace, TaskLabels
from engine.results.data import IngestResult
from engine.settings import Evaluate
from tests.results import contrast

SPACE = LabelSpace(
    {
        "way": TaskLabels(kind="single", classes=("a", "b", "c"), weight=3),
        "signs": TaskLabels(kind="multi", classes=("x", "y")),
    },
    {"a, x": {"way": "a", "signs": ("x",)}, "b, none": {"way": "b", "signs": ()}},
)
SEEDS = 5


def images(count: int, unlabelled: slice = slice(0), groups: int = 60) -> pa.Table:
    """Images with labels of both tasks; those in `unlabelled` have no way."""
    random = np.random.default_rng(0)
    ways = random.choice(["a", "b", "c"], count).tolist()
    ways[unlabelled] = [None] * len(ways[unlabelled])
    signs = [[name for name in "xy" if random.random() < 0.4] for _ in range(count)]
    cells = ["a, x" if pair == ("a", ["x"]) else "?" for pair in zip(ways, signs, strict=True)]
    return pa.table(
        {
            rows.GROUP_ID: [f"{number % groups:03d}" for number in range(count)],
            "label.way": pa.array(ways, pa.string()),
            "label.signs": pa.array(signs, pa.list_(pa.string())),
            "label.cell": cells,
        }
    )


def probabilities(table: pa.Table, skill: float, seed: int) -> np.ndarray:
    """Of five classifiers, float32 (5, n, 5): the more skill, the nearer to the truth."""
    random = np.random.default_rng(seed)
    truth = np.nan_to_num(targets_of(table, SPACE))
    values = skill * truth + random.random((SEEDS, *truth.shape))
    values[..., :3] /= values[..., :3].sum(-1, keepdims=True)
    values[..., 3:] /= 1 + skill
    return values.astype(np.float32)


def figures(table: pa.Table, **arms: float) -> TaskFigures:
    made = {arm: probabilities(table, skill, number)
            for number, (arm, skill) in enumerate(arms.items())}  # fmt: skip
    limits = dict.fromkeys(made, np.full((SEEDS, 5), 0.5))
    groups = np.asarray(table[rows.GROUP_ID].to_pylist())
    predictions = task_predictions(SPACE, targets_of(table, SPACE), groups, made, limits, 1)
    return TaskFigures.of_predictions(predictions, 0)


def test_figures_are_weighted_means_of_those_of_scikit_learn() -> None:
    table = images(300, slice(0, 60))
    values = probabilities(table, 1.0, 0)
    truth = targets_of(table, SPACE)
    labelled = np.isfinite(truth[:, 0])
    expected = []
    for of_classifier in values:
        way = f1_score(truth[labelled, :3].argmax(1), of_classifier[labelled, :3].argmax(1),
                       average="macro")  # fmt: skip
        signs = f1_score(truth[:, 3:] > 0, of_classifier[:, 3:] >= 0.5, average="macro")
        expected.append(0.75 * way + 0.25 * signs)
    found = figures(table, real=1.0)
    assert found.mean("real", "macro_f1").mean == pytest.approx(np.mean(expected))
    np.testing.assert_allclose(found.replicates("real", "macro_f1"), expected)
    np.testing.assert_allclose(found.predictions.objective("real", "macro_f1"), expected)


def test_resampled_scores_of_the_mean_are_the_mean_of_the_tasks() -> None:
    found = figures(images(300, slice(0, 60)), real=1.0)
    scores = found.predictions.scores("real", "macro_f1")
    weights = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), 7).astype(float)
    parts = {name: part.scores("real", "macro_f1")(weights)
             for name, part in found.predictions.tasks.items()}  # fmt: skip
    np.testing.assert_allclose(scores(weights), 0.75 * parts["way"] + 0.25 * parts["signs"])


def test_verdict_rests_on_the_mean_and_each_task_has_its_own_difference() -> None:
    found = figures(images(600), real=0.3, better=1.5)
    (judged,) = compare(
        found, [DeclaredContrast("better", ("real",), "real", "real")], "macro_f1", Evaluate()
    )
    assert judged.word == "helps"
    gains = {name: part.difference("better", "real", "macro_f1").estimate
             for name, part in found.tasks.items()}  # fmt: skip
    assert judged.effect.estimate == pytest.approx(0.75 * gains["way"] + 0.25 * gains["signs"])
    assert len(judged.recall_gain) == len(SPACE.outputs)


def test_task_that_is_labelled_in_few_groups_limits_the_groups() -> None:
    table = images(300)
    ways = [way if number % 60 < 8 else None
            for number, way in enumerate(table["label.way"].to_pylist())]  # fmt: skip
    few = table.set_column(1, "label.way", pa.array(ways, pa.string()))
    found = figures(few, real=0.5, better=0.6)
    assert found.predictions.effective_groups() == pytest.approx(8)
    (judged,) = compare(
        found, [DeclaredContrast("better", ("real",), "real", "real")], "accuracy", Evaluate()
    )
    assert judged.obstacle is not None
    assert judged.word == "undecided"


def test_task_whose_images_are_in_one_block_of_groups_has_an_area() -> None:
    table = images(40, groups=20)
    ways = [("a", "b", "c")[number // 20 % 3] if number % 20 == 0 else None for number in range(40)]
    one = table.set_column(1, "label.way", pa.array(ways, pa.string()))
    figure = figures(one, real=1.0).mean("real", "roc_auc")
    assert np.isfinite([figure.mean, figure.low, figure.high]).all()


def test_images_without_all_labels_have_no_joint_figures() -> None:
    table = images(60, slice(0, 60))
    made = {"real": probabilities(table, 1.0, 0)}
    limits = {"real": np.full((SEEDS, 5), 0.5)}
    data = IngestResult(counts={"train": {"a, x": 3}})
    result = joint_result(table, "cell", data, SPACE, made, limits)
    assert (result.images, result.exact, result.combinations) == (0, {}, [])


def test_joint_figures_count_images_with_all_labels_right() -> None:
    table = images(300)
    made, limits = {"real": probabilities(table, 1.0, 0)}, {"real": np.full((SEEDS, 5), 0.5)}
    result = joint_result(
        table, "cell", IngestResult(counts={"train": {"a, x": 3}}), SPACE, made, limits
    )
    truth = targets_of(table, SPACE)
    right = [
        (values[:, :3].argmax(1) == truth[:, :3].argmax(1))
        & ((values[:, 3:] >= 0.5) == (truth[:, 3:] > 0)).all(1)
        for values in made["real"]
    ]
    assert result.exact["real"] == pytest.approx(np.mean(right))
    (combination,) = result.combinations
    own = np.asarray(table["label.cell"].to_pylist()) == "a, x"
    assert (combination.name, combination.train, combination.images) == ("a, x", 3, own.sum())
    assert combination.right["real"] == pytest.approx(np.mean(np.asarray(right)[:, own]))


def test_part_without_a_task_is_scored_by_the_others() -> None:
    table = images(200, slice(0, 100))
    found = figures(table, real=1.0, better=1.5)
    part = found.of_images(np.arange(100))
    pair = contrast(arm="better", against="real")
    scores = part_of(part, "device", "d", [pair], "accuracy").scores
    truth = targets_of(table, SPACE)[:100, 3:] > 0
    values = probabilities(table, 1.0, 0)[:, :100, 3:] >= 0.5
    expected = np.mean([accuracy_score(truth.ravel(), one.ravel()) for one in values])
    assert scores["real"].mean == pytest.approx(expected)
