"""The cost of comparing parts with their digests: the same work with and without it, in turn.

    digits     the digits study up to its report, in a new process each time (CPU seconds)
    no-op      a generator that does nothing makes 100,000 images, which are committed and then read
               as curate reads them: much reading and little computing

"hashing" is the time spent in the comparison itself, as a share of that run. If it is far below the
spread of the ratio, it is the better figure.

`python -m benchmarks.digests [--rounds N] [--quick]`
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.scale import Noop, encoded_images, make_context, plan_requests, run_engine
from benchmarks.timing import machine, print_table, quartiles
from engine.cli import run_study
from engine.core import store as storage
from engine.core.spec import Spec
from engine.core.store import Store
from engine.runtime.inline import InlineRuntime
from engine.steps.request import planned_shards

DIGITS = Path(__file__).parents[1] / "configs" / "digits.yaml"


class Clock:
    """Seconds spent on comparing parts with their digests."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        original = storage.Store._verify_local, storage.Store._matches

        def timed(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                started = time.perf_counter()
                try:
                    return method(*arguments)
                finally:
                    self.seconds += time.perf_counter() - started

            return call

        # Private names: only these two methods do the comparison and nothing else.
        storage.Store._verify_local = timed(original[0])  # type: ignore[method-assign]
        storage.Store._matches = staticmethod(timed(original[1]))  # type: ignore[method-assign]
        try:
            yield
        finally:
            storage.Store._verify_local = original[0]  # type: ignore[method-assign]
            storage.Store._matches = staticmethod(original[1])  # type: ignore[method-assign]


def without_digests() -> None:
    """Disable the comparison in this process."""
    storage.named_digest = lambda key: None


def digits(quick: bool) -> None:
    sets = ["profile.runtime=inline", "profile.mlflow=none"]
    quiet_err, quiet_out = redirect_stderr(StringIO()), redirect_stdout(StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet_err, quiet_out:
        sets.append(f"profile.storage={folder}")
        last = ("--until", "cluster") if quick else ()
        given = (part for one in sets for part in ("--set", one))
        code = run_study([str(DIGITS), *last, *given])
    assert code == 0


def noop(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        request = plan_requests(store, count)
        context = make_context(store, InlineRuntime(), {"request": request}, Spec())
        shards = list(planned_shards(context))
        commits = run_engine(context, shards, [Noop(encoded_images(False))], "generated")
        keys = [commit.data.key for commit in commits if commit.data]
        assert sum(table.num_rows for table in store.tables(keys)) == count


def measure(name: str, digests: bool, quick: bool) -> dict[str, float]:
    """In a child process: run one of the two once."""
    if not digests:
        without_digests()
    clock = Clock()
    cpu, wall = time.process_time(), time.perf_counter()
    with clock.watching():
        digits(quick) if name == "digits" else noop(2_000 if quick else 100_000)
    return {
        "cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall,
        "hashing": clock.seconds,
    }  # fmt: skip


def child(name: str, digests: bool, quick: bool) -> dict[str, float]:
    arguments = ["--child", name, *(["--digests"] if digests else []), *(["--quick"] * quick)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.digests", *arguments],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it runs")
    parser.add_argument("--child", choices=("digits", "noop"), help=argparse.SUPPRESS)
    parser.add_argument("--digests", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.digests, arguments.quick)))
        return
    print(machine())
    lines = []
    for name in ("digits", "noop"):
        pairs = [
            (child(name, True, arguments.quick), child(name, False, arguments.quick))
            for _ in range(1 if arguments.quick else arguments.rounds)
        ]
        lines.append(
            [
                name,
                quartiles([a["cpu"] for a, _ in pairs]).show(1),
                quartiles([b["cpu"] for _, b in pairs]).show(1),
                quartiles([a["cpu"] / b["cpu"] for a, b in pairs]).show(),
                f"{100 * quartiles([a['hashing'] / a['wall'] for a, _ in pairs]).median:.2f}%",
            ]
        )
    print_table(
        "comparing parts with their digests, CPU seconds",
        ["work", "with", "without", "with / without", "hashing, of the wall time"], lines,
    )  # fmt: skip


if __name__ == "__main__":
    main()
