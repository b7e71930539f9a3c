"""UGainS: mean score per mask, greedy mask NMS, sum of instance scores and score map (section 3.3)."""

from __future__ import annotations

from torch import Tensor

from ros2_ood_seg.config import FusionConfig
from ros2_ood_seg.fusion.ensemble import ensemble
from ros2_ood_seg.fusion.nms import drop_contained, greedy_nms
from ros2_ood_seg.fusion.overlaps import inside_scores, mask_scored, measure_masks, strong
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Fused, Masks, Prompts, ScoreMap

_EMPTY_SCORE = -1.0
"""What kumuji/ugains puts for the mean score of a mask without pixels."""


class UgainsFusion:
    """Ranks masks by the score inside; see :func:`ros2_ood_seg.fusion.ensemble.ensemble` for the refined map.

    As published with ``inside_quantile: 0``, ``quality_power: 0``, ``nms_containment: 1`` and ``min_score: 0``. Otherwise a mask ranks by
    a quantile instead of the mean score, a doubtful mask ranks lower, and a part of a better mask, or one of low score, counts in the
    ensemble but is no instance of its own.
    """

    def __init__(self, config: FusionConfig) -> None:
        self._config = config

    def __call__(self, score_map: ScoreMap, prompts: Prompts, masks: Masks, ignore: Tensor | None = None) -> Fused:
        """See :class:`ros2_ood_seg.fusion.base.Fusion`."""
        config = self._config
        measures = measure_masks(masks.masks, score_map.scores, ignore, empty_score=_EMPTY_SCORE)
        inside = inside_scores(config, masks.masks, score_map.scores, measures)
        scores = mask_scored(config, score_map.calibration.to_unit(inside), masks.quality)
        # Calibrated scores end at 1, so the published ranking is by raw ones.
        ranking = scores if config.quality_power else inside
        kept = greedy_nms(measures.iou(), ranking, config.nms_iou)
        kept = kept[measures.usable(config)[kept]]
        refined = ensemble(config, score_map, masks, measures, kept, measures.mean_score[kept], ignore)
        whole = drop_contained(measures.inside(), kept[strong(config, scores)[kept]], config.nms_containment)
        return Fused(measures.instances(config, masks, whole, scores, measures.mean_score), refined)


def build(config: FusionConfig, runtime: Runtime) -> UgainsFusion:
    """Factory for the registry."""
    return UgainsFusion(config)
