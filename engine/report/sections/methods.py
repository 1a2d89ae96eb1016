"""The protocol of a study in words for a paper, and what the study cannot answer. The sentences are
in the templates."""

from __future__ import annotations

import json
from dataclasses import dataclass

from engine import __version__
from engine.classifiers import checkpoint_in_words
from engine.core.registry import kind_of, name_of
from engine.core.spec import Spec
from engine.metrics.probabilities import BINS
from engine.metrics.significance import LEAST_REPLICATES
from engine.nets.classification import Training
from engine.report.page import Section, listed, render
from engine.report.results import FIGURES, StudyResults
from engine.report.sections.cost import classifier_in_words
from engine.settings import Amount
from engine.study import Study

# Settings of the training that have a place in the sentences.
_REPORTED = {"steps", "learning_rate", "weight_decay", "batch_size", "lr_scheduler", "objective",
             "evaluate_every"}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a generator's images come from.

    kind: a folder, training images alone (scratch), these and an autoencoder, or a pretrained
    checkpoint. adapted: the checkpoint was trained on the study's images. parents: images are made
    from training images.
    """

    kind: str
    checkpoint: str = ""
    adapted: bool = False
    parents: bool = False


@dataclass(frozen=True)
class GeneratorInWords:
    """A generator of the study. trained: on the study's images. filtered: its images are."""

    label: str
    plugin: str
    steps: int | None
    trained: bool
    filtered: bool
    source: Source


def methods(results: StudyResults) -> Section:
    """Paragraphs on data, images, classifiers, tests and software."""
    study, arms = results.study, results.search_spec.arms
    generators = generators_in_words(study)
    sources: dict[Source, list[GeneratorInWords]] = {}
    for generator in generators:
        sources.setdefault(generator.source, []).append(generator)
    request = study.request
    names = () if request.classes == "all" else request.classes
    added = [arm for arm in arms if arm.generators and arm.role != "shown"]
    amounts: list[Amount] = []
    for arm in added:
        if not arm.ratio and results.amounts[arm.name] not in amounts:
            amounts.append(results.amounts[arm.name])
    assert study.classifier is not None, "it was compared"
    return Section(
        render(
            "methods.html", results=results, generators=generators, sources=sources,
            filters=[name_of(spec) for spec in study.curate.filters],
            targets=list(dict.fromkeys(label for name in names for label in members(study, name))),
            ratios=[f"{ratio:g}" for ratio in sorted({arm.ratio for arm in added if arm.ratio})],
            amounts=amounts,
            class_ratios=[f"{ratio:g} ({listed(members(study, name))})"
                          for name, ratio in (request.ratio_by_class or {}).items()],
            only=[arm.generators[0] for arm in arms if arm.synthetic_only],
            classifier=classifier_in_words(study.classifier), settings=other_settings(study),
            longer=[arm for arm in arms if arm.budget != 1],
            objective=FIGURES[study.training.objective], least=LEAST_REPLICATES, bins=BINS,
            engine=__version__,
        )
    )  # fmt: skip


def not_known(results: StudyResults) -> Section:
    """What this study cannot answer, one sentence each."""
    generators = generators_in_words(results.study)
    return Section(render("not_known.html", results=results, generators=generators))


def members(study: Study, name: str) -> tuple[str, ...]:
    """The classes of a group of classes, or the class itself."""
    return study.request.class_groups.get(name, (name,))


def generators_in_words(study: Study) -> list[GeneratorInWords]:
    entries = []
    for label, spec in study.generators.items():
        kind = kind_of("generators", spec)
        trained = bool(kind(spec, study.preprocess).trainable)
        entries.append(
            GeneratorInWords(
                label, name_of(spec), getattr(spec, "train_steps", None), trained,
                bool(study.curate.filters) and kind.filtered, source_of(spec, trained),
            )
        )  # fmt: skip
    return entries


def source_of(spec: Spec, trained: bool) -> Source:
    if getattr(spec, "reader", None):
        return Source("folder")
    if model := getattr(spec, "model", None):
        parents = getattr(spec, "mode", "text2image") != "text2image"
        return Source("checkpoint", checkpoint_in_words(model), trained, parents)
    # A given autoencoder has been trained on other images.
    if autoencoder := getattr(getattr(spec, "latent", None), "model", None):
        return Source("autoencoder", checkpoint_in_words(autoencoder))
    return Source("scratch")


def other_settings(study: Study) -> list[tuple[str, str]]:
    """Other settings of the training that differ from the defaults: augmentation, loss,
    precision."""
    plain = Training().model_dump(mode="json")
    return [
        (name, value if isinstance(value, str) else json.dumps(value))
        for name, value in study.training.model_dump(mode="json").items()
        if name not in _REPORTED and value != plain.get(name)
    ]
