"""What the DeepLabV3+ networks share: the atrous spatial pyramid and the aligned upsampling of NVIDIA's code.

Reference: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018. The module
names are those of the published checkpoints, so that a state dict loads without renaming.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of RGB in [0, 1] that all DeepLabV3+ checkpoints were trained with."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of RGB in [0, 1] that all DeepLabV3+ checkpoints were trained with."""


def normalise_imagenet(image: Tensor) -> Tensor:
    """(B, 3, h, w) float RGB in [0, 255] to zero mean and unit variance over ImageNet."""
    mean = image.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = image.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return (image / 255.0 - mean) / std


def upsample_aligned(x: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Bilinear resize of (B, C, h, w) whose corner pixels stay corner pixels, as in all networks derived from NVIDIA's code."""
    return F.interpolate(x, size=tuple(size_hw), mode="bilinear", align_corners=True)


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution without bias that keeps the size, batch norm, ReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def norm_relu_conv(in_channels: int, out_channels: int, kernel: int = 1, *, bias: bool = False) -> nn.Sequential:
    """Batch norm, ReLU, convolution that keeps the size, under the names ``norm``, ``relu`` and ``conv`` (DenseHybrid)."""
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(in_channels),
            relu=nn.ReLU(inplace=True),
            conv=nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias),
        )
    )


class AtrousPyramid(nn.Module):
    """Five views of a feature map, concatenated: image mean, 1x1, and 3x3 convolutions at three dilations.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of each view.
        rates: Dilations of the 3x3 convolutions; the default is that of an output stride of 8.
    """

    def __init__(self, in_channels: int, out_channels: int, rates: Sequence[int] = (12, 24, 36)) -> None:
        super().__init__()
        self.features = nn.ModuleList(
            [conv_bn_relu(in_channels, out_channels), *(conv_bn_relu(in_channels, out_channels, 3, rate) for rate in rates)]
        )
        self.img_pooling = nn.AdaptiveAvgPool2d(1)
        self.img_conv = conv_bn_relu(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) to (B, 5 * out_channels, h, w)."""
        image = self.img_conv(self.img_pooling(x)).expand(-1, -1, *x.shape[-2:])
        return torch.cat([image, *(feature(x) for feature in self.features)], dim=1)


def decoder_head(in_channels: int, width: int) -> list[nn.Module]:
    """The two 3x3 convolutions in front of the classifier, as a flat list: conv, norm, ReLU, conv, norm, ReLU."""
    return [*conv_bn_relu(in_channels, width, 3), *conv_bn_relu(width, width, 3)]
