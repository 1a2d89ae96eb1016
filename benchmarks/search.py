"""A search of 6 ratios × 5 seeds: the engine on Ray, a plain loop, and Optuna, on two cores.

30 classifiers (`small`, digits at 16 px) train on real images and augmented copies at six ratios,
with five seeds each. All rivals train with the engine's own function
(`nets.classification.train`) on the same images; only the orchestration differs.

engine: the `train` steps of a study as trials of Ray Tune, two processes of one thread. Each reads
the images of its arm from the store and commits weights, predictions and a manifest. `warm` reuses
running processes; `cold` includes the start of Ray.
loop: one process of two threads, images decoded once and kept in memory; only the score is kept.
loop, one thread: the same; small networks are often no faster on two.
loop, decoding: as `loop`, but images are decoded in every trial.
optuna: the same grid from its queue, two processes of one thread that share a journal file, images
in memory. Its processes are started each time. (Its grid sampler repeated some trials and skipped
others when two processes shared it.)

How to read it. Ratios are rival / engine, of wall time: above 1 the engine is faster. Rivals run in
turn. Overhead per trial is given twice: for empty trials through Ray (the cost of the framework),
and for trials of one optimizer step in one process, with and without the store (the cost of
storing results). At the end a search is killed half-way (SIGKILL) and run again.

`python -m benchmarks.search [--steps N] [--rounds N] [--only-restart] [--quick]`
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Cost, machine, print_table, quartiles, ratios, timed
from engine.comparison.arms import planned_trials
from engine.core.manifest import Manifest, read_manifest
from engine.core.registry import resolve
from engine.core.rng import derive_seed
from engine.core.step import Step, upstream
from engine.core.store import Store
from engine.data.arrays import Stack, read_pixels
from engine.data.dataset import split_index
from engine.execute import RunTrial, Trials, execute
from engine.nets.classification import LabelledImages, class_numbers, train
from engine.plan import named, plan
from engine.profile import Profile
from engine.results.data import IngestResult
from engine.runtime.base import Runtime
from engine.runtime.cluster import RayRuntime
from engine.runtime.inline import InlineRuntime
from engine.steps.train import TrainClassifier
from engine.study import Study, validate
from engine.work.fit import FitContext

# Child processes read the form of the search from their environment.
RATIOS = tuple(map(float, os.environ.get("BENCHMARK_RATIOS", "0.5 1 1.5 2 3 4").split()))
SEEDS = int(os.environ.get("BENCHMARK_SEEDS", "5"))
TRIALS = len(RATIOS) * SEEDS
PROFILE: dict[str, Any] = {"num_cpus": 2, "trial": {"cpus": 1, "threads": 1}, "mlflow": "none"}


def study_of(steps: int) -> Study:
    return validate(
        Study,
        {
            "name": "benchmark", "seed": 7, "reader": "digits",
            "preprocess": {"size": 16, "channels": "L"}, "split": {"group": "none"},
            "generators": {"moved": {"name": "traditional", "rotate": 10}},
            "request": {"ratio": RATIOS[-1]},
            "classifier": {"name": "small", "channels": [16, 32, 64]},
            "training": {"steps": steps, "batch_size": 32, "learning_rate": 3e-3,
                         "evaluate_every": max(1, steps // 6)},
            "search": {"ratios": list(RATIOS), "seeds": SEEDS},
        },
        "benchmark",
    )  # fmt: skip


def trials_of(study: Study) -> list[Step]:
    (search,) = named(plan(study), "search")
    found = [trial.step for trial in planned_trials(search) if trial.arm.family == "moved"]
    assert len(found) == TRIALS
    return found


def needed(steps: Sequence[Step]) -> list[Step]:
    return upstream([one for step in steps for one in step.inputs.values()])


# The rivals' side ---------------------------------------------------------------------------------


@dataclass
class Trainer:
    """A plain script with the engine's training function: images in memory, or read again for every
    trial."""

    storage: str
    steps: list[Step]
    threads: int
    decodes: bool = False

    def load(self) -> None:
        self.store = Store(self.storage)
        manifests = {key: read_manifest(self.store, one)
                     for one in needed(self.steps) for key in [one.key]}  # fmt: skip
        self.held: dict[tuple[str, ...], tuple[np.ndarray, list[str]]] = {}
        self.fits = []
        for step in self.steps:
            inputs = {name: manifests[one.key] for name, one in step.inputs.items()}
            self.fits.append(self._fit(step, {k: v for k, v in inputs.items() if v is not None}))

    def _fit(self, step: Step, inputs: Mapping[str, Manifest]) -> TrainClassifier:
        ingest, spec = inputs["ingest"], step.spec
        pools = [manifest for name, manifest in inputs.items() if name.startswith("generate")]
        return TrainClassifier(
            self.store, spec, IngestResult.of(ingest).classes, tuple(ingest.keys(split="train")),
            tuple(tuple(part.key for part in pool.parts if "label" in part.tags) for pool in pools),
            tuple(ingest.keys(split="val")), tuple(inputs["mix"].keys(table="members")),
            split_index(self.store, ingest, spec.task, "val"),
        )  # fmt: skip

    def _pixels(self, keys: tuple[str, ...], shape: tuple[int, int, int]) -> Any:
        if self.decodes or keys not in self.held:
            self.held[keys] = read_pixels(self.store, keys, shape)
        return self.held[keys]

    def __call__(self, number: int) -> float:
        """Trains trial `number`; returns its macro F1 on val."""
        fit = self.fits[number]
        shape = fit.spec.preprocess.shape
        classifier = resolve("classifiers", fit.spec.classifier.name)(
            fit.spec.classifier, fit.spec.preprocess, fit.classes
        )
        pools = [self._pixels(keys, shape) for keys in (fit.images, *fit.synthetic)]
        val, _ = self._pixels(fit.val_images, shape)
        labels = class_numbers(fit.val["label.class"].to_pylist(), fit.classes)
        (members,) = self.store.tables(list(fit.members))
        places = {name: place for place, name in enumerate(chain(*(ids for _, ids in pools)))}
        data = LabelledImages(
            Stack([pixels for pixels, _ in pools]),
            class_numbers(members["label.class"].to_pylist(), fit.classes),
            members["weight"].to_numpy(),
            np.asarray([places[name] for name in members["image_id"].to_pylist()]),
        )
        with tempfile.TemporaryDirectory() as folder:
            context = FitContext(Store(folder), "work", "output", "one", "none",
                                 threads=self.threads, checkpoint_every=10**9)  # fmt: skip
            made = train(
                context, classifier.build, classifier.prepare, data,
                LabelledImages(val, labels, np.ones(len(labels))), fit._score,
                fit.spec.training, derive_seed(fit.spec.seed, "train"),
            )  # fmt: skip
        return fit._score(labels, made.probabilities)["macro_f1"]


def loop(trainer: Trainer) -> list[float]:
    trainer.load()
    return [trainer(number) for number in range(TRIALS)]


def optimize(trainer: Trainer, journal: str) -> None:
    """One of Optuna's processes: runs trials until the queue is empty."""
    import optuna

    trainer.load()
    study = optuna.load_study(study_name="grid", storage=_journal(journal))

    def objective(trial: Any) -> float:
        ratio = trial.suggest_int("ratio", 0, len(RATIOS) - 1)
        return trainer(ratio * SEEDS + trial.suggest_int("seed", 0, SEEDS - 1))

    def ends(study: Any, trial: Any) -> None:
        if not study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.WAITING]):
            study.stop()

    study.optimize(objective, callbacks=[ends])


