"""Logs a study to MLflow: a parent run for the study, a child run for each trial.

Everything that is logged is in manifests first, so an unreachable server loses nothing: the run
continues with a warning, and the next run of the study logs what is missing. The storage records
what was logged where, so that a finished study contacts no server.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from engine.comparison.arms import planned_trials
from engine.core.errors import DamageError
from engine.core.manifest import Manifest, read_manifest
from engine.core.spec import digest
from engine.core.step import Step
from engine.core.store import Store
from engine.report.download import page_file
from engine.results.comparison import Contrast, EvaluateResult, TrainResult
from engine.study import Study
from engine.wording import verdict_in_words

_BATCH = 100
_MAX_TEXT = 500
_KEY = "engine.key"
_SQLITE = "sqlite:///"
# Characters that the name of a parameter or metric in MLflow must not contain.
_NAME = re.compile(r"[^\w./ :-]")


def track(
    study: Study,
    steps: Sequence[Step],
    store: Store,
    manifests: Mapping[str, Manifest],
    uri: str,
    warn: Callable[[str], None],
) -> None:
    """Log the study's search, verdict and report, unless they are logged already. Raises only
    `DamageError`; other failures become a warning."""
    target = tracking_uri(uri, store)
    of_trials = [step for step in steps if step.kind in ("search", "confirm")]
    if not of_trials:
        return
    if target is None:
        if uri == "auto":
            why = "has a ? in its path" if store.local else "is not local"
            warn(f"MLflow: not logged, because {store.url} {why}; set profile.mlflow")
        return
    done = {step.kind: manifests[step.key] for step in steps if step.key in manifests}
    logged = digest(
        [done[kind].digest for kind in ("search", "confirm", "evaluate", "report") if kind in done]
    )
    record = store.tracking(digest(target), logged)
    if store.exists(record) and not _is_gone(target):
        return
    try:
        _log(study, of_trials, store, done, target)
    except DamageError:
        raise
    except Exception as error:  # no server, no route, no rights: none of these may stop a study
        reason = without_password(" ".join(str(error).split()))[:200] or type(error).__name__
        warn(
            f"warning: cannot log to MLflow at {without_password(target)} ({reason});"
            " nothing is lost, the next run of this study logs it"
        )
        return
    store.put(record, b"{}")
    warn(f"MLflow: {without_password(target)}, experiment {study.name}")


def tracking_uri(uri: str, store: Store) -> str | None:
    """The URI to log to, or None. `auto`: an SQLite file in a local storage, None for others, and
    for a path with a `?`, which SQLite would take for the end of the path."""
    if uri == "none":
        return None
    if uri != "auto":
        return uri
    file = store.location(store.tracking_file())
    return f"{_SQLITE}{file}" if store.local and "?" not in file else None


def _is_gone(target: str) -> bool:
    """Whether the SQLite database of a target was removed, so that what was logged is lost."""
    return target.startswith(_SQLITE) and not Path(target.removeprefix(_SQLITE)).exists()


def without_password(uri: str) -> str:
    """The text without user and password in URLs."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _log(
    study: Study, of_trials: Sequence[Step], store: Store, done: Mapping[str, Manifest], target: str
) -> None:
    """Log everything that is not logged yet. of_trials: the steps that run trials. done: manifests
    by the kind of step."""
    # A dead server must not delay a study for minutes, and models are never unpickled.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    client = MlflowClient(target)
    experiment = _experiment(client, study.name, store, target)
    # MLflow's params are immutable, so any change of the study, as to the verdict, is a new run.
    key = digest([done["search"].digest, study.model_dump(mode="json")])
    parent, _ = _run(client, experiment, key, study.name, {})
    _params(client, parent, dict(_flat(study.model_dump(mode="json"))))
    if "evaluate" in done:
        _verdict(client, parent, done["evaluate"])
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "study.yaml").write_text(
            yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        )
        for part in done["report"].parts if "report" in done else ():
            if "file" in part.tags:
                file = Path(name) / page_file(part.tags["file"])
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(store.read(part.key))
        client.log_artifacts(parent, name)
    for trial in chain.from_iterable(map(planned_trials, of_trials)):
        arm, step = trial.arm, trial.step
        manifest = read_manifest(store, step)
        if manifest is None:
            continue
        tags = {"mlflow.parentRunId": parent}
        run, ended = _run(client, experiment, f"{parent}.{manifest.digest}", step.label, tags)
        if ended:
            continue
        _params(
            client, run,
            {"arm": arm.name, "family": arm.family, "ratio": arm.ratio,
             "stage": trial.stage, "generator_fit": trial.fit, "seed": trial.number,
             "key": step.key, "images": manifest.rows},
        )  # fmt: skip
        for history in manifest.keys(file="history.json"):
            _history(client, run, json.loads(store.read(history)))
        val = TrainResult.of(manifest).val.figures
        best = {f"best/{name}": value for name, value in val.items()}
        _metrics(client, run, best)
        client.set_terminated(run)
    client.set_terminated(parent)


