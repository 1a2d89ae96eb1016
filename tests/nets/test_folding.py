from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.nets.folding import fold_batch_norms


def seeded(network: nn.Module) -> nn.Module:
    """With statistics and weights of normalisations that change what passes."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.weight, module.bias):
                assert values is not None
                nn.init.normal_(values)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval().requires_grad_(False)


def runner(network: nn.Module) -> Callable[[], Tensor]:
    images = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    return lambda: network(images)


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


class Branch(nn.Module):
    """A convolution that its normalisation and a shortcut read."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.convolution(images)
        return self.norm(made) + made


class Norm(nn.BatchNorm2d):
    """One that does something else too, as timm's do."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps).relu()


def test_normalisations_go_and_the_output_stays() -> None:
    network = seeded(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)),
        )
    )  # fmt: skip
    run = runner(network)
    before = run()
    assert fold_batch_norms(network, run) == 2
    assert norms(network) == 0
    assert torch.allclose(run(), before, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_folded_stays_as_it_was() -> None:
    convolution = nn.Conv2d(3, 3, 1)
    kept = [
        Branch(),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), Norm(4)),
        nn.Sequential(convolution, nn.BatchNorm2d(3), convolution),
    ]
    for network in map(seeded, kept):
        run = runner(network)
        before = run()
        assert fold_batch_norms(network, run) == 0
        assert norms(network) == 1
        assert torch.equal(run(), before)
