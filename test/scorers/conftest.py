"""Slim random networks in the layouts of the published checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ros2_ood_seg.runtime import Runtime


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(torch.device("cpu"))


@pytest.fixture
def image() -> Tensor:
    return torch.randint(0, 256, (48, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def randomised():
    """Gives a network random batch norms too, so that every entry of its state dict matters."""

    def run(network: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.uniform_(-0.3, 0.3, generator=generator)
                module.running_mean.uniform_(-0.2, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
        return network.eval()

    return run
