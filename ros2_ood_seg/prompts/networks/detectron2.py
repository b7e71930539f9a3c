"""Reads detectron2's Faster R-CNN R50-FPN checkpoints, the format of S2M's released prompt generator.

Held against detectron2 itself (facebookresearch/detectron2@02b5c4e, CPU, float32) with four sets of random weights, two classes, on maps of
640x360, 517x331, 730x200 and 352x480 px: all 100 detections of each in the same order and class, boxes to 1.3e-4 px, confidences to 1.4e-6.
What is left comes from the order of float operations. Two known differences, without effect there: torchvision ranks proposals by the
sigmoid of their logit, which ties above 16, and drops boxes narrower than 0.01 px.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ros2_ood_seg.errors import WeightsError

_MARK = "backbone.bottom_up.stem.conv1.weight"
_NOT_LEARNT = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.")
_RULES: tuple[tuple[str, str], ...] = (
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.", "backbone.body.bn1."),
    (r"backbone\.bottom_up\.stem\.conv1\.", "backbone.body.conv1."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.norm\.", r"backbone.body.layer{stage}.\2.downsample.1."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.", r"backbone.body.layer{stage}.\2.downsample.0."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.norm\.", r"backbone.body.layer{stage}.\2.bn\3."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.", r"backbone.body.layer{stage}.\2.conv\3."),
    (r"backbone\.fpn_lateral(\d)\.", "backbone.fpn.inner_blocks.{level}.0."),
    (r"backbone\.fpn_output(\d)\.", "backbone.fpn.layer_blocks.{level}.0."),
    (r"proposal_generator\.rpn_head\.conv\.", "rpn.head.conv.0.0."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred."),
    (r"roi_heads\.box_head\.fc1\.", "roi_heads.box_head.fc6."),
    (r"roi_heads\.box_head\.fc2\.", "roi_heads.box_head.fc7."),
    (r"roi_heads\.box_predictor\.", "roi_heads.box_predictor."),
)


def is_detectron2_state(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a detectron2 detector with a ResNet-FPN."""
    return _MARK in state


def convert_detectron2_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames and reorders to :func:`~ros2_ood_seg.prompts.networks.rcnn.s2m_rcnn`'s state dict.

    detectron2 puts the background class last and regresses no box for it; torchvision puts it first and does. Nothing else
    about the values changes; the differences in computation are the model's (see ``rcnn.py``).

    Raises:
        WeightsError: A parameter that a Faster R-CNN with ResNet-FPN does not have, or no box predictor.
    """
    converted = {_rename(key): value for key, value in state.items() if not key.startswith(_NOT_LEARNT)}
    for kind in ("weight", "bias"):
        score_key, box_key = f"roi_heads.box_predictor.cls_score.{kind}", f"roi_heads.box_predictor.bbox_pred.{kind}"
        if score_key not in converted or box_key not in converted:
            raise WeightsError(f"detectron2 checkpoint has no '{score_key}' and '{box_key}': expected S2M's Faster R-CNN R50-FPN")
        scores, boxes = converted[score_key], converted[box_key]
        converted[score_key] = torch.cat([scores[-1:], scores[:-1]])
        converted[box_key] = torch.cat([torch.zeros_like(boxes[:4]), boxes])
    return converted


def _rename(key: str) -> str:
    for pattern, replacement in _RULES:
        match = re.match(pattern, key)
        if match:
            number = int(match[1]) if match.groups() else 0
            start = match.expand(replacement.format(stage=number - 1, level=number - 2))
            return start + key[match.end() :]
    raise WeightsError(f"detectron2 checkpoint has the parameter '{key}': expected S2M's Faster R-CNN R50-FPN")
