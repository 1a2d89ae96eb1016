"""What the scripts in `jobs/` share: arguments, the walk, errors in one line.

Exit codes: 0 done; 1 the run stopped (data, leaks, storage) and can go on later; 2 the study, the
profile or the command line is wrong; 130 and 143 interrupted, by SIGINT and by SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engine.core import interrupts, rows
from engine.core.errors import EngineError, StudyError
from engine.core.manifest import Manifest
from engine.core.names import slug
from engine.core.progress import say
from engine.core.step import Step
from engine.core.store import Store
from engine.execute import discard, execute, inspect, naming_damage
from engine.plan import choose_task, named, plan, plan_audit, tasks_of, until
from engine.profile import Profile
from engine.report.download import beside
from engine.results.comparison import ReportResult
from engine.results.data import AuditResult
from engine.runtime.base import Runtime
from engine.runtime.inline import InlineRuntime
from engine.study import Study, apply_sets, load_profile, load_study, load_values, validate
from engine.tracking.mlflow import track
from engine.tracking.tensorboard import write_logs


def run_study(
    argv: Sequence[str] | None = None, *, until_step: str | None = None, dry_run: bool = False
) -> int:
    """Run a study, or as much of it as the arguments say; returns the exit code."""
    arguments = _parser(until_step, dry_run).parse_args(argv)
    return _in_one_line(
        lambda: _run(arguments, arguments.until or until_step, arguments.dry_run or dry_run)
    )


def run_export(argv: Sequence[str] | None = None) -> int:
    """Write the images of an arm where the arguments say; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write a study's images for other tools.")
    _add_common(parser)
    parser.add_argument(
        "--arm", required=True,
        help="an arm of the comparison (ddpm x1), a generator (ddpm: all that was kept), or real",
    )  # fmt: skip
    parser.add_argument("--to", required=True, help="an empty folder, or a URL such as s3://b/f")
    parser.add_argument(
        "--format", default="imagefolder", help="imagefolder, csv, parquet or webdataset"
    )
    parser.add_argument("--splits", nargs="+", default=list(rows.SPLITS), help="default: all")
    arguments = parser.parse_args(argv)

    def act() -> int:
        from engine.export import export

        study, profile = read(arguments.study, arguments.profile, arguments.sets)
        target = Store(arguments.to)
        store = Store(profile.storage)
        with naming_damage(plan(study), store):
            told = export(
                study, store, target, arguments.arm, arguments.format, arguments.splits
            )
        totals = {split: sum(sum(sources.values()) for sources in by_class.values())
                  for split, by_class in told["images"].items()}  # fmt: skip
        shown = ", ".join(f"{count:,} {split}" for split, count in totals.items())
        say(f"{shown}: {target.url}")
        return 0

    return _in_one_line(act)


def run_evaluate(argv: Sequence[str] | None = None) -> int:
    """Run a study up to the verdict, or judge the predictions of a file; returns the exit code."""
    parser = _parser("evaluate", False)
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE",
        help="judge these predictions of the study's test images in place of its own",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", default="real", metavar="ARM",
        help="of FILE, the arm that the others are compared with (default: real)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)

    def act() -> int:
        if arguments.predictions is None:
            last = arguments.until or "evaluate"
            return _run(arguments, last, arguments.dry_run)
        return _judge(arguments)

    return _in_one_line(act)


def _judge(arguments: argparse.Namespace) -> int:
    from engine.predictions import score

    study, profile = read(arguments.study, arguments.profile, arguments.sets)
    store = Store(profile.storage)
    store.probe()
    (ingest,) = named(plan(study), "ingest")
    runtime = make_runtime(profile)
    try:
        manifest = execute([ingest], store, runtime, profile)[ingest.key]
    finally:
        runtime.close()
    task = choose_task(study, tasks_of(study))
    scored = score(study, store, manifest, task, arguments.predictions, arguments.baseline)
    page = store.page(study.name, f"predictions-{slug(arguments.predictions.stem)}.json")
    store.put(page, scored.model_dump_json(indent=1, exclude_unset=True).encode())
    for arm, result in scored.arms.items():
        figure = result.figures[scored.objective]
        print(f"{arm:<24} test {scored.objective} {figure.mean:.3f}"
              f" ({figure.low:.3f} to {figure.high:.3f})")  # fmt: skip
    print(f"\n{scored.verdict}\n", flush=True)
    say(f"test was opened by {scored.test.opened} studies and files of this storage so far")
    say(f"figures: {store.location(page)}")
    return 0


