"""What a checkpoint's authors do to an image before their network sees it, in two halves: its
geometry by transformers' own image processor, image by image on CPU threads, and its values on the
device, where they cost a quarter of the traffic as bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.core.errors import StudyError

if TYPE_CHECKING:
    from torch import Tensor


class ModelInput:
    """Of one checkpoint, or with settings of its own.

    processor: one of transformers' image processors that compute with Pillow. input_size: the side
    that images are brought to, uncropped, in place of the checkpoint's own geometry.
    """

    def __init__(self, processor: Any, input_size: int | None = None) -> None:
        self.processor = processor
        self.options: dict[str, Any] = {
            "do_rescale": False, "do_normalize": False, "return_tensors": "np",
            "input_data_format": "channels_last",
        }  # fmt: skip
        self.twice = bool(getattr(processor, "include_top", False))
        if self.twice:
            self.options["include_top"] = False
        if input_size:
            size = {"height": input_size, "width": input_size}
            if getattr(processor, "crop_pct", None):  # ConvNeXt's, which names the shorter edge
                size, self.options["crop_pct"] = {"shortest_edge": input_size}, 1.0
            self.options |= {"do_resize": True, "size": size, "do_center_crop": False}
        self._keeps: dict[tuple[int, ...], bool] = {}

    @classmethod
    def of(
        cls, section: str, model: str, revision: str | None, input_size: int | None
    ) -> ModelInput:
        """As the checkpoint's preprocessor file says. `section` of the study names the checkpoint
        in an error. Raises `StudyError`."""
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(
                model, revision=revision, backend="pil", trust_remote_code=False
            )
        except (ImportError, ValueError):
            # No class for Pillow, or none that its file names: size, mean and deviation suffice.
            processor = _plain(section, model, revision)
        except OSError as error:
            text = " ".join(str(error).split())[:200]
            raise StudyError(f"{section}.model: {model}: {text}") from None
        return cls(processor, input_size)

    def fitted(self, image: np.ndarray) -> np.ndarray:
        """uint8 (height, width, 1 or 3) of any size to uint8 (3, height, width) of the
        network's."""
        if image.shape[-1] == 1:
            image = np.repeat(image, 3, axis=-1)
        if image.shape not in self._keeps:
            noise = np.random.default_rng(0).integers(0, 256, image.shape, np.uint8)
            # Nothing but a geometry that changes no image leaves noise as it was.
            self._keeps[image.shape] = np.array_equal(
                self._processed(noise), _channels_first(noise)
            )
        return _channels_first(image) if self._keeps[image.shape] else self._processed(image)

    def _processed(self, image: np.ndarray) -> np.ndarray:
        made: np.ndarray = self.processor(image, **self.options)["pixel_values"][0]
        return made

    def values(self, images: np.ndarray, device: str) -> Tensor:
        """Fitted images uint8 (n, 3, height, width) to float32, rescaled and normalised."""
        import torch

        held = self.processor
        found = torch.from_numpy(np.ascontiguousarray(images)).to(device, non_blocking=True).float()
        if held.do_rescale:
            found = found * held.rescale_factor - float(getattr(held, "rescale_offset", False))
        mean, std = (
            torch.tensor(list(value), device=device).view(1, -1, 1, 1)
            for value in (held.image_mean or [0.0] * 3, held.image_std or [1.0] * 3)
        )
        if held.do_normalize:
            found = (found - mean) / std
        if self.twice:
            found = found / std
        return found.to(memory_format=torch.channels_last)


def _channels_first(image: np.ndarray) -> np.ndarray:
    return image.transpose(2, 0, 1)


def _plain(section: str, model: str, revision: str | None) -> Any:
    from transformers import CLIPImageProcessorPil
    from transformers.utils import cached_file

    try:
        values = json.loads(
            Path(str(cached_file(model, "preprocessor_config.json", revision=revision))).read_text()
        )
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise StudyError(f"{section}.model: {model}: {text}") from None
    known = ("size", "resample", "crop_size", "rescale_factor", "image_mean", "image_std")
    crops = bool(values.get("do_center_crop", "crop_size" in values))
    given = {name: values[name] for name in known if values.get(name) is not None}
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    return CLIPImageProcessorPil(**{**imagenet, **given}, do_center_crop=crops)
