"""Command lines of the scripts in `jobs/`: arguments, the run, errors in one line.

Exit codes: 0 done; 1 the run stopped (data, leaks, storage) and can continue later; 2 the study,
the profile or the command line is wrong; 130 and 143 interrupted by SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from engine.core import interrupts, rows
from engine.core.errors import EngineError, StudyError
from engine.core.manifest import Manifest
from engine.core.names import slug
from engine.core.progress import say
from engine.core.step import Step, upstream
from engine.core.store import Store
from engine.execute import discard, execute, inspect, naming_damage
from engine.forecast import confirmation_in_words, forecast, measured_of, read_rates
from engine.plan import data_set, named, plan, plan_audit, until
from engine.plan_labels import labelling_of
from engine.preview import preview, print_forecast
from engine.profile import Profile
from engine.report.download import page_file
from engine.report.page import duration
from engine.report.tries import as_csv, as_text
from engine.results.comparison import ReportResult
from engine.results.data import AuditResult
from engine.runtime.base import Runtime
from engine.runtime.inline import InlineRuntime
from engine.study import Study, apply_sets, load_profile, load_study, load_values, validate
from engine.tracking.mlflow import track
from engine.tracking.tensorboard import write_logs
from engine.wording import opened_in_words

P = ParamSpec("P")


def command(act: Callable[P, int]) -> Callable[P, int]:
    """A command that reports an error or an interrupt in one line, and returns its exit code."""

    @wraps(act)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return act(*args, **kwargs)
        except EngineError as error:
            say(f"error: {' '.join(str(error).split())}")
            return error.exit_code
        except KeyboardInterrupt as interrupt:
            interrupts.announce()
            return interrupts.exit_code(interrupt)

    return run


@command
def run_study(
    argv: Sequence[str] | None = None, *, until_step: str | None = None, dry_run: bool = False
) -> int:
    """Run a study up to the requested step; returns the exit code."""
    arguments = _parser(until_step, dry_run).parse_args(argv)
    return _run(arguments, arguments.until or until_step, arguments.dry_run or dry_run)


@command
def run_export(argv: Sequence[str] | None = None) -> int:
    """Export the images of an arm for other tools; returns the exit code."""
    from engine.export import export

    parser = argparse.ArgumentParser(description="Export a study's images for other tools.")
    add_common(parser)
    parser.add_argument(
        "--arm", required=True,
        help="an arm of the comparison (ddpm x1), a generator (ddpm: all kept images), or real",
    )  # fmt: skip
    parser.add_argument("--to", required=True, help="an empty folder, or a URL such as s3://b/f")
    parser.add_argument(
        "--format", default="imagefolder", help="imagefolder, csv, parquet or webdataset"
    )
    parser.add_argument("--splits", nargs="+", default=list(rows.SPLITS), help="default: all")
    arguments = parser.parse_args(argv)
    study, profile = read(arguments.study, arguments.profile, arguments.sets)
    target, store = Store(arguments.to), Store(profile.storage)
    with naming_damage(plan(study), store):
        summary = export(study, store, target, arguments.arm, arguments.format, arguments.splits)
    totals = {split: sum(sum(sources.values()) for sources in by_class.values())
              for split, by_class in summary["images"].items()}  # fmt: skip
    counts = ", ".join(f"{count:,} {split}" for split, count in totals.items())
    say(f"{counts}: {target.url}")
    return 0


@command
def run_evaluate(argv: Sequence[str] | None = None) -> int:
    """Run a study up to the verdict, or score a file of predictions; returns the exit code."""
    parser = _parser("evaluate", False)
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE",
        help="score these predictions of the study's test images instead of the study's own",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", default="real", metavar="ARM",
        help="with --predictions: the arm to compare the others with (default: real)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.predictions is None:
        return _run(arguments, arguments.until or "evaluate", arguments.dry_run)
    return _score_predictions(arguments)


def _score_predictions(arguments: argparse.Namespace) -> int:
    from engine.comparison.predictions import score

    study, profile = read(arguments.study, arguments.profile, arguments.sets)
    store = Store(profile.storage)
    store.probe()
    ingest = data_set(plan(study))
    with closing(make_runtime(profile)) as runtime:
        manifest = execute(upstream([ingest]), store, runtime, profile)[ingest.key]
    labels = labelling_of(study)
    if labels.cells is not None:
        raise StudyError("files of predictions are scored for one task with one label per image")
    scored = score(study, store, manifest, labels.task, arguments.predictions, arguments.baseline)
    page = store.page(study.name, f"predictions-{slug(arguments.predictions.stem)}.json")
    store.put(page, scored.model_dump_json(indent=1, exclude_unset=True).encode())
    for arm, result in scored.arms.items():
        figure = result.figures[scored.objective]
        print(f"{arm:<24} test {scored.objective} {figure.mean:.3f}"
              f" ({figure.low:.3f} to {figure.high:.3f})")  # fmt: skip
    print(f"\n{scored.verdict}\n", flush=True)
    if scored.test.opened > 1:
        say(f"{opened_in_words(scored.test)} (prediction files count as studies)")
    say(f"scores: {store.location(page)}")
    return 0


@command
def run_audit(argv: Sequence[str] | None = None) -> int:
    """Write a page of the problems in a study's data; returns the exit code, 0 if the page was
    written."""
    parser = argparse.ArgumentParser(
        description="Check a study's data for problems before anything is trained."
    )
    add_common(parser)
    arguments = parser.parse_args(argv)
    study, profile = read(arguments.study, arguments.profile, arguments.sets)
    step = plan_audit(study)
    store = Store(profile.storage)
    store.probe()
    with closing(make_runtime(profile)) as runtime:
        manifest = execute([step], store, runtime, profile)[step.key]
    page = store.page(study.name, "audit.html")
    for key in manifest.keys(file="audit.html"):
        store.put(page, store.read(key))
    audit = AuditResult.of(manifest)
    kinds = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in audit.found.items())
    say(f"{len(audit.must)} problems to fix before the study can run")
    for problem in audit.must[:10]:
        say(f"  {problem}")
    say(f"findings: {kinds or 'none'}")
    say(f"audit: {store.location(page)}")
    return 0


@command
def run_tune(argv: Sequence[str] | None = None) -> int:
    """Try the settings of a study's section `tune` and write the best as a study; returns the exit
    code."""
    from engine.tuning.tune import tune

    parser = argparse.ArgumentParser(
        description="Try settings of a study, compare them on val, and write the best as a study."
    )
    add_common(parser)
    arguments = parser.parse_args(argv)
    study, profile = read(arguments.study, arguments.profile, arguments.sets)
    values = load_values(arguments.study, _for_study(arguments.sets))
    store = Store(profile.storage)
    store.probe()
    with closing(make_runtime(profile)) as runtime:
        tried = tune(values, store, runtime, profile)
    page = store.page(study.name, "tuned.yaml")
    store.put(page, tried.study.encode())
    store.put(store.page(study.name, "tries.csv"), as_csv(tried.tries))
    table = json.dumps({"objective": tried.objective, "tries": tried.tries}, indent=1)
    store.put(store.page(study.name, "tries.json"), table.encode())
    print(f"\n{as_text(tried.tries, tried.best, tried.objective)}\n", flush=True)
    say(f"all tries: {store.location(store.page(study.name, 'tries.csv'))}")
    say(f"study with the best setting: {store.location(page)}")
    return 0


def _parser(until_step: str | None, dry_run: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run a study: from labelled images to synthetic images and a verdict on them."
    )
    add_common(parser)
    parser.add_argument(
        "--until",
        metavar="STEP",
        default=None,
        help=f"stop after this step (default: {until_step or 'the last step'})",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=dry_run,
        help="print the plan and the state of each step; compute nothing",
    )
    parser.add_argument(
        "--preview",
        type=int,
        metavar="N",
        help="generate N images per class and show them on one page with the cost of the full run",
    )
    parser.add_argument(
        "--discard", action="append", default=[], metavar="STEP",
        help="discard the committed results of this step, then run; repeatable",
    )  # fmt: skip
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, help="the study file (YAML)")
    parser.add_argument(
        "--profile", type=Path, help="where and how to run (YAML); default: this machine"
    )
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="A.B=C",
        help="override a field of the study, or of the profile with profile.a=b; repeatable",
    )  # fmt: skip


def _run(arguments: argparse.Namespace, last: str | None, dry_run: bool) -> int:
    study, profile = read(arguments.study, arguments.profile, arguments.sets)
    steps = plan(study)
    if last:
        steps = until(steps, last)
    if arguments.preview is not None and not 1 <= arguments.preview <= 1000:
        raise StudyError(
            f"--preview {arguments.preview}: must be between 1 and 1000 images per class"
        )
    store = Store(profile.storage)
    if dry_run and arguments.discard:
        raise StudyError("--discard and --dry-run cannot be combined: leave one out")
    if arguments.preview is not None and not any(step.kind == "generate" for step in steps):
        raise StudyError(
            "--preview: no generate step in this plan; name a generator in the study or leave"
            " --until out"
        )
    if dry_run:
        with naming_damage(steps, store):
            print_plan(study, steps, store, profile)
        return 0
    store.probe()
    for name in arguments.discard:
        full_plan = plan(study)
        for step in named(full_plan, name):
            shards = discard(step, store, full_plan)
            say(f"{step.label:<20} {step.key}  discarded {shards} shards and the manifest")
    say(f"study {study.name}: {len(steps)} steps, storage {store.url}")
    started = time.monotonic()
    with closing(make_runtime(profile)) as runtime:
        if arguments.preview is not None:
            with naming_damage(steps, store):
                # The whole plan: a forecast is about the study, whatever --until says.
                preview(study, plan(study), store, runtime, profile, arguments.preview)
        else:
            rates = read_rates(store, study.name, measured_of(plan(study), profile))
            left = forecast(steps, store, profile, rates) if rates is not None else None
            if left is not None:
                print_forecast(left)
            manifests = execute(steps, store, runtime, profile)
            if left is not None and left.lines:
                took = duration((time.monotonic() - started) / 3600)
                say(f"forecast {left.in_words()}, took {took}")
            with naming_damage(steps, store):
                show_report(study, steps, store, manifests)
                track(study, steps, store, manifests, profile.mlflow, say)
                write_logs(study, steps, store, say)
                for step in steps:
                    # Later rounds of a generator look like its first.
                    if step.label.count(".") < 2:
                        show_pages(study, step, store, manifests[step.key])
    say(f"done in {time.monotonic() - started:.1f} s")
    return 0


def read(study: Path, profile: Path | None, sets: Sequence[str]) -> tuple[Study, Profile]:
    """Load the study and the profile with the `--set` overrides applied. Raises `StudyError`."""
    for_profile = [
        setting.removeprefix("profile.") for setting in sets if setting.startswith("profile.")
    ]
    loaded = load_study(study, _for_study(sets))
    if profile is not None:
        settings = load_profile(profile, for_profile)
    else:
        settings = validate(Profile, apply_sets(Profile().model_dump(), for_profile), "profile")
    check_batches(loaded, settings)
    return loaded, settings


def _for_study(sets: Sequence[str]) -> list[str]:
    return [setting for setting in sets if not setting.startswith("profile.")]


def check_batches(study: Study, profile: Profile) -> None:
    """Refuse a batch size that the profile's workers cannot divide evenly, before hours of earlier
    steps. Raises `StudyError`."""
    if study.classifier is None or profile.runtime == "inline":
        return
    training, workers = study.training, profile.trial.workers
    parts = workers * training.gradient_accumulation_steps
    if training.batch_size % parts:
        raise StudyError(
            f"profile: trial.workers: {workers} workers cannot share training.batch_size"
            f" {training.batch_size} evenly; make it a multiple of {parts}"
        )


def make_runtime(profile: Profile) -> Runtime:
    """The profile's runtime, not started yet."""
    if profile.runtime == "inline":
        return InlineRuntime()
    from engine.runtime.cluster import RayRuntime

    # A submitted job finds its head with `auto`; `local` always means a private Ray.
    return RayRuntime(
        profile.address, profile.num_cpus, warn=say,
        on_lost=lambda line: interrupts.end_now(line, 1),
    )  # fmt: skip


