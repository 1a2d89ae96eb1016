"""Relabel and revise: which labels voters change, and what the data is afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from engine.core import rows
from engine.core.errors import StudyError
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.plan import data_set, named, plan
from engine.results.data import IngestResult, RelabelResult
from engine.study import Study
from tests.conftest import bar
from tests.pages import plain_text
from tests.text_image import save_clip

Run = Callable[[Study, str], Manifest]
COUNT = 60
# Numbers of the images of `across` that show a bar downwards.
WRONG = (3, 11, 27, 40)


@pytest.fixture
def noisy_study(tmp_path: Path, toy_study: Callable[..., Study]) -> Callable[..., Study]:
    """A function from fields to a study of bars with a few wrong labels."""
    root = tmp_path / "bars"
    for name in ("across", "down"):
        (root / name).mkdir(parents=True)
        for number in range(COUNT):
            shown = "down" if name == "across" and number in WRONG else name
            bar(shown, number + 1000 * (shown != name)).save(root / name / f"{number:03d}.png")

    def make(**fields: Any) -> Study:
        defaults: dict[str, Any] = {
            "preprocess": {"size": 16, "channels": "L"}, "cluster": {"k": 1},
            "split": {"group": "none", "val": 0.2, "test": 0.2},
            "training": {"steps": 60, "batch_size": 16, "evaluate_every": 20,
                         "learning_rate": 0.01},
            "relabel": {
                "folds": 3, "sure": 0.5,
                "voters": {"small": {"classifier": {"name": "small", "channels": [8, 16]}},
                           "wide": {"classifier": {"name": "small", "channels": [16, 16]}},
                           "knn": {"labeler": {"name": "knn", "k": 5}}},
            },
        }  # fmt: skip
        return toy_study(root, **{**defaults, **fields})

    return make


def labels_of(store: Store, manifest: Manifest, split: str) -> dict[str, str]:
    table = pa.concat_tables(
        store.tables(manifest.keys(split=split), [rows.URI, rows.label_column("class")])
    )
    columns = (table[name].to_pylist() for name in table.column_names)
    return dict(zip(*columns, strict=True))


def test_wrong_labels_of_train_and_val_are_replaced_and_test_stays(
    noisy_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    study = noisy_study()
    ingest, relabel = run_until(study, "ingest"), run_until(study, "relabel")
    votes = pa.concat_tables(store.tables(relabel.keys(table="votes"))).to_pylist()
    assert {row[rows.SPLIT] for row in votes} == {"train", "val"}
    wrong = {f"across/{number:03d}.png" for number in WRONG}
    voted = wrong & {row[rows.URI] for row in votes}
    assert voted
    changed = {row[rows.URI]: (row["label_was"], row["label"]) for row in votes if row["changed"]}
    assert voted <= changed.keys()
    assert all(changed[uri] == ("across", "down") for uri in voted)
    assert len(changed) <= len(voted) + 3

    revised = run_until(study, "revise")
    for split in rows.SPLITS:
        before, after = labels_of(store, ingest, split), labels_of(store, revised, split)
        expected = {uri: changed[uri][1] if uri in changed else label
                    for uri, label in before.items()}  # fmt: skip
        assert after == expected
        assert split != "test" or after == before
    result, old = IngestResult.of(revised), IngestResult.of(ingest)
    assert sum(result.relabelled.values()) == len(changed)
    assert result.counts["test"] == old.counts["test"]
    assert sum(result.train.values()) == sum(old.train.values())
    summary = RelabelResult.of(relabel).splits["train"]
    assert summary.changed == result.relabelled["train"]
    assert sum(sum(of.values()) for of in summary.pairs.values()) == summary.changed

    (page,) = [part.key for part in relabel.parts if part.key.endswith(".html")]
    text = plain_text(store.read(page).decode())
    assert "Which labels were changed?" in text
    assert next(iter(voted)) in text


def test_image_is_seen_only_by_models_that_did_not_learn_from_its_group(
    noisy_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    study = noisy_study()
    run_until(study, "relabel")
    mixes = named(plan(study), "mix")[:3]
    train = set(labels_of(store, run_until(study, "ingest"), "train"))
    left_out = []
    for mix in mixes:
        (members,) = store.tables(run_until(study, mix.label).keys(table="members"))
        left_out.append(len(train) - members.num_rows)
    # Each image is left out once.
    assert sum(left_out) == len(train)
    assert min(left_out) > 0


def test_model_of_images_and_texts_votes_without_training(
    noisy_study: Callable[..., Study], run_until: Run, store: Store, tmp_path: Path
) -> None:
    clip = {"name": "clip", "model": str(save_clip(tmp_path / "clip"))}
    small = {"classifier": {"name": "small", "channels": [8, 16]}}
    relabel = {"folds": 2, "voters": {"clip": {"labeler": clip}, "small": small}}
    manifest = run_until(noisy_study(relabel=relabel), "relabel")
    votes = pa.concat_tables(store.tables(manifest.keys(table="votes")))
    assert set(votes["seen.clip"].to_pylist()) <= {"across", "down"}
    agreed = RelabelResult.of(manifest).splits["val"].agreement["clip"]
    val = votes.filter(pc.equal(votes[rows.SPLIT], "val"))
    same = pc.equal(val["seen.clip"], val["label_was"]).to_pylist()
    assert agreed == pytest.approx(sum(same) / len(same))
    # The tiny model sees one class everywhere.
    (notice,) = RelabelResult.of(manifest).warnings
    assert (notice.code, notice.fields["split"]) == ("weak_voters", "train")


def test_later_steps_use_the_revised_data(noisy_study: Callable[..., Study]) -> None:
    steps = plan(noisy_study(generators={"t": "traditional"}))
    assert data_set(steps).kind == "revise"
    for kind in ("cluster", "select", "request", "generate"):
        assert named(steps, kind)[0].inputs["ingest"].kind == "revise"
    assert data_set(plan(noisy_study(relabel=None))).kind == "ingest"


def test_test_changes_only_if_the_study_says_so_and_every_figure_is_marked(
    noisy_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    voters = {name: {"classifier": {"name": "small", "channels": [8, width]}}
              for name, width in (("a", 8), ("b", 16))}  # fmt: skip
    relabel = {"folds": 2, "voters": voters, "sure": 0.5, "test_too": True}
    study = noisy_study(
        relabel=relabel, classifier={"name": "small", "channels": [8, 16]},
        generators={"t": "traditional"}, curate={"filters": []}, fidelity={"enabled": False},
        search={"ratios": [1], "seeds": 2, "confirm_fits": 1, "arms": []},
    )  # fmt: skip
    votes = pa.concat_tables(store.tables(run_until(study, "relabel").keys(table="votes")))
    assert "test" in votes[rows.SPLIT].to_pylist()
    report = run_until(study, "report")
    if IngestResult.of(run_until(study, "revise")).relabelled.get("test"):
        (key,) = [part.key for part in report.parts if part.key.endswith(".html")]
        text = plain_text(store.read(key).decode())
        assert "labels of test were changed by classifiers" in text
        assert "macro F1 (test relabelled)" in text
    knn = {"folds": 2, "voters": {**voters, "knn": {"labeler": "knn"}}, "test_too": True}
    with pytest.raises(StudyError, match=r"relabel\.voters\.knn: test has no vectors"):
        plan(noisy_study(relabel=knn))


@pytest.mark.parametrize(
    ("voter", "message"),
    [
        ({}, "needs either labeler or classifier"),
        ({"labeler": "knn", "classifier": "small"}, "needs either labeler or classifier"),
        ({"labeler": "classifier"}, "classifier is trained; name it as classifier"),
    ],
)
def test_impossible_voter_is_refused(
    noisy_study: Callable[..., Study], voter: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        noisy_study(relabel={"voters": {"a": voter, "b": {"labeler": "knn"}}})
