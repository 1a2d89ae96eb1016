"""Command lines of the scripts in `jobs/` that maintain a storage (`engine.cli` has the others)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from engine.cli import command
from engine.core.errors import StudyError
from engine.core.progress import say
from engine.core.store import Store
from engine.maintenance import fsck, gc
from engine.profile import Profile
from engine.study import load_profile


@command
def run_fsck(argv: Sequence[str] | None = None) -> int:
    """Verify a storage; returns the exit code, 1 if damage was found and not repaired."""
    parser = argparse.ArgumentParser(
        description="Verify everything in a storage: records, data, weights, checkpoints."
    )
    _add_storage(parser)
    parser.add_argument(
        "--repair", action="store_true",
        help="discard exactly the damaged data, so that the next run computes it again",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    store = Store(_storage(arguments))
    report = fsck.verify(store)
    for fault in report.faults:
        print(fault.line())
    say(
        f"{report.records:,} records, {report.parts:,} parts, {report.bytes / 2**20:,.1f} MiB:"
        f" {len(report.faults)} damaged or missing"
    )
    if not report.faults:
        return 0
    if not arguments.repair:
        say("run again with --repair to discard exactly these; the study computes them again")
        return 1
    repaired = fsck.repair(store, report.faults)
    say(f"{repaired} discarded or restored; run the study again to recompute what is missing")
    return 0


@command
def run_gc(argv: Sequence[str] | None = None) -> int:
    """List or remove files that no record of a storage names; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Find unused files in a storage: leftovers of kills, lost races and --discard."
    )
    _add_storage(parser)
    parser.add_argument(
        "--older-than", type=float, default=7.0, metavar="DAYS",
        help="only files older than this; choose more days than any step takes (default: 7)",
    )  # fmt: skip
    parser.add_argument("--delete", action="store_true", help="remove the files; default: list")
    arguments = parser.parse_args(argv)
    if arguments.older_than < 0:
        raise StudyError(f"--older-than {arguments.older_than:g}: must be 0 or more")
    store, limit = Store(_storage(arguments)), time.time() - 86_400 * arguments.older_than
    garbage = (gc.remove if arguments.delete else gc.find_garbage)(store, limit)
    for key in garbage.keys:
        print(key)
    done = "removed" if arguments.delete else "unused; remove them with --delete"
    say(f"{len(garbage.keys):,} files, {garbage.bytes / 2**20:,.1f} MiB {done}")
    return 0


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "storage", nargs="?", help="a folder or URL; default: the profile's storage"
    )
    parser.add_argument("--profile", type=Path, help="the profile that names the storage (YAML)")


def _storage(arguments: argparse.Namespace) -> str:
    if arguments.storage is not None:
        return str(arguments.storage)
    profile = load_profile(arguments.profile, []) if arguments.profile else Profile()
    return profile.storage
