"""Results in words: the sentences of notices, and the verdict. Pages, the terminal and errors take
their text from here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.core.notice import Code, Notice
from engine.results.comparison import Contrast, Effect, OpenedTest, TaskResult

SENTENCES: dict[Code, str] = {
    "recorded": "{text}",
    "burned_in": "files that say that text is burned into their picture: {files:,}",
    "burned_in_unknown":
        "files that do not say whether text is burned into their picture: {files:,}; names and"
        " dates may be visible",
    "small_pictures":
        "at {side} px crops cannot be distinguished from similar pictures; only exact duplicates"
        " and new encodings were searched for",
    "similar_pictures":
        "different pictures of this data are as similar as changed copies, or too few; only exact"
        " duplicates, new encodings and slight crops were searched for",
    "alike_pictures":
        "many pictures of this data differ as little as slight crops do; only exact duplicates and"
        " new encodings were searched for",
    "near_contradictory":
        "pairs of nearly equal pictures with two labels: {pairs:,} (first: {first} is {label!r} and"
        " {second} is {other!r}); one of the two labels may be wrong, and on_leak does not know"
        " which",
    "similar_groups":
        "near duplicates in train of different groups: {pairs:,} (pairs of images); the groups may"
        " be wrong, see jobs/audit.py",
    "files_skipped": "files that were not read: {skipped:,} of {files:,}: {reasons}",
    "excluded":
        "images left out by reader.exclude, reader.classes or reader.unlabelled: {images:,}",
    "no_value_names":
        "the class {name!r} is named like a missing value (images: {images:,}); leave these images"
        " out if they have no label",
    "zeros_differ":
        "the classes {first!r} and {second!r} are the same number; they count as two classes",
    "groups_differ":
        "pairs of groups that differ only in case, spaces or leading zeros: {pairs:,} (first:"
        " {first!r} and {second!r}); they count as different groups",
    "bits_unused":
        "{images:,} pictures have 16 bits but use {bits} of them, so that their values become 0 to"
        " {top}; set preprocess.window, for example [0, {most}]",
    "frames_unused":
        "files with several frames or pages: {files:,} (first: {first}); only the first page is"
        " used, save the others as files of their own",
    "cut_away":
        "preprocess.fit: crop keeps the central square: {images:,} of {all:,} pictures lose more"
        " than {percent}% of their area (first: {first}); set it to pad or stretch if what is at"
        " the ends matters",
    "turned":
        "pictures that their EXIF orientation turns: {images:,} (first: {first}); they are used"
        " upright, as viewers show them",
    "set_aside":
        "images that cannot be used: {images:,} of {all:,} ({reasons}; first: {first}){classes};"
        " jobs/audit.py lists them",
    "names_trimmed":
        "labels with spaces around them: {images:,} (first: {first!r}); the spaces are removed",
    "seen_in_train":
        "of {pictures:,} {split} pictures, {seen:,} are in train too ({equal:,} equal, {near:,}"
        " nearly equal)",
    "seen_before":
        "of {pictures:,} {split} pictures, {seen:,} were in train too ({equal:,} equal, {near:,}"
        " nearly equal) before on_leak was applied",
    "small_class":
        "{split} has only {images:,} of {name!r}: a single image decides {percent}% of a score that"
        " weighs classes equally, such as macro-F1, and so of every choice or verdict made by it"
        " (classes as small as this: {classes})",
    "confounded":
        "how the files were made ({by}) distinguishes {name!r} from the other classes without the"
        " picture (AUC {area:.2f}): a classifier may learn the source instead of the subject;"
        " use images of one source alone, or give every class images of every source",
    "weak_judge":
        "suspected label errors ({labels:,}) are not listed: the classifier that suspects them"
        " agrees with only {agreed}% of the labels of a class, on average; set embedder to a"
        " network trained on such pictures",
    "no_groups": "no groups are given: every image counts as independent of the others",
    "leaks_resolved": "leaks between splits that on_leak: {on_leak} resolved: {leaks:,}",
    "pixel_embedder":
        "the study's embedder is pixels, which detects label errors, outliers and crops far worse"
        " than a network; set embedder to cnn, clip or dino",
    "one_group":
        "label errors were not searched in {classes:.200}: each has only one group or image",
    "weak_voters":
        "the voters agree with only {agreed}% of the labels of {split}, on average: much of what"
        " they change may be their own mistakes; look at the page, raise relabel.sure, or choose"
        " better voters",
    "clusters_dissolved":
        "{name}: {dissolved} of {clusters} clusters had too few images and were dissolved",
    "clusters_tiny":
        "{name}: {tiny} of {clusters} clusters have fewer than {images} images; raise"
        " cluster.min_size or lower cluster.k",
    "prompts_truncated":
        "{truncated} of {prompts} prompts are longer than the {limit} tokens that the checkpoint"
        " reads: {first} loses {rest}; shorten them",
    "prompts_unchecked": "cannot check whether prompts are truncated: {why:.120}",
    "overlapping_draws":
        "draws of different fits have {percent}% of their images of {label!r} in common: the folder"
        " has {images:,} and each draw needs {wanted:,}, so its fits are hardly replicates; add"
        " images, or request fewer",
    "copies": "copies of training images: {copies:,} of {images:,} images",
    "covers_nothing":
        "this generator may have learnt nothing: only {percent:.0f}% of real images have a"
        " generated image nearby (less than {floor:.0f}% is a warning sign), and a linear probe"
        " distinguishes real from generated images with an AUC of {area:.2f}; look at its picture"
        " sheet, train it longer, or leave it out",
    "one_picture":
        "this generator may make almost the same picture again and again: two of its images of a"
        " class are {percent:.0f}% as far apart as two real ones (less than {floor:.0f}% is a"
        " warning sign); look at its picture sheet, change its training, or leave it out",
    "shows_no_class":
        "this generator may have learnt no classes: the labeler sees the requested class in"
        " {seen:.0f}% of its images (by chance {chance:.0f}%, in real ones {val:.0f}%); look at its"
        " picture sheet, train it longer, or leave it out",
    "few_to_judge":
        "too few images to judge whether this generator learnt anything: {pairs:,} real and"
        " generated ones of the same classes, {least:,} are needed; look at its picture sheet",
    "blind_labeler":
        "the labeler recognises {right:,} of {images:,} real val images of {name!r}: whether"
        " generated images show this class is not known from it{more}",
    "few_for_frechet":
        "a Fréchet distance of {images:,} images (fewer than {least:,}) depends strongly on their"
        " number: compare it only with that of as many real images",
    "small_train":
        "train suffices for only {real:,} real images: their figures are not a reference for"
        " {generated:,} generated images, which are also compared at {real:,}",
    "near_train":
        "{percent:.1f}% of the kept images ({low:.1f} to {high:.1f}) are nearer to a training image"
        " than {farther:.0f}% of val images; of images as far from train as val is, 95 of 100 sets"
        " would have at most {most:.1f}%",
    "classes_omitted":
        "the scope of all classes omits those with fewer than {least} kept images: {classes}",
    "external_seen": "images left out because they are in the study's own data too: {images:,}",
    "near_chance":
        "its classifier has hardly learnt anything (balanced accuracy {mean:.2f} on val, chance is"
        " {chance:.2f})",
    "few_in_val": "{images} in val",
    "few_generated": "{images} generated",
    "hardly_learnt":
        "on real images alone the classifier has hardly learnt anything (balanced accuracy"
        " {mean:.2f} on val, chance is {chance:.2f}), so no arm is informative; raise"
        " training.steps, change training.learning_rate or the classifier",
    "few_replicates": "too few replicates: {replicates} (minimum {minimum})",
    "few_groups": "too few test groups: {groups} (minimum {minimum})",
    "few_of_class":
        "too few test groups with the rarest class: {groups} (minimum {minimum}), and it weighs as"
        " much as any other",
    "unequal_groups":
        "too few test groups: {groups} of unequal size, equivalent to {effective:.0f} (minimum"
        " {minimum})",
    "few_draws": "too few bootstrap draws; raise evaluate.bootstrap_draws to {minimum}",
    "no_spread": "all differences are equal, so there is no spread to test against",
}  # fmt: skip


def notice_in_words(notice: Notice) -> str:
    """The sentence of a notice, in lower case and without a full stop."""
    return SENTENCES[notice.code].format(**notice.fields)


def budget_in_words(budget: Effect, objective: str) -> str:
    return (
        f"Warning: with twice the steps, real images alone gain {100 * budget.estimate:.1f} points"
        f" of {objective}, so the training budget limits every arm; raise training.steps."
    )


def opened_in_words(test: OpenedTest) -> str:
    """How much of test other studies opened, and how many; for a test set that some opened."""
    others = test.opened - 1
    images = (
        "all test images were" if test.opened_before == test.images
        else f"{test.opened_before:,} of the {test.images:,} test images were"
    )  # fmt: skip
    studies = "another study" if others == 1 else f"{others:,} other studies"
    return f"{images} opened by {studies} in this storage too"


def verdict_in_words(
    contrasts: Sequence[Contrast], objective: str, baseline: str, budget: Effect | None = None,
    tasks: Mapping[str, TaskResult] = {},
) -> str:  # fmt: skip
    """The verdict, one sentence per contrast (two with several tasks), and a warning if the budget
    limits every arm."""
    sentences = []
    for contrast in contrasts:
        sentences.append(contrast_in_words(contrast, objective))
        if len(tasks) > 1 and not contrast.twin:
            sentences.append(tasks_in_words(contrast.arm, tasks))
    if not contrasts:
        sentences = [f"no synthetic arm was compared; the strongest baseline on val is {baseline}"]
    if budget is not None and budget.low > 0:
        sentences.append(budget_in_words(budget, objective))
    return " ".join(sentences)


def tasks_in_words(arm: str, tasks: Mapping[str, TaskResult]) -> str:
    """The difference in each task."""
    parts = [
        f"{name} {100 * effect.estimate:+.1f} points ({100 * effect.low:+.1f} to"
        f" {100 * effect.high:+.1f})"
        for name, task in tasks.items()
        for effect in [task.to_against[arm]]
    ]
    return f"By task: {'; '.join(parts)}."


def contrast_in_words(contrast: Contrast, objective: str) -> str:
    effect = contrast.effect
    against = f"{contrast.against}{which_baseline(contrast)}"
    difference = (
        f"{objective} {100 * effect.estimate:+.1f} points compared with {against}, 95% interval"
        f" {100 * contrast.low:+.1f} to {100 * contrast.high:+.1f}"
    )
    condition = replicates_in_words(contrast)
    if contrast.word in ("helps", "harms"):
        return f"{contrast.arm} {word_in_words(contrast)}: {difference} ({condition})."
    if contrast.word == "equivalent":
        # Two one-sided tests at 5% correspond to a 90% interval.
        near = (
            f"{objective} {100 * effect.estimate:+.1f} points compared with {against}, 90% interval"
            f" {100 * contrast.near_low:+.1f} to {100 * contrast.near_high:+.1f}"
        )
        return f"{contrast.arm} {word_in_words(contrast)}: {near} ({condition})."
    return (
        f"{contrast.arm} is {word_in_words(contrast)}: {difference} ({condition};"
        f" {what_would_settle(contrast)})."
    )


def word_in_words(contrast: Contrast) -> str:
    """The verdict's word with what it is conditional on and whether the effect is relevant."""
    points = _points(contrast.margin)
    if contrast.word == "undecided":
        return "undecided against its unfiltered twin" if contrast.twin else "undecided"
    if contrast.word == "equivalent":
        if contrast.twin:
            return f"differs from its unfiltered twin by no more than ±{points}"
        return f"makes no difference beyond ±{points}"
    text: str = contrast.word
    if contrast.twin:
        comparative = "better" if contrast.word == "helps" else "worse"
        text = f"is {comparative} than its unfiltered twin"
    if contrast.generator_fits == 1:
        text += f" with this one {'draw of images' if contrast.drawn else 'trained generator'}"
    elif contrast.drawn:
        text += " with this one generator"
    if abs(contrast.effect.estimate) < contrast.margin:
        text += f", by less than the {points} that the study calls relevant"
    return text


