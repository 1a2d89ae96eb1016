from __future__ import annotations

import numpy as np
import pytest

from engine.report.sections.confusion import confusion, most_confused
from tests.results import arm_result, evaluate_result, study_results, trained


def test_of_many_classes_the_worst_pairs_are_told_in_place_of_a_matrix() -> None:
    matrix = np.eye(40, dtype=int) * 9
    matrix[3, 7], matrix[5, 2] = 3, 1
    names = tuple(f"k{number:02d}" for number in range(40))
    pairs = most_confused(matrix, names)
    assert [(pair.true, pair.predicted, pair.count) for pair in pairs] == [
        ("k03", "k07", 3), ("k05", "k02", 1)
    ]  # fmt: skip
    assert pairs[0].share == pytest.approx(0.25)
    results = study_results(
        ingest=study_results().ingest.model_copy(
            update={"counts": {"train": dict.fromkeys(names, 1)}}
        ),
        trials=(trained("real", confusion=matrix.tolist()),),
        evaluate=evaluate_result(arms={"real": arm_result(confusion=matrix.tolist())}),
    )
    section = confusion(results)
    assert 'class="matrix"' not in section.html
    assert section.html.count("k07") == 1
    assert len(section.tables["confusion"]) == 2 * 42
