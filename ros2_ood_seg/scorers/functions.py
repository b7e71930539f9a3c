"""Score functions: network outputs to a per-pixel anomaly score, higher = more anomalous.

Class logits are (..., K, h, w) with the classes on axis -3; scores are (..., h, w) float32 on the same device.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from ros2_ood_seg.errors import InputError

CLASS_AXIS = -3


def msp(class_logits: Tensor) -> Tensor:
    """One minus the maximum softmax probability, in [0, 1 - 1/K] (Hendrycks and Gimpel, 2017)."""
    return 1.0 - class_logits.float().softmax(CLASS_AXIS).amax(CLASS_AXIS)


def entropy(class_logits: Tensor) -> Tensor:
    """Softmax entropy to base K, so in [0, 1]: S2M Eq. 1 divided by log K, as Meta-OoD and SegmentMeIfYouCan normalise it.

    Raises:
        InputError: There are fewer than two classes.
    """
    classes = class_logits.shape[CLASS_AXIS]
    if classes < 2:
        raise InputError(f"entropy needs at least 2 classes, got {classes}")
    log_p = F.log_softmax(class_logits.float(), CLASS_AXIS)
    return -(log_p.exp() * log_p).sum(CLASS_AXIS) / math.log(classes)


def energy(class_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Free energy ``-T * logsumexp(f / T)``: S2M Eq. 2 with the logarithm that its print lacks and its code has.

    Raises:
        InputError: The temperature is not positive and finite.
    """
    if not 0.0 < temperature < math.inf:
        raise InputError(f"temperature is {temperature}, allowed: a finite number above 0")
    return -temperature * (class_logits.float() / temperature).logsumexp(CLASS_AXIS)


def max_logit(class_logits: Tensor) -> Tensor:
    """Negative maximum logit (Hendrycks et al., 2022)."""
    return -class_logits.float().amax(CLASS_AXIS)


def hybrid(class_logits: Tensor, outlier_logit: Tensor) -> Tensor:
    """Outlier logit plus free energy, the log of P(outlier) / p(x) up to a constant (DenseHybrid, Grcić et al., 2022).

    Args:
        class_logits: (..., K, h, w).
        outlier_logit: (..., h, w).
    """
    return outlier_logit.float() + energy(class_logits)