def which_baseline(contrast: Contrast) -> str:
    """Why the headline is the comparison with this baseline."""
    if contrast.twin or len(contrast.baselines) < 2:
        return ""
    if contrast.word == "harms":
        return ", which harm is judged against"
    if contrast.word == "equivalent":
        return ", the best baseline on val"
    return ", the baseline that is hardest to beat"


def _points(share: float) -> str:
    number = f"{100 * share:g}"
    return f"{number} {'point' if number == '1' else 'points'}"


def failed_in_words(contrast: Contrast) -> str:
    """The verdict without the replicates that failed on val; empty if none did."""
    rest = contrast.without_failed
    if rest is None:
        return ""
    if rest.verdict is None:
        return "without the replicates that failed on val too few are left for a verdict"
    verdict = rest.verdict
    return (
        f"without the replicates that failed on val ({rest.replicates} left):"
        f" {verdict.word},"
        f" {100 * verdict.effect.estimate:+.1f} points compared with {verdict.against}"
        f" ({100 * verdict.low:+.1f} to {100 * verdict.high:+.1f})"
    )


def replicates_in_words(contrast: Contrast) -> str:
    """The replicates that the interval covers."""
    if contrast.claimed:
        what = replicates_in_words(contrast.model_copy(update={"claimed": False}))
        return f"{what}, as the file states"
    fits, seeds = contrast.generator_fits, contrast.seeds
    if fits == 1:
        return f"{seeds} classifier seeds, conditional on one generator"
    if contrast.drawn:
        return (
            f"{fits} draws of images"
            + (f" with {seeds} classifier seeds each" if seeds > 1 else "")
            + ", conditional on one generator, which the study did not train"
        )
    return f"{fits} generator fits" + (f" with {seeds} classifier seeds each" if seeds > 1 else "")


