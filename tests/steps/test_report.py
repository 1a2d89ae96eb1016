"""The page: whole, self-contained, and deaf to what a class is called."""

from __future__ import annotations

import base64
import csv
import io
import re
import shutil
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.cli import show_report
from engine.core.manifest import Manifest
from engine.core.step import upstream
from engine.core.store import Store
from engine.execute import execute
from engine.plan import named, plan
from engine.profile import Profile
from engine.report.page import points
from engine.runtime.inline import InlineRuntime
from engine.study import Study
from tests.conftest import write_bars
from tests.pages import plain_headings

# Only what differs from the finished study of bars is computed.
pytestmark = pytest.mark.usefixtures("resumed")


class Tags(HTMLParser):
    """All tags with their attributes, and whether each was closed."""

    VOID = ("meta", "img", "br", "line", "polyline", "input")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def page_of(study: Study, store: Store, profile: Profile) -> str:
    steps = plan(study)
    manifests = execute(steps, store, InlineRuntime(), profile)
    (key,) = manifests[named(steps, "report")[0].key].keys(file="report.html")
    return plain_headings(store.read(key).decode())


def test_the_page_is_whole_and_needs_no_network(bars_study, store: Store, profile: Profile) -> None:
    page = page_of(bars_study(), store, profile)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    names = {tag for tag, _ in tags.found}
    assert not names & {"link", "iframe"}
    # One of its own, for pictures of points; without it the page says all that it says.
    assert [attributes for tag, attributes in tags.found if tag == "script"] == [{}]
    for _, attributes in tags.found:
        assert (attributes.get("src") or "data:").startswith("data:")
        # What is too large for the page lies beside it, and the page says so.
        where = attributes.get("href") or "data:"
        assert where.startswith(("data:", "#")) or where == "tables/predictions.parquet"
    assert "predictions.parquet</a> (next to the page)" in page
    assert not re.findall(r"url\(|@import|https?://", page)
    order = [
        "All arms", "Each comparison", "Every pair of tested arms", "Every figure",
        "How many to add", "Each class",
        "Common and rare classes", "How sure the classifiers are", "What is taken for what",
        "Training", "The images", "From requested to kept", "How like real images",
        "Embeddings, real and synthetic ", "The models", "What it cost", "Methods, in words",
        "What is not known", "Where this comes from",
    ]  # fmt: skip
    assert re.findall(r"<h2>([^<]*)", page) == order
    assert "Weighted recall is the accuracy" in page
    assert page.count("that <code>tune</code> tried") == 0
    # Whatever the verdict.
    assert "test images that no study here had used, classifiers trained with" in page
    assert "<th>detectable</th>" in page
    assert "10 chose the ratio and the baseline on validation, and 10 that had no part" in page
    assert "conditional on one generator" in page.lower()
    assert sum(tag == "img" for tag, _ in tags.found) >= 16
    # Ratios, recalls, gains, common and rare, reliability, five curves of training, two planes.
    assert sum(tag == "svg" for tag, _ in tags.found) == 12


def test_figures_of_the_page_are_those_of_the_tables(
    bars_study, store: Store, profile: Profile
) -> None:
    study = bars_study()
    page = page_of(study, store, profile)
    steps = plan(study)
    manifests = execute(steps, store, InlineRuntime(), profile)
    evaluated = manifests[named(steps, "evaluate")[0].key].metrics
    for arm in evaluated["arms"].values():
        assert f"<td>{arm['figures']['macro_f1']['mean']:.3f}</td>" in page
    (contrast,) = evaluated["contrasts"]
    assert f"{points(contrast['effect']['estimate'])} points" in page
    assert page.count(">closed<") == 1  # the ratio that val did not choose
    for name in ("roc_auc", "brier", "worst_class_recall"):
        figure = evaluated["arms"]["real"]["figures"][name]
        assert f"{figure['mean']:.3f}<span" in page


