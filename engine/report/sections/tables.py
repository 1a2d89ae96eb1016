"""The tables that a report leaves as CSV: what its figures and plots are drawn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from engine.comparison.arms import SearchSpec, optimizer_steps, replicates
from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.step import Step
from engine.metrics.significance import paired_t
from engine.report.download import as_csv
from engine.report.sections.cost import Hours, weights_at
from engine.report.sections.evidence import FIGURES, Trained, val_confusion
from engine.report.table import Row
from engine.results.comparison import EvaluateResult

Entries = list[dict[str, Any]]


def comparison_tables(
    table: Sequence[Row], search_table: Sequence[Mapping[str, Any]], search: SearchSpec,
    evaluate: EvaluateResult, trials: Sequence[Trained],
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
        "ratios": ratios(search_table, evaluate.objective, search.generator_fits),
        "saturation": [
            {"family": family, **dict(point)}
            for family, point in evaluate.saturation.items()
        ],
        "budget": budget(evaluate),
        "reliability": [
            {"arm": arm, **dict(one)}
            for arm, tested in evaluate.arms.items() for one in tested.reliability
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


def arms(table: Sequence[Row], evaluate: EvaluateResult) -> Entries:
    """A row for each arm; figures of test where it was opened."""
    found = []
    for row in table:
        tested = evaluate.arms.get(row.arm)
        figures = tested.figures if tested is not None else {}
        entry: dict[str, Any] = {
            "arm": row.arm, "role": row.mark, "images_added": row.added, "val_mean": row.val,
            "val_sd": row.val_sd, "difference_to_baseline": row.against,
            "difference_low": row.against_low, "difference_high": row.against_high,
            "stars": row.stars, "test_opened": tested is not None,
        }  # fmt: skip
        for name in FIGURES:
            figure = figures.get(name)
            entry |= {
                f"test_{name}{end}": getattr(figure, field, None)
                for end, field in (("", "mean"), ("_low", "low"), ("_high", "high"))
            }
        found.append(entry)
    return found


def contrasts(evaluate: EvaluateResult) -> Entries:
    """A row for each comparison that was declared."""
    found = []
    for one in evaluate.contrasts:
        effect, resampled = one.effect, one.bootstrap
        entry = {
            "arm": one.arm, "against": one.against, "objective": evaluate.objective,
            "verdict": one.word, "difference": effect.estimate,
            "t_low": effect.low, "t_high": effect.high, "t_p": effect.p,
            "bootstrap_low": resampled.low, "bootstrap_high": resampled.high,
            "bootstrap_p": resampled.p, "low": one.low, "high": one.high,
            "p_holm": one.p_adjusted, "equivalence_p_holm": one.equivalence_p,
            "margin": one.margin, "effect_size": one.effect_size,
            "wilcoxon_p": one.wilcoxon_p, "detectable": one.detectable,
            "replicates": one.replicates, "test_groups": one.groups,
            "mcnemar_p_least": min(one.mcnemar), "mcnemar_p_most": max(one.mcnemar),
        }  # fmt: skip
        for number, difference in enumerate(one.differences):
            entry[f"difference_{number}"] = difference
        found.append(entry)
    return found


def per_class(
    evaluate: EvaluateResult, trials: Sequence[Trained], classes: Sequence[str]
) -> Entries:
    """A row for each arm that was opened and class."""
    images = {one.trial.arm.name: one.images for one in trials}
    # Of an arm with several contrasts, the first is that with the baseline.
    gains = {one.arm: one for one in reversed(evaluate.contrasts)}
    found = []
    for arm, tested in evaluate.arms.items():
        for number, name in enumerate(classes):
            scores, f1 = tested.per_class[name], tested.per_class[name].f1_interval
            classifiers = len(tested.classifiers["accuracy"])
            areas = {"roc_auc_mean": scores.roc_auc,
                     "average_precision_mean": scores.average_precision}  # fmt: skip
            entry: dict[str, Any] = {
                "arm": arm, "class": name, "training_images": images[arm].get(name, 0),
                "test_images": scores.images // classifiers,
                "f1_mean": f1.mean, "f1_low": f1.low, "f1_high": f1.high,
                "precision_pooled": scores.precision, "recall_pooled": scores.recall,
                "f1_pooled": scores.f1,
                **{area: value for area, value in areas.items() if value is not None},
            }  # fmt: skip
            if arm in gains:
                entry["recall_gain_against"] = gains[arm].against
                for key, of_classes in (("recall_gain", gains[arm].recall_gain),
                                        ("recall_gain_to_real", gains[arm].recall_gain_to_real)):
                    gain = of_classes[number]
                    entry |= {key: gain.mean, f"{key}_low": gain.low, f"{key}_high": gain.high}
            found.append(entry)
    return found


def of_trials(
    evaluate: EvaluateResult, search: SearchSpec, trials: Sequence[Trained]
) -> Entries:
    """A row for each classifier: what it is, what it reached, what it cost, where it lies."""
    found = []
    for one in trials:
        arm, manifest = one.trial.arm, one.manifest
        entry: dict[str, Any] = {
            **named(one), "family": arm.family, "ratio": arm.ratio, "key": one.trial.step.key,
            "training_images": manifest.rows, "steps": optimizer_steps(search, arm),
            "best_step": one.result.best_step,
            "seconds": manifest.provenance["seconds"],
            "device": manifest.provenance.get("device"), **hours_of(Hours.of(manifest)),
            "weights": weights_at(one),
        }  # fmt: skip
        entry |= {f"val_{name}": one.result.val.figures.get(name) for name in FIGURES}
        tested = evaluate.arms.get(arm.name)
        opened = tested.classifiers if tested is not None else {}
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


def budget(evaluate: EvaluateResult) -> Entries:
    """What twice the steps do to real images, on test."""
    effect = evaluate.budget
    if effect is None:
        return []
    return [{"arm": "real_double", "against": "real", "difference": effect.estimate,
             "low": effect.low, "high": effect.high}]  # fmt: skip


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
    evaluate: EvaluateResult, trials: Sequence[Trained], classes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row for each cell of each arm's matrices, summed over its classifiers; val of every arm,
    test of those that were opened. Cells of no image are left out."""
    for arm in dict.fromkeys(one.trial.arm.name for one in trials):
        matrices = {"val": val_confusion(trials, arm).tolist()}
        if arm in evaluate.arms:
            matrices["test"] = evaluate.arms[arm].confusion
        for split, matrix in matrices.items():
            for true, counts in zip(classes, matrix, strict=True):
                for predicted, count in zip(classes, counts, strict=True):
                    if count:
                        yield {"arm": arm, "split": split, "true": true, "predicted": predicted,
                               "images": count, "share_of_true": count / sum(counts)}  # fmt: skip
