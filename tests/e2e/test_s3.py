"""The digits study on S3 (moto), from the audit to the report, and killed on Ray."""

from __future__ import annotations

import io
import random
import tarfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.execute import execute
from engine.maintenance import fsck, gc
from engine.plan import plan, until
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.study import Study
from tests.chaos.kills import kill_until_done
from tests.chaos.storages import differences
from tests.chaos.studies import command, run, run_here


@pytest.fixture
def url(s3_endpoint: str) -> str:
    return f"s3://bucket/{uuid.uuid4().hex[:8]}"


def test_curated_images_of_a_study_on_s3_equal_local_ones(
    url: str, bars_study: Callable[..., Study], run_until: Callable[[Study, str], Manifest]
) -> None:
    study = bars_study()
    profile, steps = Profile(storage=url, runtime="inline"), until(plan(study), "curate")
    manifests = execute(steps, Store(url), InlineRuntime(), profile)
    assert manifests[steps[-1].key].digest == run_until(study, "curate").digest
    assert execute(steps, Store(url), InlineRuntime(), profile) == manifests


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_study_runs_on_s3_from_audit_to_export(url: str, tmp_path: Path) -> None:
    store = Store(url)
    # This tests storage: few images of one class suffice.
    few = {
        "request": "{ratio: 1, classes: [8], shard_size: 32}", "curate.max_rounds": "1",
        "generators.traditional": "null", "search.arms": "[]",
    }  # fmt: skip
    logged = {**few, "profile.mlflow": f"sqlite:///{tmp_path}/mlflow.db"}
    run_here(url, job="audit")
    run_here(url, "--preview", "1", sets=few)
    output = run_here(url, sets=logged)
    assert "MLflow: sqlite" in output
    pages = set(store.listing("pages/digits"))
    assert {f"pages/digits/{name}" for name in ("audit.html", "preview.html", "report.html")} <= (
        pages
    )
    assert b"</html>" in store.read("pages/digits/report.html")
    assert any("events.out.tfevents" in key for key in store.listing("tensorboard/digits"))
    again = run_here(url, sets=logged)
    assert "report               " in again
    assert "  report: " not in again, "what is done was computed again"
    target = f"{url}-export"
    run_here(
        url, "--arm", "ddpm x1", "--to", target, "--format", "webdataset", job="export", sets=few
    )
    exported = Store(target)
    tars = [key for key in exported.listing("") if key.endswith(".tar")]
    pictures = 0
    for key in tars:
        with tarfile.open(fileobj=io.BytesIO(exported.read(key))) as tar:
            pictures += sum(name.endswith(".png") for name in tar.getnames())
    assert pictures > 1000
    assert fsck.verify(store).faults == ()
    assert gc.find_garbage(store, time.time() - 86_400).keys == ()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_driver_on_s3_loses_nothing(url: str) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    run(f"{url}-undisturbed")
    kills = kill_until_done(
        command(url, sets={"profile.runtime": "ray"}), random.Random(seed), most=3
    )
    assert kills == 3
    assert list(differences(Store(f"{url}-undisturbed"), Store(url))) == []
