"""Sentences: one for each code, with the figures that its notices have."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import get_args

import pytest

from engine.core.notice import Code, Notice
from engine.wording import (
    SENTENCES,
    notice_in_words,
    replicates_in_words,
    verdict_in_words,
    what_would_settle,
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
    notice = Notice.of("near_train", percent=12.34, low=5.0, high=20.0, farther=99.0, expected=1.0)
    assert notice_in_words(notice) == (
        "12.3% of the kept images (5.0 to 20.0) are nearer to a training image than 99% of val"
        " images; 1% are expected"
    )
    few = Notice.of("few_for_frechet", images=1200, least=2048)
    assert "of 1,200 images (fewer than 2,048)" in notice_in_words(few)
    long = Notice.of("one_group", classes="x" * 500)
    assert notice_in_words(long).count("x") == 200


def test_obstacle_says_what_would_settle_it() -> None:
    stopped = contrast(obstacle=Notice.of("few_replicates", replicates=3, minimum=5))
    assert what_would_settle(stopped) == "too few replicates: 3 (minimum 5)"
    undecided = contrast(groups=100, groups_needed=1200, replicates=5, replicates_needed=None)
    assert what_would_settle(undecided) == (
        "finding a difference of 1 point, the study's margin, would take at least about 1,200 test"
        " images (here 100) and more than 1,000 seeds (here 5)"
    )
    enough = contrast(groups=100, groups_needed=50, replicates=5, replicates_needed=4)
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
