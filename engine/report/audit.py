"""The page of an audit: the findings in the words of the data's owner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from engine.core import rows
from engine.core.ledger import Ledger
from engine.core.notice import Notice
from engine.data.images import decode_own
from engine.metrics.label_errors import WEAK
from engine.report.download import CSV, as_csv, data_url
from engine.report.page import render
from engine.report.tiles import tile
from engine.results.audit import NO_LABEL, Finding, GroupCounts
from engine.stages.confounding import Confounding
from engine.stages.records import thin_classes

_SHOWN = 24  # findings of a kind shown with their pictures
_LISTED = 20_000  # findings in a CSV
_NAMED = 40  # unreadable files listed by name
_TILE = 112  # maximum side in px


@dataclass
class Look:
    """The content of the page."""

    name: str
    images: int
    task: str
    findings: list[Finding]
    problems: list[str]
    warnings: list[Notice]
    near_limit: dict[str, float | None]
    # Images of each class in each split: all, and without the duplicates that a study removes.
    counts: dict[str, dict[str, int]]
    distinct: dict[str, dict[str, int]]
    groups: GroupCounts
    grouped: bool
    carved: list[str]
    max_quarantined: float
    broken_share: float
    on_leak: str
    agreed: float
    # As `engine.metrics.label_errors.wrong_labels` gives it; None if labels were not checked.
    wrong_labels: tuple[float, float] | None
    embedder: str
    size: int
    ledger: Ledger | None = None
    confounding: Confounding | None = None
    # Encoded pictures of the shown images, by id.
    pictures: dict[str, bytes] = field(default_factory=dict)

    def of(self, kind: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind == kind]

    @property
    def musts(self) -> list[str]:
        """The problems that stop a study, one line each."""
        lines = []
        for kind in KINDS:
            count = len(self.of(kind.name))
            if count and self.stops(kind.name):
                noun = kind.singular if count == 1 else kind.plural
                lines.append(f"{count:,} {noun}: {kind.remedy}")
        return [*self.problems, *lines, *self.thin()]

    def thin(self) -> list[str]:
        """Classes with too few images in a split."""
        by_split = {
            split: {name: counts[split] for name, counts in self.distinct.items()
                    if name != NO_LABEL}
            for split in rows.SPLITS
        }  # fmt: skip
        return list(thin_classes(by_split))

    def stops(self, kind: str) -> bool:
        """Whether findings of this kind stop a study."""
        if kind == "broken":
            return self.broken_share > self.max_quarantined
        if kind == "exact_contradictory":
            return True
        crossing = {"exact_across", "group", "near_across"}
        if kind == "near_contradictory":
            return self.on_leak == "fail" and any(
                finding.split != finding.other_split for finding in self.of(kind)
            )
        return kind in crossing and self.on_leak == "fail"


@dataclass(frozen=True)
class Kind:
    """The names and the explanation of a kind of finding."""

    name: str
    title: str
    singular: str
    plural: str
    remedy: str
    text: str


KINDS = (
    Kind("broken", "Files that cannot be used", "file cannot be used", "files cannot be used",
         "replace or remove them",
         "These files could not be opened as images: missing, empty, truncated, or not an image"
         " despite the name. A study sets them aside, and stops if there are more than"
         " audit.max_quarantined allows."),
    Kind("exact_contradictory", "One picture under two labels", "picture has two labels",
         "pictures have two labels", "keep only the one with the correct label",
         "The pixels are equal but the labels differ, so one of the two labels is wrong. A study"
         " does not start with such pictures."),
    Kind("exact_across", "The same picture in two splits", "picture is in two splits",
         "pictures are in two splits",
         "remove one of each, or let audit.on_leak do it",
         "A classifier that is tested on a picture from its training is tested on its memory."),
    Kind("near_across", "Nearly the same picture in two splits",
         "picture of one split is a crop or a new encoding of another's",
         "pictures of one split are crops or new encodings of another's",
         "remove one of each, or let audit.on_leak do it",
         "Laid over each other, the two pictures hardly differ. They may be crops, new encodings,"
         " or shots taken moments apart. Check each pair by eye."),
    Kind("group", "Groups in two splits", "group is in two splits",
         "groups are in two splits", "move each group into one split",
         "The images of a group, such as a patient, must stay in one split."),
    Kind("near_contradictory", "Nearly the same picture under two labels",
         "pair of nearly equal pictures has two labels",
         "pairs of nearly equal pictures have two labels",
         "check which label is correct, and remove one picture of each pair",
         "Laid over each other, the two pictures hardly differ, yet their labels do. If they show"
         " two objects in one scene, both labels may be correct."),
    Kind("label", "Labels in doubt", "label is in doubt", "labels are in doubt",
         "check the first ones",
         "A classifier trained on the other images, without this one, predicts another class"
         " (confident learning, Northcutt et al. 2021). The least likely labels come first. The"
         " classifier may be wrong: rare views and similar classes also appear here."),
    Kind("exact_within", "The same picture twice", "picture is in its split twice",
         "pictures are in their split twice", "a study keeps the first of each",
         "Equal pixels, same label, same split. A study keeps the first."),
    Kind("near_within", "Nearly the same picture twice", "pair within a split is nearly equal",
         "pairs within a split are nearly equal", "remove one of each if they are copies",
         "This is not a leak, but such a picture counts twice. Pictures of one group may be alike"
         " for a good reason."),
    Kind("one_colour", "Pictures of one colour", "picture is of one colour",
         "pictures are of one colour", "check whether they belong in the data",
         "They show nothing: blank pages, black frames, failed exports. They are not searched for"
         " near duplicates and, with some embedders, not for label errors and outliers."),
    Kind("outlier", "Images unlike their class", "image is unlike its class",
         "images are unlike their class", "check whether they belong in the data",
         "Even their fifth nearest neighbour in the class is unusually far away: other subjects,"
         " drawings, bad exposures, or rare cases that are worth keeping."),
    Kind("size", "Odd sizes", "picture has an odd size", "pictures have odd sizes",
         "check whether they come from another source",
         "The side length or shape of the original differs greatly from the rest."),
)  # fmt: skip

REASONS = {
    "empty": "empty file", "missing": "no such file", "not_readable": "no permission, or a folder",
    "path_not_allowed": "outside the data folder",
    "format_not_allowed": "unsupported format",
    "wrong_extension": "extension does not match the format",
    "not_decodable": "damaged, or not an image",
    "too_large": "too large", "range": "values out of range", "not_finite": "values not finite",
    "decoder_hang": "takes too long to open", "decoder_crash": "crashes the decoder",
    "process_died": "crashes the worker", "process_hung": "hangs the worker",
}  # fmt: skip


def shown_images(look: Look) -> set[str]:
    """Ids of the images whose pictures the page shows."""
    ids = {
        image_id
        for kind in KINDS
        if kind.name != "broken"
        for finding in look.of(kind.name)[:_SHOWN]
        for image_id in (finding.image_id, finding.other_id)
    }
    return ids - {""}


def page(look: Look) -> str:
    """The page, self-contained."""
    tiles = {image_id: tile(decode_own(data), _TILE) for image_id, data in look.pictures.items()}
    sections = []
    for kind in KINDS:
        findings = look.of(kind.name)
        if findings:
            sections.append(
                {
                    "kind": kind, "count": len(findings), "must": look.stops(kind.name),
                    "findings": findings[:_SHOWN], "csv": csv_url(findings[:_LISTED]),
                    "cut": len(findings) > _LISTED,
                    "files": findings[:_NAMED] if kind.name == "broken" else [],
                }
            )  # fmt: skip
    totals = {split: sum(counts[split] for counts in look.counts.values())
              for split in ("train", "val", "test")}  # fmt: skip
    train = {name: counts["train"] for name, counts in look.counts.items() if counts["train"]}
    return render(
        "audit.html", look=look, weak=WEAK, sections=sections, tiles=tiles, totals=totals,
        reasons=REASONS,
        most=max((sum(counts.values()) for counts in look.counts.values()), default=1),
        imbalance=max(train.values()) / min(train.values()) if train else 0.0,
        largest=max(train, key=lambda name: train[name], default=""),
        smallest=min(train, key=lambda name: train[name], default=""),
        none=[kind for kind in KINDS if not look.of(kind.name)],
        all_csv=csv_url(look.findings[:_LISTED]), left_out=left_out(look.findings),
    )  # fmt: skip


def left_out(findings: Sequence[Finding]) -> str:
    """Findings that do not fit in the table of all findings, by kind; empty if all fit."""
    counts = Counter(finding.kind for finding in findings[_LISTED:])
    return ", ".join(
        f"{counts[kind.name]:,} of “{kind.title}”" for kind in KINDS if counts[kind.name]
    )


def csv_url(findings: Sequence[Finding]) -> str:
    """A table of findings as a data URL; cells that look like formulas are escaped."""
    entries = []
    for finding in findings:
        values = asdict(finding)
        del values["image_id"]
        entries.append({**values, "score": f"{finding.score:.4f}"})
    return data_url(as_csv(entries), CSV)
