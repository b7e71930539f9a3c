"""Faster R-CNN on score maps: S2M's ResNet-50-FPN, and two for small computers, a slim one and MobileNetV3-FPN.

All are put together from torchvision's detection parts. Three parts are our own, because torchvision's differ from detectron2's
(which trained S2M's released weights) in a way that moves boxes: anchors, RoI pooling and input normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.mobilenetv3 import mobilenet_v3_large
from torchvision.models.resnet import resnet50
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import Conv2dNormActivation

from ros2_ood_seg.errors import InputError

InputMode = Literal["raw", "calibrated"]
BGR_MEAN = (103.53, 116.28, 123.675)
"""detectron2's default pixel mean, which S2M subtracts from the replicated score map as well."""
_LEVELS = ("0", "1", "2", "3")
_STRIDES = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class MapInput:
    """How a score map becomes the detector's input: ``(score - mean) / std``, once per channel.

    Args:
        mode: ``raw``: the scorer's own range (published); ``calibrated``: [0, 1], the same for every scorer.
        mean: One value per input channel.
        std: One value per input channel, > 0.
    """

    mode: InputMode
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.mode not in ("raw", "calibrated"):
            raise InputError(f"detector input mode is '{self.mode}': use 'raw' or 'calibrated'")
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise InputError(f"detector input needs one mean and one positive std per channel, got {list(self.mean)} and {list(self.std)}")

    @classmethod
    def published(cls) -> MapInput:
        """S2M: the raw map three times, minus the BGR mean."""
        return cls("raw", BGR_MEAN, (1.0, 1.0, 1.0))

    @classmethod
    def calibrated(cls, channels: int = 1) -> MapInput:
        """The calibrated map, roughly centred: most in-distribution pixels lie within 0 to 0.2."""
        return cls("calibrated", (0.1,) * channels, (0.3,) * channels)

    def to_dict(self) -> dict[str, Any]:
        """For the metadata of a weights file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MapInput:
        """Reads what :meth:`to_dict` wrote."""
        return cls(values["mode"], tuple(map(float, values["mean"])), tuple(map(float, values["std"])))


class MapTransform(nn.Module):
    """Score maps to a zero-padded batch at their own resolution (S2M's test loader does not resize).

    Args:
        map_input: Replication and normalisation.
        divisor_px: Height and width are padded right and below to a multiple of this.
    """

    def __init__(self, map_input: MapInput, divisor_px: int = 32) -> None:
        super().__init__()
        self.divisor_px = divisor_px
        self.register_buffer("mean", torch.tensor(map_input.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(map_input.std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Sequence[Tensor], targets: list[dict[str, Tensor]] | None = None) -> tuple[Any, Any]:
        """Normalises, then pads.

        Args:
            images: (1 or C, h, w) float32 each; one channel is replicated to C.
            targets: ``boxes`` and ``labels`` per image, passed on.

        Returns:
            torchvision's ImageList of (N, C, H, W), and the targets.
        """
        mean, std = cast("Tensor", self.mean), cast("Tensor", self.std)
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        height, width = (math.ceil(max(side) / self.divisor_px) * self.divisor_px for side in zip(*sizes, strict=True))
        batch = mean.new_zeros((len(images), mean.shape[0], height, width))
        for padded, image, (h, w) in zip(batch, images, sizes, strict=True):
            padded[:, :h, :w] = (image - mean) / std
        return ImageList(batch, sizes), targets

    def postprocess(
        self, result: list[dict[str, Tensor]], image_sizes: list[tuple[int, int]], original_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Boxes are in the map's pixels already."""
        return result


class Anchors(nn.Module):
    """Anchors as detectron2 makes them: not rounded, grid from the corner of the image, fixed strides.

    torchvision rounds them and derives the stride from the sizes of image and feature map, which goes wrong on odd sizes.

    Args:
        sizes_px: Square roots of the anchor areas, per level.
        ratios: Height to width.
    """

    def __init__(self, sizes_px: Sequence[Sequence[float]], ratios: Sequence[float] = (0.5, 1.0, 2.0)) -> None:
        super().__init__()
        for level, sizes in enumerate(sizes_px):
            sides = torch.tensor([(size / math.sqrt(r), size * math.sqrt(r)) for size in sizes for r in ratios])
            self.register_buffer(f"cell_{level}", torch.cat([-sides, sides], dim=1) / 2, persistent=False)

    def num_anchors_per_location(self) -> list[int]:
        """Anchors of one grid cell, per level."""
        return [cell.shape[0] for cell in self.buffers()]

    def forward(self, images: Any, features: Sequence[Tensor]) -> list[Tensor]:
        """All anchors of all levels, ``xyxy`` px, level by level, row by row; the same (A, 4) for each image."""
        levels = []
        for cell, feature, stride in zip(self.buffers(), features, _STRIDES, strict=True):
            y = torch.arange(feature.shape[-2], device=cell.device) * stride
            x = torch.arange(feature.shape[-1], device=cell.device) * stride
            shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1).view(-1, 1, 4)
            levels.append((shifts + cell).reshape(-1, 4))
        return [torch.cat(levels)] * len(images.image_sizes)


