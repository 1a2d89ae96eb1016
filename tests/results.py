"""Hand-written results, with default values for fields that a test does not need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.comparison.arms import Arm, SearchSpec, Trial
from engine.core.manifest import Manifest
from engine.core.spec import Spec
from engine.core.step import Step, Subject
from engine.nets.classification import Training
from engine.report.generators import GeneratorFit
from engine.report.results import ReportSpec, StudyResults, Trained
from engine.results.comparison import (
    AgainstBaseline,
    ArmFigure,
    ArmResult,
    ClassFigures,
    ConfirmResult,
    Contrast,
    Estimate,
    EvaluateResult,
    MeanInterval,
    OpenedTest,
    SearchResult,
    ValMean,
)
from engine.results.data import IngestResult
from engine.results.images import CurateResult, LabelerReport
from engine.study import Study

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


def against(name: str = "real", **fields: Any) -> AgainstBaseline:
    defaults: dict[str, Any] = {"effect": NOTHING, "bootstrap": NOTHING, "p": 1.0}
    return AgainstBaseline(against=name, **{**defaults, **fields})


def contrast(**fields: Any) -> Contrast:
    """Against one baseline with the same figures, unless `baselines` are given."""
    defaults: dict[str, Any] = {
        "arm": "g x1", "against": "real", "ratio": 1.0, "word": "undecided", "differences": [],
        "effect": NOTHING, "bootstrap": NOTHING, "low": -0.01, "high": 0.01, "p_helps": 1.0,
        "p_harms": 1.0,
        "equivalence_p": 1.0, "margin": 0.01, "detectable": None, "replicates": 5,
        "replicates_needed": None, "groups": 10, "groups_needed": 10, "obstacle": None,
        "effect_size": None, "wilcoxon_p": None, "near_low": 0.0, "near_high": 0.0,
        "grouped": False, "tries": 1, "tries_against": 1, "drawn": False, "mcnemar": [1.0],
        "recall_gain": [], "generator_fits": 1, "seeds": 5,
    }  # fmt: skip
    values = {**defaults, **fields}
    same = against(values["against"], effect=values["effect"], bootstrap=values["bootstrap"])
    return Contrast(**{"baselines": [same], **values})


def evaluate_result(**fields: Any) -> EvaluateResult:
    defaults: dict[str, Any] = {
        "objective": "macro_f1", "arms": {}, "baseline": "real", "contrasts": [],
        "budget": None, "saturation": {}, "test": OpenedTest(images=10, groups=10, opened=1),
    }  # fmt: skip
    return EvaluateResult(**{**defaults, **fields})


def search_result(**fields: Any) -> SearchResult:
    defaults: dict[str, Any] = {
        "objective": "macro_f1", "warnings": [], "trials": {}, "arms": {}, "chosen": [],
        "baseline": "real",
    }  # fmt: skip
    return SearchResult(**{**defaults, **fields})


def confirm_result(**fields: Any) -> ConfirmResult:
    return ConfirmResult(**{"trials": {}, "arms": {}, "twins": {}, **fields})


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


def manifest(
    kind: str, seconds: float = 1.0, held: tuple[tuple[int, float, float], ...] | None = None,
    **metrics: Any,
) -> Manifest:  # fmt: skip
    """held: workers, and CPUs and GPUs of each; or one with a CPU and a quarter of a GPU."""
    uses = ((1, 1.0, 0.25),) if held is None else held
    return Manifest(
        kind=kind, key="k", label=kind, spec={}, inputs={}, parts=(), rows=1, metrics=metrics,
        provenance={
            "seconds": seconds, "device": "cuda", "started": "2026", "versions": {"torch": "2"},
            "python": "3",
            "held": [{"workers": workers, "cpus": cpus, "gpus": gpus, "seconds": seconds}
                     for workers, cpus, gpus in uses],
        },
    )  # fmt: skip


def trained(
    name: str, generators: tuple[str, ...] = (), seconds: float = 1.0, fit: int = 0,
    ratio: float | None = 0.0, role: str = "baseline", stage: str = "confirm", **val: Any,
) -> Trained:  # fmt: skip
    """A classifier of the arm `name`, with the fields of its result on val."""
    arm = Arm(name=name, family=name.partition(" ")[0], mixes=("mix",), generators=generators,
              ratio=ratio, role=role)  # fmt: skip
    step = Step("train", Subject(name, number=fit), Spec(), {}, {})
    scores = {"per_class": {}, "confusion": [], "macro_f1": 0.5, **val}
    done = manifest("train", seconds, best_step=1, val=scores)
    return Trained(Trial(arm, fit, fit, step, stage), done, {"a": 1})


def generator_fit(name: str = "g", fit: int = 0, **fields: Any) -> GeneratorFit:
    """A fit of a generator with the fields of its curation."""
    curate = manifest("curate", **curated(**fields).model_dump(mode="json"))
    return GeneratorFit(name, fit, curate, manifest("generate"))


def toy_study(**fields: Any) -> Study:
    return Study.model_validate(
        {
            "name": "s", "reader": {"name": "digits"}, "preprocess": {"size": 16, "channels": "L"},
            "split": {"group": "none"}, "classifier": {"name": "small"},
            "generators": {
                "ddpm": {"name": "ddpm", "train_steps": 70}, "t": {"name": "traditional"},
            },
            "request": {"ratio": 2}, **fields,
        }
    )  # fmt: skip


def ingest_result(*classes: str) -> IngestResult:
    counts = {name: 10 + 30 * number for number, name in enumerate(classes)}
    return IngestResult(
        counts={split: dict(counts) for split in ("train", "val", "test")},
        carved=["val", "test"], near_limit={"fine": 0.9},
    )  # fmt: skip


def search_spec(*arms: Arm, fits: int = 1, seeds: int = 5) -> SearchSpec:
    return SearchSpec.model_construct(
        generator_fits=fits, seeds=tuple(range(fits * seeds)), arms=arms, training=Training(),
        classifier=toy_study().classifier, first_fit=0, first_seed=0,
    )  # fmt: skip


def study_results(
    study: Study | None = None, classes: tuple[str, ...] = ("a", "b"), **fields: Any
) -> StudyResults:
    """The results of a study, with as little in them as a section needs. The confirmation has the
    numbers of the choice."""
    study = study or toy_study()
    spec = ReportSpec.model_construct(
        study=study, preprocess=study.preprocess, task="class", target_classes="all", seed=0,
        generators=tuple(study.generators),
    )  # fmt: skip
    defaults: dict[str, Any] = {
        "spec": spec, "store": None, "inputs": {"evaluate": manifest("evaluate")},
        "ingest": ingest_result(*classes), "search_spec": search_spec(),
        "search": search_result(), "confirm": confirm_result(),
        "confirm_spec": fields.get("search_spec", search_spec()), "evaluate": evaluate_result(),
        "trials": (), "generators": {},
        "steps": (), "amounts": {},
    }  # fmt: skip
    return StudyResults(**{**defaults, **fields})
