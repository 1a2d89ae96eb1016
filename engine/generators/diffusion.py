"""Any checkpoint of diffusers (Stable Diffusion 1.5, 2, XL, 3, FLUX and others), unchanged or
adapted to the study's images.

It generates from text, from training images (SDEdit, Meng et al. 2022) or by inpainting them. The
adaptations (LoRA, DreamBooth, textual inversion, all weights) are plugins in
`engine/generators/adapt`.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from engine.core.errors import StudyError
from engine.core.notice import Notice
from engine.core.registry import PluginField, kind_of
from engine.core.rng import generator
from engine.core.spec import Spec, explained
from engine.data.images import Preprocess, preprocess
from engine.generators import (
    Generator,
    GeneratorSpec,
    Request,
    SampleBatch,
    TrainingImages,
    TrainingRows,
)
from engine.generators._prompts import Template, Templates, placeholders
from engine.generators.adapt import ADAPTATIONS, Adaptation, group_of, no_choice
from engine.nets.pipelines import Checkpoint, checkpoint_of, folder_digest, read_checkpoint
from engine.work.fit import FitContext


def _adaptation(value: Any) -> Any:
    """`none`, as text or as a mapping, leaves the checkpoint unchanged."""
    if value in (None, "none", {"name": "none"}):
        return None
    return PluginField("generators.adapt")(value)


class DiffusionSpec(GeneratorSpec):
    name: Literal["diffusion"] = "diffusion"
    # A hub id or a folder that a pipeline was saved to.
    model: Annotated[
        str, Field(min_length=1, examples=["stable-diffusion-v1-5/stable-diffusion-v1-5"])
    ]
    revision: str | None = None
    # Variant of the weight files, such as `fp16`.
    variant: str | None = None
    # How the checkpoint is adapted to the study's images; none: not at all.
    adapt: Annotated[SerializeAsAny[Spec] | None, BeforeValidator(_adaptation)] = None
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    # Side in pixels of generated images, before they are resized to the study's size; None: the
    # checkpoint's own.
    resolution: Annotated[int, Field(ge=8, le=4096)] | None = None
    # text2image: from the prompt alone. image2image: from a training image, with noise added.
    # inpainting: from a training image, of which a part is replaced.
    mode: Literal["text2image", "image2image", "inpainting"] = "text2image"
    # The training images to start from.
    parents: Literal["train", "representatives"] = "representatives"
    # How far an image departs from its parent: 0 not at all, 1 completely.
    strength: Annotated[float, Field(gt=0, le=1)] = 0.5
    # The part to replace: a square in the middle, everything else, or a square anywhere.
    mask: Literal["center", "surroundings", "anywhere"] = "anywhere"
    # Side of the square, as a share of the image's side.
    mask_size: Annotated[float, Field(gt=0, lt=1)] = 0.5
    # Prompts with {label}, {cluster} and, if `adapt` has tokens, {token}; several are used in turn.
    # None: the adaptation's default.
    prompt: Templates | None = None
    # Prompts of a class, or of a cluster of a class, in their place.
    prompts: dict[str, Templates] = {}
    cluster_prompts: dict[str, dict[Annotated[str, Field(pattern=r"^\d+$")], Templates]] = {}
    # The text that replaces {label}, if not the class's own name.
    class_names: dict[str, str] = {}
    negative_prompt: Template | None = None
    # checkpoint: the checkpoint's own scheduler.
    scheduler: Literal["checkpoint", "ddim", "dpmsolver++", "euler", "unipc"] = "checkpoint"
    # None: the pipeline's default.
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=50)] | None = None
    # Whether the checkpoint's own safety filter may reject images.
    safety_checker: bool = True

    @model_validator(mode="after")
    def _noise_is_left(self) -> DiffusionSpec:
        steps = self.num_inference_steps
        if self.mode != "text2image" and steps is not None and int(steps * self.strength) < 1:
            raise explained("num_inference_steps x strength leaves no step; raise either")
        return self


class Diffusion(Generator[DiffusionSpec]):
    version = 1
    sampling_fields = (
        "mode", "parents", "strength", "mask", "mask_size", "negative_prompt", "scheduler",
        "num_inference_steps", "guidance_scale",
    )  # fmt: skip

    def __init__(self, spec: DiffusionSpec, preprocess: Preprocess) -> None:
        super().__init__(spec, preprocess)
        self.adaptation: Adaptation | None = None
        if spec.adapt is not None:
            self.adaptation = kind_of("generators.adapt", spec.adapt)(spec.adapt)
        self.trainable = self.adaptation is not None

    # Checks ------------------------------------------------------------------------------------

    def check(self) -> None:
        for text in self._templates():
            has_token = "token" in placeholders(text)
            if self.adaptation is not None and self.adaptation.needs_token and (
                not has_token and text != self.spec.negative_prompt
            ):  # fmt: skip
                raise StudyError(
                    f"generators: prompt: {text[:60]!r} lacks {{token}}, the word that"
                    f" {self.adaptation.spec.name} learns; add it"
                )
            if has_token and not self._token("x", 0):
                raise StudyError(
                    f"generators: prompt: {text[:60]!r} has {{token}}, which only dreambooth and"
                    " textual_inversion support; use {label}"
                )
        checkpoint = read_checkpoint("generators: model", self.spec.model, self.spec.revision)
        if checkpoint is not None:
            self.check_checkpoint(checkpoint)

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Raise `StudyError` for settings that this checkpoint does not support."""
        spec = self.spec
        if self.adaptation is not None:
            self.adaptation.check(checkpoint)
        if checkpoint.inpaints and spec.mode != "inpainting":
            raise StudyError(
                f"generators: mode: {spec.model} is an inpainting checkpoint; set mode: inpainting"
            )
        side = spec.resolution or checkpoint.resolution
        if side is not None and side % checkpoint.multiple:
            raise StudyError(
                f"generators: resolution: {side} px is not a multiple of {checkpoint.multiple};"
                f" {spec.model} needs one"
            )
        if spec.negative_prompt and checkpoint.pipeline.startswith("Flux"):
            raise StudyError(
                f"generators: negative_prompt: {spec.model} is distilled and ignores it; remove it"
            )
        if checkpoint.family is not None and checkpoint.family.flow and spec.scheduler not in (
            "checkpoint", "euler",
        ):  # fmt: skip
            raise StudyError(
                f"generators: scheduler: {spec.scheduler} is for diffusion, but {spec.model} is a"
                " flow; set scheduler: checkpoint"
            )

    # Requests ----------------------------------------------------------------------------------

    def nested(self) -> Sequence[tuple[str, Any]]:
        return () if self.spec.adapt is None else (("generators.adapt", self.spec.adapt),)

    def external_digests(self) -> Mapping[str, str]:
        digest = folder_digest(self.spec.model)
        return {} if digest is None else {self.spec.model: digest}

    def uses_clusters(self) -> bool:
        # A scope of clusters has conditions of clusters.
        by_adaptation = self.adaptation is not None and self.adaptation.condition() == "cluster"
        by_prompt = any("cluster" in placeholders(text) for text in self._templates())
        return by_adaptation or by_prompt or bool(self.spec.cluster_prompts)

    def parents(self) -> Literal["train", "representatives"] | None:
        return None if self.spec.mode == "text2image" else self.spec.parents

    def plan(self, label: str, count: int, train: TrainingRows, seed: int) -> Iterator[Request]:
        # Counted separately for each cluster: otherwise a cluster could always get one template.
        turns: Counter[int | None] = Counter()
        for request in super().plan(label, count, train, seed):
            choices = self.prompts_of(label, request.cluster or 0)
            negative = self.spec.negative_prompt
            yield replace(
                request,
                prompt=choices[turns[request.cluster] % len(choices)],
                negative_prompt=negative and self.filled(negative, label, request.cluster or 0),
                strength=None if self.spec.mode == "text2image" else self.spec.strength,
            )
            turns[request.cluster] += 1

    def prompts_of(self, label: str, cluster: int) -> list[str]:
        """The prompts of a class and cluster, which its images use in turn."""
        own = self.spec.cluster_prompts.get(label, {}).get(str(cluster))
        default = self.adaptation.template if self.adaptation else Adaptation.template
        templates = own or self.spec.prompts.get(label) or self.spec.prompt or (default,)
        return [self.filled(template, label, cluster) for template in templates]

    def filled(self, template: str, label: str, cluster: int) -> str:
        """A template filled in for a class and cluster."""
        return template.format(
            label=self.word(label), cluster=cluster, token=self._token(label, cluster)
        )

    def word(self, label: str) -> str:
        """The name of a class in prompts."""
        return self.spec.class_names.get(label, label.replace("_", " "))

    def _token(self, label: str, cluster: int) -> str:
        return (self.adaptation.token(label, cluster) if self.adaptation else None) or ""

    def _templates(self) -> Iterator[str]:
        spec = self.spec
        by_cluster = [own for entry in spec.cluster_prompts.values() for own in entry.values()]
        for templates in (spec.prompt or (), *spec.prompts.values(), *by_cluster):
            yield from templates
        if spec.negative_prompt:
            yield spec.negative_prompt

    def prompt_warnings(self, prompts: Sequence[str]) -> list[Notice]:
        from engine.nets.tokenizers import truncation_warnings

        new = self.adaptation.new_words(prompts) if self.adaptation else {}
        return truncation_warnings(self.spec.model, self.spec.revision, prompts, new)

    # Training ----------------------------------------------------------------------------------

    def fit(self, context: FitContext, data: TrainingImages, seed: int) -> None:
        from engine.generators.adapt._fit import fit

        fit(self, context, data, seed)

    def open_pipeline(self, folder: Path | None, mode: str) -> Any:
        """The pipeline of a folder, or of the checkpoint itself. Raises `StudyError`."""
        from engine.nets.pipeline_loading import open_pipeline

        pipeline = open_pipeline(self.spec, folder, mode)
        if folder is None:
            # A hub's checkpoint that was just downloaded has not been checked yet.
            self.check_checkpoint(checkpoint_of(pipeline, self.spec.model))
        return pipeline

    def side(self, pipeline: Any) -> int:
        """Side in pixels of the images that the pipeline generates."""
        side = self.spec.resolution or checkpoint_of(pipeline, self.spec.model).resolution
        latent = getattr(pipeline, "default_sample_size", 64)
        return side or int(latent * pipeline.vae_scale_factor)

    # Sampling ----------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        # The generator's key contains the whole spec; this is for the record.
        names = ("model", "revision", "variant", "precision", "resolution", "safety_checker")
        settings = {name: getattr(self.spec, name) for name in (*self.sampling_fields, *names)}
        # Another checkpoint under the same name makes other pixels.
        return {**settings, **self.external_digests()}

    def load(self, weights: Path | None, device: str) -> None:
        build = partial(self.open_pipeline, mode=self.spec.mode)
        self.device, self.numbers = device, {}
        self.choose: Callable[[int], None] = no_choice
        if self.adaptation is None:
            self.pipeline = build(None)
        else:
            if weights is None:
                raise StudyError("generators: diffusion has no weights to load; train it first")
            entries = json.loads((weights / ADAPTATIONS).read_text())
            self.numbers = {
                (label, cluster): number for number, (label, cluster, _) in enumerate(entries)
            }
            folders = [weights / folder for *_, folder in entries]
            self.pipeline, self.choose = self.adaptation.open(build, folders)
        predicted = getattr(self.spec.adapt, "prediction_type", None)
        if predicted and "FlowMatch" not in type(self.pipeline.scheduler).__name__:
            own = self.pipeline.scheduler
            self.pipeline.scheduler = type(own).from_config(own.config, prediction_type=predicted)
        if self.spec.scheduler != "checkpoint":
            from engine.nets.pipeline_loading import scheduler_like

            self.pipeline.scheduler = scheduler_like(self.pipeline, self.spec.scheduler)
        self.pixels = self.side(self.pipeline)
        self._place(device)

    def _place(self, device: str) -> None:
        if self.offload == "none":
            self.pipeline.to(device)
        elif self.offload == "model":
            self.pipeline.enable_model_cpu_offload(device=device)
        else:
            adaptation = self.adaptation
            if len(self.numbers) > 1 and adaptation is not None and adaptation.replaces_networks:
                raise StudyError(
                    "profile: stages.generate.offload: sequential does not support networks of"
                    " several classes; set offload: model, or adapt.scope: all"
                )
            self.pipeline.enable_sequential_cpu_offload(device=device)

    def sample(self, batch: SampleBatch) -> list[np.ndarray | str]:
        images: list[np.ndarray | str] = [""] * len(batch)
        for (number, strength, has_negative), rows in self._calls(batch).items():
            self.choose(number)
            seeds = [batch.seeds[row] for row in rows]
            options: dict[str, Any] = {} if strength is None else {"strength": strength}
            if batch.parents is not None:
                options |= self._from_parents(batch.parents[rows], seeds)
            if has_negative:
                options["negative_prompt"] = [batch.negative_prompts[row] for row in rows]
            prompts = [batch.prompts[row] or "" for row in rows]
            results = self.call(self.pipeline, prompts, seeds, self.pixels, options)
            for row, image in zip(rows, results, strict=True):
                images[row] = image
        return images

    def _calls(self, batch: SampleBatch) -> dict[tuple[int, float | None, bool], list[int]]:
        """Rows of the batch for each call of the pipeline: adaptation, strength, negative prompt
        or not."""
        calls: dict[tuple[int, float | None, bool], list[int]] = {}
        for row in range(len(batch)):
            number = 0
            if self.numbers and self.adaptation is not None:
                pair = group_of(self.adaptation.scope, batch.labels[row], batch.clusters[row] or 0)
                number = self.numbers[pair]
            strength = batch.strengths[row]
            if strength is not None:
                # Tables store 32 bits, with which 0.7 of ten steps would be six.
                strength = round(strength, 6)
            key = (number, strength, batch.negative_prompts[row] is not None)
            calls.setdefault(key, []).append(row)
        return calls

    def _from_parents(self, parents: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
        side = (self.pixels, self.pixels)
        images = [
            Image.fromarray(parent[..., 0] if parent.shape[-1] == 1 else parent)
            .convert("RGB")
            .resize(side, Image.Resampling.LANCZOS)
            for parent in parents
        ]
        if self.spec.mode == "image2image":
            return {"image": images}
        return {"image": images, "mask_image": [self._mask(seed) for seed in seeds]}

    def _mask(self, seed: int) -> Image.Image:
        """A mask that is white in the part to replace."""
        side = self.pixels
        hole = max(1, round(self.spec.mask_size * side))
        first = (side - hole) // 2
        corner = [first, first]
        if self.spec.mask == "anywhere":
            corner = generator(seed, "mask").integers(0, side - hole + 1, 2).tolist()
        mask = np.zeros((side, side), np.uint8)
        mask[corner[0] : corner[0] + hole, corner[1] : corner[1] + hole] = 255
        return Image.fromarray(255 - mask if self.spec.mask == "surroundings" else mask)

    def call(
        self, pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], side: int,
        options: Mapping[str, Any],
    ) -> list[np.ndarray | str]:  # fmt: skip
        """An image of the study's size for each prompt and seed, or the reason why there is none.
        options: further arguments of the pipeline. Raises `StudyError` for one that it lacks."""
        import torch

        arguments: dict[str, Any] = {
            "prompt": list(prompts), "height": side, "width": side, "output_type": "np",
            # One CPU generator for each image: neighbours and device change no draw.
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            **{
                name: getattr(self.spec, name)
                for name in ("num_inference_steps", "guidance_scale")
                if getattr(self.spec, name) is not None
            },
            **options,
        }  # fmt: skip
        accepted = inspect.signature(pipeline.__call__).parameters
        # Pipelines that start from an image have its size.
        unknown = set(arguments) - set(accepted) - {"height", "width"}
        if unknown:
            raise StudyError(
                f"generators: {min(unknown)}: {type(pipeline).__name__} does not support it;"
                " remove it"
            )
        output = pipeline(**{name: value for name, value in arguments.items() if name in accepted})
        filtered = getattr(output, "nsfw_content_detected", None) or [False] * len(prompts)
        return [
            self._postprocessed(image, bool(unsafe))
            for image, unsafe in zip(output.images, filtered, strict=True)
        ]

    def _postprocessed(self, image: np.ndarray, filtered: bool) -> np.ndarray | str:
        """float (height, width, 3) in [0, 1] to the study's size and channels."""
        if filtered:
            return "safety_filtered"
        if not np.isfinite(image).all():
            return "not_finite"
        pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
        return preprocess(Image.fromarray(pixels), self.preprocess)
