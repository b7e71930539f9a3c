"""Boxes from a trained detector on the score map: S2M's prompt generator (section 3.2) and the compact one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ros2_ood_seg.config import BoxPromptsConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.prompts.networks.detectron2 import convert_detectron2_state, is_detectron2_state
from ros2_ood_seg.prompts.networks.rcnn import SMALL_NETWORKS, MapInput, fuse_norms, s2m_rcnn
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Prompts, ScoreMap
from ros2_ood_seg.weights.store import WeightFile, find_weights, load_into, load_weights
from ros2_ood_seg.zoom import MORE_DETAIL, window_at

S2M_WEIGHTS = "s2m_prompt_generator"
COMPACT_WEIGHTS = "compact_prompt_generator"
TILE_OVERLAP = 0.25
"""Neighbouring tiles share this fraction of a tile."""
ZOOM_LARGEST = 0.03
"""The closer look at the end of the road finds objects up to this side, as a share of the map's width; the whole map shows larger ones."""


@dataclass(frozen=True)
class Detector:
    """A detector with what it has to be fed.

    Args:
        network: In evaluation mode; see :func:`~ros2_ood_seg.prompts.networks.rcnn.s2m_rcnn`.
        map_input: Kind and normalisation of its input.
        input_width: Width in px that score maps are resized to, 0 for their own.
    """

    network: nn.Module
    map_input: MapInput
    input_width: int


