"""The protocol of a study in words that a paper can use, from the study and its results alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.classifiers import checkpoint_in_words
from engine.comparison.arms import Arm, SearchSpec
from engine.core.registry import resolve
from engine.data.images import Preprocess
from engine.metrics.probabilities import BINS
from engine.metrics.significance import LEAST_REPLICATES
from engine.nets.classification import Training
from engine.report.page import in_points
from engine.report.sections.evidence import FIGURES
from engine.results.comparison import EvaluateResult, SearchResult
from engine.results.data import IngestResult
from engine.sections import Amount


def methods(
    study: Mapping[str, Any], ingest: IngestResult, search_spec: SearchSpec,
    amounts: Mapping[str, Amount], search: SearchResult, evaluate: EvaluateResult,
    versions: Mapping[str, str], engine: str,
) -> list[str]:  # fmt: skip
    """A paragraph each: data, images, classifiers, tests, software. amounts: images that each arm
    adds, by arm."""
    return [
        _data(study, ingest),
        _images(study, search_spec, amounts),
        _classifiers(study, search_spec, search),
        _tests(study, search_spec, evaluate),
        f"Computed with synthetic-training-engine {engine} ("
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"), study seed {study['seed']}.",
    ]


def _data(study: Mapping[str, Any], ingest: IngestResult) -> str:
    counts, split = ingest.counts, study["split"]
    totals = {name: sum(of.values()) for name, of in counts.items()}
    train = counts["train"]
    rarest, commonest = min(train.values()), max(train.values())
    carved = ingest.carved
    if carved:
        shares = {"val": split["val"], "test": split["test"]}
        made = " and ".join(f"{100 * shares[name]:g}% for {_SPLITS[name]}" for name in carved)
        how = f"{made} were set apart at random, stratified by class"
    else:
        how = "the splits are those of the data"
    grouped = (
        "; images of one group (such as a patient) stand in one split"
        if split["group"] == "column"
        else "; every image was taken as independent of the others, as no groups are recorded"
    )
    limited = (
        " Training images of "
        + listed([f"{name} ({count})" for name, count in split["train_limit"].items()])
        + " were limited in number to make a long tail."
        if split["train_limit"]
        else ""
    )
    size = study["preprocess"]["size"]
    colour = "grey" if study["preprocess"]["channels"] == "L" else "colour"
    return (
        f"The data comprise {totals['train']:,} training, {totals['val']:,} validation and"
        f" {totals['test']:,} test images in {len(train)} classes ({rarest:,} to {commonest:,}"
        f" training images per class, imbalance {commonest / max(rarest, 1):.1f}:1), at {size} by"
        f" {size} px in {colour}; {how}{grouped}.{limited} Images equal in their decoded pixels"
        f" were removed within a split and {_LEAKS[study['audit']['on_leak']]}. All images, real"
        " and synthetic, passed the same preprocessing."
    )


_SPLITS = {"val": "validation", "test": "test"}
# What became of images that are the same in two splits.
_LEAKS = {
    "fail": "not allowed across splits",
    "drop": "across splits removed from the earlier (training before validation before test)",
    "move": "across splits moved to the later (training before validation before test), with all"
            " of their group",
}  # fmt: skip


def _images(
    study: Mapping[str, Any], search_spec: SearchSpec, amounts: Mapping[str, Amount]
) -> str:
    labels = list(study["generators"])
    if not labels:
        return "No images were generated."
    target = study["request"]["classes"]
    groups = study["request"].get("class_groups", {})
    named = [] if target == "all" else target
    targets = dict.fromkeys(one for name in named for one in groups.get(name, [name]))
    of = f"the classes {listed(list(targets))}" if targets else "all classes"
    filters = [one["name"] for one in study["curate"]["filters"]]
    filtered = [label for label, spec in study["generators"].items()
                if filters and resolve("generators", spec["name"]).filtered]  # fmt: skip
    kept = (
        f"Images of {listed(filtered)} were filtered by {listed(filters)}, with limits set on"
        " validation or training images where the study names none"
        if filtered
        else "Generated images were not filtered"
    )
    return (
        f"Images were made by {_sources(study)}. {_drawn(study, search_spec.generator_fits)}."
        f" {kept}. They were added to {of},"
        f" {_amounts(study, search_spec.arms, amounts)}."
        f"{_other_arms(study, search_spec.arms)}"
    )


def _sources(study: Mapping[str, Any]) -> str:
    """The generators, by what they made their images from."""
    groups: dict[str, list[str]] = {}
    for label, spec in study["generators"].items():
        steps = f" ({spec['train_steps']:,} optimizer steps)" if spec.get("train_steps") else ""
        named = label if spec["name"] == label else f"{label} ({spec['name']})"
        groups.setdefault(_source(study, spec), []).append(f"{named}{steps}")
    return "; by ".join(f"{listed(told)}, {source}" for source, told in groups.items())


def _source(study: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    if spec.get("reader"):
        return "from images of a folder, made elsewhere"
    if not spec.get("model"):
        # An autoencoder may be given, which has seen other images.
        given = (spec.get("latent") or {}).get("model")
        if given:
            return f"from training images and the autoencoder {checkpoint_in_words(given)}"
        return "from training images alone"
    adapted = " adapted to training images" if is_trained(study, spec) else ""
    parents = " and from training images" if spec.get("mode", "text2image") != "text2image" else ""
    found = f"by the pretrained checkpoint {checkpoint_in_words(spec['model'])}{adapted}{parents}"
    return found if adapted or parents else f"{found} as it is"


def is_trained(study: Mapping[str, Any], spec: Mapping[str, Any]) -> bool:
    """Whether a generator learns from the study's images, or draws alone."""
    kind = resolve("generators", spec["name"])
    made = kind(kind.Spec.model_validate(spec), Preprocess.model_validate(study["preprocess"]))
    return bool(made.trainable)


