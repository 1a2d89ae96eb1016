"""Vision transformers at another image size than their checkpoint's.

Most have a learnt position embedding for each patch, and refuse images of other sizes unless the
positions are interpolated (Dosovitskiy et al. 2021, section 3.2). DINOv2 does this itself.
"""

from __future__ import annotations

import copy
import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine.core.errors import one_line
from engine.core.paths import expanded

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Size = tuple[int, int]


def interpolate_positions(network: Module) -> None:
    """Let a network interpolate its positions at each pass, if transformers supports it."""
    if "interpolate_pos_encoding" in inspect.signature(network.forward).parameters:
        network.register_forward_pre_hook(
            lambda _, inputs, named: (inputs, {**named, "interpolate_pos_encoding": True}),
            with_kwargs=True,
        )


def with_image_size(model: Any, size: Size) -> Any:
    """The model for images of `size` (height, width), with positions interpolated once, so that the
    saved model needs no special treatment. Returns the model itself if its positions fit any size.
    Raises `ValueError`, in one line, if the model does not support the size."""
    import torch

    try:
        resized = _resized(model, size)
        with torch.no_grad():
            resized.eval()(torch.zeros(1, 3, *size, dtype=resized.dtype, device=resized.device))
    except (ValueError, RuntimeError) as error:
        raise ValueError(one_line(error)) from None
    return resized


def _resized(model: Any, size: Size) -> Any:
    fixed = {name: module for name, module in model.named_modules() if _is_fixed(module, size)}
    if not fixed:
        return model
    weights = model.state_dict()
    for name, module in fixed.items():
        weights[f"{name}.position_embeddings"] = _interpolated(module, size)
    config = copy.deepcopy(model.config)
    config.image_size = size[0] if size[0] == size[1] else list(size)
    resized = type(model)(config).to(dtype=model.dtype)
    resized.load_state_dict(weights)
    return resized


def _is_fixed(module: Any, size: Size) -> bool:
    from torch.nn import Parameter

    side = getattr(module, "image_size", None)
    own = (side, side) if isinstance(side, int) else tuple(side or ())
    return (
        isinstance(getattr(module, "position_embeddings", None), Parameter)
        and hasattr(module, "interpolate_pos_encoding")
        and hasattr(module, "patch_embeddings")
        and len(own) == 2
        and own != size
    )


def _interpolated(module: Any, size: Size) -> Tensor:
    import torch

    table, patches = module.position_embeddings, module.patch_embeddings
    height, width = (side // patch for side, patch in zip(size, patches.patch_size, strict=True))
    if not height * width:
        raise ValueError(f"its patches have {patches.patch_size[0]} x {patches.patch_size[1]} px")
    # The positions of the class token and other extra tokens come before those of patches.
    count = table.shape[1] - patches.num_patches + height * width
    with torch.no_grad():
        positions: Tensor = module.interpolate_pos_encoding(
            table.new_empty(1, count, table.shape[2]), *size
        )
    return positions


@lru_cache(maxsize=64)
def refusal(model: str, revision: str | None, size: Size) -> str:
    """The reason why a checkpoint on this machine does not support images of `size` (height,
    width), found without its weights; empty if it does, or if this cannot be determined."""
    import torch
    from transformers import AutoConfig, AutoModelForImageClassification

    with torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(
                expanded(model),
                revision=revision,
                trust_remote_code=False,
                local_files_only=True,
            )
            model_type: Any = AutoModelForImageClassification
            empty = model_type.from_config(config)
            own = getattr(config, "vision_config", config).image_size
            # A model that fails at its own size needs real tensors.
            with_image_size(empty, (own, own) if isinstance(own, int) else tuple(own))
        except Exception:  # loading it will report the problem
            return ""
        try:
            with_image_size(empty, size)
        except ValueError as error:
            return str(error)
    return ""
