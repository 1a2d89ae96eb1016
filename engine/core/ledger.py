"""The account of a reader: every file below its root, and what became of it."""

from __future__ import annotations

from pydantic import model_validator

from engine.core.spec import Spec


class Ledger(Spec):
    """The files below a reader's root: `files` = `read` + the sum of `skipped`."""

    files: int
    # Files that contain images or tables of the study.
    read: int
    # Files that were not read, by reason: hidden, system, thumbnails, not in the table, or the
    # extension.
    skipped: dict[str, int] = {}
    # The first of them by reason, for reasons that a user may not expect.
    first: dict[str, str] = {}
    # Entries inside archives and tables that are no image of the study, by kind.
    entries: dict[str, int] = {}

    @model_validator(mode="after")
    def _sums_up(self) -> Ledger:
        if self.files != self.read + sum(self.skipped.values()):
            raise ValueError(f"{self.files} files, but {self.read} read and {self.skipped} skipped")
        return self

    @property
    def not_read(self) -> int:
        return self.files - self.read