def test_a_class_named_like_code_is_only_a_name(
    bars_study, store: Store, profile: Profile, tmp_path: Path
) -> None:
    study = bars_study()
    shown = {"across": "<script>alert(1)</script>", "down": '"><img src=x onerror=alert(1)>'}
    lines = ["path,label"]
    for label, name in shown.items():
        for path in sorted((tmp_path / "real" / label).glob("*.png")):
            quoted = name.replace('"', '""')
            lines.append(f'{label}/{path.name},"{quoted}"')
    (tmp_path / "real" / "t.csv").write_text("\n".join(lines) + "\n")
    reader = {
        "name": "csv", "root": str(tmp_path / "real"), "file": "t.csv", "path": "path",
        "labels": {"class": "label"},
    }  # fmt: skip
    values = study.model_dump(mode="json")
    values |= {
        "reader": reader, "generators": {"t": {"name": "traditional"}},
        "request": {"ratio": 1, "classes": [shown["down"]]}, "search": {"ratios": [1], "seeds": 2},
    }  # fmt: skip
    page = page_of(Study.model_validate(values), store, profile)
    tags = Tags()
    tags.feed(page)
    assert sum(tag == "script" for tag, _ in tags.found) == page.count("// Pictures of the points")
    assert not [attributes for _, attributes in tags.found if "onerror" in attributes]
    shutil.rmtree(tmp_path / "real")


