"""The keys of the example studies: a change invalidates every user's results, so it must be
intended."""

from __future__ import annotations

import json

from tests.golden.regenerate import CONFIGS, FILE, keys

HINT = (
    "step keys changed, and so results computed under the old keys are lost to these studies. If"
    " that is meant (a raised version, a new field), run: python -m tests.golden.regenerate"
)


def test_keys_of_every_example_study_are_the_recorded_ones() -> None:
    recorded, found = json.loads(FILE.read_text()), keys()
    changed = [
        f"{study}: {label} was {recorded.get(study, {}).get(label)}, is {steps.get(label)}"
        for study, steps in ((name, found.get(name, {})) for name in sorted({*recorded, *found}))
        for label in sorted({*recorded.get(study, {}), *steps})
        if recorded.get(study, {}).get(label) != steps.get(label)
    ]
    assert not changed, "\n".join([HINT, *changed])


def test_every_example_study_is_recorded() -> None:
    assert set(json.loads(FILE.read_text())) == {path.name for path in CONFIGS.glob("*.yaml")}, HINT
