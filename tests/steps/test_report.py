"""The page: whole, self-contained, and deaf to what a class is called."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from engine.core.store import Store
from engine.execute import execute
from engine.plan import named, plan
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.study import Study


class Tags(HTMLParser):
    """All tags with their attributes, and whether each was closed."""

    VOID = ("meta", "img", "br", "line", "circle", "polyline", "i")

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
    return store.read(key).decode()


def test_the_page_is_whole_and_needs_no_network(bars_study, store: Store, profile: Profile) -> None:
    page = page_of(bars_study(), store, profile)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    names = {tag for tag, _ in tags.found}
    assert not names & {"script", "link", "iframe"}
    for _, attributes in tags.found:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.findall(r"url\(|@import|https?://", page)
    for heading in ("All arms", "How many to add", "Each class", "What is taken for what",
                    "The images", "From requested to kept", "How like real images",
                    "Where this comes from"):  # fmt: skip
        assert f"<h2>{heading}" in page
    assert "conditional on one generator" in page.lower()
    assert sum(tag == "img" for tag, _ in tags.found) >= 16
    assert sum(tag == "svg" for tag, _ in tags.found) == 3


def test_figures_of_the_page_are_those_of_the_tables(
    bars_study, store: Store, profile: Profile
) -> None:
    study = bars_study()
    page = page_of(study, store, profile)
    steps = plan(study)
    manifests = execute(steps, store, InlineRuntime(), profile)
    evaluated = manifests[named(steps, "evaluate")[0].key].metrics
    for arm in evaluated["arms"].values():
        assert f"<td>{arm['macro_f1']['mean']:.3f}</td>" in page
    (contrast,) = evaluated["contrasts"]
    assert f"{100 * contrast['effect']['estimate']:+.1f} points" in page
    assert page.count(">closed<") == 1  # the ratio that val did not choose


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'])
def test_a_class_named_like_code_is_only_a_name(
    bars_study, store: Store, profile: Profile, tmp_path: Path, name: str
) -> None:
    study = bars_study()
    lines = ["path,label"]
    for label in ("across", "down"):
        for path in sorted((tmp_path / "real" / label).glob("*.png")):
            shown = name if label == "down" else label
            quoted = shown.replace('"', '""')
            lines.append(f'{label}/{path.name},"{quoted}"')
    (tmp_path / "real" / "t.csv").write_text("\n".join(lines) + "\n")
    reader = {
        "name": "csv", "root": str(tmp_path / "real"), "file": "t.csv", "path": "path",
        "labels": {"class": "label"},
    }  # fmt: skip
    values = study.model_dump(mode="json")
    values |= {
        "reader": reader, "generators": {"t": {"name": "traditional"}},
        "request": {"ratio": 1, "classes": [name]}, "search": {"ratios": [1], "seeds": 2},
    }  # fmt: skip
    page = page_of(Study.model_validate(values), store, profile)
    tags = Tags()
    tags.feed(page)
    assert not {tag for tag, _ in tags.found} & {"script"}
    assert not [attributes for _, attributes in tags.found if "onerror" in attributes]
    shutil.rmtree(tmp_path / "real")
