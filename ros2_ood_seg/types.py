"""The currency: what the stages hand to one another.

Tensors of one frame live on one device. Pixel coordinates are ``x`` right and ``y`` down from the upper left corner of
the *input* image; boxes are ``(x_min, y_min, x_max, y_max)`` with the maximum exclusive. Higher scores mean more anomalous.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ros2_ood_seg.errors import InputError

CALIBRATION_DECADES = 6.0
"""A calibrated score of 1 means that one in-distribution pixel in 10**6 scores higher; 0.5 means one in 10**3."""


@dataclass(frozen=True)
class Calibration:
    """A monotone map from a scorer's raw range to [0, 1], made from its scores on in-distribution frames.

    ``unit = min(1, -log10(P(score_in_distribution > raw)) / CALIBRATION_DECADES)``, linear between the knots and constant
    outside them. It makes thresholds, prompt generators and instance scores carry over from one scorer to the next.

    Args:
        raw: K knots in the scorer's own range, strictly increasing, K >= 2.
        unit: Their calibrated values, strictly increasing, within [0, 1].

    Raises:
        InputError: Knots of unequal number, fewer than two, not finite, or not increasing.
    """

    raw: tuple[float, ...]
    unit: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.raw) != len(self.unit) or len(self.raw) < 2:
            raise InputError(
                f"calibration needs the same number (2 or more) of raw and unit knots, got {len(self.raw)} and {len(self.unit)}"
            )
        for name, knots in (("raw", self.raw), ("unit", self.unit)):
            if not np.all(np.isfinite(knots)) or not np.all(np.diff(knots) > 0):
                raise InputError(f"calibration knots '{name}' must be finite and strictly increasing, got {list(knots)}")
        if self.unit[0] < 0 or self.unit[-1] > 1:
            raise InputError(f"calibration knots 'unit' must lie within [0, 1], got {list(self.unit)}")

    @classmethod
    def linear(cls, low: float = 0.0, high: float = 1.0) -> Calibration:
        """The straight line that maps ``low`` to 0 and ``high`` to 1, for maps that are already scaled."""
        return cls((low, high), (0.0, 1.0))

    @classmethod
    def from_scores(cls, scores: NDArray[np.floating[Any]]) -> Calibration:
        """Fits the knots to a sample of in-distribution pixel scores.

        Args:
            scores: At least 1000 finite values of any shape; the tail is resolved down to 10 samples.

        Raises:
            InputError: Too few values, non-finite values, or all of them equal.
        """
        values = np.sort(np.asarray(scores, dtype=np.float64).ravel())
        if values.size < 1000 or not np.all(np.isfinite(values)):
            bad = np.count_nonzero(~np.isfinite(values))
            raise InputError(f"calibration needs at least 1000 finite in-distribution scores, got {values.size}, {bad} of them not finite")
        survival = [0.9, 0.5, 0.2] + [10.0**-k for k in np.arange(1.0, CALIBRATION_DECADES, 0.5)]
        raw: list[float] = []
        unit: list[float] = []
        for s in survival:
            if s * values.size < 10:
                break
            value = float(np.quantile(values, 1.0 - s))
            if not raw or value > raw[-1] + 1e-9 * max(1.0, abs(value)):
                raw.append(value)
                unit.append(-float(np.log10(s)) / CALIBRATION_DECADES)
        if len(raw) < 2:
            raise InputError(f"calibration needs scores that vary, all quantiles are {values[0]:g}")
        if unit[-1] < 1.0:
            # Beyond the sample the tail goes on as steeply as over its last decade.
            anchor = max(0, int(np.searchsorted(unit, unit[-1] - 1.0 / CALIBRATION_DECADES, side="right")) - 1)
            anchor = min(anchor, len(raw) - 2)
            slope = (raw[-1] - raw[anchor]) / (unit[-1] - unit[anchor])
            raw.append(raw[-1] + slope * (1.0 - unit[-1]))
            unit.append(1.0)
        return cls(tuple(raw), tuple(unit))

    def to_unit(self, raw: Tensor) -> Tensor:
        """Calibrates raw scores of any shape; float32 in [0, 1] on the same device."""
        raw = raw.float()
        result = torch.full_like(raw, self.unit[0])
        ramp = torch.empty_like(raw)
        # A sum of clamped ramps: no search, no branch, the same few passes on CPU and GPU.
        for k in range(len(self.raw) - 1):
            width = self.raw[k + 1] - self.raw[k]
            torch.sub(raw, self.raw[k], out=ramp).clamp_(0.0, width)
            result.add_(ramp, alpha=(self.unit[k + 1] - self.unit[k]) / width)
        return result.clamp_(0.0, 1.0)

    def to_raw(self, unit: float) -> float:
        """The raw score whose calibrated value is ``unit``; outside the knots, the nearest knot."""
        return float(np.interp(unit, self.unit, self.raw))

    def to_dict(self) -> dict[str, list[float]]:
        """Plain lists for JSON and for safetensors metadata."""
        return {"raw": list(self.raw), "unit": list(self.unit)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[float]]) -> Calibration:
        """Reads what :meth:`to_dict` wrote."""
        try:
            return cls(tuple(float(v) for v in values["raw"]), tuple(float(v) for v in values["unit"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"calibration must hold number lists 'raw' and 'unit': {error}") from error


@dataclass(frozen=True)
class ScoreMap:
    """A per-pixel anomaly score in the input image's pixels.

    Args:
        scores: (H, W) float32, finite, higher = more anomalous, the scorer's own range.
        scorer: Name of the scorer, for messages and reports.
        calibration: Maps ``scores`` to [0, 1].
        classes: (H, W) uint8 in-distribution class per pixel, or what computes them, or None when the scorer has no classes.
        class_names: Names of the classes.
        road_end: Where the road ends and objects are small because they are far: x, y as shares of width and height; None when the
            scorer does not say.
    """

    scores: Tensor
    scorer: str
    calibration: Calibration
    classes: Tensor | Callable[[], Tensor] | None = None
    class_names: tuple[str, ...] = ()
    road_end: tuple[float, float] | None = None

    @cached_property
    def semantic(self) -> Tensor | None:
        """(H, W) uint8 in-distribution class per pixel, computed when first asked for; None when the scorer has no classes."""
        return self.classes() if callable(self.classes) else self.classes

    @property
    def shape_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.scores.shape[0]), int(self.scores.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the scores live."""
        return self.scores.device

    def calibrated(self) -> Tensor:
        """(H, W) float32 in [0, 1]."""
        return self.calibration.to_unit(self.scores)