def what_would_settle(contrast: Contrast) -> str:
    """What an undecided contrast has too little of."""
    if contrast.obstacle:
        return notice_in_words(contrast.obstacle)
    finding = f"finding a difference of {_points(contrast.margin)}, the study's margin,"
    groups, count = contrast.groups_needed, contrast.replicates_needed
    if groups is None or count is None:
        return f"{finding} would take more than 100 times the test data or 200 replicates"
    needed = []
    if groups > contrast.groups:
        unit = "test groups" if contrast.grouped else "test images"
        needed.append(f"about {groups:,} {unit} (here {contrast.groups:,})")
    if count > contrast.replicates:
        unit = "generator fits" if contrast.generator_fits > 1 else "seeds"
        needed.append(f"about {count:,} {unit} (here {contrast.replicates})")
    what = f"{' together with '.join(needed)}" if needed else "no more than this study has"
    return f"{finding} would take {what}"


def detectable_in_words(contrast: Contrast) -> str:
    """What a study of this size finds, with its own uncertainty; empty if that is unknown."""
    if contrast.detectable is None:
        return ""
    low, high, most = contrast.detectable_low, contrast.detectable_high, contrast.possible
    rough = f"a rough estimate from {contrast.replicates} replicates"
    if most is not None and contrast.detectable >= most:
        return (
            "a study of this size would probably not notice even the largest possible difference,"
            f" {_about(most)} ({rough})"
        )
    if low is not None and high is not None:
        end = "more than is possible" if most is not None and high >= most else f"{100 * high:.1f}"
        rough += f"; 95% interval {100 * low:.1f} to {end}"
    return (
        f"a study of this size would probably notice about {_about(contrast.detectable)} ({rough})"
    )


def range_in_words(contrast: Contrast) -> str:
    """The range of a difference: "1.8 points lower to 0.6 higher". Of an equivalent arm it is that
    of both 90% intervals, which its two one-sided tests correspond to."""
    ends = (contrast.low, contrast.high)
    if contrast.word == "equivalent":
        ends = (contrast.near_low, contrast.near_high)
    low, high = (100 * end for end in ends)
    if low >= 0:
        return f"{low:.1f} to {high:.1f} points higher"
    if high <= 0:
        return f"{-high:.1f} to {-low:.1f} points lower"
    return f"{-low:.1f} points lower to {high:.1f} higher"


def _about(share: float) -> str:
    number = f"{100 * share:.1f}"
    return f"{number} {'point' if number == '1.0' else 'points'}"
