"""GrabCut (Rother et al. 2004, OpenCV) in a small window around each prompt: the segmenter that needs no weights."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ros2_ood_seg.config import SegmenterConfig
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Masks, Prompts

_MARGIN = 0.25
"""Background seen around a box, as a fraction of its size on each side."""
_LEAST_BOX_PX = 3
"""Boxes with a shorter side are taken whole."""
_LEAST_FILL = 0.35
"""With less foreground than this fraction of the box, the cut has collapsed and the box's inscribed ellipse is better."""
_LEAST_PART = 0.2
"""Parts of a cut smaller than this fraction of its largest one are noise."""
_SURE_FRACTION = 0.06
_PROBABLE_FRACTION = 0.4
"""A point's certain and probable foreground are discs of these fractions of the window's half-size."""
_SURE_TOLERANCE = 8
_PROBABLE_TOLERANCE = 12
"""Pixels connected to the point whose CIELAB values differ by no more are certain (within the probable disc) and probable foreground too.
Without certain ones beyond a small disc, most cuts collapse onto it."""

Rectangle = tuple[int, int, int, int]


class GrabCutSegmenter:
    """Cuts one window per prompt, boxes and points alike; deterministic, on the CPU, without predicted quality."""

    name = "grabcut"

    def __init__(self, config: SegmenterConfig) -> None:
        self._config = config

    def __call__(self, image: Tensor, prompts: Prompts) -> Masks:
        """See :class:`ros2_ood_seg.segmenters.base.PromptableSegmenter`."""
        height, width = int(image.shape[0]), int(image.shape[1])
        if len(prompts) == 0:
            return Masks.empty((height, width), image.device)
        pixels = image.cpu().numpy()
        masks = np.zeros((len(prompts), height, width), dtype=bool)
        for mask, box in zip(masks, prompts.boxes_xyxy.cpu().tolist(), strict=False):
            self._cut_box(pixels, box, mask)
        for mask, point in zip(masks[prompts.num_boxes :], prompts.points_xy.cpu().tolist(), strict=True):
            self._cut_point(pixels, point, mask)
        quality = torch.full((len(prompts),), torch.nan, device=image.device)
        return Masks(torch.from_numpy(masks).to(image.device), quality)

    def _cut_box(self, pixels: NDArray[np.uint8], box_xyxy: list[float], mask: NDArray[np.bool_]) -> None:
        height, width = mask.shape
        x_min, y_min, x_max, y_max = _clip(
            (int(np.floor(box_xyxy[0])), int(np.floor(box_xyxy[1])), int(np.ceil(box_xyxy[2])), int(np.ceil(box_xyxy[3]))), width, height
        )
        if min(x_max - x_min, y_max - y_min) < _LEAST_BOX_PX:
            mask[y_min:y_max, x_min:x_max] = True
            return
        margin_x = max(2, round(_MARGIN * (x_max - x_min)))
        margin_y = max(2, round(_MARGIN * (y_max - y_min)))
        left, top, right, bottom = _clip((x_min - margin_x, y_min - margin_y, x_max + margin_x, y_max + margin_y), width, height)
        window, scale = self._shrunk(pixels[top:bottom, left:right])
        inner = np.zeros(window.shape[:2], dtype=bool)
        columns = slice(round((x_min - left) * scale), max(round((x_max - left) * scale), round((x_min - left) * scale) + 1))
        rows = slice(round((y_min - top) * scale), max(round((y_max - top) * scale), round((y_min - top) * scale) + 1))
        inner[rows, columns] = True
        trimap = np.where(inner, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
        cut = _without_specks(self._cut(window, trimap))
        if np.count_nonzero(cut) < _LEAST_FILL * np.count_nonzero(inner):
            cut = _ellipse(rows, columns, cut.shape)
        found = _enlarged(cut, right - left, bottom - top)
        mask[y_min:y_max, x_min:x_max] = found[y_min - top : y_max - top, x_min - left : x_max - left]

    def _cut_point(self, pixels: NDArray[np.uint8], point_xy: list[float], mask: NDArray[np.bool_]) -> None:
        height, width = mask.shape
        x, y = round(point_xy[0]), round(point_xy[1])
        if not (0 <= x < width and 0 <= y < height):
            return
        reach = max(4, round(self._config.point_radius * height))
        left, top, right, bottom = _clip((x - reach, y - reach, x + reach + 1, y + reach + 1), width, height)
        window, scale = self._shrunk(pixels[top:bottom, left:right])
        rows, columns = window.shape[:2]
        centre = (min(int((x - left + 0.5) * scale), columns - 1), min(int((y - top + 0.5) * scale), rows - 1))
        near = _disc((rows, columns), centre, _PROBABLE_FRACTION * reach * scale)
        trimap = np.full((rows, columns), cv2.GC_PR_BGD, dtype=np.uint8)
        trimap[near | _similar(window, centre, _PROBABLE_TOLERANCE)] = cv2.GC_PR_FGD
        trimap[[0, -1], :] = cv2.GC_BGD
        trimap[:, [0, -1]] = cv2.GC_BGD
        trimap[near & _similar(window, centre, _SURE_TOLERANCE)] = cv2.GC_FGD
        trimap[_disc((rows, columns), centre, _SURE_FRACTION * reach * scale)] = cv2.GC_FGD
        cut = _component_at(self._cut(window, trimap), centre)
        mask[top:bottom, left:right] = _enlarged(cut, right - left, bottom - top)

    def _shrunk(self, window: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
        height, width = window.shape[:2]
        scale = min(1.0, self._config.working_px / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return np.ascontiguousarray(cv2.resize(window, size, interpolation=cv2.INTER_AREA)), scale

    def _cut(self, window: NDArray[np.uint8], trimap: NDArray[np.uint8]) -> NDArray[np.bool_]:
        prior = _foreground(trimap)
        if not (trimap == cv2.GC_BGD).any():
            trimap[[0, -1], :] = cv2.GC_BGD
            trimap[:, [0, -1]] = cv2.GC_BGD
        if not _foreground(trimap).any():
            # A strip of the whole picture, a row or two when shrunk: there is nothing to tell apart.
            return prior
        cv2.setRNGSeed(0)
        model = np.zeros((2, 1, 65))
        cv2.grabCut(cv2.medianBlur(window, 3), trimap, None, model[0], model[1], self._config.iterations, cv2.GC_INIT_WITH_MASK)
        return _foreground(trimap)


def _foreground(trimap: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.isin(trimap, (cv2.GC_FGD, cv2.GC_PR_FGD))


def _clip(rectangle: Rectangle, width: int, height: int) -> Rectangle:
    x_min, y_min, x_max, y_max = rectangle
    return max(0, min(x_min, width)), max(0, min(y_min, height)), max(0, min(x_max, width)), max(0, min(y_max, height))


def _enlarged(cut: NDArray[np.bool_], width: int, height: int) -> NDArray[np.bool_]:
    return np.asarray(cv2.resize(cut.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_LINEAR) > 127)


def _ellipse(rows: slice, columns: slice, shape_hw: tuple[int, ...]) -> NDArray[np.bool_]:
    """The ellipse inscribed in a rectangle."""
    y = (np.arange(shape_hw[0]) + 0.5 - (rows.start + rows.stop) / 2) / ((rows.stop - rows.start) / 2)
    x = (np.arange(shape_hw[1]) + 0.5 - (columns.start + columns.stop) / 2) / ((columns.stop - columns.start) / 2)
    return np.asarray(y[:, None] ** 2 + x[None, :] ** 2 <= 1.0)


def _disc(shape_hw: tuple[int, int], centre: tuple[int, int], radius_px: float) -> NDArray[np.bool_]:
    disc = np.zeros(shape_hw, dtype=np.uint8)
    cv2.circle(disc, centre, max(1, round(radius_px)), 1, -1)
    return disc > 0


def _similar(window: NDArray[np.uint8], centre: tuple[int, int], tolerance: int) -> NDArray[np.bool_]:
    """Pixels connected to ``centre`` and of about its colour."""
    lab = cv2.GaussianBlur(cv2.cvtColor(window, cv2.COLOR_RGB2LAB), (5, 5), 0)
    filled = np.zeros((window.shape[0] + 2, window.shape[1] + 2), dtype=np.uint8)
    spread = (tolerance,) * 3
    cv2.floodFill(lab, filled, centre, 0, spread, spread, 8 | cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE)
    return filled[1:-1, 1:-1] > 0


def _without_specks(cut: NDArray[np.bool_]) -> NDArray[np.bool_]:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(cut.astype(np.uint8), connectivity=8)
    area = stats[:, cv2.CC_STAT_AREA]
    area[0] = 0
    return np.asarray((area >= max(1.0, _LEAST_PART * area.max()))[labels])


def _component_at(cut: NDArray[np.bool_], centre: tuple[int, int]) -> NDArray[np.bool_]:
    """The part of the cut that is connected to ``centre``."""
    _, labels = cv2.connectedComponents(cut.astype(np.uint8), connectivity=8)
    return np.asarray(cut & (labels == labels[centre[1], centre[0]]))


def build(config: SegmenterConfig, runtime: Runtime) -> GrabCutSegmenter:
    """Factory for the registry; GrabCut runs on the CPU whatever the device."""
    return GrabCutSegmenter(config)
