"""The real audit on toy folders with planted faults: what is reported, and that nothing else is."""

from __future__ import annotations

import base64
import csv
import io
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from engine.cli import run_audit
from engine.core.errors import DataError
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.execute import execute, inspect
from engine.plan import plan, plan_audit, until
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.study import Study

MakeStudy = Callable[..., Study]
Audit = Callable[[Study], Manifest]


@pytest.fixture
def audit(profile: Profile, store: Store) -> Audit:
    def run(study: Study) -> Manifest:
        step = plan_audit(study)
        return execute([step], store, InlineRuntime(), profile)[step.key]

    return run


def picture(number: int, kind: int) -> Image.Image:
    """An image of 80 px that shares its background with its kind."""
    random = np.random.default_rng([kind, number])
    fine = random.integers(0, 120, (12, 12, 3), dtype=np.uint8)
    coarse = np.random.default_rng(kind).integers(0, 130, (3, 3, 3), dtype=np.uint8)
    layers = [
        np.asarray(Image.fromarray(part).resize((80, 80), Image.Resampling.BICUBIC), np.uint16)
        for part in (fine, coarse)
    ]
    return Image.fromarray((layers[0] + layers[1]).clip(0, 255).astype(np.uint8))


def write(root: Path, counts: dict[str, int]) -> None:
    """Images of two kinds: `a` and `b` in every split."""
    for split, count in counts.items():
        for kind, name in enumerate("ab"):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                picture(hash_free(split, number), kind).save(folder / f"{number:03d}.png")


def hash_free(split: str, number: int) -> int:
    return {"train": 0, "val": 1000, "test": 2000}[split] + number


def crop(source: Path, target: Path) -> None:
    image = Image.open(source)
    image.crop((4, 6, 75, 74)).save(target, quality=70)


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write(root, {"train": 30, "val": 8, "test": 8})
    shutil.copy(root / "train/a/000.png", root / "test/a/exact.png")
    shutil.copy(root / "train/a/001.png", root / "train/b/contradiction.png")
    shutil.copy(root / "train/b/002.png", root / "train/b/twice.png")
    crop(root / "train/a/003.png", root / "test/a/near.jpg")
    crop(root / "train/b/004.png", root / "train/b/crop.jpg")
    (root / "train/a/005.png").rename(root / "train/b/swapped.png")
    (root / "test/b/005.png").rename(root / "test/a/swapped.png")
    (root / "val/b/001.png").write_bytes(b"")
    (root / "val/b/002.png").write_bytes(b"<html>not found</html>")
    Image.open(root / "val/a/003.png").resize((900, 900)).save(root / "val/a/003.png")
    return root


def found(store: Store, manifest: Manifest) -> list[dict[str, Any]]:
    return pa.concat_tables(store.tables(manifest.keys(table="findings"))).to_pylist()


def told(entries: list[dict[str, Any]], kind: str) -> set[Any]:
    return {
        frozenset((e["uri"], e["other_uri"])) if e["other_uri"] else e["uri"]
        for e in entries
        if e["kind"] == kind
    }


def html(store: Store, manifest: Manifest) -> str:
    return store.read(manifest.keys(file="audit.html")[0]).decode()


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """The CSV files in a page, by name."""
    links = re.findall(
        r'href="data:text/csv;charset=utf-8;base64,([^"]+)" download="([^"]+)"', text
    )
    return {
        name: list(csv.DictReader(io.StringIO(base64.b64decode(data).decode())))
        for data, name in links
    }


def test_planted_faults_are_reported_by_kind_and_clean_images_are_not(
    faulty: Path, toy_study: MakeStudy, audit: Audit, store: Store, profile: Profile
) -> None:
    study = toy_study(faulty, preprocess={"size": 64})
    manifest = audit(study)
    entries = found(store, manifest)
    assert told(entries, "broken") == {"val/b/001.png", "val/b/002.png"}
    pairs = {
        "exact_across": ("train/a/000.png", "test/a/exact.png"),
        "exact_contradictory": ("train/a/001.png", "train/b/contradiction.png"),
        "exact_within": ("train/b/002.png", "train/b/twice.png"),
        "near_across": ("train/a/003.png", "test/a/near.jpg"),
        "near_within": ("train/b/004.png", "train/b/crop.jpg"),
    }
    for kind, pair in pairs.items():
        assert told(entries, kind) == {frozenset(pair)}, kind
    assert told(entries, "near_contradictory") == set()
    assert told(entries, "size") == {"val/a/003.png"}
    suspects = [entry for entry in entries if entry["kind"] == "label"]
    named = [entry["uri"] for entry in suspects]
    assert "train/b/swapped.png" in named[:3]
    assert {e["suggested"] for e in suspects if e["uri"] == "train/b/swapped.png"} == {"a"}
    # Labels of test are not checked.
    assert not [uri for uri in named if uri.startswith("test")]
    assert len(named) <= 4

    text = html(store, manifest)
    assert "To fix before the study can run" in text
    assert "http" not in re.sub(r"data:[^\"]+", "", text).replace("http-equiv", "")
    assert "test stays unseen" in text
    musts = " ".join(manifest.metrics["must"])
    for words in ("2 files cannot be used", "has two labels", "is in two splits",
                  "is a crop or a new encoding"):  # fmt: skip
        assert words in musts
    assert len(tables(text)["toy-findings.csv"]) == len(entries)
    # The study stops with the problems that the page lists.
    with pytest.raises(DataError, match="2 of 97 files cannot be used"):
        execute(until(plan(study), "ingest"), store, InlineRuntime(), profile)


