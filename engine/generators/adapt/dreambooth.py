"""DreamBooth (Ruiz et al. 2023): learns the study's images under a rare word, together with images
that the checkpoint generates itself, against forgetting.

It trains a LoRA or all weights, and saves as these do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.generators._prompts import Template
from engine.generators.adapt import Adaptation, AdaptSpec, Pair, Prior
from engine.generators.adapt.full import Full, FullSpec
from engine.generators.adapt.lora import Lora, LoraSettings


class DreamboothSpec(LoraSettings, AdaptSpec):
    name: Literal["dreambooth"] = "dreambooth"
    # What is trained; `full` ignores rank and the other settings of LoRA.
    method: Literal["lora", "full"] = "lora"
    # None: 0.0001 for a LoRA, 0.000005 for all weights. The base has no None: which default holds
    # depends on `method` here.
    learning_rate: Annotated[float, Field(gt=0)] | None = None  # type: ignore[assignment]
    proportion_empty_prompts: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # The rare word that replaces {token}, and others for single classes.
    identifier: Annotated[str, Field(min_length=1, max_length=64)] = "sks"
    tokens: dict[str, str] = {}
    with_prior_preservation: bool = True
    # The prompt of the images that the checkpoint generates; {label} is filled in.
    class_prompt: Template = "a photo of {label}"
    num_class_images: Annotated[int, Field(ge=1, le=10_000)] = 100
    prior_loss_weight: Annotated[float, Field(gt=0)] = 1.0


class Dreambooth(Adaptation[DreamboothSpec]):
    version = 1
    template = "a photo of {token} {label}"

    def __init__(self, spec: DreamboothSpec) -> None:
        super().__init__(spec)
        self.method: Adaptation = Lora(spec)
        if spec.method == "full":
            shared = set(FullSpec.model_fields) - {"name", "learning_rate"}
            self.method = Full(FullSpec(**{name: getattr(spec, name) for name in shared}))
        self.replaces_networks = self.method.replaces_networks

    @property
    def settings(self) -> Any:
        rate = self.spec.learning_rate or (5e-6 if self.spec.method == "full" else 1e-4)
        return self.spec.model_copy(update={"learning_rate": rate})

    def token(self, label: str, cluster: int) -> str | None:
        return self.spec.tokens.get(label, self.spec.identifier)

    def prior(self) -> Prior | None:
        if not self.spec.with_prior_preservation:
            return None
        return Prior(
            self.spec.class_prompt, self.spec.num_class_images, self.spec.prior_loss_weight
        )

    def attach(self, pipeline: Any, words: Mapping[Pair, str]) -> None:
        self.method.attach(pipeline, words)

    def save(self, pipeline: Any, folder: Path) -> None:
        self.method.save(pipeline, folder)

    def open(
        self, build: Callable[[Path | None], Any], folders: Sequence[Path]
    ) -> tuple[Any, Callable[[int], None]]:
        return self.method.open(build, folders)