class RoiPooler(nn.Module):
    """detectron2's ROIAlignV2 (``aligned=True``) over the pyramid, fixed strides.

    Args:
        output_px: Bins per side.
        canonical_px: Boxes of this size (square root of the area) and up to twice it pool from stride 16.
        sampling: Samples per bin and side, 0 for as many as pixels (detectron2).
    """

    def __init__(self, output_px: int = 7, canonical_px: float = 224.0, sampling: int = 0) -> None:
        super().__init__()
        self.output_px = output_px
        self.canonical_px = canonical_px
        self.sampling = sampling

    def levels(self, boxes_xyxy: Tensor) -> Tensor:
        """(N,) int64 pyramid level of each box, 0 for stride 4 (Feature Pyramid Networks, Eq. 1)."""
        side = ((boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])).sqrt()
        return (2 + torch.log2(side / self.canonical_px + 1e-8)).floor().clamp(0, len(_LEVELS) - 1).long()

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_sizes: list[tuple[int, int]]) -> Tensor:
        """(N, C, output_px, output_px) of the boxes of all images."""
        image_index = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rois = torch.cat([image_index, torch.cat(boxes)], dim=1)
        level = self.levels(rois[:, 1:])
        pooled = features["0"].new_zeros((rois.shape[0], features["0"].shape[1], self.output_px, self.output_px))
        for k, name in enumerate(_LEVELS):
            index = torch.where(level == k)[0]
            crops = roi_align(features[name], rois[index], self.output_px, 1.0 / _STRIDES[k], self.sampling, aligned=True)
            pooled = pooled.index_put((index,), crops.to(pooled.dtype))
        return pooled


