"""The table of tried settings, for the terminal and as CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.report.download import Cell
from engine.report.download import as_csv as rows_as_csv

# Columns that are not knobs.
FIGURES = ("try", "state", "mean", "sd", "steps", "seconds", "error", "scores")
Row = Mapping[str, Any]


def shown(value: Any) -> str:
    """The value of a knob on one line."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=list)


def as_csv(tries: Sequence[Row]) -> bytes:
    """One line per setting, in order of number, with all digits."""

    def cell(value: Any) -> Cell:
        return value if type(value) in (int, float) else shown(value)

    return rows_as_csv([{name: cell(of) for name, of in row.items()} for row in tries], "")


def as_text(tries: Sequence[Row], best: Row, objective: str) -> str:
    """The table in plain text: best settings first, failed ones last."""
    knobs = [name for name in tries[0] if name not in FIGURES]
    ranked = sorted(tries, key=lambda row: (row["state"] != "ok", -(row["mean"] or 0.0)))
    lines = [["try", *knobs, f"val {objective}", "sd", "steps", "s", ""]]
    for row in ranked:
        note = {"ok": "best" if row is best else "", "failed": f"failed: {row['error'][:100]}"}
        lines.append(
            [
                f"{row['try']}", *(shown(row[name]) for name in knobs),
                *("" if row[name] is None else f"{row[name]:.3f}" for name in ("mean", "sd")),
                "" if row["steps"] is None else f"{row['steps']:,}", f"{row['seconds']:.0f}",
                note.get(row["state"], str(row["state"])),
            ]
        )  # fmt: skip
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])
