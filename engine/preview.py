"""A preview before an expensive run: a few images of each class next to real ones, and the cost of
the whole study."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.context import Context
from engine.core import rows
from engine.core.manifest import Manifest, Part
from engine.core.names import attempt_name, slug
from engine.core.notice import Notice
from engine.core.progress import say
from engine.core.registry import kind_of
from engine.core.shards import OK, Commit, Shard, ids_digest, parquet_rows
from engine.core.step import Step, upstream
from engine.core.store import Store
from engine.data.arrays import first_images, sampled_images
from engine.data.images import Preprocess, encode
from engine.execute import Trials, execute
from engine.forecast import (
    Forecast,
    GeneratorRates,
    Rates,
    forecast,
    measured_of,
    rates_key,
    training_steps,
)
from engine.plan import trials_of
from engine.profile import Profile
from engine.report.download import data_url
from engine.report.page import render
from engine.results.data import IngestResult
from engine.results.images import ClassFunnel, GenerateResult
from engine.runtime.base import Runtime
from engine.steps.curate import CurateSpec, judge, make_funnel, read_generated, score
from engine.steps.generate import GenerateSpec, fingerprint, sampling_stages
from engine.steps.request import (
    RequestSpec,
    allocated,
    needed_images,
    request_table,
    training_rows,
)
from engine.study import Study


def preview(
    study: Study,
    steps: Sequence[Step],
    store: Store,
    runtime: Runtime,
    profile: Profile,
    count: int,
) -> None:
    """Run the steps that generation needs, generate and filter `count` images per class of each
    generator's first fit, train one classifier, and write one page with the cost of the rest.

    No shard of the study is committed.
    """
    # Later rounds of a generator replace what curation drops, and later fits cost the same.
    generates = [
        step for step in steps
        if step.kind == "generate" and step.subject.fit == 0 and step.subject.round == 1
    ]  # fmt: skip
    curates = {step.inputs["generate"].key: step for step in steps
               if step.kind == "curate" and step.subject.filtered}  # fmt: skip
    wanted = [*generates, *(curates[step.key] for step in generates if step.key in curates)]
    keys = {step.key for step in upstream(wanted)}
    # In the order of the plan: the labeler's errors surface before a generator is trained.
    needed = [step for step in steps if step.key in keys
              and step.kind not in ("request", "generate", "curate")]  # fmt: skip
    manifests = execute(needed, store, runtime, profile)
    previewer = _Previewer(store, runtime, profile, manifests, count)
    generators, sections = {}, []
    for step in generates:
        drawn = previewer.draw(step)
        judged = previewer.curate(step, curates.get(step.key), drawn)
        section, of_generator = previewer.section(step, drawn, judged)
        sections.append(section)
        generators[step.subject.name] = of_generator
    rates = Rates(
        generators=generators, train=previewer.train(steps, needed),
        measured=measured_of(steps, profile),
    )  # fmt: skip
    left = forecast(steps, store, profile, rates)
    store.put(rates_key(store, study.name), rates.model_dump_json(indent=1).encode())
    page = store.page(study.name, "preview.html")
    html = render("preview.html", study=study, sections=sections, count=count, forecast=left)
    store.put(page, html.encode())
    print_forecast(left)
    say(f"preview: {store.location(page)}")


def print_forecast(left: Forecast) -> None:
    """Print what is left of a study and how long it takes."""
    if left.lines:
        say(f"left to do: {', '.join(line.what for line in left.lines)}")
        say(f"this takes about {left.in_words()} with this profile")


@dataclass(frozen=True)
class _Drawn:
    """Images of a generator. full: images of each class that the study requests first. start:
    seconds until the workers computed."""

    context: Context
    shards: list[Shard]
    commits: list[Commit]
    full: dict[str, int]
    start: float


@dataclass(frozen=True)
class _Judged:
    """What curation says of a generator's images: the funnel, empty without filters, the seconds of
    one image, the seconds until the workers computed, and signs that the generator learnt nothing.
    """

    funnel: Mapping[str, ClassFunnel] = field(default_factory=dict)
    seconds: float = 0.0
    start: float = 0.0
    signs: list[Notice] = field(default_factory=list)


@dataclass(frozen=True)
class _OfClass:
    """The images of a class on the page, as data URLs. quarantined: reasons. train: real images.
    full: images that the study requests first. kept: by the filters, None without any."""

    label: str
    real: list[str]
    made: list[str]
    quarantined: list[str]
    train: int
    full: int
    kept: int | None


@dataclass(frozen=True)
class _OfGenerator:
    """A generator on the page. per_second: images of one worker. hours, megabytes: of the images
    that the study requests first. signs: that it learnt nothing."""

    label: str
    classes: list[_OfClass]
    signs: list[Notice]
    total: int
    per_second: float
    actors: int
    batch_size: int
    device: str
    hours: float
    megabytes: float


@dataclass(frozen=True)
class _Previewer:
    store: Store
    runtime: Runtime
    profile: Profile
    manifests: Mapping[str, Manifest]
    count: int

    def context(self, step: Step, inputs: Mapping[str, Step], **more: Manifest) -> Context:
        manifests = {
            name: self.manifests[source.key]
            for name, source in inputs.items()
            if source.key in self.manifests
        }
        return Context(
            step=step, inputs={**manifests, **more}, store=self.store, runtime=self.runtime,
            stage_resources=self.profile.stage, fit_resources=self.profile.fit,
            device=self.profile.device,
        )  # fmt: skip

    def draw(self, step: Step) -> _Drawn:
        """Generate a few images of each class."""
        request = step.inputs["request"].spec_as(RequestSpec)
        spec = step.spec_as(GenerateSpec)
        context = self.context(step, {**step.inputs["request"].inputs, **step.inputs})
        generator = kind_of("generators", spec.generator)(spec.generator, spec.preprocess)
        train = training_rows(context, spec.task, generator)
        data = context.result("ingest", IngestResult)
        full = needed_images(request, data, allocated(context.inputs.get("allocate")))
        # A fresh prefix, so that images and timings of an earlier preview are not reused.
        prefix = self.store.preview(attempt_name())
        shards = []
        for label, wanted in full.items():
            if not wanted:
                continue
            table = request_table(
                request, generator, label, min(self.count, wanted), train[label],
                data.cells.get(label, {}),
            )  # fmt: skip
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink)
            folder = self.store.parts(prefix)
            key, _ = self.store.put_part(folder, slug(label), "parquet", sink.getvalue())
            ids = table[rows.IMAGE_ID].to_pylist()
            digest = ids_digest(ids)
            task = {"part": key, "row_group": 0, "ids_digest": digest}
            shards.append(Shard(f"{slug(label)}-{digest}", len(ids), task, {"label": label}))
        started = time.monotonic()
        commits = context.compute(
            "generate", shards, rows_of=parquet_rows, stages=sampling_stages(context, spec),
            schema=rows.synthetic_schema(spec.tasks), fingerprint=fingerprint(context, spec),
            prefix=prefix,
        )  # fmt: skip
        return _Drawn(context, shards, commits, full, _start(commits, started))

    def curate(self, step: Step, curate: Step | None, drawn: _Drawn) -> _Judged:
        """Filter the images as the study does."""
        parts = [commit.data.model_copy(update={"tags": {"label": shard.tags["label"]}})
                 for shard, commit in zip(drawn.shards, drawn.commits, strict=True)
                 if commit.data]  # fmt: skip
        if curate is None or not parts:
            return _Judged()
        spec = curate.spec_as(CurateSpec)
        if not spec.filters:
            return _Judged()
        requested = {shard.tags["label"]: shard.rows for shard in drawn.shards}
        images = generated_manifest(step, drawn.context, parts, requested)
        context = self.context(curate, curate.inputs, generate=images)
        started = time.monotonic()
        commits = score(context, spec, self.store.preview(attempt_name()))
        start = _start(commits, started)
        keys = [commit.data.key for commit in commits if commit.data]
        table, notes = judge(context, spec, read_generated(context, spec.task), keys)
        signs: list[Notice] = notes["usefulness"].notices()
        context.warn(signs)
        count = sum(len(commit.image_id) for commit in commits)
        seconds = sum(float(commit.provenance["seconds"]) for commit in commits)
        return _Judged(make_funnel(table, requested), seconds / max(1, count), start, signs)

    def section(
        self,
        step: Step,
        drawn: _Drawn,
        judged: _Judged,
    ) -> tuple[_OfGenerator, GeneratorRates]:
        """The section of the page, and the rates."""
        spec = step.spec_as(GenerateSpec)
        ingest = drawn.context.inputs["ingest"]
        real = sampled_images(self.store, ingest.keys(split="train"), spec.task, self.count)
        train = drawn.context.result("ingest", IngestResult).train
        classes, funnel = [], judged.funnel
        for shard, commit in zip(drawn.shards, drawn.commits, strict=True):
            label = shard.tags["label"]
            keys = [commit.data.key] if commit.data else []
            images = first_images(self.store, keys, spec.task, self.count)
            classes.append(
                _OfClass(
                    label,
                    real=[_tile(image, spec.preprocess) for image in real.get(label, [])],
                    made=[_tile(image, spec.preprocess) for image in images.get(label, [])],
                    quarantined=[status for status in commit.status if status != OK],
                    train=train.get(label, 0),
                    full=drawn.full[label],
                    kept=funnel[label].kept if label in funnel else None,
                )
            )
        resources = self.profile.stage("generate")
        # A shard of a few images still costs whole batches of the planned shape.
        batches = sum(math.ceil(shard.rows / resources.batch_size) for shard in drawn.shards)
        seconds = sum(float(commit.provenance["seconds"]) for commit in drawn.commits)
        seconds /= max(1, batches * resources.batch_size)
        parts = [commit.data for commit in drawn.commits if commit.data]
        bytes_each = sum(part.bytes for part in parts) / max(1, sum(c.kept for c in drawn.commits))
        total = sum(drawn.full.values())
        fit = drawn.context.inputs.get("finetune")
        rates = GeneratorRates(
            fit=None if fit is None else float(fit.provenance["seconds"]), generate=seconds,
            curate=judged.seconds, start=drawn.start + judged.start, needed=drawn.full,
            kept={label: (min(of.kept, of.generated), of.generated)
                  for label, of in judged.funnel.items()},
        )  # fmt: skip
        of_generator = _OfGenerator(
            step.label, classes, judged.signs, total,
            per_second=1 / seconds if seconds else 0.0, actors=resources.actors,
            batch_size=resources.batch_size, device=self.profile.device,
            hours=total * seconds / resources.actors / 3600,
            megabytes=total * bytes_each / 2**20,
        )  # fmt: skip
        return of_generator, rates

    def train(self, steps: Sequence[Step], needed: Sequence[Step]) -> float | None:
        """Seconds of an optimizer step of a classifier, from the labeler's training or from the
        study's first classifier, which is trained now; None without a comparison."""
        for step in needed:
            if step.kind == "train" and step.subject.name == "labeler":
                return seconds_per_step(self.manifests[step.key], step)
        first = next(
            (
                trial
                for trial in trials_of(steps)
                if not {"curate", "generate"} & {source.kind for source in upstream([trial])}
            ),
            None,
        )
        if first is None:
            return None
        execute(upstream([first])[:-1], self.store, self.runtime, self.profile, quiet=True)
        trials = Trials(self.store, self.runtime, self.profile)
        manifest = trials.find([first]).get(first.key)
        if manifest is None:
            manifest = trials.run([first], lambda count: None)[first.key]
        return seconds_per_step(manifest, first)


