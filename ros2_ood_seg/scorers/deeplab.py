"""Scorers on DeepLabV3+: plain scores, Max-Entropy, PEBAL, RPL+CoroCL, DenseHybrid and Mahalanobis.

The network is WideResNet-38, as published, or the small MobileNetV2 that ``ood-seg train scorer`` makes.

========================  ============================================================  =======================================
scorer                    score                                                         reference
========================  ============================================================  =======================================
``deeplab_wrn38``         ``scorer.score``, by default MSP                              Zhu et al., CVPR 2019 (the network)
``deeplab_mobilenet_v2``  the same                                                      Sandler et al., CVPR 2018 (the network)
``max_entropy``           normalised entropy                                            Chan et al., ICCV 2021 (Meta-OoD)
``pebal``                 energy of the class outputs, blurred                          Tian et al., ECCV 2022
``rpl``                   energy of the logits with the residual, blurred               Liu et al., ICCV 2023 (RPL, RPL+CoroCL)
``dense_hybrid``          energy plus log-probability of being out of the data set      Grcic et al., ECCV 2022
``mahalanobis``           least squared Mahalanobis distance of the classifier's input  Lee et al., NeurIPS 2018
========================  ============================================================  =======================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers.functions import hybrid
from ros2_ood_seg.scorers.mahalanobis import upsampled_mahalanobis_distance
from ros2_ood_seg.scorers.network import (
    CITYSCAPES_CLASSES,
    NetworkScorer,
    RawScores,
    finite,
    logit_score,
    only_default_score,
    read_checkpoint,
    ready,
)
from ros2_ood_seg.scorers.networks.deeplab import upsample_aligned
from ros2_ood_seg.scorers.networks.deeplab_anomaly import AnomalyDeepLab
from ros2_ood_seg.scorers.networks.deeplab_mobilenet_v2 import DeepLabMobileNetV2
from ros2_ood_seg.scorers.networks.deeplab_wrn38 import DeepLabWideResNet38
from ros2_ood_seg.scorers.statistics import FeatureStatistics, StatisticsSource, find_statistics, read_feature_statistics, statistics_path
from ros2_ood_seg.weights.store import WeightFile

PLAIN_FAMILIES = ("deeplab_wrn38", "deeplab_mobilenet_v2")
"""Families of segmentation networks without parts of an anomaly method."""

_BLUR_PX = 7
_ABSTENTION_OUTPUTS = len(CITYSCAPES_CLASSES) + 1
_MAHALANOBIS_WEIGHTS = ("deeplab_wrn38", ("pebal", *PLAIN_FAMILIES))


def build_plain(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``deeplab_wrn38``: any score function on the plain network."""
    return _build_logit_scorer(config, runtime, "deeplab_wrn38", ("deeplab_wrn38", "pebal"), "msp")


