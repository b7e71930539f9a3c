"""Ladder-DenseNet-121 (Krešo et al., 2020), the network of DenseHybrid on SegmentMeIfYouCan and StreetHazards.

Layer names and arithmetic are those of the DenseHybrid release. Its backbone is torchvision's DenseNet with other pooling: a 2x2
maximum after the stem and 3x3 means between the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import DenseNet

from ros2_ood_seg.scorers.networks.deeplab import norm_relu_conv

BLOCKS = (6, 12, 24, 16)
"""Layers in the four dense blocks of DenseNet-121."""

UP_WIDTHS = (256, 256, 128)
"""Channels of the decoder at strides 16, 8 and 4."""

TRAINING_ONLY = tuple(f"upsample.upsample_layers.upsample_{step}.logits_aux." for step in range(len(UP_WIDTHS)))
"""Beginnings of the names of entries that only the training uses."""

_GRIDS = (8, 4, 2, 1)


class LadderOutput(NamedTuple):
    """What the network says, at a quarter of the input resolution.

    Args:
        logits: (B, K, h/4, w/4).
        ood_logits: (B, 2, h/4, w/4) of DenseHybrid's data-set posterior (in, out), None without the head.
    """

    logits: Tensor
    ood_logits: Tensor | None


class LadderDenseNet(nn.Module):
    """DenseNet, spatial pyramid pooling, and three steps up with skip connections.

    Args:
        num_classes: Outputs K.
        ood_head: Add DenseHybrid's data-set posterior.
        growth: Channels that each dense layer adds.
        blocks: Layers of the four dense blocks.
        stem: Channels of the first convolution.
        width: Channels of the pyramid; each of its four levels has a quarter.
        up_widths: Channels after each step up.
    """

    def __init__(
        self,
        num_classes: int = 19,
        *,
        ood_head: bool = False,
        growth: int = 32,
        blocks: Sequence[int] = BLOCKS,
        stem: int = 64,
        width: int = 512,
        up_widths: Sequence[int] = UP_WIDTHS,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        features = DenseNet(growth, tuple(blocks), stem, num_classes=1).features
        del features.norm5
        features.pool0 = nn.MaxPool2d(2, stride=2)
        skips, channels = [], stem
        for block, layers in enumerate(blocks, start=1):
            channels += layers * growth
            if block < len(blocks):
                skips.append(channels)
                channels //= 2
                features.get_submodule(f"transition{block}").pool = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
        self.backbone = nn.ModuleDict({"features": features})
        self.spp = nn.ModuleDict({"spp": _PyramidPooling(channels, width)})
        steps = nn.ModuleDict()
        for step, (skip, up) in enumerate(zip(reversed(skips), up_widths, strict=True)):
            steps[f"upsample_{step}"] = _Step(width, skip, up)
            width = up
        self.upsample = nn.ModuleDict({"upsample_layers": steps})
        self.logits = norm_relu_conv(width, num_classes, bias=True)
        self.logits_ood = norm_relu_conv(width, 2, bias=True) if ood_head else None

    @classmethod
    def like(cls, state: Mapping[str, Tensor]) -> LadderDenseNet:
        """An untrained network of the same outputs, parts, widths and depth as a state dict, on the meta device."""

        def outputs(name: str) -> int:
            return int(state[f"{name}.weight"].shape[0])

        def children(prefix: str) -> int:
            return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})

        with torch.device("meta"):
            return cls(
                outputs("logits.conv"),
                ood_head=any(key.startswith("logits_ood.") for key in state),
                growth=outputs("backbone.features.denseblock1.denselayer1.conv2"),
                blocks=[children(f"backbone.features.denseblock{block}.") for block in range(1, 5)],
                stem=outputs("backbone.features.conv0"),
                width=outputs("spp.spp.spp.spp_fuse.conv"),
                up_widths=[outputs(f"upsample.upsample_layers.upsample_{step}.blend_conv.conv") for step in range(3)],
            )

    def forward(self, image: Tensor) -> LadderOutput:
        """Runs the network.

        Args:
            image: (B, 3, h, w) float RGB in [0, 255], any size from 32 px; the release scales it to [0, 1] and no further.
        """
        x, skips = image / 255.0, []
        for name, module in cast("nn.Sequential", self.backbone["features"]).named_children():
            if name.startswith("transition"):
                skips.append(x)
            x = module(x)
        x = self.spp["spp"](x)
        for step, skip in zip(cast("nn.ModuleDict", self.upsample["upsample_layers"]).values(), reversed(skips), strict=True):
            x = step(x, skip)
        return LadderOutput(self.logits(x), None if self.logits_ood is None else self.logits_ood(x))


class _PyramidPooling(nn.Module):
    """Means over grids of decreasing fineness, as many columns as keep the cells square."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        level = width // len(_GRIDS)
        self.spp = nn.ModuleDict({"spp_bn": norm_relu_conv(in_channels, width)})
        for index in range(len(_GRIDS)):
            self.spp[f"spp{index}"] = norm_relu_conv(width, level)
        self.spp["spp_fuse"] = norm_relu_conv(width + len(_GRIDS) * level, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spp["spp_bn"](x)
        height, width = int(x.shape[2]), int(x.shape[3])
        levels = [x]
        for index, rows in enumerate(_GRIDS):
            columns = max(1, round(width / height * rows))
            level = self.spp[f"spp{index}"](F.adaptive_avg_pool2d(x, (rows, columns)))
            levels.append(F.interpolate(level, size=(height, width), mode="bilinear", align_corners=False))
        result: Tensor = self.spp["spp_fuse"](torch.cat(levels, dim=1))
        return result


class _Step(nn.Module):
    """Upsamples to the skip connection's size, adds it, and blends both."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bottleneck = norm_relu_conv(skip_channels, in_channels)
        self.blend_conv = norm_relu_conv(in_channels, out_channels, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        skip = self.bottleneck(skip)
        x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        result: Tensor = self.blend_conv(x + skip)
        return result
