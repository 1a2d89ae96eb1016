"""Images and texts in one vector space: CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023) and
any checkpoint of transformers that has features of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from engine.core.errors import StudyError, brief
from engine.core.paths import expanded
from engine.core.spec import Spec, explained
from engine.nets.model_input import ModelInput
from engine.nets.pretrained import dtype_of, load_model

_BATCH = 64
_THREADS = 4


def _text(name: Any) -> Any:
    """Convert class names that YAML reads as numbers, such as 3, to text."""
    return str(name) if type(name) is int else name


class Described(Spec):
    """A checkpoint, and the prompts that describe classes to it."""

    # A hub id or a local folder.
    model: str = "openai/clip-vit-base-patch32"
    revision: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # Each contains {label}; their vectors are averaged.
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = ("a photo of a {label}.",)
    # Better names of classes for the templates; several are averaged.
    words: dict[
        Annotated[str, BeforeValidator(_text)],
        str | Annotated[tuple[str, ...], Field(min_length=1)],
    ] = {}

    @model_validator(mode="after")
    def _named(self) -> Described:
        for template in self.templates:
            rest = template.replace("{label}", "")
            if rest == template or set("{}") & set(rest):
                raise explained(
                    "templates: {template} must contain {field} and no other braces",
                    template=repr(template[:60]),
                    field="{label}",
                )
        return self


class TextImage:
    """One loaded checkpoint. Vectors are float32 of length 1."""

    def __init__(self, section: str, spec: Described, device: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        model, _ = load_model(section, AutoModel, spec.model, spec.revision)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                expanded(spec.model), revision=spec.revision, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise StudyError(f"{section}.model: {spec.model}: {brief(error)}") from None
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            kind = model.config.model_type
            raise StudyError(
                f"{section}.model: {spec.model}: a {kind} has no text features; name a checkpoint"
                " such as CLIP"
            )
        self.input = ModelInput.of(section, spec.model, spec.revision, None)
        self.dtype, self.device = dtype_of(spec.precision), device
        self.model: Any = model.to(device=device, dtype=self.dtype).eval().requires_grad_(False)
        learnt = getattr(model, "logit_scale", None)
        # CLIP's scale after training, if the checkpoint has none.
        self.logit_scale = 100.0 if learnt is None else math.exp(float(learnt))
        text_config = getattr(model.config, "text_config", None)
        self.limit = int(getattr(text_config, "max_position_embeddings", 77))
        self.threads = ThreadPoolExecutor(_THREADS)

    @classmethod
    def of(cls, section: str, spec: Described, device: str) -> TextImage:
        """The model of a checkpoint, loaded once in each process. Raises `StudyError`."""
        key = (spec.model, spec.revision, spec.precision, device)
        if key not in _LOADED:
            _LOADED[key] = cls(section, spec, device)
        return _LOADED[key]

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, 1 or 3) to (n, width)."""
        import torch

        vectors = []
        with torch.inference_mode():
            for start in range(0, len(pixels), _BATCH):
                block = pixels[start : start + _BATCH]
                fitted = np.stack(list(self.threads.map(self.input.fitted, block)))
                values = self.input.values(fitted, self.device).to(self.dtype)
                vectors.append(_unit(self.model.get_image_features(pixel_values=values)))
        return np.concatenate(vectors)

    def texts(self, prompts: Sequence[str], section: str) -> np.ndarray:
        """Vectors (n, width) of prompts. Raises `StudyError` for a prompt that is too long."""
        import torch

        lengths = [len(self.tokenizer(prompt, verbose=False).input_ids) for prompt in prompts]
        if max(lengths) > self.limit:
            prompt = prompts[int(np.argmax(lengths))]
            raise StudyError(
                f"{section}.templates: {prompt[:60]!r} has {max(lengths)} tokens, but the"
                f" checkpoint reads {self.limit}; shorten it"
            )
        # SigLIP was trained on texts of full length.
        padded: dict[str, Any] = {"padding": True}
        if "siglip" in self.model.config.model_type:
            padded = {"padding": "max_length", "max_length": self.limit}
        with torch.inference_mode():
            tokens = self.tokenizer(list(prompts), return_tensors="pt", **padded)
            return _unit(self.model.get_text_features(**tokens.to(self.device)))

    def classes(self, spec: Described, classes: Sequence[str], section: str) -> np.ndarray:
        """Vectors (classes, width): the mean of each class's prompts, scaled to length 1. Raises
        `StudyError` for words of an unknown class."""
        unknown = sorted(set(spec.words) - set(classes))
        if unknown:
            raise StudyError(
                f"{section}.words: unknown class {unknown[0]!r}; use {', '.join(classes)[:200]}"
            )
        means = []
        for label in classes:
            words = spec.words.get(label, label.replace("_", " "))
            names = [words] if isinstance(words, str) else words
            prompts = [template.format(label=name) for template in spec.templates for name in names]
            mean = self.texts(prompts, section).mean(0)
            means.append(mean / max(float(np.linalg.norm(mean)), 1e-12))
        return np.stack(means)


# A worker has few models, which stay loaded until it ends.
_LOADED: dict[tuple[str, str | None, str, str], TextImage] = {}


def _unit(features: Any) -> np.ndarray:
    import torch

    vectors = getattr(features, "pooler_output", features).float()
    return np.asarray(torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy())
