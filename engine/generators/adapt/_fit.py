"""The training of an adaptation: its groups one after another, each from its own checkpoint."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.core.errors import DamageError, StudyError
from engine.core.names import slug
from engine.core.rng import derive_seed
from engine.core.sealed import seal_bytes, unseal_bytes
from engine.core.store import Store
from engine.data.images import decode_own, grid
from engine.generators import Conditions, TrainingImages
from engine.generators.adapt import Pair
from engine.generators.diffusion import FOLDERS, checkpoint_of, group_of
from engine.nets.denoising import Examples, PipelineTraining
from engine.nets.training import balanced_weights, make_accelerator, run
from engine.work.fit import FitContext

if TYPE_CHECKING:
    from engine.generators.diffusion import Diffusion

# Of a look at a training: pictures, and steps to make each.
_SHOWN, _LOOK_STEPS = 8, 20
_TRIES = 3


def fit(generator: Diffusion, context: FitContext, data: TrainingImages, seed: int) -> None:
    """Adapt the checkpoint to all images, or to each class or cluster by itself, and publish."""
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
            part = context
            if several:
                part = context.part(folder, number * steps, len(groups) * steps)
            # As it is, the data may lie mapped on disk; picked, it is copied into memory.
            chosen = data
            if several:
                chosen = TrainingImages(
                    data.pixels[rows], *([column[row] for row in rows]
                    for column in (data.image_ids, data.labels, data.clusters)),
                )  # fmt: skip
            history = _fit_group(
                generator, part, chosen, Path(name) / folder, derive_seed(seed, *group), several
            )
            losses.append(history[-1]["loss"])
            folders.append([*group, folder])
            # accelerate leaves a cycle: else the next pipeline would be loaded beside this one.
            gc.collect()
            if context.device == "cuda":
                torch.cuda.empty_cache()
        if context.rank == 0:
            (Path(name) / FOLDERS).write_text(json.dumps(folders))
        context.publish(Path(name), {"loss": float(np.mean(losses)), "steps": steps * len(groups)})


def _fit_group(
    generator: Diffusion,
    context: FitContext,
    data: TrainingImages,
    folder: Path,
    seed: int,
    several: bool,
) -> list[dict[str, float]]:
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
        reads=adaptation.reads, prior=prior,
    )  # fmt: skip
    shown = sorted({prompt for held in examples.prompts for prompt in held})[:_SHOWN]

    def look() -> bytes:
        given = {
            "num_inference_steps": min(
                generator.spec.num_inference_steps or _LOOK_STEPS, _LOOK_STEPS
            )
        }
        empty = np.zeros(generator.preprocess.shape, np.uint8)
        made = []
        with training.sampling():
            # One by one: beside the optimizer there may be room for no more.
            for prompt in shown:
                try:
                    (image,) = generator.call(pipeline, [prompt], [0], side, given)
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    image = "out_of_memory"
                made.append(empty if isinstance(image, str) else image)
        return grid([made])

    history = run(
        context, training, settings.train_steps, checkpoint_every=context.checkpoint_every,
        report_every=max(1, min(20, settings.train_steps // 20)), look=look, keep_last=several,
    )  # fmt: skip
    training.finish()
    if context.rank == 0:
        adaptation.save(pipeline, folder)
        (folder / "history.json").write_text(json.dumps(history))
    return history


def _prior(
    generator: Diffusion,
    context: FitContext,
    pipeline: Any,
    labels: Sequence[str],
    side: int,
    seed: int,
) -> tuple[Examples, float] | None:
    """Images of the checkpoint's own making, shared among the workers; those that an earlier
    attempt made are found in the store."""
    assert generator.adaptation is not None
    asked = generator.adaptation.prior()
    if asked is None:
        return None
    prompts = sorted({generator.filled(asked.prompt, label, 0) for label in labels})
    wanted = [(prompt, number) for prompt in prompts for number in range(asked.count)]
    store = context.store

    def key(prompt: str, number: int) -> str:
        place = store.join(context.work, "prior", context.inputs[:16], slug(prompt))
        return store.join(place, f"{number:05d}.png")

    accelerator = make_accelerator(context, generator.spec.precision, 1)
    pipeline.to(accelerator.device)
    mine = [
        entry
        for entry in wanted[context.rank :: context.world_size]
        if _stored(store, key(*entry)) is None
    ]
    settings = generator.adaptation.settings
    # As many as a worker trains at once: as many as there is room for.
    pieces = context.world_size * settings.gradient_accumulation_steps
    size = max(1, settings.batch_size // pieces)
    for start in range(0, len(mine), size):
        _make_prior(generator, context, pipeline, mine[start : start + size], key, side, seed)
    accelerator.wait_for_everyone()
    usable = []
    for entry in wanted:
        if (data := _stored(store, key(*entry))) is None:
            place = key(*entry)
            raise DamageError(f"{store.location(place)} is missing or damaged; run again", place)
        if data:
            usable.append((entry, data))
    if not usable:
        raise StudyError(
            f"generators: adapt: class_prompt: of {prompts[0]!r} the checkpoint makes no usable"
            " image (its filter holds back all); reword it, or say with_prior_preservation: false"
        )
    return Examples(
        np.stack([decode_own(data) for _, data in usable]),
        [f"prior {number} {prompt}" for (prompt, number), _ in usable],
        [[prompt] for (prompt, _), _ in usable], np.ones(len(usable)),
    ), asked.weight  # fmt: skip


def _stored(store: Store, key: str) -> bytes | None:
    """An image that an attempt stored; None where there is none, or where it has changed."""
    try:
        return unseal_bytes(store.read(key))
    except (FileNotFoundError, ValueError):
        return None


def _make_prior(
    generator: Diffusion,
    context: FitContext,
    pipeline: Any,
    held: Sequence[tuple[str, int]],
    key: Any,
    side: int,
    seed: int,
) -> None:
    """Make and store some images. What cannot be used is tried again at most twice, and then noted
    as an empty file: it is never learnt."""
    missing = list(held)
    for attempt in range(_TRIES):
        seeds = [derive_seed(seed, "prior", *entry, attempt) for entry in missing]
        made = generator.call(pipeline, [prompt for prompt, _ in missing], seeds, side, {})
        failed = []
        for entry, image in zip(missing, made, strict=True):
            if isinstance(image, str) and attempt + 1 < _TRIES:
                failed.append(entry)
                continue
            data = b"" if isinstance(image, str) else grid([[image]])
            context.store.put(key(*entry), seal_bytes(data))
        missing = failed
        if not missing:
            return
