"""The compact segmenter: crops a window around each prompt and segments it with one small network.

A box is cropped once, and once more around its mask where that fits the box badly, as boxes of a detector may cut an object or be too
large; the mask of the higher predicted IoU stays. A point says nothing of the object's size, so it is first cropped in windows of three
sizes; the mask of the highest predicted IoU, the way Segment Anything chooses among its three, gives a box, and box and point together
are cropped again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ros2_ood_seg.config import SegmenterConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.segmenters.networks.compact import INPUT_CHANNELS, MASK_STRIDE, CompactNet, fold_batch_norm
from ros2_ood_seg.segmenters.windows import Box, Window, box_window, clip_box, cut_window, point_window, prompt_maps
from ros2_ood_seg.types import Masks, Prompts
from ros2_ood_seg.weights import find_weights, load_weights
from ros2_ood_seg.weights.store import load_into

WEIGHTS_NAME = "compact_segmenter"
FAMILY = "compact_segmenter"
CROP_PX = 192
"""Side of the crops of boxes."""
POINT_CROP_PX = 128
"""Side of the crops in which a point's object is looked for."""
POINT_WINDOWS = (0.1, 0.3, 0.9)
"""Sides of a point's windows, as fractions of the image height."""
FITTING_IOU = 0.8
"""A box is tried again when its IoU with the extent of its mask is lower."""
_TAIL = 0.01
_NAN = float("nan")


@dataclass(frozen=True)
class View:
    """One crop to segment.

    Args:
        window: Where it is cut.
        box_xyxy: Box prompt in image pixels, or None.
        point_xy: Point prompt in image pixels, at a pixel centre of integer coordinates, or None.
    """

    window: Window
    box_xyxy: Box | None = None
    point_xy: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Answer:
    """What the network said of a view.

    Args:
        view: The view.
        logits: (1, size/2, size/2) float32, positive inside.
        iou: Predicted IoU in [0, 1].
    """

    view: View
    logits: Tensor
    iou: float


def network_input(image: Tensor, views: Sequence[View], size: int) -> Tensor:
    """What the network sees of each view.

    Args:
        image: (H, W, 3) uint8.
        views: N >= 1 views.
        size: Side of the crops, px.

    Returns:
        (N, 5, size, size) float32 on the image's device.
    """
    crops = torch.stack([cut_window(image, view.window, size) for view in views])
    boxes = [(_NAN,) * 4 if v.box_xyxy is None else v.window.box_to_crop(v.box_xyxy, size) for v in views]
    points = [(_NAN,) * 2 if v.point_xy is None else _point_to_crop(v.window, v.point_xy, size) for v in views]
    maps = prompt_maps(torch.tensor(boxes, device=image.device), torch.tensor(points, device=image.device), size)
    return torch.cat([crops, maps], dim=1)


def _point_to_crop(window: Window, point_xy: tuple[float, float], size: int) -> tuple[float, float]:
    x, y = point_xy
    return window.box_to_crop((x + 0.5, y + 0.5, x + 0.5, y + 0.5), size)[:2]


