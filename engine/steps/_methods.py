"""The protocol of a study in words that a paper can use, from the study and its results alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.core.registry import resolve
from engine.metrics.probabilities import BINS
from engine.metrics.significance import LEAST_REPLICATES
from engine.nets.classification import Training
from engine.steps._evidence import FIGURES


def methods(
    study: Mapping[str, Any], ingest: Mapping[str, Any], search_spec: Mapping[str, Any],
    search: Mapping[str, Any], evaluate: Mapping[str, Any], versions: Mapping[str, str],
    engine: str,
) -> list[str]:  # fmt: skip
    """A paragraph each: data, images, classifiers, tests, software."""
    return [
        _data(study, ingest),
        _images(study, search_spec),
        _classifiers(study, search_spec, search),
        _tests(study, search_spec, evaluate),
        f"Computed with synthetic-training-engine {engine} ("
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"), study seed {study['seed']}.",
    ]


def _data(study: Mapping[str, Any], ingest: Mapping[str, Any]) -> str:
    counts, split = ingest["counts"], study["split"]
    totals = {name: sum(of.values()) for name, of in counts.items()}
    train = counts["train"]
    rarest, commonest = min(train.values()), max(train.values())
    carved = ingest.get("carved", ())
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
        " were removed within a split and not allowed across splits. All images, real and"
        " synthetic, passed the same preprocessing."
    )


_SPLITS = {"val": "validation", "test": "test"}


def _images(study: Mapping[str, Any], search_spec: Mapping[str, Any]) -> str:
    told = []
    for label, spec in study["generators"].items():
        steps = f" ({spec['train_steps']:,} optimizer steps)" if spec.get("train_steps") else ""
        named = label if spec["name"] == label else f"{label} ({spec['name']})"
        told.append(f"{named}{steps}")
    if not told:
        return "No images were generated."
    fits = search_spec["generator_fits"]
    drawn = (
        "Each generator was trained and its images drawn once"
        if fits == 1
        else f"Each generator was trained anew and its images drawn anew {fits} times"
    )
    target = study["request"]["classes"]
    of = "all classes" if target == "all" else f"the classes {listed(list(target))}"
    filters = [one["name"] for one in study["curate"]["filters"]]
    filtered = [label for label, spec in study["generators"].items()
                if filters and resolve("generators", spec["name"]).filtered]  # fmt: skip
    kept = (
        f"Images of {listed(filtered)} were filtered by {listed(filters)}, with limits set on"
        " validation or training images where the study names none"
        if filtered
        else "Generated images were not filtered"
    )
    ratios = listed([f"{ratio:g}" for ratio in study["search"]["ratios"]])
    return (
        f"Images were made by {listed(told)}, from training images alone. {drawn}. {kept}. They"
        f" were added to {of}, at ratios of {ratios} per real training image of the class."
    )


def _classifiers(
    study: Mapping[str, Any], search_spec: Mapping[str, Any], search: Mapping[str, Any]
) -> str:
    training, fits = study["training"], search_spec["generator_fits"]
    seeds = len(search_spec["seeds"]) // fits
    arms = [arm for arm in search_spec["arms"] if arm["role"] == "baseline"]
    families = list(dict.fromkeys(arm["family"].replace("_", " ") for arm in arms))
    each = f"{seeds} seed{'s' if seeds > 1 else ''}"
    return (
        f"The classifier ({study['classifier']['name']}) was trained for {training['steps']:,}"
        f" optimizer steps by AdamW (learning rate {training['learning_rate']:g}, weight decay"
        f" {training['weight_decay']:g}, batch {training['batch_size']}, {training['lr_scheduler']}"
        f" schedule{_beyond_defaults(training)}), the same for every arm, with {each}"
        + (f" for each of {fits} generator fits" if fits > 1 else "")
        + f", paired across arms ({len(search['trials'])} classifiers in all). Of each training,"
        f" the weights with the best {_objective(study)} on validation were kept, looked at every"
        f" {training['evaluate_every']} steps. Arms without synthetic images were"
        f" {listed(families)}. The ratio of each family and the strongest of these arms"
        f" ({search['baseline'].replace('_', ' ')}), the baseline, were chosen by mean"
        f" {_objective(study)} on validation."
    )


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
    study: Mapping[str, Any], search_spec: Mapping[str, Any], evaluate: Mapping[str, Any]
) -> str:
    settings, count = study["evaluate"], len(evaluate["contrasts"])
    fits = search_spec["generator_fits"]
    unit = "generator fits" if fits > 1 else "classifier seeds"
    test = evaluate["test"]
    # Images without groups are groups of one.
    groups = "groups" if test["groups"] < test["images"] else "images"
    opened = (
        "once" if test["opened"] == 1
        else f"by {test['opened']} studies of this storage so far, this one included"
    )  # fmt: skip
    few = bool(count) and evaluate["contrasts"][0]["replicates"] < LEAST_REPLICATES
    correction = (
        f", with p-values adjusted for {count} comparisons (Holm 1979)" if count > 1 else ""
    )
    return (
        f"The test set was opened after these choices, {opened}, for the chosen arms and the"
        f" baselines. Differences in {_objective(study)} on test are means over"
        f" {evaluate['contrasts'][0]['replicates'] if count else len(search_spec['seeds'])}"
        f" {unit} with 95% intervals by two methods: Student's t on paired differences, and a"
        f" percentile bootstrap ({settings['bootstrap_draws']:,} draws) over {unit} and test"
        f" {groups}{correction}. A difference was called one where both methods exclude zero, and"
        f" none where both put it within ± {100 * settings['margin']:g} points (two one-sided"
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


def not_known(
    study: Mapping[str, Any], ingest: Mapping[str, Any], search_spec: Mapping[str, Any],
    evaluate: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    """What this study cannot say, a sentence each."""
    found = ["How it is on images of another source: there is one test set, split from one source"
             " or given with it."]  # fmt: skip
    if search_spec["generator_fits"] == 1 and study["generators"]:
        found.append(
            "How much a generator's training and draw matter: each was trained and drawn once."
        )
    if study["split"]["group"] == "none":
        found.append(
            "Whether images that stand in different splits belong together: no groups are given."
        )
    if any("near duplicates" in text for text in ingest.get("warnings", ())):
        found.append("Whether near duplicates cross the splits: only exact ones were looked for.")
    undecided = [one["arm"] for one in evaluate["contrasts"] if one["word"] == "undecided"]
    if undecided:
        found.append(
            f"Whether {listed(list(dict.fromkeys(undecided)))} helps or harms: chance was not"
            " ruled out, and no effect was not shown either."
        )
    closed = len(search_spec["arms"]) - len(evaluate["arms"])
    if closed:
        found.append(
            f"How {closed} arm{'s' if closed > 1 else ''} would do on test: they were not chosen,"
            " and test stayed closed to them."
        )
    found.append(
        "Whether more steps, another learning rate or another classifier would say the same: each"
        " arm was given the same settings, not those that suit it best."
    )
    return found
