"""Instances without overlaps, as messages and label images have them: each pixel belongs to one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ros2_ood_seg.types import Instances

MAX_INSTANCES = 65534
"""Ids are pixel values of a 16-bit image in which 65535 means unlabelled (vision_msgs)."""


@dataclass(frozen=True)
class Runs:
    """One instance's pixels as runs of the column-major image.

    Args:
        starts: (R,) int64 first pixel of each run, ascending.
        ends: (R,) int64 one past the last pixel of each run.
        height: Rows of the image, px.
        width: Columns of the image, px.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    height: int
    width: int

    @property
    def area_px(self) -> int:
        """Number of pixels."""
        return int((self.ends - self.starts).sum())

    @property
    def box_xyxy(self) -> tuple[int, int, int, int]:
        """Tight box, px, maximum exclusive."""
        last = self.ends - 1
        x_min, x_max = int(self.starts[0] // self.height), int(last[-1] // self.height) + 1
        # A run that goes on in the next column touches the lower and the upper border.
        if np.any(self.starts // self.height != last // self.height):
            return x_min, 0, x_max, self.height
        return x_min, int((self.starts % self.height).min()), x_max, int((last % self.height).max()) + 1

    def counts(self) -> NDArray[np.uint32]:
        """Run lengths as in InstanceMask.msg."""
        edges = np.empty(2 * len(self.starts) + 2, dtype=np.int64)
        edges[0], edges[-1] = 0, self.height * self.width
        edges[1:-1:2], edges[2:-1:2] = self.starts, self.ends
        counts = np.diff(edges).astype(np.uint32)
        return counts if counts[-1] else counts[:-1]


@dataclass(frozen=True)
class DisjointInstances:
    """Instances without overlaps: each pixel belongs to the best-scored instance that claims it.

    Args:
        source: The instances as the pipeline found them, by score.
        kept: (N,) int64 index of those that own enough pixels, by score.
        labels: (H, W) uint16, 0 background, k the k-th of ``kept`` from 1.
        runs: The pixels of each in ``labels``.
    """

    source: Instances
    kept: NDArray[np.int64]
    labels: NDArray[np.uint16]
    runs: tuple[Runs, ...]

    @classmethod
    def from_instances(cls, instances: Instances, min_area_px: int = 1) -> DisjointInstances:
        """Settles who owns each pixel.

        Args:
            instances: By score.
            min_area_px: An instance that would own fewer pixels, and none at all in any case, is dropped.
        """
        masks, boxes = instances.masks[:MAX_INSTANCES], instances.boxes_xyxy[:MAX_INSTANCES]
        kept, labels = _without_overlaps(masks, boxes, min_area_px)
        return cls(instances, kept, labels, tuple(runs for _, runs in _label_runs(labels)))

    def instances(self) -> Instances:
        """The kept instances with their whole masks, overlaps and all."""
        if len(self.kept) == len(self.source):
            return self.source
        return self.source.select(torch.as_tensor(self.kept, device=self.source.scores.device))

    def rows(self) -> Iterator[tuple[Runs, int, float, float, float]]:
        """Pixels, track id, score, raw score and mask quality of each kept instance, by score."""
        found = self.source
        columns = (found.track_ids, found.scores, found.raw_scores, found.mask_quality)
        return zip(self.runs, *(column.cpu().numpy()[self.kept].tolist() for column in columns), strict=True)


def _without_overlaps(masks: Tensor, boxes_xyxy: Tensor, min_area_px: int) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
    """Index of the masks, best first, that have enough pixels which no better one of them has, and whose each pixel is, from 1."""
    labels = torch.zeros(masks.shape[1:], dtype=torch.int32, device=masks.device)
    kept: list[int] = []
    for k, (x_min, y_min, x_max, y_max) in enumerate(boxes_xyxy.int().tolist()):
        window = labels[y_min:y_max, x_min:x_max]
        own = masks[k, y_min:y_max, x_min:x_max] & (window == 0)
        # What is dropped takes no pixels from the next.
        if int(torch.count_nonzero(own)) >= max(1, min_area_px):
            kept.append(k)
            window.masked_fill_(own, len(kept))
    return np.array(kept, dtype=np.int64), labels.cpu().numpy().astype(np.uint16)


def _label_runs(labels: NDArray[np.uint16]) -> Iterator[tuple[int, Runs]]:
    """The runs of every label but 0, by label; a single pass over the frame finds all of them."""
    height, width = labels.shape
    flat = cv2.transpose(labels).ravel()
    starts = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)
    ends = np.append(starts[1:], height * width)
    values = flat[starts]
    for label in np.unique(values[values > 0]):
        own = values == label
        yield int(label), Runs(starts[own], ends[own], height, width)
