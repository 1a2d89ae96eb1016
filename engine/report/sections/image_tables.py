"""The CSV tables of generated images in a report: from requested to kept, fidelity, embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.context import Context
from engine.core import rows
from engine.core.manifest import Manifest
from engine.results.data import ReducedClass
from engine.results.images import CurateResult, FidelityResult
from engine.wording import notice_in_words

Entries = list[dict[str, Any]]


@dataclass(frozen=True)
class Pool:
    """The manifest of one step for the images of a generator fit."""

    generator: str
    fit: int
    manifest: Manifest

    @property
    def named(self) -> dict[str, Any]:
        return {"generator": self.generator, rows.GENERATOR_FIT: self.fit}


def pools(context: Context, kind: str) -> list[Pool]:
    """The page's inputs of a kind, each with its generator and fit."""
    return [
        Pool(step.subject.name, step.subject.fit, context.inputs[name])
        for name, step in context.step.inputs.items()
        if step.kind == kind
    ]


def image_tables(
    context: Context, needed: Mapping[str, Mapping[str, int]],
    probed: Mapping[str, Mapping[str, Any]], planes: Sequence[Mapping[str, Any]],
    nearest: Sequence[Mapping[str, Any]], reduced: Mapping[str, ReducedClass],
    classes: Sequence[str],
) -> dict[str, Entries]:  # fmt: skip
    """The tables by name. planes, nearest: embeddings and closest pairs as the page shows them."""
    curated = pools(context, "curate")
    return {
        "funnel": funnel(curated, needed),
        "filters": filters(curated),
        "limits": limits(curated),
        "seen": seen(curated, classes),
        "closest": [
            {"generator": of["generator"], rows.GENERATOR_FIT: pair["fit"],
             "image_id": pair["image_id"],
             "class": pair["label"], "nearest_training_image": pair["nearest"],
             "cosine_distance": pair["distance"], "dropped": pair["dropped"]}
            for of in nearest for pair in of["pairs"]
        ],
        "fidelity": fidelity(pools(context, "fidelity")),
        "probes": [
            {"generator": name, rows.GENERATOR_FIT: fit, "class": entry["label"],
             "roc_auc": area, "images_of_each": entry["images"]}
            for name, probe in probed.items() for entry in probe["entries"]
            for fit, area in entry["areas"].items()
        ],
        "embedding": embedding(planes),
        "reduced": [
            {"class": name, **dict(figures)} for name, figures in reduced.items()
        ],
    }  # fmt: skip


def funnel(curated: Sequence[Pool], needed: Mapping[str, Mapping[str, int]]) -> Entries:
    """A row for each generator fit and class: numbers of images, and of dropped ones by reason."""
    return [
        {
            **pool.named, "class": label,
            "needed": needed.get(pool.generator, {}).get(label, 0),
            "requested": entry.requested, "generated": entry.generated,
            "kept": entry.kept, "unusable": entry.requested - entry.generated,
            **{f"dropped_by_{why}": count for why, count in entry.reasons.items()},
        }
        for pool in curated
        for label, entry in CurateResult.of(pool.manifest).funnel.items()
    ]  # fmt: skip


def filters(curated: Sequence[Pool]) -> Entries:
    """A row for each generator fit and filter, in the order in which the filters run."""
    return [
        {**pool.named, "filter": report.name, "place": place, "dropped": report.dropped}
        for pool in curated
        for place, report in enumerate(CurateResult.of(pool.manifest).filters, 1)
    ]


def limits(curated: Sequence[Pool]) -> Entries:
    """A row for each generator fit, filter and limit, and class if the limit differs by class. No
    value means no limit."""
    return [
        {**pool.named, "filter": report.name, "limit": what, "class": label, "value": value}
        for pool in curated
        for report in CurateResult.of(pool.manifest).filters
        for what, limit in report.limits.items()
        for label, value in (limit.items() if isinstance(limit, Mapping) else [(None, limit)])
    ]


def seen(curated: Sequence[Pool], classes: Sequence[str]) -> Entries:
    """A row for each generator fit, requested class and class seen by the labeler. Empty cells are
    left out."""
    return [
        {**pool.named, "asked_for": asked, "seen": predicted, "images": count,
         "share_of_asked": count / sum(counts)}
        for pool in curated
        if (labeler := CurateResult.of(pool.manifest).labeler) is not None
        for asked, counts in zip(classes, labeler.confusion, strict=True)
        for predicted, count in zip(classes, counts, strict=True)
        if count
    ]  # fmt: skip


def fidelity(measured: Sequence[Pool]) -> Entries:
    """A row for each generator fit, scope and set of images, with every computed figure.

    An interval is three columns: the figure and both ends.
    """
    entries = []
    for pool in measured:
        for scope in FidelityResult.of(pool.manifest).scopes:
            base = {
                **pool.named, "embedder": pool.manifest.spec["embedder"]["name"],
                "scope": "all" if len(scope.classes) > 1 else scope.classes[0],
                "classes": " | ".join(scope.classes), "val_images": scope.val,
                **scope.model_dump(include={"val_sampled", "val_nearest"}, exclude_none=True),
            }  # fmt: skip
            if scope.few is not None:
                entries.append({**base, "too_few": notice_in_words(scope.few)})
            # The sets again with as many images as train has, if that is fewer.
            for at_floor, sets in ((False, scope.sets), (True, scope.floor)):
                for of, figures in sets.items():
                    entries.append(
                        {**base, "set": of, "at_floor": at_floor, "n": figures.n,
                         "sampled": figures.sampled, **flat(figures.model_dump(exclude_unset=True))}
                    )  # fmt: skip
    return entries


def flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as columns; an interval is three of them."""
    columns: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, list | tuple):
            columns |= dict(zip((name, f"{name}_low", f"{name}_high"), value, strict=True))
        else:
            columns[name] = value
    return columns


def embedding(planes: Sequence[Mapping[str, Any]]) -> Entries:
    """A row for each generator and image in its planes, with its coordinates in each plane."""
    entries = []
    for plot in planes:
        if not plot["planes"]:
            continue
        for number, (image_id, label, is_synthetic) in enumerate(
            zip(plot["ids"], plot["labels"], plot["synthetic"], strict=True)
        ):
            entry = {"generator": plot["generator"], rows.IMAGE_ID: image_id, "class": label,
                     "source": plot["generator"] if is_synthetic else "real"}  # fmt: skip
            for plane in plot["planes"]:
                method = plane["method"].lower().replace("-", "")
                entry[f"{method}_x"], entry[f"{method}_y"] = plane["points"][number]
            entries.append(entry)
    return entries