def test_source_of_a_class_and_pictures_seen_in_train_are_reported(
    tmp_path: Path, toy_study: MakeStudy, audit: Audit, store: Store
) -> None:
    root = tmp_path / "data"
    write(root, {"train": 40, "val": 8, "test": 8})
    # Class b comes from another archive: JPEG, and smaller.
    for path in sorted(root.glob("*/b/*.png")):
        Image.open(path).resize((72, 72)).save(path.with_suffix(".jpg"), quality=90)
        path.unlink()
    shutil.copy(root / "train/a/000.png", root / "test/a/equal.png")
    Image.open(root / "train/a/001.png").save(root / "test/b/encoded.jpg", quality=60)
    (root / "notes.txt").write_text("")
    manifest = audit(toy_study(root, preprocess={"size": 64}))
    notices = {entry["code"]: entry["fields"] for entry in manifest.metrics["warnings"]}
    assert notices["confounded"]["area"] > 0.99
    # The value of the best feature is named.
    by = notices["confounded"]["by"]
    assert "size" in by
    assert " in 100% of its files and 0% of the others" in by
    seen = {"split": "test", "seen": 2, "pictures": 18, "equal": 1, "near": 1}
    assert notices["seen_in_train"] == seen
    # The new encoding has another label.
    pair = frozenset(("train/a/001.png", "test/b/encoded.jpg"))
    assert told(found(store, manifest), "near_contradictory") == {pair}
    text = html(store, manifest)
    assert "f 18 test pictures, 2 are in train too (1 equal, 1 nearly equal)" in unescape(text)
    assert "all files were made alike" not in text
    assert "not read: .txt" in text


def test_clean_folder_has_no_problems(
    tmp_path: Path, toy_study: MakeStudy, audit: Audit, store: Store
) -> None:
    write(tmp_path / "data", {"train": 20, "val": 4, "test": 4})
    manifest = audit(toy_study(tmp_path / "data", preprocess={"size": 64}))
    assert manifest.metrics["must"] == []
    assert not [e for e in found(store, manifest) if e["kind"] not in ("label", "outlier")]
    assert "No problem stops the study" in html(store, manifest)
    assert "pixel_embedder" in {notice["code"] for notice in manifest.metrics["warnings"]}
    assert "The study's embedder is pixels" in unescape(html(store, manifest))


def test_hostile_names_are_escaped_in_page_and_tables(
    tmp_path: Path, toy_study: MakeStudy, audit: Audit, store: Store
) -> None:
    root = tmp_path / "data"
    evil, formula = "<script>alert(1)</script>", "=CMD()"
    for kind, name in enumerate(("x", formula)):
        for number in range(12):
            (root / name).mkdir(parents=True, exist_ok=True)
            picture(number, kind).save(root / name / f"{number:03d}.png")
    shutil.copy(root / formula / "001.png", root / formula / "<img src=x onerror=alert(1)>.png")
    (root / formula / "=1+1.png").write_bytes(b"")
    lines = ["path,label"]
    lines += [f"x/{number:03d}.png,{evil}" for number in range(12)]
    lines += [f"{formula}/{path.name},{formula}" for path in sorted((root / formula).iterdir())]
    (root / "t.csv").write_text("\n".join(lines))
    reader = {"name": "csv", "root": str(root), "file": "t.csv"}
    text = html(store, audit(toy_study(reader)))
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;alert(1)" in text
    cells = [cell for rows in tables(text).values() for row in rows for cell in row.values()]
    assert "'=CMD()/=1+1.png" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]


