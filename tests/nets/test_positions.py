from __future__ import annotations

import pytest
from transformers import PvtConfig, PvtForImageClassification, ViTConfig, ViTForImageClassification

from engine.nets.positions import with_image_size


def test_vit_positions_match_the_new_size() -> None:
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=16, image_size=32, patch_size=8)  # fmt: skip
    found = with_image_size(ViTForImageClassification(config), (16, 16))
    assert found.vit.embeddings.position_embeddings.shape == (1, 1 + 4, 16)
    assert found.config.image_size == 16


def test_network_with_positions_in_each_stage_keeps_its_size() -> None:
    """PVT: the positions of its later stages do not have the image's size."""
    config = PvtConfig(image_size=64, hidden_sizes=[8] * 4, depths=[1] * 4,
                       num_attention_heads=[1] * 4)  # fmt: skip
    model = PvtForImageClassification(config)
    assert with_image_size(model, (64, 64)) is model
    with pytest.raises(ValueError, match="invalid for input"):
        with_image_size(model, (96, 96))
