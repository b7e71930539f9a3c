"""UGainS: mean score per mask, greedy mask NMS, sum of instance scores and score map (section 3.3)."""

from __future__ import annotations

from torch import Tensor

from ros2_ood_seg.config import FusionConfig
from ros2_ood_seg.fusion.ensemble import ensemble
from ros2_ood_seg.fusion.nms import greedy_nms
from ros2_ood_seg.fusion.overlaps import measure_masks
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Fused, Masks, Prompts, ScoreMap

_EMPTY_SCORE = -1.0
"""What kumuji/ugains puts for the mean score of a mask without pixels."""


class UgainsFusion:
    """Ranks masks by their mean raw score; see :func:`ros2_ood_seg.fusion.ensemble.ensemble` for the refined map."""

    def __init__(self, config: FusionConfig) -> None:
        self._config = config

    def __call__(self, score_map: ScoreMap, prompts: Prompts, masks: Masks, ignore: Tensor | None = None) -> Fused:
        """See :class:`ros2_ood_seg.fusion.base.Fusion`."""
        config = self._config
        measures = measure_masks(masks.masks, score_map.scores, ignore, empty_score=_EMPTY_SCORE)
        scores = score_map.calibration.to_unit(measures.mean_score)
        kept = greedy_nms(measures.iou(), measures.mean_score, config.nms_iou)
        kept = kept[measures.usable(config, scores)[kept]]
        refined = ensemble(config, score_map, masks, measures, kept, measures.mean_score[kept], ignore)
        return Fused(measures.instances(config, masks, kept, scores, measures.mean_score), refined)


def build(config: FusionConfig, runtime: Runtime) -> UgainsFusion:
    """Factory for the registry."""
    return UgainsFusion(config)
