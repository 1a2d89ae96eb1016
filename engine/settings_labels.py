"""Sections of a study about labels: how images are allocated to classes, and how labels are
corrected. `docs/study.md` explains every field."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from engine.core.registry import PluginField, kind_of
from engine.core.spec import Spec, explained
from engine.nets.classification import Training

MAX_IMAGES = 100_000_000


class Allocation(Spec):
    """A number of images for all classes together, and how it is divided among them
    (`engine.stages.allocation`)."""

    total: Annotated[int, Field(ge=1, le=MAX_IMAGES)]
    # tiers: by the F1 on val of a class's weakest label. inverse_frequency: by one over its real
    # training images.
    method: Literal["tiers", "inverse_frequency"] = "tiers"
    # (F1 below, weight), rising; a class above the last limit gets nothing.
    tiers: Annotated[
        tuple[tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0)]], ...],
        Field(min_length=1),
    ] = ((0.4, 3.0), (0.6, 2.0), (0.75, 1.0))
    # Largest bonuses, as shares of the tier's weight.
    correlation: Annotated[float, Field(ge=0, le=10)] = 0.5
    impact: Annotated[float, Field(ge=0, le=10)] = 0.5
    # Images per real training image that no class exceeds.
    largest_ratio: Annotated[float, Field(gt=0, le=1000)] = 10.0

    @model_validator(mode="after")
    def _rising(self) -> Allocation:
        limits = [limit for limit, _ in self.tiers]
        if limits != sorted(set(limits)):
            raise explained("tiers must have rising limits of F1")
        return self


class Voter(Spec):
    """What votes on labels: a labeler without training, or a classifier that is trained without the
    images that it votes on."""

    labeler: Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("labelers"))] | None = None
    classifier: (
        Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("classifiers"))] | None
    ) = None
    # Of the classifier; None: the study's.
    training: Training | None = None

    @model_validator(mode="after")
    def _one(self) -> Voter:
        if (self.labeler is None) == (self.classifier is None):
            raise explained("needs either labeler or classifier")
        if self.labeler is not None and kind_of("labelers", self.labeler).trained:
            raise explained("labeler: classifier is trained; name it as classifier instead")
        return self


class Relabel(Spec):
    """Labels that several classifiers agree to be wrong are replaced before anything else uses
    them."""

    voters: Annotated[dict[str, Voter], Field(min_length=2)] = Field(
        default={
            "knn": {"labeler": "knn"}, "probe": {"classifier": "probe"},
            "small": {"classifier": "small"},
        }, validate_default=True,
    )  # fmt: skip
    # Each classifier is trained this often, each time without the groups that it then votes on.
    folds: Annotated[int, Field(ge=2, le=20)] = 5
    # Voters that must see another class for a flag, and the same class for a new label; None: more
    # than half of them.
    needed: Annotated[int, Field(ge=1)] | None = None
    # Largest share of the labels of a split that are flagged.
    most: Annotated[float, Field(gt=0, le=1)] = 0.2
    # Least mean probability of a new label.
    sure: Annotated[float, Field(ge=0, le=1)] = 0.7
    # Whether labels of test change too. Every claim then rests on labels that classifiers chose.
    test_too: bool = False

    @model_validator(mode="after")
    def _possible(self) -> Relabel:
        if self.needed is not None and self.needed > len(self.voters):
            raise explained(
                "needed: {needed} is more than the {voters} voters; lower it",
                needed=self.needed, voters=len(self.voters),
            )  # fmt: skip
        return self

    @property
    def votes_needed(self) -> int:
        return self.needed or len(self.voters) // 2 + 1
