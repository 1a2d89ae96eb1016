"""Rows that kill or hang their worker, at scale: the stream ends, and names exactly these rows."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.core.store import Store
from engine.runtime.cluster import RayRuntime
from engine.runtime.inline import InlineRuntime
from engine.work.attendance import DIED, HUNG
from engine.work.resources import StageResources
from engine.work.stage import Place
from tests.chaos.lethal import (
    Fate,
    Lethal,
    compute,
    make_context,
    painted,
    plan,
    row_ids,
    set_aside,
)

ROWS, SHARD_ROWS, POISON, HANGS = 1000, 40, 20, 5
RESOURCES = StageResources(actors=2, cpus=0.5, batch_size=8, hang_floor=4, hang_first=10)


@pytest.fixture
def runtime() -> Iterator[RayRuntime]:
    ray_runtime = RayRuntime("local", 4, warn=print)
    yield ray_runtime
    ray_runtime.close()


@dataclass
class Counted(Lethal):
    """Leaves a line for each process that loads it."""

    log: str = ""

    def load(self, place: Place) -> None:
        with Path(self.log).open("a") as file:
            file.write("started\n")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", [31])
def test_poisonous_and_hanging_rows_are_set_aside_with_their_reasons(
    runtime: RayRuntime, tmp_path: Path, seed: int
) -> None:
    print(f"seed {seed}")
    dice = random.Random(seed)
    chosen = dice.sample(row_ids(ROWS), POISON + HANGS)
    deadly: list[Fate] = ["exit", "kill"]
    endless: list[Fate] = ["sleep", "spin"]
    fates = {
        name: dice.choice(deadly if number < POISON else endless)
        for number, name in enumerate(chosen)
    }
    shards = plan(ROWS, SHARD_ROWS)
    clean = make_context(Store(str(tmp_path / "clean")), InlineRuntime(), RESOURCES)
    undisturbed = painted(compute(clean, shards, Lethal()))
    context = make_context(Store(str(tmp_path / "lethal")), runtime, RESOURCES)
    log, started = tmp_path / "starts", time.monotonic()
    commits = compute(context, shards, Counted(fates, str(log)))
    seconds, starts = time.monotonic() - started, len(log.read_text().splitlines())
    print(f"{starts} process starts, {seconds:.0f} s, notes {context.notes}")
    aside = set_aside(commits)
    assert aside == {name: DIED if number < POISON else HUNG for number, name in enumerate(chosen)}
    assert Counter(aside.values()) == {DIED: POISON, HUNG: HANGS}
    assert painted(commits) == {
        name: sha256 for name, sha256 in undisturbed.items() if name not in fates
    }
    assert len(painted(commits)) == ROWS - POISON - HANGS
    # Each process except the first of each actor replaced a lost one. Shards begun at the same time
    # share the first death.
    lost = starts - RESOURCES.actors
    assert context.notes["shards.generate"]["retries"] >= lost
    # Two for each shard, and for each row log2(8) halvings and two alone.
    assert lost <= 2 * len(shards) + 5 * len(fates)
