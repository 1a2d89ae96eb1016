"""VGG (Simonyan and Zisserman 2015), with torchvision's names of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

# Convolutions of each of the five blocks, and their channels.
_CONVOLUTIONS: Mapping[int, tuple[int, ...]] = {
    11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4),
}  # fmt: skip
_WIDTHS = (64, 128, 256, 512, 512)
# timm's names of the linear layers, which are convolutions there.
_TIMM = {
    "pre_logits.fc1.": "classifier.0.", "pre_logits.fc2.": "classifier.3.",
    "head.fc.": "classifier.6.",
}  # fmt: skip


class VGG(nn.Module):
    """Images float (n, 3, height, width) of 32 px or more to logits (n, classes).

    hidden: width of the two hidden linear layers, 4096 as published. `initialise` draws weights.
    """

    def __init__(
        self, depth: int, classes: int, batch_norm: bool = False, hidden: int = 4096,
        dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.frozen: list[nn.Module] = []
        layers: list[nn.Module] = []
        self.starts, inputs = [], 3
        for width, count in zip(_WIDTHS, _CONVOLUTIONS[depth], strict=True):
            self.starts.append(len(layers))
            for _ in range(count):
                layers.append(nn.Conv2d(inputs, width, 3, padding=1))
                layers += [nn.BatchNorm2d(width)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(inputs * 49, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )  # fmt: skip

    def blocks(self) -> list[nn.Module]:
        """The first layers of the five blocks of convolutions, and the two hidden linear layers."""
        return [
            *(self.features[start] for start in self.starts), self.classifier[0],
            self.classifier[3],
        ]  # fmt: skip

    def keep_frozen(self, modules: Iterable[nn.Module]) -> None:
        """Keep these modules in evaluation mode during training."""
        self.frozen = list(modules)

    def train(self, mode: bool = True) -> VGG:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.avgpool(self.features(images)).flatten(1))
        return logits


def initialise(network: VGG) -> VGG:
    """Random weights as torchvision draws them, in place."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return network


def adopt(network: VGG, tensors: Mapping[str, Tensor]) -> None:
    """Load weights of the original under torchvision's or timm's names. The last layer keeps its
    own weights where the number of classes differs, or the weights have none.

    Raises `ValueError` that names the first tensor that is missing, unknown or of another shape.
    """
    own = network.state_dict()
    # Counts of batches may be missing, because nothing depends on them.
    state = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    for name, value in tensors.items():
        prefix = next((prefix for prefix in _TIMM if name.startswith(prefix)), "")
        renamed = _TIMM.get(prefix, "") + name.removeprefix(prefix)
        state[renamed] = value.flatten(1) if prefix and value.ndim == 4 else value
    for name in ("classifier.6.weight", "classifier.6.bias"):
        if name not in state or state[name].shape != own[name].shape:
            state[name] = own[name]
    for name, value in own.items():
        if name not in state:
            raise ValueError(f"{name} is missing")
        if state[name].shape != value.shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}"
            )
    if unknown := sorted(set(state) - set(own)):
        raise ValueError(f"{unknown[0]} is unknown")
    network.load_state_dict(state)
