"""Hand-written results, with default values for fields that a test does not need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.results.comparison import (
    ArmFigure,
    ArmResult,
    ClassFigures,
    Contrast,
    Estimate,
    EvaluateResult,
    MeanInterval,
    OpenedTest,
    SearchResult,
    ValMean,
)
from engine.results.images import CurateResult, LabelerReport

NOTHING = Estimate(estimate=0.0, low=-0.01, high=0.01, p=1.0)


def estimate(value: float) -> Estimate:
    return NOTHING.model_copy(update={"estimate": value})


def interval(mean: float, low: float | None = None, high: float | None = None) -> MeanInterval:
    return MeanInterval(
        mean=mean, low=mean if low is None else low, high=mean if high is None else high
    )


def arm_figure(*replicates: float, low: float = 0.0, high: float = 1.0) -> ArmFigure:
    mean = sum(replicates) / len(replicates)
    return ArmFigure(mean=mean, low=low, high=high, replicates=list(replicates))


def arm_result(figures: Mapping[str, ArmFigure] | None = None, **fields: Any) -> ArmResult:
    defaults: dict[str, Any] = {
        "family": "real", "ratio": 0.0, "role": "baseline", "figures": dict(figures or {}),
        "per_class": {}, "confusion": [], "classifiers": {}, "reliability": [],
    }  # fmt: skip
    return ArmResult(**{**defaults, **fields})


def class_figures(**fields: Any) -> ClassFigures:
    defaults: dict[str, Any] = {
        "precision": 0.5, "recall": 0.5, "f1": 0.5, "images": 10, "f1_interval": interval(0.5),
    }  # fmt: skip
    return ClassFigures(**{**defaults, **fields})


def contrast(**fields: Any) -> Contrast:
    defaults: dict[str, Any] = {
        "arm": "g x1", "against": "real", "ratio": 1.0, "word": "undecided", "differences": [],
        "effect": NOTHING, "bootstrap": NOTHING, "low": -0.01, "high": 0.01, "p_adjusted": 1.0,
        "equivalence_p": 1.0, "margin": 0.01, "detectable": None, "replicates": 5,
        "replicates_needed": None, "groups": 10, "groups_needed": 10, "obstacle": None,
        "effect_size": None, "wilcoxon_p": None, "near_low": 0.0, "near_high": 0.0,
        "grouped": False, "tries": 1, "tries_against": 1, "drawn": False, "mcnemar": [],
        "recall_gain": [], "generator_fits": 1, "seeds": 5,
    }  # fmt: skip
    return Contrast(**{**defaults, **fields})


def evaluate_result(**fields: Any) -> EvaluateResult:
    defaults: dict[str, Any] = {
        "objective": "macro_f1", "arms": {}, "baseline": "real", "contrasts": [],
        "budget": None, "saturation": {}, "test": OpenedTest(images=10, groups=10, opened=1),
    }  # fmt: skip
    return EvaluateResult(**{**defaults, **fields})


def search_result(**fields: Any) -> SearchResult:
    defaults: dict[str, Any] = {
        "objective": "macro_f1", "warnings": [], "trials": {}, "arms": {}, "chosen": [],
        "baseline": "real", "twins": {},
    }  # fmt: skip
    return SearchResult(**{**defaults, **fields})


def val_mean(mean: float, sd: float = 0.01) -> ValMean:
    return ValMean(mean=mean, sd=sd)


def labeler_report(**fields: Any) -> LabelerReport:
    defaults: dict[str, Any] = {
        "agreement": 0.9, "agreement_kept": 0.9, "agreement_val": 0.9, "confusion": [],
        "confusion_val": [],
    }  # fmt: skip
    return LabelerReport(**{**defaults, **fields})


def curated(**fields: Any) -> CurateResult:
    return CurateResult(**{"funnel": {}, **fields})