class CompactSegmenter:
    """Boxes and points to masks with a predicted IoU, in batches.

    A box or point that is not finite, holds no area or lies outside the image gets an empty mask of quality 0.

    Args:
        network: In eval mode, on the runtime's device.
        runtime: Device and precision.
        batch_size: Crops per call of the network.
    """

    name = "compact"

    def __init__(self, network: CompactNet, runtime: Runtime, batch_size: int = 64) -> None:
        self._forward = runtime.prepare(network, torch.zeros((1, INPUT_CHANNELS, 64, 64), device=runtime.device), parallel=True)
        self._batch_size = batch_size

    @torch.no_grad()
    def __call__(self, image: Tensor, prompts: Prompts) -> Masks:
        """Segments one image; see :class:`~ros2_ood_seg.segmenters.base.PromptableSegmenter`.

        Args:
            image: (H, W, 3) uint8 RGB on the runtime's device.
            prompts: Boxes and points in the image's pixels.

        Returns:
            One mask per prompt, the boxes' first.

        Raises:
            InputError: The image is not (H, W, 3) uint8.
        """
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise InputError(
                f"segmenter '{self.name}' needs an image of shape (H, W, 3) and type uint8, got {tuple(image.shape)} {image.dtype}"
            )
        shape_hw = (int(image.shape[0]), int(image.shape[1]))
        masks = torch.zeros((len(prompts), *shape_hw), dtype=torch.bool, device=image.device)
        quality = torch.zeros(len(prompts), device=image.device)
        views: dict[int, View] = {}
        for index, values in enumerate(prompts.boxes_xyxy.tolist()):
            box = clip_box((values[0], values[1], values[2], values[3]), shape_hw)
            if box is not None:
                views[index] = View(box_window(box), box_xyxy=box)
        views.update({prompts.num_boxes + index: view for index, view in self._views_of_points(image, prompts.points_xy).items()})
        found = self._segment(image, views)
        again = _refitted({index: answer for index, answer in found.items() if index < prompts.num_boxes}, shape_hw)
        for index, second in self._segment(image, again).items():
            found[index] = max(found[index], second, key=lambda answer: answer.iou)
        for index, answer in found.items():
            _paste(masks[index], answer.logits, answer.view.window)
        if found:
            quality[list(found)] = quality.new_tensor([answer.iou for answer in found.values()])
        return Masks(masks, quality)

    def _segment(self, image: Tensor, views: Mapping[int, View]) -> dict[int, _Answer]:
        """What the network says of each view, in batches."""
        answers = {}
        order = list(views)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            logits, iou = self._run(image, [views[index] for index in batch], CROP_PX)
            for index, mask, score in zip(batch, logits, iou.tolist(), strict=True):
                answers[index] = _Answer(views[index], mask, score)
        return answers

    def _run(self, image: Tensor, views: Sequence[View], size: int) -> tuple[Tensor, Tensor]:
        """(N, 1, size/2, size/2) float32 logits and (N,) predicted IoU of a batch."""
        logits, iou = self._forward(network_input(image, views, size))
        return logits.float(), iou.float().sigmoid()

    def _views_of_points(self, image: Tensor, points_xy: Tensor) -> dict[int, View]:
        """Finds each point's object roughly; point index to the view that segments it finely."""
        height, width = int(image.shape[0]), int(image.shape[1])
        points = {
            i: (float(x), float(y)) for i, (x, y) in enumerate(points_xy.tolist()) if -0.5 <= x < width - 0.5 and -0.5 <= y < height - 0.5
        }
        tries = [(i, View(point_window(x, y, part * height), point_xy=(x, y))) for i, (x, y) in points.items() for part in POINT_WINDOWS]
        best: dict[int, tuple[float, View]] = {}
        for start in range(0, len(tries), self._batch_size):
            batch = tries[start : start + self._batch_size]
            logits, iou = self._run(image, [view for _, view in batch], POINT_CROP_PX)
            boxes = _boxes_around([view for _, view in batch], logits.squeeze(1), POINT_CROP_PX, (height, width))
            for (index, view), box, score in zip(batch, boxes, iou.tolist(), strict=True):
                if box is not None and (index not in best or score > best[index][0]):
                    best[index] = (score, View(box_window(box), box_xyxy=box, point_xy=view.point_xy))
        return {index: view for index, (_, view) in best.items()}


def _refitted(answers: Mapping[int, _Answer], shape_hw: tuple[int, int]) -> dict[int, View]:
    """Views of the boxes around the masks, where there is a mask and its box is another than the one asked about."""
    if not answers:
        return {}
    logits = torch.cat([answer.logits for answer in answers.values()])
    boxes = _boxes_around([answer.view for answer in answers.values()], logits, CROP_PX, shape_hw)
    again = {}
    for (index, answer), around in zip(answers.items(), boxes, strict=True):
        asked = answer.view.box_xyxy
        if asked and around and _iou(asked, around) < FITTING_IOU:
            again[index] = View(box_window(around), box_xyxy=around)
    return again


