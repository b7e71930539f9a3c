"""A small segmentation network with an outlier head: features of a mobile network and a light top-down decoder."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ros2_ood_seg.efficientnet import VARIANTS, efficientnet_lite_features, from_published
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.mobilenet import mobilenet_v2_features
from ros2_ood_seg.weights.store import WeightFile, load_into

CLASS_NAMES = ("drivable", "non-drivable", "living things", "vehicles", "road-side objects", "far objects", "sky")
"""The in-distribution classes, level 1 of the IDD label hierarchy."""

STRIDE = 32
"""Network inputs must be multiples of this in height and width."""

OUTPUT_STRIDE = 4
"""Input pixels per output pixel."""

MOBILENET_V2 = "mobilenet_v2"
ENCODERS = (MOBILENET_V2, *VARIANTS)
"""Names of the features that the network can be built on."""

_MOBILENET_TAPS = ((3, 6, 13, 17), (24, 32, 96, 320))


class CompactOutput(NamedTuple):
    """What the network says, at a quarter of the input resolution.

    Args:
        class_logits: (B, 7, h/4, w/4) of the in-distribution classes.
        outlier_logit: (B, h/4, w/4), higher = more anomalous; 0 is even odds under the training mixture.
    """

    class_logits: Tensor
    outlier_logit: Tensor


class CompactNet(nn.Module):
    """Features at /4, /8, /16 and /32, summed top-down, concatenated at /8 and refined at /4.

    The batch norms of the features are fused into the convolutions, so training and inference compute the same function.

    Args:
        width: Channels of the decoder.
        num_classes: In-distribution classes.
        encoder: One of :data:`ENCODERS`.

    Raises:
        InputError: Another encoder.
    """

    def __init__(self, width: int = 64, num_classes: int = len(CLASS_NAMES), encoder: str = MOBILENET_V2) -> None:
        super().__init__()
        self.encoder = encoder
        features, self.taps, channels = _encoder(encoder)
        self.features = _fused(features)
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, width, 1) for inputs in channels)
        self.context = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.merge = nn.Sequential(nn.Conv2d(3 * width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.refine = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.class_head = nn.Conv2d(width, num_classes, 1)
        self.outlier_head = nn.Conv2d(width, 1, 1)

    @classmethod
    def of(cls, weights: WeightFile) -> CompactNet:
        """The network of a scorer's weights, with them.

        Raises:
            WeightsError: The file is of another network.
        """
        encoder = str(weights.metadata.get("encoder", MOBILENET_V2))
        if encoder not in ENCODERS:
            raise WeightsError(f"weights file '{weights.path}' is built on '{encoder}', known are {', '.join(ENCODERS)}")
        net = cls(encoder=encoder)
        load_into(net, weights, "compact_scorer")
        return net

    def load_imagenet_features(self, weights: WeightFile) -> None:
        """Starts the features from ImageNet weights.

        Args:
            weights: A state dict of torchvision's ``mobilenet_v2().features``, or of an EfficientNet-Lite in the published PyTorch layout.

        Raises:
            WeightsError: The file is of another network.
        """
        if self.encoder == MOBILENET_V2:
            features, family = mobilenet_v2_features(), "torchvision mobilenet_v2 features"
            state = {key.removeprefix("features."): value for key, value in weights.state.items() if not key.startswith("classifier.")}
        else:
            features, family = _encoder(self.encoder)[0], f"{self.encoder} with ImageNet classes"
            state = from_published(weights.state)
        load_into(features, WeightFile(weights.path, state, weights.metadata), family)
        self.features.load_state_dict(_fused(features[: self.taps[-1] + 1]).state_dict())

    def forward(self, image: Tensor, trainable_from: int = 0) -> CompactOutput:
        """Runs the network.

        Args:
            image: (B, 3, h, w) float RGB in [0, 255], h and w multiples of :data:`STRIDE`.
            trainable_from: Feature blocks below this index build no graph, which saves training time.
        """
        refined = self.refined(image, trainable_from)
        return CompactOutput(self.class_head(refined), self.outlier_head(refined)[:, 0])

    def refined(self, image: Tensor, trainable_from: int = 0) -> Tensor:
        """(B, width, h/4, w/4) features that the heads read; see :meth:`forward`."""
        x = (image - 127.5) / 127.5
        taps: list[Tensor] = []
        for index, block in enumerate(self.features):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= trainable_from):
                x = block(x)
            if index in self.taps:
                taps.append(x)
        c2, c3, c4, c5 = (lateral(tap) for lateral, tap in zip(self.lateral, taps, strict=True))
        p5 = c5 + self.context(c5)
        p4 = c4 + _resize_like(p5, c4)
        p3 = c3 + _resize_like(p4, c3)
        merged = self.merge(torch.cat([p3, _resize_like(p4, c3), _resize_like(p5, c3)], dim=1))
        return cast("Tensor", self.refine(c2 + _resize_like(merged, c2)))


class MergedHeads(nn.Module):
    """The network for inference: both heads as one convolution, whose eight channels fill a vector register.

    Args:
        net: In evaluation mode; its other parts are shared, not copied.
    """

    def __init__(self, net: CompactNet) -> None:
        super().__init__()
        heads = (net.class_head, net.outlier_head)
        self.num_classes = net.class_head.out_channels
        self.head = nn.Conv2d(net.class_head.in_channels, sum(head.out_channels for head in heads), 1)
        self.head.weight.data = torch.cat([head.weight.detach() for head in heads])
        cast("Tensor", self.head.bias).data = torch.cat([cast("Tensor", head.bias).detach() for head in heads])
        self.net = net

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """(B, classes + 1, h/4, w/4) class logits, then the outlier logit; see :meth:`CompactNet.forward`."""
        return (self.head(self.net.refined(image)),)


def _resize_like(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _encoder(name: str) -> tuple[nn.Sequential, tuple[int, ...], tuple[int, ...]]:
    """Layers, and of those that end the strides 4 to 32 the indices and channels."""
    if name == MOBILENET_V2:
        taps, channels = _MOBILENET_TAPS
        return mobilenet_v2_features()[: taps[-1] + 1], taps, channels
    if name not in VARIANTS:
        raise InputError(f"encoder is '{name}', allowed: {', '.join(ENCODERS)}")
    return efficientnet_lite_features(name)


def _fused(features: nn.Sequential) -> nn.Sequential:
    features.eval()
    for module in list(features.modules()):
        if not isinstance(module, nn.Sequential):
            continue
        for index in range(len(module) - 1):
            conv, norm = module[index], module[index + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module[index] = fuse_conv_bn_eval(conv, norm)
                module[index + 1] = nn.Identity()
    # The fused biases come without gradients.
    return features.requires_grad_()
