"""The inputs of classifiers, and the stages that classify."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.classifiers import Classifier
from engine.core import rows
from engine.core.errors import ResumeError
from engine.core.labels import LabelSpace
from engine.core.manifest import Manifest, copy_files
from engine.core.registry import kind_of
from engine.core.shards import parquet_rows
from engine.core.spec import digest
from engine.core.store import Store
from engine.data.arrays import large_zeros, read_pixels
from engine.data.images import Preprocess
from engine.results.comparison import TrainResult
from engine.work.share import Arrays, Share, within_process
from engine.work.stage import Batch, Place, Stage


def external_digests(spec: Any) -> dict[str, str]:
    """Digests of the external files that a spec's classifier reads."""
    kind = kind_of("classifiers", spec.classifier)
    return dict(kind(spec.classifier, spec.preprocess, ()).external_digests())


def changed_weights(spec: Any, recorded: Mapping[str, str]) -> str | None:
    """The reason why a classifier trained from local weights is out of date, or None. recorded:
    the digests at its training. Weights that are absent now, or were not recorded, count as
    unchanged."""
    if differ(external_digests(spec), recorded):
        return f"the weights that classifier {spec.classifier.name} starts from changed"
    return None


def differ(current: Mapping[str, str], recorded: Mapping[str, str]) -> bool:
    return any(recorded.get(name, digest) != digest for name, digest in current.items())


def refuse_other_weights(classifier: Classifier, recorded: Mapping[str, str]) -> None:
    """Raise `ResumeError` if a classifier was trained on the `features` of other weights than the
    present ones."""
    # A network on pixels stores all of its weights itself, whatever it started from.
    if classifier.on_features and differ(classifier.external_digests(), recorded):
        raise ResumeError(
            f"classifier {classifier.spec.name}: the weights that embed its images changed since"
            " its training; run again to train it again"
        )


def classifier_inputs(
    store: Store, keys: tuple[str, ...], classifier: Classifier, device: str,
    share: Share = within_process,
) -> Arrays:  # fmt: skip
    """The classifier's inputs for the images of these parts, and their ids: computed once for each
    of train, val and each pool, and shared."""
    shape = classifier.preprocess.shape
    if not classifier.on_features:
        made_of = digest(["pixels", store.url, keys, shape])
        return share(made_of, lambda: read_pixels(store, keys, shape))
    made_of = digest(
        [
            "features", store.url, keys, classifier.spec, classifier.preprocess, device,
            dict(classifier.external_digests()),
        ]
    )  # fmt: skip
    return share(made_of, lambda: features(store, keys, classifier, device))


def features(store: Store, keys: tuple[str, ...], classifier: Classifier, device: str) -> Arrays:
    """Features and ids of all images of these parts; one part's pixels are in memory at a time."""
    ids: list[str] = []
    whole = np.empty((0, 0), np.float32)
    count = 0
    for key in keys:
        with store.parquet(key) as file:
            count += file.metadata.num_rows
    for key in keys:
        pixels, part_ids = read_pixels(store, [key], classifier.preprocess.shape)
        if not part_ids:
            continue
        part_features = classifier.features(pixels, device)
        if not ids:
            whole = large_zeros(count, part_features.shape[1])
        whole[len(ids) : len(ids) + len(part_ids)] = part_features
        ids += part_ids
    return whole, ids


MODEL = "model"


class ClassifyByMany(Stage):
    """Like `Classify`, by the model that the column `model` names; one model per shard."""

    writes = (rows.PROBABILITIES,)
    device = "accelerator"

    def __init__(self, models: Mapping[str, Classify]) -> None:
        self.models = dict(models)

    def load(self, place: Place) -> None:
        self.place = place
        self.loaded = ""

    def __call__(self, batch: Batch) -> Batch:
        name = batch[MODEL][0].as_py()
        if name != self.loaded:
            self.model = self.models[name]
            self.model.load(self.place)
            self.loaded = name
        return self.model(batch)


def rows_with_model(store: Store, task: Mapping[str, Any]) -> pa.Table:
    """The images of a shard, with the key of their model."""
    table = parquet_rows(store, task)
    return table.append_column(MODEL, pa.array([task[MODEL]] * table.num_rows, pa.string()))


class Classify(Stage):
    """Pixels to probabilities of the classes, or of the labels of several tasks (`space`), by the
    classifier of a `train` step."""

    writes = (rows.PROBABILITIES,)
    device = "accelerator"

    def __init__(
        self, store: Store, spec: Any, preprocess: Preprocess, classes: Sequence[str],
        trained: Manifest, space: LabelSpace | None = None,
    ) -> None:  # fmt: skip
        self.store, self.spec, self.preprocess, self.space = store, spec, preprocess, space
        self.classes, self.weights = tuple(classes), tuple(trained.parts)
        self.outside = TrainResult.of(trained).outside

    def load(self, place: Place) -> None:
        self.place = place.device
        self.classifier = kind_of("classifiers", self.spec)(
            self.spec, self.preprocess, self.space.outputs if self.space else self.classes
        )
        refuse_other_weights(self.classifier, self.outside)
        with tempfile.TemporaryDirectory() as name:
            folder = copy_files(self.store, self.weights, Path(name))
            self.network = self.classifier.load(folder / "weights").to(place.device)

    def __call__(self, batch: Batch) -> Batch:
        from engine.nets.classification import predict
        from engine.nets.heads import SeveralTasks

        inputs = self.classifier.features(batch["pixels"], self.place)
        head = SeveralTasks(self.space) if self.space else None
        probabilities = predict(self.network, self.classifier.prepare, inputs, self.place, head)
        return {**batch, rows.PROBABILITIES: probabilities}
