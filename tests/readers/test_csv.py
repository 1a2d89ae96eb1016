from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine.core import rows
from engine.core.errors import DataError
from engine.core.spec import canonical
from engine.data.images import Rejected
from engine.readers.csv import Csv, CsvSpec

Read = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """A function from the text of a table to the records of the reader."""

    def read(text: str | bytes, file: str = "t.csv", **fields: Any) -> list[dict[str, Any]]:
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        reader = Csv(CsvSpec(root=str(tmp_path), file=file, **fields))
        found = reader.records()
        assert found.schema == rows.records_schema(reader.tasks())
        return list(found.to_pylist())

    return read


def test_paths_and_labels_are_read_as_text(read: Read) -> None:
    found = read("path,label\na.png,007\nb.png,NA\nc.png,null\nd.png,1.50\ne.png,true\n")
    assert [row["label.class"] for row in found] == ["007", "NA", "null", "1.50", "true"]
    assert [row[rows.URI] for row in found] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert len({row[rows.IMAGE_ID] for row in found}) == 5


def test_columns_may_have_any_name(read: Read) -> None:
    found = read(
        "file\tgrade\tpatient\tset\tkey\na.png\t2\tp1\tVALID\tk1\nb.png\t3\tp2\t\tk2\n",
        "t.tsv", path="file", labels={"grade": "grade"}, group="patient", split="set", id="key",
    )  # fmt: skip
    assert found == [
        {"image_id": "k1", "uri": "a.png", "label.grade": "2", "split": "val", "group_id": "p1"},
        {"image_id": "k2", "uri": "b.png", "label.grade": "3", "split": None, "group_id": "p2"},
    ]


def test_several_label_columns_are_several_tasks(read: Read) -> None:
    found = read(
        "path,grade,signs\na.png,2,drusen| bleeding\nb.png,,\n",
        labels={"grade": "grade", "signs": "signs"},
        multi={"signs": "|"},
    )
    assert found[0]["label.grade"] == "2"
    assert found[0]["label.signs"] == ["drusen", "bleeding"]
    assert found[1]["label.grade"] is None
    assert found[1]["label.signs"] is None


def test_quotes_byte_order_mark_and_windows_line_ends_are_understood(
    read: Read,
) -> None:
    found = read('\ufeffpath,label\r\n"a,b.png"," cat "\r\n"two\nlines.png",dog\r\n')
    assert [row[rows.URI] for row in found] == ["a,b.png", "two\nlines.png"]
    assert [row["label.class"] for row in found] == ["cat", "dog"]


def test_delimiter_can_be_set(read: Read) -> None:
    assert read("path;label\na.png;x\n", delimiter=";")[0]["label.class"] == "x"


@pytest.mark.parametrize("delimiter", ["", ";;", "\n", "é", "\0"])
def test_invalid_delimiter_is_rejected_with_the_study(delimiter: str) -> None:
    with pytest.raises(ValidationError, match="delimiter"):
        CsvSpec(root="x", file="y", delimiter=delimiter)


