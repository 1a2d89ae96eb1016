"""The cost of a study, the cost per point gained, and the locations of the trained models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.comparison.arms import MixSpec, SearchSpec, optimizer_steps
from engine.context import Context
from engine.core.manifest import Manifest
from engine.core.step import Step, upstream
from engine.report.sections.evidence import Trained
from engine.report.sections.methods import classifier_in_words
from engine.results.comparison import EvaluateResult, MixResult, TrainResult
from engine.results.data import IngestResult
from engine.results.images import FinetuneResult

_WORDS = {
    "ingest": "ingesting the data", "embed": "embedding real images", "cluster": "clustering",
    "select": "choosing representatives", "reduce": "reducing dominant classes",
    "train": "training classifiers of the comparison", "labeler": "training the labeler",
    "measure": "measuring val", "request": "planning images", "finetune": "training generators",
    "generate": "generating images", "curate": "curating images", "mix": "composing arms",
    "fidelity": "measuring fidelity", "evaluate": "testing",
}  # fmt: skip
# Steps that compute on the profile's device.
_ON_DEVICE = ("embed", "train", "labeler", "measure", "finetune", "generate", "curate", "evaluate",
              "fidelity")  # fmt: skip
_MAKING = ("request", "finetune", "generate", "curate")


def done_steps(context: Context) -> list[tuple[Step, Manifest]]:
    """Every finished step that the page depends on, inputs first.

    The order does not depend on when steps ran, so that a step that runs again keeps its place.
    """
    done = []
    for step in upstream(list(context.step.inputs.values())):
        manifest = context.manifest(step)
        if manifest is not None:
            done.append((step, manifest))
    return done


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
    def total(cls, every: Sequence[Hours]) -> Hours:
        known = all(part.cpu is not None for part in every)
        return cls(
            sum(part.wall for part in every),
            sum(part.cpu or 0.0 for part in every) if known else None,
            sum(part.gpu or 0.0 for part in every) if known else None,
        )


def cost(
    steps: Sequence[tuple[Step, Manifest]], trials: Sequence[Trained], evaluate: EvaluateResult,
) -> dict[str, Any]:  # fmt: skip
    """Hours by kind of work, and hours of image generation per point gained."""
    timed = [(_kind(step), step, manifest) for step, manifest in steps if step.kind != "search"]
    timed += [("train", item.trial.step, item.manifest) for item in trials]
    kinds: dict[str, list[Manifest]] = {}
    for kind, _, manifest in timed:
        kinds.setdefault(kind, []).append(manifest)
    order = [*(kind for kind in _WORDS if kind in kinds),
             *(kind for kind in kinds if kind not in _WORDS)]  # fmt: skip
    rows = []
    for kind in order:
        devices = {str(item.provenance.get("device") or "not recorded") for item in kinds[kind]}
        rows.append(
            {
                "words": _WORDS.get(kind, kind), "count": len(kinds[kind]),
                "hours": Hours.total([Hours.of(item) for item in kinds[kind]]),
                "devices": ", ".join(sorted(devices)) if kind in _ON_DEVICE else "",
            }
        )  # fmt: skip
    return {
        "rows": rows, "hours": Hours.total([Hours.of(manifest) for _, _, manifest in timed]),
        "points": per_point(timed, trials, evaluate),
    }  # fmt: skip


def _kind(step: Step) -> str:
    return "labeler" if step.kind == "train" else step.kind


def per_point(
    timed: Sequence[tuple[str, Step, Manifest]], trials: Sequence[Trained],
    evaluate: EvaluateResult,
) -> list[dict[str, Any]]:  # fmt: skip
    """The hours of generating the images once, for each contrast with the baseline.

    They cover the whole pool for the largest ratio, whichever ratio was chosen. If the gain's
    interval is above 0, the price per point is given for the gain and for both ends of its
    interval. The unit is GPU hours if a GPU was reserved, else CPU hours; wall-clock hours if the
    resources are not known.
    """
    arms = {item.trial.arm.name: item.trial.arm for item in trials}
    fits = 1 + max(item.trial.fit for item in trials)
    prices = []
    for contrast in evaluate.contrasts:
        if contrast.against != evaluate.baseline:
            continue
        generators = arms[contrast.arm].generators
        every = Hours.total(
            [Hours.of(manifest) for kind, step, manifest in timed
             if kind in _MAKING and step.subject.name in generators]
        )  # fmt: skip
        unit, hours = "hours", every.wall
        if every.cpu is not None:
            unit, hours = ("GPU hours", every.gpu or 0.0) if every.gpu else ("CPU hours", every.cpu)
        item: dict[str, Any] = {"arm": contrast.arm, "unit": unit, "hours": hours / fits,
                               "per_point": None, "least": None, "most": None}  # fmt: skip
        if contrast.word == "helps" and contrast.low > 0:
            ends = {"per_point": contrast.effect.estimate, "least": contrast.high,
                    "most": contrast.low}  # fmt: skip
            item |= {name: hours / fits / (100 * gain) for name, gain in ends.items()}
        prices.append(item)
    return prices


def weights_at(trained: Trained) -> str:
    """The folder of a classifier's weights, relative to the storage root."""
    keys = [part.key for part in trained.manifest.parts
            if part.tags.get("file", "")[:7] == "weights"]  # fmt: skip
    return keys[0].rpartition("/")[0] if keys else ""