def _journal(path: str) -> Any:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return JournalStorage(JournalFileBackend(path))


def by_optuna(trainer: Trainer) -> list[float]:
    """The grid on two processes; returns the score of each trial."""
    import optuna

    with tempfile.TemporaryDirectory() as folder:
        journal = f"{folder}/journal"
        study = optuna.create_study(study_name="grid", storage=_journal(journal))
        for number in range(TRIALS):
            study.enqueue_trial({"ratio": number // SEEDS, "seed": number % SEEDS})
        spawn = multiprocessing.get_context("spawn")
        processes = [spawn.Process(target=optimize, args=(trainer, journal)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found = {trial.params["ratio"] * SEEDS + trial.params["seed"]: trial.value
                 for trial in study.trials if trial.value is not None}  # fmt: skip
        assert len(study.trials) == TRIALS
    return [float(found[number]) for number in range(TRIALS)]


# The engine's side --------------------------------------------------------------------------------


def by_engine(base: Path, steps: list[Step], runtime: Runtime) -> list[float]:
    """The trials in a separate storage that contains their inputs."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        store = Store(folder)
        made = Trials(store, runtime, profile_at(folder)).run(steps, lambda count: None)
        return [float(made[step.key].metrics["val"]["macro_f1"]) for step in steps]


def profile_at(storage: str) -> Profile:
    return validate(Profile, {**PROFILE, "storage": storage}, "profile")


def nothing(name: str, runtime: Runtime) -> dict[str, float]:
    """An empty trial."""
    return {}


def overheads(base: Path, runtime: Runtime, repeats: int) -> None:
    """Seconds per trial spent on anything but training."""
    resources = profile_at("runs").trial

    def empty(count: int) -> float:
        names = [f"trial {number}" for number in range(count)]
        return timed(lambda: runtime.search(nothing, names, resources, lambda _: None)).wall

    few, many = ([empty(times * TRIALS) for _ in range(repeats)] for times in (1, 4))
    each = [(much - little) / (3 * TRIALS) for little, much in zip(few, many, strict=True)]
    short = trials_of(study_of(1))
    trainer = Trainer(str(base), short, threads=1)
    trainer.load()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        store, alone = Store(folder), InlineRuntime(threads=1)
        inputs = {one.key: read_manifest(store, one) for one in needed(short)}
        run = RunTrial({step.key: step for step in short}, inputs, store, profile_at(folder))
        kept: list[float] = []
        for number, step in enumerate(short):
            bare = timed(lambda number=number: trainer(number)).wall
            kept.append(timed(lambda step=step: run(step.key, alone)).wall - bare)
    print_table(
        "overhead: median [quartiles]",
        ["what", "s"],
        [
            [f"a search of {TRIALS} empty trials on a warm Ray", quartiles(few).show(1)],
            ["of it, each trial (from four times as many)", quartiles(each).show()],
            ["one step of training: store and all - bare, one process", quartiles(kept[2:]).show()],
        ],
    )


def manifests(storage: str) -> list[Path]:
    return list(Path(storage).glob("steps/train/*/manifest.json"))


def restart(base: Path, steps: int) -> None:
    """Kill a search half-way, then run it again: which trials are computed twice."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.search", "--child", folder]
        command += ["--steps", str(steps)]
        begun = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(manifests(folder)) < TRIALS // 2 and child.poll() is None:
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        first = time.perf_counter() - begun
        time.sleep(5)  # its private Ray dies with it
        kept = {path: path.read_bytes() for path in manifests(folder)}
        begun = time.perf_counter()
        again = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        second = time.perf_counter() - begun
        same = sum(path.read_bytes() == text for path, text in kept.items())
    print_table(
        "killed (SIGKILL) and run again",
        ["", "trials", "s with Ray's start"],
        [
            ["committed when it was killed", f"{len(kept)}", f"{first:.1f}"],
            ["of these left as they were", f"{same}", ""],
            ["made by the second run", f"{again['made']}", f"{second:.1f}"],
            ["in flight at the kill, at most", "2", ""],
        ],
    )


def child(storage: str, steps: int) -> None:
    """A search in a separate process."""
    store, wanted = Store(storage), trials_of(study_of(steps))
    runtime = RayRuntime("local", 2, warn=print)
    runner = Trials(store, runtime, profile_at(storage))
    found = runner.find(wanted)
    missing = [step for step in wanted if step.key not in found]
    runner.run(missing, lambda count: None)
    runtime.close()
    print(json.dumps({"made": len(missing)}), flush=True)


def compare(base: Path, steps: int, rounds: int, repeats: int) -> None:
    wanted = trials_of(study_of(steps))
    scores: dict[str, list[float]] = {}
    warm = RayRuntime("local", 2, warn=print)
    by_engine(base, wanted[:2], warm)

    def cold() -> list[float]:
        # One Ray at a time in a process: in a child.
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(base, folder, dirs_exist_ok=True)
            command = [sys.executable, "-m", "benchmarks.search", "--child", folder]
            subprocess.run([*command, "--steps", str(steps)], capture_output=True, check=True)
        return []

    works: dict[str, Callable[[], list[float]]] = {
        "engine, warm": lambda: by_engine(base, wanted, warm),
        "loop": lambda: loop(Trainer(str(base), wanted, 2)),
        "loop, one thread": lambda: loop(Trainer(str(base), wanted, 1)),
        "optuna": lambda: by_optuna(Trainer(str(base), wanted, 1)),
        "engine, cold": cold,
        "loop, decoding": lambda: loop(Trainer(str(base), wanted, 2, decodes=True)),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in works}
    for number in range(rounds):
        order = list(works) if number % 2 == 0 else list(works)[::-1]
        for name in order:
            costs[name].append(timed(lambda name=name: scores.update({name: works[name]()})))
            print(f"  {name}: {costs[name][-1].wall:.1f} s, load {os.getloadavg()[0]:.1f}")
    lines = []
    for name, found in costs.items():
        engine = costs["engine, cold" if name == "optuna" else "engine, warm"]
        means = np.reshape(scores[name], (-1, SEEDS)).mean(1) if scores[name] else []
        best = f"x{RATIOS[int(np.argmax(means))]:g}, {max(means):.4f}" if len(means) else ""
        wall = quartiles([cost.wall for cost in found])
        lines.append([name, wall.show(1), ratios(found, engine)[0].show(2), best])
    print_table(
        f"{TRIALS} trials of {steps} steps (optuna's ratio is to the engine with Ray's start)",
        ["", "s", "wall / engine", "best on val"], lines,
    )  # fmt: skip
    overheads(base, warm, repeats)
    warm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only-restart", action="store_true")
    parser.add_argument("--quick", action="store_true", help="six trials of 10 steps, one round")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        global RATIOS, SEEDS, TRIALS
        RATIOS, SEEDS, TRIALS = (0.5, 1.0, 1.5), 2, 6
        os.environ |= {"BENCHMARK_RATIOS": "0.5 1 1.5", "BENCHMARK_SEEDS": "2"}
        arguments.steps, arguments.rounds = 10, 1
    if arguments.child:
        child(arguments.child, arguments.steps)
        return
    # Ray starts its workers at nice 15: what else the machine does would take from them alone.
    os.environ["RAY_worker_niceness"] = "0"
    # As in the engine's Ray, for the loop of two threads: on a busy machine threads that spin for
    # each other make it several times slower.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    print(machine("torch", "optuna"))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        profile = profile_at(folder)
        steps = needed(trials_of(study_of(arguments.steps)))
        execute(steps, Store(folder), InlineRuntime(), profile, quiet=True)
        if not arguments.only_restart:
            compare(base, arguments.steps, arguments.rounds, 1 if arguments.quick else 3)
        if not arguments.quick:
            restart(base, arguments.steps)


if __name__ == "__main__":
    main()
