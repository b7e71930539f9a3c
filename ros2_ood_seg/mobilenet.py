"""MobileNetV2's features under torchvision's parameter names; importing torchvision for them costs 200 MB of memory."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, blocks and stride of the first block: Table 2 of Sandler et al. 2018."""
_STEM = 32
_LAST = 1280


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to the input where the shapes agree.

    Args:
        inputs: Channels.
        outputs: Channels.
        stride: Of the depthwise convolution.
        expansion: Its channels, as a multiple of the inputs; 1 leaves the expanding convolution out.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [] if expansion == 1 else [_conv_norm_relu6(inputs, hidden, 1)]
        filtered = _conv_norm_relu6(hidden, hidden, 3, stride, groups=hidden)
        self.conv = nn.Sequential(*expand, filtered, nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.use_res_connect = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h/stride, w/stride)."""
        y = cast("Tensor", self.conv(x))
        return x + y if self.use_res_connect else y


def mobilenet_v2_features() -> nn.Sequential:
    """The 19 layers of torchvision's ``mobilenet_v2().features``, randomly initialised as there."""
    layers: list[nn.Module] = [_conv_norm_relu6(3, _STEM, 3, 2)]
    inputs = _STEM
    for expansion, outputs, blocks, stride in _STAGES:
        for block in range(blocks):
            layers.append(InvertedResidual(inputs, outputs, stride if block == 0 else 1, expansion))
            inputs = outputs
    layers.append(_conv_norm_relu6(inputs, _LAST, 1))
    features = nn.Sequential(*layers)
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return features


def _conv_norm_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))
