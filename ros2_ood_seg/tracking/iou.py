"""Stable numbers for instances over time, by box overlap."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ros2_ood_seg.config import TrackingConfig
from ros2_ood_seg.types import Instances


@dataclass(frozen=True)
class _Track:
    track_id: int
    box_xyxy: Tensor
    unseen_frames: int = 0


class IoUTracker:
    """Assigns instances to the tracks of earlier frames so that the sum of box IoUs is greatest.

    An instance that overlaps no track enough starts a new one; a track unseen for more than ``max_age`` frames ends, and its
    number is not used again until :meth:`reset`.
    """

    def __init__(self, config: TrackingConfig) -> None:
        self._config = config
        self._tracks: list[_Track] = []
        self._next_id = 1

    def configure(self, config: TrackingConfig) -> None:
        """Goes on with other settings; switched off, all tracks end. Numbers go on in any case."""
        self._config = config
        if not config.enabled:
            self._tracks = []

    def forget(self) -> None:
        """Ends all tracks; for when time jumps in a stream that goes on. Numbers go on, too."""
        self._tracks = []

    def reset(self) -> None:
        """Ends all tracks and begins at 1 again; for another stream."""
        self.forget()
        self._next_id = 1

    def update(self, instances: Instances) -> Instances:
        """Takes the next frame.

        Args:
            instances: Instances of the frame.

        Returns:
            The same instances with ``track_ids`` of 1 and more, unique in the frame.
        """
        boxes = instances.boxes_xyxy.cpu()
        ids = [0] * len(instances)
        seen = []
        if self._tracks and len(instances):
            iou = _box_iou(torch.stack([track.box_xyxy for track in self._tracks]), boxes)
            iou[iou < self._config.iou] = 0.0
            for row, column in zip(*linear_sum_assignment(iou.numpy(), maximize=True), strict=True):
                if iou[row, column] > 0:
                    ids[column] = self._tracks[row].track_id
                    seen.append(_Track(ids[column], boxes[column]))
        found = {track.track_id for track in seen}
        lost = [replace(track, unseen_frames=track.unseen_frames + 1) for track in self._tracks if track.track_id not in found]
        for n, track_id in enumerate(ids):
            if not track_id:
                ids[n] = self._next_id
                self._next_id += 1
                seen.append(_Track(ids[n], boxes[n]))
        self._tracks = seen + [track for track in lost if track.unseen_frames <= self._config.max_age]
        return replace(instances, track_ids=torch.tensor(ids, dtype=torch.int64, device=instances.track_ids.device))


def _box_iou(rows_xyxy: Tensor, columns_xyxy: Tensor) -> Tensor:
    """(R, C) intersection over union of (R, 4) and (C, 4) boxes; torchvision's would cost a process 200 MB for its import."""
    corners = torch.minimum(rows_xyxy[:, None, 2:], columns_xyxy[:, 2:]) - torch.maximum(rows_xyxy[:, None, :2], columns_xyxy[:, :2])
    shared = corners.clamp_(min=0.0).prod(dim=2)
    rows_area, columns_area = ((boxes[:, 2:] - boxes[:, :2]).prod(dim=1) for boxes in (rows_xyxy, columns_xyxy))
    return shared / (rows_area[:, None] + columns_area - shared)