@dataclass(frozen=True)
class Prompts:
    """Where the segmenter shall look: boxes (S2M), points (UGainS), or both (hybrid).

    Args:
        boxes_xyxy: (B, 4) float32 px.
        confidence: (B,) float32 in [0, 1], the prompt generator's confidence of each box.
        points_xy: (P, 2) float32 px, one positive point per prompt, at pixel centres of integer coordinates.
    """

    boxes_xyxy: Tensor
    confidence: Tensor
    points_xy: Tensor

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> Prompts:
        """No prompts at all."""
        return cls(torch.zeros((0, 4), device=device), torch.zeros((0,), device=device), torch.zeros((0, 2), device=device))

    @classmethod
    def from_boxes(cls, boxes_xyxy: Tensor, confidence: Tensor) -> Prompts:
        """Boxes only."""
        return cls(boxes_xyxy, confidence, boxes_xyxy.new_zeros((0, 2)))

    @classmethod
    def from_points(cls, points_xy: Tensor) -> Prompts:
        """Points only."""
        return cls(points_xy.new_zeros((0, 4)), points_xy.new_zeros((0,)), points_xy)

    def merged(self, other: Prompts) -> Prompts:
        """The prompts of both, self's first."""
        return Prompts(
            torch.cat([self.boxes_xyxy, other.boxes_xyxy]),
            torch.cat([self.confidence, other.confidence]),
            torch.cat([self.points_xy, other.points_xy]),
        )

    @property
    def num_boxes(self) -> int:
        """Number of box prompts."""
        return int(self.boxes_xyxy.shape[0])

    @property
    def num_points(self) -> int:
        """Number of point prompts."""
        return int(self.points_xy.shape[0])

    def __len__(self) -> int:
        return self.num_boxes + self.num_points


@dataclass(frozen=True)
class Masks:
    """What the segmenter made of the prompts: one mask per prompt, the boxes' first, then the points'.

    Args:
        masks: (N, H, W) bool in the input image's pixels, N = boxes + points.
        quality: (N,) float32, the segmenter's predicted IoU in [0, 1], NaN where it gives none.
    """

    masks: Tensor
    quality: Tensor

    @classmethod
    def empty(cls, shape_hw: tuple[int, int], device: torch.device | str = "cpu") -> Masks:
        """No masks for an image of this size."""
        return cls(torch.zeros((0, *shape_hw), dtype=torch.bool, device=device), torch.zeros((0,), device=device))

    def __len__(self) -> int:
        return int(self.masks.shape[0])


