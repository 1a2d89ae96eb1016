"""The study (what to compute) and the profile (where and how), from YAML.

    base: other.yaml      a file to start from, relative to this one; what stands here is laid over
                          it
    a: null               takes away what the file below says of a
    --set a.b=c           laid over both; the value is read as YAML

Two people with the same study and the same data get the same step keys, whatever their profiles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from engine.core.errors import StudyError
from engine.core.images import Preprocess
from engine.core.registry import PluginField, explain
from engine.core.resources import FitResources, StageResources, TrialResources
from engine.core.spec import Spec
from engine.nets.classification import Training

S = TypeVar("S", bound=Spec)
MAX_IMAGES = 100_000_000
# Arms of the comparison that no generator makes.
RESERVED = ("real", "real_double", "oversampled", "train", "val", "test")


ReaderField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("readers"))]
EmbedderField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("embedders"))]
GeneratorField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("generators"))]
ClassifierField = Annotated[SerializeAsAny[Spec], BeforeValidator(PluginField("classifiers"))]


def _text(value: Any) -> Any:
    """Class names are text; YAML reads 3 as a number."""
    return str(value) if type(value) is int else value


def _as_list(value: Any) -> Any:
    """One word stands for a list of it."""
    return [value] if isinstance(value, str) else value


ClassName = Annotated[str, BeforeValidator(_text)]
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
    # Near duplicates need both signals: perceptual hash and embedding.
    embedder: EmbedderField = Field(default={"name": "pixels"}, validate_default=True)
    # The threshold: this quantile of nearest-neighbour distances between different groups of train.
    near_quantile: Annotated[float, Field(ge=0, le=0.2)] = 0.001
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
    """A number of images for each class. Exactly one of the three is given.

    ratio: round(ratio * n) where n is the class's real training images. balance_to: max(0,
    balance_to - n).
    per_class: the same number for each.
    """

    ratio: Annotated[float, Field(gt=0, le=1000)] | None = None
    balance_to: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = None
    per_class: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = None

    @model_validator(mode="after")
    def _one_count(self) -> Amount:
        given = [
            name for name in ("ratio", "balance_to", "per_class") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise PydanticCustomError(
                "explained", "needs exactly one of ratio, balance_to and per_class; has {given}",
                {"given": ", ".join(given) or "none"},
            )  # fmt: skip
        return self

    def count(self, real: int) -> int:
        """Images for a class that has `real` training images."""
        if self.ratio is not None:
            return round(self.ratio * real)
        if self.balance_to is not None:
            return max(0, self.balance_to - real)
        return int(self.per_class or 0)


class Request(Amount):
    """How many images to make, and of which classes. What is requested is an arm of the comparison
    too, whether `search.ratios` names it or not."""

    # The target classes: those that images are made for and, in the comparison, added to.
    classes: Classes = "all"
    # Images of one shard: the unit that a kill can cost.
    shard_size: Annotated[int, Field(ge=1, le=4096)] = 256


class Curate(Spec):
    """Which generated images are used, and under which label."""

    # intended: the label asked for; dropped where the labeler sees another with `confidence`.
    # agree: kept only where the labeler sees the label asked for. labeler: what the labeler sees.
    label_from: Literal["intended", "agree", "labeler"] = "intended"
    # auto: so that the labeler contradicts with such confidence at most one in fifty real images of
    # val.
    confidence: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    # An image nearer to train than all but this share of val is a copy.
    copies: Annotated[float, Field(ge=0, le=0.2)] = 0.01
    # What is asked of images, where their generator allows it; [] keeps all.
    filters: tuple[Literal["label", "copies"], ...] = ("label", "copies")
    # How often generation may be asked for more where too few images were kept; 1: never.
    max_rounds: Annotated[int, Field(ge=1, le=10)] = 3


class Search(Spec):
    """The arms of the comparison: real, oversampled, real at double steps, and every generator at
    every ratio and at what is requested, each with the same seeds. The ratio is chosen on val."""

    ratios: Annotated[tuple[Annotated[float, Field(gt=0, le=1000)], ...], Field(min_length=1)] = (
        0.5, 1.0, 2.0,
    )  # fmt: skip
    # Classifier seeds of each arm, paired across arms.
    seeds: Annotated[int, Field(ge=2, le=1000)] = 5

    @model_validator(mode="after")
    def _sorted(self) -> Search:
        if list(self.ratios) != sorted(set(self.ratios)):
            raise PydanticCustomError("explained", "ratios must rise, each standing once")
        return self


class Evaluate(Spec):
    """How the verdict is reached, on test."""

    # Differences of the objective within ± margin count as none.
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    bootstrap_draws: Annotated[int, Field(ge=200, le=1_000_000)] = 4000


_LABEL = re.compile(r"[a-z][a-z0-9_]{0,31}")


class Study(Spec):
    """What to compute. `docs/study.md` explains every field."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    # What may be done with the images: goes into every export.
    licence: Annotated[str, Field(max_length=2000)] = ""
    reader: ReaderField
    task: str | None = None
    preprocess: Preprocess
    split: Split = Split()
    audit: Audit = Audit()
    embedder: EmbedderField = Field(default={"name": "pixels"}, validate_default=True)
    cluster: Cluster = Cluster()
    select: Select = Select()
    match: dict[str, Match] = {}
    generators: dict[str, GeneratorField] = {}
    request: Request = Request(ratio=1.0)
    # What the comparison trains. Without one the study ends with its images.
    classifier: ClassifierField | None = None
    training: Training = Training()
    curate: Curate = Curate()
    search: Search = Search()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _labels(self) -> Study:
        for section, labels in (("generators", self.generators), ("match", self.match)):
            for label in labels:
                if not _LABEL.fullmatch(label):
                    raise PydanticCustomError(
                        "explained",
                        "{section}.{label}: use small letters, digits and _",
                        {"section": section, "label": label},
                    )
        for label in self.generators:
            if label in RESERVED:
                raise PydanticCustomError(
                    "explained",
                    "generators.{label}: is the name of an arm or of a split; choose another",
                    {"label": label},
                )
        return self


