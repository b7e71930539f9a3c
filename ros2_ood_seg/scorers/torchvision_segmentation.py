"""Any of torchvision's DeepLabV3 and LR-ASPP networks as a scorer, with the plain score functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models import segmentation

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers.network import CITYSCAPES_CLASSES, NetworkScorer, RawScores, finite, logit_score, read_checkpoint, ready
from ros2_ood_seg.scorers.networks.deeplab import normalise_imagenet

_CLASS_NAMES = {
    len(CITYSCAPES_CLASSES): CITYSCAPES_CLASSES,
    21: tuple(segmentation.DeepLabV3_ResNet50_Weights.DEFAULT.meta["categories"]),
}


def build(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``torchvision_segmentation``: architecture and number of classes are those of the weights, the default score is MSP."""
    name, score = logit_score(config, "msp")
    weights = read_checkpoint(config, runtime, "torchvision_segmentation", ("torchvision_segmentation",), unused=("aux_classifier.",))
    network = ready(_network_like, weights, "torchvision DeepLabV3 or LR-ASPP", runtime)

    def method(image: Tensor) -> RawScores:
        with runtime.autocast():
            output = network(normalise_imagenet(image))["out"]
        logits = finite(output, config.name)[0]
        return RawScores(score(logits), logits.argmax(dim=0))

    return NetworkScorer(method, name, weights.path, _CLASS_NAMES.get(_num_classes(weights.state), ()), config)


def _num_classes(state: Mapping[str, Tensor]) -> int:
    last = "classifier.high_classifier.weight" if "classifier.cbr.0.weight" in state else "classifier.4.weight"
    return int(state[last].shape[0])


def _network_like(state: Mapping[str, Tensor]) -> nn.Module:
    """The untrained network a state dict belongs to, on the meta device."""
    if "classifier.cbr.0.weight" in state:
        constructor: Any = segmentation.lraspp_mobilenet_v3_large
    elif "backbone.layer3.22.conv1.weight" in state:
        constructor = segmentation.deeplabv3_resnet101
    elif "backbone.layer4.0.conv1.weight" in state:
        constructor = segmentation.deeplabv3_resnet50
    else:
        constructor = segmentation.deeplabv3_mobilenet_v3_large
    with torch.device("meta"):
        return cast("nn.Module", constructor(weights=None, weights_backbone=None, num_classes=_num_classes(state)))
