"""From the cells of a table to the files of its images: templates of paths, and what to change in a
path that leads nowhere."""

from __future__ import annotations

import os
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from engine.core.errors import DataError
from engine.core.paths import expanded
from engine.data.images import Rejected
from engine.data.source import Source


def template_columns(template: str) -> list[str]:
    """The columns that a template such as `images_*/{id}.png` names, in order; empty for the name
    of a column of paths."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def is_template(path: str) -> bool:
    return "{" in path


def paths_of(
    template: str, cells: Sequence[Sequence[str]], names: Sequence[str], where: str
) -> list[str]:
    """The path of each row. cells: those of the template's columns. names: the existing files.
    Raises `DataError` if several files fit a row.

    A template with `*`, `**` or `?` is compared with the existing files; one without is filled in.
    """
    columns = template_columns(template)
    filled = [
        template.format_map(dict(zip(columns, row, strict=True))) if all(row) else ""
        for row in cells
    ]
    if not any(mark in template for mark in "*?"):
        return filled
    pattern = _pattern(template)
    by_cells: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            by_cells.setdefault(match.groups(), []).append(name)
    paths = []
    for row, guess in zip(cells, filled, strict=True):
        fitting = by_cells.get(tuple(row), [])
        if len(fitting) > 1:
            raise DataError(
                f"{where}: {template!r} fits several files: {fitting[0]} and {fitting[1]}; name the"
                " folder in it"
            )
        paths.append(fitting[0] if fitting else guess)
    return paths


def _pattern(template: str) -> re.Pattern[str]:
    """A template as a pattern with a group for each column, of which a repeated one must be the
    same."""
    parts, seen = [], set[str]()
    for text, name, _, _ in string.Formatter().parse(template):
        for piece in re.split(r"(\*\*/|\*\*|\*|\?)", text):
            parts.append(
                {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(piece)
                or re.escape(piece)
            )
        if name is not None:
            group = f"c{len(seen)}"
            parts.append(f"(?P<{group}>.+?)" if name not in seen else ".+?")
            seen.add(name)
    return re.compile("".join(parts))


class TableBytes:
    """Files below the root; a path that does not exist is refused with the nearest one that does.
    Picklable."""

    def __init__(self, source: Source, nearest: Mapping[str, str]) -> None:
        self.source, self.nearest = source, nearest

    def read(self, uri: str) -> bytes:
        if uri in self.nearest:
            raise Rejected("missing", self.nearest[uri])
        return self.source.read(uri)


def nearest_files(paths: Iterable[str], names: Sequence[str], root: str) -> dict[str, str]:
    """For each path that is written differently from an existing file: what to change. names: the
    existing files. root: of both."""
    folder = os.path.realpath(expanded(root)) if "://" not in root else root.rstrip("/")
    by_form: dict[str, str] = {}
    by_stem: dict[str, str] = {}
    for name in names:
        by_form.setdefault(_folded(name), name)
        by_stem.setdefault(_folded(os.path.splitext(name)[0]), name)
        by_stem.setdefault(_folded(PurePosixPath(name).stem), name)
    hints = {}
    for path in filter(None, paths):
        plain = path.replace("\\", "/")
        inside = plain.removeprefix(folder).lstrip("/") if plain.startswith(folder) else plain
        inside = inside.removeprefix("./")
        nearest = by_form.get(_folded(inside)) or by_stem.get(_folded(os.path.splitext(inside)[0]))
        if nearest is None:
            continue
        if "\\" in path:
            how = "write / for \\"
        elif inside != plain:
            how = "write it relative to reader.root"
        elif nearest == inside:
            how = "write it without ./"
        elif unicodedata.normalize("NFC", nearest) == unicodedata.normalize("NFC", inside):
            how = "the names differ in their Unicode normal form (NFC or NFD)"
        elif nearest.casefold() == inside.casefold():
            how = "the names differ in case"
        else:
            how = "folder or extension differ"
        hints[path] = f"there is {nearest[:120]}: {how}"
    return hints


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