def test_multi_task_must_be_in_labels() -> None:
    with pytest.raises(ValidationError, match="multi names signs, which is not a task"):
        CsvSpec(root="x", file="y", multi={"signs": "|"})


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("", {}, r"reader\.file: t\.csv is empty"),
        ("path,label\n", {}, r"reader\.file: t\.csv has no rows"),
        ("file,label\na,b\n", {}, r"reader\.path: t\.csv has no column 'path'; it has file, label"),
        ("path,grade\na,b\n", {}, r"reader\.labels\.class: t\.csv has no column 'label'"),
        ("path,label\na,b\n", {"group": "g"}, r"reader\.group: t\.csv has no column 'g'"),
        ("path,label\na,b\n", {"id": "key"}, r"reader\.id: t\.csv has no column 'key'"),
        ("path,label,label\na,b,c\n", {}, r"reader\.labels\.class: .* several columns 'label'"),
        ("path,label\na,b,c\n", {}, r"t\.csv, line 2: 3 cells, but the header has 2"),
        (b"path,label\n\xff,b\n", {}, r"reader\.file: t\.csv, line 2: not UTF-8"),
        ("path,label," + "x" * 200_000 + "\na,b,c\n", {}, r"t\.csv, line 1: field larger"),
        ("path,label,s\na,b,holdout\n", {"split": "s"}, r"reader\.split: 'holdout' in column 's'"),
    ],
)
def test_unusable_table_is_one_line_that_names_the_field(
    read: Read, text: str | bytes, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(text, **fields)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("file", ["no.csv", "../t.csv", "/etc/passwd", "folder"])
def test_table_outside_the_root_or_missing_is_rejected(tmp_path: Path, file: str) -> None:
    (tmp_path / "t.csv").write_text("path,label\na,b\n")
    (tmp_path / "root" / "folder").mkdir(parents=True)
    with pytest.raises(DataError, match=r"reader\.file: (missing|path_not_allowed|not_readable)"):
        Csv(CsvSpec(root=str(tmp_path / "root"), file=file)).records()


def test_fingerprint_is_that_of_the_table(read: Read, tmp_path: Path) -> None:
    reader = Csv(CsvSpec(root=str(tmp_path), file="t.csv"))
    read("path,label\na.png,x\n")
    before = reader.fingerprint()
    read("path,label\na.png,y\n")
    assert reader.fingerprint() != before


TABLE = ["path,remark,label", *(f"{number:03d}.png,ok,c{number % 2}" for number in range(60))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Two stray quotes would make one cell of the thirty rows between them.
        ({11: '010.png,"3 cm scar,c0', 41: '040.png,scar" seen,c0'}, "line 12: .*remove or double"),
        ({11: '010.png,"3 cm scar,c0', 41: '040.png,scar",c0'}, "lines 12 to 42 are one row"),
        ({11: '010.png,"3 cm scar,c0'}, "line 12: unexpected end of data"),
        ({11: "010.png,a,b,c0"}, "line 12: 4 cells, but the header has 3"),
    ],
)
def test_stray_quote_is_an_error_with_its_line(
    read: Read, changes: dict[int, str], message: str
) -> None:
    lines = [changes.get(number, line) for number, line in enumerate(TABLE)]
    with pytest.raises(DataError, match=message):
        read("\n".join(lines) + "\n")


def test_quoted_cell_may_contain_line_ends_and_delimiters(read: Read) -> None:
    found = read('path,remark,label\na.png,"two\nlines, one comma",cat\nb.png,,dog\n')
    assert [row["label.class"] for row in found] == ["cat", "dog"]


def test_blank_lines_change_nothing(read: Read) -> None:
    text = "path,patient,label\na.png,007,01\nb.png,7,02\nc.png,07,01\n"
    plain = read(text, group="patient")
    assert read("\n" + text.replace("b.png", "\n\nb.png"), group="patient") == plain
    assert [row[rows.GROUP_ID] for row in plain] == ["007", "7", "07"]


def test_every_file_below_the_root_is_accounted_for(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\na.png,x\n\nb.png,y\nmissing.png,y\n")
    for name in ("a.png", "b.png", "c.png", "._a.png", "notes.txt", "@eaDir/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    reader = Csv(CsvSpec(root=str(tmp_path), file="t.csv"))
    reader.records()
    ledger = reader.ledger()
    assert (ledger.files, ledger.read) == (7, 3)
    assert ledger.skipped == {
        ".txt": 1, "hidden": 1, "not in the table": 1, "thumbnails": 1
    }  # fmt: skip
    assert ledger.first == {".txt": "notes.txt", "not in the table": "c.png"}
    assert ledger.entries == {"blank lines": 1}


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("pictures/a1.PNG", "there is pictures/a1.png: the names differ in case"),
        ("a1", "there is pictures/a1.png: folder or extension differ"),
        ("pictures\\a1.png", "there is pictures/a1.png: write / for"),
        ("{root}/pictures/a1.png", "there is pictures/a1.png: write it relative to reader.root"),
        ("pictures/Pr\u00fcfling.png", "differ in their Unicode normal form"),
    ],
)
def test_missing_path_names_the_file_that_is_there(tmp_path: Path, path: str, hint: str) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("a1.png", "Pru\u0308fling.png"):
        (tmp_path / "pictures" / name).write_bytes(b"")
    path = path.format(root=tmp_path)
    (tmp_path / "t.csv").write_text(f"path,label\n{path},x\n")
    reader = Csv(CsvSpec(root=str(tmp_path), file="t.csv"))
    reader.records()
    with pytest.raises(Rejected, match=hint) as caught:
        reader.bytes().read(path)
    assert caught.value.reason == "missing"


