"""The block of mobile networks, and MobileNetV2's features under torchvision's parameter names: importing torchvision costs 200 MB."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, blocks and stride of the first block: Table 2 of Sandler et al. 2018."""
_STEM = 32
_LAST = 1280
_EPS = {False: 1e-5, True: 1e-3}
"""Of the batch norms: torch's, and TensorFlow's."""


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to the input where the shapes agree.

    Args:
        inputs: Channels.
        outputs: Channels.
        stride: Of the depthwise convolution.
        expansion: Its channels, as a multiple of the inputs; 1 leaves the expanding convolution out.
        kernel: Side of the depthwise convolution, px.
        like_tensorflow: Padding and batch norm of networks that were trained in TensorFlow, see :func:`conv_norm_relu6`.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, kernel: int = 3, *, like_tensorflow: bool = False) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [] if expansion == 1 else [conv_norm_relu6(inputs, hidden, 1, like_tensorflow=like_tensorflow)]
        filtered = conv_norm_relu6(hidden, hidden, kernel, stride, groups=hidden, like_tensorflow=like_tensorflow)
        norm = nn.BatchNorm2d(outputs, eps=_EPS[like_tensorflow])
        self.conv = nn.Sequential(*expand, filtered, nn.Conv2d(hidden, outputs, 1, bias=False), norm)
        self.use_res_connect = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h/stride, w/stride)."""
        y = cast("Tensor", self.conv(x))
        return x + y if self.use_res_connect else y


def mobilenet_v2_features() -> nn.Sequential:
    """The 19 layers of torchvision's ``mobilenet_v2().features``, randomly initialised as there."""
    layers: list[nn.Module] = [conv_norm_relu6(3, _STEM, 3, 2)]
    inputs = _STEM
    for expansion, outputs, blocks, stride in _STAGES:
        for block in range(blocks):
            layers.append(InvertedResidual(inputs, outputs, stride if block == 0 else 1, expansion))
            inputs = outputs
    layers.append(conv_norm_relu6(inputs, _LAST, 1))
    return initialised(layers)


def initialised(layers: list[nn.Module]) -> nn.Sequential:
    """The layers one after the other, their convolutions filled at random as torchvision does."""
    features = nn.Sequential(*layers)
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return features


class SamePadConv2d(nn.Conv2d):
    """A convolution of stride 2 that pads even inputs as TensorFlow's "SAME" does: the odd pixel goes below and to the right."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) with even h and w to (B, C', h/2, w/2)."""
        before = (self.kernel_size[0] - 2) // 2
        after = self.kernel_size[0] - 2 - before
        return super().forward(F.pad(x, (before, after, before, after)))


def conv_norm_relu6(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, like_tensorflow: bool = False
) -> nn.Sequential:
    """Convolution, batch norm and ReLU6.

    Args:
        inputs: Channels.
        outputs: Channels.
        kernel: Side, px, odd.
        stride: 1 or 2.
        groups: Of the convolution.
        like_tensorflow: Padding "SAME" (:class:`SamePadConv2d`) and an epsilon of 1e-3 instead of torch's.
    """
    conv: nn.Conv2d
    if like_tensorflow and stride == 2:
        conv = SamePadConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    else:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=_EPS[like_tensorflow]), nn.ReLU6(inplace=True))