def _experiment(client: Any, name: str, store: Store, target: str) -> str:
    """The id of the experiment, created if needed. A deleted one keeps its name, and its runs stay
    deleted: the study then gets an experiment with a number."""
    base, number = name, 1
    while (experiment := client.get_experiment_by_name(name)) is not None:
        if experiment.lifecycle_stage == "active":
            return str(experiment.experiment_id)
        number += 1
        name = f"{base}-{number}"
    # Next to the file of an SQLite database; a server has its own place for artifacts.
    location = None
    if target.startswith(_SQLITE):
        file = Path(target.removeprefix(_SQLITE)).absolute()
        location = (file.parent / "artifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def _run(
    client: Any, experiment: str, key: str, name: str, tags: Mapping[str, str]
) -> tuple[str, bool]:
    """The id of the run with this key, created if needed, and whether it has ended. The key makes
    logging idempotent."""
    runs = client.search_runs([experiment], f"tags.`{_KEY}` = '{key}'", max_results=1)
    if runs:
        return str(runs[0].info.run_id), runs[0].info.status == "FINISHED"
    run = client.create_run(experiment, run_name=name, tags={**tags, _KEY: key})
    return str(run.info.run_id), False


def _params(client: Any, run: str, values: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(_NAME.sub("_", name)[:250], str(value)[:_MAX_TEXT])
              for name, value in values.items()]  # fmt: skip
    for start in range(0, len(params), _BATCH):
        client.log_batch(run, params=params[start : start + _BATCH])


def _metrics(client: Any, run: str, values: Mapping[str, float]) -> None:
    _history(client, run, [{"step": 0, **values}])


def _history(client: Any, run: str, entries: Sequence[Mapping[str, float]]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [
        Metric(_NAME.sub("_", name)[:250], float(value), now, int(entry["step"]))
        for entry in entries
        for name, value in entry.items()
        if name != "step"
    ]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run, metrics=metrics[start : start + 1000])


def _verdict(client: Any, run: str, evaluate: Manifest) -> None:
    result = EvaluateResult.of(evaluate)
    figures = {
        f"test/{arm}/{name}": figure.mean
        for arm, tested in result.arms.items()
        for name, figure in tested.figures.items()
    }
    for name, contrast in named_contrasts(result).items():
        figures[f"effect/{name}"] = contrast.effect.estimate
        client.set_tag(run, f"verdict.{_NAME.sub('_', name)}", contrast.word)
    verdict = verdict_in_words(result.contrasts, result.objective, result.baseline, result.budget)
    client.set_tag(run, "mlflow.note.content", verdict)
    _metrics(client, run, figures)


def named_contrasts(evaluate: EvaluateResult) -> dict[str, Contrast]:
    """Contrasts by name: the arm's name, with its twin's for a contrast with the twin."""
    return {f"{one.arm} against {one.against}" if one.twin else one.arm: one
            for one in evaluate.contrasts}  # fmt: skip


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values as pairs (a.b.c, value)."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, value