def test_table_may_lie_elsewhere_and_its_place_enters_no_key(tmp_path: Path) -> None:
    images, tables = tmp_path / "images", tmp_path / "tables"
    images.mkdir()
    tables.mkdir()
    (images / "a.png").write_bytes(b"")
    (tables / "t.csv").write_text("path,label\na.png,x\n")
    spec = CsvSpec(root=str(images), table=str(tables / "t.csv"))
    reader = Csv(spec)
    assert [row[rows.URI] for row in reader.records().to_pylist()] == ["a.png"]
    assert reader.located()[1] == ["a.png"]
    assert reader.ledger().files == 1
    assert str(tables) not in str(canonical(spec))
    with pytest.raises(DataError, match=r"reader\.table: .*u\.csv: missing"):
        Csv(CsvSpec(root=str(images), table=str(tables / "u.csv"))).records()
    with pytest.raises(DataError, match=r"reader\.table: .* does not exist"):
        Csv(CsvSpec(root=str(images), table=str(tmp_path / "no" / "t.csv"))).records()


def test_table_below_the_root_is_read_and_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "t.csv").write_text("path,label\na.png,x\n")
    reader = Csv(CsvSpec(root=str(tmp_path), table=str(tmp_path / "t.csv")))
    reader.records()
    assert (reader.ledger().read, reader.ledger().skipped) == (2, {})


@pytest.mark.parametrize("given", [{}, {"file": "t.csv", "table": "/elsewhere/t.csv"}])
def test_exactly_one_table_is_named(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="needs either file"):
        CsvSpec(root="images", **given)


def test_another_delimiter_is_named(read: Read) -> None:
    with pytest.raises(DataError, match=r"reader\.delimiter: .*'path;label'; set .* to ';'"):
        read("path;label\na.png;x\n")


def test_repeated_header_is_an_error_with_its_line(read: Read) -> None:
    with pytest.raises(DataError, match=r"t\.csv, line 3: the header again; remove this line"):
        read("path,label\na.png,x\npath, label\nb.png,y\n")


def test_a_table_in_another_encoding_is_read_if_it_is_named(read: Read) -> None:
    text = "path,label\na.png,Röntgen\n".encode("cp1252")
    with pytest.raises(DataError, match=r"line 2: not UTF-8.*reader.encoding.*cp1252"):
        read(text)
    assert read(text, encoding="cp1252")[0]["label.class"] == "Röntgen"
    # A byte order mark does not belong to the first column's name.
    assert read("path,label\na.png,x\n".encode("utf-16"), encoding="utf-16")[0]["uri"] == "a.png"


