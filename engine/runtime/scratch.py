"""Temporary folders of a run. If the run is killed, the next run removes them.

A folder is in use while its process holds an exclusive lock (`flock`) on a file in it. The kernel
releases the lock when the process ends. A process id would not do, because containers that share a
temporary folder have separate ids.
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

# Long enough to be unique, and short because of Ray's sockets. `tempfile.mkdtemp` adds 8
# characters.
PREFIX = "ste-run-"
_ADDED = 8
LOCK = ".engine-lock"
# Replaces the lock file on a file system without locks.
NO_LOCKS = ".engine-no-locks"
_UNLOCKED = ".engine-lock-new"
# Seconds after which a folder without a lock file counts as abandoned: its process was killed while
# it created or removed the folder.
_ABANDONED = 3600.0

# Attempts to empty a folder while dying processes still write into it.
_TRIES = 5

# Maximum bytes of a Unix socket's path, without the closing zero.
SOCKET_PATH = 103 if sys.platform == "darwin" else 107
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


class Scratch:
    """A new folder below `parent`, locked until `close`, which removes it."""

    def __init__(self, parent: Path) -> None:
        remove_stale(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        fresh = self.path / _UNLOCKED
        self._lock: int | None = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Renamed only now: nobody may see the lock file while it is unlocked.
            fresh.rename(self.path / LOCK)
        except OSError:
            # A file system without locks: only this process may remove the folder.
            fresh.rename(self.path / NO_LOCKS)

    def close(self) -> None:
        if self._lock is not None:
            _remove(self.path)
            os.close(self._lock)
            self._lock = None


@contextmanager
def folder(parent: Path) -> Iterator[Path]:
    """A scratch folder, removed afterwards."""
    scratch = Scratch(parent)
    try:
        yield scratch.path
    finally:
        scratch.close()


def remove_stale(parent: Path) -> None:
    """Remove scratch folders of this user whose processes have ended."""
    for path in parent.glob(PREFIX + "?" * _ADDED):
        # Another run may remove the folder meanwhile, and a foreign folder may be unreadable.
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
    """Remove a folder, its lock file last. If dying processes keep writing into it, the lock file
    stays, and the next run removes the rest."""
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
    """Bytes of the longest socket path of Ray in a scratch folder of `parent`."""
    name = f"{PREFIX}{'x' * _ADDED}"
    session = f"session_2000-01-01_00-00-00_000000_{os.getpid()}"
    return len(os.fsencode(parent / name / session / "sockets" / "plasma_store"))


def parent_for_sockets(
    preferred: Path, warn: Callable[[str], None], short: Sequence[str] = _SHORT
) -> Path:
    """The parent of a private Ray's scratch folder: `preferred`, or a short folder if the paths of
    its sockets would be too long. Raises `StudyError`."""
    length = socket_path_length(preferred)
    if length <= SOCKET_PATH:
        return preferred
    for name in short:
        if os.access(name, os.W_OK | os.X_OK) and socket_path_length(Path(name)) <= SOCKET_PATH:
            warn(f"TMPDIR {preferred} is too long for Ray's sockets; using {name} for Ray")
            return Path(name)
    raise StudyError(
        f"TMPDIR {preferred} is too long for Ray's sockets: {length} of {SOCKET_PATH} bytes;"
        " set it to a shorter path"
    )
