"""The trained models with the locations of their weights, and the cost of the study."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.comparison.arms import MixSpec, optimizer_steps
from engine.core.manifest import Manifest
from engine.core.registry import PluginField, kind_of
from engine.core.spec import Spec
from engine.core.step import Step
from engine.report.download import Row
from engine.report.page import Section, render
from engine.report.results import FIGURES, StudyResults, Trained
from engine.results.comparison import TrainResult
from engine.results.images import FinetuneResult

_WORDS = {
    "ingest": "ingesting the data", "embed": "embedding real images", "cluster": "clustering",
    "select": "choosing representatives", "reduce": "reducing dominant classes",
    "train": "training classifiers of the comparison", "labeler": "training the labeler",
    "vote": "training voters on labels",
    "measure": "measuring val", "request": "planning images", "finetune": "training generators",
    "generate": "generating images", "curate": "curating images", "mix": "composing arms",
    "fidelity": "measuring fidelity", "evaluate": "testing",
}  # fmt: skip
# Steps that compute on the profile's device.
_ON_DEVICE = ("embed", "train", "labeler", "measure", "finetune", "generate", "curate", "evaluate",
              "fidelity")  # fmt: skip
_MAKING = ("request", "finetune", "generate", "curate")


@dataclass(frozen=True)
class Hours:
    """Wall-clock, CPU and GPU hours of some steps; None if a step did not record its resources."""

    wall: float
    cpu: float | None
    gpu: float | None

    @classmethod
    def of(cls, manifest: Manifest) -> Hours:
        wall, resources = manifest.provenance["seconds"] / 3600, manifest.provenance.get("held")
        if resources is None:
            return cls(wall, None, None)
        return cls(wall, *(
            sum(use["workers"] * use[what] * use["seconds"] for use in resources) / 3600
            for what in ("cpus", "gpus")
        ))  # fmt: skip

    @classmethod
    def total(cls, manifests: Iterable[Manifest]) -> Hours:
        every = [cls.of(manifest) for manifest in manifests]
        known = all(part.cpu is not None for part in every)
        return cls(
            sum(part.wall for part in every),
            sum(part.cpu or 0.0 for part in every) if known else None,
            sum(part.gpu or 0.0 for part in every) if known else None,
        )

    @property
    def columns(self) -> Row:
        return {"wall_hours": self.wall, "cpu_hours": self.cpu, "gpu_hours": self.gpu}


@dataclass(frozen=True)
class TimedStep:
    """A finished step and its kind of work: a `train` step of the plan trains the labeler."""

    work: str
    step: Step
    manifest: Manifest


def models(results: StudyResults) -> Section:
    """Each model that the study trained. Each arm is represented by its best classifier on val."""
    entries = model_rows(results)
    return Section(
        render("models.html", results=results, models=entries),
        {"weights": entries, "trials": [trial_row(results, item) for item in results.trials]},
        timed=("trials",),
    )


def cost(results: StudyResults) -> Section:
    """Hours by kind of work, and hours of image generation per point gained."""
    timed = timed_steps(results)
    kinds: dict[str, list[Manifest]] = {work: [] for work in _WORDS}
    for entry in timed:
        kinds.setdefault(entry.work, []).append(entry.manifest)
    costs = [cost_row(work, manifests) for work, manifests in kinds.items() if manifests]
    prices = price_rows(results, timed)
    html = render(
        "cost.html", costs=costs, prices=prices, objective=results.objective,
        total=Hours.total(entry.manifest for entry in timed),
    )  # fmt: skip
    return Section(html, {"cost": costs, "prices": prices}, timed=("cost", "prices"))


def timed_steps(results: StudyResults) -> list[TimedStep]:
    """Every finished step and every trial; the search's own time is that of its trials."""
    steps = [
        TimedStep(_work_of(step), step, manifest)
        for step, manifest in results.steps
        if step.kind not in ("search", "confirm")
    ]
    return steps + [TimedStep("train", item.trial.step, item.manifest) for item in results.trials]


def _work_of(step: Step) -> str:
    """The kind of work of a step of the plan."""
    if step.kind != "train":
        return step.kind
    return "labeler" if step.subject.name == "labeler" else "vote"


def cost_row(work: str, manifests: Sequence[Manifest]) -> Row:
    """Hours of one kind of work, over its steps."""
    devices = {str(item.provenance.get("device") or "not recorded") for item in manifests}
    return {
        "work": _WORDS.get(work, work), "steps": len(manifests), **Hours.total(manifests).columns,
        "devices": ", ".join(sorted(devices)) if work in _ON_DEVICE else "",
    }  # fmt: skip


