"""Sentences: one for each code, with the figures that its notices have."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import get_args

import pytest

from engine.core.notice import Code, Notice
from engine.results.comparison import Effect, OpenedTest
from engine.wording import (
    SENTENCES,
    detectable_in_words,
    notice_in_words,
    opened_in_words,
    range_in_words,
    replicates_in_words,
    verdict_in_words,
    what_would_settle,
    word_in_words,
)
from tests.results import against, contrast, estimate

ENGINE = Path(__file__).parents[1] / "engine"


def given() -> Iterator[tuple[str, set[str]]]:
    """Code and fields of every notice that the engine makes."""
    for path in sorted(ENGINE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Notice.of":
                yield ast.literal_eval(node.args[0]), {str(word.arg) for word in node.keywords}


def test_every_code_has_a_sentence_and_is_in_use() -> None:
    assert set(SENTENCES) == set(get_args(Code)) == {"recorded", *(code for code, _ in given())}


@pytest.mark.parametrize(("code", "fields"), list(given()))
def test_notice_has_the_fields_of_its_sentence(code: Code, fields: set[str]) -> None:
    assert {name for _, name, _, _ in Formatter().parse(SENTENCES[code]) if name} == fields


def test_figures_are_rounded_in_the_sentence() -> None:
    notice = Notice.of("near_train", percent=12.34, low=5.0, high=20.0, farther=99.0, most=2.5)
    assert notice_in_words(notice) == (
        "12.3% of the kept images (5.0 to 20.0) are nearer to a training image than 99% of val"
        " images; of images as far from train as val is, 95 of 100 sets would have at most 2.5%"
    )
    few = Notice.of("few_for_frechet", images=1200, least=2048)
    assert "of 1,200 images (fewer than 2,048)" in notice_in_words(few)
    long = Notice.of("one_group", classes="x" * 500)
    assert notice_in_words(long).count("x") == 200


def test_obstacle_says_what_would_settle_it() -> None:
    stopped = contrast(obstacle=Notice.of("few_replicates", replicates=3, minimum=5))
    assert what_would_settle(stopped) == "too few replicates: 3 (minimum 5)"
    undecided = contrast(groups=100, groups_needed=1200, replicates=5, replicates_needed=12)
    assert what_would_settle(undecided) == (
        "finding a difference of 1 point, the study's margin, would take about 1,200 test images"
        " (here 100) together with about 12 seeds (here 5)"
    )
    beyond = contrast(groups=100, groups_needed=None, replicates_needed=None)
    assert what_would_settle(beyond).endswith(
        "would take more than 100 times the test data or 200 replicates"
    )
    enough = contrast(groups=100, groups_needed=100, replicates=5, replicates_needed=5)
    assert what_would_settle(enough).endswith("would take no more than this study has")


def test_verdict_has_a_sentence_for_each_contrast() -> None:
    helps = contrast(word="helps", effect=estimate(0.031), low=0.02, high=0.04, generator_fits=5,
                     baselines=[against("real"), against("cutmix")])  # fmt: skip
    small = contrast(word="harms", effect=estimate(-0.004), low=-0.006, high=-0.001)
    text = verdict_in_words([helps, small], "macro_f1", "real")
    assert (
        "g x1 helps: macro_f1 +3.1 points compared with real, the baseline that is hardest to beat,"
        " 95% interval +2.0 to +4.0"
    ) in text
    assert (
        "g x1 harms with this one trained generator, by less than the 1 point that the study calls"
        " relevant: macro_f1 -0.4 points"
    ) in text
    drawn = contrast(word="helps", effect=estimate(0.031), drawn=True)
    assert "helps with this one draw of images:" in verdict_in_words([drawn], "macro_f1", "real")
    equivalent = contrast(word="equivalent", near_low=-0.005, near_high=0.004)
    assert "no difference beyond ±1 point:" in verdict_in_words([equivalent], "macro_f1", "real")
    assert "90% interval -0.5 to +0.4" in verdict_in_words([equivalent], "macro_f1", "real")
    assert "no synthetic arm was compared" in verdict_in_words([], "macro_f1", "real")


def test_replicates_are_called_what_they_are() -> None:
    assert replicates_in_words(contrast(generator_fits=1, seeds=5)) == (
        "5 classifier seeds, conditional on one generator"
    )
    assert replicates_in_words(contrast(generator_fits=5, seeds=1)) == "5 generator fits"
    drawn = contrast(generator_fits=5, seeds=2, drawn=True)
    assert replicates_in_words(drawn).startswith("5 draws of images with 2 classifier seeds each")


def test_a_range_is_told_as_lower_and_higher() -> None:
    assert range_in_words(contrast(low=-0.018, high=0.006)) == "1.8 points lower to 0.6 higher"
    assert range_in_words(contrast(low=0.006, high=0.018)) == "0.6 to 1.8 points higher"
    assert range_in_words(contrast(low=-0.018, high=-0.006)) == "0.6 to 1.8 points lower"


def test_what_a_study_notices_is_a_rough_estimate() -> None:
    known = contrast(detectable=0.0234, detectable_low=0.014, detectable_high=0.0671)
    assert detectable_in_words(known) == (
        "a study of this size would probably notice about 2.3 points (a rough estimate from 5"
        " replicates; 95% interval 1.4 to 6.7)"
    )
    assert detectable_in_words(contrast(detectable=None)) == ""
    most = contrast(detectable=0.04, detectable_low=0.04, detectable_high=0.04, possible=0.04)
    assert detectable_in_words(most).startswith(
        "a study of this size would probably not notice even the largest possible difference, 4.0"
    )
    open_end = known.model_copy(update={"possible": 0.05, "detectable_high": 0.05})
    assert detectable_in_words(open_end).endswith("95% interval 1.4 to more than is possible)")


def test_a_twin_s_verdict_is_not_that_of_the_study() -> None:
    better = contrast(word="helps", twin=True, generator_fits=5, effect=estimate(0.03))
    assert word_in_words(better) == "is better than its unfiltered twin"
    assert word_in_words(better.model_copy(update={"word": "harms"})).startswith(
        "is worse than its"
    )
    same = better.model_copy(update={"word": "equivalent"})
    assert word_in_words(same) == "differs from its unfiltered twin by no more than ±1 point"


def test_draws_of_one_generator_are_no_fits() -> None:
    drawn = contrast(word="helps", drawn=True, generator_fits=5, effect=estimate(0.03))
    assert word_in_words(drawn) == "helps with this one generator"


def test_an_equivalent_arm_has_the_range_of_its_tests() -> None:
    same = contrast(word="equivalent", low=-0.02, high=0.02, near_low=-0.009, near_high=0.008)
    assert range_in_words(same) == "0.9 points lower to 0.8 higher"


def test_openings_are_told_by_images_and_studies() -> None:
    some = OpenedTest(images=1500, groups=1500, opened=3, opened_before=1200)
    assert opened_in_words(some) == (
        "1,200 of the 1,500 test images were opened by 2 other studies in this storage too"
    )
    every = OpenedTest(images=10, groups=10, opened=2, opened_before=10)
    assert opened_in_words(every) == (
        "all test images were opened by another study in this storage too"
    )


def test_limiting_budget_is_reported() -> None:
    short = Effect(estimate=0.1, low=0.05, high=0.15)
    assert "raise training.steps" in verdict_in_words([], "macro_f1", "real", short)
    enough = Effect(estimate=0.0, low=-0.1, high=0.1)
    assert "Warning" not in verdict_in_words([], "macro_f1", "real", enough)
