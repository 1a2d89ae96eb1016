"""LoRA (Hu et al. 2022) by peft: low-rank matrices in addition to the attention layers.

The weights are `pytorch_lora_weights.safetensors`, which `load_lora_weights` reads.
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
from engine.nets.pipelines import DenoisingSettings, family_of
from engine.nets.pretrained import order_header

_TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class LoraSettings(DenoisingSettings):
    # all: one adaptation, in which prompts distinguish the classes. class, cluster: one for each.
    scope: Scope = "all"
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    # The matrices are scaled by lora_alpha / rank; None: equal to rank.
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Names of layers of the denoiser; None: its attention, as in diffusers' scripts.
    target_modules: tuple[str, ...] | None = None
    train_text_encoder: bool = False


class LoraSpec(LoraSettings, AdaptSpec):
    name: Literal["lora"] = "lora"


class Lora(Adaptation[LoraSettings]):
    version = 1
    Spec = LoraSpec

    def attach(self, pipeline: Any, words: Mapping[Pair, str]) -> None:
        from peft import LoraConfig

        freeze(pipeline)
        family = family_of(type(pipeline).__name__)
        assert family is not None
        for name in self._components(pipeline):
            denoiser = name == family.denoiser
            targets = self.spec.target_modules or family.lora_targets if denoiser else _TEXT_TARGETS
            getattr(pipeline, name).add_adapter(
                LoraConfig(
                    r=self.spec.rank,
                    # peft declares int, and scales by any number.
                    lora_alpha=self.spec.lora_alpha or self.spec.rank,  # type: ignore[arg-type]
                    lora_dropout=self.spec.lora_dropout, init_lora_weights="gaussian",
                    target_modules=list(targets),
                )
            )  # fmt: skip

    def _components(self, pipeline: Any) -> list[str]:
        return trained_components(pipeline, self.spec.train_text_encoder)

    def save(self, pipeline: Any, folder: Path) -> None:
        from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        weights: dict[str, Any] = {}
        for name in self._components(pipeline):
            network = getattr(pipeline, name)
            state = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
            weights[f"{name}_lora_layers"] = {key: value.cpu() for key, value in state.items()}
            # It tells readers an alpha that differs from the rank.
            config = network.peft_config["default"].to_dict()
            # The order of a set differs between processes; equal weights must have equal files.
            weights[f"{name}_lora_adapter_metadata"] = {
                key: sorted(value) if isinstance(value, set) else value
                for key, value in config.items()
            }
        type(pipeline).save_lora_weights(folder, **weights, safe_serialization=True)
        order_header(folder / "pytorch_lora_weights.safetensors")

    def open(
        self, build: Callable[[Path | None], Any], folders: Sequence[Path]
    ) -> tuple[Any, Callable[[int], None]]:
        pipeline = build(None)
        for number, folder in enumerate(folders):
            pipeline.load_lora_weights(folder, adapter_name=f"adapter_{number}")
        if len(folders) == 1:
            return pipeline, no_choice
        return pipeline, lambda number: pipeline.set_adapters(f"adapter_{number}")
