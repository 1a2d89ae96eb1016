"""The sections of a study, each a spec. `docs/study.md` explains every field."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from engine.core.registry import PluginField, explain, kind_of
from engine.core.spec import Spec
from engine.tuning.proposals import Range

MAX_IMAGES = 100_000_000


ReaderField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("readers"))]
EmbedderField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("embedders"))]
GeneratorField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("generators"))]
LabelerField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("labelers"))]
FilterField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("filters"))]
ClassifierField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("classifiers"))]


def as_text(value: Any) -> Any:
    """Class names are text; YAML reads 3 as a number."""
    return str(value) if type(value) is int else value


def _as_list(value: Any) -> Any:
    """One word stands for a list of it."""
    return [value] if isinstance(value, str) else value


ClassName = Annotated[str, BeforeValidator(as_text)]
Classes = Literal["all"] | tuple[ClassName, ...]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Split(Spec):
    """Made once and frozen. Splits that the data gives are kept; a missing one is carved out of
    train by group."""

    val: Fraction = 0.15
    test: Fraction = 0.2
    # column: the reader says which images belong together. none: every image stands for itself
    # (say so knowingly).
    group: Literal["column", "none"] = "column"
    # At most so many training images of a class, chosen by the seed: makes a long tail for an
    # experiment.
    train_limit: dict[ClassName, Annotated[int, Field(ge=2)]] = {}

    @model_validator(mode="after")
    def _leaves_train(self) -> Split:
        if self.val + self.test >= 0.9:
            raise PydanticCustomError(
                "explained", "val + test must leave at least a tenth for train"
            )
        return self


class Audit(Spec):
    """What is done about leaks between splits and about files that cannot be used."""

    # fail: stop with the list. drop: remove the image from the earlier split (train before val
    # before test).
    # move: bring the whole group to the later split.
    on_leak: Literal["fail", "drop", "move"] = "fail"
    # Near duplicates are looked for among the nearest by this embedding.
    embedder: EmbedderField = Field(default={"name": "pixels"}, validate_default=True)
    # Share of pictures that may pass for near duplicates of a different one.
    near_quantile: Annotated[float, Field(gt=0, le=0.2)] = 0.0001
    # Share of quarantined files above which the run stops.
    max_quarantined: Annotated[float, Field(ge=0, le=1)] = 0.01
    wrong_extension: Literal["quarantine", "accept"] = "quarantine"
    # Seconds after which a decoder counts as hung.
    decode_timeout: Annotated[float, Field(gt=0, le=600)] = 20.0


class Cluster(Spec):
    """k-means on the train split."""

    # class: of each class by itself. whole: of all classes together.
    scope: Literal["class", "whole"] = "class"
    # auto: the root of half the images, at least 1. silhouette: the number up to k_max with the
    # highest mean silhouette on a sample.
    k: Annotated[int, Field(ge=1, le=4096)] | Literal["auto", "silhouette"] = "auto"
    k_max: Annotated[int, Field(ge=2, le=1024)] = 16
    # At most; it ends where little more is gained.
    iterations: Annotated[int, Field(ge=1, le=1000)] = 100
    # Images that centroids are learnt from; None: all.
    sample: Annotated[int, Field(ge=2)] | None = None
    # By direction alone: rows and centroids have length 1.
    spherical: bool = False
    # Smaller clusters are dissolved, and their images go where they are nearest.
    min_size: Annotated[int, Field(ge=1)] = 1


SelectMethod = Literal["nearest", "spread", "density", "random"]


class Select(Spec):
    """Representatives of each cluster of each class."""

    # Several share the places of a cluster in turn.
    method: Annotated[tuple[SelectMethod, ...], BeforeValidator(_as_list), Field(min_length=1)] = (
        "nearest",
    )
    per_cluster: Annotated[int, Field(ge=1, le=10_000)] = 3
    # In place of per_cluster: a number for each class, in proportion to its clusters' sizes.
    per_class: Annotated[int, Field(ge=1, le=100_000)] | None = None

    @model_validator(mode="after")
    def _different(self) -> Select:
        if len(set(self.method)) < len(self.method):
            raise PydanticCustomError("explained", "select.method names one method twice")
        return self


class Reduce(Spec):
    """Fewer training images of the dominant classes, chosen so that they stand for the rest. Makes
    the arm `reduced`."""

    # tsne, umap: so that a class's plane is covered evenly. k_center: so that none is far from one
    # that is kept. stratified: by chance, of each cluster its share. random: by the seed.
    method: Literal["tsne", "umap", "k_center", "stratified", "random"] = "tsne"
    # Images that are kept of a class: a number, or that of the median or the smallest class.
    balance_to: Annotated[int, Field(ge=2)] | Literal["median", "smallest"] = "median"
    # In place of balance_to: this share of each class.
    share: Fraction | None = None
    # auto: the classes that have more than is kept; with `share`, those above the median.
    classes: Literal["auto"] | Annotated[tuple[ClassName, ...], Field(min_length=1)] = "auto"
    # About how many near images t-SNE and UMAP look at.
    perplexity: Annotated[float, Field(ge=2, le=1000)] = 30.0
    n_neighbors: Annotated[int, Field(ge=2, le=1000)] = 15
    # Images of a class that t-SNE and UMAP place; the others lie where the nearest of these does.
    sample: Annotated[int, Field(ge=100, le=100_000)] = 5_000

    @model_validator(mode="after")
    def _one_count(self) -> Reduce:
        if self.share is not None and self.balance_to != "median":
            raise PydanticCustomError("explained", "takes one of balance_to and share; has both")
        return self


class Match(Spec):
    """For each image of a set, the most similar of another. A set is train, val, or the label of a
    generator: its images that were kept."""

    queries: str = "train"
    among: str = "train"
    n: Annotated[int, Field(ge=1, le=1000)] = 10
    # flat looks at every image, ivf and hnsw at some. auto: flat up to 200,000 images, else ivf.
    index: Literal["auto", "flat", "ivf", "hnsw"] = "auto"
    # Images of `queries` on the picture sheet.
    shown: Annotated[int, Field(ge=1, le=200)] = 20


class Amount(Spec):
    """A number of images for each class. Exactly one of the four is given.

    ratio: round(ratio * n) where n is the class's real training images. balance_to: max(0,
    balance_to - n).
    per_class: the same number for each. ratio_by_class: a ratio for each class that is named, 0 for
    the others.
    """

    later_fields: ClassVar[tuple[str, ...]] = ("ratio_by_class",)

    ratio: Annotated[float, Field(gt=0, le=1000)] | None = None
    balance_to: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = None
    per_class: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = None
    ratio_by_class: dict[ClassName, Annotated[float, Field(ge=0, le=1000)]] | None = None

    @model_validator(mode="after")
    def _one_count(self) -> Amount:
        ways = ("ratio", "balance_to", "per_class", "ratio_by_class")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "explained",
                "needs exactly one of ratio, balance_to, per_class and ratio_by_class; has {given}",
                {"given": ", ".join(given) or "none"},
            )
        if self.ratio_by_class is not None and not any(self.ratio_by_class.values()):
            raise PydanticCustomError("explained", "ratio_by_class adds to no class")
        return self

    def count(self, label: str, real: int) -> int:
        """Images for the class `label`, which has `real` training images."""
        if self.ratio_by_class is not None:
            return round(self.ratio_by_class.get(label, 0.0) * real)
        if self.ratio is not None:
            return round(self.ratio * real)
        if self.balance_to is not None:
            return max(0, self.balance_to - real)
        return int(self.per_class or 0)


class Request(Amount):
    """How many images to make, and of which classes. What is requested is an arm of the comparison
    too, whether `search.ratios` names it or not."""

    later_fields: ClassVar[tuple[str, ...]] = (*Amount.later_fields, "class_groups")

    # The target classes: those that images are made for and, in the comparison, added to.
    classes: Classes = "all"
    # Names that stand for several classes, in `classes` and in `ratio_by_class`.
    class_groups: dict[ClassName, Annotated[tuple[ClassName, ...], Field(min_length=1)]] = {}
    # Images of one shard: the unit that a kill can cost.
    shard_size: Annotated[int, Field(ge=1, le=4096)] = 256

    @model_validator(mode="after")
    def _of_targets(self) -> Request:
        members = {name for group in self.class_groups.values() for name in group}
        for group in self.class_groups:
            if group in members:
                raise PydanticCustomError(
                    "explained", "class_groups: {name} is the name of a class; choose another",
                    {"name": repr(group)},
                )  # fmt: skip
        given: dict[str, str] = {}
        for name in self.ratio_by_class or {}:
            for one in dict.fromkeys(self.class_groups.get(name, (name,))):
                if (other := given.setdefault(one, name)) != name:
                    raise PydanticCustomError(
                        "explained",
                        "ratio_by_class: class {name} has two ratios, of {one} and of {other};"
                        " leave one out, or take the class out of the group",
                        {"name": repr(one), "one": repr(other), "other": repr(name)},
                    )
        targets = self.one_by_one().classes
        for one, name in given.items():
            if targets != "all" and one not in targets:
                of = "" if one == name else f" (of the group {name!r})"
                raise PydanticCustomError(
                    "explained", "ratio_by_class: {name}{of} is none of classes",
                    {"name": repr(one), "of": of},
                )  # fmt: skip
        return self

    def one_by_one(self) -> Request:
        """The same without groups: each class by its own name. What a step does depends on these
        alone, so that groups have no part in its key."""
        if not self.class_groups:
            return self

        def members(name: str) -> tuple[str, ...]:
            return self.class_groups.get(name, (name,))

        ratios, classes = self.ratio_by_class, self.classes
        if ratios is not None:
            ratios = {one: ratio for name, ratio in ratios.items() for one in members(name)}
        if classes != "all":
            classes = tuple(dict.fromkeys(one for name in classes for one in members(name)))
        named = {"ratio_by_class": ratios, "classes": classes, "class_groups": {}}
        return self.model_copy(update=named)


class Curate(Spec):
    """Which generated images are used, and under which label."""

    # Says which class is seen on an image; None: nobody.
    labeler: LabelerField | None = Field(default={"name": "classifier"}, validate_default=True)
    # What is asked of images, one after the other; [] keeps all.
    filters: tuple[FilterField, ...] = Field(
        default=({"name": "agreement"}, {"name": "copies"}), validate_default=True
    )
    # How often generation may be asked for more where too few images were kept; 1: never.
    max_rounds: Annotated[int, Field(ge=1, le=10)] = 3

    @model_validator(mode="after")
    def _possible(self) -> Curate:
        names = [str(getattr(one, "name", "")) for one in self.filters]
        for name, one in zip(names, self.filters, strict=True):
            if names.count(name) > 1:
                raise PydanticCustomError("explained", "filters names {name} twice", {"name": name})
            if self.labeler is None and kind_of("filters", one).needs_labeler:
                raise PydanticCustomError(
                    "explained", "filters: {name} needs a labeler, which is null", {"name": name}
                )
        relabels = any(getattr(one, "label_from", "") == "labeler" for one in self.filters)
        if relabels and "similarity" in names:
            raise PydanticCustomError(
                "explained",
                "filters: similarity holds images against the label that was asked for, and"
                " label_from: labeler gives them others; leave one of the two out",
            )
        return self


class Fidelity(Spec):
    """How like real images the generated ones are: each generator's, against val."""

    enabled: bool = True
    # Turns images to the vectors that are compared; None: the study's.
    embedder: EmbedderField | None = None
    # Images of each side that pairs are made of (kernel distance, neighbours), at most.
    sample: Annotated[int, Field(ge=100, le=100_000)] = 5_000
    # A neighbourhood reaches to the k-th nearest other image.
    k: Annotated[int, Field(ge=1, le=15)] = 5