def s2m_rcnn(map_input: MapInput | None = None, *, num_classes: int = 2, frozen_norm: bool = True, stride_in_1x1: bool = True) -> nn.Module:
    """S2M's prompt generator: Faster R-CNN ResNet-50-FPN as in detectron2's ``faster_rcnn_R_50_FPN_3x``, 41 M parameters.

    Args:
        map_input: Input; None as published.
        num_classes: Object classes; S2M has 2 and uses the first.
        frozen_norm: Batch norm as constants, as published from ImageNet weights; False to train from scratch.
        stride_in_1x1: Strides in the first 1×1 of a block (MSRA ResNet, published) instead of the 3×3 (torchvision).

    Returns:
        A torchvision ``GeneralizedRCNN`` whose label 0 is the background.
    """
    body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d)
    if stride_in_1x1:
        for stage in (body.layer2, body.layer3, body.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = stage[0].conv2.stride, stage[0].conv1.stride
    backbone = BackboneWithFPN(body, {f"layer{k + 1}": name for k, name in enumerate(_LEVELS)}, [256, 512, 1024, 2048], 256)
    return _assemble(
        backbone,
        map_input or MapInput.published(),
        anchors=Anchors([(32,), (64,), (128,), (256,), (512,)]),
        pooler=RoiPooler(),
        channels=256,
        hidden=1024,
        num_classes=num_classes,
        proposals={"pre": (2000, 1000), "post": (1000, 1000)},
        samples=512,
    )


def compact_rcnn(map_input: MapInput | None = None) -> nn.Module:
    """The prompt generator for small computers: the same two stages with 1 M parameters and anchors from 8 px.

    A score map holds far less than a photograph, so a slim residual network from scratch does; the smaller anchors are for
    maps that were shrunk to 640 px.

    Args:
        map_input: Input of one channel; None for the calibrated map.
    """
    spec = map_input or MapInput.calibrated()
    return _small(_SlimFpn(len(spec.mean)), spec, channels=_SlimFpn.out_channels, hidden=192)


def mobilenet_rcnn(map_input: MapInput | None = None) -> nn.Module:
    """The same on MobileNetV3-Large (Howard et al. 2019) with a feature pyramid, 5 M parameters.

    Args:
        map_input: Input of any number of channels; None for the calibrated map.
    """
    spec = map_input or MapInput.calibrated()
    body = mobilenet_v3_large(weights=None).features[:16]
    body[0][0] = nn.Conv2d(len(spec.mean), 16, 3, 2, 1, bias=False)
    ends = {"3": 24, "6": 40, "12": 112, "15": 160}
    backbone = BackboneWithFPN(body, dict(zip(ends, _LEVELS, strict=True)), list(ends.values()), 64)
    return _small(backbone, spec, channels=64, hidden=512)


def _small(backbone: nn.Module, map_input: MapInput, *, channels: int, hidden: int) -> nn.Module:
    """Two stages for score maps of about 640 px, with anchors from 8 px."""
    return _assemble(
        backbone,
        map_input,
        anchors=Anchors([(2 * s, 4 * s) for s in _STRIDES]),
        pooler=RoiPooler(canonical_px=112.0, sampling=2),
        channels=channels,
        hidden=hidden,
        num_classes=1,
        proposals={"pre": (500, 200), "post": (200, 100)},
        samples=128,
    )


SMALL_NETWORKS = {"compact": compact_rcnn, "mobilenet_v3": mobilenet_rcnn}
"""The networks for small computers by the name that recipes and weights files have for them."""


def fuse_norms(network: nn.Module) -> None:
    """Folds the small networks' batch norms into their convolutions, in place: the same function in evaluation mode, but faster."""
    network.eval()
    for module in list(network.modules()):
        if isinstance(module, _Block):
            module.conv1, module.norm1 = _fused(module.conv1, module.norm1)
            module.conv2, module.norm2 = _fused(module.conv2, module.norm2)
            if isinstance(module.skip, nn.Sequential):
                module.skip = nn.Sequential(*_fused(module.skip[0], module.skip[1]))
        elif isinstance(module, _SlimFpn):
            module.stem = nn.Sequential(*_fused(module.stem[0], module.stem[1]), nn.ReLU())
        elif isinstance(module, Conv2dNormActivation) and len(module) > 1 and isinstance(module[1], nn.BatchNorm2d):
            module[0], module[1] = _fused(module[0], module[1])


def _fused(conv: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    return fuse_conv_bn_eval(cast("nn.Conv2d", conv), cast("nn.BatchNorm2d", norm)), nn.Identity()


class _Block(nn.Module):
    """Residual block of two 3×3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1: nn.Module = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1: nn.Module = nn.BatchNorm2d(outputs)
        self.conv2: nn.Module = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2: nn.Module = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.skip(x))


class _SlimFpn(nn.Module):
    """Residual network with a feature pyramid at strides 4 to 64."""

    out_channels = 32

    def __init__(self, inputs: int, widths: Sequence[int] = (24, 48, 80, 112)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(inputs, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        stages, previous = [], 16
        for width in widths:
            stages.append(nn.Sequential(_Block(previous, width, 2), _Block(width, width, 1)))
            previous = width
        self.stages = nn.ModuleList(stages)
        self.fpn = FeaturePyramidNetwork(list(widths), self.out_channels, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        features = {}
        for name, stage in zip(_LEVELS, self.stages, strict=True):
            x = features[name] = stage(x)
        return cast("dict[str, Tensor]", self.fpn(features))


def _assemble(
    backbone: nn.Module,
    map_input: MapInput,
    *,
    anchors: Anchors,
    pooler: RoiPooler,
    channels: int,
    hidden: int,
    num_classes: int,
    proposals: dict[str, tuple[int, int]],
    samples: int,
) -> nn.Module:
    """Joins the parts; ``proposals`` are (training, test) numbers before and after NMS, the other constants are detectron2's."""
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n=dict(zip(("training", "testing"), proposals["pre"], strict=True)),
        post_nms_top_n=dict(zip(("training", "testing"), proposals["post"], strict=True)),
        nms_thresh=0.7,
    )
    heads = RoIHeads(
        pooler,
        TwoMLPHead(channels * pooler.output_px**2, hidden),
        FastRCNNPredictor(hidden, num_classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=samples,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
    )
    return cast("nn.Module", GeneralizedRCNN(backbone, rpn, heads, MapTransform(map_input)))
