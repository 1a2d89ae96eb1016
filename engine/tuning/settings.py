"""The section `tune` of a study."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from engine.core.registry import explain
from engine.core.spec import Spec, explained
from engine.tuning.proposals import Range

Fraction = Annotated[float, Field(gt=0, lt=1)]


def _as_knob(value: Any) -> Any:
    """A list of choices, or a range."""
    if isinstance(value, Range):
        return value
    if isinstance(value, dict):
        try:
            return Range.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise explained("{text}", text=explain(first), place=place or None) from None
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise explained("must be a list of at least two choices, or a range: {{low: 1, high: 3}}")
    return tuple(value)


class Tune(Spec):
    """The settings that `jobs/tune.py` tries; classifiers of one arm are compared on val."""

    # Maps fields of the study, written as for `--set`, to lists of choices or ranges.
    knobs: dict[str, Annotated[Any, BeforeValidator(_as_knob)]] = {}
    # The arm whose classifiers judge a setting, and their metric on val; objective None:
    # training.objective.
    arm: str | None = None
    objective: (
        Literal["macro_f1", "accuracy", "balanced_accuracy", "worst_class_recall", "roc_auc"] | None
    ) = None
    method: Literal["grid", "random", "optuna"] = "grid"
    # Number of settings for random and optuna; None: 20. A grid tries all.
    trials: Annotated[int, Field(ge=1, le=100_000)] | None = None
    # No further setting starts after this time.
    budget_hours: Annotated[float, Field(gt=0)] | None = None
    # Classifiers per setting, the first of search.seeds; None: all.
    seeds: Annotated[int, Field(ge=1, le=1000)] | None = None
    # asha: a setting's classifiers first train for few steps; the best 1/reduction_factor so far
    # continue with reduction_factor times as many.
    scheduler: Literal["none", "asha"] = "none"
    reduction_factor: Annotated[int, Field(ge=2, le=16)] = 3
    # Share of training.steps in the first of these trainings.
    grace: Fraction = 0.1
    # Number of settings this study was chosen from; written by jobs/tune.py.
    tried: Annotated[int, Field(ge=0)] = 0
