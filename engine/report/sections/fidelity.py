"""How like real images the generated ones are: a table for each generator over all its fits, with
real images for comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.metrics.minimums import FRECHET_LEAST, LEAST, NEAR, NEAR_LEAST
from engine.report.download import Cell, Row
from engine.report.generators import GeneratorFit, embedder_name
from engine.report.page import Section, render
from engine.report.results import StudyResults
from engine.results.images import FidelityResult, FidelityScope, FidelitySet
from engine.wording import notice_in_words

_SETS = ("kept", "generated", "real")
# Figures in the order of the table's columns, with their formats.
_FORMATS: dict[str, Callable[[float], str]] = {
    "frechet": "{:.3g}".format, "kernel": "{:.2g}".format, "precision": "{:.2f}".format,
    "recall": "{:.2f}".format, "density": "{:.2f}".format, "coverage": "{:.2f}".format,
    "vendi": "{:.1f}".format, "nearest": "{:.3f}".format,
    # In percent, as its column says.
    "near": lambda share: f"{100 * share:.1f}",
}  # fmt: skip


@dataclass(frozen=True)
class FigureCell:
    """A figure as written, and its range over fits or its interval."""

    value: str
    spread: str


@dataclass(frozen=True)
class SetRow:
    """A set of images in the fits where it has `n` images; no cells if these are too few."""

    set: str
    fits: list[int]
    n: int
    sampled: int | None
    cells: list[FigureCell]


@dataclass(frozen=True)
class MergedScope:
    """A scope over the fits that have it. few: the reasons for missing figures, with their fits."""

    classes: list[str]
    val: int
    val_sampled: int | None
    val_nearest: float | None
    near_expected: list[float] | None
    few: dict[str, list[int]]
    rows: list[SetRow]
    floor: list[SetRow]


@dataclass(frozen=True)
class MeasuredGenerator:
    """A generator with its scopes. warnings: with the fits concerned. k: of neighbourhoods."""

    generator: str
    embedder: str
    fits: int
    k: int
    scopes: list[MergedScope]
    warnings: dict[str, list[int]]


def fidelity(results: StudyResults) -> Section:
    """A table for each measured generator."""
    generators, tables = [], []
    for name, fits in results.generators.items():
        every = [fit.measured for fit in fits if fit.measured]
        if every and fits[0].fidelity:
            spec = fits[0].fidelity.spec
            generators.append(
                MeasuredGenerator(
                    name, embedder_name(spec["embedder"]), len(every), spec["k"],
                    merge_scopes([result.scopes for result in every]), warnings_of(every),
                )
            )  # fmt: skip
        tables += [row for fit in fits for row in fidelity_rows(fit)]
    html = render(
        "fidelity.html", generators=generators, least=LEAST, frechet_least=FRECHET_LEAST, near=NEAR,
        near_least=NEAR_LEAST,
    )  # fmt: skip
    return Section(html, {"fidelity": tables})


def warnings_of(fits: Sequence[FidelityResult]) -> dict[str, list[int]]:
    """The warnings of all fits, with the fits concerned."""
    fits_of: dict[str, list[int]] = {}
    for fit, result in enumerate(fits):
        for notice in result.warnings:
            fits_of.setdefault(notice_in_words(notice), []).append(fit)
    return fits_of


def merge_scopes(fits: Sequence[Sequence[FidelityScope]]) -> list[MergedScope]:
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
    return [merge_scope(by_classes[classes]) for classes in order]


def merge_scope(of_fit: Mapping[int, FidelityScope]) -> MergedScope:
    """One scope of the fits that have it."""
    first = next(iter(of_fit.values()))
    measured = next((scope for scope in of_fit.values() if scope.sets), first)
    few: dict[str, list[int]] = {}
    for fit, scope in of_fit.items():
        if scope.few is not None:
            few.setdefault(notice_in_words(scope.few), []).append(fit)
    return MergedScope(
        first.classes, first.val, measured.val_sampled, measured.val_nearest,
        measured.near_expected, few,
        set_rows({fit: scope.sets for fit, scope in of_fit.items()}),
        set_rows({fit: scope.floor for fit, scope in of_fit.items()}),
    )  # fmt: skip


def set_rows(of_fit: Mapping[int, Mapping[str, FidelitySet]]) -> list[SetRow]:
    """A row for each set and each number of its images among the fits."""
    entries = []
    for name in _SETS:
        groups: dict[tuple[int, int | None], dict[int, FidelitySet]] = {}
        for fit, sets in of_fit.items():
            if name in sets:
                groups.setdefault((sets[name].n, sets[name].sampled), {})[fit] = sets[name]
        for (n, sampled), by_fit in groups.items():
            cells = [cell(figure, [getattr(entry, figure) for entry in by_fit.values()])
                     for figure in _FORMATS if sampled is not None]  # fmt: skip
            entries.append(SetRow(name, list(by_fit), n, sampled, cells))
    return entries


def cell(figure: str, fits: Sequence[float | list[float] | None]) -> FigureCell:
    """The cell of a figure: its mean over fits, with their range if they differ, else its interval
    if it has one."""
    values = [value for value in fits if value is not None]
    if not values:
        return FigureCell("", "")
    written = _FORMATS[figure]
    plain = [value[0] if isinstance(value, list) else value for value in values]
    low, high = min(plain), max(plain)
    if low < high:
        # No range if the difference is not visible at the written precision.
        spread = bracketed([written(low), written(high)]) if written(low) != written(high) else ""
        return FigureCell(written(sum(plain) / len(plain)), spread)
    ends = values[0][1:] if isinstance(values[0], list) else ()
    return FigureCell(written(low), bracketed(list(map(written, ends))))


def bracketed(ends: Sequence[str]) -> str:
    """A range in short form for a table of many columns; empty without ends."""
    return f"[{', '.join(ends)}]" if ends else ""


def near_of(scopes: Iterable[FidelityScope]) -> list[float] | None:
    """The share of kept images near to train, from the first scope with figures."""
    for scope in scopes:
        kept = scope.sets.get("kept")
        if kept is not None and kept.frechet is not None:
            return kept.near
    return None


def fidelity_rows(fit: GeneratorFit) -> list[Row]:
    """A row for each scope and set of images, with every computed figure.

    An interval is three columns: the figure and both ends.
    """
    if fit.fidelity is None or fit.measured is None:
        return []
    entries: list[Row] = []
    embedder = fit.fidelity.spec["embedder"]["name"]
    for scope in fit.measured.scopes:
        base: Row = {
            **fit.columns, "embedder": embedder,
            "scope": "all" if len(scope.classes) > 1 else scope.classes[0],
            "classes": " | ".join(scope.classes), "val_images": scope.val,
            **scope.model_dump(include={"val_sampled", "val_nearest"}, exclude_none=True),
        }  # fmt: skip
        if scope.few is not None:
            entries.append({**base, "too_few": notice_in_words(scope.few)})
        # The sets again with as many images as train has, if that is fewer.
        for at_floor, sets in ((False, scope.sets), (True, scope.floor)):
            for name, figures in sets.items():
                entries.append(
                    {**base, "set": name, "at_floor": at_floor, "n": figures.n,
                     "sampled": figures.sampled, **figure_columns(figures)}
                )  # fmt: skip
    return entries


def figure_columns(figures: FidelitySet) -> Row:
    """Figures as columns; an interval is three of them."""
    columns: dict[str, Cell] = {}
    for name, value in figures.model_dump(exclude_unset=True).items():
        if isinstance(value, list | tuple):
            columns |= dict(zip((name, f"{name}_low", f"{name}_high"), value, strict=True))
        else:
            columns[name] = value
    return columns
