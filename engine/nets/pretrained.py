"""Checkpoints of transformers: weights, preprocessing, and the header of weight files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core.errors import StudyError, brief
from engine.core.paths import expanded
from engine.nets.images import IMAGENET_MEAN, IMAGENET_STD


def dtype_of(precision: str) -> Any:
    """The torch dtype of `fp32`, `bf16` or `fp16`."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def load_model(
    section: str, kind: Any, model: str, revision: str | None,
    fresh: Callable[[Any, str], bool] = lambda model, name: False, **options: Any,
) -> tuple[Any, list[str]]:  # fmt: skip
    """A model of transformers, read only from safetensors, and the names of the weights that the
    checkpoint lacks.

    fresh: (model, name) -> whether a missing weight may be drawn at random. Errors name `section`
    of the study. Raises `StudyError` if the checkpoint cannot be read, or if other weights are
    missing, which transformers would draw at random with only a warning.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded, info = kind.from_pretrained(
            expanded(model), revision=revision, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, **options,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise StudyError(f"{section}.model: {model}: {brief(error)}") from None
    missing = sorted(info["missing_keys"])
    if required := [name for name in missing if not fresh(loaded, name)]:
        raise StudyError(
            f"{section}.model: {model} lacks weights of its config.json ({len(required)}, such as"
            f" {required[0]}); name a complete checkpoint"
        )
    return loaded, missing


def order_header(path: Path) -> None:
    """Sort the header of a safetensors file. Its metadata are written in random order, which would
    give equal weights unequal files."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors after it aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def preprocessor_config(section: str, model: str, revision: str | None) -> dict[str, Any]:
    """A checkpoint's preprocessor_config.json. Errors name `section` of the study. Raises
    `StudyError` if it cannot be read."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(expanded(model), "preprocessor_config.json", revision=revision)
        values = json.loads(Path(str(path)).read_text())
    except (OSError, ValueError) as error:
        raise StudyError(f"{section}.model: {model}: {brief(error)}") from None
    return dict(values)


def image_processor_settings(section: str, model: str, revision: str | None) -> dict[str, Any]:
    """Input size (height, width), mean and std of a checkpoint's preprocessing. Raises
    `StudyError` as `preprocessor_config`.

    Read as plain JSON: some of transformers' own image processors need torchvision.
    """
    values = preprocessor_config(section, model, revision)
    size = (
        values.get("crop_size")
        if values.get("do_center_crop", "crop_size" in values)
        else values.get("size")
    )
    size = size or values.get("size") or 224
    if isinstance(size, dict):
        edge = size.get("shortest_edge", 224)
        size = (size.get("height", edge), size.get("width", edge))
    else:
        size = (size, size) if isinstance(size, int) else tuple(size)
    return {
        "size": tuple(int(side) for side in size),
        "mean": values.get("image_mean") or IMAGENET_MEAN,
        "std": values.get("image_std") or IMAGENET_STD,
    }
