"""Existing images from elsewhere, with their intended labels.

They enter curation and comparison like any other generator's images. Any reader can list them, and
they pass the study's preprocessing. The seed draws the images to use, so that another generator fit
is another draw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, SerializeAsAny, model_validator

from engine.core import rows
from engine.core.errors import DataError
from engine.core.registry import PluginField, resolve
from engine.core.spec import Spec, digest, explained
from engine.data.images import Rejected, decode_own
from engine.data.sandbox import Sandbox
from engine.generators import Generator, GeneratorSpec, Request, SampleBatch, TrainingRows


class FolderSpec(GeneratorSpec):
    later_fields: ClassVar[tuple[str, ...]] = ("real", "baseline")

    name: Literal["folder"] = "folder"
    reader: Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("readers"))]
    # The reader's labelling task; None if it has only one.
    task: str | None = None
    # The kind of images, in IPTC's vocabulary of digital source types.
    digital_source_type: str = "trainedAlgorithmicMedia"
    # Real images from elsewhere: their arms are shown for comparison, and test no claim about
    # synthetic ones.
    real: bool = False
    # Synthetic images must be better than these real images, too, to help.
    baseline: bool = False

    @model_validator(mode="after")
    def _real_baseline(self) -> FolderSpec:
        if self.baseline and not self.real:
            raise explained("baseline: only real images can be one; set real: true as well")
        return self


class Folder(Generator[FolderSpec]):
    version = 2

    def __init__(self, spec: FolderSpec, preprocess: Any) -> None:
        super().__init__(spec, preprocess)
        self.digital_source_type = spec.digital_source_type

    def _reader(self) -> Any:
        spec: Any = self.spec.reader
        return resolve("readers", spec.name)(spec)

    @cached_property
    def _by_label(self) -> dict[str, list[str]]:
        reader = self._reader()
        tasks = list(reader.tasks())
        task = self.spec.task or tasks[0]
        if task not in tasks or (self.spec.task is None and len(tasks) > 1):
            raise DataError(f"generators: folder: set task to one of {', '.join(tasks)}")
        records = reader.chosen(task)
        uris: dict[str, list[str]] = {}
        labels = records[rows.label_column(task)].to_pylist()
        for uri, label in zip(records[rows.URI].to_pylist(), labels, strict=True):
            uris.setdefault(label, []).append(uri)
        return uris

    def external_digests(self) -> Mapping[str, str]:
        return dict(self._reader().fingerprint())

    def nested(self) -> Sequence[tuple[str, Any]]:
        return (("readers", self.spec.reader),)

    def available(self) -> Mapping[str, int]:
        return Counter({label: len(uris) for label, uris in self._by_label.items()})

    def plan(self, label: str, count: int, train: TrainingRows, seed: int) -> Iterator[Request]:
        uris = self._by_label.get(label, [])
        drawn = sorted(uris, key=lambda uri: digest([seed, uri]))
        for index, uri in enumerate(drawn[:count]):
            yield Request(label=label, index=index, uri=uri)

    def load(self, weights: Path | None, device: str) -> None:
        self.source = self._reader().bytes()
        # Lossless here: the step applies the study's codec, as to every other image.
        self.sandbox = Sandbox(self.preprocess.model_copy(update={"codec": "png"}))

    def sample(self, batch: SampleBatch) -> list[np.ndarray | str]:
        images: list[np.ndarray | str] = []
        for uri in batch.uris:
            try:
                decoded = self.sandbox.decode(self.source.read(str(uri)), str(uri))
                images.append(decode_own(decoded.encoded))
            except Rejected as rejected:
                images.append(rejected.reason)
        return images
