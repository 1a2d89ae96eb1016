"""All weights of the denoiser, and of the CLIP text encoders with `train_text_encoder`.

The weights are a whole pipeline: `DiffusionPipeline.from_pretrained` opens it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.generators.adapt import (
    Adaptation,
    AdaptSpec,
    Pair,
    Scope,
    freeze,
    no_choice,
    trained_components,
)
from engine.nets.pipelines import DenoisingSettings


class FullSpec(DenoisingSettings, AdaptSpec):
    name: Literal["full"] = "full"
    # all: one adaptation, in which prompts distinguish the classes. class, cluster: one for each.
    scope: Scope = "all"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    train_text_encoder: bool = False


class Full(Adaptation[FullSpec]):
    version = 1
    replaces_networks = True

    def attach(self, pipeline: Any, words: Mapping[Pair, str]) -> None:
        freeze(pipeline)
        for name in trained_components(pipeline, self.spec.train_text_encoder):
            getattr(pipeline, name).requires_grad_(True)

    def save(self, pipeline: Any, folder: Path) -> None:
        pipeline.save_pretrained(folder, safe_serialization=True)

    def open(
        self, build: Callable[[Path | None], Any], folders: Sequence[Path]
    ) -> tuple[Any, Callable[[int], None]]:
        pipeline = build(folders[0])
        if len(folders) == 1:
            return pipeline, no_choice
        names = trained_components(pipeline, self.spec.train_text_encoder)
        networks = {name: getattr(pipeline, name) for name in names}

        def state(folder: Path, name: str) -> dict[str, Any]:
            kind, dtype = type(networks[name]), networks[name].dtype
            opened = kind.from_pretrained(folder / name, torch_dtype=dtype, use_safetensors=True)
            return dict(opened.state_dict())

        # Only the weights that differ between the pipelines stay in memory.
        states = [{name: state(folder, name) for name in names} for folder in folders]
        chosen = 0

        def choose(number: int) -> None:
            nonlocal chosen
            if number != chosen:
                for name, weights in states[number].items():
                    networks[name].load_state_dict(weights)
                chosen = number

        return pipeline, choose
