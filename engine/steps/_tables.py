"""The tables that a report leaves as CSV: what its figures and plots are drawn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.step import Step
from engine.metrics.significance import paired_t
from engine.report.download import as_csv
from engine.report.table import Row
from engine.steps._cost import Hours, weights_at
from engine.steps._evidence import FIGURES, Trained, val_confusion
from engine.steps.search import SearchSpec, replicates, steps_of

Entries = list[dict[str, Any]]


def comparison_tables(
    table: Sequence[Row], search_table: Sequence[Mapping[str, Any]], search: SearchSpec,
    evaluate: Mapping[str, Any], trials: Sequence[Trained],
    told: Sequence[Sequence[Mapping[str, float]]], classes: Sequence[str],
) -> dict[str, Entries]:  # fmt: skip
    """Of the comparison, by name. search_table: rows of search's trials. told: the history of each
    trial."""
    return {
        "arms": arms(table, evaluate),
        "contrasts": contrasts(evaluate),
        "classes": per_class(evaluate, trials, classes),
        "trials": of_trials(evaluate, search, trials),
        "history": history(search, trials, told),
        "confusion": list(confusion(evaluate, trials, classes)),
        "ratios": ratios(search_table, evaluate["objective"], search.generator_fits),
        "saturation": [
            {"family": family, **{name: point[name] for name in ("ratio", "low", "high")}}
            for family, point in evaluate["saturation"].items()
        ],
        "budget": budget(evaluate),
        "reliability": [
            {"arm": arm, **{name: one[name] for name in ("confidence", "accuracy", "images")}}
            for arm, figures in evaluate["arms"].items() for one in figures["reliability"]
        ],
    }  # fmt: skip


def record_tables(
    weights: Sequence[Mapping[str, Any]], cost: Mapping[str, Any], objective: str,
    steps: Sequence[tuple[Step, Manifest]],
) -> dict[str, Entries]:  # fmt: skip
    """Of what the study left and what it took. weights, cost: as the page has them."""
    return {
        "weights": [
            {"model": one["model"], "network": one["what"], "trained_on": one["dataset"],
             "images": one["images"], "steps": one["steps"], "best_step": one.get("kept"),
             "objective": objective if "val" in one else None, "val": one.get("val"),
             "test": one.get("test"), "best_of": one.get("of"), "loss": one.get("loss"),
             "where": one["where"]}
            for one in weights
        ],
        "cost": [{"work": row["words"], "steps": row["count"], **hours_of(row["hours"]),
                  "devices": row["devices"]} for row in cost["rows"]],
        "prices": [
            {"arm": one["arm"], "unit": one["unit"], "images_took": one["hours"],
             "per_point": one["per_point"], "per_point_least": one["least"],
             "per_point_most": one["most"]}
            for one in cost["points"]
        ],
        "steps": [
            {"step": step.label, "kind": step.kind, "key": step.key, "rows": manifest.rows,
             "started": manifest.provenance["started"],
             "seconds": manifest.provenance["seconds"],
             "device": manifest.provenance.get("device"), **hours_of(Hours.of(manifest))}
            for step, manifest in steps
        ],
    }  # fmt: skip


def as_files(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, bytes]:
    """Encoded CSV by the file's name, of the tables that have rows."""
    return {f"{name}.csv": as_csv(entries) for name, entries in tables.items() if entries}


def hours_of(hours: Hours) -> dict[str, float | None]:
    return {"wall_hours": hours.wall, "cpu_hours": hours.cpu, "gpu_hours": hours.gpu}


def arms(table: Sequence[Row], evaluate: Mapping[str, Any]) -> Entries:
    """A row for each arm; figures of test where it was opened."""
    found = []
    for row in table:
        figures = evaluate["arms"].get(row.arm, {})
        entry: dict[str, Any] = {
            "arm": row.arm, "role": row.mark, "images_added": row.added, "val_mean": row.val,
            "val_sd": row.val_sd, "difference_to_baseline": row.against,
            "difference_low": row.against_low, "difference_high": row.against_high,
            "stars": row.stars, "test_opened": bool(figures),
        }  # fmt: skip
        for name in FIGURES:
            held = figures.get(name, {})
            entry |= {f"test_{name}": held.get("mean"), f"test_{name}_low": held.get("low"),
                      f"test_{name}_high": held.get("high")}  # fmt: skip
        found.append(entry)
    return found


def contrasts(evaluate: Mapping[str, Any]) -> Entries:
    """A row for each comparison that was declared."""
    found = []
    for one in evaluate["contrasts"]:
        effect, resampled = one["effect"], one["bootstrap"]
        entry = {
            "arm": one["arm"], "against": one["against"], "objective": evaluate["objective"],
            "verdict": one["word"], "difference": effect["estimate"],
            "t_low": effect["low"], "t_high": effect["high"], "t_p": effect["p"],
            "bootstrap_low": resampled["low"], "bootstrap_high": resampled["high"],
            "bootstrap_p": resampled["p"], "low": one["low"], "high": one["high"],
            "p_holm": one["p_adjusted"], "equivalence_p_holm": one["equivalence_p"],
            "margin": one["margin"], "effect_size": one["effect_size"],
            "wilcoxon_p": one["wilcoxon_p"], "detectable": one["detectable"],
            "replicates": one["replicates"], "test_groups": one["groups"],
            "mcnemar_p_least": min(one["mcnemar"]), "mcnemar_p_most": max(one["mcnemar"]),
        }  # fmt: skip
        for number, difference in enumerate(one["differences"]):
            entry[f"difference_{number}"] = difference
        found.append(entry)
    return found


