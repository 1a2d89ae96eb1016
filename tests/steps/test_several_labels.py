"""Studies with several labels per image, from files to the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from engine.core import rows
from engine.core.errors import DataError, StudyError
from engine.core.manifest import Manifest
from engine.core.registry import kind_of
from engine.core.step import Step
from engine.core.store import Store
from engine.data.dataset import generated_images
from engine.execute import execute
from engine.export import export
from engine.plan import plan
from engine.profile import Profile
from engine.results.comparison import EvaluateResult, TrainResult
from engine.results.data import IngestResult
from engine.results.images import AllocateResult
from engine.runtime.inline import InlineRuntime
from engine.steps.ingest import IngestSpec
from engine.study import Study
from tests.conftest import bar
from tests.pages import plain_text
from tests.text_image import save_clip

DDPM = {"name": "ddpm", "block_out_channels": [8, 16], "layers_per_block": 1,
        "attention_resolution": 4, "train_steps": 2, "batch_size": 8,
        "num_inference_steps": 2}  # fmt: skip


def spotted(number: int, way: str, sides: tuple[str, ...]) -> Image.Image:
    """A bar with a bright spot in the upper corners of these sides."""
    picture = bar(way, number).resize((24, 24))
    for side in sides:
        picture.paste(255, (0, 0, 5, 5) if side == "left" else (19, 0, 24, 5))
    return picture


@pytest.fixture
def spots_study(tmp_path: Path, toy_study: Callable[..., Study]) -> Callable[..., Study]:
    """A function from fields to a study of two tasks: the way of a bar, which every ninth image
    lacks, and the sides that have spots. All images are of one site."""
    root = tmp_path / "data"
    root.mkdir()
    lines = ["path,way,sides,site"]
    for number in range(160):
        way = ("across", "down")[number % 2]
        sides = ((), ("left",), ("right",), ("left", "right"))[number // 2 % 4]
        spotted(number, way, sides).save(root / f"{number:03d}.png")
        written = "" if number % 9 == 7 else way
        lines.append(f"{number:03d}.png,{written},{'|'.join(sides) or '-'},one")
    (root / "t.csv").write_text("\n".join(lines) + "\n")

    def make(**fields: Any) -> Study:
        defaults: dict[str, Any] = {
            "tasks": {"way": {"weight": 3}, "sides": {"none": "-"}}, "rare_below": 4,
            "preprocess": {"size": 24, "channels": "L"},
            "split": {"group": "none", "val": 0.2, "test": 0.3}, "cluster": {"k": 1},
            "classifier": {"name": "small", "channels": [8, 16]}, "curate": {"filters": []},
            "training": {"steps": 40, "batch_size": 16, "evaluate_every": 20,
                         "learning_rate": 0.01},
            "search": {"ratios": [1], "seeds": 2, "confirm_fits": 1, "arms": []},
            "generators": {"t": {"name": "traditional"}}, "request": {"ratio": 1},
            "fidelity": {"enabled": False},
        }  # fmt: skip
        reader = {
            "name": "csv", "root": str(root), "file": "t.csv", "multi": {"sides": "|"},
            "labels": {"way": "way", "sides": "sides", "site": "site"},
        }  # fmt: skip
        return toy_study(fields.pop("reader", reader), **{**defaults, **fields})

    return make


@pytest.fixture
def run_all(store: Store, profile: Profile) -> Callable[[Study], dict[str, Manifest]]:
    """A function that runs a study; returns the manifests by label."""

    def run(study: Study) -> dict[str, Manifest]:
        steps: list[Step] = plan(study)
        manifests = execute(steps, store, InlineRuntime(), profile)
        return {step.label: manifests[step.key] for step in steps}

    return run


def test_two_tasks_from_files_to_the_page(
    spots_study: Callable[..., Study], run_all: Callable[[Study], dict[str, Manifest]],
    store: Store, tmp_path: Path,
) -> None:  # fmt: skip
    done = run_all(spots_study(
        curate={"filters": []}, generators={"t": {"name": "traditional"}, "d": DDPM},
        evaluate={
            "zero_shot": {"model": str(save_clip(tmp_path / "clip")),
                          "words": {"across": "a line", "left": "a spot"}},
        },
    ))  # fmt: skip
    data = IngestResult.of(done["ingest"])
    # Eight complete combinations; the 17 images without a way have four of their own.
    assert len(data.targets) == 8
    assert {name for name in data.classes if name not in data.cells} <= {
        "?, none", "?, left", "?, right", "?, left + right", "rare combinations"
    }  # fmt: skip

    # Images are requested for complete combinations, and have all their labels.
    keys = generated_images(done["generate.t"])
    columns = ["label.cell", "label.way", "label.sides"]
    generated = pa.concat_tables(store.tables(keys, columns)).to_pylist()
    assert Counter(row["label.cell"] for row in generated) == data.targets
    for row in generated:
        labels = data.cells[row["label.cell"]]
        assert (labels["way"], labels["sides"]) == (row["label.way"], tuple(row["label.sides"]))
    (members,) = store.tables(done["mix.t.x1"].keys(table="members"))
    assert members["label.way"].null_count == data.labels["way"].unlabelled["train"]

    result = EvaluateResult.of(done["evaluate"])
    way, sides = result.tasks["way"], result.tasks["sides"]
    assert (way.weight, way.kind, sides.kind) == (0.75, "single", "multi")
    assert way.images < sides.images == result.test.images
    for arm in result.arms:
        for metric in ("macro_f1", "accuracy", "roc_auc"):
            assert result.arms[arm].figures[metric].mean == pytest.approx(
                0.75 * way.arms[arm].figures[metric].mean
                + 0.25 * sides.arms[arm].figures[metric].mean
            )
    assert result.joint is not None
    assert sum(one.images for one in result.joint.combinations) <= result.joint.images
    assert {(pair.first, pair.second) for pair in result.pairs} >= {("real", "t x1")}
    assert result.zero_shot is not None
    assert set(result.zero_shot.tasks) == {"way", "sides"}

    (predictions,) = [pa.concat_tables(store.tables(done["evaluate"].keys(table="predictions")))]
    way_of = np.asarray(predictions["probabilities.way"].to_pylist())
    np.testing.assert_allclose(way_of.sum(1), 1, atol=1e-5)
    assert predictions["decided.sides"].type == pa.list_(pa.string())

    (key,) = [part.key for part in done["report"].parts if part.key.endswith(".html")]
    text = plain_text(store.read(key).decode())
    for expected in (
        "combinations of labels of way (2) and sides (2)", "By task, points compared with",
        "75% of the objective", "All labels of an image", "Errors in two tasks at once",
        "How sure the classifiers are: sides", "Every pair of tested arms",
        "Without any training",
    ):  # fmt: skip
        assert expected in text, expected


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_export_has_the_labels_of_every_task_and_is_read_back(
    spots_study: Callable[..., Study], run_until: Callable[[Study, str], Manifest], store: Store,
    tmp_path: Path, form: str,
) -> None:  # fmt: skip
    study = spots_study(classifier=None)
    run_until(study, "generate")
    data = IngestResult.of(run_until(study, "ingest"))
    export(study, store, Store(str(tmp_path / "out")), "t", form, rows.SPLITS)
    fields: dict[str, Any] = {
        "name": form, "root": str(tmp_path / "out"), "split": "split", "id": "image_id",
        "labels": {"way": "label.way", "sides": "label.sides", "source": "source"},
    }  # fmt: skip
    multi = {
        "csv": {"file": "labels.csv", "multi": {"sides": "|"}}, "parquet": {"multi": ["sides"]},
    }  # fmt: skip
    # What csv writes where no label applies.
    nothing = {"csv": ("none",), "parquet": ()}[form]
    reader = spots_study(reader={**fields, **multi[form]}).reader
    read = kind_of("readers", reader)(reader).records().to_pylist()
    made = [row for row in read if row["label.source"] == "t"]
    assert Counter((row["label.way"], tuple(row["label.sides"] or ())) for row in made) == {
        (labels["way"], labels["sides"] or nothing): data.train[name]
        for name, labels in data.cells.items()
    }  # fmt: skip
    real = [row for row in read if row["label.source"] == "real"]
    assert sum(row["label.way"] is None for row in real) == sum(
        data.labels["way"].unlabelled.values()
    )


def test_classifiers_of_two_tasks_learn_both(
    spots_study: Callable[..., Study], run_until: Callable[[Study, str], Manifest]
) -> None:
    training = {"steps": 150, "batch_size": 32, "evaluate_every": 50, "learning_rate": 0.01}
    study = spots_study(
        training=training, curate={"filters": ["agreement"]}, generators={"d": DDPM}
    )
    train = TrainResult.of(run_until(study, "train.labeler"))
    for name in ("way", "sides"):
        assert train.val.tasks[name].figures["macro_f1"] > 0.9
    assert list(train.val.per_class) == ["way: across", "way: down", "sides: left", "sides: right"]
    for metric in ("macro_f1", "accuracy"):
        assert train.val.figures[metric] == pytest.approx(
            0.75 * train.val.tasks["way"].figures[metric]
            + 0.25 * train.val.tasks["sides"].figures[metric]
        )
    # A task with one label per image reads no threshold.
    assert train.thresholds[:2] == [0.5, 0.5]
    # The labeler sees combinations, and only complete ones.
    measured = run_until(study, "measure.val")
    assert measured.rows == sum(IngestResult.of(run_until(study, "ingest")).counts["val"].values())


def test_labels_stand_for_their_combinations_in_a_request(
    spots_study: Callable[..., Study], run_until: Callable[[Study, str], Manifest]
) -> None:
    study = spots_study(classifier=None, request={"ratio_by_class": {"left": 2, "way: down": 1}})
    data = IngestResult.of(run_until(study, "ingest"))
    counts = run_until(study, "request").metrics["counts"]
    for name, labels in data.cells.items():
        ratio = 2 if "left" in labels["sides"] else 1 if labels["way"] == "down" else 0
        assert counts.get(name, 0) == ratio * data.train[name]
    grouped = spots_study(classifier=None, request={
        "ratio": 1, "class_groups": {"marked": ["left", "right"]}, "classes": ["marked"],
    })  # fmt: skip
    assert set(run_until(grouped, "request").metrics["counts"]) == {
        name for name, labels in data.cells.items() if labels["sides"]
    }
    unknown = spots_study(classifier=None, request={"ratio": 1, "classes": ["up"]})
    with pytest.raises(StudyError, match="unknown class 'up'"):
        run_until(unknown, "request")


def test_images_are_allocated_by_scores_on_val_before_any_is_generated(
    spots_study: Callable[..., Study], run_all: Callable[[Study], dict[str, Manifest]],
    store: Store, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    allocate = {"total": 60, "tiers": [[1.0, 1]]}
    done = run_all(spots_study(request={"allocate": allocate}))
    said = capsys.readouterr().err
    assert said.index("F1 of its weakest label") < said.index("generate.t")
    images = AllocateResult.of(done["allocate"]).images
    assert sum(images.values()) == 60
    mix = done["mix.t.allocated"].metrics["added"]["t"]
    assert mix == {name: count for name, count in images.items() if count}
    (key,) = [part.key for part in done["report"].parts if part.key.endswith(".html")]
    assert "Who gets what, and why" in plain_text(store.read(key).decode())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": {"tone": {}}}, "tasks: the data has no task 'tone'; it has way, sides, site"),
        ({"tasks": {"way": {"none": "-"}}}, "way has one label per image; remove none"),
        ({"task": "way"}, "task and tasks exclude each other"),
        ({"request": {"allocate": {"total": 9}}, "classifier": None}, "tiers are by the scores"),
        (
            {"curate": {"filters": [{"name": "agreement", "match": ["tone"]}]}},
            r"match: 'tone': name tasks of the study \(way, sides\)",
        ),
    ],
)
def test_impossible_tasks_are_refused_when_planned(
    spots_study: Callable[..., Study], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        plan(spots_study(**fields))


def test_weights_and_not_the_order_of_tasks_leave_the_data_as_it_is(
    spots_study: Callable[..., Study],
) -> None:
    sides, way = {"none": "-"}, {"weight": 3}
    first = plan(spots_study(tasks={"way": way, "sides": sides}))
    heavier = plan(spots_study(tasks={"way": {"weight": 5}, "sides": sides}))
    turned = plan(spots_study(tasks={"sides": sides, "way": way}))
    assert first[0].key == heavier[0].key
    # Combinations are named in the order of the tasks.
    assert first[0].key != turned[0].key
    assert first[-1].key != heavier[-1].key


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rare_below": 100}, r"no combination of labels has 100 images.*lower rare_below"),
        ({"split": {"group": "none", "train_limit": {"left": 5}}}, "unknown class 'left'"),
        ({"tasks": {"way": {}, "site": {}}}, r"tasks\.site: there is one class alone"),
    ],
)
def test_data_unfit_for_its_tasks_is_refused(
    spots_study: Callable[..., Study], run_until: Callable[[Study, str], Manifest],
    fields: dict[str, Any], message: str,
) -> None:  # fmt: skip
    with pytest.raises(DataError, match=message):
        run_until(spots_study(**fields), "ingest")


def test_label_stands_for_every_combination_even_if_one_has_its_name(
    spots_study: Callable[..., Study], run_until: Callable[[Study, str], Manifest]
) -> None:
    study = spots_study(
        tasks={"sides": {"none": "-"}}, classifier=None, request={"ratio": 1, "classes": ["left"]}
    )
    assert set(run_until(study, "request").metrics["counts"]) == {"left", "left + right"}


def test_one_single_label_task_among_tasks_is_an_ordinary_study(
    spots_study: Callable[..., Study],
) -> None:
    alone, named = spots_study(tasks={"sides": {"none": "-"}}), spots_study(tasks={"way": {}})
    assert plan(alone)[0].spec_as(IngestSpec).task == "cell"
    ordinary = spots_study(tasks={}, task="way")
    assert [step.key for step in plan(named)][:-1] == [step.key for step in plan(ordinary)][:-1]
