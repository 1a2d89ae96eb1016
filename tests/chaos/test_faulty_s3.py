"""A study on S3 that refuses, delays or leaves unanswered 12% of all requests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine.core.store import Store
from engine.maintenance import fsck
from tests.chaos.faulty_s3 import faulty_s3
from tests.chaos.storages import differences
from tests.chaos.studies import run

SHARE = 0.12


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_study_survives_faults_in_an_eighth_of_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    undisturbed = Store(str(tmp_path / "undisturbed"))
    run(undisturbed.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with faulty_s3(0.0, seed) as (address, server):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        boto3.client("s3").create_bucket(Bucket="bucket")
        server.share = SHARE
        url = "s3://bucket/runs"
        run(url)
        print(f"{server.requests} requests, faults: {dict(server.faults)}")
        assert server.faults.total() > 0.06 * server.requests
        server.share = 0.0
        store = Store(url)
        assert list(differences(undisturbed, store)) == []
        assert fsck.verify(store).faults == ()
