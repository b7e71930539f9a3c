"""Scorers on SegFormer: plain scores, and the likelihood of GMMSeg (Liang et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.runtime import Runtime
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
from ros2_ood_seg.scorers.networks.deeplab import normalise_imagenet
from ros2_ood_seg.scorers.networks.segformer import TRAINING_ONLY, GmmSeg, SegFormer
from ros2_ood_seg.scorers.transformers_folder import find_folder, load_folder
from ros2_ood_seg.weights.store import WEIGHTS_NAME


def build_plain(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``segformer``: any score function, by default MSP, on a checkpoint of mmsegmentation or a folder of transformers.

    Raises:
        InputError: Another score, or transformers is needed and not installed.
        WeightsError: Missing, damaged, or of another network.
    """
    name, score = logit_score(config, "msp")
    folder = find_folder(config.weights or "segformer", runtime)
    network, classes, path = _from_checkpoint(config, runtime) if folder is None else _from_folder(folder, config, runtime)

    def method(image: Tensor) -> RawScores:
        with runtime.autocast():
            output = network(image)
        logits = _upsampled(output, image, config.name)
        return RawScores(score(logits), logits.argmax(dim=0))

    return NetworkScorer(method, name, path, _class_names(classes), config)


def build_gmmseg(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``gmmseg``: no component of any class makes the pixel's features likely; errors as in :func:`build_plain`."""
    only_default_score(config)
    weights = read_checkpoint(config, runtime, "gmmseg", ("gmmseg",), unused=TRAINING_ONLY)
    network = ready(GmmSeg.like, weights, "GMMSeg on SegFormer", runtime)

    def method(image: Tensor) -> RawScores:
        with runtime.autocast():
            output = network(image)
        log_likelihoods = _upsampled(output.log_likelihoods, image, config.name)
        return RawScores(-log_likelihoods.amax(dim=0), _upsampled(output.logits, image, config.name).argmax(dim=0))

    return NetworkScorer(method, "likelihood", weights.path, _class_names(network.num_classes), config)


def _from_checkpoint(config: ScorerConfig, runtime: Runtime) -> tuple[Callable[[Tensor], Tensor], int, Path]:
    weights = read_checkpoint(config, runtime, "segformer", ("segformer",))
    network = ready(SegFormer.like, weights, "SegFormer", runtime)
    return network, network.num_classes, weights.path


def _from_folder(folder: Path, config: ScorerConfig, runtime: Runtime) -> tuple[Callable[[Tensor], Tensor], int, Path]:
    model = load_folder(folder, "SegformerForSemanticSegmentation", config.name, runtime)
    return lambda image: cast("Tensor", model(normalise_imagenet(image)).logits), int(model.config.num_labels), folder / WEIGHTS_NAME


def _upsampled(x: Tensor, image: Tensor, scorer: str) -> Tensor:
    return F.interpolate(finite(x, scorer), size=image.shape[-2:], mode="bilinear", align_corners=False)[0]


def _class_names(classes: int) -> tuple[str, ...]:
    return CITYSCAPES_CLASSES if classes == len(CITYSCAPES_CLASSES) else ()
