"""What lies beside the weights of other people's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core.errors import StudyError
from engine.nets.images import IMAGENET_MEAN, IMAGENET_STD


def dtype_of(precision: str) -> Any:
    """torch's name for `fp32`, `bf16` or `fp16`."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def load_model(
    section: str, kind: Any, model: str, revision: str | None,
    fresh: Callable[[Any, str], bool] = lambda made, name: False, **options: Any,
) -> tuple[Any, list[str]]:  # fmt: skip
    """A model of transformers, from safetensors alone, and the names of its weights that the
    checkpoint lacks.

    fresh: (model, name) -> whether a weight may be drawn at random in that case. `section` of the
    study names the checkpoint in an error. Raises `StudyError` where it cannot be read, and where
    other weights are lacking: transformers would draw them too, and say so among much else.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        made, found = kind.from_pretrained(
            model, revision=revision, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, **options,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise StudyError(
            f"{section}.model: {model}: {' '.join(str(error).split())[:200]}"
        ) from None
    missing = sorted(found["missing_keys"])
    if lacking := [name for name in missing if not fresh(made, name)]:
        raise StudyError(
            f"{section}.model: {model}: lacks {len(lacking)} of the weights that its config.json"
            f" asks for, such as {lacking[0]}; name a complete checkpoint"
        )
    return made, missing


def order_header(path: Path) -> None:
    """Bring the header of a safetensors file into one order: as it is written, its metadata have a
    new one each time, and equal weights have unequal files."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors behind it stay aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def image_processor_settings(section: str, model: str, revision: str | None) -> dict[str, Any]:
    """Input size (height, width), mean and std from a checkpoint's preprocessor_config.json.

    Read as plain JSON: transformers' own image processors need torchvision for some architectures.
    `section` of the study names the checkpoint in an error. Raises `StudyError`.
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(model, "preprocessor_config.json", revision=revision)
        values = json.loads(Path(str(path)).read_text())
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise StudyError(f"{section}.model: {model}: {text}") from None
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
