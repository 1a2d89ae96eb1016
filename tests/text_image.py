"""A tiny CLIP, saved as a folder like those of a hub: random weights, images of 32 px, spelled
words."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.pipelines import LENGTH, clip_tokenizer


def save_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    tokenizer = clip_tokenizer(folder / "words")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "initializer_range": 0.5}  # fmt: skip
    config = CLIPConfig(
        text_config={
            **sizes, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    target = folder / "clip"
    CLIPModel(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    values = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_rescale": True,
        "do_center_crop": True, "do_normalize": True, "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32}, "rescale_factor": 1 / 255, "resample": 3,
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
    }  # fmt: skip
    (target / "preprocessor_config.json").write_text(json.dumps(values))
    return target
