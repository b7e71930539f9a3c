"""DeepLabV3+ on WideResNet-38, the network of Max-Entropy, PEBAL, RPL+CoroCL and DenseHybrid.

Layer names and arithmetic are those of NVIDIA's semantic-segmentation (branch ``sdcnet``), whose checkpoint all four start from:
pre-activation residual blocks (Wu et al., "Wider or Deeper", 2016), output stride 8, skip connection at stride 2, classifier without bias.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ros2_ood_seg.scorers.networks.deeplab import normalise_imagenet
from ros2_ood_seg.scorers.networks.deeplab_anomaly import AnomalyDeepLab, outputs_and_parts

STRUCTURE = (3, 3, 6, 3, 1, 1)
"""Residual blocks in mod2 to mod7 of WideResNet-38."""

_CHANNELS = ((128, 128), (256, 256), (512, 512), (512, 1024), (512, 1024, 2048), (1024, 2048, 4096))
_DILATIONS = (1, 1, 1, 2, 4, 4)
_DROPOUT = (0.0, 0.0, 0.0, 0.0, 0.3, 0.5)
_RATES = (12, 24, 36)
_STEM = 64


class DeepLabWideResNet38(AnomalyDeepLab):
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
        super().__init__(num_classes, residual=residual, projection=projection, ood_head=ood_head)
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
        self._add_decoder(2 * stem, channels, 4 * stem, 48 * stem // _STEM, _RATES)

    @classmethod
    def like(cls, state: Mapping[str, Tensor], **changed: int | bool) -> DeepLabWideResNet38:
        """An untrained network of the same outputs, parts, width and depth as a state dict but for what changed, on the meta device."""
        structure = [len({key.split(".")[1] for key in state if key.startswith(f"mod{index}.")}) for index in range(2, 8)]
        with torch.device("meta"):
            return cls(**{**outputs_and_parts(state), **changed}, stem=int(state["mod1.conv1.weight"].shape[0]), structure=structure)

    def trunk(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`AnomalyDeepLab.trunk`; (B, 128, h/2, w/2) and (B, 4096, h/8, w/8) at full width."""
        x = self.get_submodule("mod1")(normalise_imagenet(image))
        fine = self.get_submodule("mod2")(self.pool2(x))
        x = self.pool3(fine)
        for index in range(3, 8):
            x = self.get_submodule(f"mod{index}")(x)
        return fine, x


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


def _norm_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
