"""The training of an adaptation: its groups one after another, each from its own checkpoint."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from engine.core.errors import DamageError, StudyError
from engine.core.names import slug
from engine.core.rng import derive_seed
from engine.core.sealed import seal_bytes, unseal_bytes
from engine.core.store import Store
from engine.data.images import Preprocess, decode_own, grid
from engine.generators import Conditions, TrainingImages
from engine.generators.adapt import ADAPTATIONS, Adaptation, Pair, group_of
from engine.nets.denoising import Examples, PipelineTraining
from engine.nets.images import or_black
from engine.nets.pipelines import checkpoint_of
from engine.nets.training import balanced_weights, make_accelerator, run
from engine.work.fit import FitContext

# A sample grid: images, and steps to sample each.
_SAMPLES, _SAMPLING_STEPS = 8, 20
# Attempts to generate one prior image.
_ATTEMPTS = 3

# The store's key of a prior image, by its prompt and number.
KeyOf = Callable[[str, int], str]


class PromptedGenerator(Protocol):
    """What training needs of the generator `diffusion`, whose methods are documented there."""

    spec: Any
    preprocess: Preprocess
    adaptation: Adaptation | None

    def open_pipeline(self, folder: Path | None, mode: str) -> Any: ...

    def side(self, pipeline: Any) -> int: ...

    def word(self, label: str) -> str: ...

    def prompts_of(self, label: str, cluster: int) -> list[str]: ...

    def filled(self, template: str, label: str, cluster: int) -> str: ...

    def call(
        self, pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], side: int,
        options: Mapping[str, Any],
    ) -> list[np.ndarray | str]: ...  # fmt: skip


def fit(generator: PromptedGenerator, context: FitContext, data: TrainingImages, seed: int) -> None:
    """Adapt the checkpoint to all images, or to each class or cluster separately, and publish."""
    adaptation = generator.adaptation
    assert adaptation is not None
    groups: dict[Pair, list[int]] = {}
    for row, pair in enumerate(zip(data.labels, data.clusters, strict=True)):
        groups.setdefault(group_of(adaptation.scope, *pair), []).append(row)
    steps, several = adaptation.settings.train_steps, len(groups) > 1
    losses, folders = [], []
    with tempfile.TemporaryDirectory() as name:
        for number, (group, rows) in enumerate(sorted(groups.items())):
            folder = f"{slug(group[0])}-{group[1]}" if several else "adapted"
            # All images may stay mapped on disk; a selection is copied into memory.
            part, images = context, data
            if several:
                part = context.part(folder, number * steps, len(groups) * steps)
                images = TrainingImages(
                    data.pixels[rows], [data.image_ids[row] for row in rows],
                    [data.labels[row] for row in rows], [data.clusters[row] for row in rows],
                )  # fmt: skip
            history = _fit_group(
                generator, part, images, Path(name) / folder, derive_seed(seed, *group), several
            )
            losses.append(history[-1]["loss"])
            folders.append([*group, folder])
            # accelerate leaves a reference cycle, which would keep this pipeline in memory.
            gc.collect()
            if context.device == "cuda":
                torch.cuda.empty_cache()
        if context.rank == 0:
            (Path(name) / ADAPTATIONS).write_text(json.dumps(folders))
        context.publish(Path(name), {"loss": float(np.mean(losses)), "steps": steps * len(groups)})


def _fit_group(
    generator: PromptedGenerator,
    context: FitContext,
    data: TrainingImages,
    folder: Path,
    seed: int,
    several: bool,
) -> list[dict[str, float]]:
    """Train one adaptation, and save it to `folder`; returns the history."""
    adaptation = generator.adaptation
    assert adaptation is not None
    settings = adaptation.settings
    pipeline = generator.open_pipeline(None, "text2image")
    side = generator.side(pipeline)
    prior = _prior(generator, context, pipeline, sorted(set(data.labels)), side, seed)
    conditions = Conditions.of(data, adaptation.condition())
    torch.manual_seed(derive_seed(seed, "weights") % 2**63)
    adaptation.attach(pipeline, {pair: generator.word(pair[0]) for pair in conditions.pairs})
    family = checkpoint_of(pipeline, generator.spec.model).family
    assert family is not None
    pairs = zip(data.labels, data.clusters, strict=True)
    examples = Examples(
        data.pixels, data.image_ids, [generator.prompts_of(*pair) for pair in pairs],
        balanced_weights(data.labels, settings.class_balance),
    )  # fmt: skip
    training = PipelineTraining(
        context, pipeline, family, examples, settings, generator.spec.precision, side, seed,
        train_text_encoders=adaptation.trains_text_encoders, prior=prior,
    )  # fmt: skip
    prompts = sorted({prompt for choices in examples.prompts for prompt in choices})[:_SAMPLES]
    most_steps = min(generator.spec.num_inference_steps or _SAMPLING_STEPS, _SAMPLING_STEPS)

    def sample_grid() -> bytes:
        images: list[np.ndarray | str] = []
        with training.sampling():
            # One by one: the optimizer may leave no memory for more.
            for prompt in prompts:
                try:
                    images += generator.call(
                        pipeline, [prompt], [0], side, {"num_inference_steps": most_steps}
                    )
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    images.append("out_of_memory")
        return grid([or_black(images, generator.preprocess.shape)])

    history = run(
        context, training, settings.train_steps, checkpoint_every=context.checkpoint_every,
        report_every=max(1, min(20, settings.train_steps // 20)), sample_grid=sample_grid,
        keep_last=several,
    )  # fmt: skip
    training.finish()
    if context.rank == 0:
        adaptation.save(pipeline, folder)
        (folder / "history.json").write_text(json.dumps(history))
    return history


def _prior(
    generator: PromptedGenerator,
    context: FitContext,
    pipeline: Any,
    labels: Sequence[str],
    side: int,
    seed: int,
) -> tuple[Examples, float] | None:
    """Images that the checkpoint itself generates, and the weight of their loss; None without prior
    preservation. Workers divide the images; those of an earlier attempt are read from the store."""
    assert generator.adaptation is not None
    prior = generator.adaptation.prior()
    if prior is None:
        return None
    prompts = sorted({generator.filled(prior.prompt, label, 0) for label in labels})
    wanted = [(prompt, number) for prompt in prompts for number in range(prior.count)]
    store = context.store

    def key_of(prompt: str, number: int) -> str:
        place = store.join(context.work, "prior", context.inputs[:16], slug(prompt))
        return store.join(place, f"{number:05d}.png")

    accelerator = make_accelerator(context, generator.spec.precision, 1)
    pipeline.to(accelerator.device)
    missing = [
        entry
        for entry in wanted[context.rank :: context.world_size]
        if _stored(store, key_of(*entry)) is None
    ]
    settings = generator.adaptation.settings
    # The images that a worker trains at once, which fit into memory.
    pieces = context.world_size * settings.gradient_accumulation_steps
    size = max(1, settings.batch_size // pieces)
    for start in range(0, len(missing), size):
        _generate_prior(
            generator, context, pipeline, missing[start : start + size], key_of, side, seed
        )
    accelerator.wait_for_everyone()
    usable = []
    for entry in wanted:
        if (data := _stored(store, key_of(*entry))) is None:
            key = key_of(*entry)
            raise DamageError(f"{store.location(key)} is missing or damaged; run again", key)
        if data:
            usable.append((entry, data))
    if not usable:
        raise StudyError(
            f"generators: adapt: class_prompt: the checkpoint's safety filter rejects every image"
            f" of {prompts[0]!r}; reword it, or set with_prior_preservation: false"
        )
    return Examples(
        np.stack([decode_own(data) for _, data in usable]),
        [f"prior {number} {prompt}" for (prompt, number), _ in usable],
        [[prompt] for (prompt, _), _ in usable], np.ones(len(usable)),
    ), prior.weight  # fmt: skip


def _stored(store: Store, key: str) -> bytes | None:
    """A stored image; None if it is missing or damaged."""
    try:
        return unseal_bytes(store.read(key))
    except (FileNotFoundError, ValueError):
        return None


def _generate_prior(
    generator: PromptedGenerator,
    context: FitContext,
    pipeline: Any,
    entries: Sequence[tuple[str, int]],
    key_of: KeyOf,
    side: int,
    seed: int,
) -> None:
    """Generate and store some images. An unusable one is tried twice more, and then stored as an
    empty file, which training leaves out."""
    missing = list(entries)
    for attempt in range(_ATTEMPTS):
        seeds = [derive_seed(seed, "prior", *entry, attempt) for entry in missing]
        images = generator.call(pipeline, [prompt for prompt, _ in missing], seeds, side, {})
        failed = []
        for entry, image in zip(missing, images, strict=True):
            if isinstance(image, str) and attempt + 1 < _ATTEMPTS:
                failed.append(entry)
                continue
            data = b"" if isinstance(image, str) else grid([[image]])
            context.store.put(key_of(*entry), seal_bytes(data))
        missing = failed
        if not missing:
            return