def network_in_words(classifier: Mapping[str, Any]) -> str:
    """The network of a classifier, worded as in the methods."""
    return classifier_in_words(classifier)


def composition(context: Context, mix: Step) -> str:
    """The numbers of real and generated images that an arm trains on."""
    manifest = context.manifest(mix)
    assert manifest is not None, "its trainings are done"
    result = MixResult.of(manifest)
    drawn = ", each class drawn alike" if mix.spec_as(MixSpec).oversampled else ""
    amounts = [f"{result.real:,} real{drawn}"] if result.real else []
    amounts += [f"{sum(of.values()):,} of {name}" for name, of in result.added.items()]
    return " + ".join(amounts)


def weights(
    context: Context, steps: Sequence[tuple[Step, Manifest]], trials: Sequence[Trained],
    evaluate: EvaluateResult, search: SearchSpec, study: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Each model that the study trained: network, training data, steps, scores and weights.

    Each arm is represented by its best classifier on val. study: the study's name.
    """
    objective = evaluate.objective
    classifier = network_in_words(context.inputs["search"].spec["classifier"])
    total = sum(context.result("ingest", IngestResult).train.values())
    models = []
    for step, manifest in steps:
        files = [part.key for part in manifest.parts if part.key.endswith(".safetensors")]
        if step.kind == "finetune":
            result = FinetuneResult.of(manifest)
            loss = result.loss
            models.append(
                {
                    "model": step.label, "what": f"generator {manifest.spec['generator']['name']}",
                    "dataset": f"{study}: {total:,} real", "images": total,
                    "steps": result.steps,
                    "loss": loss,
                    "reached": f"training loss {loss:.4g}" if loss is not None else "",
                    "where": files[0].rpartition("/")[0] if files else "",
                }
            )  # fmt: skip
        elif step.kind == "train":
            val = TrainResult.of(manifest).val.figures
            models.append(
                {
                    "model": step.label, "what": network_in_words(manifest.spec["classifier"]),
                    "dataset": f"{study}: {composition(context, step.inputs['mix'])}",
                    "images": manifest.rows, "steps": manifest.spec["training"]["steps"],
                    "val": val.get(objective),
                    "where": files[0].rpartition("/")[0] if files else "",
                }
            )  # fmt: skip
    for arm, figures in evaluate.arms.items():
        of_arm = [trained for trained in trials if trained.trial.arm.name == arm]
        values = [trained.result.val.figures[objective] for trained in of_arm]
        best = of_arm[int(np.argmax(values))]
        models.append(
            {
                "model": best.trial.step.label, "what": classifier,
                "dataset": f"{study}, arm {arm}:"
                           f" {composition(context, best.trial.step.inputs['mix'])}",
                "images": best.manifest.rows, "steps": optimizer_steps(search, best.trial.arm),
                "kept": best.result.best_step, "val": max(values),
                "test": figures.classifiers[objective][best.trial.number],
                "where": weights_at(best), "of": len(of_arm),
            }
        )  # fmt: skip
    return models
