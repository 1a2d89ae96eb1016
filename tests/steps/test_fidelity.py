"""Fidelity through the real steps: bars that are right, bars that lie wrong, copies of train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.arrays import vectors_of
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.metrics.diversity import vendi_score
from engine.metrics.frechet import frechet_distance
from engine.metrics.kernel import kernel_distance
from engine.metrics.prdc import prdc
from engine.plan import plan
from engine.steps._fidelity import scope_rows
from engine.steps.fidelity import Embedded, quotas
from engine.study import Study
from tests.conftest import write_bars

Run = Callable[[Study, str], Manifest]
BOTH = {"classes": "all", "per_class": 60}


@pytest.fixture
def both_study(tmp_path: Path, bars_study: Callable[..., Study]) -> Callable[..., Study]:
    """A study of a generator of both classes, 150 real images of each."""
    write_bars(tmp_path / "real", {"across": 150, "down": 150}, 0)
    write_bars(tmp_path / "good", {"across": 60, "down": 60}, 5000)

    def make(folder: str = "good", **fields: Any) -> Study:
        values = {
            "request": BOTH, "search": {"ratios": [0.2], "seeds": 2},
            "curate": {"filters": ["copies"], "max_rounds": 1}, **fields,
        }  # fmt: skip
        return bars_study(folder, **values)

    return make


def embedded(store: Store, keys: list[str], ids: set[str] | None = None) -> np.ndarray:
    table = pa.concat_tables(store.tables(keys, [rows.IMAGE_ID, rows.EMBEDDING]))
    held = [ids is None or name in ids for name in table[rows.IMAGE_ID].to_pylist()]
    return vectors_of(table)[held]


def labelled(store: Store, manifest: Manifest, split: str, label: str) -> set[str]:
    table = pa.concat_tables(store.tables(manifest.keys(split=split)))
    column = rows.label_column("class")
    return {
        name for name, value in zip(*(table[c].to_pylist() for c in (rows.IMAGE_ID, column)),
                                    strict=True) if value == label
    }  # fmt: skip


def test_figures_are_those_of_the_metrics_on_the_same_vectors(
    both_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    study = both_study(curate={"filters": [], "max_rounds": 1})
    found = run_until(study, "fidelity.more").metrics
    whole, across, down = found["scopes"]
    assert [scope["classes"] for scope in (whole, across, down)] == [
        ["across", "down"], ["across"], ["down"]
    ]  # fmt: skip
    ingest, embed = (run_until(study, name) for name in ("ingest", "embed"))
    val = embedded(store, embed.keys(split="val"), labelled(store, ingest, "val", "down"))
    generate = run_until(study, "generate.more")
    of_down = {
        name
        for table in store.tables([p.key for p in generate.parts if p.tags.get("label") == "down"])
        for name in table[rows.IMAGE_ID].to_pylist()
    }
    made = embedded(store, run_until(study, "fidelity.more").keys(), of_down)
    kept = down["sets"]["kept"]
    assert (down["val"], kept["n"], kept["sampled"]) == (len(val), 60, 60)
    assert kept["frechet"] == pytest.approx(frechet_distance(val, made), rel=1e-6)
    assert kept["vendi"] == pytest.approx(vendi_score(made), rel=1e-6)
    shares = prdc(val, made)
    assert [kept[name] for name in vars(shares)] == pytest.approx(list(vars(shares).values()))
    # Of length 1 they are, and of 256 numbers.
    kernel = kernel_distance(16 * val, 16 * made, 0)
    assert kept["kernel"][0] == pytest.approx(kernel.estimate, rel=1e-6)
    assert set(down["sets"]) == {"kept", "real"}  # nothing was dropped
    # They are of one distribution with the real ones.
    for figures in (*whole["sets"].values(), *across["sets"].values()):
        assert figures["kernel"][1] < 0 < figures["kernel"][2]


def test_all_sets_of_a_scope_have_as_many_images_in_the_mix_of_val(
    both_study: Callable[..., Study], run_until: Run, tmp_path: Path
) -> None:
    # Half of "down" lies across, and neighbours see it.
    write_bars(tmp_path / "mixed", {"across": 60, "down": 60}, 7000)
    write_bars(tmp_path / "mixed", {"down": 30}, 9000, {"down": "across"})
    study = both_study(
        "mixed", curate={"labeler": {"name": "knn", "k": 5}, "filters": ["agreement"],
                         "max_rounds": 1},
    )  # fmt: skip
    whole, _, down = run_until(study, "fidelity.more").metrics["scopes"]
    for scope in (whole, down):
        counts = {entry["n"] for entry in scope["sets"].values()}
        assert set(scope["sets"]) == {"kept", "generated", "real"}
        assert len(counts) == 1
        assert counts.pop() >= 20
    # What was dropped is what lay wrong.
    generated, kept, real = (down["sets"][name] for name in ("generated", "kept", "real"))
    assert generated["frechet"] > kept["frechet"] > 0.5 * real["frechet"]
    assert generated["precision"] < kept["precision"]
    assert generated["kernel"][0] > kept["kernel"][0]


def test_copies_of_train_are_nearer_than_held_out_images(
    both_study: Callable[..., Study], run_until: Run, tmp_path: Path
) -> None:
    for label in ("across", "down"):
        (tmp_path / "copied" / label).mkdir(parents=True)
        for path in sorted((tmp_path / "real" / label).glob("*.png"))[:60]:
            (tmp_path / "copied" / label / path.name).write_bytes(path.read_bytes())
    fields: dict[str, Any] = {
        "curate": {"filters": [], "max_rounds": 1}, "split": {"group": "none", "val": 0.4},
    }  # fmt: skip
    copied = run_until(both_study("copied", **fields), "fidelity.more").metrics
    new = run_until(both_study(**fields), "fidelity.more").metrics
    near = [held["scopes"][0]["sets"]["kept"]["near"] for held in (copied, new)]
    # Those of val and test among the sixty are no copies of train.
    assert near[0] > 0.2
    assert near[1] < 0.1
    assert any("nearer to a training image" in text for text in copied["warnings"])
    assert "near" not in copied["scopes"][0]["sets"]["real"]


def test_too_few_images_get_words_and_no_figures(
    bars_study: Callable[..., Study], run_until: Run
) -> None:
    study = bars_study(curate={"filters": [], "max_rounds": 1})
    (down,) = run_until(study, "fidelity.more").metrics["scopes"]
    assert down["few"].endswith(" in val")  # 30 real images in all
    assert down["sets"] == {}


def test_a_small_train_split_gives_no_floor_and_hinders_nothing(
    both_study: Callable[..., Study], run_until: Run
) -> None:
    split = {"group": "none", "train_limit": {"down": 8}}
    study = both_study(split=split, curate={"filters": [], "max_rounds": 1})
    whole, _, down = run_until(study, "fidelity.more").metrics["scopes"]
    assert down["sets"]["kept"]["n"] == 60
    assert down["sets"]["real"] == {"n": 8}
    assert whole["sets"]["real"] == {"n": 16}


def test_another_embedder_embeds_real_and_generated_images_for_this_alone(
    both_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    study = both_study(fidelity={"embedder": {"name": "pixels", "side": 4}})
    manifest = run_until(study, "fidelity.more")
    made = embedded(store, manifest.keys())
    assert made.shape == (120, 16)
    embed = run_until(study, "embed.fidelity")
    assert embedded(store, embed.keys(split="val")).shape[1] == 16
    assert run_until(both_study(), "fidelity.more").parts == ()  # curate has embedded them
    assert manifest.metrics["scopes"][0]["sets"]["kept"]["frechet"] > 0


def test_the_page_has_the_figures_of_every_set(
    both_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    study = both_study(
        curate={"filters": [], "max_rounds": 1}, search={"ratios": [0.2], "seeds": 2},
        training={"steps": 2, "batch_size": 8, "evaluate_every": 2}, fidelity={"k": 4},
    )  # fmt: skip
    (key,) = run_until(study, "report").keys(file="report.html")
    page = store.read(key).decode()
    scopes = run_until(study, "fidelity.more").metrics["scopes"]
    section = page[page.index("<h2>How like real images") : page.index("<h2>Where this comes")]
    for scope in scopes:
        for name, figures in scope["sets"].items():
            cells = f"<td>{figures['n']:,}</td><td>{figures['frechet']:.3g}</td>"
            told = {"kept": "generated, kept", "real": "real, from train"}[name]
            assert f"<td>{told}</td>{cells}" in section
    assert section.count("against 22 of val") == 2
    assert "all: across, down" in section
    assert "is largely the number&#39;s doing" in section


def test_a_scope_with_too_few_images_says_so() -> None:
    scope = {"classes": ["down"], "val": 40, "few": "", "sets": {"kept": {"n": 3}}}
    shown = scope_rows(scope)
    assert shown["rows"] == [{"set": "generated, kept", "real": False, "n": 3}]
    assert (shown["title"], shown["whole"]) == ("down", False)


@pytest.mark.parametrize("n", [1, 7, 20, 100])
def test_a_mix_of_many_classes_has_as_many_images_as_asked_for(n: int) -> None:
    shares = {"a": 0.5, "b": 0.31, **{f"c{number}": 0.01 for number in range(19)}}
    found = quotas(shares, n)
    assert sum(found.values()) == n
    assert all(abs(found[label] - n * share) < 1 for label, share in shares.items())
    side = Embedded([name for name in shares for _ in range(100)], np.zeros((2100, 2), np.float32))
    drawn = side.draw(shares, n, 0)
    assert len(set(drawn.tolist())) == n
    assert {name: found[name] for name in set(side.labels[drawn])} == {
        name: count for name, count in found.items() if count
    }


def test_it_is_planned_where_images_are_compared(both_study: Callable[..., Study]) -> None:
    def labels(**fields: Any) -> list[str]:
        return [step.label for step in plan(both_study(**fields))]

    planned = labels()
    assert planned.index("curate.more") < planned.index("fidelity.more") < planned.index("search")
    assert "embed.fidelity" not in planned
    off = labels(fidelity={"enabled": False})
    assert [label for label in planned if label != "fidelity.more"] == off
    assert "fidelity.more" not in labels(classifier=None)
    assert "embed.fidelity" not in labels(fidelity={"embedder": "pixels"})  # as the study's
