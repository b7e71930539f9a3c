"""S2M's boxes and UGainS's points together: one NMS over both, one score scale, one refined map."""

from __future__ import annotations

import torch
from torch import Tensor

from ros2_ood_seg.config import FusionConfig
from ros2_ood_seg.fusion.ensemble import ensemble
from ros2_ood_seg.fusion.nms import drop_contained, greedy_nms
from ros2_ood_seg.fusion.overlaps import inside_scores, mask_scored, measure_masks, reported, strong
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Fused, Instances, Masks, Prompts, ScoreMap


class HybridFusion:
    """Ranks masks of both kinds of prompts by one score.

    ``score = q * ((1 - w) * m + w * max_b(confidence_b * IoU(mask, mask_b)))`` with w = ``box_weight``, m the calibrated score
    inside the mask (``inside_quantile``), b over all box prompts, and q the mask's predicted IoU to the power of ``quality_power``.
    A box's own mask counts with its full confidence, and a point's mask with that of a box that found the same object, so that both
    kinds compete on one scale. The ensemble adds the mean score inside as in UGainS: the detector says which masks there are, not how
    anomalous their pixels are.
    The mask of a box grows by those of other boxes that lie in it (``merge_overlap``), as in S2M, so that large objects keep all
    their parts; unlike there, a larger mask around a better, smaller one does not take it in.
    A mask that lies in a better one counts in the ensemble but is no instance of its own: points give parts of what boxes give whole.
    Neither is one that scores below ``min_score``.
    """

    def __init__(self, config: FusionConfig) -> None:
        self._config = config

    def __call__(self, score_map: ScoreMap, prompts: Prompts, masks: Masks, ignore: Tensor | None = None) -> Fused:
        """See :class:`ros2_ood_seg.fusion.base.Fusion`."""
        config = self._config
        calibration = score_map.calibration
        measures = measure_masks(masks.masks, score_map.scores, ignore, empty_score=calibration.raw[0])
        iou = measures.iou()
        support = torch.zeros_like(measures.mean_score)
        if prompts.num_boxes:
            support = (iou[:, : prompts.num_boxes] * prompts.confidence).amax(dim=1).float()
        inside = calibration.to_unit(inside_scores(config, masks.masks, score_map.scores, measures))
        scores = torch.lerp(inside, support, config.box_weight)
        scores = mask_scored(config, scores, masks.quality)
        kept = greedy_nms(iou, scores, config.nms_iou)
        usable, lies_in = measures.usable(config), measures.inside()
        kept = kept[usable[kept]]
        refined = ensemble(config, score_map, masks, measures, kept, measures.mean_score[kept], ignore)
        reportable = usable & strong(config, scores)
        whole = drop_contained(lies_in, kept[reportable[kept]], config.nms_containment)
        of_boxes = torch.nonzero(reportable[: prompts.num_boxes]).squeeze(1)
        groups = _joined(whole.tolist(), set(of_boxes.tolist()), (lies_in >= config.merge_overlap).cpu())
        best = whole.new_tensor([group[0] for group in groups])
        unions = measures.unions(masks.masks, groups)
        return Fused(Instances.from_masks(unions, reported(config, scores[best]), measures.mean_score[best], masks.quality[best]), refined)


def _joined(whole: list[int], of_boxes: set[int], lies_in: Tensor) -> list[list[int]]:
    """The masks of each instance, its best first: a box's takes in those of other boxes that lie in it.

    Args:
        whole: Instances before, best first.
        of_boxes: Masks of boxes that are good enough to be reported.
        lies_in: (N, N) bool, whether the row's mask mostly lies in the column's, on the host.
    """
    groups, free = [], set(of_boxes)
    for n in whole:
        if n not in of_boxes:
            groups.append([n])
        elif n in free:
            groups.append([n, *(k for k in free if k != n and lies_in[k, n])])
            free.difference_update(groups[-1])
    return groups


def build(config: FusionConfig, runtime: Runtime) -> HybridFusion:
    """Factory for the registry."""
    return HybridFusion(config)
