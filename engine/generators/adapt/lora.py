"""LoRA (Hu et al. 2022) by peft: small matrices beside the attention layers.

What is saved is `pytorch_lora_weights.safetensors`: `load_lora_weights` puts it on the checkpoint.
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
from engine.nets.checkpoints import order_header
from engine.nets.pipelines import DenoisingSettings, family_of

_TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class LoraSettings(DenoisingSettings):
    # all: one adaptation, prompts tell the classes apart. class, cluster: one for each.
    scope: Scope = "all"
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    # What is learnt counts lora_alpha / rank; None: as rank.
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Names of layers of the denoiser; None: the attention, as diffusers' scripts do.
    target_modules: tuple[str, ...] | None = None
    train_text_encoder: bool = False


class LoraSpec(LoraSettings, AdaptSpec):
    name: Literal["lora"] = "lora"


class Lora(Adaptation):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[AdaptSpec]] = LoraSpec
    spec: LoraSettings

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
                    r=self.spec.rank, lora_alpha=self.spec.lora_alpha or self.spec.rank,
                    lora_dropout=self.spec.lora_dropout, init_lora_weights="gaussian",
                    target_modules=list(targets),
                )
            )  # fmt: skip

    def _components(self, pipeline: Any) -> list[str]:
        return trained_components(pipeline, self.spec.train_text_encoder)

    def save(self, pipeline: Any, folder: Path) -> None:
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        held: dict[str, Any] = {}
        for name in self._components(pipeline):
            network = getattr(pipeline, name)
            state = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
            held[f"{name}_lora_layers"] = {key: value.cpu() for key, value in state.items()}
            # With it, a rank and an alpha that differ are known to who loads it.
            config = network.peft_config["default"].to_dict()
            # A set has another order in each process; equal weights have equal files.
            held[f"{name}_lora_adapter_metadata"] = {
                key: sorted(value) if isinstance(value, set) else value
                for key, value in config.items()
            }
        type(pipeline).save_lora_weights(folder, **held, safe_serialization=True)
        order_header(folder / "pytorch_lora_weights.safetensors")

    def open(
        self, build: Callable[[Path | None], Any], folders: Sequence[Path]
    ) -> tuple[Any, Callable[[int], None]]:
        pipeline = build(None)
        for number, folder in enumerate(folders):
            pipeline.load_lora_weights(folder, adapter_name=f"adapter_{number}")
        if len(folders) == 1:
            return pipeline, stay
        return pipeline, lambda number: pipeline.set_adapters(f"adapter_{number}")
