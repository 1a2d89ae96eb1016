"""Curation through the real steps: labelers and filters together, on bars and on tiny CLIP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from engine.core import rows
from engine.core.errors import DataError, StudyError
from engine.core.manifest import Manifest, read_manifest
from engine.core.store import Store
from engine.data.images import decode_own
from engine.execute import discard
from engine.export import export
from engine.plan import named, plan
from engine.profile import Profile
from engine.report.tiles import choose_tiles
from engine.steps.curate import CurateSpec
from engine.study import Study
from tests.conftest import write_bars
from tests.text_image import save_clip

# Only what differs from the finished study of bars is computed.
pytestmark = pytest.mark.usefixtures("resumed")

Run = Callable[[Study, str], Manifest]


def table_of(store: Store, manifest: Manifest) -> pa.Table:
    return pa.concat_tables(store.tables(manifest.keys(table="curated")))


def half_lying(bars_study: Callable[..., Study], folder: Path, label_from: str) -> Study:
    """Half of the generated images of "down" lie across; the labels come from neighbours."""
    write_bars(folder / "mixed", {"down": 30}, 7000)
    write_bars(folder / "mixed", {"down": 15}, 9000, {"down": "across"})
    return bars_study(
        "mixed", search={"ratios": [0.5], "seeds": 2},
        curate={"labeler": {"name": "knn", "k": 5}, "max_rounds": 1,
                "filters": [{"name": "agreement", "label_from": label_from}]},
    )  # fmt: skip


def test_every_filter_and_a_zero_shot_labeler_in_one_study(
    bars_study, run_until: Run, store: Store, tmp_path: Path
) -> None:
    words = {"model": str(save_clip(tmp_path)), "words": {"across": "cat", "down": "dog"}}
    filters = [
        "agreement", {"name": "similarity", **words}, "realism", "blank", "copies", "duplicates",
    ]  # fmt: skip
    study = bars_study(
        curate={"labeler": {"name": "clip", **words}, "filters": filters, "max_rounds": 1}
    )
    # An untrained labeler needs no training step, and both are applied to val in one step.
    labels = [step.label for step in plan(study)]
    assert "train.labeler" not in labels
    assert labels.count("measure.val") == 1
    curated = run_until(study, "curate")
    told = curated.metrics["filters"]
    assert [entry["name"] for entry in told] == [
        one if isinstance(one, str) else one["name"] for one in filters
    ]
    table = table_of(store, curated)
    columns = {
        "similarity.similarity", "realism.realism", "realism.density", "blank.contrast",
        "blank.sharpness", "copies.nearest_id", "copies.distance", "copies.bits",
        "duplicates.duplicate_of", "duplicates.distance",
    }  # fmt: skip
    assert columns == {name for name in table.column_names if "." in name}
    reasons = table[rows.REASON].to_pylist()
    for entry in told:
        assert entry["dropped"] == reasons.count(entry["name"])
    assert curated.rows == reasons.count("") == sum(table[rows.KEPT].to_pylist())
    seen = np.asarray(curated.metrics["labeler"]["confusion"])
    assert seen.sum() == table.num_rows
    assert seen[0].sum() == 0  # "across" was not asked for
    assert table[rows.LABEL_SEEN].to_pylist().count("down") == seen[1, 1]
    measured = named(plan(study), "measure.val")[0]
    assert sum(curated.metrics["labeler"]["confusion_val"][0]) > 0
    assert set(measured.inputs) == {"ingest"}


def test_knn_labeler_uses_embeddings_without_reading_pixels(
    bars_study, run_until: Run, store: Store, tmp_path: Path
) -> None:
    study = half_lying(bars_study, tmp_path, "agree")
    assert not {"train.labeler", "measure.val"} & {step.label for step in plan(study)}
    curated = run_until(study, "curate")
    metrics = curated.metrics["labeler"]
    table = table_of(store, curated)
    intended, seen = (table[name].to_pylist() for name in (rows.LABEL_INTENDED, rows.LABEL_SEEN))
    agree = [one == other for one, other in zip(intended, seen, strict=True)]
    assert table[rows.KEPT].to_pylist() == agree
    assert metrics["agreement"] == pytest.approx(np.mean(agree))
    assert metrics["agreement_kept"] == 1.0


def test_without_a_labeler_no_class_is_predicted(bars_study, run_until: Run, store: Store) -> None:
    study = bars_study(curate={"labeler": None, "filters": ["blank"], "max_rounds": 1})
    curated = run_until(study, "curate")
    assert "labeler" not in curated.metrics
    table = table_of(store, curated)
    assert table[rows.LABEL_SEEN].null_count == table.num_rows > 0


def test_changed_limit_measures_nothing_again(bars_study, run_until: Run, store: Store) -> None:
    def shards() -> set[str]:
        return {key for key in store.listing("generated") if "/scores/" in key}

    for quantile in (0.01, 0.1):
        filters = [{"name": "blank", "quantile": quantile}]
        run_until(bars_study(curate={"filters": filters, "max_rounds": 1}), "curate")
        if quantile == 0.01:
            first = shards()
    assert first
    assert shards() == first


def test_strict_stops_the_export_of_copies(
    bars_study, run_until: Run, store: Store, tmp_path: Path
) -> None:
    write_bars(tmp_path / "copied", {"down": 60}, 5000)
    for number, path in enumerate(sorted((tmp_path / "real" / "down").glob("*.png"))):
        (tmp_path / "copied" / "down" / f"{number:04d}.png").write_bytes(path.read_bytes())
    curate = {"filters": [{"name": "copies", "strict": True}], "max_rounds": 2}
    study = bars_study("copied", curate=curate, search={"ratios": [1], "seeds": 2})
    curated = run_until(study, "evaluate")
    assert curated.metrics["contrasts"]
    for what in ("more", "more x1"):
        said = r"more is not exported: copies of training images: \d+ of \d+ .* strict: true"
        with pytest.raises(DataError, match=said):
            export(study, store, Store(str(tmp_path / "out")), what, "csv", ["train"])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert export(study, store, Store(str(tmp_path / "real-only")), "real", "csv", ["train"])


def test_scores_belong_to_their_images_and_classes(
    bars_study, run_until: Run, store: Store, profile: Profile, tmp_path: Path
) -> None:
    study = bars_study(curate={"labeler": "knn", "filters": ["blank"], "max_rounds": 1})
    run_until(study, "curate")
    # Other images under the same names.
    for path in (tmp_path / "good" / "down").glob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 2).save(path)
    steps = {step.label: step for step in plan(study)}
    discard(steps["generate.more"], store)
    curated = run_until(study, "curate")
    made = read_manifest(store, steps["generate.more"])
    assert made is not None
    keys = [part.key for part in made.parts if "label" in part.tags]
    contrast_of = {
        image_id: decode_own(image["bytes"]).std() / 255
        for table in store.tables(keys)
        for image_id, image in zip(
            table[rows.IMAGE_ID].to_pylist(), table[rows.IMAGE].to_pylist(), strict=True
        )
    }
    table = table_of(store, curated)
    for image_id, contrast in zip(
        table[rows.IMAGE_ID].to_pylist(), table["blank.contrast"].to_pylist(), strict=True
    ):
        assert contrast == pytest.approx(contrast_of[image_id], abs=1e-4)


def test_judging_filter_does_not_repeat_measurements(
    bars_study, run_until: Run, store: Store
) -> None:
    def shards() -> set[str]:
        return {key for key in store.listing("generated") if "/scores/" in key}

    run_until(bars_study(curate={"filters": ["blank"], "max_rounds": 1}), "curate")
    before = shards()
    run_until(bars_study(curate={"filters": ["blank", "realism"], "max_rounds": 1}), "curate")
    assert before == shards()


def test_relabelled_images_are_reported(
    bars_study, run_until: Run, store: Store, tmp_path: Path
) -> None:
    study = half_lying(bars_study, tmp_path, "labeler")
    curated = run_until(study, "curate")
    assert curated.metrics["labeler"]["agreement"] < 1
    assert curated.metrics["labeler"]["agreement_kept"] == 1.0
    table = table_of(store, curated)
    assert curated.rows == table.num_rows
    kept, _ = choose_tiles(table)
    assert set(kept) == {"across", "down"}


@pytest.mark.parametrize(
    ("curate", "said"),
    [
        (
            {"filters": ["similarity", {"name": "agreement", "label_from": "labeler"}]},
            "remove one of the two",
        ),
        ({"filters": ["copies", "copies"]}, "filters names copies twice"),
        ({"labeler": None}, "filters: agreement needs a labeler, but labeler is null"),
        ({"filters": ["beauty"]}, r"no filter named 'beauty'; choose from agreement, blank"),
        ({"labeler": "oracle"}, r"no labeler named 'oracle'; choose from classifier, clip, knn"),
        ({"filters": [{"name": "copies", "quantile": 0.9}]}, "quantile: must be less than or"),
    ],
)
def test_impossible_curation_is_rejected(bars_study, curate: dict, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        bars_study(curate=curate)


def test_images_of_other_classes_are_an_alarm_and_stop_the_first_fit_if_asked(
    bars_study: Callable[..., Study], run_until: Run, store: Store, tmp_path: Path
) -> None:
    swapped = {"across": "down", "down": "across"}
    write_bars(tmp_path / "noise", {"across": 100, "down": 100}, 7000, swapped)
    fields = {
        "split": {"group": "none", "test": 0.1, "val": 0.5},
        "request": {"ratio": 1, "classes": "all", "shard_size": 16},
    }
    knn = {"labeler": {"name": "knn", "k": 5}, "filters": ["blank"]}
    curated = run_until(bars_study("noise", curate={**knn, "max_rounds": 1}, **fields), "curate")
    codes = {entry["code"] for entry in curated.metrics["warnings"]}
    assert "shows_no_class" in codes
    study = bars_study(
        "noise", curate={**knn, "stop_if_useless": True}, **fields,
        search={"ratios": [1], "confirm_fits": 2, "seeds": 2},
    )  # fmt: skip
    with pytest.raises(DataError, match=r"curate\.more: this generator may have learnt no"):
        run_until(study, "curate.more")
    # Replicates that confirm are never stopped, nor are later rounds.
    stopping = [
        step.label for step in plan(study)
        if step.kind == "curate" and getattr(step.spec_as(CurateSpec), "stop_if_useless", False)
    ]  # fmt: skip
    assert stopping == ["curate.more"]