StageName = Literal["default", "decode", "embed", "generate", "classify"]
_ON_ACCELERATOR = ("embed", "generate", "classify")


class Profile(Spec):
    """Where and how to compute: never part of any identity."""

    storage: str = "runs"
    # ray: everything that has work runs on Ray. inline: in this process, for tests and debugging.
    runtime: Literal["ray", "inline"] = "ray"
    # local: a private Ray of this run. auto: the cluster that this job was submitted to.
    address: str = "local"
    # Logical CPUs of a local Ray; None: as many as the machine has, at least 4.
    num_cpus: Annotated[int, Field(ge=1)] | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    # Of the stages decode, embed and generate; `default` stands for those that are not named.
    stages: dict[StageName, StageResources] = {
        "decode": StageResources(actors=2, cpus=0.5, batch_size=64),
        "embed": StageResources(cpus=2, batch_size=64),
        "generate": StageResources(cpus=2, batch_size=32),
    }
    fit: FitResources = FitResources(cpus=2, checkpoint_every=100)
    # Of one trial of a search; as many run at once as there is room for.
    trial: TrialResources = TrialResources(cpus=2)
    # Where runs are logged: an MLflow server's URI. auto: an SQLite file in local storage. none.
    mlflow: str = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        gpus = {f"stages.{name}": stage.gpus for name, stage in self.stages.items()}
        gpus |= {"fit": self.fit.gpus, "trial": self.trial.gpus}
        if self.device == "cpu" and (with_gpu := [name for name, count in gpus.items() if count]):
            text = "{place}.gpus asks for a GPU, device: cpu uses none; say device: cuda"
            raise PydanticCustomError("explained", text, {"place": with_gpu[0]})
        offloads = [name for name, stage in self.stages.items() if stage.offload != "none"]
        if self.device == "cpu" and offloads:
            text = "stages.{name}.offload spares a GPU's memory, device: cpu has none; leave it out"
            raise PydanticCustomError("explained", text, {"name": offloads[0]})
        if self.device == "cuda" and self.runtime == "ray":
            # Ray hides the GPUs from what asks for none, and two trials on one run out of memory.
            gpus |= {f"stages.{name}": self.stage(name).gpus for name in _ON_ACCELERATOR}
            for place, count in gpus.items():
                if not count and place not in ("stages.decode", "stages.default"):
                    text = "device: cuda needs {place}.gpus above 0"
                    raise PydanticCustomError("explained", text, {"place": place})
        relative = "://" not in self.storage and not self.storage.startswith(("/", "~"))
        if self.address != "local" and relative:
            text = "storage: {storage} lies in the job's own folder; name a URL or a full path"
            raise PydanticCustomError("explained", text, {"storage": self.storage})
        return self

    def stage(self, name: str) -> StageResources:
        """Resources of a stage, or the entry `default`."""
        named = {str(key): resources for key, resources in self.stages.items()}
        return named.get(name) or named.get("default") or StageResources()


