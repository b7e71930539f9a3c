"""Where a camera sees the road end, and a closer look there: of the scorer at the picture, of the prompt generator at the score map."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WINDOW_HEIGHT = 0.6
"""Height of the window over its width, both as shares of the picture."""
MORE_DETAIL = 1.25
"""A closer look is worth it where the picture is this many times as wide as what a network has seen of it."""
_ABOVE = 0.35
_LEAST_ROAD = 0.03
_RAMP = 0.15


def road_end(road: NDArray[np.bool_]) -> tuple[float, float] | None:
    """The upper end of the largest connected piece of road, where objects are small because they are far.

    Args:
        road: (h, w) bool, pixels of a drivable class.

    Returns:
        x, y as shares of width and height; None where no row of that piece covers 3 % of the width.
    """
    height, width = road.shape
    count, pieces, stats, _ = cv2.connectedComponentsWithStats(road.astype(np.uint8), connectivity=4)
    if count < 2:
        return None
    largest = pieces == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    rows = np.flatnonzero(largest.sum(1) > _LEAST_ROAD * width)
    if not len(rows):
        return None
    top = int(rows[0])
    x = np.nonzero(largest[top : top + max(1, round(_LEAST_ROAD * height))])[1].mean() + 0.5
    return float(x) / width, top / height


def window_at(end: tuple[float, float], width_share: float, shape_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of a picture around the end of the road, most of it below.

    Args:
        end: x, y as shares.
        width_share: Of the picture's width, in (0, 1].
        shape_hw: Of the picture, px.

    Returns:
        Left, top, right, bottom in px, inside the picture.
    """
    height, width = shape_hw
    w, h = max(1, round(width_share * width)), max(1, round(WINDOW_HEIGHT * width_share * height))
    x = min(max(round(end[0] * width - w / 2), 0), width - w)
    y = min(max(round(end[1] * height - _ABOVE * h), 0), height - h)
    return x, y, x + w, y + h


def raise_to(scores: Tensor, closer: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    """The greater of two score maps in a window, fading out towards its border.

    Args:
        scores: (H, W) float32 of the whole picture.
        closer: (h, w) float32 of the window.
        window: As from :func:`window_at`.

    Returns:
        (H, W) float32, nowhere below ``scores``.
    """
    x, y, right, bottom = window
    weight = torch.outer(_ramp(bottom - y, scores.device), _ramp(right - x, scores.device))
    result = scores.clone()
    result[y:bottom, x:right] += weight * (closer - scores[y:bottom, x:right]).clamp(min=0.0)
    return result


def _ramp(length: int, device: torch.device) -> Tensor:
    """(length,) from just above 0 to 1 over 15 % at either end."""
    at = torch.arange(length, device=device) + 0.5
    return (torch.minimum(at, length - at) / max(_RAMP * length, 1.0)).clamp(max=1.0)
