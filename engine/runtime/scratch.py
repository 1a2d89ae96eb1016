"""Temporary folders of a run, which the next run removes where this one was killed.

A folder belongs to its process for as long as that holds an exclusive lock (`flock`) on a file in
it. The kernel drops the lock with the process. A process id would not do: containers that share a
temporary folder have ids of their own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.core.errors import StudyError

# Long enough to be nobody else's, short because of Ray's sockets. `tempfile.mkdtemp` adds 8
# characters.
PREFIX = "ste-run-"
_ADDED = 8
LOCK = ".engine-lock"
# Instead of a lock, where the file system has none.
NO_LOCKS = ".engine-no-locks"
_UNLOCKED = ".engine-lock-new"
# Seconds after which a folder without a lock file is taken for one whose process was killed while
# it made or removed it.
_ABANDONED = 3600.0

# How often a folder is emptied while somebody still writes into it.
_TRIES = 5

# Bytes of a Unix socket's path, without the closing zero.
SOCKET_PATH = 103 if sys.platform == "darwin" else 107
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


class Scratch:
    """A folder below `parent`, locked until `close`, which removes it."""

    def __init__(self, parent: Path) -> None:
        remove_stale(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        fresh = self.path / _UNLOCKED
        self._lock: int | None = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Renamed once it is locked: nobody may find it without its lock.
            fresh.rename(self.path / LOCK)
        except OSError:
            # A file system without locks: nobody removes this folder but its own process.
            fresh.rename(self.path / NO_LOCKS)

    def close(self) -> None:
        if self._lock is not None:
            _remove(self.path)
            os.close(self._lock)
            self._lock = None


@contextmanager
def folder(parent: Path) -> Iterator[Path]:
    """A scratch folder, removed afterwards."""
    made = Scratch(parent)
    try:
        yield made.path
    finally:
        made.close()


def remove_stale(parent: Path) -> None:
    """Remove scratch folders of this user whose processes are gone."""
    for path in parent.glob(PREFIX + "?" * _ADDED):
        # Others remove folders too, and foreign ones may not be readable.
        with suppress(OSError):
            status = path.lstat()
            if path.is_symlink() or not path.is_dir() or status.st_uid != os.getuid():
                continue
            if (path / LOCK).exists():
                _remove_unlocked(path)
            elif (path / NO_LOCKS).exists():
                continue
            elif time.time() - status.st_mtime > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)


def _remove_unlocked(path: Path) -> None:
    lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    """Remove a folder, its lock file last. While dying processes still write into it, the lock file
    stays, by which the next run removes the rest."""
    for _ in range(_TRIES):
        with suppress(OSError):
            rest = [entry for entry in path.iterdir() if entry.name not in (LOCK, NO_LOCKS)]
            if not rest:
                shutil.rmtree(path, ignore_errors=True)
                return
            for entry in rest:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)


def socket_path_length(parent: Path) -> int:
    """Bytes of the longest socket path that Ray makes in a scratch folder of `parent`."""
    made = f"{PREFIX}{'x' * _ADDED}"
    session = f"session_2000-01-01_00-00-00_000000_{os.getpid()}"
    return len(os.fsencode(parent / made / session / "sockets" / "plasma_store"))


def parent_for_sockets(
    preferred: Path, warn: Callable[[str], None], short: Sequence[str] = _SHORT
) -> Path:
    """Where a private Ray's scratch folder goes: `preferred`, or a short folder where its sockets'
    paths would be too long. Raises `StudyError`."""
    length = socket_path_length(preferred)
    if length <= SOCKET_PATH:
        return preferred
    for name in short:
        if os.access(name, os.W_OK | os.X_OK) and socket_path_length(Path(name)) <= SOCKET_PATH:
            warn(f"TMPDIR {preferred} is too long for Ray's sockets; {name} is used for Ray")
            return Path(name)
    raise StudyError(
        f"TMPDIR {preferred} is too long for Ray's sockets: {length} of {SOCKET_PATH} bytes;"
        " set it to a shorter path"
    )