def _boxes_around(views: Sequence[View], logits: Tensor, size: int, shape_hw: tuple[int, int]) -> list[Box | None]:
    """The boxes of masks in the image's pixels, None for an empty one.

    Args:
        views: N views.
        logits: (N, size/2, size/2), what the network said of them.
        size: Side of the crops, px.
        shape_hw: Of the image.
    """
    extents = _extent(logits).mul_(MASK_STRIDE).tolist()
    crops = zip(views, extents, strict=True)
    return [clip_box(view.window.box_from_crop((x0, y0, x1, y1), size), shape_hw) for view, (x0, y0, x1, y1) in crops]


def _extent(logits: Tensor) -> Tensor:
    """Boxes of masks without their outermost specks.

    Args:
        logits: (N, h, w), positive inside.

    Returns:
        (N, 4) float32 ``xyxy`` px of the logits that leave at most :data:`_TAIL` of the mask out on each side; without area
        for an empty mask.
    """
    inside = (logits > 0).float()
    sides = []
    for axis in (1, 2):
        share = inside.sum(dim=axis).cumsum(dim=1)
        total = share[:, -1:]
        low = (share <= _TAIL * total).sum(dim=1)
        high = (share < (1 - _TAIL) * total).sum(dim=1) + (total[:, 0] > 0)
        sides.append((torch.where(total[:, 0] > 0, low, high), high))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def _paste(mask: Tensor, logits: Tensor, window: Window) -> None:
    """Writes a crop's mask into the image's.

    Args:
        mask: (H, W) bool, written to.
        logits: (1, h, w) float32.
        window: Where the crop was cut.
    """
    rows, columns = window.clipped((mask.shape[0], mask.shape[1]))
    full = F.interpolate(logits[None], size=(window.height, window.width), mode="bilinear", align_corners=False)[0, 0]
    mask[rows, columns] = full[rows.start - window.y : rows.stop - window.y, columns.start - window.x : columns.stop - window.x] > 0


def network_from_metadata(metadata: dict[str, Any]) -> CompactNet:
    """The network that a weights file was trained for, without its weights."""
    return CompactNet(width=int(metadata.get("width", 64)))


def build(config: SegmenterConfig, runtime: Runtime) -> CompactSegmenter:
    """Makes the segmenter from its settings; see :data:`~ros2_ood_seg.segmenters.SEGMENTERS`.

    Raises:
        WeightsError: The weights are missing, damaged or of another network.
    """
    return from_network(load_network(config.weights, runtime.weights_dir), runtime, config.batch_size)


def load_network(weights: str = "", weights_dir: Path | None = None) -> CompactNet:
    """The network with its weights.

    Args:
        weights: File or name, empty for the bundled ones.
        weights_dir: Folder of further weights.

    Raises:
        WeightsError: The weights are missing, damaged or of another network.
    """
    file = load_weights(find_weights(weights or WEIGHTS_NAME, weights_dir))
    network = network_from_metadata(file.metadata)
    load_into(network, file, FAMILY)
    return network


def from_network(network: CompactNet, runtime: Runtime, batch_size: int = 64) -> CompactSegmenter:
    """Makes the segmenter from a trained network, which is changed for fast inference."""
    fold_all(network).to(runtime.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return CompactSegmenter(network, runtime, batch_size)


def fold_all(network: CompactNet) -> CompactNet:
    """Folds the batch norms of the decoder too, in place: the network as it runs."""
    for module in network.children():
        if isinstance(module, torch.nn.Sequential):
            fold_batch_norm(module)
    return network.eval().requires_grad_(False)


def _iou(first_xyxy: Sequence[float], second_xyxy: Sequence[float]) -> float:
    """Of two boxes that are not empty; torchvision's would have to be imported."""
    (left, top, right, bottom), (x0, y0, x1, y1) = first_xyxy, second_xyxy
    shared = max(0.0, min(right, x1) - max(left, x0)) * max(0.0, min(bottom, y1) - max(top, y0))
    return shared / ((right - left) * (bottom - top) + (x1 - x0) * (y1 - y0) - shared)
