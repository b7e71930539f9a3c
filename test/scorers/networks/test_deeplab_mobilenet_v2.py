from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.ops import FrozenBatchNorm2d

from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.scorers.deeplab import like
from ros2_ood_seg.scorers.networks.deeplab_mobilenet_v2 import DeepLabMobileNetV2
from ros2_ood_seg.weights.families import recognise
from ros2_ood_seg.weights.store import WeightFile


def imagenet() -> nn.Sequential:
    """Features of torchvision with norms that are not the identity."""
    torch.manual_seed(0)
    features = mobilenet_v2(weights=None).features.eval()
    for module in features.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return features


@pytest.mark.parametrize("prefix", ["", "features."])
def test_starts_from_the_features_of_torchvision(prefix: str) -> None:
    features = imagenet()
    network = DeepLabMobileNetV2(7)
    network.load_imagenet_features(WeightFile(Path("w"), {prefix + key: value for key, value in features.state_dict().items()}, {}))
    image = 255 * torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        fine, deep = network.trunk(image)
        torch.testing.assert_close(fine, features[:4](image / 127.5 - 1))
        # Without the last stride, every other pixel of the stage behind it saw the same as torchvision's, up to the spread taps.
        torch.testing.assert_close(network.features[:15](image)[..., ::2, ::2], features[:15](image))
    assert fine.shape == (1, 24, 16, 24)
    assert deep.shape == (1, 320, 4, 6)


def test_refuses_other_features() -> None:
    with pytest.raises(WeightsError, match="torchvision mobilenet_v2 features"):
        DeepLabMobileNetV2(7).load_imagenet_features(WeightFile(Path("w"), {"0.0.weight": torch.zeros(3)}, {}))


@pytest.mark.parametrize(
    ("parts", "family"),
    [
        ({}, "deeplab_mobilenet_v2"),
        ({"residual": True, "projection": True}, "rpl"),
        ({"residual": True}, "rpl"),
        ({"ood_head": True}, "dense_hybrid"),
    ],
)
def test_state_dict_tells_network_and_family(parts: dict[str, bool], family: str) -> None:
    network = DeepLabMobileNetV2(5, **parts)
    state = network.state_dict()
    assert recognise(WeightFile(Path("w"), state, {})).name == family
    found = like(state)
    assert isinstance(found, DeepLabMobileNetV2)
    assert {key: value.shape for key, value in found.state_dict().items()} == {key: value.shape for key, value in state.items()}
    output = network(torch.rand(2, 3, 32, 48))
    assert output.logits.shape == (2, 5, 8, 12)
    assert (output.residual_logits is not None) == ("residual" in parts)
    assert (output.projection is not None) == ("projection" in parts)
    assert (output.ood_logits is not None) == ("ood_head" in parts)


def test_norms_of_the_trunk_are_frozen() -> None:
    network = DeepLabMobileNetV2(5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.features.modules())
    assert sum(isinstance(module, FrozenBatchNorm2d) for module in network.features.modules()) == 51
    assert sum(parameter.numel() for parameter in network.parameters()) < 3_000_000
