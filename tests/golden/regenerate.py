"""Write the keys of every example study: `python -m tests.golden.regenerate`. A changed key
invalidates everything that was computed under the old one, so review the difference before you
commit it."""

from __future__ import annotations

import json
from pathlib import Path

from engine.plan import plan
from engine.study import load_study

CONFIGS = Path(__file__).parents[2] / "configs"
FILE = Path(__file__).with_name("keys.json")


def keys() -> dict[str, dict[str, str]]:
    """Keys of all steps, by the study's file name and the step's label."""
    return {
        path.name: {step.label: step.key for step in plan(load_study(path))}
        for path in sorted(CONFIGS.glob("*.yaml"))
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(keys(), indent=1) + "\n")
    print(f"written: {FILE}")