ArmName = Literal[
    "oversampled", "class_weighted", "mixup", "cutmix", "synthetic_only", "unfiltered"
]


class Search(Spec):
    """The arms of the comparison: real, real at double steps, reduced where the study reduces,
    those that `arms` and `combine` name, and every generator at every ratio and at what is
    requested, each with the same seeds. The ratio is chosen on val."""

    ratios: Annotated[tuple[Annotated[float, Field(gt=0, le=1000)], ...], Field(min_length=1)] = (
        0.5, 1.0, 2.0,
    )  # fmt: skip
    # How often each generator is trained and its images drawn anew. From 2 on, a replicate of the
    # comparison is one of these; with one, a classifier seed, and the verdict is conditional on
    # that generator.
    generator_fits: Annotated[int, Field(ge=1, le=100)] = 1
    # Classifier seeds of each arm and generator fit, paired across arms.
    seeds: Annotated[int, Field(ge=1, le=1000)] = 5
    # oversampled: real images drawn so that every class is seen alike. class_weighted: their loss
    # weighted so. mixup, cutmix: real images mixed in training. synthetic_only: of each generator
    # as many images as there are real ones, and none of these. unfiltered: at the ratio chosen, as
    # many images of each generator as they come.
    arms: tuple[ArmName, ...] = ("oversampled",)
    mixup_alpha: Annotated[float, Field(gt=0, le=10)] = 0.2
    cutmix_alpha: Annotated[float, Field(gt=0, le=10)] = 1.0
    # Generators that are added together, each as many as the ratio says; `reduced` among them: to
    # what is left of real images.
    combine: dict[str, Annotated[tuple[str, ...], Field(min_length=2)]] = {}

    @model_validator(mode="after")
    def _sorted(self) -> Search:
        if list(self.ratios) != sorted(set(self.ratios)):
            raise PydanticCustomError("explained", "ratios must rise, each standing once")
        if self.generator_fits * self.seeds < 2:
            raise PydanticCustomError(
                "explained", "needs two classifiers of each arm: raise generator_fits or seeds"
            )
        for label, parts in {"arms": self.arms, **self.combine}.items():
            if len(set(parts)) < len(parts):
                raise PydanticCustomError("explained", "{label} names one twice", {"label": label})
        return self