def build_mobilenet_v2(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``deeplab_mobilenet_v2``: any score function on the small network."""
    return _build_logit_scorer(config, runtime, "deeplab_mobilenet_v2", ("deeplab_mobilenet_v2",), "msp")


def build_max_entropy(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``max_entropy``: the network after entropy maximisation on outliers."""
    return _build_logit_scorer(config, runtime, "max_entropy", PLAIN_FAMILIES, "entropy")


def build_pebal(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``pebal``: the abstention output takes part in training only."""
    return _build_logit_scorer(config, runtime, "pebal", ("pebal", *PLAIN_FAMILIES), "energy", _BLUR_PX)


def build_rpl(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``rpl``: scores from the logits with the residual, classes from those without."""
    return _build_logit_scorer(config, runtime, "rpl", ("rpl",), "energy", _BLUR_PX)


def build_dense_hybrid(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``dense_hybrid``: likelihood and data-set posterior together."""
    only_default_score(config)
    network, weights = _network(config, runtime, "dense_hybrid", ("dense_hybrid",))

    def method(image: Tensor) -> RawScores:
        with runtime.autocast():
            output = network(image)
        logits = upsample_aligned(finite(output.logits, config.name), image.shape[-2:])[0]
        posterior = upsample_aligned(finite(output.ood_logits, config.name), image.shape[-2:])[0]
        return RawScores(hybrid(logits, torch.log_softmax(posterior, dim=0)[1]), logits.argmax(dim=0))

    return NetworkScorer(method, "hybrid", weights.path, _class_names(network), config)


def build_mahalanobis(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``mahalanobis``: needs estimates, ``<weights>.statistics.h5`` or ``.safetensors`` or what ``scorer.statistics`` names."""
    only_default_score(config)
    network, weights = _network(config, runtime, *_MAHALANOBIS_WEIGHTS)
    path = find_statistics(config, weights.path, (".safetensors", ".h5"))
    loaded = read_feature_statistics(path)
    statistics = FeatureStatistics(loaded.mean.to(runtime.device), loaded.inverse.to(runtime.device))
    expected = cast("nn.Conv2d", network.final[-1]).in_channels
    if statistics.mean.shape[1] != expected:
        raise WeightsError(f"statistics '{path}' are of {statistics.mean.shape[1]} features, the network has {expected}")

    def method(image: Tensor) -> RawScores:
        with runtime.autocast():
            features = network.penultimate(image)
        return RawScores(*upsampled_mahalanobis_distance(finite(features, config.name)[0], statistics, image.shape[-2:]))

    names = CITYSCAPES_CLASSES if len(statistics.mean) == len(CITYSCAPES_CLASSES) else ()
    return NetworkScorer(method, "distance", weights.path, names, config)


def mahalanobis_statistics_source(config: ScorerConfig, runtime: Runtime) -> StatisticsSource:
    """The classifier's input at the network's resolution, one vector a pixel."""
    network, weights = _network(config, runtime, *_MAHALANOBIS_WEIGHTS)
    known = _known_outputs(network)

    def observe(image: Tensor) -> tuple[Tensor, Tensor]:
        with runtime.autocast():
            features = network.penultimate(image)
            logits = network.final[-1](features)[:, known]
        return finite(features, config.name)[0].flatten(1), logits[0].flatten(1).argmax(dim=0)

    classes = len(range(network.num_classes)[known])
    return StatisticsSource(observe, classes, statistics_path(weights.path, ".safetensors"))


def _build_logit_scorer(
    config: ScorerConfig, runtime: Runtime, weights_name: str, families: tuple[str, ...], default: str, blur_px: int = 1
) -> NetworkScorer:
    score_name, score = logit_score(config, default)
    network, weights = _network(config, runtime, weights_name, families)
    known = _known_outputs(network)

    def method(image: Tensor) -> RawScores:
        with runtime.autocast():
            output = network(image)
        logits = upsample_aligned(finite(output.logits[:, known], config.name), image.shape[-2:])[0]
        classes = logits.argmax(dim=0)
        if output.residual_logits is not None:
            logits = upsample_aligned(finite(output.residual_logits[:, known], config.name), image.shape[-2:])[0]
        return RawScores(score(logits), classes)

    return NetworkScorer(method, score_name, weights.path, _class_names(network), config, blur_px)


def like(state: Mapping[str, Tensor], **changed: int | bool) -> AnomalyDeepLab:
    """The untrained DeepLabV3+ that a state dict belongs to, on the meta device; ``changed`` are arguments that differ."""
    return DeepLabMobileNetV2.like(state, **changed) if "features.0.0.weight" in state else DeepLabWideResNet38.like(state, **changed)


def _network(config: ScorerConfig, runtime: Runtime, weights_name: str, families: tuple[str, ...]) -> tuple[AnomalyDeepLab, WeightFile]:
    weights = read_checkpoint(config, runtime, weights_name, families)
    return ready(like, weights, "DeepLabV3+", runtime), weights


def _known_outputs(network: AnomalyDeepLab) -> slice:
    """The outputs that stand for classes: the abstention output of PEBAL does not."""
    return slice(len(CITYSCAPES_CLASSES)) if network.num_classes == _ABSTENTION_OUTPUTS else slice(None)


def _class_names(network: AnomalyDeepLab) -> tuple[str, ...]:
    return CITYSCAPES_CLASSES if network.num_classes in (len(CITYSCAPES_CLASSES), _ABSTENTION_OUTPUTS) else ()
