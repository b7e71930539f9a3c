"""Windows around prompts: what the compact segmenter looks at, the same in training and in use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[float, float, float, float]

BOX_CONTEXT = 1.4
"""Side of a box's window, as a multiple of the box."""
BOX_MARGIN_PX = 8.0
"""Added to it, so that small boxes keep some surroundings."""
MAX_ASPECT = 2.0
"""Windows of longer boxes are not longer than this; what they lose in shape they would otherwise lose in resolution."""
POINT_SIGMA = 0.03
"""Standard deviation of the point map, as a fraction of the crop."""
OUTSIDE = 127
"""Grey level beyond the image border, zero after scaling."""


@dataclass(frozen=True)
class Window:
    """A rectangle of whole pixels; it may reach over the image border.

    Args:
        x: Left column, px.
        y: Upper row, px.
        width: Columns, >= 1.
        height: Rows, >= 1.
    """

    x: int
    y: int
    width: int
    height: int

    def clipped(self, shape_hw: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of an image of that size inside the window."""
        height, width = shape_hw
        rows = slice(min(max(self.y, 0), height), min(max(self.y + self.height, 0), height))
        columns = slice(min(max(self.x, 0), width), min(max(self.x + self.width, 0), width))
        return rows, columns

    def box_to_crop(self, box_xyxy: Box, size: int) -> Box:
        """A box of the image in pixels of the window's square crop of side ``size``."""
        sx, sy = size / self.width, size / self.height
        x0, y0, x1, y1 = box_xyxy
        return (x0 - self.x) * sx, (y0 - self.y) * sy, (x1 - self.x) * sx, (y1 - self.y) * sy

    def box_from_crop(self, box_xyxy: Box, size: int) -> Box:
        """The inverse of :meth:`box_to_crop`."""
        sx, sy = self.width / size, self.height / size
        x0, y0, x1, y1 = box_xyxy
        return x0 * sx + self.x, y0 * sy + self.y, x1 * sx + self.x, y1 * sy + self.y


def clip_box(box_xyxy: Box, shape_hw: tuple[int, int]) -> Box | None:
    """The part of a box inside the image, at least one pixel wide and high.

    Returns:
        None when the box is not finite, holds no area, or lies outside the image.
    """
    height, width = shape_hw
    if not all(math.isfinite(value) for value in box_xyxy):
        return None
    x0, y0 = max(box_xyxy[0], 0.0), max(box_xyxy[1], 0.0)
    x1, y1 = min(box_xyxy[2], float(width)), min(box_xyxy[3], float(height))
    if x1 <= x0 or y1 <= y0:
        return None
    x0, y0 = min(x0, width - 1.0), min(y0, height - 1.0)
    return x0, y0, max(x1, x0 + 1.0), max(y1, y0 + 1.0)


def box_window(box_xyxy: Box) -> Window:
    """The window of a finite box with positive area."""
    x0, y0, x1, y1 = box_xyxy
    long_side = max(x1 - x0, y1 - y0)
    half_width = (BOX_CONTEXT * max(x1 - x0, long_side / MAX_ASPECT) + BOX_MARGIN_PX) / 2
    half_height = (BOX_CONTEXT * max(y1 - y0, long_side / MAX_ASPECT) + BOX_MARGIN_PX) / 2
    left, top = math.floor((x0 + x1) / 2 - half_width), math.floor((y0 + y1) / 2 - half_height)
    return Window(left, top, math.ceil((x0 + x1) / 2 + half_width) - left, math.ceil((y0 + y1) / 2 + half_height) - top)


def point_window(x: float, y: float, side_px: float) -> Window:
    """The square window of side ``side_px`` around the centre of a pixel."""
    side = max(1, round(side_px))
    return Window(round(x + 0.5 - side / 2), round(y + 0.5 - side / 2), side, side)


def cut_window(image: Tensor, window: Window, size: int) -> Tensor:
    """Resamples a window to a square, antialiased; grey beyond the border.

    Args:
        image: (H, W, 3) uint8.
        window: Where to look.
        size: Side of the result, px.

    Returns:
        (3, size, size) float32 in [-1, 1] on the image's device.
    """
    rows, columns = window.clipped((image.shape[0], image.shape[1]))
    part = image[rows, columns].permute(2, 0, 1)
    left, top = columns.start - window.x, rows.start - window.y
    if part.shape[1:] != (window.height, window.width):
        padding = (left, window.width - left - part.shape[2], top, window.height - top - part.shape[1])
        part = F.pad(part, padding, value=OUTSIDE)
    # CUDA resizes no bytes, and bytes are the fast way on a CPU.
    part = part if part.device.type == "cpu" else part.float()
    resized = F.interpolate(part[None], size=(size, size), mode="bilinear", align_corners=False, antialias=True)[0]
    return resized.float().sub_(127.5).div_(127.5)


def prompt_maps(boxes_xyxy: Tensor, points_xy: Tensor, size: int) -> Tensor:
    """The prompt channels of N crops.

    Args:
        boxes_xyxy: (N, 4) float32 in crop pixels; NaN for a prompt without a box.
        points_xy: (N, 2) float32 in crop pixels, pixel edges at whole numbers; NaN for a prompt without a point.
        size: Side of the crops, px.

    Returns:
        (N, 2, size, size) float32 in [0, 1]: the fraction of each pixel that the box covers, and a Gaussian at the point.
    """
    edges = torch.arange(size, device=boxes_xyxy.device, dtype=torch.float32)
    x0, y0, x1, y1 = boxes_xyxy.nan_to_num(0.0).unsqueeze(2).unbind(1)
    across = (torch.minimum(x1, edges + 1) - torch.maximum(x0, edges)).clamp(0, 1)
    down = (torch.minimum(y1, edges + 1) - torch.maximum(y0, edges)).clamp(0, 1)
    boxes = down[:, :, None] * across[:, None, :]
    x, y = points_xy.unsqueeze(2).unbind(1)
    scale = 0.5 / (POINT_SIGMA * size) ** 2
    across = torch.exp(-((edges + 0.5 - x) ** 2) * scale)
    down = torch.exp(-((edges + 0.5 - y) ** 2) * scale)
    points = (down[:, :, None] * across[:, None, :]).nan_to_num(0.0)
    return torch.stack([boxes, points], dim=1)
