from __future__ import annotations

from typing import Any

from engine.core.manifest import Manifest
from engine.core.notice import Notice
from engine.report.generators import GeneratorFit
from engine.report.sections.fidelity import FigureCell, fidelity, fidelity_rows, merge_scopes
from engine.results.images import FidelityScope
from tests.pages import plain_text
from tests.results import manifest, study_results


def scope_of(n: int, frechet: float, **fields: Any) -> FidelityScope:
    figures = {
        "n": n, "sampled": n, "frechet": frechet, "kernel": [frechet, -1.0, 1.0],
        "precision": 0.5, "recall": 0.5, "density": 0.5, "coverage": 0.5, "vendi": 3.0,
        "nearest": 0.25, "near": None,
    }  # fmt: skip
    scope = {"classes": ["down"], "val": 40, "few": "", "val_sampled": 40, "val_nearest": 0.2,
             "sets": {"kept": figures}, "floor": {}}  # fmt: skip
    return FidelityScope.model_validate({**scope, **fields})


def test_fits_of_one_number_share_a_row_and_others_have_their_own() -> None:
    (scope,) = merge_scopes([[scope_of(60, 1.0)], [scope_of(60, 3.0)], [scope_of(50, 9.0)]])
    same, other = scope.rows
    assert (same.set, same.fits, same.n) == ("kept", [0, 1], 60)
    assert same.cells[:2] == [FigureCell("2", "[1, 3]")] * 2
    assert (other.set, other.fits, other.n) == ("kept", [2], 50)
    (close,) = merge_scopes([[scope_of(60, 1.0)], [scope_of(60, 1.0001)]])[0].rows
    assert close.cells[0] == FigureCell("1", "")
    # Of one fit the interval stands beside what has one.
    assert other.cells[:3] == [
        FigureCell("9", ""), FigureCell("9", "[-1, 1]"), FigureCell("0.50", "")
    ]  # fmt: skip
    assert other.cells[-1] == FigureCell("", "")


def test_a_scope_with_too_few_images_says_so_and_of_which_fit() -> None:
    few = FidelityScope(
        classes=["down"], val=40, few=Notice.of("few_generated", images=9), sets={}, floor={}
    )
    fits = [[scope_of(60, 1.0, sets={"kept": {"n": 3}})], [few]]
    (scope,) = merge_scopes(fits)
    assert scope.few == {"9 generated": [1]}
    (row,) = scope.rows
    assert (row.set, row.fits, row.n, row.cells) == ("kept", [0], 3, [])
    assert (scope.classes, scope.val_sampled) == (["down"], 40)
    text = plain_text(fidelity(study_results(generators={"g": measured(*fits)})).html)
    assert "down against 40 of val" in text
    assert "; too few: 9 generated (fit 1)" in text
    assert "generated, kept, fit 0 3 too few" in text
    assert "Fit 1: odd." in text


def measured(*fits: list[FidelityScope]) -> tuple[GeneratorFit, ...]:
    """Fits of a generator with these scopes; the last has a warning."""
    return tuple(
        GeneratorFit("g", fit, manifest("curate"), manifest("generate"), Manifest(
            kind="fidelity", key="k", label="fidelity.g", inputs={}, parts=(), rows=1,
            spec={"embedder": {"name": "dino"}, "k": 5}, provenance={},
            metrics={"scopes": [scope.model_dump(exclude_unset=True) for scope in scopes],
                     "warnings": ["odd"] if fit == len(fits) - 1 else []},
        ))
        for fit, scopes in enumerate(fits)
    )  # fmt: skip


def test_a_row_for_every_set_of_images_with_the_ends_of_its_intervals() -> None:
    real = {"n": 40, "frechet": 0.5, "kernel": [0.1, 0.05, 0.2], "near": None}
    scopes = [
        {"classes": ["a", "b"], "val": 50, "few": "", "sets": {
            "kept": {**real, "vendi": 3.0, "sampled": 30}, "real": {"n": 9}}, "floor": {
            "kept": {**real, "n": 9}}},
        {"classes": ["a"], "val": 3, "few": "3 in val", "sets": {}, "floor": {}},
    ]  # fmt: skip
    validated = [FidelityScope.model_validate(scope) for scope in scopes]
    first, second = (fidelity_rows(fit) for fit in measured(validated, validated))
    whole, real_row, floor, few = first
    assert whole == {
        "generator": "g", "generator_fit": 0, "embedder": "dino", "scope": "all",
        "classes": "a | b", "val_images": 50, "set": "kept", "at_floor": False, "n": 40,
        "sampled": 30, "frechet": 0.5, "kernel": 0.1, "kernel_low": 0.05, "kernel_high": 0.2,
        "near": None, "vendi": 3.0,
    }  # fmt: skip
    assert (real_row["set"], real_row["n"]) == ("real", 9)
    assert (floor["set"], floor["n"], floor["at_floor"]) == ("kept", 9, True)
    assert (few["scope"], few["too_few"]) == ("a", "3 in val")
    assert [row["generator_fit"] for row in second] == [1] * 4
