"""The sections of a study, each a spec. `docs/study.md` explains every field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from engine.core.registry import PluginField, kind_of, name_of
from engine.core.spec import ClassName, Spec, explained
from engine.nets.text_image import Described
from engine.settings_labels import MAX_IMAGES, Allocation

ReaderField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("readers"))]
EmbedderField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("embedders"))]
GeneratorField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("generators"))]
LabelerField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("labelers"))]
FilterField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("filters"))]
ClassifierField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("classifiers"))]


def _as_list(value: Any) -> Any:
    """A single word becomes a list of one."""
    return [value] if isinstance(value, str) else value


Classes = Literal["all"] | tuple[ClassName, ...]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Split(Spec):
    """The split is made once and frozen. Splits given by the data are kept; a missing split is
    carved out of train by group."""

    later_fields: ClassVar[tuple[str, ...]] = ("train_fraction", "independent")

    val: Fraction = 0.15
    test: Fraction = 0.2
    # column: the reader says which images belong together. none: each image is its own group,
    # which is only right when no two images share a source.
    group: Literal["column", "none"] = "column"
    # Why images without groups are independent; the page repeats it instead of a warning.
    independent: Annotated[str, Field(min_length=10)] | None = None
    # Maximum training images of a class, chosen by the seed: makes a long tail for an experiment.
    train_limit: dict[ClassName, Annotated[int, Field(ge=2)]] = {}
    # Share of each class's training images that everything learns from.
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _leaves_train(self) -> Split:
        if self.val + self.test >= 0.9:
            raise explained("val + test must leave at least a tenth for train; lower one")
        if self.independent is not None and self.group != "none":
            raise explained("independent: it gives the reason for group: none; remove one of them")
        return self

    @property
    def made(self) -> Split:
        """What the split depends on: all but the reason, which is for readers of the page."""
        return self.model_copy(update={"independent": None})


class Audit(Spec):
    """How ingest handles leaks between splits and unusable files."""

    later_fields: ClassVar[tuple[str, ...]] = ("on_contradiction",)

    # fail: stop with the list. drop: remove the image from the earlier split (train before val
    # before test). move: move the whole group to the later split.
    on_leak: Literal["fail", "drop", "move"] = "fail"
    # Equal pictures with different labels. fail: stop with the list. drop: remove all of them.
    on_contradiction: Literal["fail", "drop"] = "fail"
    # Candidates for near duplicates are the nearest images by this embedding.
    embedder: EmbedderField = Field(default={"name": "pixels"}, validate_default=True)
    # Share of pictures that may be taken for near duplicates of a different picture.
    near_quantile: Annotated[float, Field(gt=0, le=0.2)] = 0.0001
    # Share of quarantined files above which the run stops.
    max_quarantined: Annotated[float, Field(ge=0, le=1)] = 0.01
    wrong_extension: Literal["quarantine", "accept"] = "quarantine"
    # Seconds after which a decoder counts as hung.
    decode_timeout: Annotated[float, Field(gt=0, le=600)] = 20.0


class Cluster(Spec):
    """k-means on the train split."""

    # class: each class separately. whole: all classes together.
    scope: Literal["class", "whole"] = "class"
    # auto: the square root of half the images, at least 1. silhouette: the number up to k_max with
    # the highest mean silhouette on a sample.
    k: Annotated[int, Field(ge=1, le=4096)] | Literal["auto", "silhouette"] = "auto"
    k_max: Annotated[int, Field(ge=2, le=1024)] = 16
    # Maximum; k-means stops earlier once it converges.
    iterations: Annotated[int, Field(ge=1, le=1000)] = 100
    # Number of images that centroids are learned from; None: all.
    sample: Annotated[int, Field(ge=2)] | None = None
    # Compare directions only: rows and centroids have length 1.
    spherical: bool = False
    # Smaller clusters are dissolved, and their images join the nearest other cluster.
    min_size: Annotated[int, Field(ge=1)] = 1


SelectMethod = Literal["nearest", "spread", "density", "random"]


class Select(Spec):
    """Representatives of each cluster of each class."""

    # Several methods take turns in choosing.
    method: Annotated[tuple[SelectMethod, ...], BeforeValidator(_as_list), Field(min_length=1)] = (
        "nearest",
    )
    per_cluster: Annotated[int, Field(ge=1, le=10_000)] = 3
    # Replaces per_cluster: a number for each class, split in proportion to its cluster sizes.
    per_class: Annotated[int, Field(ge=1, le=100_000)] | None = None

    @model_validator(mode="after")
    def _different(self) -> Select:
        if len(set(self.method)) < len(self.method):
            raise explained("select.method names one method twice")
        return self


class Reduce(Spec):
    """Fewer training images of the dominant classes, chosen to represent the rest. Adds the arm
    `reduced`."""

    # tsne, umap: cover the embedded plane of a class evenly. k_center: keep every image close to
    # one that is kept. stratified: a random share of each cluster. random: by the seed.
    method: Literal["tsne", "umap", "k_center", "stratified", "random"] = "tsne"
    # Images kept per class: a number, or the size of the median or the smallest class.
    balance_to: Annotated[int, Field(ge=2)] | Literal["median", "smallest"] = "median"
    # Replaces balance_to: this share of each class.
    share: Fraction | None = None
    # auto: the classes with more images than are kept; with `share`, those above the median.
    classes: Literal["auto"] | Annotated[tuple[ClassName, ...], Field(min_length=1)] = "auto"
    # Approximate size of the neighbourhood in t-SNE and UMAP.
    perplexity: Annotated[float, Field(ge=2, le=1000)] = 30.0
    n_neighbors: Annotated[int, Field(ge=2, le=1000)] = 15
    # Images of a class that t-SNE and UMAP embed; each other image takes the place of the nearest
    # of these.
    sample: Annotated[int, Field(ge=100, le=100_000)] = 5_000

    @model_validator(mode="after")
    def _one_count(self) -> Reduce:
        if self.share is not None and self.balance_to != "median":
            raise explained("balance_to and share exclude each other; remove one")
        return self


class Match(Spec):
    """The most similar images in one set for each image of another. A set is train, val, or the
    label of a generator (its kept images)."""

    queries: str = "train"
    among: str = "train"
    n: Annotated[int, Field(ge=1, le=1000)] = 10
    # flat is exact; ivf and hnsw are approximate. auto: flat up to 200,000 images, else ivf.
    index: Literal["auto", "flat", "ivf", "hnsw"] = "auto"
    # Images of `queries` on the picture sheet.
    shown: Annotated[int, Field(ge=1, le=200)] = 20


class Amount(Spec):
    """A number of images for each class. Exactly one of the five fields is given.

    ratio: round(ratio * n) for a class with n real training images. balance_to: max(0,
    balance_to - n). per_class: the same number for each class. ratio_by_class: a ratio for each
    class listed, 0 for the others. allocate: a total, divided by scores on val.
    """

    later_fields: ClassVar[tuple[str, ...]] = ("ratio_by_class", "allocate")

    ratio: Annotated[float, Field(gt=0, le=1000)] | None = None
    balance_to: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = None
    per_class: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = None
    ratio_by_class: dict[ClassName, Annotated[float, Field(ge=0, le=1000)]] | None = None
    allocate: Allocation | None = None

    @model_validator(mode="after")
    def _one_count(self) -> Amount:
        ways = ("ratio", "balance_to", "per_class", "ratio_by_class", "allocate")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) != 1:
            raise explained(
                "needs exactly one of ratio, balance_to, per_class, ratio_by_class and allocate;"
                " has {given}",
                given=", ".join(given) or "none",
            )
        if self.ratio_by_class is not None and not any(self.ratio_by_class.values()):
            raise explained("ratio_by_class adds to no class; give one a ratio")
        return self

    def as_allocated(self, images: Mapping[str, int], real: Mapping[str, int]) -> Self:
        """With `allocate`, the amount that its result gives, as a ratio for each class. images,
        real: generated and real training images by class."""
        if self.allocate is None:
            return self
        ratios = {name: count / real[name] for name, count in images.items() if real.get(name)}
        return self.model_copy(update={"allocate": None, "ratio_by_class": ratios})

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
    """How many images to generate, and for which classes. The requested amount is an arm of the
    comparison even if `search.ratios` does not list it."""

    later_fields: ClassVar[tuple[str, ...]] = (*Amount.later_fields, "class_groups")

    # The target classes: images are generated for these and, in the comparison, added to these.
    classes: Classes = "all"
    # Names for several classes, usable in `classes` and in `ratio_by_class`.
    class_groups: dict[ClassName, Annotated[tuple[ClassName, ...], Field(min_length=1)]] = {}
    # Images per shard: the most work that a killed process loses.
    shard_size: Annotated[int, Field(ge=1, le=4096)] = 256

    @model_validator(mode="after")
    def _of_targets(self) -> Request:
        members = {name for group in self.class_groups.values() for name in group}
        for group in self.class_groups:
            if group in members:
                raise explained(
                    "class_groups: {name} is the name of a class; rename the group",
                    name=repr(group),
                )  # fmt: skip
        given: dict[str, str] = {}
        for name in self.ratio_by_class or {}:
            for label in dict.fromkeys(self.class_groups.get(name, (name,))):
                if (earlier := given.setdefault(label, name)) != name:
                    raise explained(
                        "ratio_by_class: class {name} has two ratios, of {one} and of {other};"
                        " remove one, or remove the class from the group",
                        name=repr(label),
                        one=repr(earlier),
                        other=repr(name),
                    )
        targets = self.one_by_one().classes
        for label, name in given.items():
            if targets != "all" and label not in targets:
                of = "" if label == name else f" (of the group {name!r})"
                raise explained(
                    "ratio_by_class: {name}{of} is not in classes; add it there",
                    name=repr(label), of=of,
                )  # fmt: skip
        return self

    def one_by_one(self) -> Request:
        """This request without groups: each class under its own name. Steps read only this form,
        so groups are part of no key."""
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

    later_fields: ClassVar[tuple[str, ...]] = ("stop_if_useless",)

    # Classifies the generated images; None: no labeler.
    labeler: LabelerField | None = Field(default={"name": "classifier"}, validate_default=True)
    # Filters in the order in which they run; [] keeps all images.
    filters: tuple[FilterField, ...] = Field(
        default=({"name": "agreement"}, {"name": "copies"}), validate_default=True
    )
    # Maximum rounds of generation; a further round runs if too few images were kept.
    max_rounds: Annotated[int, Field(ge=1, le=10)] = 3
    # Stop if the first images of a generator's first fit show that it learnt nothing; otherwise a
    # warning.
    stop_if_useless: bool = False

    @model_validator(mode="after")
    def _possible(self) -> Curate:
        names = [name_of(spec) for spec in self.filters]
        for name, spec in zip(names, self.filters, strict=True):
            if names.count(name) > 1:
                raise explained("filters names {name} twice", name=name)
            if self.labeler is None and kind_of("filters", spec).needs_labeler:
                raise explained(
                    "filters: {name} needs a labeler, but labeler is null; set one", name=name
                )  # fmt: skip
        relabels = any(getattr(spec, "label_from", "") == "labeler" for spec in self.filters)
        if relabels and "similarity" in names:
            raise explained(
                "filters: similarity compares images with the requested label, but label_from:"
                " labeler replaces that label; remove one of the two",
            )
        return self


class Fidelity(Spec):
    """How similar the generated images of each generator are to real images of val."""

    enabled: bool = True
    # Embedder of the vectors that are compared; None: the study's.
    embedder: EmbedderField | None = None
    # Maximum images of each side for pairwise measures (kernel distance, neighbours).
    sample: Annotated[int, Field(ge=100, le=100_000)] = 5_000
    # The radius of a neighbourhood is the distance to the k-th nearest other image.
    k: Annotated[int, Field(ge=1, le=15)] = 5


ArmName = Literal[
    "oversampled", "class_weighted", "mixup", "cutmix", "repeated", "synthetic_only", "unfiltered"
]


class Search(Spec):
    """The arms of the comparison, each with the same seeds: real, real at double steps, reduced
    if the study has `reduce`, those of `arms` and `combine`, and every generator at every ratio
    and at the requested amount. The ratio is chosen on val, and confirmed on test by generators and
    classifiers that had no part in the choice."""

    later_fields: ClassVar[tuple[str, ...]] = ("use", "pretrain_share", "real_fractions")

    ratios: Annotated[tuple[Annotated[float, Field(gt=0, le=1000)], ...], Field(min_length=1)] = (
        0.5, 1.0, 2.0,
    )  # fmt: skip
    # How often each generator is trained and sampled anew for the choice on val.
    generator_fits: Annotated[int, Field(ge=1, le=100)] = 1
    # Classifier seeds per arm and generator fit of the choice, paired across arms.
    seeds: Annotated[int, Field(ge=1, le=1000)] = 5
    # How often each generator is trained and sampled anew after the choice, each time with one new
    # classifier per opened arm: the replicates of the verdict. With 1, these are `seeds` new
    # classifiers on the images of the choice, and the verdict is conditional on that generator.
    confirm_fits: Annotated[int, Field(ge=1, le=100)] = 5
    # oversampled: real images, sampled so that all classes are equally frequent. class_weighted:
    # the loss weighted to the same effect. mixup, cutmix: real images mixed in training.
    # repeated: real images, drawn as often as if as many of each class were added.
    # synthetic_only: for each generator as many images as there are real ones, and no real ones.
    # unfiltered: images of each generator at the chosen ratio, without curation.
    arms: tuple[ArmName, ...] = ("oversampled",)
    mixup_alpha: Annotated[float, Field(gt=0, le=10)] = 0.2
    cutmix_alpha: Annotated[float, Field(gt=0, le=10)] = 1.0
    # Generators that are added together, each at the ratio. With `reduced` among them, they are
    # added to the reduced real images.
    combine: dict[str, Annotated[tuple[str, ...], Field(min_length=2)]] = {}
    # Ways to use synthetic images, each an arm at every ratio. add: with all real ones. replace:
    # instead of as many real ones of the class (ratios up to 1). pretrain: alone in the first
    # pretrain_share of the steps, and only real ones in the others.
    use: Annotated[tuple[Literal["add", "replace", "pretrain"], ...], Field(min_length=1)] = (
        "add",
    )
    pretrain_share: Fraction = 0.5
    # The fractions of the real training images of `jobs/exchange_rate.py`.
    real_fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.25, 0.5, 0.75, 1.0)

    @model_validator(mode="after")
    def _sorted(self) -> Search:
        if "replace" in self.use and not any(ratio <= 1 for ratio in self.ratios):
            raise explained("use: replace needs a ratio of at most 1; add one to ratios")
        for name in ("ratios", "real_fractions"):
            if list(getattr(self, name)) != sorted(set(getattr(self, name))):
                raise explained("{name} must rise, without repetition", name=name)
        if len(self.real_fractions) < 2:
            raise explained("real_fractions needs at least two for a learning curve")
        if self.generator_fits * self.seeds < 2:
            raise explained("needs at least two classifiers per arm: raise generator_fits or seeds")
        if self.confirm_fits == 1 and self.seeds < 2:
            raise explained("confirm_fits: 1 needs at least two seeds to confirm a choice")
        for label, parts in {"arms": self.arms, "use": self.use, **self.combine}.items():
            if len(set(parts)) < len(parts):
                raise explained("{label} lists an entry twice", label=label)
        return self


class Evaluate(Spec):
    """How the verdict on test is reached."""

    later_fields: ClassVar[tuple[str, ...]] = ("external", "subgroups", "zero_shot")

    # Differences of the objective within ± margin count as equivalent.
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    bootstrap_draws: Annotated[int, Field(ge=200, le=1_000_000)] = 4000
    # Test sets from elsewhere, by name: opened with test for the same classifiers.
    external: dict[str, ReaderField] = {}
    # Further tasks of the reader, such as a column of devices: the comparison within each value.
    subgroups: tuple[str, ...] = ()
    # A model of images and texts that classifies test without training, outside the verdict.
    zero_shot: Described | None = None
