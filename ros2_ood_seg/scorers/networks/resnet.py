"""ResNet (He et al., 2016) with bottlenecks, with the parameter names of detectron2: the smaller backbone of Mask2Former's release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ResNet(nn.Module):
    """Four stages of bottlenecks that stride in their 3x3 convolution, as in torchvision.

    Args:
        stem: Channels of the first convolution.
        bottlenecks: Inner channels of the stages' bottlenecks.
        widths: Channels that leave the stages.
        depths: Bottlenecks per stage.
    """

    def __init__(self, stem: int, bottlenecks: Sequence[int], widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.stem = nn.ModuleDict({"conv1": _NormedConv2d(3, stem, 7, stride=2)})
        channels = stem
        for stage, (inner, width, depth) in enumerate(zip(bottlenecks, widths, depths, strict=True)):
            blocks = nn.Sequential()
            for block in range(depth):
                blocks.append(_Bottleneck(channels, inner, width, stride=2 if stage and not block else 1))
                channels = width
            self.add_module(f"res{stage + 2}", blocks)

    @classmethod
    def like(cls, state: Mapping[str, Tensor], prefix: str = "backbone.") -> ResNet:
        """An untrained backbone of the same widths and depths as a state dict."""
        depths = []
        for stage in range(2, 6):
            start = f"{prefix}res{stage}."
            depths.append(len({key.removeprefix(start).split(".")[0] for key in state if key.startswith(start)}))
        inner = [int(state[f"{prefix}res{stage}.0.conv1.weight"].shape[0]) for stage in range(2, 6)]
        widths = [int(state[f"{prefix}res{stage}.0.conv3.weight"].shape[0]) for stage in range(2, 6)]
        return cls(int(state[f"{prefix}stem.conv1.weight"].shape[0]), inner, widths, depths)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features at strides 4, 8, 16 and 32.

        Args:
            image: (B, 3, h, w) normalised float RGB.

        Returns:
            Per stage (B, width, h / stride, w / stride), rounded up.
        """
        x = F.max_pool2d(F.relu(self.stem["conv1"](image)), 3, stride=2, padding=1)
        outputs = []
        for stage in range(len(self.widths)):
            x = self.get_submodule(f"res{stage + 2}")(x)
            outputs.append(x)
        return outputs


class _NormedConv2d(nn.Conv2d):
    """Convolution without bias, batch norm inside as detectron2 names it."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(super().forward(x))
        return result


class _Bottleneck(nn.Module):
    def __init__(self, in_channels: int, inner: int, width: int, stride: int) -> None:
        super().__init__()
        self.shortcut = _NormedConv2d(in_channels, width, 1, stride=stride) if stride > 1 or in_channels != width else None
        self.conv1 = _NormedConv2d(in_channels, inner, 1)
        self.conv2 = _NormedConv2d(inner, inner, 3, stride=stride)
        self.conv3 = _NormedConv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu(shortcut + self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
