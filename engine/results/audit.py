"""What an audit finds, for its page and its table."""

from __future__ import annotations

from dataclasses import dataclass

# The class of an image without a label, as the audit shows it.
NO_LABEL = "(no label)"


@dataclass(frozen=True)
class Finding:
    """A finding about one image or a pair. `score` orders the findings of a kind."""

    kind: str
    image_id: str
    uri: str
    label: str
    split: str
    other_id: str = ""
    other_uri: str = ""
    other_label: str = ""
    other_split: str = ""
    suggested: str = ""
    score: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class GroupCounts:
    """Groups of each class and in all, and the largest groups of several images."""

    by_class: dict[str, int]
    largest: list[tuple[str, int]]
    total: int
