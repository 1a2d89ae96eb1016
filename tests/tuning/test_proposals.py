"""Which settings are tried, in which order, and which continue."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from engine.tuning.proposals import Halving, Proposals, Range, Settings, Space, grid
from engine.tuning.settings import Tune

SPACE: Space = {
    "rate": Range(low=1e-4, high=1e-1, log=True),
    "kind": ("a", ["b", 2], None),
    "count": Range(low=2, high=5, integer=True),
}


def asked(proposals: Proposals) -> list[Settings]:
    return [settings for _, settings in iter(proposals.ask, None)]


def optimum(settings: Settings) -> float:
    """Highest at rate 0.01 and kind a."""
    return -abs(settings["rate"] - 0.01) - (settings["kind"] != "a")


def test_grid_has_every_combination_after_the_study_itself() -> None:
    space: Space = {"a": (1, 2), "b": Range(low=0.1, high=0.3, step=0.1)}
    settings = grid(space)
    assert [(one["a"], one["b"]) for one in settings] == [
        (a, b) for a in (1, 2) for b in (0.1, 0.2, 0.3)
    ]
    assert asked(Proposals(space, "grid", len(settings), seed=1)) == [{}, *settings]


def test_range_without_steps_has_no_grid() -> None:
    with pytest.raises(ValueError, match="rate"):
        grid(SPACE)
    assert Range(low=2, high=5, integer=True).all() == (2, 3, 4, 5)


def test_draws_are_in_range_and_follow_the_seed() -> None:
    settings = asked(Proposals(SPACE, "random", 300, seed=4))[1:]
    assert settings == asked(Proposals(SPACE, "random", 300, seed=4))[1:]
    assert settings != asked(Proposals(SPACE, "random", 300, seed=5))[1:]
    rates = sorted(one["rate"] for one in settings)
    assert 1e-4 <= rates[0] <= rates[-1] <= 1e-1
    # On a logarithmic scale: as many below the geometric mean as above.
    assert 2e-3 < rates[150] < 5e-3
    assert {one["count"] for one in settings} == {2, 3, 4, 5}
    assert {str(one["kind"]) for one in settings} == {"a", "['b', 2]", "None"}
    # More trials begin with fewer.
    assert asked(Proposals(SPACE, "random", 10, seed=4)) == [{}, *settings[:10]]


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({"low": 1, "high": 2, "step": 0.3}, {1.0, 1.3, 1.6, 1.9}),
        ({"low": 1, "high": 7, "step": 3, "integer": True}, {1, 4, 7}),
        ({"low": 1, "high": 3, "log": True, "integer": True}, {1, 2, 3}),
    ],
)
def test_steps_and_integers(fields: dict[str, Any], numbers: set[float]) -> None:
    knob = Range(**fields)
    drawn = {knob.at(share / 100) for share in range(100)}
    assert drawn == numbers
    assert knob.ends() == (min(numbers), max(numbers))
    assert all(isinstance(value, int) == knob.integer for value in drawn)


@pytest.mark.parametrize(
    ("knob", "why"),
    [
        ({"low": 2, "high": 1}, "high must be above low"),
        ({"low": 0, "high": 1, "log": True}, "log needs low above 0"),
        ({"low": 0, "high": 1, "step": 2}, "step must be"),
        ({"low": 0.5, "high": 3, "integer": True}, "whole numbers"),
        ({"low": 1, "hihg": 3}, "no such field"),
        ([1], "at least two choices"),
        (3, "at least two choices"),
    ],
)
def test_invalid_knob_is_rejected(knob: Any, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Tune(knobs={"x": knob})


def test_optuna_continues_after_a_kill_as_without_one() -> None:
    pytest.importorskip("optuna")

    def search(count: int, known: dict[int, Settings]) -> list[Settings]:
        settings = []
        proposals = Proposals(SPACE, "optuna", count, seed=2, known=known, on_new=known.__setitem__)
        while (one := proposals.ask()) is not None:
            settings.append(one[1])
            proposals.tell(one[0], optimum(one[1]) if one[0] else None)
        return settings[1:]

    whole = search(40, {})
    assert len(whole) == 40
    late, early = (sum(map(optimum, part)) for part in (whole[-10:], whole[:10]))
    assert late > early + 1
    known: dict[int, Settings] = {}
    search(15, known)
    assert set(known) == set(range(1, 16))
    assert search(40, known) == whole


def test_failed_setting_does_not_guide_optuna() -> None:
    pytest.importorskip("optuna")
    proposals = Proposals(SPACE, "optuna", 3, seed=2)
    for _ in range(4):
        number, _ = proposals.ask() or (-1, {})
        proposals.tell(number, None)
    assert proposals.ask() is None


def test_nothing_is_proposed_after_the_end() -> None:
    left = [False, False, True]
    proposals = Proposals(SPACE, "random", 9, seed=1, ended=lambda: left.pop(0))
    assert len(asked(proposals)) == 2


def test_halving_multiplies_steps_and_continues_the_best() -> None:
    halving = Halving(grace=10, reduction_factor=3, most=100)
    assert halving.rungs() == [10, 30, 90, 100]
    assert Halving(100, 3, 100).rungs() == [100]
    assert halving.goes_on(0.1, [])
    assert halving.goes_on(0.9, [0.1, 0.5, 0.8])
    assert not halving.goes_on(0.5, [0.1, 0.5, 0.8])