def run_audit(argv: Sequence[str] | None = None) -> int:
    """Write the page that says what is wrong with a study's data; returns the exit code, 0 where
    the page was written."""
    parser = argparse.ArgumentParser(
        description="Look for what is wrong with a study's data, before anything is trained."
    )
    _add_common(parser)
    arguments = parser.parse_args(argv)

    def act() -> int:
        study, profile = read(arguments.study, arguments.profile, arguments.sets)
        step = plan_audit(study)
        store = Store(profile.storage)
        store.probe()
        runtime = make_runtime(profile)
        try:
            manifest = execute([step], store, runtime, profile)[step.key]
        finally:
            runtime.close()
        page = store.page(study.name, "audit.html")
        for key in manifest.keys(file="audit.html"):
            store.put(page, store.read(key))
        audit = AuditResult.of(manifest)
        kinds = ", ".join(
            f"{count:,} {kind.replace('_', ' ')}" for kind, count in audit.found.items()
        )
        say(f"{len(audit.must)} things to mend before a study runs; found: {kinds or 'nothing'}")
        say(f"audit: {store.location(page)}")
        return 0

    return _in_one_line(act)


def run_tune(argv: Sequence[str] | None = None) -> int:
    """Try the settings that a study's section `tune` names, write down the best as a study; returns
    the exit code."""
    parser = argparse.ArgumentParser(
        description="Try settings of a study by what they reach on val; write the best as a study."
    )
    _add_common(parser)
    arguments = parser.parse_args(argv)

    def act() -> int:
        from engine.report.tries import as_csv, as_text
        from engine.tuning.tune import tune

        study, profile = read(arguments.study, arguments.profile, arguments.sets)
        sets = [setting for setting in arguments.sets if not setting.startswith("profile.")]
        store = Store(profile.storage)
        store.probe()
        runtime = make_runtime(profile)
        try:
            tried = tune(load_values(arguments.study, sets), store, runtime, profile)
        finally:
            runtime.close()
        page = store.page(study.name, "tuned.yaml")
        store.put(page, tried.study.encode())
        store.put(store.page(study.name, "tries.csv"), as_csv(tried.tries).encode())
        told = json.dumps({"objective": tried.objective, "tries": tried.tries}, indent=1)
        store.put(store.page(study.name, "tries.json"), told.encode())
        print(f"\n{as_text(tried.tries, tried.best, tried.objective)}\n", flush=True)
        say(f"tries: {store.location(store.page(study.name, 'tries.csv'))}")
        say(f"the best as a study: {store.location(page)}")
        return 0

    return _in_one_line(act)


def run_fsck(argv: Sequence[str] | None = None) -> int:
    """Verify a storage; returns the exit code, 1 where something is damaged and was not
    repaired."""
    parser = argparse.ArgumentParser(
        description="Verify everything in a storage: records, data, weights, checkpoints."
    )
    _add_storage(parser)
    parser.add_argument(
        "--repair", action="store_true",
        help="discard exactly what is damaged, so that the next run makes it again",
    )  # fmt: skip
    arguments = parser.parse_args(argv)

    def act() -> int:
        from engine.maintenance import fsck

        store = Store(_storage(arguments))
        report = fsck.verify(store)
        for fault in report.faults:
            print(fault.line())
        say(
            f"{report.records:,} records, {report.parts:,} parts, {report.bytes / 2**20:,.1f} MiB:"
            f" {len(report.faults)} damaged or missing"
        )
        if not report.faults:
            return 0
        if not arguments.repair:
            say("run again with --repair to discard exactly these; a study makes them again")
            return 1
        repaired = fsck.repair(store, report.faults)
        say(f"{repaired} discarded or restored: run the study again to make what is missing")
        return 0

    return _in_one_line(act)


