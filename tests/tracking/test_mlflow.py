"""Runs in MLflow: on a real SQLite database, with a dead server, and after its return."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from engine.core.store import Store
from engine.execute import execute
from engine.plan import plan
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.tracking.mlflow import named_contrasts, track, tracking_uri, without_password
from tests.results import contrast, evaluate_result

# Only what differs from the finished study of bars is computed.
pytestmark = pytest.mark.usefixtures("resumed")


@pytest.fixture
def done(bars_study, store: Store, profile: Profile):
    study = bars_study()
    steps = plan(study)
    return study, steps, store, execute(steps, store, InlineRuntime(), profile)


def test_parent_run_is_the_study_and_each_trial_is_a_child(done, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    said: list[str] = []
    track(*done, "auto", said.append)
    study, _, store, _ = done
    client = MlflowClient(tracking_uri("auto", store))
    experiment = client.get_experiment_by_name(study.name)
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    (parent,) = parents
    # Five arms to choose among, four of them confirmed, one also at twice the steps.
    assert len(runs) == 1 + 5 * 2 + 5 * 2
    assert all(run.info.status == "FINISHED" for run in runs)
    assert parent.data.params["training.steps"] == "12"
    assert parent.data.metrics["test/real/accuracy"] > 0
    assert 0 <= parent.data.metrics["test/real/roc_auc"] <= 1
    run = parent.info.run_id
    assert {item.path for item in client.list_artifacts(run)} == {
        "report.html", "study.yaml", "tables"
    }  # fmt: skip
    # Where the page's links lead.
    tables = {item.path for item in client.list_artifacts(run, "tables")}
    assert {"tables/arms.csv", "tables/steps.csv", "tables/predictions.parquet"} <= tables
    child = next(run for run in runs if run.info.run_name == "train.more.x2.1")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (child.data.params["arm"], child.data.params["seed"]) == ("more x2", "1")
    losses = client.get_metric_history(child.info.run_id, "loss")
    assert [entry.step for entry in losses] == [4, 8, 12]
    assert child.data.metrics["best/macro_f1"] > 0
    assert child.data.metrics["best/brier"] > 0
    assert child.data.metrics["val_loss"] > 0

    # A repetition contacts no server and adds nothing.
    before = len(said)
    track(*done, "auto", said.append)
    assert len(said) == before
    assert len(client.search_runs([experiment.experiment_id], max_results=100)) == len(runs)


def test_dead_server_stops_nothing_and_is_updated_later(done) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    said: list[str] = []
    uri = f"http://someone:secret@127.0.0.1:{port}"
    track(*done, uri, said.append)
    (warning,) = said
    assert "the next run of this study logs it" in warning
    assert "secret" not in warning
    assert not done[2].listing("tracking")
    track(*done, "auto", said.append)
    assert done[2].listing("tracking")


def test_interrupted_logging_is_completed_without_duplicates(done, monkeypatch) -> None:
    from mlflow import MlflowClient

    class Breaks(MlflowClient):
        left = 4

        def set_terminated(self, *arguments, **named):
            Breaks.left -= 1
            if Breaks.left < 0:
                raise ConnectionError("gone")
            return super().set_terminated(*arguments, **named)

    said: list[str] = []
    monkeypatch.setattr("mlflow.MlflowClient", Breaks)
    track(*done, "auto", said.append)
    assert "gone" in said[0]
    Breaks.left = 10**6
    track(*done, "auto", said.append)
    client = MlflowClient(tracking_uri("auto", done[2]))
    experiment = client.get_experiment_by_name(done[0].name)
    assert len(client.search_runs([experiment.experiment_id], max_results=100)) == 21


def test_removed_database_and_deleted_experiment_are_logged_anew(
    done, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    said: list[str] = []
    study, steps, store, manifests = done
    track(study, steps, store, manifests, "auto", said.append)
    client = MlflowClient(tracking_uri("auto", store))
    client.delete_experiment(client.get_experiment_by_name(study.name).experiment_id)
    before = {kind: one for kind, one in manifests.items() if one.kind != "report"}
    track(study, steps, store, before, "auto", said.append)
    anew = client.get_experiment_by_name(f"{study.name}-2")
    assert len(client.search_runs([anew.experiment_id])) == 21
    track(study, steps, store, manifests, "auto", said.append)
    assert len(said) == 2
    # The next process would open a new database; this one still has the removed file open.
    logged: list[object] = []
    monkeypatch.setattr("engine.tracking.mlflow._log", lambda *arguments: logged.append(arguments))
    Path(store.location(store.tracking_file())).unlink()
    track(study, steps, store, manifests, "auto", said.append)
    assert len(logged) == 1
    assert not any("cannot log" in text for text in said)


def test_search_logged_before_its_verdict_is_not_duplicated(done) -> None:
    from mlflow import MlflowClient

    study, steps, store, manifests = done
    searched = {key: found for key, found in manifests.items() if found.kind not in
                ("evaluate", "report")}  # fmt: skip
    said: list[str] = []
    track(study, steps, store, searched, "auto", said.append)
    track(*done, "auto", said.append)
    # Another margin: the same search, another verdict, another run.
    other = study.model_copy(update={"evaluate": study.evaluate.model_copy(update={"margin": 0.2})})
    again = execute(plan(other), store, InlineRuntime(), Profile(storage=store.location("")))
    track(other, plan(other), store, again, "auto", said.append)
    assert not [text for text in said if text.startswith("warning")]
    client = MlflowClient(tracking_uri("auto", store))
    (experiment,) = [found for found in client.search_experiments() if found.name == study.name]
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    parents = {run.data.params["evaluate.margin"] for run in runs
               if "mlflow.parentRunId" not in run.data.tags}  # fmt: skip
    assert parents == {"0.01", "0.2"}
    for child in (run for run in runs if run.info.run_name == "train.more.x2.1"):
        losses = client.get_metric_history(child.info.run_id, "loss")
        assert [entry.step for entry in losses] == [4, 8, 12]


def test_two_contrasts_of_an_arm_have_two_names() -> None:
    baseline = contrast(against="real")
    twin = contrast(against="g unfiltered x1", twin=True)
    found = named_contrasts(evaluate_result(contrasts=[baseline, twin]))
    assert found == {"g x1": baseline, "g x1 against g unfiltered x1": twin}


def test_tracking_uri_by_profile(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert tracking_uri("none", store) is None
    assert tracking_uri("auto", store) == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert tracking_uri("auto", Store("memory://runs")) is None
    assert tracking_uri("auto", Store(str(tmp_path / "what?"))) is None
    assert tracking_uri("http://host:5000", store) == "http://host:5000"
    assert without_password("https://me:word@host/x") == "https://host/x"