def test_problems_that_stop_ingest_are_listed_with_the_rest(
    tmp_path: Path, toy_study: MakeStudy, audit: Audit, store: Store
) -> None:
    root = tmp_path / "data"
    write(root, {"train": 6})
    lines = ["path,label,key,patient"]
    lines += [f"train/a/{n:03d}.png,{'a' if n else ''},{max(n, 1)},p{n // 2}" for n in range(6)]
    lines += [f"train/b/{n:03d}.png,{'b' if n else 'rare'},{n + 10}," for n in range(6)]
    (root / "t.csv").write_text("\n".join(lines))
    reader = {"name": "csv", "root": str(root), "file": "t.csv", "id": "key", "group": "patient"}
    manifest = audit(toy_study(reader, split={"group": "column"}))
    musts = " ".join(manifest.metrics["must"])
    for words in ("the id '1' appears 2 times", "6 of 12 images have no group (train/b/000.png",
                  "1 of 12 images have no label (train/a/000.png)",
                  "the class 'rare' has one image"):  # fmt: skip
        assert words in musts
    assert "(no label)" in html(store, manifest)


def test_folder_without_a_readable_image_gets_a_page(
    tmp_path: Path, toy_study: MakeStudy, audit: Audit, store: Store
) -> None:
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.png").write_bytes(b"")
        (tmp_path / "data" / name / "1.png").write_bytes(b"no image")
    manifest = audit(toy_study(tmp_path / "data"))
    assert manifest.metrics["found"] == {"broken": 4}
    assert "empty file" in html(store, manifest)


def test_groups_in_two_splits_are_reported(
    tmp_path: Path, toy_study: MakeStudy, audit: Audit, store: Store
) -> None:
    root = tmp_path / "data"
    write(root, {"train": 8, "val": 4, "test": 4})
    lines = ["path,label,set,patient"]
    for path in sorted(root.rglob("*.png")):
        split, label, name = path.relative_to(root).parts
        number = int(name[:3])
        # Patient p0 of class a is in train and test.
        patient = "p0" if (split, label, number) in (("train", "a", 0), ("test", "a", 0)) else (
            f"{split}{label}{number // 2}")  # fmt: skip
        lines.append(f"{split}/{label}/{name},{label},{split},{patient}")
    (root / "t.csv").write_text("\n".join(lines))
    reader = {"name": "csv", "root": str(root), "file": "t.csv", "group": "patient", "split": "set"}
    manifest = audit(toy_study(reader, split={"group": "column"}))
    held = [entry for entry in found(store, manifest) if entry["kind"] == "group"]
    assert [entry["detail"] for entry in held] == ["p0"]
    assert "group is in two splits" in " ".join(manifest.metrics["must"])


def test_drawn_split_keeps_equal_images_and_groups_together(
    tmp_path: Path, toy_study: MakeStudy, audit: Audit, store: Store
) -> None:
    root = tmp_path / "data"
    write(root, {"train": 40, "test": 4})
    lines = ["path,label,set,patient"]
    for label in "ab":
        for number in range(40):
            name = f"train/{label}/{number:03d}"
            shutil.copy(root / f"{name}.png", root / f"{name}-again.png")
            lines += [f"{name}{end}.png,{label},train,{label}{number}" for end in ("", "-again")]
        lines += [f"test/{label}/{n:03d}.png,{label},test,t{label}{n}" for n in range(4)]
    (root / "t.csv").write_text("\n".join(lines))
    reader = {"name": "csv", "root": str(root), "file": "t.csv", "group": "patient", "split": "set"}
    manifest = audit(toy_study(reader, split={"group": "column", "val": 0.3}))
    assert manifest.metrics["found"]["exact_within"] == 80
    assert not {"exact_across", "group"} & set(manifest.metrics["found"])
    assert manifest.metrics["must"] == []


def test_class_of_one_repeated_image_is_too_small_as_in_ingest(
    tmp_path: Path, toy_study: MakeStudy, audit: Audit, store: Store, profile: Profile
) -> None:
    root = tmp_path / "data"
    write(root, {"train": 6, "val": 3, "test": 3})
    for split in ("train", "val", "test"):
        (root / split / "c").mkdir()
        picture(hash_free(split, 0), 2).save(root / split / "c" / "0.png")
        shutil.copy(root / split / "c" / "0.png", root / split / "c" / "1.png")
    study = toy_study(root)
    thin = "the class 'c' has 1 image in train, it needs 2"
    assert any(text.startswith(thin) for text in audit(study).metrics["must"])
    with pytest.raises(DataError, match=thin):
        execute(until(plan(study), "ingest"), store, InlineRuntime(), profile)


