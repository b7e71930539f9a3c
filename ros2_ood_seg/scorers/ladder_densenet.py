"""Scorers on Ladder-DenseNet-121: plain scores, and DenseHybrid as submitted to SegmentMeIfYouCan (Grcić et al., ECCV 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers.functions import hybrid
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
from ros2_ood_seg.scorers.networks.ladder_densenet import TRAINING_ONLY, LadderDenseNet
from ros2_ood_seg.weights.store import WeightFile


def build_plain(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``ldn121``: any score function on the class logits, by default MSP; a data-set posterior in the weights is left unused."""
    name, score = logit_score(config, "msp")
    network, weights = _network(config, runtime, "ldn121", ("ldn121", "dense_hybrid_ldn121"))

    def method(image: Tensor) -> RawScores:
        with runtime.autocast():
            output = network(image)
        logits = _upsampled(output.logits, image, config.name)
        return RawScores(score(logits), logits.argmax(dim=0))

    return NetworkScorer(method, name, weights.path, _class_names(network), config)


def build_dense_hybrid(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``dense_hybrid_ldn121``: likelihood and data-set posterior together."""
    only_default_score(config)
    network, weights = _network(config, runtime, "dense_hybrid_ldn121", ("dense_hybrid_ldn121",))

    def method(image: Tensor) -> RawScores:
        with runtime.autocast():
            output = network(image)
        logits = _upsampled(output.logits, image, config.name)
        posterior = _upsampled(output.ood_logits, image, config.name)
        return RawScores(hybrid(logits, torch.log_softmax(posterior, dim=0)[1]), logits.argmax(dim=0))

    return NetworkScorer(method, "hybrid", weights.path, _class_names(network), config)


def _network(config: ScorerConfig, runtime: Runtime, weights_name: str, families: tuple[str, ...]) -> tuple[LadderDenseNet, WeightFile]:
    weights = read_checkpoint(config, runtime, weights_name, families, unused=TRAINING_ONLY)
    return ready(LadderDenseNet.like, weights, "Ladder-DenseNet-121", runtime), weights


def _upsampled(x: Tensor, image: Tensor, scorer: str) -> Tensor:
    return F.interpolate(finite(x, scorer), size=image.shape[-2:], mode="bilinear", align_corners=False)[0]


def _class_names(network: LadderDenseNet) -> tuple[str, ...]:
    return CITYSCAPES_CLASSES if network.num_classes == len(CITYSCAPES_CLASSES) else ()
