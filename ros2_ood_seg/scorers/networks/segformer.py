"""SegFormer (Xie et al., NeurIPS 2021) and GMMSeg (Liang et al., NeurIPS 2022) on it, with the parameter names of mmsegmentation."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ros2_ood_seg.scorers.networks.deeplab import normalise_imagenet
from ros2_ood_seg.scorers.networks.mix_transformer import MixTransformer

TRAINING_ONLY = tuple(f"decode_head.{name}" for name in ("queue", "queue_ptr", "eye_matrix", "iteration_counter", "conv_seg."))
"""Beginnings of the names of entries that only the training of GMMSeg uses; its memory of features alone takes most of the file."""


class SegFormer(nn.Module):
    """Mix Transformer and all-MLP decoder.

    Args:
        backbone: Mix Transformer.
        num_classes: Outputs K.
        width: Channels of the decoder.
    """

    def __init__(self, backbone: MixTransformer, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        self.decode_head = _Decoder(backbone.widths, width)
        self.decode_head.add_module("conv_seg", nn.Conv2d(width, num_classes, 1))

    @classmethod
    def like(cls, state: Mapping[str, Tensor]) -> SegFormer:
        """An untrained network of the same outputs, widths and depths as a state dict, on the meta device."""
        with torch.device("meta"):
            return cls(MixTransformer.like(state), *map(int, state["decode_head.conv_seg.weight"].shape[:2]))

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, h, w) float RGB in [0, 255] to (B, K, h/4, w/4) logits."""
        logits: Tensor = self.decode_head.get_submodule("conv_seg")(self.decode_head(self.backbone(normalise_imagenet(image))))
        return logits


class GmmOutput(NamedTuple):
    """What GMMSeg says, at a quarter of the input resolution.

    Args:
        log_likelihoods: (B, K, h/4, w/4) float32, of each class's most likely component.
        logits: (B, K, h/4, w/4) float32, the same normalised over the classes, as the segmentation was trained with.
    """

    log_likelihoods: Tensor
    logits: Tensor


class GmmSeg(nn.Module):
    """SegFormer whose classifier is a mixture of Gaussians per class.

    Args:
        backbone: Mix Transformer.
        num_classes: Classes K.
        components: Gaussians per class.
        width: Channels of the decoder.
        embedding: Dimensions D of the features; where they are not ``width``, a projection leads to them.
    """

    def __init__(self, backbone: MixTransformer, num_classes: int, components: int, width: int, embedding: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        self.decode_head = _MixtureHead(backbone.widths, num_classes, components, width, embedding)

    @classmethod
    def like(cls, state: Mapping[str, Tensor]) -> GmmSeg:
        """An untrained network of the same outputs, widths and depths as a state dict, on the meta device."""
        classes, components, embedding = map(int, state["decode_head.means"].shape)
        width = int(state["decode_head.fusion_conv.conv.weight"].shape[0])
        with torch.device("meta"):
            return cls(MixTransformer.like(state), classes, components, width, embedding)

    def forward(self, image: Tensor) -> GmmOutput:
        """Runs the network on (B, 3, h, w) float RGB in [0, 255]."""
        output: GmmOutput = self.decode_head.classify(self.backbone(normalise_imagenet(image)))
        return output


class _Decoder(nn.Module):
    """Every level to the same width and to the size of the finest, then one fusion."""

    def __init__(self, in_widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv_bn_relu(channels, width) for channels in in_widths)
        self.fusion_conv = _conv_bn_relu(len(in_widths) * width, width)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        size = features[0].shape[-2:]
        levels = [
            F.interpolate(conv(x), size=size, mode="bilinear", align_corners=False) for conv, x in zip(self.convs, features, strict=True)
        ]
        result: Tensor = self.fusion_conv(torch.cat(levels, dim=1))
        return result


class _MixtureHead(_Decoder):
    def __init__(self, in_widths: Sequence[int], classes: int, components: int, width: int, embedding: int) -> None:
        super().__init__(in_widths, width)
        self.projection = _conv_bn_relu(width, embedding) if width != embedding else None
        self.feat_norm = nn.LayerNorm(embedding)
        self.mask_norm = nn.LayerNorm(classes)
        self.means = nn.Parameter(F.normalize(torch.randn(classes, components, embedding), dim=-1), requires_grad=False)
        self.diagonal = nn.Parameter(torch.ones(classes, components, embedding), requires_grad=False)

    def classify(self, features: Sequence[Tensor]) -> GmmOutput:
        x = self(features)
        x = x if self.projection is None else self.projection(x)
        # Likelihoods of 64 dimensions need more digits than autocast keeps.
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            tokens = F.normalize(self.feat_norm(x.permute(0, 2, 3, 1)), dim=-1)
            means = F.normalize(self.means.flatten(0, 1), dim=-1)
            densities = log_likelihood(tokens.flatten(0, 2), means, self.diagonal.flatten(0, 1))
            best = densities.view(*tokens.shape[:3], *self.means.shape[:2]).amax(4)
            return GmmOutput(best.permute(0, 3, 1, 2), self.mask_norm(best).permute(0, 3, 1, 2))


def log_likelihood(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Log density of Gaussians with diagonal covariance, as one product of matrices: all differences at once would take gigabytes.

    Args:
        x: (N, D) float32.
        mean: (M, D) float32.
        deviation: (M, D) float32 standard deviations, above 0.

    Returns:
        (N, M) float32.
    """
    precision = deviation.pow(-2)
    constant = -0.5 * ((mean**2 * precision).sum(1) + x.shape[1] * math.log(2 * math.pi)) - deviation.log().sum(1)
    return constant + x @ (mean * precision).T - 0.5 * (x**2 @ precision.T)


def _conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, 1, bias=False), bn=nn.BatchNorm2d(out_channels), activate=nn.ReLU(inplace=True)
        )
    )
