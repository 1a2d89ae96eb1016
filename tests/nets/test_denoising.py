from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.nets.denoising import predict
from engine.nets.pipelines import family_of
from tests.pipelines import save_pipeline


def test_flux_latents_become_the_tokens_and_positions_of_its_pipeline(tmp_path: Path) -> None:
    import diffusers

    kind: Any = diffusers.FluxPipeline
    pipeline = kind.from_pretrained(save_pipeline("flux", tmp_path))
    channels = pipeline.transformer.config.in_channels // 4
    height, width = 4, 6
    tokens, positions = pipeline.prepare_latents(
        2, channels, height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor,
        torch.float32, torch.device("cpu"), torch.Generator().manual_seed(1),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(2, channels, height, width, generator=draw)
    arguments: dict[str, Any] = {}

    def denoiser(**named: Any) -> Any:
        arguments.update(named)
        return (named["hidden_states"],)

    text = {"embeds": torch.zeros(2, 3, 4), "pooled": torch.zeros(2, 4)}
    family, network = family_of("FluxPipeline"), torch.nn.Identity()
    network.forward = denoiser  # type: ignore[method-assign, assignment]
    assert family is not None
    predicted = predict(pipeline, family, network, latents, torch.tensor([500, 500]), text, 8)
    assert torch.equal(arguments["hidden_states"], tokens)
    assert torch.equal(arguments["img_ids"], positions)
    assert torch.equal(predicted, latents)
