from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.core.errors import StudyError
from engine.runtime.scratch import (
    LOCK,
    PREFIX,
    SOCKET_PATH,
    Scratch,
    folder,
    parent_for_sockets,
    remove_stale,
    socket_path_length,
)

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from engine.runtime.scratch import Scratch
print(Scratch(Path(sys.argv[1])).path, flush=True)
time.sleep(100)
"""


def hold(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """Another process that locks a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(parent)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_folder_is_kept_while_its_process_lives_and_removed_after_a_kill(tmp_path: Path) -> None:
    process, path = hold(tmp_path)
    (path / "session" / "logs").mkdir(parents=True)
    remove_stale(tmp_path)
    assert path.is_dir()
    process.kill()
    process.wait()
    # Like every start.
    Scratch(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_folder_of_this_process_is_kept_until_closed(tmp_path: Path) -> None:
    with folder(tmp_path) as mine, folder(tmp_path) as other:
        assert mine != other
        assert mine.is_dir()
        assert not os.get_inheritable(os.open(mine / LOCK, os.O_RDONLY))
    assert list(tmp_path.iterdir()) == []


def age(path: Path) -> None:
    os.utime(path, (0, 0))


def test_folder_without_a_lock_is_stale_after_an_hour(tmp_path: Path) -> None:
    fresh, empty, written = (tmp_path / f"{PREFIX}{letter * 8}" for letter in "abc")
    foreign = [tmp_path / name for name in (f"{PREFIX}d", f"{PREFIX}backup-2026", "ste-abcdefgh")]
    for path in (fresh, empty, written, *foreign):
        path.mkdir()
        (path / "session").mkdir()
        (path / "session" / "log").write_text("")
    (empty / "session" / "log").unlink()
    (empty / "session").rmdir()
    for path in (empty, written, *foreign):
        age(path)
    remove_stale(tmp_path)
    assert set(tmp_path.iterdir()) == {fresh, *foreign}
    assert all((path / "session" / "log").exists() for path in foreign)


def test_lock_is_removed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch(tmp_path)
    (scratch.path / "session").mkdir()
    remove = shutil.rmtree

    def write_again(path: Path, **options: object) -> None:
        remove(path, ignore_errors=True)
        assert (scratch.path / LOCK).exists()
        path.mkdir()

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", write_again)
        scratch.close()
    assert (scratch.path / LOCK).exists()
    remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_links_are_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / LOCK).write_text("")
    below = tmp_path / "below"
    below.mkdir()
    (below / f"{PREFIX}xxxxxxxx").symlink_to(target)
    remove_stale(below)
    assert (target / LOCK).exists()


def test_file_system_without_locks_keeps_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks available")

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", refuse)
        scratch = Scratch(tmp_path)
    assert not (scratch.path / LOCK).exists()
    age(scratch.path)
    remove_stale(tmp_path)
    assert scratch.path.is_dir()
    scratch.close()
    assert not scratch.path.exists()


def long_folder(parent: Path, length: int) -> Path:
    path = parent / ("x" * 200)
    return path / ("y" * max(1, length - len(str(path)) - 1))


def test_length_limit_follows_the_longest_socket_of_ray() -> None:
    path = Path("/t") / f"{PREFIX}abcdefgh" / f"session_2026-11-29_22-33-42_889123_{os.getpid()}"
    assert socket_path_length(Path("/t")) == len(str(path / "sockets" / "plasma_store"))


def test_short_folder_is_used_if_the_temporary_folder_is_too_long(tmp_path: Path) -> None:
    lines: list[str] = []
    assert parent_for_sockets(Path("/tmp"), lines.append) == Path("/tmp")
    assert not lines
    long = long_folder(tmp_path, 250)
    assert parent_for_sockets(long, lines.append, ["/nowhere", "/tmp"]) == Path("/tmp")
    (line,) = lines
    assert line.startswith(f"TMPDIR {long} is too long")
    assert line.endswith("using /tmp for Ray")


def test_error_names_the_variable_if_no_folder_is_short_enough(tmp_path: Path) -> None:
    long = long_folder(tmp_path, 250)
    with pytest.raises(StudyError, match=rf"^TMPDIR .* of {SOCKET_PATH} bytes; set it to a shor"):
        parent_for_sockets(long, print, ["/nowhere", str(long)])
