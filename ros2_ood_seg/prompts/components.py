"""Boxes around the connected components of the thresholded score map: the baseline of both papers."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from ros2_ood_seg.config import BoxPromptsConfig
from ros2_ood_seg.prompts.candidates import candidate_pixels, raw_threshold
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Prompts, ScoreMap


class ComponentBoxes:
    """Tight boxes of 8-connected components; confidence is the mean calibrated score inside the component."""

    def __init__(self, config: BoxPromptsConfig) -> None:
        self._config = config

    def __call__(self, score_map: ScoreMap, ignore: Tensor | None = None) -> Prompts:
        """See :class:`ros2_ood_seg.prompts.base.PromptGenerator`."""
        config = self._config
        device = score_map.device
        candidates = candidate_pixels(score_map, raw_threshold(score_map.calibration, config.threshold), ignore)
        inside = candidates.cpu().numpy()
        count, labels, stats, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S)
        if count == 1:
            return Prompts.empty(device)
        calibrated = score_map.calibration.to_unit(score_map.scores[candidates]).cpu().numpy()
        area = stats[:, cv2.CC_STAT_AREA]
        confidence = np.bincount(labels[inside], weights=calibrated, minlength=count) / np.maximum(area, 1)
        kept = np.flatnonzero((area >= config.min_area_px) & (confidence >= config.min_confidence))
        # Label 0 is the background.
        kept = kept[kept > 0]
        kept = kept[np.argsort(-confidence[kept], kind="stable")][: config.max_boxes]
        x, y, width, height = stats[kept, :4].astype(np.float32).T
        boxes = np.stack([x, y, x + width, y + height], axis=1)
        boxes += config.margin * np.stack([-width, -height, width, height], axis=1)
        image_height, image_width = score_map.shape_hw
        boxes[:, 0::2] = boxes[:, 0::2].clip(0, image_width)
        boxes[:, 1::2] = boxes[:, 1::2].clip(0, image_height)
        return Prompts.from_boxes(
            torch.from_numpy(boxes).to(device), torch.from_numpy(confidence[kept].astype(np.float32)).clamp_(0.0, 1.0).to(device)
        )


def build(config: BoxPromptsConfig, runtime: Runtime) -> ComponentBoxes:
    """Factory for the registry; needs no weights and no device of its own."""
    return ComponentBoxes(config)
