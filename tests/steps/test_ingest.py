"""The real ingest on toy folders: what is accepted, what is set aside, and what stops the run."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from engine.core import rows
from engine.core.errors import DataError, LeakError
from engine.core.manifest import Manifest
from engine.core.shards import reason_of
from engine.core.store import Store
from engine.data.images import Preprocess, decode_own
from engine.data.sandbox import Sandbox
from engine.execute import execute, inspect
from engine.plan import plan, until
from engine.profile import Profile
from engine.results.data import IngestResult
from engine.runtime.inline import InlineRuntime
from engine.stages.intake import Decode
from engine.study import Study
from engine.work.stage import Place
from tests.conftest import toy_picture

Folder = Callable[..., Path]
MakeStudy = Callable[..., Study]
Run = Callable[[Study], Manifest]


@pytest.fixture
def ingest(run_until: Callable[[Study, str], Manifest]) -> Run:
    return lambda study: run_until(study, "ingest")


def images(store: Store, manifest: Manifest) -> list[dict[str, Any]]:
    """All accepted rows; checks that each part has rows of its own split only."""
    found = []
    for split in rows.SPLITS:
        for table in store.tables(manifest.keys(split=split)):
            assert set(table[rows.SPLIT].to_pylist()) == {split}
            found += table.to_pylist()
    return found


def fates(store: Store, manifest: Manifest) -> dict[str, str]:
    """The status of every record by its path."""
    table = pa.concat_tables(store.tables(manifest.keys(table="records")))
    reasons = map(reason_of, table[rows.STATUS].to_pylist())
    return dict(zip(table[rows.URI].to_pylist(), reasons, strict=True))


def splits_of(store: Store, manifest: Manifest) -> dict[str, str]:
    return {row[rows.URI]: row[rows.SPLIT] for row in images(store, manifest)}


def write_table(root: Path, lines: list[str]) -> dict[str, Any]:
    (root / "t.csv").write_text("\n".join(lines) + "\n")
    return {"name": "csv", "root": str(root), "file": "t.csv"}


def refused(ingest: Run, study: Study, match: str, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind, match=match) as caught:
        ingest(study)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# Accepted images --------------------------------------------------------------------------------


def test_clean_folder_becomes_three_splits_that_datasets_opens(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store, tmp_path: Path
) -> None:
    root = image_folder({"cat": 20, "dog": 20})
    manifest = ingest(toy_study(root))
    found = images(store, manifest)
    assert len(found) == manifest.rows == 40
    assert len({row[rows.IMAGE_ID] for row in found}) == 40
    assert manifest.metrics["counts"] == {
        "train": {"cat": 13, "dog": 13}, "val": {"cat": 3, "dog": 3}, "test": {"cat": 4, "dog": 4}
    }  # fmt: skip
    assert manifest.metrics["carved"] == ["val", "test"]
    assert set(fates(store, manifest).values()) == {"ok"}
    for row in found:
        assert row[rows.URI].startswith(row["label.class"])
        assert (row[rows.WIDTH], row[rows.HEIGHT], row[rows.SOURCE]) == (24, 24, "real")
        assert decode_own(row[rows.IMAGE]["bytes"]).shape == (16, 16, 3)

    import datasets

    parts = [store.location(key) for key in manifest.keys(split="train")]
    loaded = datasets.load_dataset(
        "parquet", data_files=parts, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded[0]["image"].size == (16, 16)
    assert len(loaded) == 26


def test_same_data_and_study_give_the_same_result_in_another_store(
    image_folder: Folder, toy_study: MakeStudy, tmp_path: Path
) -> None:
    study = toy_study(image_folder({"a": 10, "b": 10}))
    found = []
    for name in ("one", "two"):
        profile = Profile(storage=str(tmp_path / name), runtime="inline")
        profile = profile.model_copy(
            update={"stages": {"decode": profile.stage("decode").model_copy(
                update={"batch_size": {"one": 3, "two": 64}[name]})}}
        )  # fmt: skip
        steps = until(plan(study), "ingest")
        store = Store(profile.storage)
        found.append(execute(steps, store, InlineRuntime(), profile)[steps[0].key])
        assert [status.state for status in inspect(steps, store)] == ["done"]
        # No intermediate files are left.
        left = [key for key in store.listing("steps") if "/parts/" in key]
        assert sorted(left) == sorted(part.key for part in found[-1].parts)
    assert found[0].digest == found[1].digest


def test_data_changed_after_ingest_stops_the_next_run(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run
) -> None:
    root = image_folder({"a": 10, "b": 10})
    ingest(toy_study(root))
    shutil.copy(root / "a" / "000.png", root / "a" / "new.png")
    refused(ingest, toy_study(root), "the data changed since.*--discard ingest")
    shutil.rmtree(root)
    assert ingest(toy_study(root)).rows == 20  # ingested data does not need the originals


def test_same_files_elsewhere_are_the_same_data(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    root = image_folder({"a": 10, "b": 10}, below="one/data")
    shutil.copytree(root, tmp_path / "two" / "data")
    study = toy_study({"name": "imagefolder", "root": "data"})
    monkeypatch.chdir(tmp_path / "one")
    first = ingest(study)
    # Another folder and other times, but the same bytes.
    monkeypatch.chdir(tmp_path / "two")
    os.utime(tmp_path / "two" / "data" / "a" / "000.png", (1, 1))
    assert ingest(study).digest == first.digest


def test_other_pictures_under_the_same_names_are_never_done(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    image_folder({"a": 10, "b": 10}, below="one/data")
    image_folder({"a": 10, "b": 10}, below="two/data")
    study = toy_study({"name": "imagefolder", "root": "data"})
    monkeypatch.chdir(tmp_path / "one")
    ingest(study)
    monkeypatch.chdir(tmp_path / "two")
    text = refused(ingest, study, "20 of its images have other files now")
    assert "set another profile.storage" in text
    assert str(tmp_path / "one" / "data") in text
    # A picture changed in place, with its old size and time.
    monkeypatch.chdir(tmp_path / "one")
    picture = tmp_path / "one" / "data" / "a" / "000.png"
    toy_picture(999).save(picture)
    refused(ingest, study, r"1 of its images have other files now \(first: a/000\.png")


def test_ledger_of_the_folder_is_on_the_line_and_in_the_result(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    root = image_folder({"a": 10, "b": 10})
    for name in ("a/._000.png", "b/notes.txt", "__MACOSX/a/000.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    ledger = IngestResult.of(ingest(toy_study(root))).ledger
    assert ledger is not None
    assert (ledger.files, ledger.read) == (23, 20)
    assert ledger.skipped == {".txt": 1, "hidden": 1, "system": 1}
    said = capsys.readouterr().err
    assert "files that were not read: 3 of 23: 1 .txt, 1 hidden, 1 system" in said


def test_twelve_of_sixteen_bits_are_noticed(
    toy_study: MakeStudy, ingest: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = random.integers(0, 4096, (24, 24)).astype(np.uint16)
        Image.fromarray(values).save(path)
    ingest(toy_study(tmp_path / "data", preprocess={"size": 16, "channels": "L"}))
    said = capsys.readouterr().err
    assert "20 pictures have 16 bits but use 12 of them" in said
    assert "preprocess.window, for example [0, 4095]" in said


def test_class_names_that_look_like_code_are_only_names(
    image_folder: Folder, toy_study: MakeStudy, run_until: Any, store: Store
) -> None:
    names = ["<script>", "=CMD()", "糖尿病 (2)"]
    root = image_folder(dict.fromkeys(names, 12))
    manifest = run_until(
        toy_study(root, generators={"flip": {"name": "traditional"}}, cluster={"k": 1}), "request"
    )
    assert set(manifest.metrics["counts"]) == set(names)
    for part in manifest.parts:
        assert part.key.isascii()
        assert not set("<>=() ") & set(part.key)


def test_all_label_columns_are_stored(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    root = image_folder({"x": 24})
    lines = ["path,grade,signs"]
    lines += [f"x/{n:03d}.png,{'ab'[n % 2]},{('', 'p|q', 'q')[n % 3]}" for n in range(24)]
    reader = write_table(root, lines)
    labels = {"labels": {"grade": "grade", "signs": "signs"}, "multi": {"signs": "|"}}
    manifest = ingest(toy_study({**reader, **labels}, task="grade"))
    for row in images(store, manifest):
        number = int(row[rows.URI][2:5])
        assert row["label.grade"] == "ab"[number % 2]
        assert row["label.signs"] == (None, ["p", "q"], ["q"])[number % 3]
    refused(
        ingest, toy_study({**reader, **labels}, task="signs"),
        r"8 of 24 images have no label in any task \(x/000.png, .*tasks\.<task>\.none",
    )  # fmt: skip


def test_combinations_of_labels_are_counted_and_every_label_is_split(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    root = image_folder({"x": 60})
    lines = ["path,grade,signs"]
    # Every tenth image has no grade; one combination is rare.
    for n in range(60):
        grade = "" if n % 10 == 9 else "ab"[n % 2]
        lines.append(f"x/{n:03d}.png,{grade},{('-', 'p|q', 'q')[n % 3] if n else 'p'}")
    reader = write_table(root, lines)
    labels = {"labels": {"grade": "grade", "signs": "signs"}, "multi": {"signs": "|"}}
    study = toy_study(
        {**reader, **labels}, tasks={"grade": {}, "signs": {"none": "-"}}, rare_below=2,
        split={"group": "none", "val": 0.2, "test": 0.3},
    )  # fmt: skip
    manifest = ingest(study)
    result = IngestResult.of(manifest)
    assert result.cells == {
        f"{grade}, {name}": {"grade": grade, "signs": signs}
        for grade in "ab"
        for name, signs in (("none", ()), ("p + q", ("p", "q")), ("q", ("q",)))
    }
    # 60 images, of which one is rare and six have no grade.
    every = {name: sum(of_split[name] for of_split in result.counts.values())
             for name in result.classes}  # fmt: skip
    assert every["rare combinations"] == 1
    assert sum(count for name, count in every.items() if name.startswith("?, ")) == 6
    grades, signs = result.labels["grade"], result.labels["signs"]
    assert (grades.kind, signs.kind, signs.classes) == ("single", "multi", ("p", "q"))
    assert sum(grades.unlabelled.values()) == 6
    for of_task in (grades, signs):
        for label in of_task.classes:
            total = sum(of_split[label] for of_split in of_task.counts.values())
            assert of_task.counts["test"][label] == pytest.approx(0.3 * total, abs=2)
    for row in images(store, manifest):
        cell = row["label.cell"]
        if cell in result.cells:
            assert result.cells[cell] == {
                "grade": row["label.grade"], "signs": tuple(row["label.signs"])
            }  # fmt: skip
    # Only complete combinations with training images can be requested.
    assert set(result.targets) == {name for name in result.cells if result.train[name]}


# Unusable files ---------------------------------------------------------------------------------


def hostile_files(root: Path, outside: Path) -> dict[str, str]:
    """Write one file of each kind into the class folder `root`; returns the expected status of
    each."""
    good = (root / "000.png").read_bytes()
    (root / "empty.png").write_bytes(b"")
    (root / "truncated.png").write_bytes(good[: len(good) // 2])
    (root / "page.jpg").write_bytes(b"<html>not found</html>")
    (root / "renamed.jpg").write_bytes(good)
    (root / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    Image.new("1", (8000, 8000)).save(root / "huge.png")
    nan = Image.fromarray(np.full((9, 9), np.nan, np.float32))
    nan.save(root / "nan.tif")
    (root / "out.png").symlink_to(outside)
    (root / "broken.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "pipe.png")
    Image.fromarray(np.full((9, 9), 30_000, np.uint16)).save(root / "deep.png")
    Image.new("CMYK", (9, 9), (0, 90, 0, 0)).save(root / "print.jpg")
    return {
        "empty.png": "empty", "truncated.png": "not_decodable", "page.jpg": "not_decodable",
        "renamed.jpg": "wrong_extension", "script.png": "format_not_allowed",
        "huge.png": "too_large", "nan.tif": "not_finite", "out.png": "path_not_allowed",
        "broken.png": "missing", "pipe.png": "path_not_allowed", "deep.png": "ok",
        "print.jpg": "ok",
    }  # fmt: skip


def test_every_bad_file_is_set_aside_with_its_reason_and_no_other_row(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store, tmp_path: Path
) -> None:
    root = image_folder({"a": 20, "b": 20})
    outside = image_folder({"secret": 1}, "elsewhere") / "secret" / "000.png"
    expected = hostile_files(root / "a", outside)
    manifest = ingest(toy_study(root, audit={"max_quarantined": 0.5}))
    found = fates(store, manifest)
    assert {name: found[f"a/{name}"] for name in expected} == expected
    assert Counter(found.values())["ok"] == 42 == manifest.rows
    bad = Counter(reason for reason in expected.values() if reason != "ok")
    assert manifest.metrics["set_aside"] == dict(bad)
    assert {row[rows.URI] for row in images(store, manifest)} == {
        uri for uri, status in found.items() if status == "ok"
    }


def test_hostile_paths_in_a_table_are_set_aside(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    root = image_folder({"x": 30})
    hostile = ["../elsewhere.png", "/etc/passwd", "x/\0.png", "y" * 300 + ".png", "", "x"]
    lines = ["path,label"] + [f"x/{n:03d}.png,{'ab'[n % 2]}" for n in range(30)]
    reader = write_table(root, lines + [f"{uri},a" for uri in hostile])
    found = fates(store, ingest(toy_study(reader, audit={"max_quarantined": 0.5})))
    assert [found[uri] for uri in hostile] == ["path_not_allowed"] * 5 + ["not_readable"]
    assert Counter(found.values())["ok"] == 30


def test_too_many_bad_files_stop_the_run(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    root = image_folder({"a": 30, "b": 30})
    (root / "a" / "000.png").write_bytes(b"")
    text = refused(ingest, toy_study(root), r"1 of 60 files cannot be used \(1 empty\)")
    assert "a/000.png: empty" in text
    assert "audit.max_quarantined (now 0.01)" in text
    assert not [key for key in store.listing("steps") if key.endswith("manifest.json")]


def test_file_repaired_in_place_is_read_again(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run
) -> None:
    root = image_folder({"a": 30, "b": 30})
    bad = root / "a" / "000.png"
    good = bad.read_bytes()
    bad.write_bytes(b"")
    refused(ingest, toy_study(root), "1 of 60 files cannot be used")
    bad.write_bytes(good)
    assert ingest(toy_study(root)).rows == 60


class Files:
    """Bytes by name, instead of a folder."""

    def read(self, uri: str) -> bytes:
        target = io.BytesIO()
        Image.new("RGB", (20, 20), "red").save(target, "PNG")
        return target.getvalue()


class BrittleSandbox(Sandbox):
    """The real sandbox, with a child that dies or stops at files with certain names."""

    def _exchange(self, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if self._child is not None and header["uri"] == "crash.png":
            self._child.kill()
            self._child.wait()
        if header["uri"] == "hang.png":
            if self._child is None:  # tried again, in a new child
                super()._exchange({"uri": "empty.png"}, b"")
            assert self._child is not None
            os.kill(self._child.pid, 19)  # SIGSTOP: the child lives and never answers
            self.timeout = 0.2
        try:
            return super()._exchange(header, body)
        finally:
            self.timeout = 20.0


def test_crash_and_hang_cost_only_their_rows() -> None:
    stage = Decode(Files(), Preprocess(size=16), 20.0, True)
    stage.load(Place("cpu", 1, 8))
    stage.sandbox = BrittleSandbox(Preprocess(size=16))
    uris = ["a.png", "crash.png", "b.png", "hang.png", "c.png"]
    batch = stage({rows.IMAGE_ID: pa.array(uris), rows.URI: pa.array(uris)})
    stage.sandbox.close()
    assert [reason_of(status) for status in batch[rows.STATUS]] == [
        "ok",
        "decoder_crash",
        "ok",
        "decoder_hang",
        "ok",
    ]
    assert batch[rows.WIDTH] == [20, None, 20, None, 20]


# Labels and ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "fields", "message"),
    [
        (["x,a,1", "y,b,1", "z,b,2"], {"id": "key"}, r"the id '1' appears 2 times \(first: x, y\)"),
        (["x,a,1", "x,b,2"], {}, "x is listed twice; keep one entry of each file"),
        (["x,a,1", "y,a,2"], {}, r"one class alone \('a'\)"),
        (["x,a,1", "y,a,2", "z,b,3"], {}, "the class 'b' has one image"),
        (["x,a,1", "y,,2"], {}, r"1 of 2 images have no label \(y\)"),
        (
            ["x,cat,1", "y,Cat,2"],
            {},
            "differ only in case, spaces or Unicode form: 'Cat' and 'cat'; use",
        ),
        (["x,caf\u00e9,1", "y,cafe\u0301,2"], {}, "differ only in case, spaces or Unicode form"),
        (["x,a,1", "y,a\u202eb,2"], {}, "invisible characters"),
    ],
)
def test_labels_and_ids_are_checked_before_any_image_is_opened(
    tmp_path: Path, toy_study: MakeStudy, ingest: Run, store: Store, lines: list[str],
    fields: dict[str, str], message: str,
) -> None:  # fmt: skip
    reader = write_table(tmp_path, ["path,label,key", *lines])
    refused(ingest, toy_study({**reader, **fields}), message)
    assert store.listing("steps") == []


def test_limit_for_an_unknown_class_names_the_known_ones(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run
) -> None:
    split = {"group": "none", "train_limit": {"c": 5}}
    study = toy_study(image_folder({"a": 5, "b": 5}), split=split)
    refused(ingest, study, "unknown class 'c'.*a, b")


def test_empty_class_folder_stops_the_run(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run
) -> None:
    root = image_folder({"a": 5, "b": 5})
    (root / "c").mkdir()
    refused(ingest, toy_study(root), "the class 'c' has no images")


def test_images_without_a_group_must_be_declared_independent(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run
) -> None:
    study = toy_study(image_folder({"a": 5, "b": 5}), split={"group": "column"})
    refused(ingest, study, r"split\.group: 10 images have no group.*set split\.group to none")


def test_impossible_split_is_refused_before_any_image_is_opened(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    root = image_folder({"x": 60})
    lines = ["path,label,patient"]
    lines += [f"x/{n:03d}.png,{'ab'[n % 2]},p{n % 10}" for n in range(54)]
    # Six images of a third class, of two patients.
    lines += [f"x/{n:03d}.png,rare,r{n % 2}" for n in range(54, 60)]
    reader = {**write_table(root, lines), "group": "patient"}
    study = toy_study(reader, split={"val": 0.2, "test": 0.2, "group": "column"})
    refused(ingest, study, "'rare' has images in 2 groups, but 3 splits need one each")
    assert not [key for key in store.listing("steps") if "decoded" in key]


def test_images_and_classes_can_be_left_out(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    reader = {"name": "imagefolder", "root": str(image_folder({"a": 12, "b": 12, "c": 3}))}
    chosen = {**reader, "classes": ["a", "b"], "exclude": ["a/000.png", "*/011.png"]}
    found = fates(store, ingest(toy_study(chosen)))
    assert len(found) == 21
    assert not any(uri.startswith("c/") or uri.endswith("/011.png") for uri in found)
    for pattern, hint in (
        ("d/*", r"'d/\*' matches no image; remove it, or write a path such as 'a/000\.png'"),
        ("A/000.PNG", r"but 'a/000\.png' differs only in case"),
        ("011.png", r"paths begin below root: '\*/011\.png' matches 2"),
    ):
        refused(ingest, toy_study({**reader, "exclude": [pattern]}), hint)
    refused(ingest, toy_study({**reader, "classes": ["a", "z"]}), "unknown class 'z'.*a, b, c")


def test_class_missing_from_a_split_stops_the_run(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run
) -> None:
    study = toy_study(image_folder({"a": 20, "b": 2}))
    refused(ingest, study, "the class 'b' has 0 images in val, it needs 1")


def test_duplicate_image_is_kept_once_and_reported(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    root = image_folder({"a": 20, "b": 20})
    Image.open(root / "a" / "003.png").save(root / "a" / "again.bmp")
    manifest = ingest(toy_study(root))
    found = fates(store, manifest)
    assert found["a/again.bmp"] == "duplicate"
    assert Counter(found.values()) == {"ok": 40, "duplicate": 1}
    assert manifest.metrics["headline"].endswith("1 of 41 set aside")


def test_image_under_two_labels_stops_the_run_and_both_are_named(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run
) -> None:
    root = image_folder({"a": 10, "b": 10})
    shutil.copy(root / "a" / "003.png", root / "b" / "same.png")
    text = refused(ingest, toy_study(root), "1 pictures have two labels")
    assert "a/003.png is 'a' and b/same.png is 'b'" in text
    assert "or set audit.on_contradiction to drop" in text


def test_pictures_under_two_labels_are_all_removed_on_request(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    root = image_folder({"a": 10, "b": 10})
    shutil.copy(root / "a" / "003.png", root / "b" / "same.png")
    shutil.copy(root / "a" / "003.png", root / "a" / "again.png")
    shutil.copy(root / "a" / "004.png", root / "a" / "twice.png")
    manifest = ingest(toy_study(root, audit={"on_contradiction": "drop"}))
    assert {name: fate for name, fate in fates(store, manifest).items() if fate != "ok"} == {
        "a/003.png": "contradiction", "a/again.png": "contradiction",
        "b/same.png": "contradiction", "a/twice.png": "duplicate",
    }  # fmt: skip


def test_grey_image_stored_as_colour_is_the_same_image(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run
) -> None:
    root = image_folder({f"{split}/{c}": 6 for split in ("train", "val", "test") for c in "ab"})
    grey = Image.open(root / "train/a/000.png").convert("L")
    grey.save(root / "train/a/grey.png")
    grey.convert("RGB").save(root / "test/a/grey.png")
    # The original in colour is nearly the same picture.
    text = refused(ingest, toy_study(root), r"leaks between splits \(1 exact, 1 near\)", LeakError)
    assert "of 13 test pictures, 1 are in train too (1 equal, 0 nearly equal)" in text


def test_contradiction_in_a_second_task_names_the_labels(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run
) -> None:
    root = image_folder({"x": 10})
    shutil.copy(root / "x" / "003.png", root / "x" / "same.png")
    lines = ["path,one,two", *(f"x/{n:03d}.png,{'ab'[n % 2]},left" for n in range(10))]
    reader = write_table(root, [*lines, "x/same.png,b,right"])
    study = toy_study({**reader, "labels": {"one": "one", "two": "two"}}, task="one")
    assert "x/003.png is 'left' and x/same.png is 'right'" in refused(ingest, study, "two labels")


# Splits -----------------------------------------------------------------------------------------


def grouped(root: Path, count: int, extra: str = "", cells: Any = None) -> dict[str, Any]:
    """A table over `x/000.png …`: two images per group, classes alternate by group."""
    lines = [f"path,label,patient{extra}"]
    for number in range(count):
        cell = f",{cells(number)}" if cells else ""
        lines.append(f"x/{number:03d}.png,{'ab'[number // 2 % 2]},p{number // 2}{cell}")
    reader = write_table(root, lines)
    return {**reader, "group": "patient"} | ({"split": extra[1:]} if extra else {})


def test_group_is_in_one_split(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    root = image_folder({"x": 80})
    manifest = ingest(toy_study(grouped(root, 80), split={"group": "column"}))
    found = images(store, manifest)
    assert len(found) == 80
    assert len({(row[rows.GROUP_ID], row[rows.SPLIT]) for row in found}) == 40
    assert {row[rows.SPLIT] for row in found} == set(rows.SPLITS)
    assert manifest.metrics["leaks"] == {}


def test_given_splits_are_kept_and_a_missing_val_is_carved_out_of_train_by_group(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    root = image_folder({"x": 80})
    reader = grouped(root, 80, ",set", lambda number: "test" if number < 20 else "train")
    manifest = ingest(toy_study(reader, split={"group": "column", "val": 0.2}))
    found = splits_of(store, manifest)
    assert {uri for uri, split in found.items() if split == "test"} == {
        f"x/{number:03d}.png" for number in range(20)
    }
    assert Counter(found.values()) == {"test": 20, "val": 12, "train": 48}
    assert all(found[f"x/{n:03d}.png"] == found[f"x/{n + 1:03d}.png"] for n in range(20, 80, 2))
    assert manifest.metrics["carved"] == ["val"]


def test_three_given_splits_are_unchanged(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    counts = {"train": 6, "val": 3, "test": 2}
    root = image_folder({f"{split}/{c}": n for split, n in counts.items() for c in "ab"})
    manifest = ingest(toy_study(root))
    assert all(uri.startswith(split) for uri, split in splits_of(store, manifest).items())
    assert manifest.metrics["counts"]["val"] == {"a": 3, "b": 3}
    assert manifest.metrics["carved"] == []


def test_duplicate_is_found_if_one_of_the_two_has_no_split(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    root = image_folder({"x": 40})
    for number in range(4):  # both images of a pair end up in train
        shutil.copy(root / "x" / f"{number:03d}.png", root / "x" / f"{number + 20:03d}.png")
    places = ["train"] * 20 + [""] * 10 + ["val"] * 4 + ["test"] * 6
    lines = ["path,label,set"]
    lines += [f"x/{n:03d}.png,{'ab'[n % 2]},{place}" for n, place in enumerate(places)]
    manifest = ingest(toy_study({**write_table(root, lines), "split": "set"}))
    assert Counter(fates(store, manifest).values()) == {"ok": 36, "duplicate": 4}


def test_train_limit_keeps_the_same_images_and_other_splits(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    study = toy_study(
        image_folder({"a": 40, "b": 40}), split={"group": "none", "train_limit": {"a": 5}}
    )
    manifest = ingest(study)
    assert manifest.metrics["counts"]["train"] == {"a": 5, "b": 26}
    assert manifest.metrics["counts"]["test"] == {"a": 8, "b": 8}
    left_out = {u for u, status in fates(store, manifest).items() if status == "train_limit"}
    assert len(left_out) == 21
    kept = sorted(u for u, s in splits_of(store, manifest).items() if (s, u[0]) == ("train", "a"))
    # The choice of five depends on the seed.
    assert kept == ["a/001.png", "a/021.png", "a/026.png", "a/034.png", "a/035.png"]


# Leaks ------------------------------------------------------------------------------------------


@pytest.fixture
def leaky(image_folder: Folder) -> Path:
    """Given splits with one image of train repeated in test, and one of val in test."""
    counts = {"train": 8, "val": 4, "test": 4}
    root = image_folder({f"{split}/{c}": n for split, n in counts.items() for c in ("=a", "b")})
    shutil.copy(root / "train/=a/000.png", root / "test/=a/=cmd.png")
    shutil.copy(root / "val/b/001.png", root / "test/b/copy.png")
    return root


def test_leaks_stop_the_run_with_a_list_that_is_safe_in_spreadsheets(
    leaky: Path, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    study = toy_study({"name": "imagefolder", "root": str(leaky)})
    text = refused(ingest, study, r"leaks between splits \(2 exact\)", LeakError)
    place = next(key for key in store.listing("steps") if key.endswith("leaks.csv"))
    assert store.location(place) in text
    found = list(csv.DictReader(io.StringIO(store.read(place).decode())))
    assert {(row["first_label"], row["second_label"]) for row in found} == {
        ("'=a", "'=a"), ("b", "b")
    }  # fmt: skip
    assert {(row["kind"], row["first"], row["second"]) for row in found} == {
        ("exact", "test/=a/=cmd.png", "train/=a/000.png"),
        ("exact", "test/b/copy.png", "val/b/001.png"),
    }


def test_name_like_a_formula_is_quoted_in_the_list_of_leaks(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    root = image_folder({"=x": 20})
    shutil.copy(root / "=x" / "000.png", root / "=x" / "019.png")
    places = ["train"] * 10 + ["val"] * 4 + ["test"] * 6
    lines = ["path,label,set"]
    lines += [f"=x/{n:03d}.png,{'ab'[n in (0, 19) or n % 2]},{s}" for n, s in enumerate(places)]
    study = toy_study({**write_table(root, lines), "split": "set"})
    refused(ingest, study, "1 exact", LeakError)
    place = next(key for key in store.listing("steps") if key.endswith("leaks.csv"))
    found = list(csv.reader(io.StringIO(store.read(place).decode())))
    assert found[1][:6] == ["exact", "'=x/000.png", "train", "b", "'=x/019.png", "test"]
    assert not [cell for row in found for cell in row if cell[:1] in tuple("=+-@")]


def test_drop_removes_the_image_from_the_earlier_split(
    leaky: Path, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    manifest = ingest(toy_study(leaky, audit={"on_leak": "drop"}))
    found = {u: status for u, status in fates(store, manifest).items() if status != "ok"}
    assert found == {"train/=a/000.png": "leak", "val/b/001.png": "leak"}
    assert manifest.metrics["leaks"] == {"exact": 2}
    assert all(uri.startswith(split) for uri, split in splits_of(store, manifest).items())
    resolved = {"code": "leaks_resolved", "fields": {"leaks": 2, "on_leak": "drop"}}
    assert resolved in manifest.metrics["warnings"]
    listed = pa.concat_tables(store.tables(manifest.keys(table="leaks")))
    assert listed.num_rows == 2


@pytest.mark.parametrize("how", ["drop", "move"])
def test_group_in_two_splits_is_resolved_as_a_whole(
    image_folder: Folder, toy_study: MakeStudy, ingest: Run, store: Store, how: str
) -> None:
    root = image_folder({"x": 60})
    places = ["train"] * 40 + ["val"] * 8 + ["test"] * 12

    def cell(number: int) -> str:
        return "test" if number == 1 else places[number]  # patient p0: 000 train, 001 test

    lines = ["path,label,set,patient"]
    for number in range(60):
        patient = "p0" if number in (0, 1, 2, 3) else f"p{number // 2}"
        label = "ab"[number // 4 % 2]
        lines.append(f"x/{number:03d}.png,{label},{cell(number)},{patient}")
    reader = {**write_table(root, lines), "split": "set", "group": "patient"}
    refused(ingest, toy_study(reader, split={"group": "column"}), r"\(1 group\)", LeakError)
    manifest = ingest(toy_study(reader, split={"group": "column"}, audit={"on_leak": how}))
    found = splits_of(store, manifest)
    patient = ["x/000.png", "x/001.png", "x/002.png", "x/003.png"]
    if how == "drop":
        assert [found.get(uri) for uri in patient] == [None, "test", None, None]
        assert Counter(fates(store, manifest).values()) == {"ok": 57, "leak": 3}
    else:
        assert [found.get(uri) for uri in patient] == ["test"] * 4
        assert len(found) == 60


def test_move_joins_groups_that_share_an_image_and_keeps_it_once(
    leaky: Path, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    manifest = ingest(toy_study(leaky, audit={"on_leak": "move"}))
    found = splits_of(store, manifest)
    for pair in (("train/=a/000.png", "test/=a/=cmd.png"), ("val/b/001.png", "test/b/copy.png")):
        assert [found[uri] for uri in pair if uri in found] == ["test"]
    assert Counter(fates(store, manifest).values()) == {"ok": 32, "duplicate": 2}


@pytest.fixture
def folder_with_copies(image_folder: Folder) -> Path:
    """64 px images in given splits; three of test are copies of train, encoded again."""
    counts = {"train": 60, "val": 12, "test": 12}
    root = image_folder({f"{s}/{c}": n for s, n in counts.items() for c in "ab"}, side=80)
    for number in range(3):
        picture = Image.open(root / f"train/a/{number:03d}.png")
        picture.resize((72, 72)).save(root / f"test/a/copy{number}.jpg", quality=70)
    return root


def test_planted_near_duplicates_stop_the_run_without_false_positives(
    folder_with_copies: Path, toy_study: MakeStudy, ingest: Run, store: Store
) -> None:
    study = toy_study(folder_with_copies, preprocess={"size": 64})
    refused(ingest, study, r"leaks between splits \(3 near\)", LeakError)
    mended = toy_study(folder_with_copies, preprocess={"size": 64}, audit={"on_leak": "drop"})
    manifest = ingest(mended)
    gone = {uri for uri, status in fates(store, manifest).items() if status == "leak"}
    assert gone == {f"train/a/{number:03d}.png" for number in range(3)}
    assert manifest.metrics["leaks"] == {"near": 3}


def test_new_encodings_are_found_at_32_pixels_and_crops_are_not(
    folder_with_copies: Path, toy_study: MakeStudy, ingest: Run
) -> None:
    picture = Image.open(folder_with_copies / "train/b/000.png")
    picture.crop((8, 8, 80, 80)).save(folder_with_copies / "test/b/crop.png")
    study = toy_study(folder_with_copies, preprocess={"size": 32}, audit={"on_leak": "drop"})
    manifest = ingest(study)
    assert manifest.metrics["leaks"] == {"near": 3}
    assert {"code": "small_pictures", "fields": {"side": 32}} in manifest.metrics["warnings"]


def test_enlarged_small_originals_are_treated_as_small(
    folder_with_copies: Path, toy_study: MakeStudy, ingest: Run
) -> None:
    for path in folder_with_copies.rglob("*.png"):
        Image.open(path).resize((28, 28)).save(path)
    study = toy_study(folder_with_copies, preprocess={"size": 64}, audit={"on_leak": "drop"})
    assert {"code": "small_pictures", "fields": {"side": 28}} in ingest(study).metrics["warnings"]
