"""DeepLabV3+ on WideResNet-38, the network of Max-Entropy, PEBAL, RPL+CoroCL and DenseHybrid.

Layer names and arithmetic are those of NVIDIA's semantic-segmentation (branch ``sdcnet``), whose checkpoint all four start from:
pre-activation residual blocks (Wu et al., "Wider or Deeper", 2016), output stride 8, skip connection at stride 2, classifier without bias.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ros2_ood_seg.scorers.networks.deeplab import AtrousPyramid, decoder_head, normalise_imagenet, upsample_aligned

STRUCTURE = (3, 3, 6, 3, 1, 1)
"""Residual blocks in mod2 to mod7 of WideResNet-38."""

_CHANNELS = ((128, 128), (256, 256), (512, 512), (512, 1024), (512, 1024, 2048), (1024, 2048, 4096))
_DILATIONS = (1, 1, 1, 2, 4, 4)
_DROPOUT = (0.0, 0.0, 0.0, 0.0, 0.3, 0.5)
_STEM = 64


class WideOutput(NamedTuple):
    """What the network says, at half the input resolution.

    Args:
        logits: (B, K, h/2, w/2) of the segmentation; of RPL the untouched one (``out1``).
        residual_logits: (B, K, h/2, w/2) with RPL's residual (``out2``), None without the block.
        ood_logits: (B, 2, h/2, w/2) of DenseHybrid's data-set posterior (in, out), None without the head.
        projection: (B, 304, h/2, w/2) CoroCL's embedding, only in training and only with the projection head.
    """

    logits: Tensor
    residual_logits: Tensor | None = None
    ood_logits: Tensor | None = None
    projection: Tensor | None = None


class DeepLabWideResNet38(nn.Module):
    """The network with the optional parts that the anomaly methods add to it.

    Args:
        num_classes: Outputs K: 19 Cityscapes classes, 20 with PEBAL's abstention class.
        residual: Add RPL's residual block.
        projection: Add CoroCL's projection head to the residual block.
        ood_head: Add DenseHybrid's data-set posterior.
        stem: Channels of the first convolution; all others scale with it. 64 is WideResNet-38, less a slim network of its layout.
        structure: Residual blocks in mod2 to mod7.
    """

    def __init__(
        self,
        num_classes: int = 19,
        *,
        residual: bool = False,
        projection: bool = False,
        ood_head: bool = False,
        stem: int = _STEM,
        structure: Sequence[int] = STRUCTURE,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.mod1 = nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, stem, 3, padding=1, bias=False)))
        self.pool2 = nn.MaxPool2d(3, stride=2, padding=1)
        self.pool3 = nn.MaxPool2d(3, stride=2, padding=1)
        channels = stem
        for index, blocks in enumerate(structure):
            widths = [width * stem // _STEM for width in _CHANNELS[index]]
            module = nn.Sequential()
            for block in range(blocks):
                stride = 2 if index == 2 and block == 0 else 1
                module.add_module(f"block{block + 1}", _ResidualBlock(channels, widths, stride, _DILATIONS[index], _DROPOUT[index]))
                channels = widths[-1]
            self.add_module(f"mod{index + 2}", module)
        width, fine = 4 * stem, 48 * stem // _STEM
        self.aspp = AtrousPyramid(channels, width)
        self.bot_fine = nn.Conv2d(2 * stem, fine, 1, bias=False)
        self.bot_aspp = nn.Conv2d(5 * width, width, 1, bias=False)
        self.final = nn.Sequential(*decoder_head(width + fine, width), nn.Conv2d(width, num_classes, 1, bias=False))
        self.residual_block = _ResidualPattern(channels, width, width + fine, projection) if residual else None
        self.logits_ood = _norm_relu_conv(width + fine, 2) if ood_head else None

    @classmethod
    def like(cls, state: Mapping[str, Tensor]) -> DeepLabWideResNet38:
        """An untrained network of the same outputs, parts, width and depth as a state dict, on the meta device."""
        structure = [len({key.split(".")[1] for key in state if key.startswith(f"mod{index}.")}) for index in range(2, 8)]
        with torch.device("meta"):
            return cls(
                int(state["final.6.weight"].shape[0]),
                residual=any(key.startswith("residual_block.") for key in state),
                projection=any(key.startswith("residual_block.proj_head.") for key in state),
                ood_head=any(key.startswith("logits_ood.") for key in state),
                stem=int(state["mod1.conv1.weight"].shape[0]),
                structure=structure,
            )

    def forward(self, image: Tensor) -> WideOutput:
        """Runs the network.

        Args:
            image: (B, 3, h, w) float RGB in [0, 255], any size from 8 px.
        """
        fused, deep = self._decoder_input(image)
        logits = self.final(fused)
        residual_logits = ood_logits = projection = None
        if self.residual_block is not None:
            residual, projection = self.residual_block(deep, fused.shape[-2:])
            residual_logits = self.final(fused + residual)
        if self.logits_ood is not None:
            ood_logits = self.logits_ood(fused)
        return WideOutput(logits, residual_logits, ood_logits, projection)

    def penultimate(self, image: Tensor) -> Tensor:
        """The classifier's input, (B, 256, h/2, w/2), for an image as in :meth:`forward`."""
        features: Tensor = self.final[:-1](self._decoder_input(image)[0])
        return features

    def _decoder_input(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.get_submodule("mod1")(normalise_imagenet(image))
        fine = self.get_submodule("mod2")(self.pool2(x))
        x = self.pool3(fine)
        for index in range(3, 8):
            x = self.get_submodule(f"mod{index}")(x)
        coarse = upsample_aligned(self.bot_aspp(self.aspp(x)), fine.shape[-2:])
        return torch.cat([self.bot_fine(fine), coarse], dim=1), x


class _ResidualBlock(nn.Module):
    """Norm and ReLU before each convolution; two 3x3 convolutions, or a bottleneck of three."""

    def __init__(self, in_channels: int, widths: Sequence[int], stride: int, dilation: int, dropout: float) -> None:
        super().__init__()
        kernels = (3, 3) if len(widths) == 2 else (1, 3, 1)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for index, (width, kernel) in enumerate(zip(widths, kernels, strict=True), start=1):
            if index > 1:
                layers[f"bn{index}"] = _norm_relu(channels)
            if index == len(widths) and dropout > 0:
                layers["dropout"] = nn.Dropout2d(dropout)
            step, spread = stride if index == 1 else 1, dilation if kernel == 3 else 1
            layers[f"conv{index}"] = nn.Conv2d(
                channels, width, kernel, stride=step, padding=spread * (kernel // 2), dilation=spread, bias=False
            )
            channels = width
        self.bn1 = _norm_relu(in_channels)
        self.convs = nn.Sequential(layers)
        projected = stride != 1 or in_channels != channels
        self.proj_conv = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.bn1(x)
        shortcut = x if self.proj_conv is None else self.proj_conv(activated)
        result: Tensor = self.convs(activated) + shortcut
        return result


class _ResidualPattern(nn.Module):
    """RPL's block (Liu et al., ICCV 2023, Fig. 2): a second pyramid whose output is added to the decoder's input."""

    def __init__(self, in_channels: int, width: int, out_channels: int, projection: bool) -> None:
        super().__init__()
        self.atten_aspp = AtrousPyramid(in_channels, width)
        self.bot_atten_aspp = nn.Conv2d(5 * width, width, 1, bias=False)
        self.atten_aspp_final = nn.Conv2d(width, out_channels, 1, bias=False)
        self.proj_head = nn.Sequential(OrderedDict(proj=nn.Sequential(nn.Conv2d(width, out_channels, 1)))) if projection else None

    def forward(self, x: Tensor, size_hw: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        x = upsample_aligned(self.bot_atten_aspp(self.atten_aspp(x)), size_hw)
        projection = self.proj_head(x) if self.training and self.proj_head is not None else None
        return self.atten_aspp_final(x), projection


def _norm_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def _norm_relu_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(in_channels), relu=nn.ReLU(), conv=nn.Conv2d(in_channels, out_channels, 1)))
