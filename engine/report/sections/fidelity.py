"""Fidelity on the page: a table for each generator over all its fits, with real images for
comparison; the funnel of each fit; the images closest to train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from engine.context import Context
from engine.core.manifest import Manifest
from engine.core.step import Subject
from engine.metrics.minimums import FRECHET_LEAST, LEAST, NEAR, NEAR_LEAST
from engine.report.sections.curation import TILES, closest
from engine.results.images import CurateResult, FidelityResult, FidelityScope, FidelitySet
from engine.wording import notice_in_words

_NAMES = {
    "kept": "generated, kept", "generated": "generated, before curation",
    "real": "real, from train",
}  # fmt: skip
# Figures in the order of the table's columns, with their formats.
_FORMATS: dict[str, Callable[[float], str]] = {
    "frechet": "{:.3g}".format, "kernel": "{:.2g}".format, "precision": "{:.2f}".format,
    "recall": "{:.2f}".format, "density": "{:.2f}".format, "coverage": "{:.2f}".format,
    "vendi": "{:.1f}".format, "nearest": "{:.3f}".format,
    # In percent, as its column says.
    "near": lambda share: f"{100 * share:.1f}",
}  # fmt: skip
# A manifest of each fit.
Fits = Sequence[Manifest]


def of_fits(context: Context, kind: str, generator: str) -> list[Manifest]:
    """The manifests of this kind, one for each fit of a generator; empty if not planned."""
    return [
        context.inputs[name]
        for name, step in context.step.inputs.items()
        if (step.kind, step.subject.name) == (kind, generator)
    ]


def fidelity_tables(context: Context, generators: Sequence[str]) -> list[dict[str, Any]]:
    """For each measured generator, its scopes with a row for each set, and its warnings."""
    tables = []
    for name in generators:
        fits = of_fits(context, "fidelity", name)
        if not fits:
            continue
        embedder = fits[0].spec["embedder"]
        tables.append(
            {
                "generator": name, "embedder": in_words(embedder), "fits": len(fits),
                "k": fits[0].spec["k"],
                "scopes": merge_scopes([FidelityResult.of(manifest).scopes for manifest in fits]),
                "warnings": warnings_of(fits),
                "least": LEAST, "frechet_least": FRECHET_LEAST, "near": NEAR,
                "near_least": NEAR_LEAST,
            }
        )  # fmt: skip
    return tables


def in_words(embedder: Mapping[str, Any]) -> str:
    """An embedder in words: its name and, if it has one, its model."""
    return " ".join(str(embedder[key]) for key in ("name", "model") if key in embedder)


def warnings_of(fits: Fits) -> list[str]:
    """The warnings of all fits, with the fits concerned."""
    fits_by_text: dict[str, list[int]] = {}
    for fit, manifest in enumerate(fits):
        for notice in FidelityResult.of(manifest).warnings:
            fits_by_text.setdefault(notice_in_words(notice), []).append(fit)
    return [text if len(numbers) == len(fits) else f"{numbered(numbers)}: {text}"
            for text, numbers in fits_by_text.items()]  # fmt: skip


def numbered(fits: Sequence[int]) -> str:
    return f"{'fit' if len(fits) == 1 else 'fits'} {', '.join(map(str, fits))}"


def merge_scopes(fits: Sequence[Sequence[FidelityScope]]) -> list[dict[str, Any]]:
    """The scopes of all fits as the page shows them.

    Fits with the same classes and numbers of images share a row; others have separate rows, because
    figures from different numbers of images are not comparable.
    """
    by_classes: dict[tuple[str, ...], dict[int, FidelityScope]] = {}
    for fit, scopes in enumerate(fits):
        for scope in scopes:
            by_classes.setdefault(tuple(scope.classes), {})[fit] = scope
    # All classes together first; they may differ between fits.
    order = sorted(by_classes, key=lambda classes: len(classes) == 1)
    return [merge_scope(by_classes[classes], len(fits)) for classes in order]


def merge_scope(of_fit: Mapping[int, FidelityScope], fits: int) -> dict[str, Any]:
    """One scope of the fits that have it."""
    first = next(iter(of_fit.values()))
    measured = next((scope for scope in of_fit.values() if scope.sets), first)
    few: dict[str, list[int]] = {}
    for fit, scope in of_fit.items():
        if scope.few:
            few.setdefault(scope.few, []).append(fit)
    return {
        "title": ", ".join(first.classes), "whole": len(first.classes) > 1,
        "val": first.val, "val_sampled": measured.val_sampled,
        "val_nearest": measured.val_nearest,
        "few": "; ".join(text if len(numbers) == fits else f"{text} ({numbered(numbers)})"
                         for text, numbers in few.items()),
        "rows": set_rows({fit: scope.sets for fit, scope in of_fit.items()}, fits),
        "floor": set_rows({fit: scope.floor for fit, scope in of_fit.items()}, fits),
    }  # fmt: skip


def set_rows(of_fit: Mapping[int, Mapping[str, FidelitySet]], fits: int) -> list[dict[str, Any]]:
    """A row for each set and each number of its images among the fits."""
    entries = []
    for name, title in _NAMES.items():
        groups: dict[tuple[int, int | None], dict[int, FidelitySet]] = {}
        for fit, sets in of_fit.items():
            if name in sets:
                key = sets[name].n, sets[name].sampled
                groups.setdefault(key, {})[fit] = sets[name]
        for (n, sampled), by_fit in groups.items():
            entries.append(
                {
                    "set": title if len(by_fit) == fits else f"{title}, {numbered(list(by_fit))}",
                    "real": name == "real", "n": n, "sampled": sampled,
                    "cells": [
                        cell(figure, [getattr(entry, figure) for entry in by_fit.values()])
                        for figure in _FORMATS
                    ] if sampled is not None else None,
                }
            )  # fmt: skip
    return entries


def cell(figure: str, fits: Sequence[float | list[float] | None]) -> tuple[str, str]:
    """The cell of a figure: its mean over fits, with their range if they differ, else its interval
    if it has one."""
    values = [value for value in fits if value is not None]
    if not values:
        return "", ""
    written = _FORMATS[figure]
    plain = [value[0] if isinstance(value, list) else value for value in values]
    low, high = min(plain), max(plain)
    if low < high:
        # No range if the difference is not visible at the written precision.
        spread = bracketed([written(low), written(high)]) if written(low) != written(high) else ""
        return written(sum(plain) / len(plain)), spread
    ends = values[0][1:] if isinstance(values[0], list) else ()
    return written(low), bracketed(list(map(written, ends)))


def bracketed(ends: Sequence[str]) -> str:
    """A range in short form for a table of many columns; empty without ends."""
    return f"[{', '.join(ends)}]" if ends else ""


def fit_rows(context: Context, generator: str) -> list[dict[str, Any]]:
    """For each fit of a generator: images generated, kept and dropped by each filter, the share of
    kept images near to train, and the reason that stops their export."""
    measured = of_fits(context, "fidelity", generator)
    entries = []
    for fit, manifest in enumerate(of_fits(context, "curate", generator)):
        result = CurateResult.of(manifest)
        generated = sum(entry.generated for entry in result.funnel.values())
        kept = sum(entry.kept for entry in result.funnel.values())
        near = near_of(FidelityResult.of(measured[fit]).scopes) if measured else None
        entries.append(
            {
                "fit": fit, "generated": generated, "kept": kept,
                "share": kept / generated if generated else None,
                "dropped": {report.name: report.dropped for report in result.filters},
                "near": cell("near", [near]),
                "stops": "; ".join(notice_in_words(report.stops) for report in result.filters
                                   if report.stops),
            }
        )  # fmt: skip
    return entries


def near_of(scopes: Iterable[FidelityScope]) -> list[float] | None:
    """The share of kept images near to train, from the first scope with figures."""
    for scope in scopes:
        kept = scope.sets.get("kept")
        if kept is not None and kept.frechet is not None:
            return kept.near
    return None


def closest_of_fits(context: Context, generators: Sequence[str], side: int) -> list[dict[str, Any]]:
    """For each generator, the images of all fits that are closest to a training image."""
    sheets = []
    for name in generators:
        count = len(of_fits(context, "curate", name))
        pairs = [
            {**pair, "fit": fit}
            for fit in range(count)
            for sheet in closest(context, [Subject(name, fit).label], side)
            for pair in sheet["pairs"]
        ]
        nearest = sorted(pairs, key=lambda pair: float(pair["distance"]))[:TILES]
        sheets.append({"generator": name, "fits": count, "pairs": nearest})
    return sheets