def test_labels_with_spaces_around_them_are_noted(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\na.png,viral \nb.png,viral\nc.png,  \n")
    reader = Csv(CsvSpec(root=str(tmp_path), file="t.csv"))
    assert [row["label.class"] for row in reader.records().to_pylist()] == ["viral", "viral", None]
    assert reader.trimmed == ["viral "]


def test_classes_are_renamed_and_merged(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\na.png,Viral\nb.png,viral\nc.png,none\n")
    fields = {"root": str(tmp_path), "file": "t.csv"}
    reader = Csv(CsvSpec(**fields, rename={"Viral": "viral"}, classes=("viral",)))
    assert [row["label.class"] for row in reader.chosen("class").to_pylist()] == ["viral"] * 2
    with pytest.raises(
        DataError, match=r"reader\.rename: unknown class 'viral '; choose from Viral"
    ):
        Csv(CsvSpec(**fields, rename={"viral ": "viral"})).chosen("class")


# Published forms ---------------------------------------------------------------------------------


def files_below(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_several_tables_have_a_split_each(tmp_path: Path) -> None:
    for name, image in (("train.tsv", "a"), ("more.tsv", "b"), ("dev.tsv", "c"), ("test.tsv", "d")):
        (tmp_path / name).write_text(f"path\tlabel\n{image}.png\tx\n")
    files = {"train": ["train.tsv", "more.tsv"], "dev": "dev.tsv", "test": "test.tsv"}
    reader = Csv(CsvSpec(root=str(tmp_path), files=files))
    found = {row[rows.URI]: row[rows.SPLIT] for row in reader.records().to_pylist()}
    assert found == {"a.png": "train", "b.png": "train", "c.png": "val", "d.png": "test"}
    before = reader.fingerprint()
    (tmp_path / "dev.tsv").write_text("path\tlabel\nc.png\ty\n")
    assert reader.fingerprint() != before
    with pytest.raises(DataError, match=r"reader\.files: missing\.tsv|missing"):
        Csv(CsvSpec(root=str(tmp_path), files={"train": "missing.tsv"})).records()


def test_template_finds_files_in_folders_that_the_table_does_not_name(
    tmp_path: Path, read: Read
) -> None:
    files_below(tmp_path, "images_1/images/a.png", "images_2/images/b.png", "other/a.png")
    text = "Image Index,label\na.png,x\nb.png,y\nc.png,y\n"
    found = read(text, path="images_*/images/{Image Index}")
    # A file that is missing keeps the pattern, so that its error names it.
    assert [row[rows.URI] for row in found] == [
        "images_1/images/a.png", "images_2/images/b.png", "images_*/images/c.png"
    ]  # fmt: skip
    found = read("id,label\na,x\nb,y\n", path="images_?/images/{id}.*")
    assert [row[rows.URI] for row in found] == ["images_1/images/a.png", "images_2/images/b.png"]
    with pytest.raises(DataError, match=r"fits several files: images_1/.* and other/a\.png"):
        read("id,label\na,x\n", path="**/{id}.png")


def test_template_without_wildcards_is_filled_in(read: Read) -> None:
    found = read("patient,id,label\np1,a,x\np2,b,y\n", path="{patient}/{id}.jpg")
    assert [row[rows.URI] for row in found] == ["p1/a.jpg", "p2/b.jpg"]
    with pytest.raises(DataError, match=r"reader\.path: t\.csv has no column 'name'"):
        read("id,label\na,x\n", path="{name}.png")


def test_row_with_two_eyes_is_two_images_of_one_group(read: Read) -> None:
    found = read(
        "ID,left,right,lk,rk\n7,7_l.jpg,7_r.jpg,normal fundus,Mild Diabetic retinopathy\n"
        "8,8_l.jpg,,cataract,\n9,9_l.jpg,9_r.jpg,lens dust,normal fundus\n",
        views=[{"path": "eyes/{left}"}, {"path": "eyes/{right}", "labels": {"disease": "rk"}}],
        labels={"disease": "lk"}, group="ID",
        keywords={"disease": {"patterns": {"N": "normal", "D": "diabetic", "C": "cataract"}}},
    )  # fmt: skip
    assert [(row[rows.URI], row["label.disease"], row[rows.GROUP_ID]) for row in found] == [
        ("eyes/7_l.jpg", "N", "7"), ("eyes/8_l.jpg", "C", "8"), ("eyes/9_l.jpg", None, "9"),
        ("eyes/7_r.jpg", "D", "7"), ("eyes/9_r.jpg", "N", "9"),
    ]  # fmt: skip


def test_keywords_of_a_task_with_several_labels_are_all_that_fit(read: Read) -> None:
    patterns = {"edema": "edema", "mass": "mass|nodule"}
    found = read(
        "path,text\na.png,Edema and a NODULE\nb.png,clear\nc.png,\n",
        labels={"findings": "text"}, multi={"findings": "|"},
        keywords={"findings": {"patterns": patterns, "otherwise": "none"}},
    )  # fmt: skip
    assert [row["label.findings"] for row in found] == [["edema", "mass"], ["none"], None]


def test_columns_of_zero_and_one_are_labels(read: Read) -> None:
    text = "path,N,D,G\na.png,1,0,\nb.png,0,1,x\nc.png,0,0,0\nd.png,,,\n"
    found = read(text, onehot={"eye": ["N", "D", "G"]})
    assert [row["label.eye"] for row in found] == [["N"], ["D", "G"], [], None]
    with pytest.raises(DataError, match=r"onehot\.eye: column 'D' of t\.csv contains '2'; use 0"):
        read("path,N,D\na.png,1,2\n", onehot={"eye": ["N", "D"]})


def test_lists_of_names_are_splits(tmp_path: Path, read: Read) -> None:
    text = "path,label\nx/a.png,1\nx/b.png,2\nx/c.png,1\n"
    (tmp_path / "test_list.txt").write_text("c.png\n\n")
    found = read(text, split_lists={"test": "test_list.txt"})
    assert [row[rows.SPLIT] for row in found] == [None, None, "test"]
    (tmp_path / "train_list.txt").write_text("x/a.png\n")
    both = {"train": "train_list.txt", "test": "test_list.txt"}
    with pytest.raises(DataError, match=r"1 of 3 images are in none of the lists \(x/b\.png\)"):
        read(text, split_lists=both)
    (tmp_path / "train_list.txt").write_text("a.png\nb.png\nc.png\n")
    with pytest.raises(DataError, match=r"'c\.png' is in two lists; remove it from one"):
        read(text, split_lists=both)
    (tmp_path / "test_list.txt").write_text("c.jpg\n")
    with pytest.raises(DataError, match=r"the lists name files such as 'c\.jpg'"):
        read(text, split_lists={"test": "test_list.txt"})


def test_first_sheet_of_an_excel_file_is_a_table(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for line in (["path", "label", "age"], [None], ["a.png", 7, 60.0], ["b.png", "008", None]):
        book.active.append(line)
    book.save(tmp_path / "t.xlsx")
    reader = Csv(CsvSpec(root=str(tmp_path), file="t.xlsx", group="age"))
    assert [(row["label.class"], row[rows.GROUP_ID]) for row in reader.records().to_pylist()] == [
        ("7", "60"), ("008", None)
    ]  # fmt: skip
    (tmp_path / "t.xlsx").write_bytes(b"no book")
    with pytest.raises(DataError, match=r"reader\.file: t\.xlsx: is not a readable Excel file"):
        reader.records()


def test_images_without_a_label_are_left_out_on_request(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\na.png,x\nb.png,\nc.png,y\n")
    reader = Csv(CsvSpec(root=str(tmp_path), file="t.csv", unlabelled="drop"))
    assert reader.chosen("class")[rows.URI].to_pylist() == ["a.png", "c.png"]
    assert reader.excluded == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"files": {"fold": "t.csv"}, "file": None}, "files: 'fold' is not a split"),
        ({"split": "s", "split_lists": {"test": "l.txt"}}, "exclude each other; keep one"),
        ({"id": "k", "views": [{"path": "a"}, {"path": "b"}]}, "id names rows"),
        ({"labels": {}}, "needs a task: set labels or onehot"),
        ({"onehot": {"class": ["a"]}, "labels": {"class": "l"}}, "onehot: class is in labels too"),
        ({"keywords": {"other": {"patterns": {"a": "b"}}}}, "keywords names other"),
        ({"keywords": {"class": {"patterns": {"a": "("}}}}, "is not a regular expression"),
        ({"views": [{"path": "a", "labels": {"other": "c"}}]}, "views: 'other' is not a task"),
    ],
)
def test_contradictory_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CsvSpec(**{"root": "images", "file": "t.csv", **fields})