def _as_knob(value: Any) -> Any:
    """A list of choices, or a range."""
    if isinstance(value, Range):
        return value
    if isinstance(value, dict):
        try:
            return Range.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            told = {"text": explain(first), "place": place or None}
            raise PydanticCustomError("explained", "{text}", told) from None
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise PydanticCustomError(
            "explained", "must be a list of two choices or more, or a range: {{low: 1, high: 3}}"
        )
    return tuple(value)


class Tune(Spec):
    """Settings that `jobs/tune.py` tries, by what classifiers of one arm reach on val."""

    # Fields of the study, as `--set` names them, to lists of choices or ranges.
    knobs: dict[str, Annotated[Any, BeforeValidator(_as_knob)]] = {}
    # Whose classifiers on val a setting is judged by, and what of them; None: training.objective.
    arm: str | None = None
    objective: (
        Literal["macro_f1", "accuracy", "balanced_accuracy", "worst_class_recall", "roc_auc"] | None
    ) = None
    method: Literal["grid", "random", "optuna"] = "grid"
    # Of random and optuna; None: 20. A grid tries all.
    trials: Annotated[int, Field(ge=1, le=100_000)] | None = None
    # After these no further setting is begun.
    budget_hours: Annotated[float, Field(gt=0)] | None = None
    # Classifiers of each setting, the first of search.seeds; None: all.
    seeds: Annotated[int, Field(ge=1, le=1000)] | None = None
    # asha: classifiers of a setting are trained with few steps first, and with reduction_factor
    # times as many where they are among the best 1/reduction_factor so far.
    scheduler: Literal["none", "asha"] = "none"
    reduction_factor: Annotated[int, Field(ge=2, le=16)] = 3
    # Share of training.steps that the first of these trainings has.
    grace: Fraction = 0.1
    # How many settings this study was chosen from; written by jobs/tune.py.
    tried: Annotated[int, Field(ge=0)] = 0


class Evaluate(Spec):
    """How the verdict is reached, on test."""

    # Differences of the objective within ± margin count as none.
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    bootstrap_draws: Annotated[int, Field(ge=200, le=1_000_000)] = 4000
