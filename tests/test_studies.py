"""The studies of `configs/studies`: planned as they are, and their data read from a small tree of
the published form, from the archive's root."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.plan import plan
from engine.results.data import IngestResult
from engine.settings import Request
from engine.study import Study, load_study
from tests.conftest import toy_picture
from tests.pages import plain_text

STUDIES = Path(__file__).parents[1] / "configs" / "studies"
FILES = sorted(STUDIES.glob("*.yaml"))
Run = Callable[[Study, str], Manifest]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_study_is_planned_to_its_page(path: Path) -> None:
    study = load_study(path)
    assert study.name == path.stem
    steps = plan(study)
    assert steps[-1].kind == "report"
    # Where the images come from, and what may be done with them.
    head = path.read_text().split("\nname:")[0]
    assert len(head) > 150
    assert all(line.startswith("#") or line.startswith("base:") for line in head.splitlines())


class Tree:
    """A small tree of images, no two alike."""

    def __init__(self, root: Path) -> None:
        self.root, self.count = root, 0

    def put(self, *names: str) -> None:
        for name in names:
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.count += 1
            toy_picture(self.count).save(path)

    def write(self, name: str, lines: list[list[str]], mark: str = ",") -> None:
        (self.root / name).write_text("".join(mark.join(line) + "\n" for line in lines))


def medic(tree: Tree) -> None:
    columns = ["image_id", "event_name", "image_path", "damage_severity", "informative",
               "humanitarian", "disaster_types"]  # fmt: skip
    kinds = [("severe", "informative", "affected", "flood"),
             ("little_or_none", "not_informative", "not_humanitarian", "not_disaster")]  # fmt: skip
    for split, count in (("train", 40), ("dev", 10), ("test", 10)):
        lines = [columns]
        for number in range(count):
            path = f"data/crisismmd/{split}_{number}.jpg"
            tree.put(path)
            lines.append([f"{split}{number}", "flood_2014", path, *kinds[number % 2]])
        tree.write(f"MEDIC_{split}.tsv", lines, "\t")


def nih(tree: Tree) -> None:
    lines = [["Image Index", "Finding Labels", "Patient ID", "Patient Gender", "View Position"]]
    findings = ["No Finding", "Hernia", "Edema|Hernia", "Edema"]
    names = []
    for number in range(48):
        names.append(f"{number:08d}_000.png")
        tree.put(f"images_{1 + number // 24:03d}/images/{names[-1]}")
        lines.append([names[-1], findings[number % 4], str(number), "MF"[number % 2], "PA"])
    tree.write("Data_Entry_2017.csv", lines)
    tree.write("train_val_list.txt", [[name] for name in names[:36]])
    tree.write("test_list.txt", [[name] for name in names[36:]])


def odir(tree: Tree) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append([
        "ID", "Patient Age", "Patient Sex", "Left-Fundus", "Right-Fundus",
        "Left-Diagnostic Keywords", "Right-Diagnostic Keywords", "N", "D",
    ])  # fmt: skip
    words = ["glaucoma", "cataract", "age-related macular degeneration",
             "hypertensive retinopathy", "pathological myopia", "normal fundus",
             "mild nonproliferative diabetic retinopathy", "lens dust"]  # fmt: skip
    for number in range(64):
        left, right = f"{number}_left.jpg", f"{number}_right.jpg"
        tree.put(f"Training Images/{left}", f"Training Images/{right}")
        book.active.append([number, 60, "Male", left, right, words[number % 8],
                            words[(number + 1) % 8], 0, 0])  # fmt: skip
    book.save(tree.root / "data.xlsx")


def idc(tree: Tree) -> None:
    for patient in range(12):
        for label in "01":
            for number in range(2):
                name = f"{patient}/{label}/{patient}_idx5_x{number}_y1_class{label}.png"
                tree.put(name)
                # The archive has every patch a second time.
                copy = tree.root / "IDC_regular_ps50_idx5" / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes((tree.root / name).read_bytes())


def folders(*names: str, count: int = 8) -> Callable[[Tree], None]:
    return lambda tree: tree.put(
        *(f"{name}/{number:03d}.jpg" for name in names for number in range(count))
    )


FORMS: dict[str, tuple[Callable[[Tree], None], dict[str, int]]] = {
    "medic": (medic, {"severe": 20, "flood": 20}),
    "nih_cxr": (nih, {}),
    "odir_5": (odir, dict.fromkeys("GCAHM", 16)),
    "odir_7": (odir, dict.fromkeys("GCAHMDN", 16)),
    "idc": (idc, {"0": 24, "1": 24}),
    "brain_mri": (
        folders(*(f"{split}/{name}" for split in ("Training", "Testing")
                  for name in ("glioma", "meningioma", "notumor", "pituitary"))),
        dict.fromkeys(("glioma", "meningioma", "notumor", "pituitary"), 16),
    ),
    "retinopathy": (
        folders("No_DR", "Mild", "Moderate", "Severe", "Proliferate_DR"),
        dict.fromkeys(("No_DR", "Mild", "Moderate", "Severe", "Proliferate_DR"), 8),
    ),
    "pneumoconiosis": (folders("normal", "pneumoconiosis"), {"normal": 8, "pneumoconiosis": 8}),
}  # fmt: skip


def ingested(name: str, root: Path, run_until: Run, **fields: Any) -> IngestResult:
    """The data of a study read from `root`, small and without networks."""
    root.mkdir()
    FORMS[name][0](Tree(root))
    study = load_study(STUDIES / f"{name}.yaml", [f"reader.root={root}", "rare_below=2"])
    pixels = load_study(STUDIES.parent / "digits.yaml").embedder
    small = study.model_copy(
        update={
            "preprocess": study.preprocess.model_copy(update={"size": 24}), "embedder": pixels,
            "generators": {}, "match": {}, "classifier": None, "request": Request(ratio=1.0),
            **fields,
        }
    )  # fmt: skip
    return IngestResult.of(run_until(small, "ingest"))


@pytest.mark.parametrize("name", sorted(FORMS))
def test_published_form_is_read_from_its_root(name: str, tmp_path: Path, run_until: Run) -> None:
    result = ingested(name, tmp_path / "archive", run_until)
    expected = FORMS[name][1]
    if result.labels:
        return
    counts: Counter[str] = Counter()
    for of_split in result.counts.values():
        counts.update(of_split)
    assert counts == expected


def test_medic_has_the_splits_and_the_tasks_of_its_tables(tmp_path: Path, run_until: Run) -> None:
    result = ingested("medic", tmp_path / "archive", run_until)
    assert {split: sum(of_split.values()) for split, of_split in result.counts.items()} == {
        "train": 40, "val": 10, "test": 10
    }  # fmt: skip
    assert list(result.cells) == [
        "flood, informative, affected, severe",
        "not_disaster, not_informative, not_humanitarian, little_or_none",
    ]
    assert set(result.labels) == {
        "disaster_types", "informative", "humanitarian", "damage_severity"
    }  # fmt: skip


def test_medic_reaches_its_page_with_four_tasks(
    tmp_path: Path, run_until: Run, store: Store
) -> None:
    root = tmp_path / "archive"
    root.mkdir()
    medic(Tree(root))
    study = load_study(STUDIES / "medic.yaml", [
        f"reader.root={root}", "rare_below=2", "preprocess.size=24", "embedder=pixels",
        "generators.sd=null", "curate.filters=[]", "evaluate.zero_shot=null",
        "fidelity.enabled=false", "classifier={name: small, channels: [8, 16]}",
        "training={steps: 4, batch_size: 8, evaluate_every: 2, crop_padding: 2}",
        "request.allocate={total: 20, tiers: [[1, 1]]}", "search={seeds: 2, confirm_fits: 1}",
    ])  # fmt: skip
    report = run_until(study, "report")
    (key,) = [part.key for part in report.parts if part.key.endswith(".html")]
    text = plain_text(store.read(key).decode())
    for task in ("disaster_types", "informative", "humanitarian", "damage_severity"):
        assert f"{task} 2 classes" in text
    assert "Who gets what, and why" in text


def test_nih_has_any_number_of_findings_per_image(tmp_path: Path, run_until: Run) -> None:
    result = ingested("nih_cxr", tmp_path / "archive", run_until)
    assert set(result.cells) == {"none", "Hernia", "Edema", "Edema + Hernia"}
    findings = result.labels["findings"]
    assert (findings.kind, findings.classes) == ("multi", ("Edema", "Hernia"))
    # The archive's lists name train and test; val is taken from train by patient.
    assert sum(result.counts["test"].values()) == 12
    assert result.carved == ["val"]


def test_every_form_has_a_study_and_every_study_a_form() -> None:
    assert {path.stem for path in FILES} == set(FORMS)
