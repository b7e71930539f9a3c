"""The decoder of DeepLabV3+ with the parts that anomaly methods add to it, on any trunk.

Layer names and arithmetic are those of NVIDIA's semantic-segmentation (branch ``sdcnet``), RPL, CoroCL and DenseHybrid, so that their
state dicts load without renaming.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ros2_ood_seg.scorers.networks.deeplab import AtrousPyramid, decoder_head, norm_relu_conv, upsample_aligned


class DeepLabOutput(NamedTuple):
    """What the network says, at the resolution of its skip connection.

    Args:
        logits: (B, K, h, w) of the segmentation; of RPL the untouched one (``out1``).
        residual_logits: (B, K, h, w) with RPL's residual (``out2``), None without the block.
        ood_logits: (B, 2, h, w) of DenseHybrid's data-set posterior (in, out), None without the head.
        projection: (B, C, h, w) CoroCL's embedding, only in training and only with the projection head.
    """

    logits: Tensor
    residual_logits: Tensor | None = None
    ood_logits: Tensor | None = None
    projection: Tensor | None = None


class AnomalyDeepLab(nn.Module):
    """Pyramid, skip connection and classifier, with the optional parts that the anomaly methods add; the trunk is the subclass's.

    Args:
        num_classes: Outputs K: the in-distribution classes, and one more with PEBAL's abstention class.
        residual: Add RPL's residual block.
        projection: Add CoroCL's projection head to the residual block.
        ood_head: Add DenseHybrid's data-set posterior.
    """

    def __init__(self, num_classes: int, *, residual: bool = False, projection: bool = False, ood_head: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self._parts = (residual, projection, ood_head)

    def _add_decoder(self, fine_channels: int, deep_channels: int, width: int, fine: int, rates: Sequence[int]) -> None:
        """Adds everything behind the trunk.

        Args:
            fine_channels: Of the trunk's skip connection.
            deep_channels: Of the trunk's end.
            width: Of the decoder.
            fine: Of the skip connection inside the decoder.
            rates: Dilations of the pyramids.
        """
        residual, projection, ood_head = self._parts
        self.aspp = AtrousPyramid(deep_channels, width, rates)
        self.bot_fine = nn.Conv2d(fine_channels, fine, 1, bias=False)
        self.bot_aspp = nn.Conv2d(5 * width, width, 1, bias=False)
        self.final = nn.Sequential(*decoder_head(width + fine, width), nn.Conv2d(width, self.num_classes, 1, bias=False))
        self.residual_block = _ResidualPattern(deep_channels, width, width + fine, rates, projection) if residual else None
        self.logits_ood = norm_relu_conv(width + fine, 2, bias=True) if ood_head else None

    def trunk(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The skip connection and the deep features of an image as in :meth:`forward`."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> DeepLabOutput:
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
        return DeepLabOutput(logits, residual_logits, ood_logits, projection)

    def penultimate(self, image: Tensor) -> Tensor:
        """The last convolution's input, (B, width, h, w), for an image as in :meth:`forward`."""
        features: Tensor = self.final[:-1](self._decoder_input(image)[0])
        return features

    def _decoder_input(self, image: Tensor) -> tuple[Tensor, Tensor]:
        fine, deep = self.trunk(image)
        coarse = upsample_aligned(self.bot_aspp(self.aspp(deep)), fine.shape[-2:])
        return torch.cat([self.bot_fine(fine), coarse], dim=1), deep


def outputs_and_parts(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of :class:`AnomalyDeepLab` that a state dict was made with."""
    return {
        "num_classes": int(state["final.6.weight"].shape[0]),
        "residual": any(key.startswith("residual_block.") for key in state),
        "projection": any(key.startswith("residual_block.proj_head.") for key in state),
        "ood_head": any(key.startswith("logits_ood.") for key in state),
    }


class _ResidualPattern(nn.Module):
    """RPL's block (Liu et al., ICCV 2023, Fig. 2): a second pyramid whose output is added to the decoder's input."""

    def __init__(self, in_channels: int, width: int, out_channels: int, rates: Sequence[int], projection: bool) -> None:
        super().__init__()
        self.atten_aspp = AtrousPyramid(in_channels, width, rates)
        self.bot_atten_aspp = nn.Conv2d(5 * width, width, 1, bias=False)
        self.atten_aspp_final = nn.Conv2d(width, out_channels, 1, bias=False)
        self.proj_head = nn.Sequential(OrderedDict(proj=nn.Sequential(nn.Conv2d(width, out_channels, 1)))) if projection else None

    def forward(self, x: Tensor, size_hw: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        x = upsample_aligned(self.bot_atten_aspp(self.atten_aspp(x)), size_hw)
        projection = self.proj_head(x) if self.training and self.proj_head is not None else None
        return self.atten_aspp_final(x), projection