def run_gc(argv: Sequence[str] | None = None) -> int:
    """List, or remove, what no record of a storage names; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Find what no record of a storage names: left by kills, lost races, --discard."
    )
    _add_storage(parser)
    parser.add_argument(
        "--older-than", type=float, default=7.0, metavar="DAYS",
        help="only what was last written so many days ago; longer than any step takes (default: 7)",
    )  # fmt: skip
    parser.add_argument("--delete", action="store_true", help="remove it; default: list it")
    arguments = parser.parse_args(argv)

    def act() -> int:
        from engine.maintenance import gc

        if arguments.older_than < 0:
            raise StudyError(f"--older-than {arguments.older_than:g}: must not be negative")
        store, limit = Store(_storage(arguments)), time.time() - 86_400 * arguments.older_than
        garbage = (gc.remove if arguments.delete else gc.find_garbage)(store, limit)
        for key in garbage.keys:
            print(key)
        done = "removed" if arguments.delete else "could be removed with --delete"
        say(f"{len(garbage.keys):,} files, {garbage.bytes / 2**20:,.1f} MiB {done}")
        return 0

    return _in_one_line(act)


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "storage", nargs="?", help="a folder or URL; default: the storage of the profile"
    )
    parser.add_argument("--profile", type=Path, help="the profile that names the storage (YAML)")


def _storage(arguments: argparse.Namespace) -> str:
    if arguments.storage is not None:
        return str(arguments.storage)
    profile = load_profile(arguments.profile, []) if arguments.profile else Profile()
    return profile.storage


def _in_one_line(act: Callable[[], int]) -> int:
    """The exit code of what is done; what is wrong is said in a line."""
    try:
        return act()
    except EngineError as error:
        say(f"error: {' '.join(str(error).split())}")
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        interrupts.announce()
        return interrupts.exit_code(interrupt)


def _parser(until_step: str | None, dry_run: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run a study: from labelled images to synthetic ones."
    )
    _add_common(parser)
    parser.add_argument(
        "--until",
        metavar="STEP",
        default=None,
        help=f"stop after this step (default: {until_step or 'the last'})",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=dry_run,
        help="print the plan, what is there and why not",
    )
    parser.add_argument(
        "--preview",
        type=int,
        metavar="N",
        help="make N images per class on one page, with the cost of all",
    )
    parser.add_argument(
        "--discard", action="append", default=[], metavar="STEP",
        help="throw away what this step has committed, then go on; repeatable",
    )  # fmt: skip
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, help="the study file (YAML)")
    parser.add_argument(
        "--profile", type=Path, help="where and how to compute (YAML); default: this machine"
    )
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="A.B=C",
        help="change a field of the study, or of the profile by profile.a=b; repeatable",
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
        raise StudyError("--discard changes storage and --dry-run must not: choose one of them")
    if arguments.preview is not None and not any(step.kind == "generate" for step in steps):
        raise StudyError("--preview: the study names no generator up to this step")
    if dry_run:
        with naming_damage(steps, store):
            print_plan(study, steps, store)
        return 0
    store.probe()
    for name in arguments.discard:
        every = plan(study)
        for step in named(every, name):
            shards = discard(step, store, every)
            say(f"{step.label:<20} {step.key}  discarded {shards} shards and its result")
    say(f"study {study.name}: {len(steps)} steps, storage {store.url}")
    started = time.monotonic()
    runtime = make_runtime(profile)
    try:
        if arguments.preview is not None:
            from engine.preview import preview

            with naming_damage(steps, store):
                preview(study, steps, store, runtime, profile, arguments.preview)
        else:
            manifests = execute(steps, store, runtime, profile)
            with naming_damage(steps, store):
                show_report(study, steps, store, manifests)
                track(study, steps, store, manifests, profile.mlflow, say)
                write_logs(study, steps, store, say)
                for step in steps:
                    # Of a generator's rounds, the first shows what it makes.
                    if step.label.count(".") < 2:
                        show_pages(study, step, store, manifests[step.key])
    finally:
        runtime.close()
    say(f"done in {time.monotonic() - started:.1f} s")
    return 0


def read(study: Path, profile: Path | None, sets: Sequence[str]) -> tuple[Study, Profile]:
    """The study and the profile with settings laid over both. Raises `StudyError`."""
    for_profile = [
        setting.removeprefix("profile.") for setting in sets if setting.startswith("profile.")
    ]
    for_study = [setting for setting in sets if not setting.startswith("profile.")]
    found = load_study(study, for_study)
    if profile is not None:
        where = load_profile(profile, for_profile)
    else:
        values = apply_sets(Profile().model_dump(), for_profile)
        where = validate(Profile, values, "profile")
    check_batches(found, where)
    return found, where


def check_batches(study: Study, profile: Profile) -> None:
    """Refuse batches that the profile's workers could not share, before hours of other work lead
    up to them. Raises `StudyError`."""
    if study.classifier is None or profile.runtime == "inline":
        return
    training, workers = study.training, profile.trial.workers
    parts = workers * training.gradient_accumulation_steps
    if training.batch_size % parts:
        raise StudyError(
            f"profile: trial.workers: {workers} workers cannot share training.batch_size"
            f" {training.batch_size}; make it a multiple of {parts}"
        )


def make_runtime(profile: Profile) -> Runtime:
    """The runtime that the profile asks for; nothing is started yet."""
    if profile.runtime == "inline":
        return InlineRuntime()
    from engine.runtime.cluster import RayRuntime

    # Under `ray job submit` the head says where it is; a profile that says `local` is meant.
    return RayRuntime(
        profile.address, profile.num_cpus, warn=say,
        on_lost=lambda line: interrupts.end_now(line, 1),
    )  # fmt: skip


def print_plan(study: Study, steps: Sequence[Step], store: Store) -> None:
    """The plan with what is there and, for the rest, why not."""
    print(f"study {study.name}, storage {store.url}")
    for status in inspect(steps, store):
        why = f": {status.why}" if status.why else ""
        print(f"  {status.step.label:<20} {status.step.key}  {status.state}{why}")


def show_report(
    study: Study, steps: Sequence[Step], store: Store, manifests: Mapping[str, Manifest]
) -> None:
    """Print the comparison and the verdict, copy the page and its tables to where a person finds
    them, say where."""
    for step in steps:
        if step.kind != "report":
            continue
        manifest = manifests[step.key]
        for part in manifest.parts:
            name = part.tags["file"]
            store.put(store.page(study.name, beside(name)), store.read(part.key))
        report = ReportResult.of(manifest)
        print(f"\n{report.table}\n\n{report.verdict}\n", flush=True)
        say(f"report: {store.location(store.page(study.name, 'report.html'))}")


def show_pages(study: Study, step: Step, store: Store, manifest: Manifest) -> None:
    """Copy a step's picture sheet and list to where a person finds them, and say where."""
    for name, suffix, what in (("sheet.png", "png", "picture sheet"), ("list.csv", "csv", "list")):
        for key in manifest.keys(file=name):
            page = store.page(study.name, f"{step.label}.{suffix}")
            store.put(page, store.read(key))
            say(f"{what}: {store.location(page)}")


def main(*, until_step: str | None = None, dry_run: bool = False) -> None:
    """Entry of a script in `jobs/`."""
    _end(lambda: run_study(until_step=until_step, dry_run=dry_run))


def main_export() -> None:
    """Entry of `jobs/export.py`."""
    _end(run_export)


def main_evaluate() -> None:
    """Entry of `jobs/evaluate.py`."""
    _end(run_evaluate)


def main_tune() -> None:
    """Entry of `jobs/tune.py`."""
    _end(run_tune)


def main_audit() -> None:
    """Entry of `jobs/audit.py`."""
    _end(run_audit)


def main_fsck() -> None:
    """Entry of `jobs/fsck.py`."""
    _end(run_fsck)


def main_gc() -> None:
    """Entry of `jobs/gc.py`."""
    _end(run_gc)


def _end(act: Callable[[], int]) -> None:
    with interrupts.job() as job:
        try:
            code = act()
        except BrokenPipeError:
            # A closed pipe (`… | head`) needs no traceback, but the work may be unfinished: as a
            # shell reports SIGPIPE.
            code = 141
        # Threads of libraries that wait on dead sockets must not keep a finished run alive.
        job.finish(code)
