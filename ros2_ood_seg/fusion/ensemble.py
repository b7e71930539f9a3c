"""The refined score map of UGainS: instance scores added to the pixel scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ros2_ood_seg.config import FusionConfig
from ros2_ood_seg.fusion.overlaps import MaskMeasures
from ros2_ood_seg.types import Masks, ScoreMap


def ensemble(
    config: FusionConfig, score_map: ScoreMap, masks: Masks, measures: MaskMeasures, kept: Tensor, values: Tensor, ignore: Tensor | None
) -> Tensor:
    """``A + U`` with ``A(x)`` what the masks that contain x add (UGainS section 3.3, kumuji/ugains ``sam_sampling.py``).

    With ``floor: value``, as published: the sum of their scores, and pixels where A is 0 get ``floor_value``. Published scores are
    negative, so overlapping masks lower the sum, and the value is right for one scorer only. With ``floor: calibration`` the greatest
    ``max(0, score - zero) * predicted IoU``, where ``zero`` is the raw score whose calibrated value is ``floor_unit`` and the IoU is 1
    where the segmenter gives none, and pixels outside get 0: no mask lowers a pixel, nested masks of one object count once, doubtful
    masks count less, and it holds for any scorer. Ignored pixels get the scorer's lowest calibrated raw score and no instance score.

    Args:
        config: Floor settings.
        score_map: The scorer's map, U.
        masks: N masks.
        measures: Where they are.
        kept: (K,) int64 indices of the masks that count.
        values: (K,) float32 their scores in the scorer's range.
        ignore: (H, W) bool or None.

    Returns:
        (H, W) float32.
    """
    calibration = score_map.calibration
    relative = config.floor == "calibration"
    if relative:
        values = values.sub(calibration.to_raw(config.floor_unit)).clamp_(min=0.0) * masks.quality[kept].nan_to_num(nan=1.0)
    total = torch.zeros_like(score_map.scores)
    for n, value in zip(kept.tolist(), values, strict=True):
        window = total[measures.windows[n]]
        added = masks.masks[n][measures.windows[n]] * value
        torch.maximum(window, added, out=window) if relative else window.add_(added)
    scores = score_map.scores
    if ignore is not None:
        total.masked_fill_(ignore, 0.0)
        scores = scores.masked_fill(ignore, calibration.raw[0])
    if not relative:
        total.masked_fill_(total == 0.0, config.floor_value)
    return total.add_(scores)
