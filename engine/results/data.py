"""Results of the steps on the user's images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from engine.core.labels import LabelSpace, TaskLabels
from engine.core.ledger import Ledger
from engine.core.names import natural
from engine.core.rows import TaskKind
from engine.core.spec import Spec
from engine.results.base import StepResult


class LabelCounts(Spec):
    """The images of each label of a task by split, and those without a label."""

    kind: TaskKind
    counts: dict[str, dict[str, int]]
    unlabelled: dict[str, int]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes in the order of their numbers."""
        return tuple(sorted(self.counts["train"], key=natural))


class IngestResult(StepResult):
    """The frozen data set."""

    kind: ClassVar[str] = "ingest"
    # The data with revised labels is read in the same way.
    kinds: ClassVar[tuple[str, ...]] = ("ingest", "revise")

    # Images by split and class.
    counts: dict[str, dict[str, int]]
    # Images not used, by reason.
    set_aside: dict[str, int] = {}
    # Every file below the reader's root; None if the reader has no files.
    ledger: Ledger | None = None
    # The reader's fingerprint of the files, in its own terms.
    data: dict[str, Any] = {}
    # Splits that the data lacks and that were taken from train.
    carved: list[str] = []
    # Limits used to find near duplicates (`engine.data.near_duplicates.NearLimit`).
    near_limit: dict[str, float | None] = {}
    # Leaks between splits, by kind.
    leaks: dict[str, int] = {}
    # Of a study with several labels per image, whose classes are cells: the labels of each task,
    # and of each cell that is complete and not rare.
    labels: dict[str, LabelCounts] = {}
    cells: dict[str, dict[str, str | tuple[str, ...]]] = {}
    # Labels that voters changed, by split.
    relabelled: dict[str, int] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the study's task, in the order of their numbers."""
        names = {name for by_class in self.counts.values() for name in by_class}
        return tuple(sorted(names, key=natural))

    @property
    def near_duplicates_searched(self) -> bool:
        """Whether near duplicates were distinguishable from similar pictures, and searched for."""
        return self.near_limit.get("fine") is not None

    @property
    def train(self) -> dict[str, int]:
        """Training images by class."""
        return self.counts["train"]

    @property
    def targets(self) -> dict[str, int]:
        """Training images of the classes that images can be generated for: of cells, the complete
        ones that are not rare and that train has."""
        if not self.labels:
            return self.train
        return {name: count for name, count in self.train.items() if name in self.cells and count}

    def chance(self, weights: Mapping[str, float] = {}) -> float:
        """The balanced accuracy of a guess, the mean over tasks."""
        space = self.space(weights)
        return space.chance if space else 1 / len(self.classes)

    def by_label(self, images: Mapping[str, int]) -> dict[str, int]:
        """Training images by class as images by label, named as the outputs of `space`."""
        space = self.space()
        if space is None:
            return dict(images)
        # Of incomplete and rare combinations only the sums are known.
        counts = dict.fromkeys(space.outputs, 0)
        if any(images.get(name) for name in self.train if name not in self.cells):
            for number, (task, label) in enumerate(
                (task, label) for task, of_task in space.tasks.items() for label in of_task.classes
            ):
                counts[space.outputs[number]] += self.labels[task].counts["train"][label]
            images = {name: count - self.train.get(name, 0) for name, count in images.items()}
        for cell, labels in self.cells.items():
            own = space.encode({task: [labels[task]] for task in space.tasks})[0] > 0
            for place in own.nonzero()[0].tolist():
                counts[space.outputs[place]] += images.get(cell, 0)
        return counts

    def space(self, weights: Mapping[str, float] = {}) -> LabelSpace | None:
        """The tasks with these weights, 1 where there is none; None if images have one label."""
        if not self.labels:
            return None
        return LabelSpace(
            {
                name: TaskLabels(
                    kind=counts.kind, classes=counts.classes, weight=weights.get(name, 1.0)
                )
                for name, counts in self.labels.items()
            },
            self.cells,
        )


class ReviseResult(IngestResult):
    """The data set with revised labels."""

    kind: ClassVar[str] = "revise"


class RelabelledSplit(Spec):
    """The votes on a split's labels. cut: doubtful labels that the cap left unflagged. agreement:
    share of labels that each voter sees. pairs: number of changes by old and new class."""

    images: int
    flagged: int
    cut: int
    changed: int
    agreement: dict[str, float]
    pairs: dict[str, dict[str, int]]


class RelabelResult(StepResult):
    """What voters agreed on, by split."""

    kind: ClassVar[str] = "relabel"

    splits: dict[str, RelabelledSplit]


class ExternalResult(StepResult):
    """A test set from elsewhere."""

    kind: ClassVar[str] = "external"

    # Images by class.
    counts: dict[str, int]
    # Images not used, by reason.
    set_aside: dict[str, int] = {}
    # The reader's fingerprint of the files, in its own terms.
    data: dict[str, Any] = {}


class AuditResult(StepResult):
    """Problems in a study's data."""

    kind: ClassVar[str] = "audit"

    # Findings by kind.
    found: dict[str, int]
    # Problems to fix before the study can run.
    must: list[str]
    near_limit: dict[str, float | None]


class EmbedResult(StepResult):
    """Vectors of the training and validation images."""

    kind: ClassVar[str] = "embed"

    width: int
    quarantined: int


class ClusterResult(StepResult):
    """Clusters of each class; class `all classes` if classes are not separated."""

    kind: ClassVar[str] = "cluster"

    # Images of each cluster in descending order, by class.
    sizes: dict[str, list[int]]
    inertia: dict[str, float]
    # Mean silhouette of each number of clusters tried, by class.
    silhouette: dict[str, dict[str, float]] = {}


class SelectResult(StepResult):
    """Representatives of the clusters."""

    kind: ClassVar[str] = "select"

    # Representatives by class.
    chosen: dict[str, int]


class ReducedClass(Spec):
    """A dominant class with some images dropped. Distances are from dropped images to the nearest
    kept image."""

    images: int
    kept: int
    mean_distance: float
    farthest: float


class ReduceResult(StepResult):
    """The images kept of the dominant classes."""

    kind: ClassVar[str] = "reduce"

    classes: dict[str, ReducedClass]


class MatchResult(StepResult):
    """The nearest images of another set."""

    kind: ClassVar[str] = "match"

    # Share of queries whose nearest image has their class.
    same_class: float
    index: str
    median_distance: float | None
