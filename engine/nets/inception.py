"""Inception v3 (Szegedy et al. 2015) as the Fréchet distance uses it (Heusel et al. 2017).

The network of TensorFlow's 2015 checkpoint, with the names of pytorch-fid's weights. It differs
from other Inceptions: averages exclude the padding, the last block takes a maximum instead of an
average, and images are resized as in TensorFlow 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.core.errors import brief

WIDTH = 2048
_SIDE = 299
Size = int | tuple[int, int]


class BasicConv2d(nn.Module):
    """Convolution, normalisation, ReLU. padded: padding keeps the side, if the stride is 1."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Size, stride: int = 1, *, padded: bool = True
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(images)), inplace=True)


# A convolution of a block: name, outputs, kernel, and stride if not 1. Paths are sequences of them.
Conv = tuple[str, int, Size] | tuple[str, int, Size, int]


class Mixed(nn.Module):
    """Parallel paths, whose maps are joined. forks: by the number of a path, convolutions that each
    read its end. pool: what the last path does first."""

    def __init__(
        self, inputs: int, paths: Sequence[Sequence[Conv]], pool: str,
        forks: dict[int, Sequence[Conv]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.paths = [[conv[0] for conv in path] for path in paths]
        self.forks = {number: [conv[0] for conv in fork] for number, fork in (forks or {}).items()}
        self.pool = pool
        for number, path in enumerate(paths):
            width = inputs
            for conv in path:
                self._add(width, conv)
                width = conv[1]
            for conv in (forks or {}).get(number, ()):
                self._add(width, conv)

    def _add(self, inputs: int, conv: Conv) -> None:
        name, outputs, kernel, stride = conv if len(conv) == 4 else (*conv, 1)
        self.add_module(name, BasicConv2d(inputs, outputs, kernel, stride))

    def forward(self, images: Tensor) -> Tensor:
        joined = []
        for number, path in enumerate(self.paths):
            maps = self._pooled(images) if number == len(self.paths) - 1 else images
            for name in path:
                maps = self.get_submodule(name)(maps)
            fork = self.forks.get(number)
            joined += [self.get_submodule(name)(maps) for name in fork] if fork else [maps]
        return torch.cat(joined, 1)

    def _pooled(self, images: Tensor) -> Tensor:
        if self.pool == "average":
            return functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
        if self.pool == "maximum":
            return functional.max_pool2d(images, 3, 1, 1)
        return functional.max_pool2d(images, 3, 2)


def _block_a(inputs: int, pooled: int) -> Mixed:
    return Mixed(
        inputs,
        [
            [("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
            [("branch_pool", pooled, 1)],
        ],
        "average",
    )


def _block_c(inner: int) -> Mixed:
    return Mixed(
        768,
        [
            [("branch1x1", 192, 1)],
            [
                ("branch7x7_1", inner, 1), ("branch7x7_2", inner, (1, 7)),
                ("branch7x7_3", 192, (7, 1)),
            ],
            [
                ("branch7x7dbl_1", inner, 1), ("branch7x7dbl_2", inner, (7, 1)),
                ("branch7x7dbl_3", inner, (1, 7)), ("branch7x7dbl_4", inner, (7, 1)),
                ("branch7x7dbl_5", 192, (1, 7)),
            ],
            [("branch_pool", 192, 1)],
        ],
        "average",
    )  # fmt: skip


def _block_e(inputs: int, pool: str) -> Mixed:
    return Mixed(
        inputs,
        [
            [("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1)],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)],
            [("branch_pool", 192, 1)],
        ],
        pool,
        forks={
            1: [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))],
            2: [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
        },
    )


class Inception(nn.Module):
    """Images (n, 3, height, width), values from 0 to 255, to features (n, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, padded=False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = Mixed(
            288,
            [
                [("branch3x3", 384, 3, 2)],
                [
                    ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3),
                    ("branch3x3dbl_3", 96, 3, 2),
                ],
                [],
            ],
            "halved",
        )  # fmt: skip
        self.Mixed_6b = _block_c(128)
        self.Mixed_6c = _block_c(160)
        self.Mixed_6d = _block_c(160)
        self.Mixed_6e = _block_c(192)
        self.Mixed_7a = Mixed(
            768,
            [
                [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
                [
                    ("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)),
                    ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2),
                ],
                [],
            ],
            "halved",
        )  # fmt: skip
        self.Mixed_7b = _block_e(1280, "average")
        self.Mixed_7c = _block_e(2048, "maximum")

    def forward(self, images: Tensor) -> Tensor:
        maps = (resized(images, _SIDE) - 128) / 128
        for name, block in self.named_children():
            maps = block(maps)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                maps = functional.max_pool2d(maps, 3, 2)
        return maps.mean((2, 3))


def resized(images: Tensor, side: int) -> Tensor:
    """Images (n, channels, height, width) resized to a square as in TensorFlow 1: bilinear between
    the two nearest pixels with aligned top left corners, without antialiasing."""
    for axis in (2, 3):
        length = images.shape[axis]
        place = torch.arange(side, device=images.device, dtype=torch.float32) * (length / side)
        first = place.floor().long()
        second = (first + 1).clamp(max=length - 1)
        shape = [1, 1, 1, 1]
        shape[axis] = side
        share = (place - first).view(shape).to(images.dtype)
        low, high = images.index_select(axis, first), images.index_select(axis, second)
        images = low + (high - low) * share
    return images


def load_inception(weights: dict[str, Any]) -> Inception:
    """The network with these weights, without its classification layer. Raises `ValueError` for
    weights of another network."""
    classes = weights.get("fc.bias")
    if classes is not None and len(classes) != 1008:
        raise ValueError(
            f"holds an Inception of {len(classes)} classes; the Fréchet distance is defined by the"
            " one of 1,008 classes"
        )
    network = Inception()
    try:
        network.load_state_dict(
            {name: value for name, value in weights.items() if not name.startswith("fc.")}
        )
    except RuntimeError as error:
        raise ValueError(f"holds another network: {brief(error, 160)}") from None
    return network