def price_rows(results: StudyResults, timed: Sequence[TimedStep]) -> list[Row]:
    """For each contrast with baselines, the hours of generating the images once and, if the arm
    helps, these hours per point gained, for the gain and for both ends of its interval.

    The hours cover the whole pool for the largest ratio, whichever ratio was chosen. The unit is
    GPU hours if a GPU was reserved, else CPU hours; wall-clock hours if the resources are not
    known.
    """
    fits = 1 + max(item.trial.fit for item in results.trials)
    prices: list[Row] = []
    for contrast in results.evaluate.contrasts:
        if contrast.twin:
            continue
        generators = results.tested(contrast.arm)[0].trial.arm.generators
        every = Hours.total(
            entry.manifest for entry in timed
            if entry.work in _MAKING and entry.step.subject.name in generators
        )  # fmt: skip
        unit, hours = "hours", every.wall
        if every.cpu is not None:
            unit, hours = ("GPU hours", every.gpu or 0.0) if every.gpu else ("CPU hours", every.cpu)
        gained = contrast.word == "helps" and contrast.low > 0
        gains = {"per_point": contrast.effect.estimate, "per_point_least": contrast.high,
                 "per_point_most": contrast.low}  # fmt: skip
        prices.append(
            {"arm": contrast.arm, "unit": unit, "images_took": hours / fits,
             **{name: hours / fits / (100 * gain) if gained else None
                for name, gain in gains.items()}}
        )  # fmt: skip
    return prices


def classifier_in_words(spec: Spec) -> str:
    """The network of a classifier, in words for a paper."""
    return str(kind_of("classifiers", spec).in_words(spec))


def weights_at(manifest: Manifest) -> str:
    """The folder of a step's weights, relative to the storage root."""
    keys = [part.key for part in manifest.parts if part.key.endswith(".safetensors")]
    return keys[0].rpartition("/")[0] if keys else ""


def composition(results: StudyResults, mix: Step) -> str:
    """The numbers of real and generated images that an arm trains on."""
    result = results.mixes[mix.key]
    drawn = ", each class drawn alike" if mix.spec_as(MixSpec).oversampled else ""
    amounts = [f"{result.real:,} real{drawn}"] if result.real else []
    amounts += [f"{sum(of.values()):,} of {name}" for name, of in result.added.items()]
    return " + ".join(amounts)


def model_rows(results: StudyResults) -> list[Row]:
    """Each generator, the labeler, and the best classifier of each tested arm."""
    objective, study = results.evaluate.objective, results.study.name
    rows = []
    for step, manifest in results.steps:
        if step.kind == "finetune":
            total, result = sum(results.ingest.train.values()), FinetuneResult.of(manifest)
            rows.append(
                model_row(
                    step.label, f"generator {manifest.spec['generator']['name']}",
                    f"{study}: {total:,} real", total, result.steps, weights_at(manifest),
                    loss=result.loss,
                )
            )  # fmt: skip
        elif step.kind == "train":
            classifier = PluginField("classifiers")(manifest.spec["classifier"])
            rows.append(
                model_row(
                    step.label, classifier_in_words(classifier),
                    f"{study}: {composition(results, step.inputs['mix'])}", manifest.rows,
                    manifest.spec["training"]["steps"], weights_at(manifest), objective=objective,
                    val=TrainResult.of(manifest).val.figures.get(objective),
                )
            )  # fmt: skip
    for arm, figures in results.evaluate.arms.items():
        of_arm = results.tested(arm)
        values = [item.result.val.figures[objective] for item in of_arm]
        best = of_arm[int(np.argmax(values))]
        trial = best.trial
        rows.append(
            model_row(
                trial.step.label, classifier_in_words(results.search_spec.classifier),
                f"{study}, arm {arm}: {composition(results, trial.step.inputs['mix'])}",
                best.manifest.rows, optimizer_steps(results.search_spec, trial.arm),
                weights_at(best.manifest), best_step=best.result.best_step,
                objective=objective, val=max(values),
                test=figures.classifiers[objective][results.place(trial)], best_of=len(of_arm),
            )
        )  # fmt: skip
    return rows


def model_row(
    model: str, network: str, trained_on: str, images: int, steps: float | None, where: str,
    best_step: int | None = None, objective: str | None = None, val: float | None = None,
    test: float | None = None, best_of: int | None = None, loss: float | None = None,
) -> Row:  # fmt: skip
    """Network, training data, steps, scores and weights of a model."""
    return {
        "model": model, "network": network, "trained_on": trained_on, "images": images,
        "steps": steps, "best_step": best_step, "objective": objective, "val": val, "test": test,
        "best_of": best_of, "loss": loss, "where": where,
    }  # fmt: skip


def trial_row(results: StudyResults, item: Trained) -> Row:
    """A classifier: its identity, scores, cost and weights."""
    arm, manifest, val = item.trial.arm, item.manifest, item.result.val.figures
    tested = results.evaluate.arms.get(arm.name)
    opened = tested.classifiers if tested is not None and item.trial.stage == "confirm" else {}
    return {
        **item.columns, "family": arm.family, "ratio": arm.ratio, "key": item.trial.step.key,
        "training_images": manifest.rows, "steps": optimizer_steps(results.search_spec, arm),
        "best_step": item.result.best_step, "seconds": manifest.provenance["seconds"],
        "device": manifest.provenance.get("device"), **Hours.of(manifest).columns,
        "weights": weights_at(manifest),
        **{f"val_{name}": val.get(name) for name in FIGURES},
        **{f"test_{name}": opened[name][results.place(item.trial)] if name in opened else None
           for name in FIGURES},
    }  # fmt: skip
