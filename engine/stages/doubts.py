"""What speaks against a generator: signs that it learnt nothing, and what cannot be judged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from engine.core.notice import Notice
from engine.filters import Scores
from engine.metrics.classification import confusion
from engine.metrics.usefulness import LEAST, usefulness
from engine.nets.classification import class_numbers
from engine.results.images import LabelerReport, Usefulness

# By chance, a labeler that recognises half of a class is rarely as often wrong.
_UNLIKELY = 0.025


def agreement(
    classes: Sequence[str], generated: Scores, val: Scores, used: np.ndarray, kept: np.ndarray
) -> LabelerReport:
    """How often the labeler predicts the requested label, and for kept images the label in use;
    its accuracy on val is the reference. used: the labels in use (n,)."""
    assert generated.probabilities is not None
    assert val.probabilities is not None
    intended, seen = class_numbers(generated.labels, classes), generated.probabilities.argmax(1)
    right = seen == intended
    truth = class_numbers(val.labels, classes)
    of_val = val.probabilities.argmax(1)
    return LabelerReport(
        agreement=float(right.mean()) if len(right) else None,
        agreement_kept=float((class_numbers(used, classes) == seen)[kept].mean())
        if kept.any()
        else None,
        agreement_val=float((of_val == truth).mean()),
        confusion=confusion(intended, seen, len(classes)).tolist(),
        confusion_val=confusion(truth, of_val, len(classes)).tolist(),
    )


def signs_of(
    generated: Scores, val: Scores, train: Scores, labeler: LabelerReport | None
) -> Usefulness:
    """Whether the generator learnt anything, from all its images. Rare classes may have too few
    images in val; one that learnt nothing is far from train, too."""
    signs = usefulness(val.vectors, val.labels, generated.vectors, generated.labels, seed=0)
    if signs.pairs is not None:
        signs = usefulness(train.vectors, train.labels, generated.vectors, generated.labels, 0)
    if labeler is None or labeler.agreement is None:
        return signs
    counts = np.asarray(labeler.confusion, np.float64)
    of_val = np.asarray(labeler.confusion_val, np.float64)
    asked = counts.sum(1) / counts.sum()
    present = of_val.sum(1) > 0
    if (asked > 0).sum() < 2 or not present[asked > 0].all():
        return signs  # with one class, seeing it says nothing about classes
    by_chance = asked @ counts.sum(0) / counts.sum()
    # In val as often as requested: rare classes may be hard for the labeler.
    return signs.model_copy(
        update={"seen": labeler.agreement, "chance": float(by_chance),
                "seen_val": labeler.accuracy_as_requested}
    )  # fmt: skip


def doubts_of(
    classes: Sequence[str], signs: Usefulness | None, labeler: LabelerReport | None
) -> list[Notice]:
    """What cannot be judged about a generator: all of it with too few images, or a requested class
    of which the labeler recognises fewer than half of the real images, beyond chance."""
    doubts = []
    if signs is not None and signs.pairs is not None:
        doubts.append(Notice.of("few_to_judge", pairs=signs.pairs, least=LEAST))
    blind = []
    if labeler is not None:
        for place, name in enumerate(classes):
            row = labeler.confusion_val[place]
            right, images = row[place], sum(row)
            requested = sum(labeler.confusion[place]) > 0
            # One-sided: only classes that it recognises too seldom matter.
            if requested and images and stats.binom.cdf(right, images, 0.5) < _UNLIKELY:
                blind.append((name, right, images))
    if blind:
        name, right, images = blind[0]
        more = ""
        if len(blind) > 1:
            more = f"; likewise {', '.join(other for other, _, _ in blind[1:4])}"
            more += f" and {len(blind) - 4} more" if len(blind) > 4 else ""
        doubts.append(Notice.of("blind_labeler", name=name, right=right, images=images, more=more))
    return doubts
