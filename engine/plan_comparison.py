"""The steps of a plan that test whether images help: curation's inputs, the arms, the search, the
verdict, the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.comparison.arms import Added, Arm
from engine.core.errors import StudyError
from engine.core.registry import kind_of, resolve
from engine.core.rng import derive_seed
from engine.core.step import Step, Subject, make_step
from engine.sections import Amount, Tune
from engine.stages.measuring import measuring
from engine.study import Study


class Comparison:
    """The steps that test whether images help: labeler, curate, mixes, search, evaluate,
    report."""

    def __init__(
        self, study: Study, common: dict[str, Any], ingest: Step, embed: Step, reduce: Step | None
    ) -> None:
        self.study, self.task = study, common["task"]
        self.request = study.request.one_by_one()
        self.ingest, self.embed, self.reduce = ingest, embed, reduce
        self.plugins = [("classifiers", study.classifier)]
        self.real = self._mix("real")
        self.mixes: list[Step] = []
        self.arms = self._real_arms()
        # The kept images of each generator and fit, and all generated ones.
        self.pools: dict[str, list[Step]] = {}
        self.unfiltered: dict[str, list[Step]] = {}
        # Further inputs of filters: the labeler's training, and the measurements of val.
        self.labeler: Any = None
        self.curation = self._curation() if self._filters() else {}

    def _filters(self) -> bool:
        """Whether there are filters, and a generator whose images are filtered."""
        kinds = [kind_of("generators", one) for one in self.study.generators.values()]
        return bool(self.study.curate.filters) and any(kind.filtered for kind in kinds)

    def _real_arms(self) -> list[Arm]:
        """The arms with only real images."""
        search = self.study.search
        settings: dict[str, dict[str, Any]] = {
            "class_weighted": {"class_weights": "balanced"},
            "mixup": {"mixup_alpha": search.mixup_alpha, "cutmix_alpha": 0.0},
            "cutmix": {"cutmix_alpha": search.cutmix_alpha, "mixup_alpha": 0.0},
        }
        real = (self.real.label,)
        arms = [
            Arm(name="real", family="real", mixes=real),
            Arm(name="real_double", family="real_double", mixes=real, budget=2.0, role="shown"),
        ]
        if "oversampled" in search.arms:
            mixes = self._added([self._mix("oversampled", oversampled=True)])
            arms.append(Arm(name="oversampled", family="oversampled", mixes=mixes))
        arms += [
            Arm(name=name, family=name, mixes=real, training=settings[name])
            for name in search.arms
            if name in settings
        ]
        if self.reduce is not None:
            mixes = self._added([self._mix("reduced", real="reduced")])
            arms.append(Arm(name="reduced", family="reduced", mixes=mixes))
        return arms

    def _added(self, mixes: list[Step]) -> tuple[str, ...]:
        """Add mixes to the plan; returns their labels."""
        self.mixes += mixes
        return tuple(mix.label for mix in mixes)

    def check(self) -> None:
        """Raise `StudyError` if the classifier does not fit the image size or an arm's training,
        or if an arm is impossible."""
        study = self.study
        if "synthetic_only" in study.search.arms and study.request.classes != "all":
            raise StudyError(
                "search.arms: synthetic_only needs images of every class; set request.classes to"
                " all, or remove it"
            )
        # Otherwise a requested arm would be missing silently.
        kinds = [kind_of("generators", one) for one in study.generators.values()]
        if "synthetic_only" in study.search.arms and not any(kind.synthetic for kind in kinds):
            raise StudyError(
                "search.arms: synthetic_only needs a generator that makes new images; add one to"
                " generators, or remove it"
            )
        if "unfiltered" in study.search.arms and not self._filters():
            raise StudyError(
                "search.arms: unfiltered needs filtered images; set curate.filters and add a"
                " generator other than traditional, or remove it"
            )
        named: dict[str, float] = {}
        for ratio in self._ratios():
            if (other := named.setdefault(_ratio_name(ratio), ratio)) != ratio:
                raise StudyError(
                    f"search.ratios: the arms of {other!r} and {ratio!r} (of search.ratios or"
                    f" request.ratio) would both be named {_ratio_name(ratio)}; round them to six"
                    " digits"
                )
        assert study.classifier is not None, "a comparison trains a classifier"
        trained = [
            (study.classifier, study.training.model_copy(update=arm.training)) for arm in self.arms
        ]
        if self.labeler is not None and kind_of("labelers", self.labeler).trained:
            trained.append((self.labeler.classifier, self.labeler.training))
        for spec, training in trained:
            kind_of("classifiers", spec)(spec, study.preprocess, ()).check(training)

    def _curation(self) -> dict[str, Step]:
        """Also sets `labeler` and `filter_plugins`."""
        study, filters = self.study, self.study.curate.filters
        spec: Any = study.curate.labeler
        self.filter_plugins: list[tuple[str, Any]] = [
            ("filters", filter_spec) for filter_spec in filters
        ]
        steps = {}
        if spec is not None:
            self.filter_plugins.append(("labelers", spec))
            if resolve("labelers", spec.name).trained:
                spec = spec.model_copy(
                    update={
                        "classifier": spec.classifier or study.classifier,
                        "training": spec.training or study.training,
                    }
                )
                steps["labeler"] = make_step(
                    "train",
                    {
                        "classifier": spec.classifier, "training": spec.training,
                        "preprocess": study.preprocess, "task": self.task,
                        "seed": derive_seed(study.seed, "labeler"),
                    },
                    {"ingest": self.ingest, "mix": self.real}, [("classifiers", spec.classifier)],
                    Subject("labeler"),
                )  # fmt: skip
                self.filter_plugins.append(("classifiers", spec.classifier))
        self.labeler = spec
        pixel_spec = measuring(self.task, study.preprocess, spec, filters)
        if pixel_spec.labeler is not None or pixel_spec.filters:
            steps["measure"] = make_step(
                "measure", pixel_spec.model_dump(),
                {"ingest": self.ingest, **steps},
                [("filters", filter_spec) for filter_spec in pixel_spec.filters]
                + [plugin for plugin in self.filter_plugins if plugin[0] != "filters"],
                Subject("val"),
            )  # fmt: skip
        return steps

    @property
    def largest_ratio(self) -> float:
        least = 1.0 if "synthetic_only" in self.study.search.arms else 0.0
        return max(least, *self.study.search.ratios)

    def _ratios(self) -> list[float]:
        asked = self.request.ratio
        return sorted({*self.study.search.ratios, *([asked] if asked else [])})

    def amounts(self) -> dict[str, Amount]:
        """The amounts that the arms of a generator add, by the suffix of the arm's name: every
        ratio of the search, and the study's request."""
        request = self.request
        amounts = {_ratio_name(ratio): Amount(ratio=ratio) for ratio in self._ratios()}
        if request.balance_to is not None:
            amounts[f"to {request.balance_to}"] = Amount(balance_to=request.balance_to)
        if request.per_class is not None:
            amounts[f"+{request.per_class}"] = Amount(per_class=request.per_class)
        if request.ratio_by_class is not None:
            amounts["by class"] = Amount(ratio_by_class=request.ratio_by_class)
        return amounts

    def curate(
        self, subject: Subject, generate: Step, generator_key: str, filtered: bool
    ) -> Step:
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
            "curate",
            {
                "task": self.task, "preprocess": study.preprocess,
                "generator_key": generator_key, **spec,
            },
            inputs, plugins, subject,
        )  # fmt: skip

    def add(self, label: str, curate: Step, unfiltered: Step | None) -> None:
        """Add the images of a further generator fit."""
        self.pools.setdefault(label, []).append(curate)
        if unfiltered is not None:
            self.unfiltered.setdefault(label, []).append(unfiltered)

    def _generator_arms(self) -> list[Arm]:
        """The arms of each generator and of combined generators."""
        study, arms = self.study, []
        combined = {**{label: (label,) for label in study.generators}, **study.search.combine}
        for family, parts in combined.items():
            real = "reduced" if "reduced" in parts else "all"
            labels = tuple(part for part in parts if part != "reduced")
            synthetic = any(kind_of("generators", study.generators[one]).synthetic
                            for one in labels)  # fmt: skip
            for name, amount in self.amounts().items():
                arm = Arm(
                    name=f"{family} {name}", family=family, ratio=amount.ratio, generators=labels,
                    mixes=self._fits(f"{family} {name}", labels, amount, real),
                    role="compared" if synthetic else "baseline",
                )  # fmt: skip
                arms.append(arm)
                if family in self.unfiltered:
                    twins = self._fits(
                        f"{family} unfiltered {name}", labels, amount, real, self.unfiltered
                    )
                    twin = {"name": f"{family} unfiltered {name}", "family": f"{family} unfiltered",
                            "mixes": twins, "role": "shown", "twin_of": arm.name}  # fmt: skip
                    arms.append(arm.model_copy(update=twin))
            if synthetic and family in study.generators and "synthetic_only" in study.search.arms:
                only = f"{family} only"
                mixes = self._fits(only, labels, Amount(ratio=1.0), "none")
                arms.append(
                    Arm(name=only, family=only, ratio=None, mixes=mixes, role="shown",
                        generators=labels)
                )  # fmt: skip
        return arms

    def _fits(
        self, name: str, labels: tuple[str, ...], amount: Amount, real: str,
        pools: dict[str, list[Step]] | None = None,
    ) -> tuple[str, ...]:  # fmt: skip
        """A mix for each generator fit."""
        added = tuple(Added(generator=label, amount=amount) for label in labels)
        pools = pools or self.pools
        return self._added(
            [
                self._mix(
                    name, real=real, added=added,
                    curates={label: pools[label][fit] for label in labels}, fit=fit,
                )
                for fit in range(self.study.search.generator_fits)
            ]
        )  # fmt: skip

    def fidelity(self) -> list[Step]:
        """A fidelity step for each generator fit, after an embed step of the real images if
        fidelity uses another embedder than the study."""
        study, settings = self.study, self.study.fidelity
        if not settings.enabled or not self.pools:
            return []
        embedder = settings.embedder or study.embedder
        plugins = [("embedders", embedder)]
        embed = make_step(
            "embed", {"embedder": embedder}, {"ingest": self.ingest}, plugins, Subject("fidelity")
        )
        embed = self.embed if embed == self.embed else embed
        steps = [
            make_step(
                "fidelity",
                {
                    "embedder": embedder, "sample": settings.sample, "k": settings.k,
                    "task": self.task, "seed": study.seed,
                },
                {
                    "ingest": self.ingest, "embed": embed, "curate": curate,
                    "generate": curate.inputs["generate"],
                },
                plugins, Subject(curate.subject.name, curate.subject.fit),
            )
            for curate in self._all_pools()
        ]  # fmt: skip
        return steps if embed == self.embed else [embed, *steps]

    def _all_pools(self) -> list[Step]:
        """The last `curate` of every fit of every generator."""
        return [curate for fits in self.pools.values() for curate in fits]

    def _mix(
        self, name: str, real: str = "all", oversampled: bool = False,
        added: tuple[Added, ...] = (), curates: Mapping[str, Step] | None = None, fit: int = 0,
    ) -> Step:  # fmt: skip
        study = self.study
        inputs = {"ingest": self.ingest}
        if real == "reduced":
            assert self.reduce is not None, "the study has been checked"
            inputs["reduce"] = self.reduce
        for label, curate in (curates or {}).items():
            inputs |= {f"curate.{label}": curate, f"generate.{label}": curate.inputs["generate"]}
        return make_step(
            "mix",
            {
                "task": self.task, "real": real, "oversampled": oversampled, "added": added,
                # Real images do not depend on the target classes.
                "classes": self.request.classes if added else "all",
                "seed": fit_seed(study.seed, fit) if added else 0,
            },
            inputs, subject=Subject(name, fit),
        )  # fmt: skip

    def steps(self) -> list[Step]:
        """The mixes and all later steps."""
        study = self.study
        arms = [*self.arms, *self._generator_arms()]
        fidelity = self.fidelity()
        search = make_step(
            "search",
            {
                "classifier": study.classifier, "training": study.training,
                "preprocess": study.preprocess, "task": self.task, "arms": tuple(arms),
                "generator_fits": study.search.generator_fits,
                "seeds": tuple(
                    derive_seed(study.seed, "classifier", number)
                    for number in range(study.search.generator_fits * study.search.seeds)
                ),
            },
            {"ingest": self.ingest, **{mix.label: mix for mix in [self.real, *self.mixes]}},
            self.plugins,
        )  # fmt: skip
        evaluate = make_step(
            "evaluate",
            {
                "settings": study.evaluate, "classifier": study.classifier,
                "preprocess": study.preprocess, "task": self.task,
                "objective": study.training.objective, "seed": study.seed,
            },
            {"ingest": self.ingest, "search": search}, self.plugins,
        )  # fmt: skip
        pools = {
            f"{step.kind}.{Subject(curate.subject.name, curate.subject.fit).label}": step
            for curate in self._all_pools()
            for step in (curate, curate.inputs["generate"])
        }
        report = make_step(
            "report",
            {
                # The page reports only the number of tuned settings.
                "study": study.model_copy(update={"tune": Tune(tried=study.tune.tried)}),
                "preprocess": study.preprocess,
                "task": self.task, "generators": tuple(self.pools),
                "target_classes": self.request.classes, "seed": study.seed,
            },
            {
                "ingest": self.ingest, "embed": self.embed, "search": search,
                "evaluate": evaluate, **pools,
                # Includes real vectors if fidelity uses another embedder than the study.
                **{step.label: step for step in fidelity},
            },
        )  # fmt: skip
        return [*self.mixes, *fidelity, search, evaluate, report]


def _ratio_name(ratio: float) -> str:
    """The suffix of an arm's name for its ratio."""
    return f"x{ratio:g}"


def fit_seed(seed: int, fit: int) -> int:
    """The seed of all draws of a generator fit: the study's own for the first."""
    return derive_seed(seed, "generator fit", fit) if fit else seed
