"""Proposals of settings for a tuning, and the rule that stops poor ones early.

A setting is a value for each knob. The proposals follow from the seed, and with Optuna also from
the results so far.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import model_validator

from engine.core.rng import derive_seed, generator
from engine.core.spec import Spec, explained

Settings = dict[str, Any]
Method = Literal["grid", "random", "optuna"]


class Range(Spec):
    """Numbers from low to high, both included.

    log: uniform in the logarithm. step: multiples from low. integer: whole numbers.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False

    @model_validator(mode="after")
    def _possible(self) -> Range:
        if self.high <= self.low:
            raise explained("high must be above low")
        if self.log and (self.low <= 0 or self.step is not None):
            raise explained("log needs low above 0 and no step")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise explained("step must be above 0 and at most high - low")
        ends = (self.low, self.high, self.step or 1)
        if self.integer and not all(float(end).is_integer() for end in ends):
            raise explained("integer needs whole numbers: low, high, step")
        return self

    def at(self, share: float) -> float:
        """The number at a position in the range. share: from 0 to below 1."""
        step = self.step or (1.0 if self.integer else None)
        if self.log:
            # Half a unit wider, so that rounding draws the first and last number as often.
            low, high = (self.low - 0.5, self.high + 0.5) if self.integer else (self.low, self.high)
            value = math.exp(math.log(low) + share * math.log(high / low))
            value = min(max(round(value), self.low), self.high) if self.integer else value
        elif step is not None:
            places = math.floor((self.high - self.low) / step + 1e-9) + 1
            value = self.low + math.floor(share * places) * step
        else:
            value = self.low + share * (self.high - self.low)
        return self.number(value)

    def number(self, value: float) -> float:
        # 0.1 + 2 * 0.1 is 0.30000000000000004, which is hard to read and has another key than 0.3.
        digits = 6 if self.step is None else 12
        return round(value) if self.integer else float(f"{value:.{digits}g}")

    def ends(self) -> tuple[float, float]:
        return self.number(self.low), self.at(1 - 1e-12)

    def all(self) -> tuple[float, ...]:
        """Every number of a range with steps; empty for a continuous range."""
        step = self.step or (1.0 if self.integer and not self.log else None)
        if step is None:
            return ()
        places = math.floor((self.high - self.low) / step + 1e-9) + 1
        return tuple(self.number(self.low + place * step) for place in range(places))


Space = Mapping[str, tuple[Any, ...] | Range]


def grid(space: Space) -> list[Settings]:
    """Every setting; the last knob changes fastest. Raises `ValueError` with the name of a knob
    that is continuous."""
    for name, knob in space.items():
        if isinstance(knob, Range) and not knob.all():
            raise ValueError(name)
    values = [knob.all() if isinstance(knob, Range) else knob for knob in space.values()]
    return [dict(zip(space, chosen, strict=True)) for chosen in itertools.product(*values)]


def draw(space: Space, random: np.random.Generator) -> Settings:
    """A random setting; the knobs are independent."""
    shares = random.random(len(space))
    return {
        name: knob.at(float(share))
        if isinstance(knob, Range)
        else knob[int(share * len(knob))]
        for (name, knob), share in zip(space.items(), shares, strict=True)
    }  # fmt: skip


