"""Errors that come back from Ray's workers."""

from __future__ import annotations

from engine.core.errors import EngineError, StorageError


def find_engine_error(error: BaseException) -> EngineError | None:
    """The engine's own error inside an error of Ray, or None.

    If several workers failed, an error that a retry would repeat comes before a `StorageError`.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        # Ray Train keeps the errors of its workers by rank.
        failures = (getattr(current, "worker_failures", None) or {}).values()
        own = [found for failure in failures if (found := find_engine_error(failure)) is not None]
        if own:
            return min(own, key=lambda found: isinstance(found, StorageError))
        # Ray also derives a class from its own and ours, whose text is a traceback.
        if isinstance(current, EngineError) and not hasattr(current, "cause"):
            return current
        current = getattr(current, "cause", None) or current.__cause__ or current.__context__
    return None