def _start(commits: Sequence[Commit], started: float) -> float:
    """Seconds since `started` in which no shard was computed."""
    computed = sum(float(commit.provenance["seconds"]) for commit in commits)
    return max(0.0, time.monotonic() - started - computed)


def seconds_per_step(manifest: Manifest, trial: Step) -> float:
    """Of a classifier's training; without the start of its processes if it reported twice, because
    the processes of a search start once."""
    whole = float(manifest.provenance["seconds"]) / training_steps(trial)
    return float(manifest.provenance.get("seconds_per_step", whole))


def generated_manifest(
    step: Step, context: Context, parts: Sequence[Part], requested: dict[str, int]
) -> Manifest:
    """The manifest that `generate` would write of these images; it is not stored."""
    result = GenerateResult(headline="preview", requested=requested, quarantined={})
    return Manifest(
        kind="generate", key=step.key, label=step.label, spec={},
        inputs={name: manifest.digest for name, manifest in context.inputs.items()},
        parts=tuple(parts), rows=sum(part.rows for part in parts), metrics=result.model_dump(),
        provenance={},
    )  # fmt: skip


def _tile(image: np.ndarray, preprocess: Preprocess) -> str:
    """An image as a data URL."""
    data = encode(image, preprocess.model_copy(update={"codec": "png"}))
    return data_url(data, "image/png")
