"""Tiny pipelines with the structure of Stable Diffusion 1, XL, 3 and FLUX: random weights, a few
thousand parameters, saved as folders like those of a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_WORDS = ["a", "photo", "of", "cat", "dog", "blurry"]
# Number of positions, and so of tokens, of the text encoders.
LENGTH = 16


def save_pipeline(kind: str, folder: Path, **fields: Any) -> Path:
    """Write the pipeline `kind` of sd, sdxl, sd3, flux to `folder`; returns the folder."""
    torch.manual_seed(0)
    build = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux}[kind]
    build(folder / "words", **fields).save_pretrained(folder / kind, safe_serialization=True)
    return folder / kind


def clip_tokenizer(folder: Path, length: int = LENGTH) -> Any:
    """A tokenizer with letters and the words of the prompts; it spells every other word."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in _WORDS:
        held = [*word[:-1], word[-1] + "</w>"]
        while len(held) > 1:
            merges.append(f"{held[0]} {held[1]}")
            held = [held[0] + held[1], *held[2:]]
            tokens.append(held[0])
    vocabulary = dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    numbered = {token: number for number, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(numbered))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]))
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length
    )


def _clip(tokenizer: Any, projected: bool = False, width: int = 16) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LENGTH,
        projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _t5(width: int = 16) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz▁"]
    words = Tokenizer(models.Unigram(pieces, unk_id=2))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = T5TokenizerFast(tokenizer_object=words, model_max_length=2 * LENGTH)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return tokenizer, T5EncoderModel(config).eval()


def _vae(latent_channels: int = 4, **fields: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=latent_channels,
        norm_num_groups=4, sample_size=32, **fields,
    )  # fmt: skip


def _unet(**fields: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4, **fields,
    )  # fmt: skip


def _sd(folder: Path, safety_checker: Any = None, **scheduler: Any) -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPImageProcessor

    tokenizer = clip_tokenizer(folder)
    return StableDiffusionPipeline(
        vae=_vae(), text_encoder=_clip(tokenizer), tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=16),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            skip_prk_steps=True, steps_offset=1, **scheduler,
        ),
        safety_checker=safety_checker,
        feature_extractor=CLIPImageProcessor() if safety_checker is not None else None,
        requires_safety_checker=safety_checker is not None,
    )  # fmt: skip


def _sdxl(folder: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer = clip_tokenizer(folder)
    return StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=_clip(tokenizer), tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, projected=True), tokenizer_2=clip_tokenizer(folder),
        unet=_unet(
            cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16, transformer_layers_per_block=(1, 1),
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )  # fmt: skip


def _sd3(folder: Path) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    tokenizer = clip_tokenizer(folder)
    tokenizer_3, text_encoder_3 = _t5(32)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16,
            pooled_projection_dim=32, out_channels=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(16, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False,
                 use_post_quant_conv=False),
        text_encoder=_clip(tokenizer, projected=True), tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, projected=True), tokenizer_2=clip_tokenizer(folder),
        text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
    )  # fmt: skip


def _flux(folder: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer = clip_tokenizer(folder)
    tokenizer_2, text_encoder_2 = _t5()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False,
                 use_post_quant_conv=False),
        text_encoder=_clip(tokenizer), tokenizer=tokenizer,
        text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2,
    )  # fmt: skip
