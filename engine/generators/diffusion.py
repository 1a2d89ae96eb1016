"""Any checkpoint of diffusers (Stable Diffusion 1.5, 2, XL, 3, FLUX and others), as it is or
adapted to the study's images.

From text, from training images (SDEdit, Meng et al. 2022) or by repainting a part of them. How a
checkpoint is adapted (LoRA, DreamBooth, textual inversion, all weights) is a plugin of its own in
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
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from pydantic_core import PydanticCustomError

from engine.core.errors import StudyError
from engine.core.registry import PluginField, resolve
from engine.core.rng import generator
from engine.core.spec import Spec
from engine.data.images import preprocess
from engine.generators import (
    Generator,
    GeneratorSpec,
    Request,
    SampleBatch,
    TrainingImages,
    TrainingRows,
)
from engine.generators._prompts import Template, Templates, places
from engine.generators.adapt import Adaptation, Pair, Scope, stay
from engine.nets.checkpoints import dtype_of
from engine.nets.pipelines import Checkpoint, folder_digest, read_checkpoint
from engine.work.fit import FitContext

# Which folder of the weights belongs to which class and cluster.
FOLDERS = "adaptations.json"


def _adaptation(value: Any) -> Any:
    """`none`, in words or as a mapping, is the checkpoint as it is."""
    if value in (None, "none", {"name": "none"}):
        return None
    return PluginField("generators.adapt")(value)


class DiffusionSpec(GeneratorSpec):
    name: Literal["diffusion"] = "diffusion"
    # A hub's id or a folder that a pipeline was saved to.
    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    # Of the files of weights, as in `fp16`.
    variant: str | None = None
    # How the checkpoint is made to know the study's images; none: it is not.
    adapt: Annotated[SerializeAsAny[Spec] | None, BeforeValidator(_adaptation)] = None
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    # Side in pixels of what is made, before it is brought to the study's size; None: what the
    # checkpoint was made for.
    resolution: Annotated[int, Field(ge=8, le=4096)] | None = None
    # text2image: from the prompt alone. image2image: from a training image, with noise added.
    # inpainting: from a training image, of which a part is painted anew.
    mode: Literal["text2image", "image2image", "inpainting"] = "text2image"
    # Which training images those are.
    parents: Literal["train", "representatives"] = "representatives"
    # How far an image leaves its parent: 0 not at all, 1 wholly.
    strength: Annotated[float, Field(gt=0, le=1)] = 0.5
    # What is painted anew: a square in the middle, all but that, or a square at any place.
    mask: Literal["center", "surroundings", "anywhere"] = "anywhere"
    # Side of that square, as a share of the image's.
    mask_size: Annotated[float, Field(gt=0, lt=1)] = 0.5
    # Prompts with {label}, {cluster} and, where `adapt` has them, {token}; several are taken in
    # turn. None: what suits the adaptation.
    prompt: Templates | None = None
    # In their place, those of a class, and of a cluster of a class.
    prompts: dict[str, Templates] = {}
    cluster_prompts: dict[str, dict[Annotated[str, Field(pattern=r"^\d+$")], Templates]] = {}
    # What {label} stands for, where it is not the class's own name.
    class_names: dict[str, str] = {}
    negative_prompt: Template | None = None
    # checkpoint: the one that it brings along.
    scheduler: Literal["checkpoint", "ddim", "dpmsolver++", "euler", "unipc"] = "checkpoint"
    # None: what the pipeline takes by itself.
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=50)] | None = None
    # Whether the checkpoint's own filter may hold images back.
    safety_checker: bool = True

    @model_validator(mode="after")
    def _noise_is_left(self) -> DiffusionSpec:
        steps = self.num_inference_steps
        if self.mode != "text2image" and steps is not None and int(steps * self.strength) < 1:
            raise PydanticCustomError(
                "explained", "num_inference_steps x strength leaves no step to take"
            )
        return self


class Diffusion(Generator):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[GeneratorSpec]] = DiffusionSpec
    sampling_fields: ClassVar[tuple[str, ...]] = (
        "mode", "parents", "strength", "mask", "mask_size", "negative_prompt", "scheduler",
        "num_inference_steps", "guidance_scale",
    )  # fmt: skip
    spec: DiffusionSpec

    def __init__(self, spec: Any, preprocess: Any) -> None:
        super().__init__(spec, preprocess)
        self.adaptation: Adaptation | None = None
        if spec.adapt is not None:
            self.adaptation = resolve("generators.adapt", spec.adapt.name)(spec.adapt)

    # What the study is refused for -------------------------------------------------------------

    def check(self) -> None:
        for text in self._templates():
            named = places(text)
            if self.adaptation is not None and self.adaptation.needs_token and (
                "token" not in named and text != self.spec.negative_prompt
            ):  # fmt: skip
                raise StudyError(
                    f"generators: prompt: {text[:60]!r} lacks {{token}}, the word that"
                    f" {self.adaptation.spec.name} learns: nothing would be learnt from it"
                )
            if "token" in named and not self._token("x", 0):
                raise StudyError(
                    f"generators: prompt: {text[:60]!r} has {{token}}, which dreambooth and"
                    " textual_inversion know; say {label}"
                )
        checkpoint = read_checkpoint("generators: model", self.spec.model, self.spec.revision)
        if checkpoint is not None:
            self.check_checkpoint(checkpoint)

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Refuse what cannot be done with this checkpoint. Raises `StudyError`."""
        spec = self.spec
        if self.adaptation is not None:
            self.adaptation.check(checkpoint)
        if checkpoint.repaints and spec.mode != "inpainting":
            raise StudyError(
                f"generators: mode: {spec.model} paints parts of images anew; say mode: inpainting"
            )
        side = spec.resolution or checkpoint.resolution
        if side is not None and side % checkpoint.multiple:
            raise StudyError(
                f"generators: resolution: {side} px is no multiple of {checkpoint.multiple}, which"
                f" {spec.model} needs"
            )
        if spec.negative_prompt and checkpoint.pipeline.startswith("Flux"):
            raise StudyError(
                f"generators: negative_prompt: {spec.model} is distilled to need none and reads"
                " none; leave it out"
            )
        if checkpoint.family is not None and checkpoint.family.flow and spec.scheduler not in (
            "checkpoint", "euler",
        ):  # fmt: skip
            raise StudyError(
                f"generators: scheduler: {spec.scheduler} is for diffusion, {spec.model} learnt a"
                " flow; say scheduler: checkpoint"
            )

    # What is asked for -------------------------------------------------------------------------

    @property
    def trainable(self) -> bool:  # type: ignore[override]
        """Whether the checkpoint is adapted."""
        return self.adaptation is not None

    def nested(self) -> Sequence[tuple[str, Any]]:
        return () if self.spec.adapt is None else (("generators.adapt", self.spec.adapt),)

    def outside(self) -> Mapping[str, str]:
        found = folder_digest(self.spec.model)
        return {} if found is None else {self.spec.model: found}

    def uses_clusters(self) -> bool:
        adaptation = self.adaptation
        by_adaptation = adaptation is not None and (
            adaptation.scope == "cluster" or adaptation.condition() == "cluster"
        )
        by_prompt = any("cluster" in places(text) for text in self._templates())
        return by_adaptation or by_prompt or bool(self.spec.cluster_prompts)

    def parents(self) -> Literal["train", "representatives"] | None:
        return None if self.spec.mode == "text2image" else self.spec.parents

    def plan(self, label: str, count: int, train: TrainingRows, seed: int) -> Iterator[Request]:
        # Counted for each cluster by itself: else templates and clusters would keep step.
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
        """What an image of a class and cluster may be described by."""
        own = self.spec.cluster_prompts.get(label, {}).get(str(cluster))
        default = self.adaptation.template if self.adaptation else Adaptation.template
        templates = own or self.spec.prompts.get(label) or self.spec.prompt or (default,)
        return [self.filled(template, label, cluster) for template in templates]

    def filled(self, template: str, label: str, cluster: int) -> str:
        """A template with what it says of this class and cluster."""
        return template.format(
            label=self.word(label), cluster=cluster, token=self._token(label, cluster)
        )

    def word(self, label: str) -> str:
        """What a class is called in a prompt."""
        return self.spec.class_names.get(label, label.replace("_", " "))

    def _token(self, label: str, cluster: int) -> str:
        return (self.adaptation.token(label, cluster) if self.adaptation else None) or ""

    def _templates(self) -> Iterator[str]:
        spec = self.spec
        yield from spec.prompt or ()
        for own in (*spec.prompts.values(), *[
            texts for held in spec.cluster_prompts.values() for texts in held.values()
        ]):  # fmt: skip
            yield from own
        if spec.negative_prompt:
            yield spec.negative_prompt

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        from engine.nets.tokenizers import cut_off

        new = self.adaptation.new_words(prompts) if self.adaptation else {}
        return cut_off(self.spec.model, self.spec.revision, prompts, new)

    # Training ----------------------------------------------------------------------------------

    def fit(self, context: FitContext, data: TrainingImages, seed: int) -> None:
        from engine.generators.adapt._fit import fit

        fit(self, context, data, seed)

    def open_pipeline(self, folder: Path | None, mode: str) -> Any:
        """The pipeline of a folder, or of the checkpoint itself. Raises `StudyError`."""
        import diffusers
        import transformers

        spec = self.spec
        kind = {
            "text2image": diffusers.AutoPipelineForText2Image,
            "image2image": diffusers.AutoPipelineForImage2Image,
            "inpainting": diffusers.AutoPipelineForInpainting,
        }[mode]
        fields: dict[str, Any] = {"torch_dtype": dtype_of(spec.precision), "use_safetensors": True}
        if folder is None:
            fields |= {"revision": spec.revision, "variant": spec.variant}
        if not spec.safety_checker:
            fields |= {"safety_checker": None, "requires_safety_checker": False}
        # Of what it finds nothing of in a file it warns at length; what cannot work raises.
        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        try:
            pipeline = kind.from_pretrained(str(folder or Path(spec.model).expanduser()), **fields)
        except (OSError, ValueError, KeyError, ImportError) as error:
            text = " ".join(str(error).split())[:300]
            raise StudyError(f"generators: model: {spec.model}: {text}") from None
        pipeline.set_progress_bar_config(disable=True)
        if folder is None:
            # Of a hub's checkpoint that was not here before, this is the first that is known.
            self.check_checkpoint(checkpoint_of(pipeline, spec.model))
        return pipeline

    def side(self, pipeline: Any) -> int:
        """Side in pixels of what the pipeline makes."""
        found = self.spec.resolution or checkpoint_of(pipeline, self.spec.model).resolution
        latent = getattr(pipeline, "default_sample_size", 64)
        return found or int(latent * pipeline.vae_scale_factor)

    # Sampling ----------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        # `spec` as a whole is in the generator's key; this is for the record.
        names = ("model", "revision", "variant", "precision", "resolution", "safety_checker")
        held = {name: getattr(self.spec, name) for name in (*self.sampling_fields, *names)}
        # Under one name, another checkpoint makes other pixels.
        return {**held, **self.outside()}

    def load(self, weights: Path | None, device: str) -> None:
        build = partial(self.open_pipeline, mode=self.spec.mode)
        self.device, self.numbers = device, {}
        self.choose: Callable[[int], None] = stay
        if self.adaptation is None:
            self.pipeline = build(None)
        else:
            if weights is None:
                raise StudyError("diffusion has no weights to load; train it first")
            found = json.loads((weights / FOLDERS).read_text())
            self.numbers = {
                (label, cluster): number for number, (label, cluster, _) in enumerate(found)
            }
            folders = [weights / folder for *_, folder in found]
            self.pipeline, self.choose = self.adaptation.open(build, folders)
        predicted = getattr(self.spec.adapt, "prediction_type", None)
        if predicted and "FlowMatch" not in type(self.pipeline.scheduler).__name__:
            own = self.pipeline.scheduler
            self.pipeline.scheduler = type(own).from_config(own.config, prediction_type=predicted)
        if self.spec.scheduler != "checkpoint":
            self.pipeline.scheduler = scheduler_like(self.pipeline, self.spec.scheduler)
        self.pixels = self.side(self.pipeline)
        self._place(device)

    def _place(self, device: str) -> None:
        if self.offload == "none":
            self.pipeline.to(device)
        elif self.offload == "model":
            self.pipeline.enable_model_cpu_offload(device=device)
        else:
            if len(self.numbers) > 1 and self.adaptation is not None and self.adaptation.whole:
                raise StudyError(
                    "profile: stages.generate.offload: sequential leaves no weights in place that"
                    " one class's could take; say offload: model, or adapt.scope: all"
                )
            self.pipeline.enable_sequential_cpu_offload(device=device)

    def sample(self, batch: SampleBatch) -> list[np.ndarray | str]:
        made: list[np.ndarray | str] = [""] * len(batch)
        for (number, strength, negative), rows in self._alike(batch).items():
            self.choose(number)
            given = {"strength": strength} if strength is not None else {}
            if batch.parents is not None:
                given |= self._from_parents(batch.parents[rows], [batch.seeds[row] for row in rows])
            if negative:
                given["negative_prompt"] = [batch.negative_prompts[row] for row in rows]
            prompts = [batch.prompts[row] or "" for row in rows]
            found = self.call(self.pipeline, prompts, [batch.seeds[row] for row in rows],
                              self.pixels, given)  # fmt: skip
            for row, image in zip(rows, found, strict=True):
                made[row] = image
        return made

    def _alike(self, batch: SampleBatch) -> dict[tuple[int, float | None, bool], list[int]]:
        """Rows that one call of the pipeline can make, in order."""
        found: dict[tuple[int, float | None, bool], list[int]] = {}
        for row in range(len(batch)):
            number = 0
            if self.numbers and self.adaptation is not None:
                pair = group_of(self.adaptation.scope, batch.labels[row], batch.clusters[row] or 0)
                number = self.numbers[pair]
            strength = batch.strengths[row]
            if strength is not None:
                # Rows hold 32 bits: 0.7 of ten steps would be six.
                strength = round(strength, 6)
            key = (number, strength, batch.negative_prompts[row] is not None)
            found.setdefault(key, []).append(row)
        return found

    def _from_parents(self, parents: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
        side = (self.pixels, self.pixels)
        images = [
            Image.fromarray(held[..., 0] if held.shape[-1] == 1 else held)
            .convert("RGB")
            .resize(side, Image.Resampling.LANCZOS)
            for held in parents
        ]
        if self.spec.mode == "image2image":
            return {"image": images}
        return {"image": images, "mask_image": [self._mask(seed) for seed in seeds]}

    def _mask(self, seed: int) -> Image.Image:
        """White where an image is painted anew."""
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
        self,
        pipeline: Any,
        prompts: Sequence[str],
        seeds: Sequence[int],
        side: int,
        given: Mapping[str, Any],
    ) -> list[np.ndarray | str]:
        """An image of the study's size for each prompt and seed, or the reason why there is
        none."""
        import torch

        wanted: dict[str, Any] = {
            "prompt": list(prompts), "height": side, "width": side, "output_type": "np",
            # On the CPU, one generator for each image: neighbours and device change no draw.
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            **{
                name: getattr(self.spec, name)
                for name in ("num_inference_steps", "guidance_scale")
                if getattr(self.spec, name) is not None
            },
            **given,
        }  # fmt: skip
        accepted = inspect.signature(pipeline.__call__).parameters
        # The size of an image that is started from says it already.
        refused = set(wanted) - set(accepted) - {"height", "width"}
        if refused:
            raise StudyError(
                f"generators: {min(refused)}: a {type(pipeline).__name__} takes none; leave it out"
            )
        output = pipeline(**{name: value for name, value in wanted.items() if name in accepted})
        filtered = getattr(output, "nsfw_content_detected", None) or [False] * len(prompts)
        return [
            self._finished(image, bool(held))
            for image, held in zip(output.images, filtered, strict=True)
        ]

    def _finished(self, image: np.ndarray, filtered: bool) -> np.ndarray | str:
        """float (height, width, 3) in [0, 1] to the study's size and channels."""
        if filtered:
            return "safety_filtered"
        if not np.isfinite(image).all():
            return "not_finite"
        pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
        return preprocess(Image.fromarray(pixels), self.preprocess)