def test_exact_duplicates_report_the_most_serious_kind(
    tmp_path: Path, toy_study: MakeStudy, audit: Audit, store: Store
) -> None:
    root = tmp_path / "data"
    write(root, {"train": 6, "val": 3, "test": 3})
    source = root / "train/a/000.png"
    for copy in ("train/a/copy.png", "train/b/copy.png", "val/a/copy.png"):
        shutil.copy(source, root / copy)
    entries = found(store, audit(toy_study(root)))
    kinds = {entry["other_uri"]: entry["kind"] for entry in entries if "exact" in entry["kind"]}
    assert kinds == {
        "train/a/copy.png": "exact_within", "train/b/copy.png": "exact_contradictory",
        "val/a/copy.png": "exact_contradictory",
    }  # fmt: skip


def test_uniform_images_are_reported(
    tmp_path: Path, toy_study: MakeStudy, audit: Audit, store: Store
) -> None:
    root = tmp_path / "data"
    write(root, {"train": 8, "val": 3, "test": 3})
    Image.new("RGB", (80, 60), "black").save(root / "train/a/black.png")
    Image.new("RGB", (60, 80), (250, 240, 230)).save(root / "test/b/paper.jpg")
    manifest = audit(toy_study(root, preprocess={"size": 64, "fit": "pad"}))
    assert told(found(store, manifest), "one_colour") == {"train/a/black.png", "test/b/paper.jpg"}
    assert "Pictures of one colour" in html(store, manifest)


class Killed(InlineRuntime):
    """Dies after a number of shards."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def stream(self, worker: Any, shards: Any, resources: Any) -> Any:
        for summary in super().stream(worker, shards, replace_calls(resources)):
            yield summary
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt


def replace_calls(resources: Any) -> Any:
    return resources.model_copy(update={"shards_per_call": 1})


def test_killed_audit_continues_and_a_second_one_embeds_only_changes(
    tmp_path: Path, toy_study: MakeStudy, profile: Profile, store: Store
) -> None:
    root = tmp_path / "data"
    write(root, {"train": 170, "val": 8, "test": 8})  # 372 files, two shards
    study = toy_study(root)
    step = plan_audit(study)
    with pytest.raises(KeyboardInterrupt):
        execute([step], store, Killed(after=3), profile)
    first = execute([step], store, InlineRuntime(), profile)[step.key]
    assert first.provenance["shards.decode"] == {"found": 2, "made": 0}
    assert first.provenance["shards.embed"] == {"found": 1, "made": 1}

    # Repaired in place: the listing is the same, but the change is detected.
    (root / "train/b/100.png").write_bytes(b"")
    assert [status.state for status in inspect([step], store)] == ["out of date"]
    second = execute([step], store, InlineRuntime(), profile)[step.key]
    assert second.provenance["shards.decode"] == {"found": 0, "made": 2}
    assert second.provenance["shards.embed"]["found"] == 1
    assert second.metrics["found"]["broken"] == 1
    # Nothing is left of vectors of pictures as they were, or of decoded ones. The first page stays
    # until gc: its manifest counted until there was another.
    parts = [key for key in store.listing("steps") if "/parts/" in key]
    assert [key for key in second.keys(file="audit.html") if store.exists(key)]
    assert len([key for key in parts if "/audit/parts/" in key]) == 2
    assert not [key for key in parts if "/decoded/" in key]

    # A killed run whose files have changed since leaves nothing either.
    with pytest.raises(KeyboardInterrupt):
        execute([step], store, Killed(after=1), profile)
    (root / "train/b/101.png").unlink()
    execute([step], store, InlineRuntime(), profile)
    assert not [key for key in store.listing("steps") if "/decoded/parts/" in key]


def test_job_writes_the_page(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "study.yaml"
    config.write_text(
        f"name: toy\nreader: {{name: imagefolder, root: {faulty}}}\n"
        "preprocess: {size: 16}\nsplit: {group: none}\n"
    )
    sets = [f"profile.storage={tmp_path / 'runs'}", "profile.runtime=inline"]
    assert run_audit([str(config), *(part for one in sets for part in ("--set", one))]) == 0
    last = capsys.readouterr().err.splitlines()[-2:]
    assert "2 broken" in last[0]
    assert last[1].startswith("audit: ")
    page = Path(last[1].removeprefix("audit: "))
    assert page == tmp_path / "runs" / "pages" / "toy" / "audit.html"
    assert "<title>toy: is the data in order?" in page.read_text()
