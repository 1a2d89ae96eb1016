"""All weights of the denoiser, and of the CLIP text encoders where asked for.

What is saved is a whole pipeline: `DiffusionPipeline.from_pretrained` opens it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from engine.generators.adapt import (
    Adaptation,
    AdaptSpec,
    Pair,
    Scope,
    freeze,
    stay,
    trained_components,
)
from engine.nets.pipelines import DenoisingSettings


class FullSpec(DenoisingSettings, AdaptSpec):
    name: Literal["full"] = "full"
    # all: one adaptation, prompts tell the classes apart. class, cluster: one for each.
    scope: Scope = "all"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    train_text_encoder: bool = False


class Full(Adaptation):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[AdaptSpec]] = FullSpec
    whole = True
    spec: FullSpec

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
            return pipeline, stay
        names = trained_components(pipeline, self.spec.train_text_encoder)
        # Of the other pipelines only what differs stays in memory.
        states = [
            {name: type(getattr(pipeline, name)).from_pretrained(folder / name).state_dict()
             for name in names}
            for folder in folders
        ]  # fmt: skip
        chosen = 0

        def choose(number: int) -> None:
            nonlocal chosen
            if number != chosen:
                for name, state in states[number].items():
                    getattr(pipeline, name).load_state_dict(state)
                chosen = number

        return pipeline, choose
