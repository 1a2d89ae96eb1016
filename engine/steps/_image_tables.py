"""The tables of generated images that a report leaves as CSV: from requested to kept, how like real
ones they are, where they lie among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.core import rows
from engine.core.manifest import Manifest

Entries = list[dict[str, Any]]
Metrics = Mapping[str, Mapping[str, Any]]


def image_tables(
    curated: Metrics, needed: Mapping[str, Mapping[str, int]], measured: Mapping[str, Manifest],
    probed: Mapping[str, Sequence[Mapping[str, Any]]], planes: Sequence[Mapping[str, Any]],
    nearest: Sequence[Mapping[str, Any]], reduced: Metrics, classes: Sequence[str],
) -> dict[str, Entries]:  # fmt: skip
    """By name. curated: metrics of each generator's curation. measured: `fidelity` by generator.
    planes, nearest: as the page shows embeddings and the closest pairs."""
    return {
        "funnel": funnel(curated, needed),
        "filters": filters(curated),
        "limits": limits(curated),
        "seen": seen(curated, classes),
        "closest": [
            {"generator": of["generator"], "image_id": pair["image_id"], "class": pair["label"],
             "nearest_training_image": pair["nearest"], "cosine_distance": pair["distance"],
             "dropped": pair["dropped"]}
            for of in nearest for pair in of["pairs"]
        ],
        "fidelity": fidelity(measured),
        "probes": [
            {"generator": name, "class": one["label"], "roc_auc": one["auc"],
             "images_of_each": one["images"]}
            for name, entries in probed.items() for one in entries
        ],
        "embedding": embedding(planes),
        "reduced": [
            {"class": name, **{key: value for key, value in of.items()
                               if isinstance(value, int | float)}}
            for name, of in reduced.items()
        ],
    }  # fmt: skip


def funnel(curated: Metrics, needed: Mapping[str, Mapping[str, int]]) -> Entries:
    """A row for each generator and class: images, and by reason those that were dropped."""
    return [
        {
            "generator": name, "class": label,
            "needed": needed.get(name, {}).get(label, 0), "requested": entry["requested"],
            "generated": entry["generated"], "kept": entry["kept"],
            "unusable": entry["requested"] - entry["generated"],
            **{f"dropped_by_{why}": count for why, count in entry["reasons"].items()},
        }
        for name, metrics in curated.items()
        for label, entry in metrics["funnel"].items()
    ]  # fmt: skip


def filters(curated: Metrics) -> Entries:
    """A row for each generator and filter, in the order in which they look."""
    return [
        {"generator": name, "filter": told["name"], "place": place, "dropped": told["dropped"]}
        for name, metrics in curated.items()
        for place, told in enumerate(metrics.get("filters", ()), 1)
    ]


def limits(curated: Metrics) -> Entries:
    """A row for each generator, filter and limit, and class where it has one of its own. No value:
    nothing is too much or too little."""
    return [
        {"generator": name, "filter": told["name"], "limit": what, "class": label, "value": value}
        for name, metrics in curated.items()
        for told in metrics.get("filters", ())
        for what, limit in told["limits"].items()
        for label, value in (limit.items() if isinstance(limit, Mapping) else [(None, limit)])
    ]


def seen(curated: Metrics, classes: Sequence[str]) -> Entries:
    """A row for each generator and two classes: asked for, and seen by the labeler. Cells of no
    image are left out."""
    return [
        {"generator": name, "asked_for": asked, "seen": other, "images": count,
         "share_of_asked": count / sum(counts)}
        for name, metrics in curated.items() if "labeler" in metrics
        for asked, counts in zip(classes, metrics["labeler"]["confusion"], strict=True)
        for other, count in zip(classes, counts, strict=True)
        if count
    ]  # fmt: skip


def fidelity(measured: Mapping[str, Manifest]) -> Entries:
    """A row for each generator, scope and set of images, with every figure that was computed. Of
    three numbers the last two are the ends of the first one's interval."""
    found = []
    for name, manifest in measured.items():
        for scope in manifest.metrics["scopes"]:
            whole = len(scope["classes"]) > 1
            base = {
                "generator": name, "embedder": manifest.spec["embedder"]["name"],
                "scope": "all" if whole else scope["classes"][0],
                "classes": " | ".join(scope["classes"]), "val_images": scope["val"],
            }  # fmt: skip
            if not scope["sets"]:
                found.append({**base, "too_few": scope["few"]})
            for of, figures in scope["sets"].items():
                numbers = {name: figures.get(name) for name in ("n", "sampled")}
                found.append({**base, "set": of, **numbers, **flat(figures)})
    return found


def flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as columns; an interval is three of them."""
    found: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, list | tuple):
            value = dict(zip(("mean", "low", "high"), value, strict=True))
        if isinstance(value, Mapping):
            found |= {name if end == "mean" else f"{name}_{end}": number
                      for end, number in value.items()}  # fmt: skip
        else:
            found[name] = value
    return found


def embedding(planes: Sequence[Mapping[str, Any]]) -> Entries:
    """A row for each generator and image that its planes show, with its place in each."""
    found = []
    for plot in planes:
        for number, (image_id, label, made) in enumerate(
            zip(plot["ids"], plot["labels"], plot["synthetic"], strict=True)
        ):
            entry = {"generator": plot["generator"], rows.IMAGE_ID: image_id, "class": label,
                     "source": plot["generator"] if made else "real"}  # fmt: skip
            for plane in plot["planes"]:
                method = plane["method"].lower().replace("-", "")
                entry[f"{method}_x"], entry[f"{method}_y"] = plane["points"][number]
            found.append(entry)
    return found