@pytest.mark.parametrize("umap", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_point_of_an_embedding_has_its_picture(bars_study, store, profile, umap) -> None:
    if umap and find_spec("umap") is None:
        pytest.skip("umap-learn is not installed")
    page = page_of(bars_study(), store, profile)
    (url, side, columns), planes = sheet_of(page), page.count("<figcaption>PCA</figcaption>")
    assert planes == 1
    # With UMAP, no panel stands alone in a second row.
    assert ('class="planes three"' in page) == umap
    whole = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    points = re.findall(r'<circle class="(disc|ring) c\d"[^>]*><title>([^<]*)<', page)
    of_plane = points[: len(points) // (2 + umap)]
    assert whole.width == columns * side
    assert whole.height // side * columns >= len(of_plane)
    assert {(kind, title.partition(", ")[2]) for kind, title in of_plane} == {
        ("disc", "real"), ("ring", "synthetic")
    }  # fmt: skip
    # A bar lies in a row of its picture, or stands in a column: the picture is that of its point.
    for number, (_, title) in enumerate(of_plane):
        left, top = number % columns * side, number // columns * side
        pixels = np.asarray(whole.crop((left, top, left + side, top + side)).convert("L"), float)
        across = pixels.mean(1).std() > pixels.mean(0).std()
        assert title.startswith("across" if across else "down")


def test_of_many_classes_a_page_shows_some_and_says_so(
    toy_study, image_folder, store, profile
) -> None:
    names = [f"k{number:02d}" for number in range(32)]
    real = image_folder(dict.fromkeys(names, 12), "real", side=16)
    # What was made of the first class is of the second.
    shutil.copytree(real, made := real.parent / "made")
    shutil.rmtree(made / "k00")
    shutil.copytree(made / "k01", made / "k00")
    reader = {"name": "imagefolder", "root": str(made)}
    study = toy_study(
        real, split={"group": "none", "test": 0.3}, classifier={"name": "small", "channels": [8]},
        generators={"more": {"name": "folder", "reader": reader}}, request={"ratio": 1},
        training={"steps": 2, "batch_size": 8, "evaluate_every": 2},
        search={"ratios": [0.5], "seeds": 2, "confirm_fits": 1},
        evaluate={"bootstrap_draws": 200},
        curate={"labeler": {"name": "knn", "k": 1}, "filters": ["blank"], "max_rounds": 3},
        fidelity={"enabled": False}, audit={"on_leak": "drop"},
    )  # fmt: skip
    page = page_of(study, store, profile)
    assert 'class="matrix"' not in page
    assert "<tr><th>requested</th>" in page
    assert "<tr><th>true</th>" in page
    assert "The 30 classes with the most dropped images; 2 more are not shown." in page
    assert page.count('<div class="class">') == 3 + 30
    assert "colours are classes, and repeat after ten" in page


def sheet_of(page: str) -> tuple[str, int, int]:
    (found,) = re.findall(r'data-side="(\d+)" data-columns="(\d+)"', page)
    (url,) = re.findall(r'<img class="sheet" hidden src="([^"]+)"', page)
    return url, int(found[0]), int(found[1])


def test_tables_stand_in_the_page_and_beside_it(bars_study, store, profile) -> None:
    # By another objective, which is of probabilities alone.
    training = {"steps": 12, "batch_size": 16, "learning_rate": 0.01, "evaluate_every": 4}
    study = bars_study(training={**training, "objective": "roc_auc"})
    page = page_of(study, store, profile)
    steps = plan(study)
    manifests = execute(steps, store, InlineRuntime(), profile)
    report, evaluated = (
        manifests[named(steps, kind)[0].key] for kind in ("report", "evaluate")
    )  # fmt: skip
    links = dict(re.findall(r'<a href="data:text/csv[^,]*,([^"]+)" download="toy-([^"]+)"', page))
    assert sorted(links.values()) == [
        "arms.csv", "budget.csv", "classes.csv", "closest.csv", "confusion.csv", "contrasts.csv",
        "cost.csv", "embedding.csv", "fidelity.csv", "filters.csv", "funnel.csv", "history.csv",
        "limits.csv", "pairs.csv", "prices.csv", "probes.csv", "ratios.csv", "reliability.csv",
        "saturation.csv", "seen.csv",
        "steps.csv", "trials.csv", "weights.csv",
    ]  # fmt: skip
    show_report(study, steps, store, manifests)
    tables = {}
    for encoded, name in links.items():
        (key,) = report.keys(file=name)
        beside = store.page(study.name, store.join("tables", name))
        assert base64.b64decode(encoded) == store.read(key) == store.read(beside)
        tables[name] = list(csv.DictReader(io.StringIO(store.read(key).decode())))
    metrics = evaluated.metrics
    for row in tables["arms.csv"]:
        assert (row["test_opened"] == "True") == (row["arm"] in metrics["arms"])
        if row["test_opened"] == "True":
            want = metrics["arms"][row["arm"]]["figures"]["brier"]["mean"]
            assert float(row["test_brier"]) == pytest.approx(want, rel=1e-5)
    compared = tables["contrasts.csv"]
    assert [row["against"] for row in compared] == ["real", "oversampled"]
    (contrast,) = (row for row in compared if row["decides"] == "True")
    assert contrast["verdict"] == metrics["contrasts"][0]["word"]
    assert contrast["objective"] == metrics["objective"] == "roc_auc"
    areas = [
        metrics["arms"][contrast[name]]["figures"]["roc_auc"]["mean"] for name in ("arm", "against")
    ]
    assert float(contrast["difference"]) == pytest.approx(areas[0] - areas[1], abs=1e-5)
    assert [row["stage"] for row in tables["trials.csv"]] == ["search"] * 10 + ["confirm"] * 10
    # real_double takes twice the steps.
    assert len(tables["history.csv"]) == 20 * 3 + 6 * 3
    for row in tables["trials.csv"]:
        assert store.listing(row["weights"])
        assert (row["test_accuracy"] == "") == (row["stage"] == "search")
    # The counts of a confusion are those of the images, once for each classifier.
    for split, images in (("test", metrics["test"]["images"]), ("val", 19)):
        counts = [int(row["images"]) for row in tables["confusion.csv"]
                  if (row["arm"], row["split"]) == ("real", split)]  # fmt: skip
        assert sum(counts) == 2 * images
    (down,) = (row for row in tables["classes.csv"] if (row["arm"], row["class"]) ==
               (metrics["contrasts"][0]["arm"], "down"))  # fmt: skip
    gain = metrics["contrasts"][0]["recall_gain"][1]
    assert float(down["recall_gain"]) == pytest.approx(gain["mean"], rel=1e-5)
    assert int(down["training_images"]) > 17  # real and added
    # Of all classifiers together, and the mean of replicates: two figures, two names.
    assert {"f1_pooled", "f1_mean", "roc_auc_mean"} <= set(down)
    assert "f1" not in down
    to_real = metrics["contrasts"][0]["recall_gain_to_real"][1]
    assert float(down["recall_gain_to_real"]) == pytest.approx(to_real["mean"], rel=1e-5)


def test_every_figure_of_the_page_stands_in_a_table(bars_study, store, profile) -> None:
    study = bars_study()
    steps = plan(study)
    manifests = execute(steps, store, InlineRuntime(), profile)
    report, evaluate, search, curate, fidelity, generate = (
        manifests[named(steps, kind)[0].key]
        for kind in ("report", "evaluate", "search", "curate", "fidelity", "generate")
    )

    def table(name: str) -> list[dict[str, str]]:
        (key,) = report.keys(file=f"{name}.csv")
        return list(csv.DictReader(io.StringIO(store.read(key).decode())))

    def close(text: str, value: float) -> bool:
        return float(text) == pytest.approx(value, rel=1e-5)

    for row in table("ratios"):
        assert close(row["val_mean"], search.metrics["arms"][row["arm"]]["mean"])
        assert float(row["val_low"]) <= float(row["val_mean"]) <= float(row["val_high"])
        assert row["replicates"] == "2"
    (point,) = table("saturation")
    assert close(point["low"], evaluate.metrics["saturation"]["more"]["low"])
    twice, chosen = table("budget")
    assert close(twice["difference"], evaluate.metrics["budget"]["estimate"])
    assert chosen["arm"] == f"{chosen['against']} double"
    doubled = evaluate.metrics["budget_of"][chosen["against"]]
    assert close(chosen["difference"], doubled["estimate"])
    bins = [row for row in table("reliability") if row["arm"] == "real"]
    assert sum(int(row["images"]) for row in bins) == 2 * evaluate.metrics["test"]["images"]

    (funnel,) = table("funnel")
    made = curate.metrics["funnel"]["down"]
    assert [int(funnel[name]) for name in ("requested", "kept")] == [made["requested"],
                                                                     made["kept"]]  # fmt: skip
    assert int(funnel["needed"]) > 0
    assert [row["filter"] for row in table("filters")] == ["agreement", "copies"]
    told = {one["name"]: one["limits"] for one in curate.metrics["filters"]}
    for row in table("limits"):
        limit = told[row["filter"]][row["limit"]]
        assert close(row["value"], limit[row["class"]] if row["class"] else limit)
    asked = table("seen")
    assert {row["asked_for"] for row in asked} == {"down"}
    assert sum(int(row["images"]) for row in asked) == made["generated"]
    assert sum(float(row["share_of_asked"]) for row in asked) == pytest.approx(1)

    scopes = {"all" if len(scope["classes"]) > 1 else scope["classes"][0]: scope
              for scope in fidelity.metrics["scopes"]}  # fmt: skip
    assert {row["scope"] for row in table("fidelity")} == set(scopes)
    ids = set(images_of(store, generate)) | set(images_of(store, manifests[steps[0].key]))
    drawn = table("embedding")
    assert {row["source"] for row in drawn} == {"real", "more"}
    for row in drawn:
        assert row["image_id"] in ids
        places = [float(row[f"{of}_{axis}"]) for of in ("pca", "tsne") for axis in "xy"]
        assert np.isfinite(places).all()
    for row in table("closest"):
        assert {row["image_id"], row["nearest_training_image"]} <= ids

    (page,) = named(steps, "report")
    assert {row["key"] for row in table("steps")} == {
        step.key for step in upstream(list(page.inputs.values()))
    }
    wall = sum(float(row["wall_hours"]) for row in table("cost"))
    assert wall > 0
    assert all(float(row["cpu_hours"]) > 0 for row in table("trials"))
    best, twice = (row for row in table("weights") if row["trained_on"].startswith("toy, arm more"))
    assert re.fullmatch(r"toy, arm more x[12]: \d+ real \+ \d+ of more", best["trained_on"])
    assert " double: " in twice["trained_on"]
    assert store.listing(best["where"])
    # The probabilities are what evaluate wrote, and are not written twice.
    (predictions,) = report.keys(file="predictions.parquet")
    assert predictions == evaluate.keys(table="predictions")[0]


def test_an_arm_of_generated_images_alone_is_shown_and_no_baseline(
    bars_study, store, profile, tmp_path: Path
) -> None:
    write_bars(tmp_path / "both", {"across": 90, "down": 40}, 7000)
    study = bars_study(
        "both", request={"ratio": 1}, curate={"filters": [], "max_rounds": 1},
        search={"ratios": [0.5], "seeds": 2, "arms": ["synthetic_only"]},
        fidelity={"enabled": False}, tune={"tried": 12},
    )  # fmt: skip
    page = page_of(study, store, profile)
    steps = plan(study)
    manifests = execute(steps, store, InlineRuntime(), profile)
    ingest, evaluate, search, report = (
        manifests[named(steps, kind)[0].key] for kind in ("ingest", "evaluate", "search", "report")
    )
    real = ingest.metrics["counts"]["train"]
    table = page[page.index("<h2>All arms") : page.index("<h2>Each comparison")]
    (row,) = re.findall(r"<tr class=\"\"><td>more only</td>(.*?)</tr>", table, re.DOTALL)
    tested = evaluate.metrics["arms"]["more only"]
    figures = tested["figures"]
    # As many as there are real ones, and not as many again.
    assert f'<td>{sum(real.values())}</td><td class="left faint">no real images</td>' in row
    assert f"<td>{figures['macro_f1']['mean']:.3f}</td>" in row
    assert f"<td>{figures['accuracy']['mean']:.3f}</td>" in row  # classification accuracy score
    assert tested["ratio"] is None
    assert "its accuracy is the classification accuracy score" in table
    assert "more only" in figures_section(page)
    # No verdict is of it, and none against it.
    assert "more only" not in page[: page.index("<h2>All arms")]
    assert "more only" not in evaluate.metrics["headline"]
    assert search.metrics["baseline"] != "more only"
    chosen = {name for name in search.metrics["chosen"] if name.startswith("more x")}
    assert len(chosen) == 1
    assert {one["arm"] for one in evaluate.metrics["contrasts"]} == chosen
    assert "more_only" not in evaluate.metrics["saturation"]
    curve = page[page.index("<h2>How many to add") : page.index("<h2>Each class")]
    assert "more only" not in curve

    def rows(name: str) -> dict[str, dict[str, str]]:
        (key,) = report.keys(file=f"{name}.csv")
        return {row["arm"]: row for row in csv.DictReader(io.StringIO(store.read(key).decode()))}

    alone = rows("arms")["more only"]
    assert (alone["images_added"], alone["role"]) == (str(sum(real.values())), "no real images")
    assert rows("ratios")["more only"]["ratio"] == ""
    assert rows("trials")["more only"]["training_images"] == str(sum(real.values()))
    composed = f"toy, arm more only: {sum(real.values())} of more"
    assert composed in page
    # Beside the verdict, and not in the methods alone.
    head = page[: page.index("<h2>All arms")]
    assert "chosen on validation from 12 that <code>tune</code> tried" in head


def figures_section(page: str) -> str:
    return page[page.index("<h2>Every figure") : page.index("<h2>How many to add")]


def images_of(store: Store, manifest: Manifest) -> list[str]:
    keys = [part.key for part in manifest.parts if part.tags.keys() & {"label", "split"}]
    return [i for table in store.tables(keys, ["image_id"]) for i in table["image_id"].to_pylist()]