def group_of(scope: Scope, label: str, cluster: int) -> Pair:
    """The images whose adaptation an image of this class and cluster has."""
    return {"all": ("", 0), "class": (label, 0), "cluster": (label, cluster)}[scope]


def checkpoint_of(pipeline: Any, model: str) -> Checkpoint:
    """What `read_checkpoint` would say of a pipeline that is loaded."""
    configs = {
        name: dict(component.config)
        for name in ("unet", "transformer", "vae")
        if (component := getattr(pipeline, name, None)) is not None
    }
    held = {name for name, component in pipeline.components.items() if component is not None}
    return Checkpoint(
        model, type(pipeline).__name__, frozenset(held), configs,
        type(pipeline.scheduler).__name__,
        bool(pipeline.config.get("requires_aesthetics_score")),
    )  # fmt: skip


def scheduler_like(pipeline: Any, name: str) -> Any:
    """Another scheduler with the settings of the pipeline's own."""
    import diffusers

    if "FlowMatch" in type(pipeline.scheduler).__name__:
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    kind = {
        "ddim": diffusers.DDIMScheduler, "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
        "euler": diffusers.EulerDiscreteScheduler, "unipc": diffusers.UniPCMultistepScheduler,
    }[name]  # fmt: skip
    return kind.from_config(pipeline.scheduler.config)
