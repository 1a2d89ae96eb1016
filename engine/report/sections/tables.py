"""The CSV tables of a report: the data of its figures and plots."""

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
    histories: Sequence[Sequence[Mapping[str, float]]], classes: Sequence[str],
) -> dict[str, Entries]:  # fmt: skip
    """Tables of the comparison, by name. search_table: rows of search's trials. histories: the
    training history of each trial."""
    return {
        "arms": arms(table, evaluate),
        "contrasts": contrasts(evaluate),
        "classes": per_class(evaluate, trials, classes),
        "trials": of_trials(evaluate, search, trials),
        "history": history(search, trials, histories),
        "confusion": list(confusion(evaluate, trials, classes)),
        "ratios": ratios(search_table, evaluate.objective, search.generator_fits),
        "saturation": [
            {"family": family, **dict(point)}
            for family, point in evaluate.saturation.items()
        ],
        "budget": budget(evaluate),
        "reliability": [
            {"arm": arm, **dict(bin_)}
            for arm, tested in evaluate.arms.items() for bin_ in tested.reliability
        ],
    }  # fmt: skip


def record_tables(
    weights: Sequence[Mapping[str, Any]], cost: Mapping[str, Any], objective: str,
    steps: Sequence[tuple[Step, Manifest]],
) -> dict[str, Entries]:  # fmt: skip
    """Tables of models, costs and steps. weights, cost: as the page has them."""
    return {
        "weights": [
            {"model": item["model"], "network": item["what"], "trained_on": item["dataset"],
             "images": item["images"], "steps": item["steps"], "best_step": item.get("kept"),
             "objective": objective if "val" in item else None, "val": item.get("val"),
             "test": item.get("test"), "best_of": item.get("of"), "loss": item.get("loss"),
             "where": item["where"]}
            for item in weights
        ],
        "cost": [{"work": row["words"], "steps": row["count"], **hours_of(row["hours"]),
                  "devices": row["devices"]} for row in cost["rows"]],
        "prices": [
            {"arm": item["arm"], "unit": item["unit"], "images_took": item["hours"],
             "per_point": item["per_point"], "per_point_least": item["least"],
             "per_point_most": item["most"]}
            for item in cost["points"]
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
    entries = []
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
        entries.append(entry)
    return entries


def contrasts(evaluate: EvaluateResult) -> Entries:
    """A row for each declared comparison."""
    entries = []
    for contrast in evaluate.contrasts:
        effect, resampled = contrast.effect, contrast.bootstrap
        entry = {
            "arm": contrast.arm, "against": contrast.against, "objective": evaluate.objective,
            "verdict": contrast.word, "difference": effect.estimate,
            "t_low": effect.low, "t_high": effect.high, "t_p": effect.p,
            "bootstrap_low": resampled.low, "bootstrap_high": resampled.high,
            "bootstrap_p": resampled.p, "low": contrast.low, "high": contrast.high,
            "p_holm": contrast.p_adjusted, "equivalence_p_holm": contrast.equivalence_p,
            "margin": contrast.margin, "effect_size": contrast.effect_size,
            "wilcoxon_p": contrast.wilcoxon_p, "detectable": contrast.detectable,
            "replicates": contrast.replicates, "test_groups": contrast.groups,
            "mcnemar_p_least": min(contrast.mcnemar), "mcnemar_p_most": max(contrast.mcnemar),
        }  # fmt: skip
        for number, difference in enumerate(contrast.differences):
            entry[f"difference_{number}"] = difference
        entries.append(entry)
    return entries


def per_class(
    evaluate: EvaluateResult, trials: Sequence[Trained], classes: Sequence[str]
) -> Entries:
    """A row for each tested arm and class."""
    images = {item.trial.arm.name: item.images for item in trials}
    # The first contrast of an arm is the one with the baseline.
    gains = {item.arm: item for item in reversed(evaluate.contrasts)}
    entries = []
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
                for key, of_classes in (
                    ("recall_gain", gains[arm].recall_gain),
                    ("recall_gain_to_real", gains[arm].recall_gain_to_real),
                ):
                    gain = of_classes[number]
                    entry |= {key: gain.mean, f"{key}_low": gain.low, f"{key}_high": gain.high}
            entries.append(entry)
    return entries


def of_trials(evaluate: EvaluateResult, search: SearchSpec, trials: Sequence[Trained]) -> Entries:
    """A row for each classifier: its identity, scores, cost and weights."""
    entries = []
    for trained in trials:
        arm, manifest = trained.trial.arm, trained.manifest
        entry: dict[str, Any] = {
            **named(trained), "family": arm.family, "ratio": arm.ratio,
            "key": trained.trial.step.key,
            "training_images": manifest.rows, "steps": optimizer_steps(search, arm),
            "best_step": trained.result.best_step,
            "seconds": manifest.provenance["seconds"],
            "device": manifest.provenance.get("device"), **hours_of(Hours.of(manifest)),
            "weights": weights_at(trained),
        }  # fmt: skip
        entry |= {f"val_{name}": trained.result.val.figures.get(name) for name in FIGURES}
        tested = evaluate.arms.get(arm.name)
        opened = tested.classifiers if tested is not None else {}
        entry |= {f"test_{name}": opened[name][trained.trial.number] if name in opened else None
                  for name in FIGURES}  # fmt: skip
        entries.append(entry)
    return entries


def named(trained: Trained) -> dict[str, Any]:
    return {"arm": trained.trial.arm.name, rows.GENERATOR_FIT: trained.trial.fit,
            rows.SEED: trained.trial.number}  # fmt: skip


def ratios(trials: Sequence[Mapping[str, Any]], objective: str, generator_fits: int) -> Entries:
    """A row for each arm: the objective on val, as the curve shows it against the ratio. trials:
    rows of search's table."""
    values: dict[str, list[float]] = {}
    of_arm: dict[str, Mapping[str, Any]] = {}
    for row in trials:
        of_arm.setdefault(row[rows.ARM], row)
        values.setdefault(row[rows.ARM], []).append(row[objective])
    entries = []
    for arm, row in of_arm.items():
        by_replicate = replicates(np.asarray(values[arm]), generator_fits)
        interval = paired_t(by_replicate.tolist())
        entries.append(
            {
                "arm": arm, "family": row["family"], "ratio": row[rows.RATIO], "role": row["role"],
                "objective": objective, "val_mean": interval.estimate, "val_low": interval.low,
                "val_high": interval.high, "replicates": len(by_replicate),
            }
        )  # fmt: skip
    return entries


def budget(evaluate: EvaluateResult) -> Entries:
    """The effect of twice the steps on real images, on test."""
    effect = evaluate.budget
    if effect is None:
        return []
    return [{"arm": "real_double", "against": "real", "difference": effect.estimate,
             "low": effect.low, "high": effect.high}]  # fmt: skip


def history(
    search: SearchSpec, trials: Sequence[Trained],
    histories: Sequence[Sequence[Mapping[str, float]]],
) -> Entries:  # fmt: skip
    """A row per classifier and evaluation on val; an epoch is as many draws as there are images."""
    batch = search.training.batch_size
    return [
        {**named(trained), "step": int(entry["step"]),
         "epoch": entry["step"] * batch / trained.manifest.rows,
         **{name: value for name, value in entry.items() if name != "step"}}
        for trained, entries in zip(trials, histories, strict=True)
        for entry in entries
    ]  # fmt: skip


def confusion(
    evaluate: EvaluateResult, trials: Sequence[Trained], classes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row for each nonzero cell of each arm's matrices, summed over its classifiers: val of every
    arm, test of the tested arms."""
    for arm in dict.fromkeys(trained.trial.arm.name for trained in trials):
        matrices = {"val": val_confusion(trials, arm).tolist()}
        if arm in evaluate.arms:
            matrices["test"] = evaluate.arms[arm].confusion
        for split, matrix in matrices.items():
            for true, counts in zip(classes, matrix, strict=True):
                for predicted, count in zip(classes, counts, strict=True):
                    if count:
                        yield {"arm": arm, "split": split, "true": true, "predicted": predicted,
                               "images": count, "share_of_true": count / sum(counts)}  # fmt: skip
