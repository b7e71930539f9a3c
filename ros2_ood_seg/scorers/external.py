"""A score map that comes from elsewhere: a file or a topic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Calibration, ScoreMap

MAX_ASPECT_ERROR = 0.02
"""Greatest relative difference between the aspect ratios of map and image."""


def build(config: ScorerConfig, runtime: Runtime) -> ExternalScorer:
    """The scorer that passes outside maps on.

    Raises:
        InputError: ``external_low`` is not below ``external_high``.
    """
    if config.external_low >= config.external_high:
        raise InputError(f"scorer.external_low is {config.external_low}, it must be below scorer.external_high ({config.external_high})")
    return ExternalScorer(Calibration.linear(config.external_low, config.external_high))


class ExternalScorer:
    """Checks an outside map and scales it to the image.

    Args:
        calibration: Maps its raw range to [0, 1].
    """

    name = "external"

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration

    def __call__(self, image: Tensor, external: Tensor | None = None) -> ScoreMap:
        """Takes over the map; see :class:`~ros2_ood_seg.scorers.base.Scorer`."""
        if external is None:
            raise InputError("scorer 'external' needs a score map with each image, got none")
        if external.ndim != 2 or not external.numel():
            raise InputError(f"external score map has shape {tuple(external.shape)}, allowed: (h, w)")
        scores = external.to(image.device, torch.float32).contiguous()
        finite = torch.isfinite(scores)
        if not finite.all():
            raise InputError(f"external score map holds {int((~finite).sum())} NaN or infinite values of {scores.numel()}")
        height, width = int(image.shape[0]), int(image.shape[1])
        h, w = int(scores.shape[0]), int(scores.shape[1])
        # One pixel more or less is rounding, not another shape.
        if abs(h * width - w * height) > MAX_ASPECT_ERROR * w * height + max(height, width):
            raise InputError(f"external score map is {w}x{h}, its aspect ratio differs from the image's {width}x{height}")
        if (h, w) != (height, width):
            scores = F.interpolate(scores[None, None], size=(height, width), mode="bilinear", antialias=h > height, align_corners=False)[
                0, 0
            ]
        return ScoreMap(scores, self.name, self._calibration)
