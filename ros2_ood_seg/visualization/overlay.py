"""Pictures of results: instances over the camera image, heat maps, panels side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.types import Instances, ScoreMap

Rgb = tuple[int, int, int]
ImageU8 = NDArray[np.uint8]

# Bright and far apart in hue, none of them a colour that roads, sky or trees often have.
PALETTE: tuple[Rgb, ...] = (
    (255, 64, 64),
    (0, 220, 255),
    (255, 200, 0),
    (255, 80, 220),
    (90, 255, 90),
    (255, 140, 30),
    (150, 120, 255),
    (0, 255, 190),
    (255, 150, 170),
    (215, 255, 60),
)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_DARK: Rgb = (16, 16, 16)
_LIGHT: Rgb = (255, 255, 255)


def instance_color(number: int) -> Rgb:
    """Colour of a track id or rank (from 1); repeats after ten."""
    return PALETTE[(number - 1) % len(PALETTE)]


def heat_map(scores: Tensor | NDArray[Any], low: float = 0.0, high: float = 1.0) -> ImageU8:
    """Colours scores from dark violet (``low``) over red to bright yellow (``high``).

    Args:
        scores: (H, W) finite numbers.
        low: Score of the darkest colour.
        high: Score of the brightest colour.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        InputError: Not two-dimensional, or ``high`` not above ``low``.
    """
    values = _as_numpy(scores)
    if values.ndim != 2:
        raise InputError(f"a heat map needs (H, W) scores, got shape {values.shape}")
    if not high > low:
        raise InputError(f"a heat map needs low < high, got {low:g} and {high:g}")
    # One multiply-add and saturation in OpenCV instead of three NumPy passes over the frame.
    scale = 255.0 / (high - low)
    shifted = cv2.addWeighted(values.astype(np.float32, copy=False), scale, values, 0.0, -low * scale, dtype=cv2.CV_8U)
    return np.asarray(cv2.cvtColor(cv2.applyColorMap(shifted, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB), dtype=np.uint8)


def draw_overlay(
    image_rgb: ImageU8,
    instances: Instances,
    score_map: ScoreMap | Tensor | None = None,
    *,
    alpha: float = 0.45,
    heat_alpha: float = 0.6,
    faint_below: float = 0.3,
    labels: bool = True,
) -> ImageU8:
    """Draws instances over an image: tinted mask, crisp contour, box, and a label such as ``#2 0.93``.

    Colour and number are those of the track, or of the rank when tracking is off (the id of the instance message).

    Args:
        image_rgb: (H, W, 3) uint8 RGB; not changed.
        instances: Instances of this image, on any device.
        score_map: Shown as a glow below the instances: a :class:`ScoreMap` (its calibrated scores), or (H, W) scores in [0, 1].
        alpha: Strength of the tint where the score is 1, 0 to 1; a quarter of it where the score is 0.
        heat_alpha: Strength of the glow where the score is 1, 0 to 1.
        faint_below: Instances that score less get a thin outline only, neither tint nor box nor label.
        labels: Whether boxes carry labels.

    Returns:
        (H, W, 3) uint8 RGB, a new array.

    Raises:
        InputError: Image, masks and scores differ in size or kind.
    """
    _check_image(image_rgb)
    canvas = np.ascontiguousarray(image_rgb).copy()
    height, width = canvas.shape[:2]
    if instances.masks.shape[1:] != (height, width):
        raise InputError(f"masks are {tuple(instances.masks.shape[1:])}, the image is {(height, width)}")
    if score_map is not None:
        _blend_heat(canvas, score_map, heat_alpha)
    masks = _as_numpy(instances.masks)
    boxes = _as_numpy(instances.boxes_xyxy).astype(int).tolist()
    scores = _as_numpy(instances.scores).tolist()
    tracks = _as_numpy(instances.track_ids).tolist()
    numbers = [track if track > 0 else rank + 1 for rank, track in enumerate(tracks)]
    line = _line_px(height)
    # The best instance is drawn last and stays on top.
    order = range(len(boxes) - 1, -1, -1)
    for k in order:
        x_min, y_min, x_max, y_max = boxes[k]
        if scores[k] < faint_below:
            _outline(canvas, masks[k], boxes[k], instance_color(numbers[k]), 1)
            continue
        _tint(canvas, masks[k], boxes[k], instance_color(numbers[k]), alpha * (0.25 + 0.75 * scores[k]))
        _outline(canvas, masks[k], boxes[k], _DARK, line + 2)
        _outline(canvas, masks[k], boxes[k], instance_color(numbers[k]), line)
        cv2.rectangle(canvas, (x_min, y_min), (x_max - 1, y_max - 1), instance_color(numbers[k]), max(1, line // 2))
    if labels:
        for k in (k for k in order if scores[k] >= faint_below):
            _draw_tag(canvas, f"#{numbers[k]} {scores[k]:.2f}", boxes[k], instance_color(numbers[k]))
    return canvas


def draw_legend(image_rgb: ImageU8, text: str, *, color_bar: bool = False) -> ImageU8:
    """Writes a caption into the lower left corner, on request with the colours of :func:`heat_map`.

    Args:
        image_rgb: (H, W, 3) uint8 RGB; not changed.
        text: One line.
        color_bar: Adds a bar from 0 to 1 above the caption.

    Returns:
        (H, W, 3) uint8 RGB, a new array.
    """
    _check_image(image_rgb)
    canvas = np.ascontiguousarray(image_rgb).copy()
    height, width = canvas.shape[:2]
    scale, thickness, pad = _text_style(height)
    (text_width, text_height), baseline = cv2.getTextSize(text, _FONT, scale, thickness)
    if text_width > width - 4 * pad:
        scale *= (width - 4 * pad) / text_width
        (text_width, text_height), baseline = cv2.getTextSize(text, _FONT, scale, thickness)
    bottom = height - pad
    top = max(0, bottom - text_height - baseline - 2 * pad)
    _shade(canvas, pad, top, min(width, text_width + 3 * pad), bottom)
    cv2.putText(canvas, text, (2 * pad, bottom - pad - baseline // 2), _FONT, scale, _LIGHT, thickness, cv2.LINE_AA)
    if color_bar:
        bar_width, bar_height = width // 4, max(6, text_height)
        x, y = pad, top - bar_height - pad
        if y >= 0 and bar_width > 0:
            ramp = np.tile(np.linspace(0.0, 1.0, bar_width, dtype=np.float32), (bar_height, 1))
            canvas[y : y + bar_height, x : x + bar_width] = heat_map(ramp)
            cv2.rectangle(canvas, (x, y), (x + bar_width - 1, y + bar_height - 1), _LIGHT, 1)
            cv2.putText(canvas, "0", (x + 2, y + bar_height - 2), _FONT, scale * 0.8, _LIGHT, thickness, cv2.LINE_AA)
            one_width = cv2.getTextSize("1", _FONT, scale * 0.8, thickness)[0][0]
            cv2.putText(canvas, "1", (x + bar_width - one_width - 2, y + bar_height - 2), _FONT, scale * 0.8, _DARK, thickness, cv2.LINE_AA)
    return canvas


def side_by_side(panels: Sequence[ImageU8], titles: Sequence[str] = (), *, columns: int = 0, panel_width: int = 0) -> ImageU8:
    """Arranges pictures in a grid.

    Args:
        panels: (H, W, 3) uint8 RGB each; all are brought to the shape of the first.
        titles: Captions, one per panel, or none.
        columns: Panels per row; 0 puts all in one row.
        panel_width: Width of each panel, px; 0 keeps the first panel's.

    Returns:
        (rows*H', columns*W' and gaps, 3) uint8 RGB.

    Raises:
        InputError: No panels, or another number of titles.
    """
    if not panels:
        raise InputError("a grid needs at least one picture")
    if titles and len(titles) != len(panels):
        raise InputError(f"{len(panels)} panels need {len(panels)} titles or none, got {len(titles)}")
    height, width = panels[0].shape[:2]
    size = (width, height) if panel_width == 0 else (panel_width, max(1, round(height * panel_width / width)))
    columns = columns or len(panels)
    rows = math.ceil(len(panels) / columns)
    gap = max(2, size[1] // 180)
    grid = np.full((rows * (size[1] + gap) - gap, columns * (size[0] + gap) - gap, 3), 255, dtype=np.uint8)
    for k, panel in enumerate(panels):
        _check_image(panel)
        tile = panel if panel.shape[1::-1] == size else cv2.resize(panel, size, interpolation=cv2.INTER_AREA)
        if titles:
            tile = draw_legend(tile, titles[k])
        y, x = (k // columns) * (size[1] + gap), (k % columns) * (size[0] + gap)
        grid[y : y + size[1], x : x + size[0]] = tile
    return grid


def _check_image(image_rgb: ImageU8) -> None:
    if image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.dtype != np.uint8 or image_rgb.size == 0:
        raise InputError(f"a picture must be (H, W, 3) uint8 and not empty, got {image_rgb.shape} {image_rgb.dtype}")


def _as_numpy(values: Tensor | NDArray[Any]) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _line_px(height: int) -> int:
    return max(1, round(height / 400))


def _text_style(height: int) -> tuple[float, int, int]:
    """Font scale, stroke and padding in px that stay legible from 360 to 2160 rows."""
    scale = min(1.6, max(0.4, height / 1300))
    return scale, max(1, round(scale * 1.6)), max(2, round(scale * 7))


def _blend_heat(canvas: ImageU8, score_map: ScoreMap | Tensor, heat_alpha: float) -> None:
    unit = _as_numpy(score_map.calibrated() if isinstance(score_map, ScoreMap) else score_map)
    if unit.shape != canvas.shape[:2]:
        raise InputError(f"score map is {unit.shape}, the image is {canvas.shape[:2]}")
    weight = (np.clip(unit, 0.0, 1.0) * heat_alpha).astype(np.float32)
    canvas[:] = cv2.blendLinear(heat_map(unit), canvas, weight, 1.0 - weight)


def _tint(canvas: ImageU8, mask: NDArray[np.bool_], box: list[int], color: Rgb, alpha: float) -> None:
    x_min, y_min, x_max, y_max = box
    window = canvas[y_min:y_max, x_min:x_max]
    inside = np.ascontiguousarray(mask[y_min:y_max, x_min:x_max]).view(np.uint8)
    plain = np.empty_like(window)
    plain[:] = color
    cv2.copyTo(cv2.addWeighted(window, 1.0 - alpha, plain, alpha, 0.0), inside, window)


def _outline(canvas: ImageU8, mask: NDArray[np.bool_], box: list[int], color: Rgb, thickness: int) -> None:
    x_min, y_min, x_max, y_max = box
    inside = np.ascontiguousarray(mask[y_min:y_max, x_min:x_max]).view(np.uint8)
    contours, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, contours, -1, color, thickness, offset=(x_min, y_min))


def _draw_tag(canvas: ImageU8, text: str, box: list[int], color: Rgb) -> None:
    height, width = canvas.shape[:2]
    scale, thickness, pad = _text_style(height)
    (text_width, text_height), baseline = cv2.getTextSize(text, _FONT, scale, thickness)
    tag_width, tag_height = text_width + 2 * pad, text_height + baseline + pad
    x = min(max(0, box[0]), max(0, width - tag_width))
    # Above the box where there is room, else inside its upper edge.
    y = box[1] - tag_height if box[1] >= tag_height else min(box[1], max(0, height - tag_height))
    cv2.rectangle(canvas, (x, y), (x + tag_width, y + tag_height), color, cv2.FILLED)
    cv2.putText(canvas, text, (x + pad, y + text_height + pad // 2 + 1), _FONT, scale, _DARK, thickness, cv2.LINE_AA)


def _shade(canvas: ImageU8, x_min: int, y_min: int, x_max: int, y_max: int) -> None:
    window = canvas[y_min:y_max, x_min:x_max]
    window[:] = (window * 0.35).astype(np.uint8)