def validate(model: type[S], values: Any, where: str) -> S:
    """Build `model` from plain values. Raises `StudyError`, one line that names file, field and
    remedy."""
    if not isinstance(values, dict):
        raise StudyError(
            _one_line(f"{where}: must be a mapping of fields, is {type(values).__name__}")
        )
    try:
        made = model.model_validate(values)
        if huge := _too_large(values):
            raise StudyError(_one_line(f"{where}: {huge}: the number is too large"))
        return made
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        if inner := (first.get("ctx") or {}).get("place"):
            place.append(inner)
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        name = ".".join(place) or "study"
        raise StudyError(_one_line(f"{where}: {name}: {explain(first)}{more}")) from None
    except RecursionError:
        raise StudyError(_one_line(f"{where}: nested too deeply")) from None


def _too_large(values: Any, place: str = "") -> str:
    """The place of a whole number that no field can hold; fields without a limit would take it and
    fail where it is written down."""
    if isinstance(values, int):
        return place if abs(values) >= 2**63 else ""
    if isinstance(values, dict):
        items: Iterable[tuple[Any, Any]] = values.items()
    elif isinstance(values, list | tuple):
        items = enumerate(values)
    else:
        return ""
    found = (_too_large(value, f"{place}.{key}" if place else str(key)) for key, value in items)
    return next((name for name in found if name), "")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise StudyError(_one_line(f"{path}: no such file")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(_one_line(f"{path}: cannot be read: {error}")) from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise StudyError(_one_line(f"{path}: must be a mapping of fields"))
    return values


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses text without a UTF-8 form (`"\\ud800"`): it has no
    digest."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Keys are text, whether YAML reads a number or not, and none stands twice."""
        made: dict[Any, Any] = {}
        for key, value in super().construct_mapping(node, deep=deep).items():
            made[_text(key)] = value
        if len(made) < len(node.value) and not any(
            key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value
        ):
            names = [key.value for key, _ in node.value]
            twice = next((name for name in names if names.count(name) > 1), names[0])
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice!r} stands twice in one mapping", node.start_mark
            )
        return made

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str):
            value.encode()
        return value


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML lets KeyError, IndexError and more out of `!!bool x`
        raise StudyError(_one_line(f"{where}: no valid YAML: {error}")) from None


def _overlay(below: dict[Any, Any], above: dict[Any, Any]) -> dict[Any, Any]:
    laid = {**below, **{key: _overlaid(below.get(key), value) for key, value in above.items()}}
    return {key: value for key, value in laid.items() if value is not None}


def _overlaid(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    # Another plugin: the fields of the one below mean nothing to it. (A study's own name is none.)
    if "name" in above and "name" in below and above["name"] != below["name"]:
        return above
    return _overlay(below, above)


def _load(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise StudyError(_one_line(f"{path}: base: leads back to itself"))
    values = _read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or not base.isprintable():
        raise StudyError(_one_line(f"{path}: base: must be the path of a file"))
    below = _load(path.parent / base, (*seen, path))
    try:
        return _overlay(below, values)
    except RecursionError:
        raise StudyError(_one_line(f"{path}: nested too deeply")) from None


def apply_sets(values: dict[str, Any], sets: Sequence[str]) -> dict[str, Any]:
    """Lay `a.b=c` settings over `values`; c is read as YAML."""
    for setting in sets:
        name, found, text = setting.partition("=")
        if not found or not all(name.split(".")):
            raise StudyError(_one_line(f"--set {setting}: write it as field.subfield=value"))
        value = _parse_yaml(text, f"--set {setting}")
        for part in reversed(name.split(".")):
            value = {part: value}
        try:
            values = _overlay(values, value)
        except RecursionError:
            raise StudyError(_one_line(f"--set {setting}: nested too deeply")) from None
    return values


def load_study(path: Path, sets: Sequence[str] = ()) -> Study:
    """Read a study. Raises `StudyError`."""
    return validate(Study, apply_sets(_load(path), sets), str(path))


def load_profile(path: Path, sets: Sequence[str] = ()) -> Profile:
    """Read a profile. Raises `StudyError`."""
    return validate(Profile, apply_sets(_load(path), sets), str(path))
