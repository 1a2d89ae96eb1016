"""The page of an audit: what was found, in the words of whoever owns the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.data.images import decode_own
from engine.report.download import as_csv, data_url
from engine.report.page import render
from engine.report.tile import tile

_SHOWN = 24  # findings of a kind with their pictures
_LISTED = 20_000  # findings in a CSV
_NAMED = 40  # files of a kind that has no pictures
_TILE = 112  # px, at most


@dataclass(frozen=True)
class Finding:
    """Something about an image, or about two. `score` orders those of a kind."""

    kind: str
    image_id: str
    uri: str
    label: str
    split: str
    other_id: str = ""
    other_uri: str = ""
    other_label: str = ""
    other_split: str = ""
    suggested: str = ""
    score: float = 0.0
    detail: str = ""


@dataclass
class Look:
    """All that the page tells."""

    name: str
    images: int
    task: str
    findings: list[Finding]
    problems: list[str]
    warnings: list[str]
    near_limit: dict[str, Any]
    # Images of each class in each split: all, and less the duplicates that a study takes out.
    counts: dict[str, dict[str, int]]
    distinct: dict[str, dict[str, int]]
    groups: dict[str, Any]
    grouped: bool
    carved: list[str]
    max_quarantined: float
    broken_share: float
    on_leak: str
    agreed: float
    embedder: str
    size: int
    # Encoded pictures by id, of what is shown.
    pictures: dict[str, bytes] = field(default_factory=dict)

    def of(self, kind: str) -> list[Finding]:
        return [found for found in self.findings if found.kind == kind]

    @property
    def musts(self) -> list[str]:
        """What stops a study, a line each."""
        found = []
        for kind in KINDS:
            count = len(self.of(kind.name))
            if count and self.stops(kind.name):
                found.append(f"{count:,} {kind.one if count == 1 else kind.many}: {kind.remedy}")
        return [*self.problems, *found, *self.thin()]

    def thin(self) -> list[str]:
        """Classes that lack images in a split."""
        return [
            f"the class {name!r} has {held[split]} images in {split}, it needs {needed}: add"
            " images, leave the class out, or change the split"
            for name, held in self.distinct.items()
            for split, needed in (("train", 2), ("val", 1), ("test", 1))
            if held[split] < needed and name != "(no label)"
        ]

    def stops(self, kind: str) -> bool:
        """Whether findings of this kind stop a study."""
        if kind == "broken":
            return self.broken_share > self.max_quarantined
        if kind == "exact_contradictory":
            return True
        crossing = {"exact_across", "group", "near_across"}
        if kind == "near_contradictory":
            return self.on_leak == "fail" and any(
                found.split != found.other_split for found in self.of(kind)
            )
        return kind in crossing and self.on_leak == "fail"


@dataclass(frozen=True)
class Kind:
    """How a kind of finding is called and explained."""

    name: str
    title: str
    one: str
    many: str
    remedy: str
    text: str


KINDS = (
    Kind("broken", "Files that cannot be used", "file cannot be used", "files cannot be used",
         "replace or remove them",
         "These files could not be opened as images: empty, cut off, or something else under an"
         " image's name. A study sets them aside; more of them than audit.max_quarantined allows"
         " stop it."),
    Kind("exact_contradictory", "One picture under two labels", "picture stands under two labels",
         "pictures stand under two labels", "keep the right one of each",
         "The pixels are equal and the labels are not, so one of the two labels is wrong. A study"
         " does not start with these."),
    Kind("exact_across", "The same picture in two splits", "picture stands in two splits",
         "pictures stand in two splits",
         "remove one of each, or let audit.on_leak do it",
         "Whoever trains on a picture and is tested on it is tested on memory."),
    Kind("near_across", "Nearly the same picture in two splits",
         "picture of one split is a crop or a new encoding of another's",
         "pictures of one split are crops or new encodings of another's",
         "remove one of each, or let audit.on_leak do it",
         "Laid over each other, the two agree better than different pictures of this data do. They"
         " may be crops, new encodings, or shots of a moment apart. Look at each: a good eye is the"
         " last judge."),
    Kind("group", "Groups in two splits", "group stands in two splits",
         "groups stand in two splits", "bring each group into one split",
         "A group is what must not be torn apart, such as a patient."),
    Kind("near_contradictory", "Nearly the same picture under two labels",
         "pair of nearly equal pictures bears two labels",
         "pairs of nearly equal pictures bear two labels",
         "look which label is right, and remove one of each",
         "The two pictures agree better than different pictures of this data do, yet their labels"
         " differ. Where they show two things in one scene, both labels may be right."),
    Kind("label", "Labels in doubt", "label is in doubt", "labels are in doubt",
         "look at the first of them",
         "A classifier that was taught by the other images, and not by this one, sees another class"
         " (confident learning, Northcutt et al. 2021). The least likely labels come first. It may"
         " well be the classifier that is wrong: rare views and classes that look alike stand here"
         " too."),
    Kind("exact_within", "The same picture twice", "picture stands twice in its split",
         "pictures stand twice in their split", "a study keeps the first of each",
         "Equal pixels, equal label, one split. A study keeps the first."),
    Kind("near_within", "Nearly the same picture twice", "pair within a split is nearly equal",
         "pairs within a split are nearly equal", "remove one of each if they are copies",
         "No leak, but such a picture counts twice. Pictures of one group may be alike for good"
         " reason."),
    Kind("one_colour", "Pictures of one colour", "picture is of one colour",
         "pictures are of one colour", "see whether they belong here",
         "Nothing is seen in them: blank pages, black frames, failed exports. Near duplicates, and"
         " with some embedders label errors and outliers, are not looked for among them."),
    Kind("outlier", "Images unlike their class", "image is unlike its class",
         "images are unlike their class", "see whether they belong here",
         "Even their fifth nearest neighbour within the class is far, against what is usual there:"
         " other subjects, drawings, bad exposures, or rare cases that are worth keeping."),
    Kind("size", "Odd sizes", "picture has an odd size", "pictures have odd sizes",
         "see whether they come from elsewhere",
         "Length or shape of the original is far from the rest."),
)  # fmt: skip

REASONS = {
    "empty": "empty file", "missing": "no such file", "not_readable": "no permission, or a folder",
    "path_not_allowed": "leads out of the folder",
    "format_not_allowed": "a format that is not read",
    "wrong_extension": "extension says another format", "not_decodable": "damaged, or no image",
    "too_large": "too large", "range": "values out of range", "not_finite": "values not finite",
    "decoder_hang": "takes too long to open", "decoder_crash": "crashes the decoder",
    "process_died": "crashes the worker", "process_hung": "hangs the worker",
}  # fmt: skip


def shown(findings: Sequence[Finding]) -> Sequence[Finding]:
    return findings[:_SHOWN]


def shown_images(look: Look) -> set[str]:
    """Ids of the images whose pictures the page shows."""
    found = {
        image_id
        for kind in KINDS
        if kind.name != "broken"
        for finding in shown(look.of(kind.name))
        for image_id in (finding.image_id, finding.other_id)
    }
    return found - {""}


def page(look: Look) -> str:
    """The page, self-contained."""
    tiles = {image_id: tile(decode_own(data), _TILE) for image_id, data in look.pictures.items()}
    sections = []
    for kind in KINDS:
        held = look.of(kind.name)
        if held:
            sections.append(
                {
                    "kind": kind, "count": len(held), "must": look.stops(kind.name),
                    "found": shown(held), "csv": csv_url(held[:_LISTED]),
                    "cut": len(held) > _LISTED,
                    "files": held[:_NAMED] if kind.name == "broken" else [],
                }
            )  # fmt: skip
    totals = {split: sum(held[split] for held in look.counts.values())
              for split in ("train", "val", "test")}  # fmt: skip
    train = {name: held["train"] for name, held in look.counts.items() if held["train"]}
    return render(
        "audit.html", look=look, sections=sections, tiles=tiles, totals=totals, reasons=REASONS,
        most=max((sum(held.values()) for held in look.counts.values()), default=1),
        imbalance=max(train.values()) / min(train.values()) if train else 0.0,
        largest=max(train, key=lambda name: train[name], default=""),
        smallest=min(train, key=lambda name: train[name], default=""),
        none=[kind for kind in KINDS if not look.of(kind.name)],
        all_csv=csv_url(look.findings[:_LISTED]), left_out=left_out(look.findings),
    )  # fmt: skip


def left_out(findings: Sequence[Finding]) -> str:
    """What the table of all findings has no room for, by kind; empty where it holds all."""
    held = Counter(found.kind for found in findings[_LISTED:])
    return ", ".join(f"{held[kind.name]:,} of “{kind.title}”" for kind in KINDS if held[kind.name])


def csv_url(findings: Sequence[Finding]) -> str:
    """A table of findings as a data URL; no cell is a formula."""
    entries = []
    for found in findings:
        values = asdict(found)
        del values["image_id"]
        entries.append({**values, "score": f"{found.score:.4f}"})
    return data_url(as_csv(entries))