def per_class(
    evaluate: Mapping[str, Any], trials: Sequence[Trained], classes: Sequence[str]
) -> Entries:
    """A row for each arm that was opened and class."""
    images = {one.trial.arm.name: one.images for one in trials}
    # Of an arm with several contrasts, the first is that with the baseline.
    gains = {one["arm"]: one for one in reversed(evaluate["contrasts"])}
    found = []
    for arm, figures in evaluate["arms"].items():
        for number, name in enumerate(classes):
            held = dict(figures["per_class"][name])
            of = held.pop("f1_interval")
            classifiers = len(figures["classifiers"]["accuracy"])
            entry = {
                "arm": arm, "class": name, "training_images": images[arm].get(name, 0),
                "test_images": held.pop("images") // classifiers,
                "f1_mean": of["mean"], "f1_low": of["low"], "f1_high": of["high"],
                # The first three of one confusion of all classifiers, areas the mean of theirs.
                **{f"{key}_pooled": held.pop(key) for key in ("precision", "recall", "f1")},
                **{f"{key}_mean": value for key, value in held.items()},
            }  # fmt: skip
            if arm in gains:
                entry["recall_gain_against"] = gains[arm]["against"]
                for key in ("recall_gain", "recall_gain_to_real"):
                    gain = gains[arm][key][number]
                    entry |= {key: gain["mean"], f"{key}_low": gain["low"],
                              f"{key}_high": gain["high"]}  # fmt: skip
            found.append(entry)
    return found


def of_trials(
    evaluate: Mapping[str, Any], search: SearchSpec, trials: Sequence[Trained]
) -> Entries:
    """A row for each classifier: what it is, what it reached, what it cost, where it lies."""
    found = []
    for one in trials:
        arm, manifest = one.trial.arm, one.manifest
        entry: dict[str, Any] = {
            **named(one), "family": arm.family, "ratio": arm.ratio, "key": one.trial.step.key,
            "training_images": manifest.rows, "steps": steps_of(search, arm),
            "best_step": manifest.metrics["best_step"],
            "seconds": manifest.provenance["seconds"],
            "device": manifest.provenance.get("device"), **hours_of(Hours.of(manifest)),
            "weights": weights_at(one),
        }  # fmt: skip
        val = manifest.metrics["val"]
        entry |= {f"val_{name}": val.get(name) for name in FIGURES}
        opened = evaluate["arms"].get(arm.name, {}).get("classifiers", {})
        entry |= {f"test_{name}": opened[name][one.trial.number] if name in opened else None
                  for name in FIGURES}  # fmt: skip
        found.append(entry)
    return found


def named(one: Trained) -> dict[str, Any]:
    return {"arm": one.trial.arm.name, rows.GENERATOR_FIT: one.trial.fit,
            rows.SEED: one.trial.number}  # fmt: skip


def ratios(trials: Sequence[Mapping[str, Any]], objective: str, generator_fits: int) -> Entries:
    """A row for each arm: the objective on val, as the curve shows it against the ratio. trials:
    rows of search's table."""
    values: dict[str, list[float]] = {}
    of_arm: dict[str, Mapping[str, Any]] = {}
    for row in trials:
        of_arm.setdefault(row[rows.ARM], row)
        values.setdefault(row[rows.ARM], []).append(row[objective])
    found = []
    for arm, row in of_arm.items():
        held = replicates(np.asarray(values[arm]), generator_fits)
        interval = paired_t(held.tolist())
        found.append(
            {
                "arm": arm, "family": row["family"], "ratio": row[rows.RATIO], "role": row["role"],
                "objective": objective, "val_mean": interval.estimate, "val_low": interval.low,
                "val_high": interval.high, "replicates": len(held),
            }
        )  # fmt: skip
    return found


def budget(evaluate: Mapping[str, Any]) -> Entries:
    """What twice the steps do to real images, on test."""
    effect = evaluate["budget"]
    if effect is None:
        return []
    return [{"arm": "real_double", "against": "real", "difference": effect["estimate"],
             "low": effect["low"], "high": effect["high"]}]  # fmt: skip


def history(
    search: SearchSpec, trials: Sequence[Trained], told: Sequence[Sequence[Mapping[str, float]]]
) -> Entries:
    """A row for each classifier and look at val; an epoch is as many draws as it has images."""
    batch = search.training.batch_size
    return [
        {**named(one), "step": int(entry["step"]),
         "epoch": entry["step"] * batch / one.manifest.rows,
         **{name: value for name, value in entry.items() if name != "step"}}
        for one, entries in zip(trials, told, strict=True)
        for entry in entries
    ]  # fmt: skip


def confusion(
    evaluate: Mapping[str, Any], trials: Sequence[Trained], classes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row for each cell of each arm's matrices, summed over its classifiers; val of every arm,
    test of those that were opened. Cells of no image are left out."""
    for arm in dict.fromkeys(one.trial.arm.name for one in trials):
        matrices = {"val": val_confusion(trials, arm).tolist()}
        if arm in evaluate["arms"]:
            matrices["test"] = evaluate["arms"][arm]["confusion"]
        for split, matrix in matrices.items():
            for true, counts in zip(classes, matrix, strict=True):
                for predicted, count in zip(classes, counts, strict=True):
                    if count:
                        yield {"arm": arm, "split": split, "true": true, "predicted": predicted,
                               "images": count, "share_of_true": count / sum(counts)}  # fmt: skip