def print_plan(study: Study, steps: Sequence[Step], store: Store, profile: Profile) -> None:
    """Print each step of the plan with its state and the reason for it, and how long the rest
    takes if a preview measured it."""
    print(f"study {study.name}, storage {store.url}")
    for status in inspect(steps, store):
        why = f": {status.why}" if status.why else ""
        print(f"  {status.step.label:<20} {status.step.key}  {status.state}{why}")
    if text := confirmation_in_words(steps):
        say(text)
    if (rates := read_rates(store, study.name, measured_of(plan(study), profile))) is not None:
        print_forecast(forecast(steps, store, profile, rates))
    elif any(step.kind == "generate" for step in steps):
        say("no forecast yet: --preview 8 measures the rates of this machine")


def show_report(
    study: Study, steps: Sequence[Step], store: Store, manifests: Mapping[str, Manifest]
) -> None:
    """Print the comparison and the verdict, copy the report and its tables to the pages folder, and
    print its location."""
    for step in steps:
        if step.kind != "report":
            continue
        manifest = manifests[step.key]
        for part in manifest.parts:
            name = part.tags["file"]
            store.put(store.page(study.name, page_file(name)), store.read(part.key))
        report = ReportResult.of(manifest)
        print(f"\n{report.table}\n\n{report.verdict}\n", flush=True)
        say(f"report: {store.location(store.page(study.name, 'report.html'))}")


def show_pages(study: Study, step: Step, store: Store, manifest: Manifest) -> None:
    """Copy a step's picture sheet and list to the pages folder, and print their locations."""
    files = (
        ("sheet.png", "png", "picture sheet"), ("list.csv", "csv", "list"),
        ("relabelling.html", "html", "votes on labels"),
    )  # fmt: skip
    for name, suffix, what in files:
        for key in manifest.keys(file=name):
            page = store.page(study.name, f"{step.label}.{suffix}")
            store.put(page, store.read(key))
            say(f"{what}: {store.location(page)}")


def main(command: Callable[..., int] = run_study, **options: Any) -> None:
    """Run a command of a script in `jobs/`, and end the process with its exit code."""
    with interrupts.job() as job:
        try:
            code = command(**options)
        except BrokenPipeError:
            # The reader closed the pipe (`… | head`): report SIGPIPE as a shell does, because the
            # work may be unfinished.
            code = 141
        # `finish` ends the process although library threads may still wait on dead sockets.
        job.finish(code)
