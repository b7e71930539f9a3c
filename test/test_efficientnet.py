from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ros2_ood_seg.efficientnet import VARIANTS, efficientnet_lite_features, from_published
from ros2_ood_seg.mobilenet import SamePadConv2d

PUBLISHED_PARAMETERS = {"efficientnet_lite0": 4_652_008, "efficientnet_lite1": 5_416_680, "efficientnet_lite2": 6_092_072}
HEAD_CHANNELS, IMAGENET_CLASSES = 1280, 1000


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_those_of_the_published_network(name: str) -> None:
    features, _, channels = efficientnet_lite_features(name)
    head = channels[-1] * HEAD_CHANNELS + 2 * HEAD_CHANNELS + (HEAD_CHANNELS + 1) * IMAGENET_CLASSES
    assert sum(p.numel() for p in features.parameters()) + head == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_taps_end_the_strides(name: str) -> None:
    features, taps, channels = efficientnet_lite_features(name)
    x, shapes = torch.rand(1, 3, 64, 96), {}
    with torch.no_grad():
        for index, layer in enumerate(features.eval()):
            x = layer(x)
            shapes[index] = tuple(x.shape[1:])
    assert taps[-1] == len(features) - 1
    for tap, width, stride in zip(taps, channels, (4, 8, 16, 32), strict=True):
        assert shapes[tap] == (width, 64 // stride, 96 // stride)
        assert tap == taps[-1] or shapes[tap + 1][1] == 64 // stride // 2


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(32, 48), (14, 6)])
def test_strided_convolutions_pad_as_tensorflow_does(kernel: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    conv = SamePadConv2d(4, 4, kernel, 2, groups=4)
    x = torch.rand(2, 4, *size)
    pads: list[int] = []
    for side in reversed(size):
        # tf.nn: pad = max((ceil(in / stride) - 1) * stride + kernel - in, 0), the smaller half first.
        total = max((-(-side // 2) - 1) * 2 + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    expected = F.conv2d(F.pad(x, pads), conv.weight, conv.bias, stride=2, groups=4)
    assert torch.equal(conv(x), expected)


def test_published_names_fill_every_layer() -> None:
    features, _, _ = efficientnet_lite_features("efficientnet_lite0")
    state = {key: torch.rand_like(value) if value.is_floating_point() else value for key, value in features.state_dict().items()}
    published = {**_published_names(features, state), "_conv_head.weight": torch.zeros(1), "_fc.weight": torch.zeros(1)}
    renamed = from_published(published)
    assert renamed.keys() == state.keys()
    assert all(torch.equal(renamed[key], value) for key, value in state.items())


def _published_names(features: nn.Sequential, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers convolutions and norms in the order in which the published network runs them."""
    names: dict[str, str] = {"0.0": "_conv_stem", "0.1": "_bn0"}
    for index in range(1, len(features)):
        convs = [name for name, module in features[index].named_modules() if isinstance(module, nn.Conv2d)]
        norms = [name for name, module in features[index].named_modules() if isinstance(module, nn.BatchNorm2d)]
        for name, published in zip(convs, ("_expand_conv", "_depthwise_conv", "_project_conv")[3 - len(convs) :], strict=True):
            names[f"{index}.{name}"] = f"_blocks.{index - 1}.{published}"
        for name, published in zip(norms, ("_bn0", "_bn1", "_bn2")[3 - len(norms) :], strict=True):
            names[f"{index}.{name}"] = f"_blocks.{index - 1}.{published}"
    return {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in state.items()}
