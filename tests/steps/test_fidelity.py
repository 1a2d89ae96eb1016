"""Fidelity through the real steps: correct bars, wrong bars, copies of train."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.data.arrays import vectors_of
from engine.metrics.diversity import vendi_score
from engine.metrics.frechet import frechet_distance
from engine.metrics.kernel import kernel_distance
from engine.metrics.prdc import prdc
from engine.plan import plan
from engine.steps.fidelity import Embedded, FidelitySpec, plan_scope
from engine.study import Study
from tests.conftest import write_bars
from tests.pages import plain_headings
from tests.stages.test_vectors import embed_parts

Run = Callable[[Study, str], Manifest]
BOTH = {"classes": "all", "per_class": 60}


@pytest.fixture
def both_study(tmp_path: Path, bars_study: Callable[..., Study]) -> Callable[..., Study]:
    """A study with a generator of both classes, and 150 real images of each."""
    write_bars(tmp_path / "real", {"across": 150, "down": 150}, 0)
    write_bars(tmp_path / "good", {"across": 60, "down": 60}, 5000)

    def make(folder: str = "good", **fields: Any) -> Study:
        values = {
            "request": BOTH, "search": {"ratios": [0.2], "seeds": 2},
            "curate": {"filters": ["copies"], "max_rounds": 1}, **fields,
        }  # fmt: skip
        return bars_study(folder, **values)

    return make


@pytest.fixture
def spec() -> FidelitySpec:
    return FidelitySpec.model_validate(
        {"embedder": {"name": "pixels"}, "sample": 100, "k": 5, "task": "class", "seed": 0}
    )


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


def test_figures_equal_the_metrics_on_the_same_vectors(
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
    # They have length 1 and 256 components.
    kernel = kernel_distance(16 * val, 16 * made, 0)
    assert kept["kernel"][0] == pytest.approx(kernel.estimate, rel=1e-6)
    assert set(down["sets"]) == {"kept", "real"}  # nothing was dropped
    # They have the distribution of the real images.
    for figures in (*whole["sets"].values(), *across["sets"].values()):
        assert figures["kernel"][1] < 0 < figures["kernel"][2]


def test_all_sets_of_a_scope_have_equal_size_and_the_class_mix_of_val(
    both_study: Callable[..., Study], run_until: Run, tmp_path: Path
) -> None:
    # Half of "down" lies across, and the labeler sees it.
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
    # The wrong bars were dropped.
    generated, kept, real = (down["sets"][name] for name in ("generated", "kept", "real"))
    assert generated["frechet"] > kept["frechet"] > 0.5 * real["frechet"]
    assert generated["precision"] < kept["precision"]
    assert generated["kernel"][0] > kept["kernel"][0]


def test_copies_of_train_are_closer_than_held_out_images(
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
    first, other = (held["scopes"][0] for held in (copied, new))
    near = [scope["sets"]["kept"]["near"] for scope in (first, other)]
    # Those of val and test among the sixty are not copies of train.
    assert near[0][0] > 0.2
    assert near[1][0] < 0.1
    for share, low, high in near:
        assert low <= share <= high
    assert first["sets"]["kept"]["nearest"] < first["val_nearest"] == other["val_nearest"]
    (fields,) = (
        notice["fields"] for notice in copied["warnings"] if notice["code"] == "near_train"
    )
    assert [fields[name] for name in ("percent", "low", "high")] == [100 * x for x in near[0]]
    expected, least, most = first["near_expected"]
    assert least <= expected <= most
    assert fields["most"] == 100 * max(0.05, most)
    assert copied["scopes"][0]["sets"]["real"]["near"] is None


def test_too_few_images_get_a_reason_instead_of_figures(
    bars_study: Callable[..., Study], run_until: Run
) -> None:
    study = bars_study(curate={"filters": [], "max_rounds": 1})
    (down,) = run_until(study, "fidelity.more").metrics["scopes"]
    assert down["few"]["code"] == "few_in_val"  # 30 real images in all
    assert down["sets"] == {}


def test_small_train_split_gives_no_reference_and_stops_nothing(
    both_study: Callable[..., Study], run_until: Run
) -> None:
    split = {"group": "none", "train_limit": {"down": 8}}
    study = both_study(split=split, curate={"filters": [], "max_rounds": 1})
    whole, _, down = run_until(study, "fidelity.more").metrics["scopes"]
    assert down["sets"]["kept"]["n"] == 60
    assert down["sets"]["real"] == {"n": 8}
    assert whole["sets"]["real"] == {"n": 16}
    assert whole["floor"] == down["floor"] == {}


def test_generated_images_are_also_measured_at_the_size_of_a_smaller_train(
    both_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    split = {"group": "none", "train_limit": {"down": 30}}
    study = both_study(split=split, curate={"filters": [], "max_rounds": 1})
    metrics = run_until(study, "fidelity.more").metrics
    whole, across, down = metrics["scopes"]
    assert (whole["sets"]["kept"]["n"], down["sets"]["kept"]["n"]) == (120, 60)
    assert set(whole["sets"]) == {"kept"}  # the real set is listed at its own size
    for scope, n in ((whole, 60), (down, 30)):
        assert {name: held["n"] for name, held in scope["floor"].items()} == {
            "kept": n, "real": n
        }  # fmt: skip
    # A Fréchet distance depends on the number of images, so half as many give another.
    kept = [scope["kept"]["frechet"] for scope in (down["sets"], down["floor"])]
    assert kept[1] > kept[0]
    assert across["floor"] == {}
    assert set(across["sets"]) == {"kept", "real"}
    assert "60 images of each" in metrics["headline"]
    (fields,) = (
        notice["fields"] for notice in metrics["warnings"] if notice["code"] == "small_train"
    )
    assert fields["real"] == 60


def test_size_follows_the_study_if_a_fit_keeps_more(store: Store, spec: FidelitySpec) -> None:
    def side(name: str, count: int) -> Embedded:
        random = np.random.default_rng(count)
        vectors = {label: random.standard_normal((count, 4)) for label in ("a", "b")}
        return embed_parts(store, name, vectors)

    sides = {"kept": side("kept", 90), "generated": side("generated", 130),
             "real": side("real", 21), "val": side("val", 40)}  # fmt: skip
    scope = plan_scope(spec, sides, {"a": 70, "b": 75}, ["a", "b"])
    assert scope.sets == {"kept": 140, "generated": 140}
    assert scope.floor == 42
    assert len(scope.draws["real", 42].whole) == 42
    assert plan_scope(spec, sides, {"b": 75}, ["a"]).sets == {"kept": 90, "generated": 90}


def test_another_embedder_embeds_real_and_generated_images_for_this_step(
    both_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    study = both_study(fidelity={"embedder": {"name": "pixels", "side": 4}})
    manifest = run_until(study, "fidelity.more")
    made = embedded(store, manifest.keys())
    assert made.shape == (120, 16)
    embed = run_until(study, "embed.fidelity")
    assert embedded(store, embed.keys(split="val")).shape[1] == 16
    assert run_until(both_study(), "fidelity.more").parts == ()  # embedded by curate
    assert manifest.metrics["scopes"][0]["sets"]["kept"]["frechet"] > 0


def test_page_has_the_figures_of_every_set(
    both_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    study = both_study(
        curate={"filters": [], "max_rounds": 1}, search={"ratios": [0.2], "seeds": 2},
        training={"steps": 2, "batch_size": 8, "evaluate_every": 2}, fidelity={"k": 4},
    )  # fmt: skip
    (key,) = run_until(study, "report").keys(file="report.html")
    page = plain_headings(store.read(key).decode())
    scopes = run_until(study, "fidelity.more").metrics["scopes"]
    section = page[page.index("<h2>How like real images") : page.index("<h2>Embeddings")]
    for scope in scopes:
        for name, figures in scope["sets"].items():
            cells = f"<td>{figures['n']:,}</td><td>{figures['frechet']:.3g}</td>"
            told = {"kept": "generated, kept", "real": "real, from train"}[name]
            assert f"<td>{told}</td>{cells}" in section
    assert section.count("against 22 of val") == 2
    assert "all: across, down" in section
    assert "strongly on their number" in section
    # Without filters, fidelity embeds them.
    assert "<figcaption>PCA</figcaption>" in page
    probe = page[page.index("Can images of more") : page.index("<h2>The models")]
    assert re.findall(r"<td>(across|down)</td><td>[01]\.\d\d</td><td>60</td>", probe) == [
        "across", "down"
    ]  # fmt: skip


def test_page_explains_missing_images_without_vectors(
    bars_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    study = bars_study(
        curate={"filters": [], "max_rounds": 1}, fidelity={"enabled": False},
        training={"steps": 2, "batch_size": 8, "evaluate_every": 2},
    )  # fmt: skip
    (key,) = run_until(study, "report").keys(file="report.html")
    page = plain_headings(store.read(key).decode())
    for where, words in (("<h2>Embeddings", "Not shown"), ("Can images of more", "Not measured")):
        after = page[page.index(where) :]
        assert f"{words}: its images have no vectors" in after[:600]


def test_vectors_are_compared_with_real_ones_of_the_same_space(
    both_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    study = both_study(
        curate={"filters": [], "max_rounds": 1},
        fidelity={"embedder": {"name": "pixels", "side": 4}, "sample": 100},
        training={"steps": 2, "batch_size": 8, "evaluate_every": 2},
        split={"group": "none", "val": 0.4},
    )  # fmt: skip
    (key,) = run_until(study, "report").keys(file="report.html")
    page = plain_headings(store.read(key).decode())
    assert "<figcaption>PCA</figcaption>" in page
    # The sample is smaller than the set, and than val.
    whole = run_until(study, "fidelity.more").metrics["scopes"][0]
    kept = whole["sets"]["kept"]
    assert (kept["n"], kept["sampled"], whole["val_sampled"]) == (120, 100, 100)
    assert '<td>120<br><span class="faint">100 sampled</span></td>' in page
    told = f"against {whole['val']} of val (100 sampled), themselves {whole['val_nearest']:.3f}"
    assert told in page
    share, low, high = (f"{100 * value:.1f}" for value in kept["near"])
    assert f'<td>{share}<br><span class="faint">[{low}, {high}]</span></td>' in page


def test_every_fit_is_measured_and_reported(
    both_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    fields: dict[str, Any] = {
        "training": {"steps": 2, "batch_size": 8, "evaluate_every": 2},
        "generators": {"more": {"name": "traditional"}},
    }  # fmt: skip
    search = {"ratios": [0.2], "seeds": 2}
    one = {step.label: step for step in plan(both_study(**fields, search=search))}
    study = both_study(**fields, search={**search, "generator_fits": 2})
    two = {step.label: step for step in plan(study)}
    assert two["fidelity.more"] == one["fidelity.more"]
    assert two["fidelity.more.fit1"].key != two["fidelity.more"].key
    (key,) = run_until(study, "report").keys(file="report.html")
    page = plain_headings(store.read(key).decode())
    figures = [run_until(study, name).metrics["scopes"][0]["sets"]["kept"]
               for name in ("fidelity.more", "fidelity.more.fit1")]  # fmt: skip
    assert figures[0]["n"] == figures[1]["n"]
    distances = sorted(held["frechet"] for held in figures)
    low, high = (f"{distance:.3g}" for distance in distances)
    # Fits that agree in all digits shown have no brackets.
    spread = f'<br><span class="faint">[{low}, {high}]</span>' if low != high else ""
    assert f"<td>120</td><td>{np.mean(distances):.3g}{spread}</td>" in page
    funnel = page[page.index("<h2>From requested") : page.index("<h2>How like")]
    for fit in (0, 1):
        assert f"<tr><td>{fit}</td><td>120</td><td>120</td><td>100.0%</td>" in funnel
    # The sheet, the funnel by class and the plane show the first fit.
    assert page.count("from the first of 2 generator fits") == 3
    probe = page[page.index("Can images of more") : page.index("<h2>The models")]
    assert "Mean over 2 generator fits" in probe