class RcnnBoxes:
    """Runs the detector on the score map, and once more where the road ends or on enlarged tiles, for small and far objects.

    Args:
        detector: Network and its input.
        config: Thresholds, number of boxes, tiles.
        runtime: Device and precision.
    """

    def __init__(self, detector: Detector, config: BoxPromptsConfig, runtime: Runtime) -> None:
        wanted = config.input_mode
        if wanted not in ("auto", detector.map_input.mode):
            raise InputError(
                f"prompts.boxes.input_mode is '{wanted}' but the weights were trained on '{detector.map_input.mode}' scores: use 'auto'"
            )
        fuse_norms(detector.network)
        heads = cast("Any", detector.network.roi_heads)
        heads.score_thresh, heads.detections_per_img = config.min_confidence, config.max_boxes
        self._network = detector.network.to(runtime.device).to(memory_format=torch.channels_last).eval()
        self._mode = detector.map_input.mode
        self._input_width = config.input_width or detector.input_width
        self._nms_iou = float(heads.nms_thresh)
        self._config = config

    @torch.inference_mode()
    def __call__(self, score_map: ScoreMap, ignore: Tensor | None = None) -> Prompts:
        """See :class:`ros2_ood_seg.prompts.base.PromptGenerator`; boxes by confidence, descending."""
        scores = score_map.calibrated() if self._mode == "calibrated" else score_map.scores
        if ignore is not None:
            zero = 0.0 if self._mode == "calibrated" else score_map.calibration.to_raw(0.0)
            scores = scores.masked_fill(ignore, zero)
        found = [self._detect(scores, self._input_width)]
        if self._config.tiles > 1:
            found += [self._detect_tile(scores, tile) for tile in _tiles(score_map.shape_hw, self._config.tiles)]
        if (window := self._zoom_window(score_map)) is not None:
            found.append(_small(*self._detect_tile(scores, window), ZOOM_LARGEST * scores.shape[1]))
        boxes, confidence = torch.cat([b for b, _ in found]), torch.cat([c for _, c in found])
        if len(found) > 1:
            from torchvision.ops import nms

            kept = nms(boxes, confidence, self._nms_iou)[: self._config.max_boxes]
            boxes, confidence = boxes[kept], confidence[kept]
        if ignore is not None:
            kept = _ignored_fraction(boxes, ignore) <= 0.5
            boxes, confidence = boxes[kept], confidence[kept]
        return Prompts.from_boxes(self._widen(boxes, score_map.shape_hw), confidence)

    def _detect(self, scores: Tensor, input_width: int) -> tuple[Tensor, Tensor]:
        """Boxes in the px of ``scores`` (h, w), which the network sees ``input_width`` wide (0: as they are), and their confidence."""
        height, width = scores.shape
        scale = input_width / width if input_width else 1.0
        resized = scores[None]
        if scale != 1.0:
            size = (max(1, round(height * scale)), input_width)
            resized = F.interpolate(resized[None], size=size, mode="bilinear", antialias=scale < 1.0)[0]
        # No autocast: torchvision would round boxes to bfloat16, 4 px above 512, and raw maps of -150 to half a unit.
        found = self._network([resized])[0]
        scale_xy = scores.new_tensor([width / resized.shape[2], height / resized.shape[1]]).repeat(2)
        return found["boxes"].float() * scale_xy, found["scores"].float()

    def _zoom_window(self, score_map: ScoreMap) -> tuple[int, int, int, int] | None:
        """Where a closer look shows more than the whole map does, ``xyxy`` px."""
        height, width = score_map.shape_hw
        seen = self._input_width
        if score_map.road_end is None or not self._config.zoom or not seen or width < MORE_DETAIL * seen:
            return None
        return window_at(score_map.road_end, max(self._config.zoom, seen / width), (height, width))

    def _detect_tile(self, scores: Tensor, tile: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        """As :meth:`_detect` for a part of the map, without the boxes that its inner borders cut."""
        x0, y0, x1, y1 = tile
        height, width = scores.shape
        boxes, confidence = self._detect(scores[y0:y1, x0:x1], self._input_width or width)
        margin = 0.01 * (x1 - x0)
        cut = (
            ((boxes[:, 0] < margin) & (x0 > 0))
            | ((boxes[:, 1] < margin) & (y0 > 0))
            | ((boxes[:, 2] > x1 - x0 - margin) & (x1 < width))
            | ((boxes[:, 3] > y1 - y0 - margin) & (y1 < height))
        )
        return boxes[~cut] + boxes.new_tensor([x0, y0, x0, y0]), confidence[~cut]

    def _widen(self, boxes: Tensor, shape_hw: tuple[int, int]) -> Tensor:
        sides = (boxes[:, 2:] - boxes[:, :2]) * self._config.margin
        limit = boxes.new_tensor([shape_hw[1], shape_hw[0]]).repeat(2)
        return (boxes + torch.cat([-sides, sides], dim=1)).clamp_(min=0.0).minimum(limit)


def load_detector(weights: WeightFile) -> Detector:
    """Builds the network that a weights file belongs to.

    Args:
        weights: Our safetensors (its metadata names the network), or a detectron2 checkpoint such as S2M's.

    Raises:
        WeightsError: Another network, or parameters that do not fit.
    """
    if is_detectron2_state(weights.state):
        state = convert_detectron2_state(weights.state)
        classes = state["roi_heads.box_predictor.cls_score.bias"].numel() - 1
        detector = Detector(s2m_rcnn(num_classes=classes), MapInput.published(), input_width=0)
        weights = WeightFile(weights.path, state, {})
    else:
        detector = _from_metadata(weights)
        own = detector.network.state_dict()
        # Batch norms that were trained are frozen here and count no batches.
        state = {key: value for key, value in weights.state.items() if key in own or not key.endswith("num_batches_tracked")}
        weights = WeightFile(weights.path, state, weights.metadata)
    load_into(detector.network, weights, "Faster R-CNN prompt generator")
    return detector


def _from_metadata(weights: WeightFile) -> Detector:
    name = weights.metadata.get("network")
    try:
        map_input = MapInput.from_dict(weights.metadata["map_input"])
        width = int(weights.metadata["input_width"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"weights file '{weights.path}' is no prompt generator: it is neither a detectron2 Faster R-CNN nor does it say its map_input"
        ) from error
    if name in SMALL_NETWORKS:
        return Detector(SMALL_NETWORKS[name](map_input), map_input, width)
    if name == "s2m":
        return Detector(s2m_rcnn(map_input, num_classes=1), map_input, width)
    known = ", ".join(("s2m", *SMALL_NETWORKS))
    raise WeightsError(f"weights file '{weights.path}' is of the prompt generator '{name}', known are {known}")


def build(config: BoxPromptsConfig, runtime: Runtime) -> RcnnBoxes:
    """Factory of ``faster_rcnn``: S2M's released checkpoint, or whatever prompt generator ``weights`` names."""
    return _build(config, runtime, S2M_WEIGHTS)


def build_compact(config: BoxPromptsConfig, runtime: Runtime) -> RcnnBoxes:
    """Factory of ``compact_rcnn``: the bundled weights unless ``weights`` names others."""
    return _build(config, runtime, COMPACT_WEIGHTS)


def _build(config: BoxPromptsConfig, runtime: Runtime, default: str) -> RcnnBoxes:
    weights = load_weights(find_weights(config.weights or default, runtime.weights_dir))
    return RcnnBoxes(load_detector(weights), config, runtime)


def _small(boxes: Tensor, confidence: Tensor, largest_px: float) -> tuple[Tensor, Tensor]:
    """The boxes whose area is below that of a square of this side."""
    kept = (boxes[:, 2:] - boxes[:, :2]).prod(1) < largest_px**2
    return boxes[kept], confidence[kept]


def _tiles(shape_hw: tuple[int, int], count: int) -> Iterator[tuple[int, int, int, int]]:
    """``count`` x ``count`` overlapping tiles that cover the map, ``xyxy`` px."""
    sizes = [round(side / (count - (count - 1) * TILE_OVERLAP)) for side in shape_hw]
    for row in range(count):
        for column in range(count):
            y0, x0 = ((side - size) * k // (count - 1) for side, size, k in zip(shape_hw, sizes, (row, column), strict=True))
            yield x0, y0, x0 + sizes[1], y0 + sizes[0]


def _ignored_fraction(boxes: Tensor, ignore: Tensor) -> Tensor:
    """(N,) part of each box's pixels where ``ignore`` (H, W) is True, by integral image."""
    height, width = ignore.shape
    integral = F.pad(ignore.long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    x0, x1 = boxes[:, 0].floor().long().clamp(0, width - 1), boxes[:, 2].ceil().long().clamp(1, width)
    y0, y1 = boxes[:, 1].floor().long().clamp(0, height - 1), boxes[:, 3].ceil().long().clamp(1, height)
    inside = integral[y1, x1] - integral[y0, x1] - integral[y1, x0] + integral[y0, x0]
    return inside / ((x1 - x0) * (y1 - y0))
