"""S2M: the union of all masks, each with the confidence of its box (section 3.2)."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ros2_ood_seg.config import FusionConfig
from ros2_ood_seg.fusion.overlaps import measure_masks, write_inside
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Fused, Instances, Masks, Prompts, ScoreMap


class S2mFusion:
    """The refined map holds the lowest confidence of the masks at each pixel, 0 outside all of them.

    Instances are unions of masks that overlap (``merge_overlap``), with the highest confidence among them as score and raw score. A
    mask that came from a point, which S2M itself does not use, has the calibrated mean score inside it as confidence.
    """

    def __init__(self, config: FusionConfig) -> None:
        self._config = config

    def __call__(self, score_map: ScoreMap, prompts: Prompts, masks: Masks, ignore: Tensor | None = None) -> Fused:
        """See :class:`ros2_ood_seg.fusion.base.Fusion`."""
        config = self._config
        calibration = score_map.calibration
        measures = measure_masks(masks.masks, score_map.scores, ignore, empty_score=calibration.raw[0])
        confidence = torch.cat([prompts.confidence, calibration.to_unit(measures.mean_score[prompts.num_boxes :])])
        usable = measures.usable(config, confidence)
        if config.compat == "paper":
            order = torch.argsort(confidence, descending=True, stable=True)
        else:
            order = torch.arange(len(masks), device=usable.device)
        order = order[usable[order]]
        chosen, confidence, quality = masks.masks[order], confidence[order], masks.quality[order]
        refined = torch.zeros_like(score_map.scores)
        write_inside(refined, chosen, confidence, [measures.boxes_xyxy[n] for n in order.tolist()])
        if ignore is not None:
            refined.masked_fill_(ignore, 0.0)

        area = measures.area_px[order]
        overlap = measures.intersection_px[order][:, order] / torch.minimum(area[:, None], area[None, :])
        _, group = connected_components((overlap >= config.merge_overlap).cpu().numpy(), directed=False)
        merged, best = [], []
        for label in range(int(group.max()) + 1 if len(group) else 0):
            members = torch.from_numpy(np.flatnonzero(group == label)).to(confidence.device)
            merged.append(chosen[members].any(dim=0))
            best.append(members[confidence[members].argmax()])
        if not merged:
            return Fused(Instances.empty(score_map.shape_hw, score_map.device), refined)
        index = torch.stack(best)
        return Fused(Instances.from_masks(torch.stack(merged), confidence[index], confidence[index], quality[index]), refined)


def build(config: FusionConfig, runtime: Runtime) -> S2mFusion:
    """Factory for the registry."""
    return S2mFusion(config)
