"""What a study cost, what a point cost, and where the models lie that came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.context import Context
from engine.core.manifest import Manifest, read_manifest
from engine.core.step import Step, upstream
from engine.steps._evidence import Trained
from engine.steps._tables import weights_at
from engine.steps.search import SearchSpec, steps_of

_WORDS = {
    "ingest": "taking the data in", "embed": "embedding real images", "cluster": "clustering",
    "select": "choosing representatives", "reduce": "reducing dominant classes",
    "train": "training classifiers of the comparison", "labeler": "training the labeler",
    "measure": "measuring val", "request": "planning images", "finetune": "training generators",
    "generate": "generating images", "curate": "curating images", "mix": "putting arms together",
    "fidelity": "measuring fidelity", "evaluate": "test",
}  # fmt: skip
# Steps that compute on the profile's device.
_ON_DEVICE = ("embed", "train", "labeler", "measure", "finetune", "generate", "curate", "evaluate")
_MAKING = ("request", "finetune", "generate", "curate")


def done_steps(context: Context) -> list[tuple[Step, Manifest]]:
    """Every step that the page rests on, in the order in which they ran."""
    found = []
    for step in upstream(list(context.step.inputs.values())):
        manifest = read_manifest(context.store, step)
        if manifest is not None:
            found.append((step, manifest))
    return sorted(found, key=lambda entry: str(entry[1].provenance["started"]))


def cost(
    steps: Sequence[tuple[Step, Manifest]], trials: Sequence[Trained], evaluate: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Hours by kind of work and by device, and hours of making images for each point gained."""
    timed = [(_kind(step), step, manifest) for step, manifest in steps if step.kind != "search"]
    timed += [("train", one.trial.step, one.manifest) for one in trials]
    kinds: dict[str, dict[str, Any]] = {}
    on_device: dict[str, float] = {}
    for kind, _, manifest in timed:
        seconds = float(manifest.provenance["seconds"])
        entry = kinds.setdefault(
            kind, {"words": _WORDS.get(kind, kind), "count": 0, "hours": 0.0, "devices": set()}
        )
        entry["count"] += 1
        entry["hours"] += seconds / 3600
        if kind in _ON_DEVICE:
            device = str(manifest.provenance.get("device") or "a device that was not noted")
            entry["devices"].add(device)
            on_device[device] = on_device.get(device, 0.0) + seconds / 3600
    for entry in kinds.values():
        entry["devices"] = ", ".join(sorted(entry["devices"]))
    rows = [kinds[kind] for kind in _WORDS if kind in kinds]
    rows += [entry for kind, entry in kinds.items() if kind not in _WORDS]
    return {
        "rows": rows, "hours": sum(entry["hours"] for entry in rows), "on_device": on_device,
        "points": per_point(timed, trials, evaluate),
    }  # fmt: skip


def _kind(step: Step) -> str:
    return "labeler" if step.kind == "train" else step.kind


def per_point(
    timed: Sequence[tuple[str, Step, Manifest]], trials: Sequence[Trained],
    evaluate: Mapping[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """For each contrast with the baseline, the hours that making its images took, once; and by
    point, where the gain's interval lies above 0."""
    arms = {one.trial.arm.name: one.trial.arm for one in trials}
    fits = 1 + max(one.trial.fit for one in trials)
    found = []
    for contrast in evaluate["contrasts"]:
        if contrast["against"] != evaluate["baseline"]:
            continue
        generators = arms[contrast["arm"]].generators
        hours = sum(
            float(manifest.provenance["seconds"]) / 3600
            for kind, step, manifest in timed
            if kind in _MAKING and step.label.split(".")[1] in generators
        ) / fits  # fmt: skip
        gained = contrast["word"] == "helps" and contrast["low"] > 0
        found.append(
            {
                "arm": contrast["arm"], "hours": hours,
                "per_point": hours / (100 * contrast["effect"]["estimate"]) if gained else None,
            }
        )  # fmt: skip
    return found


def weights(
    context: Context, steps: Sequence[tuple[Step, Manifest]], trials: Sequence[Trained],
    evaluate: Mapping[str, Any], search: SearchSpec,
) -> list[dict[str, Any]]:  # fmt: skip
    """Each model that the study trained: what it saw, how long it learnt, how good it is, where its
    weights lie below the storage's root. Of an arm, the classifier that is best on val."""
    objective = evaluate["objective"]
    classifier = context.inputs["search"].spec["classifier"]["name"]
    total = sum(context.inputs["ingest"].metrics["counts"]["train"].values())
    found = []
    for step, manifest in steps:
        files = [part.key for part in manifest.parts if part.key.endswith(".safetensors")]
        if step.kind == "finetune":
            loss = manifest.metrics.get("loss")
            found.append(
                {
                    "model": step.label, "what": "generator", "images": total,
                    "steps": manifest.metrics.get("steps"),
                    "reached": f"training loss {loss:.4g}" if loss is not None else "",
                    "where": files[0].rpartition("/")[0] if files else "",
                }
            )  # fmt: skip
        elif step.kind == "train":
            val = manifest.metrics["val"]
            found.append(
                {
                    "model": step.label, "what": manifest.spec["classifier"]["name"],
                    "images": manifest.rows, "steps": manifest.spec["training"]["steps"],
                    "val": val.get(objective),
                    "where": files[0].rpartition("/")[0] if files else "",
                }
            )  # fmt: skip
    for arm, figures in evaluate["arms"].items():
        held = [one for one in trials if one.trial.arm.name == arm]
        values = [float(one.manifest.metrics["val"][objective]) for one in held]
        best = held[int(np.argmax(values))]
        found.append(
            {
                "model": best.trial.step.label, "what": classifier,
                "images": best.manifest.rows, "steps": steps_of(search, best.trial.arm),
                "kept": best.manifest.metrics["best_step"], "val": max(values),
                "test": figures["classifiers"][objective][best.trial.number],
                "where": weights_at(best), "of": len(held),
            }
        )  # fmt: skip
    return found