class Proposals:
    """Numbered settings: 0 changes nothing (the study as it is); then `count` settings of `method`.

    known: settings of an earlier run by number, which are proposed again. on_new: called with the
    number and values of each new setting. ended: whether to stop proposing.
    """

    def __init__(
        self,
        space: Space,
        method: Method,
        count: int,
        seed: int,
        *,
        known: Mapping[int, Settings] | None = None,
        on_new: Callable[[int, Settings], None] | None = None,
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        self.space, self.seed, self.count = space, seed, count
        self.known, self.on_new, self.ended = dict(known or {}), on_new, ended
        self.number = 0
        self.listed = grid(space) if method == "grid" else None
        self.optuna = _Optuna(space, seed) if method == "optuna" else None

    def ask(self) -> tuple[int, Settings] | None:
        """The number and values of the next setting, or None after the last."""
        number = self.number
        if number > self.count or self.ended():
            return None
        self.number += 1
        if number == 0:
            return 0, {}
        settings = self.known.get(number)
        if self.optuna is not None:
            settings = self.optuna.ask(number, settings)
        elif settings is None and self.listed is not None:
            settings = self.listed[number - 1]
        elif settings is None:
            settings = draw(self.space, generator(self.seed, "setting", number))
        if self.on_new is not None and number not in self.known:
            self.on_new(number, settings)
        return number, settings

    def tell(self, number: int, value: float | None) -> None:
        """Record the value of a setting; None if it failed."""
        if self.optuna is not None and number:
            self.optuna.tell(number, value)


class _Optuna:
    """Optuna's TPE (Bergstra et al. 2011), whose draws follow from the seed and the number."""

    def __init__(self, space: Space, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.seed = space, seed
        self.study = optuna.create_study(direction="maximize")
        self.trials: dict[int, Any] = {}
        self.distributions: dict[str, Any] = {}
        for name, knob in space.items():
            if isinstance(knob, Range) and knob.integer:
                step = 1 if knob.log else int(knob.step or 1)
                low, high = int(knob.low), int(knob.high)
                distribution: Any = optuna.distributions.IntDistribution(low, high, knob.log, step)
            elif isinstance(knob, Range):
                distribution = optuna.distributions.FloatDistribution(
                    knob.low, knob.high, knob.log, knob.step
                )
            else:
                # By index, because Optuna accepts no list as a choice.
                distribution = optuna.distributions.CategoricalDistribution(range(len(knob)))
            self.distributions[name] = distribution

    def ask(self, number: int, known: Settings | None) -> Settings:
        import optuna

        # constant_liar: running settings count as bad ones, so that none is proposed twice.
        with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning):
            warnings.simplefilter("ignore")
            self.study.sampler = optuna.samplers.TPESampler(
                seed=derive_seed(self.seed, "setting", number) % 2**32, constant_liar=True
            )
        if known is not None:
            self.study.enqueue_trial(self._parameters(known))
        trial = self.trials[number] = self.study.ask(self.distributions)
        return {
            name: knob.number(trial.params[name])
            if isinstance(knob, Range)
            else knob[trial.params[name]]
            for name, knob in self.space.items()
        }  # fmt: skip

    def _parameters(self, settings: Settings) -> dict[str, Any]:
        """A setting in Optuna's form, with choices by index."""
        return {
            name: value if isinstance(knob := self.space[name], Range) else knob.index(value)
            for name, value in settings.items()
        }

    def tell(self, number: int, value: float | None) -> None:
        import optuna

        failed = optuna.trial.TrialState.FAIL if value is None else None
        self.study.tell(self.trials.pop(number), value, failed)


class Rung(NamedTuple):
    """The value of a setting after a number of optimizer steps."""

    steps: int
    value: float


class Halving(NamedTuple):
    """Asynchronous successive halving (ASHA, Li et al. 2020): the budgets of a setting, and the
    rule for promotion. grace: optimizer steps of the first budget. most: of the last."""

    grace: int
    reduction_factor: int
    most: int

    def rungs(self) -> list[int]:
        """The budgets in optimizer steps, rising."""
        budgets, steps = [], self.grace
        while steps < self.most:
            budgets.append(steps)
            steps *= self.reduction_factor
        return [*budgets, self.most]

    def goes_on(self, value: float, before: Sequence[float]) -> bool:
        """Whether a value is among the best 1/reduction_factor of the values before it at this
        budget, by the rule of Ray's scheduler."""
        cut = 100 * (1 - 1 / self.reduction_factor)
        return not before or value >= float(np.percentile(before, cut))
