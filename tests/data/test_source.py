"""Only files inside the user's folder are ever read."""

from __future__ import annotations

import errno
import os
import pickle
import socket
from collections import Counter
from pathlib import Path

import fsspec
import pytest

from engine.core.errors import DataError, StorageError
from engine.data.images import MAX_BYTES, Rejected
from engine.data.source import Source


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "cat").mkdir(parents=True)
    (root / "cat" / "a.png").write_bytes(b"inside")
    (tmp_path / "secret.png").write_bytes(b"outside")
    return root


def reason(root: Path, uri: str) -> str:
    with pytest.raises(Rejected) as caught:
        Source(str(root)).read(uri)
    return caught.value.reason


def test_file_is_read_by_its_relative_path(root: Path) -> None:
    assert Source(str(root)).read("cat/a.png") == b"inside"
    assert Source(f"file://{root}").read("cat/a.png") == b"inside"
    assert pickle.loads(pickle.dumps(Source(str(root)))).read("cat/a.png") == b"inside"


@pytest.mark.parametrize(
    "uri",
    [
        "", "../secret.png", "cat/../../secret.png", "cat/../cat/a.png", "/etc/passwd", "a\0b.png",
        "..\\secret.png", "x" * 300 + ".png", "/".join(["x" * 200] * 30), "/dev/zero", "~/../x/..",
    ],
)  # fmt: skip
def test_path_outside_the_root_is_rejected(root: Path, uri: str) -> None:
    assert reason(root, uri) == "path_not_allowed"


def test_link_out_of_the_root_is_rejected(root: Path, tmp_path: Path) -> None:
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "device.png").symlink_to("/dev/zero")
    (root / "around.png").symlink_to("around.png")
    for uri in ("out.png", "up/secret.png", "device.png", "around.png"):
        assert reason(root, uri) == "path_not_allowed"


def test_sibling_folder_with_the_same_prefix_is_outside(root: Path) -> None:
    sibling = root.with_name("data-private")
    sibling.mkdir()
    (sibling / "a.png").write_bytes(b"outside")
    (root / "link.png").symlink_to(sibling / "a.png")
    assert reason(root, "link.png") == "path_not_allowed"


def test_link_inside_the_root_is_followed(root: Path) -> None:
    (root / "same.png").symlink_to(root / "cat" / "a.png")
    assert Source(str(root)).read("same.png") == b"inside"


def test_root_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert Source(str(tmp_path / "link")).read("cat/a.png") == b"inside"


@pytest.mark.timeout(20)
def test_pipes_and_sockets_are_rejected_without_waiting(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(root / "pipe.png")
    assert reason(root, "pipe.png") == "path_not_allowed"
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(root)  # the path of a socket has 108 characters at most
        listening.bind("socket.png")
        assert reason(root, "socket.png") == "path_not_allowed"


def test_missing_file_folder_and_large_file_have_different_reasons(root: Path) -> None:
    with open(root / "large.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert reason(root, "cat/b.png") == "missing"
    assert reason(root, "cat/a.png/b.png") == "path_not_allowed"
    assert reason(root, "cat") == "not_readable"
    assert reason(root, "large.png") == "too_large"


def test_files_are_listed_by_extension_in_order(root: Path) -> None:
    for name in ("Z.JPG", "b.txt", ".hidden", "cat/sub.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"")
    source = Source(str(root))
    assert list(source.files((".png", ".jpg"))) == ["Z.JPG", "cat/a.png", "cat/sub.png"]
    assert source.folders() == ["cat"]


SYSTEM_FILES = {
    "cat/._a.png": "hidden", "__MACOSX/cat/a.png": "system", ".ipynb_checkpoints/a.png": "hidden",
    "cat/@eaDir/a.png": "thumbnails", ".thumbnails/a.png": "thumbnails",
    "cat/Thumbs.db": "thumbnails", ".DS_Store": "hidden", "notes.TXT": ".txt",
    "LICENSE": "no extension",
}  # fmt: skip


def test_files_of_the_system_are_skipped_and_counted(root: Path) -> None:
    for name in SYSTEM_FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    source = Source(str(root))
    listing = source.listing(lambda name: name.endswith(".png"))
    assert listing.names == ["cat/a.png"]
    assert listing.skipped == Counter(SYSTEM_FILES.values())
    assert source.folders() == ["cat"]


def test_home_and_variables_in_the_root_are_expanded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    for written in ("~/data", "$HOME/data", "${HOME}/data"):
        assert Source(written).read("cat/a.png") == b"inside"


def test_digest_of_states_follows_sizes_and_times(root: Path) -> None:
    source = Source(str(root))
    before = source.digest_of_states(["cat/a.png"])
    assert source.digest_of_states(["cat/a.png"]) == before
    os.utime(root / "cat" / "a.png", (1, 1))
    assert source.digest_of_states(["cat/a.png"]) != before


def test_folders_behind_links_are_not_walked(root: Path, tmp_path: Path) -> None:
    (root / "up").symlink_to(tmp_path)
    assert list(Source(str(root)).files((".png",))) == ["cat/a.png"]


@pytest.mark.parametrize(
    ("root", "text"),
    [
        ("/no/such/folder", "does not exist"),
        ("a\0b", "cannot be opened"),
        ("nothing://bucket/x", "cannot be opened"),
    ],
)
def test_missing_root_error_names_the_field(root: str, text: str) -> None:
    with pytest.raises(DataError, match=rf"^reader\.root: .*{text}"):
        Source(root)


def test_in_memory_folder_obeys_the_same_rules() -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe_file("/photos/cat/a.png", b"inside")
    files.pipe_file("/secret.png", b"outside")
    source = Source("memory://photos")
    assert list(source.files((".png",))) == ["cat/a.png"]
    assert source.folders() == ["cat"]
    assert source.read("cat/a.png") == b"inside"
    for uri, expected in (("../secret.png", "path_not_allowed"), ("no.png", "missing")):
        with pytest.raises(Rejected) as caught:
            source.read(uri)
        assert caught.value.reason == expected


class Faulty:
    """A file system whose reads fail: the first `times` of them, with `error`."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times = error, times

    def size(self, path: str) -> int:
        return 6

    def cat_file(self, path: str) -> bytes:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return b"inside"


def remote(error: Exception, times: int) -> Source:
    fsspec.filesystem("memory").pipe("/photographs/a.png", b"inside")
    source = Source("memory://photographs")
    source._fs = Faulty(error, times)
    return source


@pytest.mark.parametrize("error", [TimeoutError("slow"), OSError(errno.EIO, "input/output error")])
def test_transient_storage_fault_is_retried(error: Exception) -> None:
    assert remote(error, times=2).read("a.png") == b"inside"


@pytest.mark.parametrize(
    "error", [PermissionError("the token has expired"), RuntimeError("no credentials")]
)
def test_permanent_storage_fault_stops_the_run_and_sets_no_image_aside(error: Exception) -> None:
    with pytest.raises(StorageError, match=str(error)):
        remote(error, times=99).read("a.png")


def test_missing_remote_file_is_rejected_as_missing() -> None:
    with pytest.raises(Rejected, match="missing"):
        remote(FileNotFoundError(errno.ENOENT, "no such key"), times=99).read("a.png")


def test_an_archive_as_root_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"data\.zip is a file, not a folder; unpack it"):
        Source(str(tmp_path / "data.zip"))
