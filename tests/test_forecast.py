"""What is left of a study, and how long it takes at measured rates."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.core.manifest import read_manifest
from engine.core.store import Store
from engine.execute import execute
from engine.forecast import (
    GeneratorRates,
    Rates,
    concurrent_trials,
    confirmation_in_words,
    expected_trials,
    forecast,
    images_to_generate,
    rates_key,
    read_rates,
    share_kept,
    training_steps,
)
from engine.plan import named, plan, until
from engine.profile import Profile
from engine.results.data import IngestResult
from engine.runtime.inline import InlineRuntime
from engine.study import Study


def rates(kept: dict[str, tuple[int, int]] | None = None) -> Rates:
    of_generator = GeneratorRates(
        fit=None, generate=2.0, curate=1.0, start=5.0, needed={"down": 40}, kept=kept or {}
    )
    return Rates(generators={"more": of_generator}, train=0.5)


def test_interval_of_the_share_kept() -> None:
    # Wilson's interval of 8 in 10, as in statsmodels' proportion_confint.
    assert share_kept(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-4)
    assert share_kept(0, 0) == (0.0, 1.0)
    low, high = share_kept(10, 10)
    assert 0.7 < low < 1
    assert high == 1


def test_images_that_are_dropped_are_generated_again() -> None:
    def needed(kept: dict[str, tuple[int, int]]) -> tuple[int, int]:
        return images_to_generate(rates(kept).generators["more"])

    assert needed({}) == (40, 40)
    fewest, most = needed({"down": (50, 100)})
    assert fewest < 80 < most
    # Where nothing was kept, requests assume a tenth.
    assert needed({"down": (0, 100)})[1] == 400


def test_work_left_follows_from_the_plan(bars_study: Callable[..., Study], store: Store) -> None:
    study = bars_study()
    steps, profile = plan(study), Profile(storage=store.url, runtime="inline")
    left = forecast(steps, store, profile, rates({"down": (10, 10)}))
    images, classifiers, closing = left.lines
    assert "assumed" in closing.what
    # 40 to 56 images, 2 s to generate and 1 s to filter each; the workers start once or twice.
    assert images.what == "40 to 56 images of more"
    assert (images.low, images.high) == (5 + 120, 10 + 168)
    trials = expected_trials(steps)
    assert classifiers.what == f"{len(trials)} classifiers"
    assert classifiers.low == 0.5 * sum(map(training_steps, trials))
    assert left.low < images.low + classifiers.low < images.high + classifiers.high < left.high


def test_work_that_is_done_costs_nothing(
    bars_study: Callable[..., Study], store: Store, profile: Profile
) -> None:
    steps = plan(bars_study())
    execute(until(steps, "generate.more"), store, InlineRuntime(), profile)
    classifiers, predictions, closing = forecast(steps, store, profile, rates()).lines
    assert "classifiers" in classifiers.what
    assert "page" in closing.what
    # Of the test images by each classifier of the confirmation; those without an optimizer step's
    # backward pass.
    (ingest,) = named(steps, "ingest")
    (confirm,) = named(steps, "confirm")
    images = sum(IngestResult.of(read_manifest(store, ingest)).counts["test"].values())
    count = images * len(expected_trials([confirm]))
    assert predictions.what == f"{count:,} predictions for test images"
    assert predictions.low == pytest.approx(count * 0.5 / 3 / 16)
    assert predictions.low < predictions.high


def test_trials_run_at_once_as_cores_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    trial = {"cpus": 2, "threads": 2}
    assert concurrent_trials(Profile.model_validate({"runtime": "inline", "trial": trial})) == 1
    assert concurrent_trials(Profile.model_validate({"trial": trial})) == 4
    assert concurrent_trials(Profile.model_validate({"trial": trial, "num_cpus": 4})) == 2


def test_rates_are_read_back_and_damaged_ones_are_none(store: Store) -> None:
    assert read_rates(store, "toy") is None
    store.put(rates_key(store, "toy"), rates().model_dump_json().encode())
    assert read_rates(store, "toy") == rates()
    store.put(rates_key(store, "toy"), b"{")
    assert read_rates(store, "toy") is None


def test_a_confirmation_is_expected_to_train_one_arm_of_each_family(bars_study) -> None:
    steps = plan(bars_study(search={"ratios": [1, 2], "seeds": 2, "confirm_fits": 3}))
    labels = [trial.label for trial in expected_trials(steps)]
    # real, real double, oversampled and one of two ratios, also with twice the steps, with three
    # new seeds.
    assert len([label for label in labels if label[-2:] in (".2", ".3", ".4")]) == 5 * 3
    # The choice: both ratios, two seeds.
    assert len([label for label in labels if label[-2:] in (".0", ".1")]) == 5 * 2


def test_what_the_confirmation_adds_is_said(bars_study) -> None:
    fresh = plan(bars_study(search={"ratios": [1, 2], "seeds": 2, "confirm_fits": 3}))
    assert confirmation_in_words(fresh) == (
        "of these, the confirmation of the choice: 3 more fits of more, and 15 classifiers"
    )
    same_fit = plan(bars_study(search={"ratios": [1, 2], "seeds": 2}))
    assert confirmation_in_words(same_fit).endswith("choice: 10 classifiers")
    assert confirmation_in_words(until(fresh, "search")) == ""
