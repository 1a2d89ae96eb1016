"""The base class of results, read from a manifest."""

from __future__ import annotations

from typing import ClassVar, Self

from engine.core.errors import StorageError
from engine.core.manifest import Manifest
from engine.core.notice import Notice
from engine.core.spec import Spec


class StepResult(Spec):
    """The result of a step of `kind`."""

    kind: ClassVar[str]
    # All kinds with such a result, if there are several.
    kinds: ClassVar[tuple[str, ...]] = ()

    # A line about the result, for the terminal.
    headline: str = ""
    warnings: list[Notice] = []

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """The result in a manifest. Raises `StorageError` if its kind or version differs."""
        if manifest.kind not in (cls.kinds or (cls.kind,)):
            raise StorageError(f"{manifest.label} is of kind {manifest.kind}, not {cls.kind}")
        try:
            return cls.model_validate(manifest.metrics)
        except ValueError as error:
            raise StorageError(
                f"{manifest.label}: its result was stored by another version of the engine; run"
                f" again with --discard {manifest.label}"
            ) from error
