"""A checkpoint's own preprocessing of images, in two parts: the geometry by transformers' image
processor, image by image on CPU threads, and the values on the device, which saves three quarters
of the transfer because images travel as bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from engine.core.errors import StudyError, brief
from engine.core.paths import expanded
from engine.nets.images import IMAGENET_MEAN, IMAGENET_STD
from engine.nets.pretrained import preprocessor_config

if TYPE_CHECKING:
    from torch import Tensor


class ModelInput:
    """The preprocessing of one checkpoint.

    processor: an image processor of transformers that computes with Pillow. input_size: resize
    images to this side, uncropped, instead of the checkpoint's own geometry.
    """

    def __init__(self, processor: Any, input_size: int | None = None) -> None:
        self.processor = processor
        self.options: dict[str, Any] = {
            "do_rescale": False, "do_normalize": False, "return_tensors": "np",
            "input_data_format": "channels_last",
        }  # fmt: skip
        # EfficientNet's classifiers divide by the deviation twice.
        self.divides_twice = bool(getattr(processor, "include_top", False))
        if self.divides_twice:
            self.options["include_top"] = False
        if input_size:
            size = {"height": input_size, "width": input_size}
            if getattr(processor, "crop_pct", None):  # ConvNeXt's names the shorter edge
                size, self.options["crop_pct"] = {"shortest_edge": input_size}, 1.0
            self.options |= {"do_resize": True, "size": size, "do_center_crop": False}
        # By shape, whether the geometry leaves images unchanged.
        self._unchanged: dict[tuple[int, ...], bool] = {}

    @classmethod
    def of(
        cls, section: str, model: str, revision: str | None, input_size: int | None
    ) -> ModelInput:
        """The preprocessing that the checkpoint's preprocessor file describes. Errors name
        `section` of the study. Raises `StudyError`."""
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(
                expanded(model), revision=revision, backend="pil", trust_remote_code=False
            )
        except (ImportError, ValueError):
            # No processor class for Pillow, or an unknown one: size, mean and deviation suffice.
            processor = _plain_processor(section, model, revision)
        except OSError as error:
            raise StudyError(f"{section}.model: {model}: {brief(error)}") from None
        return cls(processor, input_size)

    def fitted(self, image: np.ndarray) -> np.ndarray:
        """uint8 (height, width, 1 or 3) of any size to uint8 (3, height, width) of the network's
        size."""
        if image.shape[-1] == 1:
            image = np.repeat(image, 3, axis=-1)
        if image.shape not in self._unchanged:
            noise = np.random.default_rng(0).integers(0, 256, image.shape, np.uint8)
            # Only a geometry that changes no image leaves noise unchanged.
            self._unchanged[image.shape] = np.array_equal(
                self._processed(noise), _channels_first(noise)
            )
        return _channels_first(image) if self._unchanged[image.shape] else self._processed(image)

    def _processed(self, image: np.ndarray) -> np.ndarray:
        pixels: np.ndarray = self.processor(image, **self.options)["pixel_values"][0]
        return pixels

    def values(self, images: np.ndarray, device: str) -> Tensor:
        """Fitted images uint8 (n, 3, height, width) to float32, rescaled and normalised."""
        import torch

        processor = self.processor
        values = torch.from_numpy(np.ascontiguousarray(images)).to(device, non_blocking=True)
        values = values.float()
        if processor.do_rescale:
            offset = float(getattr(processor, "rescale_offset", False))
            values = values * processor.rescale_factor - offset
        mean, std = (
            torch.tensor(list(channels), device=device).view(1, -1, 1, 1)
            for channels in (processor.image_mean or [0.0] * 3, processor.image_std or [1.0] * 3)
        )
        if processor.do_normalize:
            values = (values - mean) / std
        if self.divides_twice:
            values = values / std
        return values.to(memory_format=torch.channels_last)


def _channels_first(image: np.ndarray) -> np.ndarray:
    return image.transpose(2, 0, 1)


def _plain_processor(section: str, model: str, revision: str | None) -> Any:
    from transformers import CLIPImageProcessorPil

    values = preprocessor_config(section, model, revision)
    known = ("size", "resample", "crop_size", "rescale_factor", "image_mean", "image_std")
    crops = bool(values.get("do_center_crop", "crop_size" in values))
    settings = {name: values[name] for name in known if values.get(name) is not None}
    imagenet = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
    return CLIPImageProcessorPil(**{**imagenet, **settings}, do_center_crop=crops)
