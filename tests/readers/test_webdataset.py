from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core import rows
from engine.core.errors import DataError
from engine.core.manifest import Manifest
from engine.data.images import Rejected
from engine.readers.webdataset import Webdataset, WebdatasetSpec
from engine.study import Study
from tests.readers.pictures import png


def write(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(number: int, label: str, patient: str = "p") -> list[tuple[str, bytes | str]]:
    fields = {"label": label, "of": {"patient": patient}}
    return [(f"./{number:04d}.png", png(number)), (f"./{number:04d}.cls", label),
            (f"./{number:04d}.json", json.dumps(fields))]  # fmt: skip


def read(root: Path, **fields: Any) -> list[dict[str, Any]]:
    reader = Webdataset(WebdatasetSpec(root=str(root), **fields))
    found = reader.records()
    assert found.schema == rows.records_schema(reader.tasks())
    return list(found.to_pylist())


def test_members_with_one_key_are_one_image(tmp_path: Path) -> None:
    write(tmp_path / "train-0000.tar", [*sample(0, "cat"), *sample(1, "dog", "q")])
    write(tmp_path / "val-0000.tar", sample(2, "cat"))
    found = read(tmp_path, group="json:of.patient")
    assert [(row["label.class"], row[rows.SPLIT], row[rows.GROUP_ID]) for row in found] == [
        ("cat", "train", "p"), ("dog", "train", "q"), ("cat", "val", "p"),
    ]  # fmt: skip
    assert len({row[rows.IMAGE_ID] for row in found}) == 3


def test_labels_come_from_fields_and_numbers_get_names(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [*sample(0, "1"), *sample(1, "0")])
    found = read(tmp_path, labels={"kind": "json:label"}, class_names=["cat", "dog"])
    assert [row["label.kind"] for row in found] == ["dog", "cat"]
    with pytest.raises(DataError, match=r"has the class '1', not a number below 1"):
        read(tmp_path, class_names=["cat"])


def test_images_are_read_in_place(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [member for n in range(4) for member in sample(n, "cat")])
    write(tmp_path / "b.tar", sample(4, "dog"))
    reader = Webdataset(WebdatasetSpec(root=str(tmp_path)))
    places = reader.records()[rows.URI].to_pylist()
    source = reader.bytes()
    for number in (3, 0, 4, 2):
        assert source.read(places[number]) == png(number)
    assert pickle.loads(pickle.dumps(source)).read(places[1]) == png(1)


@pytest.mark.parametrize("uri", ["a.tar#0+99999999#x.png", "a.tar#x+1#", "a.tar", "../a.tar#0+5#x"])
def test_invalid_positions_are_rejected(tmp_path: Path, uri: str) -> None:
    write(tmp_path / "a.tar", sample(0, "cat"))
    with pytest.raises(Rejected):
        Webdataset(WebdatasetSpec(root=str(tmp_path))).bytes().read(uri)


def test_links_in_a_tar_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", sample(0, "cat"))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("0001.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert len(read(tmp_path)) == 1


def test_tar_errors_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(DataError, match=r"a\.tar is not a complete tar"):
        read(tmp_path)
    write(tmp_path / "a.tar", [("0.png", png(0)), ("0.jpg", png(1))])
    with pytest.raises(DataError, match=r"0\.jpg is a second image with the same key"):
        read(tmp_path)
    write(tmp_path / "a.tar", [("0.cls", "cat")])
    with pytest.raises(DataError, match="contain no images"):
        read(tmp_path)
    write(tmp_path / "a.tar", [("22.0/1.5.png", png(0)), ("22.0/1.5.cls", "cat")])
    with pytest.raises(DataError, match=r"ends at its first dot, so '\.5\.png' is not an image"):
        read(tmp_path)
    write(tmp_path / "a.tar", [("0.png", png(0)), ("0.json", "{")])
    with pytest.raises(DataError, match="json:label: not valid JSON"):
        read(tmp_path, labels={"class": "json:label"})
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    with pytest.raises(DataError, match=r"a\.tar\.gz is compressed, decompress it"):
        read(tmp_path)


def test_study_reads_images_from_tars(
    tmp_path: Path, toy_study: Callable[..., Study], run_until: Callable[..., Manifest]
) -> None:
    members = [m for n in range(20) for m in sample(n, "cat" if n % 2 else "dog", f"p{n}")]
    write(tmp_path / "in" / "a.tar", members)
    reader = {"name": "webdataset", "root": str(tmp_path / "in"), "group": "json:of.patient"}
    manifest = run_until(toy_study(reader, split={"group": "column"}), "ingest")
    assert sum(sum(held.values()) for held in manifest.metrics["counts"].values()) == 20


def test_tars_are_read_from_s3(tmp_path: Path, s3_endpoint: str) -> None:
    import boto3

    path = write(tmp_path / "a.tar", [*sample(0, "cat"), *sample(1, "dog")])
    boto3.client("s3").upload_file(str(path), "bucket", "tars/test-0.tar")
    reader = Webdataset(WebdatasetSpec(root="s3://bucket/tars"))
    records = reader.records()
    assert records[rows.SPLIT].to_pylist() == ["test", "test"]
    assert reader.bytes().read(records[rows.URI][1].as_py()) == png(1)


def test_damaged_or_truncated_tar_is_rejected(tmp_path: Path) -> None:
    """Reading a truncated file ends there as at a normal end."""
    path = write(tmp_path / "a.tar", [member for n in range(6) for member in sample(n, "cat")])
    whole = path.read_bytes()
    place = int(read(tmp_path)[3][rows.URI].split("#")[1].split("+")[0])
    header = place - tarfile.BLOCKSIZE
    for damaged in (
        whole[: header + 5] + b"\xff" + whole[header + 6 :], whole[:header],
        whole[: header + 100], whole + whole,
    ):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.tar is not a complete tar"):
            read(tmp_path)


def test_tar_names_with_special_characters_are_rejected(tmp_path: Path) -> None:
    write(tmp_path / "a#1.tar", sample(0, "cat"))
    with pytest.raises(DataError, match="contains # or unprintable characters; rename it"):
        read(tmp_path)
