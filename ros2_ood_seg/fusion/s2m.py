"""S2M: the union of all masks, each with the confidence of its box (section 3.2)."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ros2_ood_seg.config import FusionConfig
from ros2_ood_seg.fusion.overlaps import MaskMeasures, inside_scores, mask_scored, measure_masks, reported, strong
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Fused, Instances, Masks, Prompts, ScoreMap


class S2mFusion:
    """The refined map holds the lowest confidence of the masks at each pixel, 0 outside all of them.

    Instances are unions of masks that overlap (``merge_overlap``), with score and confidence of the best among them; the confidence is
    the raw score. The score is the confidence itself with ``box_weight: 1`` and ``quality_power: 0``, as published. Otherwise it is
    ``q * ((1 - w) * m + w * confidence)`` as in :class:`~ros2_ood_seg.fusion.hybrid.HybridFusion`: with a ``min_score`` masks are left out
    whose boxes hold little score, or whose outline is doubtful, though the detector was sure. A mask that came from a point, which S2M
    itself does not use, has the calibrated score inside it (``inside_quantile``) as confidence.
    """

    def __init__(self, config: FusionConfig) -> None:
        self._config = config

    def __call__(self, score_map: ScoreMap, prompts: Prompts, masks: Masks, ignore: Tensor | None = None) -> Fused:
        """See :class:`ros2_ood_seg.fusion.base.Fusion`."""
        config = self._config
        calibration = score_map.calibration
        measures = measure_masks(masks.masks, score_map.scores, ignore, empty_score=calibration.raw[0])
        inside = calibration.to_unit(inside_scores(config, masks.masks, score_map.scores, measures))
        confidence = torch.cat([prompts.confidence, inside[prompts.num_boxes :]])
        scores = mask_scored(config, torch.lerp(inside, confidence, config.box_weight), masks.quality)
        usable = measures.usable(config) & strong(config, scores)
        if config.compat == "paper":
            order = torch.argsort(confidence, descending=True, stable=True)
        else:
            order = torch.arange(len(masks), device=usable.device)
        order = order[usable[order]]
        refined = torch.zeros_like(score_map.scores)
        for n in order.tolist():
            rows, columns = measures.windows[n]
            window = refined[rows, columns]
            window.copy_(torch.where(masks.masks[n, rows, columns], confidence[n], window))
        if ignore is not None:
            refined.masked_fill_(ignore, 0.0)
        return Fused(self._merged(masks, measures, order, scores, confidence), refined)

    def _merged(self, masks: Masks, measures: MaskMeasures, order: Tensor, scores: Tensor, confidence: Tensor) -> Instances:
        """Unions of the masks at ``order`` that overlap, each with score, confidence and quality of its best member."""
        area = measures.area_px[order]
        overlap = measures.intersection_px[order][:, order] / torch.minimum(area[:, None], area[None, :])
        count, group = connected_components((overlap >= self._config.merge_overlap).cpu().numpy(), directed=False)
        members = order.cpu().numpy()
        unions = measures.unions(masks.masks, [members[group == label].tolist() for label in range(count)])
        ranked = np.argsort(-scores[order].cpu().numpy(), kind="stable")
        _, first = np.unique(group[ranked], return_index=True)
        best = order[torch.from_numpy(ranked[first]).to(order.device)]
        return Instances.from_masks(unions, reported(self._config, scores[best]), confidence[best], masks.quality[best])


def build(config: FusionConfig, runtime: Runtime) -> S2mFusion:
    """Factory for the registry."""
    return S2mFusion(config)
