"""A study to its steps: pure and cheap, without a look at any data."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from engine.core.errors import StudyError
from engine.core.registry import resolve
from engine.core.rng import derive_seed
from engine.core.spec import digest, without
from engine.core.step import Step, make_step, upstream
from engine.sections import Amount
from engine.steps.measure import measuring
from engine.steps.search import Arm
from engine.study import Study


def plan(study: Study) -> list[Step]:
    """The steps of a study, inputs before what uses them. Raises `StudyError`."""
    tasks = dict(resolve("readers", study.reader.name)(study.reader).tasks())  # type: ignore[attr-defined]
    task = choose_task(study, tasks)
    common = {"task": task, "tasks": tasks}
    ingest = make_step(
        "ingest", "ingest",
        {
            "reader": study.reader, **common, "preprocess": study.preprocess, "split": study.split,
            "audit": study.audit, "seed": study.seed,
        },
        plugins=[("readers", study.reader), ("embedders", study.audit.embedder)],
    )  # fmt: skip
    embed = make_step(
        "embed", "embed", {"embedder": study.embedder}, {"ingest": ingest},
        plugins=[("embedders", study.embedder)],
    )  # fmt: skip
    cluster = make_step(
        "cluster", "cluster", {"settings": study.cluster, **common, "seed": study.seed},
        {"ingest": ingest, "embed": embed},
    )  # fmt: skip
    select = make_step(
        "select",
        "select",
        {"task": task, "settings": study.select, "seed": study.seed},
        {"ingest": ingest, "cluster": cluster, "embed": embed},
    )
    steps = [ingest, embed, cluster, select]
    reduce = _reduce_step(study, task, ingest, embed, cluster)
    if reduce is not None:
        steps.append(reduce)
    comparison = None
    if study.classifier is not None:
        comparison = Comparison(study, common, ingest, embed, reduce)
    if comparison is not None:
        comparison.check()
        # What is wrong with a labeler is told before hours of training.
        steps += [comparison.real, *comparison.curation.values()]
    elif any(getattr(one, "strict", False) for one in study.curate.filters):
        raise StudyError(
            "curate.filters: one is strict, and a study without a classifier ends before images"
            " are curated; name a classifier, or leave strict out"
        )
    for label, generator in study.generators.items():
        steps += _generator_steps(
            study, label, generator, common, ingest, cluster, select, comparison
        )
    for label, match in study.match.items():
        steps.append(_match_step(study, label, match, task, ingest, embed, comparison))
    if comparison is not None:
        steps += comparison.steps()
    return steps


def plan_audit(study: Study) -> Step:
    """The step that looks for what is wrong with a study's data; no other needs it. It embeds by a
    network where the study names one."""
    tasks = dict(resolve("readers", study.reader.name)(study.reader).tasks())  # type: ignore[attr-defined]
    named_ones = (study.embedder, study.audit.embedder)
    embedder = next((one for one in named_ones if one.name != "pixels"), study.embedder)  # type: ignore[attr-defined]
    return make_step(
        "audit", "audit",
        {
            "name": study.name, "reader": study.reader, "task": choose_task(study, tasks),
            "tasks": tasks, "preprocess": study.preprocess, "split": study.split,
            "audit": study.audit, "embedder": embedder, "seed": study.seed,
        },
        plugins=[("readers", study.reader), ("embedders", embedder)],
    )  # fmt: skip


def _reduce_step(study: Study, task: str, ingest: Step, embed: Step, cluster: Step) -> Step | None:
    if study.reduce is None:
        return None
    method = study.reduce.method
    if method == "umap" and find_spec("umap") is None:
        raise StudyError(
            "reduce.method: umap needs umap-learn: pip install"
            ' "synthetic-training-engine[umap]", or say tsne'
        )
    inputs = {"ingest": ingest, "embed": embed}
    if method == "stratified":
        inputs["cluster"] = cluster
    return make_step(
        "reduce", "reduce", {"settings": study.reduce, "task": task, "seed": study.seed}, inputs
    )


def _match_step(
    study: Study, label: str, match: Any, task: str, ingest: Step, embed: Step,
    comparison: Comparison | None,
) -> Step:  # fmt: skip
    inputs = {"ingest": ingest, "embed": embed}
    for role in ("queries", "among"):
        name = getattr(match, role)
        if name in ("train", "val"):
            continue
        if name not in study.generators:
            known = ", ".join(["train", "val", *study.generators])
            raise StudyError(f"match.{label}.{role}: there is no {name!r}; there are {known}")
        curate = comparison.pools[name] if comparison is not None else None
        if curate is None or "embed" not in curate.inputs:
            raise StudyError(
                f"match.{label}.{role}: images of {name} are not embedded, which curate does where"
                " the study has a classifier and the generator is filtered"
            )
        inputs |= {f"{role}.curate": curate, f"{role}.generate": curate.inputs["generate"]}
    return make_step(
        "match", f"match.{label}", {"settings": match, "task": task, "seed": study.seed}, inputs
    )


def _generator_steps(
    study: Study,
    label: str,
    spec: Any,
    common: dict[str, Any],
    ingest: Step,
    cluster: Step,
    select: Step,
    comparison: Comparison | None,
) -> list[Step]:
    """request, finetune (of what is trained) and generate of one generator; where images are
    compared, curate too, and as many rounds of asking for more as the study allows."""
    kind = resolve("generators", spec.name)
    generator = kind(spec, study.preprocess)
    generator.check()
    inputs = {"ingest": ingest}
    if generator.uses_clusters():
        inputs["cluster"] = cluster
    plugins = [("generators", spec), *generator.nested()]
    nested = {plugin.name: resolve(family, plugin.name).version
              for family, plugin in generator.nested()}  # fmt: skip
    finetune = None
    if generator.trainable:
        finetune = make_step(
            "finetune", f"finetune.{label}",
            {
                "generator": without(spec, kind.sampling_fields),
                "preprocess": study.preprocess,
                "task": common["task"], "seed": study.seed,
            },
            inputs, plugins,
        )  # fmt: skip
    generator_key = digest(
        {
            "code": kind.version,
            **({"nested": nested} if nested else {}),
            "spec": spec,
            "preprocess": study.preprocess,
            "task": common["task"],
            "ingest": ingest.key, "finetune": finetune.key if finetune else None,
        }
    )  # fmt: skip
    if generator.parents() == "representatives":
        inputs = {**inputs, "select": select}
    steps: list[Step] = []
    curate: Step | None = None
    rounds = study.curate.max_rounds if comparison is not None else 1
    for number in range(1, rounds + 1):
        suffix = label if number == 1 else f"{label}.{number}"
        request = make_step(
            "request", f"request.{suffix}",
            {
                "request": study.request,
                "least_ratio": comparison.largest_ratio if comparison is not None else 0.0,
                "generator": spec, "generator_key": generator_key,
                "preprocess": study.preprocess, **common, "seed": study.seed,
            },
            {**inputs, **({"curate": curate} if curate else {})}, plugins,
        )  # fmt: skip
        # The request first: what is wrong with it is told before hours of training.
        steps.append(request)
        if finetune is not None and number == 1:
            steps.append(finetune)
        generate = make_step(
            "generate", f"generate.{suffix}",
            {
                "generator": spec, "generator_key": generator_key, "preprocess": study.preprocess,
                **common,
            },
            {"ingest": ingest, "request": request, **({"finetune": finetune} if finetune else {})},
            plugins,
        )  # fmt: skip
        steps.append(generate)
        if comparison is not None:
            curate = comparison.curate(suffix, generate, generator_key, generator.filtered)
            steps.append(curate)
    if comparison is not None and curate is not None:
        comparison.add(label, generator, curate)
    return steps


class Comparison:
    """The steps that find out whether images help: labeler, curate, mixes, search, evaluate,
    report."""

    def __init__(
        self, study: Study, common: dict[str, Any], ingest: Step, embed: Step, reduce: Step | None
    ) -> None:
        self.study, self.task = study, common["task"]
        self.ingest, self.embed, self.reduce = ingest, embed, reduce
        self.plugins = [("classifiers", study.classifier)]
        self.real = self._mix("real")
        self.mixes: list[Step] = [self._mix("oversampled")]
        self.pools: dict[str, Step] = {}
        self.arms = [
            Arm(name="real", family="real", mix="mix.real"),
            Arm(name="real_double", family="real_double", mix="mix.real", budget=2.0),
            Arm(name="oversampled", family="oversampled", mix="mix.oversampled"),
        ]
        # What filters need beside the images: the labeler's training, and val measured.
        names = [str(getattr(one, "name", "")) for one in study.generators.values()]
        filtered = [name for name in names if resolve("generators", name).filtered]
        self.curation = self._curation() if study.curate.filters and filtered else {}
        if reduce is not None:
            self.mixes.append(self._mix("reduced", reduce=reduce))
            self.arms.append(Arm(name="reduced", family="reduced", mix="mix.reduced"))

    def check(self) -> None:
        """Refuse a classifier that cannot work at this size."""
        name = self.study.classifier.name  # type: ignore[union-attr]
        resolve("classifiers", name)(self.study.classifier, self.study.preprocess, ()).check()

    def _curation(self) -> dict[str, Step]:
        """Also sets `labeler` and `filter_plugins`."""
        study, filters = self.study, self.study.curate.filters
        spec: Any = study.curate.labeler
        self.filter_plugins: list[tuple[str, Any]] = [("filters", one) for one in filters]
        found = {}
        if spec is not None:
            self.filter_plugins.append(("labelers", spec))
            if resolve("labelers", spec.name).trained:
                spec = spec.model_copy(
                    update={
                        "classifier": spec.classifier or study.classifier,
                        "training": spec.training or study.training,
                    }
                )
                found["labeler"] = make_step(
                    "train", "train.labeler",
                    {
                        "classifier": spec.classifier, "training": spec.training,
                        "preprocess": study.preprocess, "task": self.task,
                        "seed": derive_seed(study.seed, "labeler"),
                    },
                    {"ingest": self.ingest, "mix": self.real}, [("classifiers", spec.classifier)],
                )  # fmt: skip
                self.filter_plugins.append(("classifiers", spec.classifier))
        self.labeler = spec
        looks = measuring(self.task, study.preprocess, spec, filters)
        if looks.labeler is not None or looks.filters:
            found["measure"] = make_step(
                "measure", "measure.val", looks.model_dump(),
                {"ingest": self.ingest, **found},
                [("filters", one) for one in looks.filters]
                + [plugin for plugin in self.filter_plugins if plugin[0] != "filters"],
            )  # fmt: skip
        return found

    @property
    def largest_ratio(self) -> float:
        return max(self.study.search.ratios)

    def amounts(self) -> dict[str, Amount]:
        """How many images the arms of a generator add, by what follows its name: every ratio of the
        search, and what the study requests."""
        request = self.study.request
        ratios = sorted({*self.study.search.ratios, *([request.ratio] if request.ratio else [])})
        found = {f"x{ratio:g}": Amount(ratio=ratio) for ratio in ratios}
        if request.balance_to is not None:
            found[f"to {request.balance_to}"] = Amount(balance_to=request.balance_to)
        if request.per_class is not None:
            found[f"+{request.per_class}"] = Amount(per_class=request.per_class)
        return found

    def curate(self, suffix: str, generate: Step, generator_key: str, filtered: bool) -> Step:
        study, inputs = self.study, {"ingest": self.ingest, "generate": generate}
        spec: dict[str, Any] = {"filters": ()}
        plugins: list[tuple[str, Any]] = []
        if filtered and study.curate.filters:
            inputs |= {"embed": self.embed, **self.curation}
            spec = {
                "filters": study.curate.filters, "labeler": self.labeler,
                "embedder": study.embedder,
            }  # fmt: skip
            plugins = [*self.filter_plugins, ("embedders", study.embedder)]
        return make_step(
            "curate", f"curate.{suffix}",
            {
                "task": self.task, "preprocess": study.preprocess,
                "generator_key": generator_key, **spec,
            },
            inputs, plugins,
        )  # fmt: skip

    def add(self, label: str, generator: Any, curate: Step) -> None:
        """The arms of one generator: a mix for each amount."""
        self.pools[label] = curate
        for name, amount in self.amounts().items():
            mix = self._mix(label, name, amount, curate)
            self.mixes.append(mix)
            self.arms.append(
                Arm(
                    name=f"{label} {name}", family=label, ratio=amount.ratio, mix=mix.label,
                    synthetic=generator.synthetic,
                )
            )  # fmt: skip

    def _mix(
        self, family: str, name: str = "", amount: Amount | None = None,
        curate: Step | None = None, reduce: Step | None = None,
    ) -> Step:  # fmt: skip
        study = self.study
        return make_step(
            "mix", f"mix.{family}.{name.replace(' ', '.')}" if curate else f"mix.{family}",
            {
                "task": self.task, "family": family, "amount": amount,
                # Real images are the same whatever the target classes are.
                "classes": study.request.classes if curate else "all",
                "seed": study.seed if curate else 0,
            },
            {
                "ingest": self.ingest,
                **({"reduce": reduce} if reduce else {}),
                **({"curate": curate, "generate": curate.inputs["generate"]} if curate else {}),
            },
        )  # fmt: skip

    def steps(self) -> list[Step]:
        """The mixes, and all that comes after them."""
        study = self.study
        search = make_step(
            "search", "search",
            {
                "classifier": study.classifier, "training": study.training,
                "preprocess": study.preprocess, "task": self.task, "arms": tuple(self.arms),
                "seeds": tuple(
                    derive_seed(study.seed, "classifier", number)
                    for number in range(study.search.seeds)
                ),
            },
            {"ingest": self.ingest, **{mix.label: mix for mix in [self.real, *self.mixes]}},
            self.plugins,
        )  # fmt: skip
        evaluate = make_step(
            "evaluate", "evaluate",
            {
                "settings": study.evaluate, "classifier": study.classifier,
                "preprocess": study.preprocess, "task": self.task,
                "objective": study.training.objective, "seed": study.seed,
            },
            {"ingest": self.ingest, "search": search}, self.plugins,
        )  # fmt: skip
        pools = {
            f"{kind}.{label}": step
            for label, curate in self.pools.items()
            for kind, step in (("curate", curate), ("generate", curate.inputs["generate"]))
        }
        report = make_step(
            "report", "report",
            {
                "study": study.model_dump(mode="json"), "preprocess": study.preprocess,
                "task": self.task, "generators": tuple(self.pools),
                "target_classes": study.request.classes, "seed": study.seed,
            },
            {
                "ingest": self.ingest, "embed": self.embed, "search": search,
                "evaluate": evaluate, **pools,
            },
        )  # fmt: skip
        return [*self.mixes, search, evaluate, report]


def choose_task(study: Study, tasks: dict[str, Any]) -> str:
    """The task that the study is about. Raises `StudyError` where that is not clear."""
    if study.task is None:
        if len(tasks) == 1:
            return next(iter(tasks))
        raise StudyError(f"task: the data has several; choose one of {', '.join(tasks)}")
    if study.task not in tasks:
        raise StudyError(f"task: the data has no task {study.task!r}; it has {', '.join(tasks)}")
    return study.task


def until(steps: list[Step], name: str) -> list[Step]:
    """The steps up to those named, by kind (`generate`) or label (`generate.ddpm`).

    Of generators, only what the named steps need; of the rest, all that stands before them.
    """
    chosen = named(steps, name)
    needed = {step.key for step in upstream(chosen)}
    last = max(index for index, step in enumerate(steps) if step in chosen)
    return [
        step
        for index, step in enumerate(steps)
        if step.key in needed or (index <= last and "." not in step.label)
    ]


def named(steps: list[Step], name: str) -> list[Step]:
    """All steps of this kind or label. Raises `StudyError`."""
    chosen = [step for step in steps if name in (step.kind, step.label)]
    if not chosen:
        labels = dict.fromkeys([step.kind for step in steps] + [step.label for step in steps])
        raise StudyError(f"there is no step {name!r} in this study; there are {', '.join(labels)}")
    return chosen
