"""What a study cost, what a point cost, and where the models lie that came of it."""

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
    "ingest": "taking the data in", "embed": "embedding real images", "cluster": "clustering",
    "select": "choosing representatives", "reduce": "reducing dominant classes",
    "train": "training classifiers of the comparison", "labeler": "training the labeler",
    "measure": "measuring val", "request": "planning images", "finetune": "training generators",
    "generate": "generating images", "curate": "curating images", "mix": "putting arms together",
    "fidelity": "measuring fidelity", "evaluate": "test",
}  # fmt: skip
# Steps that compute on the profile's device.
_ON_DEVICE = ("embed", "train", "labeler", "measure", "finetune", "generate", "curate", "evaluate",
              "fidelity")  # fmt: skip
_MAKING = ("request", "finetune", "generate", "curate")


def done_steps(context: Context) -> list[tuple[Step, Manifest]]:
    """Every step that the page rests on, inputs first. Not in the order in which they ran: a
    step that was discarded and ran again would move, and tables with it."""
    found = []
    for step in upstream(list(context.step.inputs.values())):
        manifest = context.manifest(step)
        if manifest is not None:
            found.append((step, manifest))
    return found


@dataclass(frozen=True)
class Hours:
    """Of some steps: wall-clock time, and what was held meanwhile, CPUs and GPUs times hours. None
    where a step did not note what it held."""

    wall: float
    cpu: float | None
    gpu: float | None

    @classmethod
    def of(cls, manifest: Manifest) -> Hours:
        wall, held = manifest.provenance["seconds"] / 3600, manifest.provenance.get("held")
        if held is None:
            return cls(wall, None, None)
        return cls(wall, *(
            sum(one["workers"] * one[what] * one["seconds"] for one in held) / 3600
            for what in ("cpus", "gpus")
        ))  # fmt: skip

    @classmethod
    def total(cls, every: Sequence[Hours]) -> Hours:
        known = all(one.cpu is not None for one in every)
        return cls(
            sum(one.wall for one in every),
            sum(one.cpu or 0.0 for one in every) if known else None,
            sum(one.gpu or 0.0 for one in every) if known else None,
        )


def cost(
    steps: Sequence[tuple[Step, Manifest]], trials: Sequence[Trained], evaluate: EvaluateResult,
) -> dict[str, Any]:  # fmt: skip
    """Hours by kind of work, and hours of making images for each point gained."""
    timed = [(_kind(step), step, manifest) for step, manifest in steps if step.kind != "search"]
    timed += [("train", one.trial.step, one.manifest) for one in trials]
    kinds: dict[str, list[Manifest]] = {}
    for kind, _, manifest in timed:
        kinds.setdefault(kind, []).append(manifest)
    order = [*(kind for kind in _WORDS if kind in kinds),
             *(kind for kind in kinds if kind not in _WORDS)]  # fmt: skip
    rows = []
    for kind in order:
        devices = {str(one.provenance.get("device") or "not noted") for one in kinds[kind]}
        rows.append(
            {
                "words": _WORDS.get(kind, kind), "count": len(kinds[kind]),
                "hours": Hours.total([Hours.of(one) for one in kinds[kind]]),
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
    """For each contrast with the baseline, what making its images took, once: the whole pool, which
    is as large as the largest ratio asks, whatever ratio was chosen. And, where the gain's interval
    lies above 0, the price of a point: at the gain itself, and at both ends of its interval.

    The price is in GPU hours where a GPU was held, else in CPU hours; in hours of wall-clock time
    where what was held is not known.
    """
    arms = {one.trial.arm.name: one.trial.arm for one in trials}
    fits = 1 + max(one.trial.fit for one in trials)
    found = []
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
        one: dict[str, Any] = {"arm": contrast.arm, "unit": unit, "hours": hours / fits,
                               "per_point": None, "least": None, "most": None}  # fmt: skip
        if contrast.word == "helps" and contrast.low > 0:
            ends = {"per_point": contrast.effect.estimate, "least": contrast.high,
                    "most": contrast.low}  # fmt: skip
            one |= {name: hours / fits / (100 * gain) for name, gain in ends.items()}
        found.append(one)
    return found


def weights_at(one: Trained) -> str:
    """Where a classifier's weights lie, below the root of the storage."""
    held = [part.key for part in one.manifest.parts if part.tags.get("file", "")[:7] == "weights"]
    return held[0].rpartition("/")[0] if held else ""


def network_in_words(classifier: Mapping[str, Any]) -> str:
    """What a classifier is, as the methods name it."""
    return classifier_in_words(classifier)


def composition(context: Context, mix: Step) -> str:
    """How many real images and how many of which generator an arm trains on."""
    manifest = context.manifest(mix)
    assert manifest is not None, "what was trained on it is done"
    result = MixResult.of(manifest)
    drawn = ", each class drawn alike" if mix.spec_as(MixSpec).oversampled else ""
    amounts = [f"{result.real:,} real{drawn}"] if result.real else []
    amounts += [f"{sum(of.values()):,} of {name}" for name, of in result.added.items()]
    return " + ".join(amounts)


def weights(
    context: Context, steps: Sequence[tuple[Step, Manifest]], trials: Sequence[Trained],
    evaluate: EvaluateResult, search: SearchSpec, study: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Each model that the study trained: the network, what it was trained on, how long it learnt,
    how good it is, where its weights lie below the storage's root. Of an arm, the classifier that
    is best on val. study: its name."""
    objective = evaluate.objective
    classifier = network_in_words(context.inputs["search"].spec["classifier"])
    total = sum(context.result("ingest", IngestResult).train.values())
    found = []
    for step, manifest in steps:
        files = [part.key for part in manifest.parts if part.key.endswith(".safetensors")]
        if step.kind == "finetune":
            result = FinetuneResult.of(manifest)
            loss = result.loss
            found.append(
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
            found.append(
                {
                    "model": step.label, "what": network_in_words(manifest.spec["classifier"]),
                    "dataset": f"{study}: {composition(context, step.inputs['mix'])}",
                    "images": manifest.rows, "steps": manifest.spec["training"]["steps"],
                    "val": val.get(objective),
                    "where": files[0].rpartition("/")[0] if files else "",
                }
            )  # fmt: skip
    for arm, figures in evaluate.arms.items():
        held = [one for one in trials if one.trial.arm.name == arm]
        values = [one.result.val.figures[objective] for one in held]
        best = held[int(np.argmax(values))]
        found.append(
            {
                "model": best.trial.step.label, "what": classifier,
                "dataset": f"{study}, arm {arm}:"
                           f" {composition(context, best.trial.step.inputs['mix'])}",
                "images": best.manifest.rows, "steps": optimizer_steps(search, best.trial.arm),
                "kept": best.result.best_step, "val": max(values),
                "test": figures.classifiers[objective][best.trial.number],
                "where": weights_at(best), "of": len(held),
            }
        )  # fmt: skip
    return found