@dataclass(frozen=True)
class Instances:
    """Scored anomaly instances of one frame, by score, descending.

    Args:
        masks: (N, H, W) bool, none empty.
        boxes_xyxy: (N, 4) float32 px, tight around the masks.
        scores: (N,) float32 in [0, 1], calibrated; the ranking key.
        raw_scores: (N,) float32 as the method defines it: mean scorer value (UGainS) or box confidence (S2M).
        mask_quality: (N,) float32 predicted IoU in [0, 1], NaN where the segmenter gives none.
        area_px: (N,) int64.
        track_ids: (N,) int64, 0 when tracking is off.
    """

    masks: Tensor
    boxes_xyxy: Tensor
    scores: Tensor
    raw_scores: Tensor
    mask_quality: Tensor
    area_px: Tensor
    track_ids: Tensor

    @classmethod
    def from_masks(cls, masks: Tensor, scores: Tensor, raw_scores: Tensor, mask_quality: Tensor) -> Instances:
        """Drops empty masks, measures box and area, sorts by score (stable).

        Args:
            masks: (N, H, W) bool.
            scores: (N,) in [0, 1].
            raw_scores: (N,).
            mask_quality: (N,) in [0, 1] or NaN.
        """
        boxes, area = boxes_from_masks(masks)
        order = torch.argsort(scores, descending=True, stable=True)
        order = order[area[order] > 0]
        return cls(
            masks=masks[order],
            boxes_xyxy=boxes[order],
            scores=scores[order].float(),
            raw_scores=raw_scores[order].float(),
            mask_quality=mask_quality[order].float(),
            area_px=area[order],
            track_ids=torch.zeros_like(order),
        )

    @classmethod
    def empty(cls, shape_hw: tuple[int, int], device: torch.device | str = "cpu") -> Instances:
        """No instances in an image of this size."""
        none = torch.zeros((0,), device=device)
        return cls.from_masks(torch.zeros((0, *shape_hw), dtype=torch.bool, device=device), none, none, none)

    def select(self, index: Tensor) -> Instances:
        """The instances at ``index`` (integer or boolean), in that order."""
        return replace(self, **{name: getattr(self, name)[index] for name in self.__dataclass_fields__})

    def to(self, device: torch.device | str) -> Instances:
        """The same instances on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})

    def __len__(self) -> int:
        return int(self.masks.shape[0])


@dataclass(frozen=True)
class Fused:
    """What a fusion makes of masks and score map.

    Args:
        instances: Scored instances.
        refined: (H, W) float32, the method's final score map: box confidence (S2M) or ensemble (UGainS).
    """

    instances: Instances
    refined: Tensor


@dataclass(frozen=True)
class FrameResult:
    """Everything the pipeline says about one image.

    Args:
        instances: Scored instances, by score.
        score_map: The scorer's own map.
        prompts: What the segmenter was asked.
        refined: (H, W) float32, the final map of the method.
        timings_ms: Wall-clock time per stage in milliseconds, by stage name, with ``total``.
        profile: Name of the profile that ran.
        min_area_px: Where masks overlap and each pixel is given to one of them, an instance has to keep so many to be one.
    """

    instances: Instances
    score_map: ScoreMap
    prompts: Prompts
    refined: Tensor
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    profile: str = ""
    min_area_px: int = 1


def boxes_from_masks(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Tight boxes and areas of masks.

    Args:
        masks: (N, H, W) bool.

    Returns:
        (N, 4) float32 ``xyxy`` px with exclusive maximum, zeros for an empty mask; (N,) int64 areas in px.
    """
    count, height, width = masks.shape
    if count == 0:
        return masks.new_zeros((0, 4), dtype=torch.float32), masks.new_zeros((0,), dtype=torch.int64)
    # Reductions of bytes and NumPy's count are several times faster on the CPU than those of bools.
    columns = masks.view(torch.uint8).amax(dim=1)
    rows = masks.view(torch.uint8).amax(dim=2)
    on_cpu = masks.device.type == "cpu"
    area = torch.tensor([np.count_nonzero(mask) for mask in masks.numpy()]) if on_cpu else masks.sum(dim=(1, 2))
    x_min = columns.int().argmax(dim=1)
    y_min = rows.int().argmax(dim=1)
    x_max = width - columns.flip(1).int().argmax(dim=1)
    y_max = height - rows.flip(1).int().argmax(dim=1)
    boxes = torch.stack([x_min, y_min, x_max, y_max], dim=1).float()
    boxes[area == 0] = 0.0
    return boxes, area


def label_image(masks: Tensor, boxes_xyxy: Tensor | None = None) -> Tensor:
    """One label per pixel from ranked masks.

    Args:
        masks: (N, H, W) bool, best first, N <= 65534.
        boxes_xyxy: (N, 4) px around the masks, to look at these pixels only; None looks at all.

    Returns:
        (H, W) int32: 0 background, k = the k-th mask (1-based); where masks overlap, the best one.
    """
    height, width = masks.shape[1:]
    labels = torch.zeros((height, width), dtype=torch.int32, device=masks.device)
    boxes = [(0, 0, width, height)] * len(masks) if boxes_xyxy is None else boxes_xyxy.int().tolist()
    for k in range(len(masks) - 1, -1, -1):
        x_min, y_min, x_max, y_max = boxes[k]
        labels[y_min:y_max, x_min:x_max].masked_fill_(masks[k, y_min:y_max, x_min:x_max], k + 1)
    return labels
