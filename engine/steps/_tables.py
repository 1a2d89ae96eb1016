"""The tables that a report leaves as CSV: what its figures and plots are drawn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.core import rows
from engine.report.download import as_csv
from engine.report.table import Row
from engine.steps._evidence import FIGURES, Trained, val_confusion
from engine.steps.search import SearchSpec, steps_of

Entries = list[dict[str, Any]]


def all_tables(
    table: Sequence[Row], evaluate: Mapping[str, Any], search: SearchSpec,
    trials: Sequence[Trained], told: Sequence[Sequence[Mapping[str, float]]],
    classes: Sequence[str],
) -> dict[str, bytes]:  # fmt: skip
    """Encoded CSV by name. told: the history of each trial."""
    found = {
        "arms": arms(table, evaluate),
        "contrasts": contrasts(evaluate),
        "classes": per_class(evaluate, trials, classes),
        "trials": of_trials(evaluate, search, trials),
        "history": history(search, trials, told),
        "confusion": list(confusion(evaluate, trials, classes)),
    }
    return {f"{name}.csv": as_csv(entries) for name, entries in found.items()}


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
                "test_images": held.pop("images") // classifiers, **held,
                "f1_mean": of["mean"], "f1_low": of["low"], "f1_high": of["high"],
            }  # fmt: skip
            if arm in gains:
                gain = gains[arm]["recall_gain"][number]
                entry |= {"recall_gain_against": gains[arm]["against"],
                          "recall_gain": gain["mean"], "recall_gain_low": gain["low"],
                          "recall_gain_high": gain["high"]}  # fmt: skip
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
            "device": manifest.provenance.get("device"), "weights": weights_at(one),
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


def weights_at(one: Trained) -> str:
    """Where a classifier's weights lie, below the root of the storage."""
    held = [part.key for part in one.manifest.parts if part.tags.get("file", "")[:7] == "weights"]
    return held[0].rpartition("/")[0] if held else ""


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
