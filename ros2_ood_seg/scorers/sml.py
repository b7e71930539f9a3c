"""Standardized max logits: Jung et al., ICCV 2021. Scores are negated here, so that higher is more anomalous."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers.network import CITYSCAPES_CLASSES, NetworkScorer, RawScores, finite, logit_score, read_checkpoint, ready
from ros2_ood_seg.scorers.networks.deeplab import upsample_aligned
from ros2_ood_seg.scorers.networks.deeplab_resnet101 import TRAINING_ONLY, DeepLabResNet101
from ros2_ood_seg.scorers.statistics import (
    MaxLogitStatistics,
    StatisticsSource,
    find_statistics,
    read_max_logit_statistics,
    statistics_path,
)
from ros2_ood_seg.weights.store import WeightFile

BOUNDARY_WIDTH = 4
"""Half-width in px of the class boundaries whose scores are replaced, and the number of steps (the release's defaults)."""

SMOOTHING_DILATION = 6
"""Pixels between the taps of the 7x7 Gaussian (the release's default)."""

_TAPS = 7
_SIGMA = 1.0


def build(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``sml``: standardized max logits with boundary suppression and dilated smoothing, or another score on the same network.

    The default score needs the class statistics: ``<weights>.statistics.json``, or the published ``cityscapes_mean.npy`` named by
    ``scorer.statistics`` with ``cityscapes_var.npy`` beside it.
    """
    network, weights, upsampled_logits = _network(config, runtime)
    if config.score == "default":
        path = find_statistics(config, weights.path, (".json", ".npy"))
        loaded = read_max_logit_statistics(path)
        statistics = MaxLogitStatistics(loaded.mean.to(runtime.device), loaded.variance.to(runtime.device))
        if len(statistics.mean) != network.num_classes:
            raise WeightsError(f"statistics '{path}' are of {len(statistics.mean)} classes, the network has {network.num_classes}")

        def method(image: Tensor) -> RawScores:
            scores, classes = standardized_max_logit(upsampled_logits(image), statistics)
            return RawScores(dilated_smoothing(suppress_boundaries(scores, classes)), classes)

        name = "sml"
    else:
        name, score = logit_score(config, "msp")

        def method(image: Tensor) -> RawScores:
            logits = upsampled_logits(image)
            return RawScores(score(logits), logits.argmax(dim=0))

    names = CITYSCAPES_CLASSES if network.num_classes == len(CITYSCAPES_CLASSES) else ()
    return NetworkScorer(method, name, weights.path, names, config)


def statistics_source(config: ScorerConfig, runtime: Runtime) -> StatisticsSource:
    """The max logit of each pixel of the upsampled logits, one value a pixel."""
    network, weights, upsampled_logits = _network(config, runtime)

    def observe(image: Tensor) -> tuple[Tensor, Tensor]:
        maximum, classes = upsampled_logits(image).flatten(1).max(dim=0)
        return maximum[None], classes

    return StatisticsSource(observe, network.num_classes, statistics_path(weights.path, ".json"))


def _network(config: ScorerConfig, runtime: Runtime) -> tuple[DeepLabResNet101, WeightFile, Callable[[Tensor], Tensor]]:
    """The network, its weights file, and its (K, h, w) logits of a network input."""
    weights = read_checkpoint(config, runtime, "sml", ("sml",), unused=TRAINING_ONLY)
    network = ready(DeepLabResNet101.like, weights, "DeepLabV3+ ResNet-101", runtime)

    def upsampled_logits(image: Tensor) -> Tensor:
        with runtime.autocast():
            logits = network(image)
        return upsample_aligned(finite(logits, config.name), image.shape[-2:])[0]

    return network, weights, upsampled_logits


def standardized_max_logit(logits: Tensor, statistics: MaxLogitStatistics) -> tuple[Tensor, Tensor]:
    """Negative max logit in standard deviations of its class (Eq. 3).

    Args:
        logits: (K, H, W) float32.
        statistics: Of K classes, on the same device.

    Returns:
        (H, W) float32 scores and (H, W) int64 predicted classes.
    """
    maximum, classes = logits.max(dim=0)
    return (statistics.mean[classes] - maximum) / statistics.variance.sqrt()[classes], classes


def suppress_boundaries(scores: Tensor, classes: Tensor, width_px: int = BOUNDARY_WIDTH) -> Tensor:
    """Iterative boundary suppression (section 3.3): scores near class boundaries become means of scores farther away.

    From outside to inside, each step takes the boundary dilated by ``width_px - 1, ..., 0`` px and gives its pixels the mean of
    those neighbours (3x3) that lie outside.

    Args:
        scores: (H, W) float32.
        classes: (H, W) predicted classes.
        width_px: Number of steps.

    Returns:
        (H, W) float32.
    """
    labels = classes.float()[None, None]
    eroded = -F.max_pool2d(-labels, 3, stride=1, padding=1)
    boundary = (_dilate(labels) != eroded).float()
    rings = [boundary]
    for _ in range(width_px - 1):
        rings.append(_dilate(rings[-1]))
    result = scores[None, None]
    box = torch.ones((1, 1, 3, 3), device=scores.device)
    for ring in reversed(rings):
        outside = 1.0 - ring
        total = F.conv2d(_pad(result * outside, 1), box)
        count = F.conv2d(_pad(outside, 1), box)
        result = torch.where((ring > 0) & (count > 0), total / count.clamp(min=1.0), result)
    return result[0, 0]


def dilated_smoothing(scores: Tensor, dilation: int = SMOOTHING_DILATION) -> Tensor:
    """7x7 Gaussian, sigma 1, whose taps lie ``dilation`` px apart (section 3.3); the border is repeated.

    Args:
        scores: (H, W) float32.
        dilation: Pixels between taps.

    Returns:
        (H, W) float32.
    """
    offsets = torch.arange(_TAPS, device=scores.device, dtype=torch.float32) - _TAPS // 2
    taps = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    taps = taps / taps.sum()
    padded = _pad(scores[None, None], dilation * (_TAPS // 2))
    rows = F.conv2d(padded, taps.view(1, 1, _TAPS, 1), dilation=(dilation, 1))
    return F.conv2d(rows, taps.view(1, 1, 1, _TAPS), dilation=(1, dilation))[0, 0]


def _dilate(x: Tensor) -> Tensor:
    """Dilation by a cross of 3 px: its repetition grows diamonds."""
    return torch.maximum(F.max_pool2d(x, (3, 1), stride=1, padding=(1, 0)), F.max_pool2d(x, (1, 3), stride=1, padding=(0, 1)))


def _pad(x: Tensor, by: int) -> Tensor:
    return F.pad(x, (by, by, by, by), mode="replicate")
