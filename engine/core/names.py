"""Names of files and pages: from users' text (class names, prompts), by content, or random."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import uuid
from collections.abc import Iterable

from engine.core.errors import DataError

# Hex digits of the SHA-256 in the name of a part: 128 bits.
_NAMED_DIGITS = 32
_NAMED = re.compile(r"\.([0-9a-f]{32})\.[A-Za-z0-9]+$")


def attempt_name() -> str:
    """A random name, unique across attempts, processes and machines."""
    return uuid.uuid4().hex[:16]


def part_name(name: str, sha256: str, suffix: str) -> str:
    """The name of the part with this SHA-256 (64 hex digits)."""
    return f"{name}.{sha256[:_NAMED_DIGITS]}.{suffix}"


def named_digest(key: str) -> str | None:
    """The digest in the name of a part; None for any other key."""
    match = _NAMED.search(key)
    return match[1] if match else None


def slug(text: str) -> str:
    """A file name: at most 40 characters of [a-z0-9-] from `text`, and a hash that keeps different
    texts apart."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-")
    return f"{words or 'x'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_class_names(names: Iterable[str], task: str) -> None:
    """Raise `DataError` if class names differ only in case, spaces or Unicode form, or if one
    cannot be displayed."""
    seen: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        if (
            not name.strip()
            or len(name) > 200
            or any(unicodedata.category(char) in ("Cc", "Cf", "Cs") for char in name)
        ):
            raise DataError(
                f"label.{task}: the class name {name[:60]!r} is empty, longer than 200 characters"
                " or contains invisible characters; rename it"
            )
        folded = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        seen.setdefault(folded, []).append(name)
    if alike := [same for same in seen.values() if len(same) > 1]:
        listed = "; ".join(" and ".join(map(repr, same)) for same in alike[:10])
        raise DataError(
            f"label.{task}: class names that differ only in case, spaces or Unicode form:"
            f" {listed}; use the same name in the data (reader.rename merges classes of the"
            " study's task)"
        )


def csv_cell(text: str) -> str:
    """The text, quoted if a spreadsheet would read it as a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def natural(name: str) -> tuple[list[str | int], str]:
    """A sort key that orders the numbers in names by value: 2 before 10."""
    # Odd parts are the digits, so equal places always have equal types.
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name