def _trained_and_not(study: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Labels of generators that are trained, and of those that are not."""
    trained = [label for label, spec in study["generators"].items() if is_trained(study, spec)]
    return trained, [label for label in study["generators"] if label not in trained]


def _drawn(study: Mapping[str, Any], fits: int) -> str:
    trained, others = _trained_and_not(study)
    anew, often = ("", "once") if fits == 1 else (" anew", f"{fits} times")
    if not trained:
        return f"Their images were drawn{anew} {often}"
    who = f"{'Each generator' if not others else listed(trained)}"
    was, their = ("were", "their") if others and len(trained) > 1 else ("was", "its")
    found = f"{who} {was} trained{anew} and {their} images drawn{anew} {often}"
    if not others:
        return found
    which = "which is" if len(others) == 1 else "which are"
    return f"{found}; images of {listed(others)}, {which} not trained, were drawn{anew} {often}"


def _amounts(
    study: Mapping[str, Any], arms: Sequence[Arm], amounts: Mapping[str, Amount]
) -> str:
    """How many images the arms add."""
    added = [arm for arm in arms if arm.generators and arm.role != "shown"]
    ratios = sorted({arm.ratio for arm in added if arm.ratio})
    found = []
    if ratios:
        what = "ratios" if len(ratios) > 1 else "a ratio"
        told = listed([f"{ratio:g}" for ratio in ratios])
        found.append(f"at {what} of {told} per real training image of the class")
    unique: list[Amount] = []
    for arm in added:
        if not arm.ratio and amounts[arm.name] not in unique:
            unique.append(amounts[arm.name])
    for amount in unique:
        if amount.ratio_by_class is not None:
            # By the names of the study, which may be groups of classes.
            by_class = study["request"]["ratio_by_class"]
            groups = study["request"].get("class_groups", {})
            told = listed(
                [
                    f"{ratio:g} ({listed(groups.get(label, [label]))})"
                    for label, ratio in by_class.items()
                ]
            )
            found.append(f"at a ratio of each class's own, {told}")
        elif amount.per_class is not None:
            found.append(f"{amount.per_class:,} to each class")
        else:
            found.append(f"up to {amount.balance_to:,} training images of each class")
    return "; or ".join(found)


def _other_arms(study: Mapping[str, Any], arms: Sequence[Arm]) -> str:
    """Families added together, arms of synthetic images alone, twins without filters."""
    families = {arm.family for arm in arms}
    found = ""
    for family, parts in study["search"]["combine"].items():
        if family in families:
            labels = [part for part in parts if part != "reduced"]
            real = " to what is left of reduced real images" if "reduced" in parts else ""
            together = " together" if len(labels) > 1 else ""
            found += f" As “{family}”, images of {listed(labels)} were added{together}{real}."
    only = [arm.generators[0] for arm in arms if synthetic_only(arm)]
    if only:
        each = " each" if len(only) > 1 else ""
        found += (
            f" Classifiers were also trained on images of {listed(only)} alone,{each} as many as"
            " there are real ones."
        )
    if any(arm.twin_of for arm in arms):
        found += (
            " Beside the amount that was chosen, as many images without filters were added, as"
            " they came."
        )
    return found


def synthetic_only(arm: Arm) -> bool:
    """Whether an arm trains on generated images without real ones."""
    return bool(arm.generators) and arm.role == "shown" and not arm.twin_of


def _classifiers(
    study: Mapping[str, Any], search_spec: SearchSpec, search: SearchResult
) -> str:
    training, fits = study["training"], search_spec.generator_fits
    seeds = len(search_spec.seeds) // fits
    arms = [arm for arm in search_spec.arms if arm.role == "baseline"]
    families = list(dict.fromkeys(arm.family.replace("_", " ") for arm in arms))
    each = f"{seeds} seed{'s' if seeds > 1 else ''}"
    return (
        f"The classifier ({classifier_in_words(study['classifier'])}) was trained for"
        f" {training['steps']:,} optimizer steps by AdamW (learning rate"
        f" {training['learning_rate']:g}, weight decay {training['weight_decay']:g}, batch"
        f" {training['batch_size']}, {training['lr_scheduler']}"
        f" schedule{_beyond_defaults(training)}), the same for every"
        f" arm{_longer(search_spec.arms)}, with {each}"
        + (f" for each of {fits} generator fits" if fits > 1 else "")
        + f", paired across arms ({len(search.trials)} classifiers in all). Of each training,"
        f" the weights with the best {_objective(study)} on validation were kept, looked at every"
        f" {training['evaluate_every']} steps. Arms without synthetic images were"
        f" {listed(families)}. The ratio of each family and the strongest of these arms"
        f" ({search.baseline.replace('_', ' ')}), the baseline, were chosen by mean"
        f" {_objective(study)} on validation.{_tried(study)}"
    )


def _longer(arms: Sequence[Arm]) -> str:
    """The arms that have other steps than the rest."""
    told = [f"{arm.name.replace('_', ' ')} ({arm.budget:g} times as many steps)"
            for arm in arms if arm.budget != 1]  # fmt: skip
    return f" but {listed(told)}" if told else ""


def _tried(study: Mapping[str, Any]) -> str:
    # A study that was not tuned has no such section.
    tried = study.get("tune", {}).get("tried", 0)
    return f" The study's settings were chosen from {tried:,} tried on validation." if tried else ""


def classifier_in_words(spec: Mapping[str, Any]) -> str:
    """The network of a classifier's spec, as a paper names it."""
    kind = resolve("classifiers", spec["name"])
    return str(kind.in_words(kind.Spec.model_validate(spec)))


def _beyond_defaults(training: Mapping[str, Any]) -> str:
    """What else was set: online augmentation, the loss, the precision."""
    plain = Training().model_dump(mode="json")
    told = {"steps", "learning_rate", "weight_decay", "batch_size", "lr_scheduler", "objective",
            "evaluate_every"}  # fmt: skip
    found = [
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in training.items()
        if name not in told and value != plain.get(name)
    ]
    return f"; {', '.join(found)}" if found else "; no online augmentation"


def _tests(
    study: Mapping[str, Any], search_spec: SearchSpec, evaluate: EvaluateResult
) -> str:
    settings, count = study["evaluate"], len(evaluate.contrasts)
    fits = search_spec.generator_fits
    unit = "generator fits" if fits > 1 else "classifier seeds"
    test = evaluate.test
    # Images without groups are groups of one.
    groups = "groups" if test.groups < test.images else "images"
    opened = (
        "once" if test.opened == 1
        else f"by {test.opened} studies of this storage so far, this one included"
    )  # fmt: skip
    replicates = (
        evaluate.contrasts[0].replicates if count
        else fits if fits > 1 else len(search_spec.seeds)
    )  # fmt: skip
    few = bool(count) and evaluate.contrasts[0].replicates < LEAST_REPLICATES
    correction = (
        f", with p-values adjusted for {count} comparisons (Holm 1979)" if count > 1 else ""
    )
    return (
        f"The test set was opened after these choices, {opened}, for the chosen arms and the"
        f" baselines. Differences in {_objective(study)} on test are means over"
        f" {replicates} {unit} with 95% intervals by two methods: Student's t on paired"
        f" differences, and a percentile bootstrap ({settings['bootstrap_draws']:,} draws) over"
        f" {unit} and test {groups}{correction}. A difference was called one where both methods"
        f" exclude zero{' after that adjustment' if count > 1 else ''}, and none where both put"
        f" it within ± {in_points(settings['margin'])} (two one-sided"
        f" tests, Schuirmann 1987); with fewer than {LEAST_REPLICATES} replicates nothing was"
        f" called either{', as here' if few else ''}. Intervals of single classes are paired t"
        " intervals, not corrected for the number of classes. Calibration error is the mean gap"
        f" between confidence and accuracy over {BINS} equal bins (Guo et al. 2017); areas under"
        " curves are means over classes, each against the others."
    )


def _objective(study: Mapping[str, Any]) -> str:
    return FIGURES[study["training"]["objective"]]


def listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _drawn_once(study: Mapping[str, Any]) -> str:
    trained, others = _trained_and_not(study)
    if not trained:
        return "How much the draw of images matters: each generator's were drawn once."
    once = (
        "each that is trained was trained once, and each was drawn once"
        if others else "each was trained and drawn once"
    )  # fmt: skip
    return f"How much a generator's training and draw matter: {once}."


def not_known(
    study: Mapping[str, Any], ingest: IngestResult, search_spec: SearchSpec,
    search: SearchResult, evaluate: EvaluateResult,
) -> list[str]:  # fmt: skip
    """What this study cannot say, a sentence each."""
    found = ["How it is on images of another source: there is one test set, split from one source"
             " or given with it."]  # fmt: skip
    if search_spec.generator_fits == 1 and study["generators"]:
        found.append(_drawn_once(study))
    if study["split"]["group"] == "none":
        found.append(
            "Whether images that stand in different splits belong together: no groups are given."
        )
    if not ingest.near_duplicates_searched:
        found.append("Whether near duplicates cross the splits: only exact ones were looked for.")
    undecided = [one.arm for one in evaluate.contrasts if one.word == "undecided"]
    if undecided:
        found.append(
            f"Whether {listed(list(dict.fromkeys(undecided)))} helps or harms: chance was not"
            " ruled out, and no effect was not shown either."
        )
    # Of arms that were trained: twins of what was not chosen never were.
    closed = len(search.arms) - len(evaluate.arms)
    if closed:
        found.append(
            f"How {closed} arm{'s' if closed > 1 else ''} would do on test: they were not chosen,"
            " and test stayed closed to them."
        )
    found += [f"The study notes: {text}" for text in study.get("notes", ())]
    found.append(
        "Whether more steps, another learning rate or another classifier would say the same: each"
        " arm was given the same settings, not those that suit it best."
    )
    return found
