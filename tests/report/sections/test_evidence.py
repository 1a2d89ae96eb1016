"""What a study's page says for those who doubt it: figures, prices, words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as reference

from engine.comparison.arms import Arm, SearchSpec, Trial
from engine.comparison.verdict import Predictions, figures_of
from engine.core.manifest import Manifest
from engine.core.spec import Spec
from engine.core.step import Step, Subject
from engine.plan import plan
from engine.report.download import as_csv
from engine.report.sections.cost import cost, network_in_words, per_point
from engine.report.sections.embedding import sheet
from engine.report.sections.evidence import (
    Trained,
    added_to,
    confusions,
    figures_table,
    forests,
    most_confused,
)
from engine.report.sections.methods import classifier_in_words, listed, methods, not_known
from engine.results.comparison import EvaluateResult, OpenedTest, SearchResult
from engine.results.data import IngestResult
from engine.sections import Amount
from engine.steps.report import links
from engine.study import Study
from tests.results import (
    NOTHING,
    arm_figure,
    arm_result,
    contrast,
    evaluate_result,
    interval,
    search_result,
    val_mean,
)

CLASSES = ("a", "b", "c")


def predictions(fits: int = 2, seeds: int = 2, images: int = 60) -> Predictions:
    random = np.random.default_rng(1)
    labels = np.arange(images) % 3
    scores = random.standard_normal((fits * seeds, images, 3)) + 1.5 * np.eye(3)[labels]
    likely = np.exp(scores)
    return Predictions(
        CLASSES, labels, np.arange(images).astype(str),
        {"real": (likely / likely.sum(-1, keepdims=True)).astype(np.float32)}, fits,
    )  # fmt: skip


def test_figures_of_an_arm_are_means_of_its_classifiers_with_intervals() -> None:
    made = predictions()
    tested, held = figures_of(made, "real", "real", 0.0, "baseline"), made.probabilities["real"]
    areas = [reference.roc_auc_score(made.labels, one, multi_class="ovr") for one in held]
    assert tested.figures["roc_auc"].mean == pytest.approx(np.mean(areas))
    assert tested.classifiers["roc_auc"] == pytest.approx(areas)
    # Two classifiers of a fit are one replicate.
    assert tested.figures["roc_auc"].replicates == pytest.approx(np.reshape(areas, (2, 2)).mean(1))
    assert tested.figures["roc_auc"].low < np.mean(areas) < tested.figures["roc_auc"].high
    f1 = [reference.f1_score(made.labels, one.argmax(1), average="weighted") for one in held]
    assert tested.figures["weighted_f1"].mean == pytest.approx(np.mean(f1))
    worst = [reference.recall_score(made.labels, one.argmax(1), average=None).min() for one in held]
    assert tested.figures["worst_class_recall"].mean == pytest.approx(np.mean(worst))
    of_b = [reference.roc_auc_score(made.labels == 1, one[:, 1]) for one in held]
    assert tested.per_class["b"].roc_auc == pytest.approx(np.mean(of_b))


def test_the_reliability_table_is_of_all_classifiers_together() -> None:
    made = predictions()
    tested = figures_of(made, "real", "real", 0.0, "baseline")
    bins, held = tested.reliability, made.probabilities["real"]
    assert sum(one.images for one in bins) == held.shape[0] * held.shape[1]
    right = sum(one.images * one.accuracy for one in bins)
    assert right / (4 * 60) == pytest.approx(tested.figures["accuracy"].mean)


def test_who_names_a_class_alone_gets_no_figure_of_probabilities() -> None:
    made = predictions()
    hard = np.eye(3, dtype=np.float32)[made.probabilities["real"].argmax(-1)]
    named = Predictions(CLASSES, made.labels, made.groups, {"real": hard}, 2)
    tested = figures_of(named, "real", "real", 0.0, "baseline")
    assert "brier" not in tested.figures
    assert tested.per_class["a"].roc_auc is None
    assert tested.reliability == []
    assert "macro_f1" in tested.figures


def test_the_page_s_intervals_end_where_figures_do() -> None:
    figure = arm_figure(0.99, low=-0.1, high=1.4)
    arms = {"real": arm_result({"accuracy": figure, "brier": figure}), "x": arm_result()}
    held = figures_table(evaluate_result(arms=arms))
    assert held["columns"] == ["accuracy", "Brier score ↓"]
    (_, (accuracy, brier)), (_, nothing) = held["rows"]
    assert (accuracy.low, accuracy.high) == (0.0, 1.0)
    assert brier.high == 1.4
    assert nothing == [None, None]


def test_classes_that_gain_and_lose_are_told_where_replicates_are_enough() -> None:
    gains = [(0.1, 0.05, 0.15), (-0.1, -0.2, -0.05), (0.1, 0.1, 0.1), (0.0, -0.1, 0.1)]
    for replicates, gained, lost in ((5, ["up"], ["down"]), (4, [], [])):
        one = contrast(recall_gain=[interval(*gain) for gain in gains], replicates=replicates)
        evaluate = evaluate_result(contrasts=[one])
        (found,) = forests(evaluate, ["up", "down", "always", "same"])
        assert (found["gained"], found["lost"]) == (gained, lost)
        want = "Recall of classes: up gains; down loses (descriptive, not corrected"
        assert found["summary"].startswith(want if gained else "")
        assert bool(found["summary"]) == bool(gained)


def test_beside_another_baseline_the_difference_to_real_images_is_told() -> None:
    arms = {"g x1": arm_result({"macro_f1": arm_figure(0.5, 0.7)}),
            "real": arm_result({"macro_f1": arm_figure(0.4, 0.5)})}  # fmt: skip
    told = {}
    for against, baseline in (("t x2", "t x2"), ("g unfiltered x1", "t x2"), ("real", "real")):
        one = contrast(against=against, recall_gain=[interval(0.0)],
                       recall_gain_to_real=[interval(0.1)])  # fmt: skip
        evaluate = evaluate_result(arms=arms, baseline=baseline, contrasts=[one])
        (found,) = forests(evaluate, ["a"])
        told[against] = found["to_real"]
    assert told["t x2"].estimate == pytest.approx(0.15)
    assert told["g unfiltered x1"] is told["real"] is None


def test_images_added_are_those_of_generators_whatever_real_ones_are_left() -> None:
    trials = [replace(trained(name, (), 1), added=added)
              for name, added in (("real", 0), ("reduced", 0), ("g only", 40))]  # fmt: skip
    assert added_to(trials) == {"real": 0, "reduced": 0, "g only": 40}


def test_weighted_precision_stands_among_the_figures() -> None:
    arms = {"real": arm_result({"weighted_precision": arm_figure(0.5)})}
    held = figures_table(evaluate_result(arms=arms))
    assert held["columns"] == ["weighted precision"]


def test_of_many_classes_the_worst_pairs_are_told_in_place_of_a_matrix() -> None:
    matrix = np.eye(40, dtype=int) * 9
    matrix[3, 7], matrix[5, 2] = 3, 1
    names = [f"k{number}" for number in range(40)]
    pairs = most_confused(matrix, names)
    assert [(one["true"], one["predicted"], one["count"]) for one in pairs] == [
        ("k3", "k7", 3), ("k5", "k2", 1)
    ]  # fmt: skip
    assert pairs[0]["share"] == pytest.approx(0.25)
    trial = trained("real", (), 1.0, confusion=matrix.tolist())
    evaluate = evaluate_result(arms={"real": arm_result(confusion=matrix.tolist())})
    (entry,) = confusions(evaluate, [trial], names)
    assert entry["cells"] == {}
    assert len(entry["pairs"]) == 2


def test_a_sheet_of_pictures_keeps_its_order_and_its_bytes() -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(50)]
    large, small = sheet(images, 10**6), sheet(images, 60_000)
    assert large["side"] > small["side"] > 0
    assert len(small["url"]) <= 60_000 + 30
    assert sheet(images, 100)["url"] == ""


VAL: dict[str, Any] = {"per_class": {}, "confusion": [], "macro_f1": 0.5}


def trained(
    arm: str, generators: tuple[str, ...], seconds: float, fit: int = 0, **val: Any
) -> Trained:
    made = Arm(name=arm, family=arm, mixes=("mix",), generators=generators)
    step = Step("train", Subject(arm, number=fit), Spec(), {}, {})
    done = manifest("train", seconds, best_step=1, val={**VAL, **val})
    return Trained(Trial(made, fit, fit, step), done, {"a": 1})


def manifest(
    kind: str, seconds: float, held: tuple[tuple[int, float, float], ...] | None = None,
    **metrics: Any,
) -> Manifest:  # fmt: skip
    """held: workers, and CPUs and GPUs of each; or one with a CPU and a quarter of a GPU."""
    told = ((1, 1.0, 0.25),) if held is None else held
    return Manifest(
        kind=kind, key="k", label=kind, spec={}, inputs={}, parts=(), rows=1, metrics=metrics,
        provenance={
            "seconds": seconds, "device": "cuda", "started": "2026",
            "held": [{"workers": workers, "cpus": cpus, "gpus": gpus, "seconds": seconds}
                     for workers, cpus, gpus in told],
        },
    )  # fmt: skip


def timed(
    label: str, seconds: float, held: tuple[tuple[int, float, float], ...] | None = None
) -> tuple[Any, Manifest]:
    kind, *name = label.split(".")
    return Step(kind, Subject("".join(name[:1])), Spec(), {}, {}), manifest(kind, seconds, held)


def test_hours_are_added_up_and_trainings_are_not_counted_twice() -> None:
    steps = [timed("ingest", 36), timed("finetune.g", 3600, ((4, 2.0, 1.0), (1, 1.0, 0.0))),
             timed("finetune.h", 3600), timed("search", 9999), timed("fidelity.g", 36)]  # fmt: skip
    trials = [trained("real", (), 1800), trained("g x1", ("g",), 1800)]
    found = cost(steps, trials, evaluate_result())
    assert found["hours"].wall == pytest.approx(0.01 + 2 + 1 + 0.01)
    rows = {row["words"]: row for row in found["rows"]}
    assert {words: row["count"] for words, row in rows.items()} == {
        "ingesting the data": 1, "training generators": 2, "measuring fidelity": 1,
        "training classifiers of the comparison": 2,
    }  # fmt: skip
    # Four workers with two CPUs and a GPU each, and the driver; one with a quarter of a GPU.
    made = rows["training generators"]["hours"]
    assert (made.wall, made.cpu, made.gpu) == pytest.approx((2.0, 9.0 + 1.0, 4.0 + 0.25))
    assert rows["training classifiers of the comparison"]["hours"].gpu == pytest.approx(0.25)
    assert rows["measuring fidelity"]["devices"] == "cuda"
    assert rows["ingesting the data"]["devices"] == ""


def test_what_a_step_did_not_note_is_no_hour_of_nothing() -> None:
    (step, done), *rest = [timed("finetune.g", 3600), timed("generate.g", 3600)]
    del done.provenance["held"]
    found = cost([(step, done), *rest], [trained("g x1", ("g",), 1)],
                 evaluate_result())  # fmt: skip
    rows = {row["words"]: row["hours"] for row in found["rows"]}
    assert rows["training generators"].gpu is None
    assert rows["generating images"].gpu == pytest.approx(0.25)
    assert (found["hours"].cpu, found["hours"].gpu) == (None, None)
    assert found["hours"].wall > 2


@pytest.mark.parametrize(
    ("gpus", "unit", "hours"), [(2.0, "GPU hours", 3.0), (0.0, "CPU hours", 6.0)]
)
def test_a_point_has_a_price_where_it_was_gained(gpus: float, unit: str, hours: float) -> None:
    held = ((1, 4.0, gpus),)
    steps = [timed("finetune.g", 3600, held), timed("generate.g", 3600, held),
             timed("finetune.g.fit1", 3600, held), timed("finetune.h", 7200, held)]  # fmt: skip
    trials = [trained("g x1", ("g",), 1, fit) for fit in (0, 1)]
    effect = NOTHING.model_copy(update={"estimate": 0.03})
    asked = [(step.kind, step, done) for step, done in steps]
    for word, low, gained in (("helps", 0.01, True), ("undecided", -0.01, False)):
        one = contrast(word=word, low=low, high=0.06, effect=effect)
        evaluate = evaluate_result(contrasts=[one])
        (found,) = per_point(asked, trials, evaluate)
        assert (found["unit"], found["hours"]) == (unit, pytest.approx(hours))  # of two fits, one
        # Dear where the gain is at the low end of its interval.
        want = {"per_point": hours / 3, "least": hours / 6, "most": hours / 1}
        assert {name: found[name] for name in want} == (
            pytest.approx(want) if gained else dict.fromkeys(want)
        )


def test_a_large_table_stands_beside_the_page() -> None:
    small, large = as_csv([{"a": 1}]), as_csv([{"a": "x" * 200_000}])
    (_, inside), *others = links({"small.csv": small, "large.csv": large}, "other.parquet")
    assert inside.startswith("data:text/csv")
    assert others == [("large.csv", "tables/large.csv"),
                      ("other.parquet", "tables/other.parquet")]  # fmt: skip


def study(**fields: Any) -> dict[str, Any]:
    return Study.model_validate(
        {
            "name": "s", "reader": {"name": "digits"}, "preprocess": {"size": 16, "channels": "L"},
            "split": {"group": "none"}, "classifier": {"name": "small"},
            "generators": {
                "ddpm": {"name": "ddpm", "train_steps": 70}, "t": {"name": "traditional"},
            },
            "request": {"ratio": 2}, **fields,
        }
    ).model_dump(mode="json")  # fmt: skip


INGEST = IngestResult(
    counts={split: {"a": 10, "b": 40} for split in ("train", "val", "test")},
    carved=["val", "test"], near_limit={"fine": 0.9},
)  # fmt: skip
AMOUNTS = {"sd to 500": Amount(balance_to=500), "sd +64": Amount(per_class=64)}


def arm(
    name: str, family: str, ratio: float | None, role: str = "compared",
    generators: tuple[str, ...] = ("ddpm",), **fields: Any,
) -> Arm:  # fmt: skip
    return Arm(name=name, family=family, mixes=("mix",), ratio=ratio, role=role,
               generators=generators, **fields)  # fmt: skip


def results(
    fits: int, contrasts: int, opened: int = 1, more: tuple[Arm, ...] = ()
) -> tuple[SearchSpec, SearchResult, EvaluateResult]:
    arms = (
        arm("real", "real", 0.0, "baseline", ()),
        arm("real_double", "real_double", 0.0, "shown", (), budget=2.0),
        arm("ddpm x1", "ddpm", 1.0),
    )
    spec = SearchSpec.model_construct(
        generator_fits=fits, seeds=tuple(range(2 * fits)), arms=(*arms, *more)
    )
    search = search_result(trials=dict.fromkeys("abcd", ""),
                           arms={"real": val_mean(0.5), "ddpm x1": val_mean(0.5)})  # fmt: skip
    evaluate = evaluate_result(
        contrasts=[contrast(arm="ddpm x1", replicates=fits)] * contrasts,
        arms={"real": arm_result()}, test=OpenedTest(images=50, groups=50, opened=opened),
    )  # fmt: skip
    return spec, search, evaluate


def test_the_protocol_in_words_says_what_was_done() -> None:
    spec, search, evaluate = results(fits=3, contrasts=2, opened=4)
    training = {"steps": 50, "rotate": 5, "label_smoothing": 0.1}
    text = "\n".join(
        methods(
            study(training=training), INGEST, spec, AMOUNTS, search, evaluate, {"torch": "2"}, "0.1"
        )
    )
    for said in (
        "50 training, 50 validation and 50 test images in 2 classes (10 to 40",
        "15% for validation and 20% for test were set apart at random",
        "no groups are recorded", "ddpm (70 optimizer steps) and t (traditional)",
        "ddpm was trained and its images were drawn 3 times; images of t, which is not"
        " trained, were drawn 3 times", "from training images alone",
        "for every arm except real double (2 times as many steps)",
        "exclude zero after that adjustment", "not allowed across splits",
        "at a ratio of 1 per real training image", "3 blocks (16, 32, 64 channels)",
        "Images of ddpm were filtered by",
        "50 optimizer steps", "label smoothing 0.1", "rotate 5", "2 seeds for each of 3",
        "by 4 studies in this storage", "adjusted for 2 comparisons (Holm 1979)",
        "within ± 1 point (two", "fewer than 5 replicates, as here, neither", "torch 2",
        "synthetic-training",
    ):  # fmt: skip
        assert said in text, said
    spec, search, evaluate = results(fits=1, contrasts=1)
    grouped = study(split={"group": "column"}, curate={"filters": []})
    given = INGEST.model_copy(update={"carved": []})
    text = "\n".join(methods(grouped, given, spec, AMOUNTS, search, evaluate, {}, "1"))
    for said in ("the splits are those of the data", "are in one split", "drawn once",
                 "were not filtered",
                 "no online augmentation", "these choices, once,"):  # fmt: skip
        assert said in text, said
    assert "Holm" not in text


def test_images_are_told_as_they_were_made_and_added() -> None:
    more = (
        arm("sd x0.25", "sd", 0.25, generators=("sd",)),
        arm("sd to 500", "sd", None, generators=("sd",)),
        arm("sd +64", "sd", None, generators=("sd",)),
        arm("both x1", "both", 1.0, generators=("ddpm", "sd")),
        arm("ddpm only", "ddpm only", None, "shown"),
        arm("ddpm unfiltered x1", "ddpm unfiltered", 1.0, "shown", twin_of="ddpm x1"),
    )
    spec, search, evaluate = results(fits=4, contrasts=0, more=more)
    made = {
        "ddpm": {"name": "ddpm", "train_steps": 70},
        "sd": {"name": "diffusion", "model": "../models/sd15"},
        "given": {"name": "folder", "reader": {"name": "imagefolder", "root": "/x"}},
    }
    values = study(generators=made, search={"combine": {"both": ["ddpm", "sd"]}},
                   audit={"on_leak": "drop"}, tune={"tried": 12})  # fmt: skip
    text = "\n".join(methods(values, INGEST, spec, AMOUNTS, search, evaluate, {}, "1"))
    for said in (
        "ddpm (70 optimizer steps), from training images alone",
        "sd (diffusion), by the pretrained checkpoint sd15 without adaptation",
        "given (folder), from images of a folder",
        "images of sd and given, which are not trained, were drawn 4 times",
        "at ratios of 0.25 and 1 per real training image of the class; or up to 500 training images"
        " of each class; or 64 to each class",
        "As “both”, images of ddpm and sd were added together",
        "on images of ddpm alone, as many", "as many images without filters",
        "across splits removed from the earlier split", "means over 4 generator fits",
        "chosen from 12 tried on validation",
    ):  # fmt: skip
        assert said in text, said
    alone = study(generators={"given": made["given"]})
    text = "\n".join(methods(alone, INGEST, spec, AMOUNTS, search, evaluate, {}, "1"))
    assert "training images alone" not in text
    assert "and its images were drawn" not in text
    spec = spec.model_copy(update={"generator_fits": 1})
    (draw,) = (one for one in not_known(alone, INGEST, spec, search, evaluate) if "draw" in one)
    assert "training" not in draw


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
    assert classifier_in_words(spec) == want
    assert network_in_words(spec) == want


def test_what_is_not_known_is_said() -> None:
    # Twins of what was not chosen were never trained.
    twin = arm("ddpm unfiltered x1", "ddpm unfiltered", 1.0, "shown", twin_of="ddpm")
    spec, search, evaluate = results(fits=1, contrasts=1, more=(twin,))
    text = "\n".join(not_known(study(), INGEST, spec, search, evaluate))
    assert "near duplicates" not in text
    only_exact = INGEST.model_copy(update={"near_limit": {}})
    told = not_known(study(), only_exact, spec, search, evaluate)
    assert any("near duplicates" in said for said in told)
    for said in ("were trained once, and all images were drawn once", "no groups are given",
                 "Whether ddpm x1 helps",                 "How 1 arm would perform"):  # fmt: skip
        assert said in text, said
    spec, search, evaluate = results(fits=5, contrasts=0)
    evaluate.arms["ddpm x1"] = arm_result()
    text = "\n".join(not_known(study(split={"group": "column"}), INGEST, spec, search, evaluate))
    for said in ("drawn once", "no groups", "helps", "stayed closed"):
        assert said not in text, said


def test_a_study_s_notes_are_told_and_change_the_report_s_key_alone() -> None:
    noted = study(notes=["The scanner changed in May."])
    spec, search, evaluate = results(fits=1, contrasts=0)
    told = not_known(noted, INGEST, spec, search, evaluate)
    assert "Note of the study: The scanner changed in May." in told
    keys = [{step.label: step.key for step in plan(Study.model_validate(values))}
            for values in (study(), noted)]  # fmt: skip
    assert {label for label, key in keys[0].items() if keys[1][label] != key} == {"report"}


def test_words_are_listed() -> None:
    assert [listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == [
        "a", "a and b", "a, b and c"
    ]  # fmt: skip
