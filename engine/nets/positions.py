"""Vision transformers of transformers at another image size than their checkpoint's.

Most have a learnt position for each patch, and refuse images of other sizes unless the positions
are interpolated (Dosovitskiy et al. 2021, section 3.2). DINOv2 does so by itself.
"""

from __future__ import annotations

import copy
import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine.core.errors import one_line

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Size = tuple[int, int]


def interpolate_positions(network: Module) -> None:
    """Let a network interpolate its positions at each pass, where transformers has that for it."""
    if "interpolate_pos_encoding" in inspect.signature(network.forward).parameters:
        network.register_forward_pre_hook(
            lambda _, given, named: (given, {**named, "interpolate_pos_encoding": True}),
            with_kwargs=True,
        )


def with_image_size(model: Any, size: Size) -> Any:
    """The model for images of `size` (height, width): positions interpolated once, so that those of
    this size are trained and saved, and whoever opens the folder needs to know of nothing. The
    model itself where it has no positions of one size alone. Raises `ValueError`, in a line, where
    it takes no images of this size."""
    import torch

    try:
        made = _resized(model, size)
        with torch.no_grad():
            made.eval()(torch.zeros(1, 3, *size, dtype=made.dtype, device=made.device))
    except (ValueError, RuntimeError) as error:
        raise ValueError(one_line(error)) from None
    return made


def _resized(model: Any, size: Size) -> Any:
    fixed = {name: module for name, module in model.named_modules() if _is_fixed(module, size)}
    if not fixed:
        return model
    weights = model.state_dict()
    for name, module in fixed.items():
        weights[f"{name}.position_embeddings"] = _interpolated(module, size)
    config = copy.deepcopy(model.config)
    config.image_size = size[0] if size[0] == size[1] else list(size)
    made = type(model)(config).to(dtype=model.dtype)
    made.load_state_dict(weights)
    return made


def _is_fixed(module: Any, size: Size) -> bool:
    from torch.nn import Parameter

    held = getattr(module, "image_size", None)
    own = (held, held) if isinstance(held, int) else tuple(held or ())
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
    # Before those of patches stand those of the class token and its like.
    count = table.shape[1] - patches.num_patches + height * width
    with torch.no_grad():
        found: Tensor = module.interpolate_pos_encoding(
            table.new_empty(1, count, table.shape[2]), *size
        )
    return found


@lru_cache(maxsize=64)
def refusal(model: str, revision: str | None, size: Size) -> str:
    """Why a checkpoint that lies on this machine takes no images of `size` (height, width), told
    without a look at its weights; empty where it does, or where that cannot be told."""
    import torch
    from transformers import AutoConfig, AutoModelForImageClassification

    with torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(
                model, revision=revision, trust_remote_code=False, local_files_only=True
            )
            made = AutoModelForImageClassification.from_config(config)
            own = getattr(config, "vision_config", config).image_size
            # What fails at its own size fails for want of real tensors.
            with_image_size(made, (own, own) if isinstance(own, int) else tuple(own))
        except Exception:  # loading it will say what is wrong
            return ""
        try:
            with_image_size(made, size)
        except ValueError as error:
            return str(error)
    return ""
