"""DeepLabV3+ on ResNet-101 with a stem of three 3x3 convolutions: the network of standardized max logits (SML).

Layer names and arithmetic are those of ``DeepR101V3PlusD_OS8`` in the SML release: output stride 8, skip connection at stride 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from ros2_ood_seg.scorers.networks.deeplab import AtrousPyramid, conv_bn_relu, decoder_head, normalise_imagenet, upsample_aligned

STRUCTURE = (3, 4, 23, 3)
"""Bottlenecks in layer1 to layer4 of ResNet-101."""

TRAINING_ONLY = ("dsn.", "multi_scale.")
"""Names of published entries that inference does not need: the auxiliary head, and the fixed kernels of the post-processing."""

_STEM = 64
_STRIDES = (1, 2, 1, 1)
_DILATIONS = (1, 1, 2, 4)


class DeepLabResNet101(nn.Module):
    """The network.

    Args:
        num_classes: Outputs K.
        stem: Channels of the first convolution; all others scale with it. 64 is ResNet-101, less a slim network of its layout.
        structure: Bottlenecks in layer1 to layer4.
    """

    def __init__(self, num_classes: int = 19, *, stem: int = _STEM, structure: Sequence[int] = STRUCTURE) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layer0 = nn.Sequential(
            *_stride2(3, stem), *conv_bn_relu(stem, stem, 3), *conv_bn_relu(stem, 2 * stem, 3), nn.MaxPool2d(3, stride=2, padding=1)
        )
        channels = 2 * stem
        for index, blocks in enumerate(structure):
            planes = stem << index
            layer = nn.Sequential()
            for block in range(blocks):
                stride = _STRIDES[index] if block == 0 else 1
                layer.append(_bottleneck(channels, planes, stride, _DILATIONS[index], project=block == 0))
                channels = 4 * planes
            self.add_module(f"layer{index + 1}", layer)
        width, fine = 4 * stem, 48 * stem // _STEM
        self.aspp = AtrousPyramid(channels, width)
        self.bot_fine = conv_bn_relu(4 * stem, fine)
        self.bot_aspp = conv_bn_relu(5 * width, width)
        self.final1 = nn.Sequential(*decoder_head(width + fine, width))
        self.final2 = nn.Sequential(nn.Conv2d(width, num_classes, 1))

    @classmethod
    def like(cls, state: Mapping[str, Tensor]) -> DeepLabResNet101:
        """An untrained network of the same outputs, width and depth as a state dict, on the meta device."""
        structure = [len({key.split(".")[1] for key in state if key.startswith(f"layer{index}.")}) for index in range(1, 5)]
        with torch.device("meta"):
            return cls(int(state["final2.0.weight"].shape[0]), stem=int(state["layer0.0.weight"].shape[0]), structure=structure)

    def forward(self, image: Tensor) -> Tensor:
        """Runs the network.

        Args:
            image: (B, 3, h, w) float RGB in [0, 255], any size from 8 px.

        Returns:
            (B, K, h/4, w/4) logits.
        """
        fine = self.get_submodule("layer1")(self.layer0(normalise_imagenet(image)))
        x = fine
        for index in range(2, 5):
            x = self.get_submodule(f"layer{index}")(x)
        coarse = upsample_aligned(self.bot_aspp(self.aspp(x)), fine.shape[-2:])
        logits: Tensor = self.final2(self.final1(torch.cat([self.bot_fine(fine), coarse], dim=1)))
        return logits


def _stride2(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
    )


def _bottleneck(in_channels: int, planes: int, stride: int, dilation: int, *, project: bool) -> Bottleneck:
    shortcut = None
    if project:
        shortcut = nn.Sequential(nn.Conv2d(in_channels, 4 * planes, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * planes))
    return Bottleneck(in_channels, planes, stride, shortcut, dilation=dilation)
