"""The steps of a plan that find out whether images help: what curation needs, the arms, the search,
the verdict, the page."""

from __future__ import annotations

from typing import Any

from engine.core.registry import kind_of, resolve
from engine.core.rng import derive_seed
from engine.core.step import Step, make_step
from engine.sections import Amount
from engine.steps.measure import measuring
from engine.steps.search import Arm
from engine.study import Study


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
        filtered = any(kind_of("generators", one).filtered for one in study.generators.values())
        self.curation = self._curation() if study.curate.filters and filtered else {}
        if reduce is not None:
            self.mixes.append(self._mix("reduced", reduce=reduce))
            self.arms.append(Arm(name="reduced", family="reduced", mix="mix.reduced"))

    def check(self) -> None:
        """Refuse a classifier that cannot work at this size."""
        study = self.study
        assert study.classifier is not None, "a comparison trains a classifier"
        kind_of("classifiers", study.classifier)(study.classifier, study.preprocess, ()).check()

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

    def fidelity(self) -> list[Step]:
        """How like real ones the images of each generator are; first, where the study's embedder
        does not compare them, vectors of the real ones."""
        study, settings = self.study, self.study.fidelity
        if not settings.enabled or not self.pools:
            return []
        embedder = settings.embedder or study.embedder
        plugins = [("embedders", embedder)]
        embed = make_step(
            "embed", "embed.fidelity", {"embedder": embedder}, {"ingest": self.ingest}, plugins
        )
        embed = self.embed if embed == self.embed else embed
        found = [
            make_step(
                "fidelity", f"fidelity.{label}",
                {
                    "embedder": embedder, "sample": settings.sample, "k": settings.k,
                    "task": self.task, "seed": study.seed,
                },
                {
                    "ingest": self.ingest, "embed": embed, "curate": curate,
                    "generate": curate.inputs["generate"],
                },
                plugins,
            )
            for label, curate in self.pools.items()
        ]  # fmt: skip
        return found if embed == self.embed else [embed, *found]

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
        fidelity = self.fidelity()
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
                **{step.label: step for step in fidelity if step.kind == "fidelity"},
            },
        )  # fmt: skip
        return [*self.mixes, *fidelity, search, evaluate, report]
