from __future__ import annotations

from typing import Any

import pytest

from engine.core.manifest import Manifest
from engine.core.registry import PluginField
from engine.core.spec import Spec
from engine.core.step import Step, Subject
from engine.report.results import Trained
from engine.report.sections.cost import classifier_in_words, cost
from tests.results import NOTHING, contrast, evaluate_result, manifest, study_results, trained


def timed(
    label: str, seconds: float, held: tuple[tuple[int, float, float], ...] | None = None
) -> tuple[Any, Manifest]:
    kind, *name = label.split(".")
    return Step(kind, Subject("".join(name[:1])), Spec(), {}, {}), manifest(kind, seconds, held)


def tables_of(
    steps: list[tuple[Step, Manifest]], trials: list[Trained], evaluate: Any = None
) -> tuple[dict[Any, Any], list[Any], str]:
    """Rows of `cost.csv` by work, those of `prices.csv`, and the section."""
    section = cost(
        study_results(steps=tuple(steps), trials=tuple(trials),
                      evaluate=evaluate or evaluate_result())
    )  # fmt: skip
    rows = {row["work"]: row for row in section.tables["cost"]}
    return rows, list(section.tables["prices"]), section.html


def test_hours_are_added_up_and_trainings_are_not_counted_twice() -> None:
    steps = [timed("ingest", 36), timed("finetune.g", 3600, ((4, 2.0, 1.0), (1, 1.0, 0.0))),
             timed("finetune.h", 3600), timed("search", 9999), timed("fidelity.g", 36)]  # fmt: skip
    rows, _, html = tables_of(steps, [trained("real", (), 1800), trained("g x1", ("g",), 1800)])
    wall = [row["wall_hours"] for row in rows.values()]
    assert sum(wall) == pytest.approx(0.01 + 2 + 1 + 0.01)
    assert "<td>3.0 h</td>" in html
    assert {work: row["steps"] for work, row in rows.items()} == {
        "ingesting the data": 1, "training generators": 2, "measuring fidelity": 1,
        "training classifiers of the comparison": 2,
    }  # fmt: skip
    # Four workers with two CPUs and a GPU each, and the driver; one with a quarter of a GPU.
    own = rows["training generators"]
    assert [own[f"{name}_hours"] for name in ("wall", "cpu", "gpu")] == pytest.approx(
        [2.0, 9.0 + 1.0, 4.0 + 0.25]
    )
    assert rows["training classifiers of the comparison"]["gpu_hours"] == pytest.approx(0.25)
    assert rows["measuring fidelity"]["devices"] == "cuda"
    assert rows["ingesting the data"]["devices"] == ""


def test_what_a_step_did_not_note_is_no_hour_of_nothing() -> None:
    (step, done), *rest = [timed("finetune.g", 3600), timed("generate.g", 3600)]
    del done.provenance["held"]
    rows, _, html = tables_of([(step, done), *rest], [trained("g x1", ("g",), 1)])
    assert rows["training generators"]["gpu_hours"] is None
    assert rows["generating images"]["gpu_hours"] == pytest.approx(0.25)
    assert "Missing CPU and GPU hours" in html


@pytest.mark.parametrize(
    ("gpus", "unit", "hours"), [(2.0, "GPU hours", 3.0), (0.0, "CPU hours", 6.0)]
)
def test_a_point_has_a_price_where_it_was_gained(gpus: float, unit: str, hours: float) -> None:
    held = ((1, 4.0, gpus),)
    steps = [timed("finetune.g", 3600, held), timed("generate.g", 3600, held),
             timed("finetune.g.fit1", 3600, held), timed("finetune.h", 7200, held)]  # fmt: skip
    trials = [trained("g x1", ("g",), 1, fit) for fit in (0, 1)]
    effect = NOTHING.model_copy(update={"estimate": 0.03})
    for word, low, gained in (("helps", 0.01, True), ("undecided", -0.01, False)):
        pair = contrast(word=word, low=low, high=0.06, effect=effect)
        _, (price,), html = tables_of(steps, trials, evaluate_result(contrasts=[pair]))
        assert (price["unit"], price["images_took"]) == (unit, pytest.approx(hours))  # of one fit
        # Dear where the gain is at the low end of its interval.
        want = {"per_point": hours / 3, "per_point_least": hours / 6, "per_point_most": hours / 1}
        assert {name: price[name] for name in want} == (
            pytest.approx(want) if gained else dict.fromkeys(want)
        )
        assert ("no price per point" in html) != gained


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ({"name": "scratch", "architecture": "resnet18"}, "ResNet-18 trained from scratch"),
        ({"name": "pretrained", "model": "google/efficientnet-b0", "trained": 2, "input_size": 224},
         "google/efficientnet-b0, last 2 blocks tuned, at 224 px"),
        ({"name": "pretrained", "model": "../weights/net", "trained": "head"},
         "net, its last layer alone trained"),
        ({"name": "probe", "embedder": {"name": "dino"}},
         "a linear probe on frozen vectors of dino (facebook/dinov2-base)"),
        ({"name": "vgg", "depth": 16}, "VGG16 trained from scratch"),
        ({"name": "small", "channels": [8]},
         "a convolutional network of 1 block (8 channels) trained from scratch"),
    ],
)  # fmt: skip
def test_a_network_is_named(spec: dict[str, Any], want: str) -> None:
    assert classifier_in_words(PluginField("classifiers")(spec)) == want
