"""Point prompts: farthest point sampling of uncertain pixels (UGainS section 3.2) and the baselines of its Table 4."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ros2_ood_seg.config import PointPromptsConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.prompts.candidates import candidate_pixels, raw_threshold
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Prompts, ScoreMap

_TILE_PX = 16
_FIRST_TILES = 8
_KMEANS_SAMPLE = 10_000
_KMEANS_CRITERIA = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 30, 0.5)

Sampler = Callable[[Tensor, PointPromptsConfig], Tensor]
"""(H, W) bool candidates, of which there is at least one, and settings -> (P, 2) float32 ``xy`` px."""


class CandidatePoints:
    """Points sampled from the pixels above a threshold; none when nothing is uncertain.

    Args:
        config: Threshold and number of points.
        sample: Chooses among the candidates.
    """

    def __init__(self, config: PointPromptsConfig, sample: Sampler) -> None:
        self._config = config
        self._sample = sample

    def __call__(self, score_map: ScoreMap, ignore: Tensor | None = None) -> Prompts:
        """See :class:`ros2_ood_seg.prompts.base.PromptGenerator`."""
        config = self._config
        candidates = uncertain_pixels(score_map, config, ignore)
        if int(torch.count_nonzero(candidates)) < config.min_candidates:
            return Prompts.empty(score_map.device)
        return Prompts.from_points(self._sample(candidates, config))


def uncertain_pixels(score_map: ScoreMap, config: PointPromptsConfig, ignore: Tensor | None) -> Tensor:
    """(H, W) bool, the pixels that points may be sampled from: above the threshold of the settings, and not ignored."""
    raw = config.raw_threshold if config.use_raw_threshold else raw_threshold(score_map.calibration, config.threshold)
    return candidate_pixels(score_map, raw, ignore)


class GridPoints:
    """SAM's automatic grid, ``grid_side`` by ``grid_side`` points whatever the scores say, but none on the ignore mask."""

    def __init__(self, config: PointPromptsConfig) -> None:
        self._side = config.grid_side

    def __call__(self, score_map: ScoreMap, ignore: Tensor | None = None) -> Prompts:
        """See :class:`ros2_ood_seg.prompts.base.PromptGenerator`."""
        height, width = score_map.shape_hw
        unit = (torch.arange(self._side, device=score_map.device) + 0.5) / self._side
        y, x = torch.meshgrid(unit * height, unit * width, indexing="ij")
        points = torch.stack([x.flatten(), y.flatten()], dim=1)
        if ignore is not None:
            points = points[~ignore[points[:, 1].long(), points[:, 0].long()]]
        return Prompts.from_points(points)


def farthest_points(candidates: Tensor, count: int) -> Tensor:
    """Farthest point sampling as UGainS defines it: the first raster pixel, then always the one farthest from all chosen ones.

    Among equally far pixels the first in raster order wins. Distances are exact integers, so that all devices agree.

    Args:
        candidates: (H, W) bool, H and W below 32768.
        count: Number of points; with fewer candidates each is taken once.

    Returns:
        (P, 2) float32 ``xy`` px in the order they were chosen, on the same device.
    """
    if candidates.device.type == "cpu":
        points = _farthest_points_tiled(candidates.numpy(), count)
        return torch.from_numpy(points.astype(np.float32))
    return _farthest_points_dense(candidates, count)


def _farthest_points_dense(candidates: Tensor, count: int) -> Tensor:
    """The plain algorithm, one pass over the image per point, without waiting for the device in between."""
    height, width = candidates.shape
    ys = torch.arange(height, dtype=torch.int32, device=candidates.device)
    xs = torch.arange(width, dtype=torch.int32, device=candidates.device)
    farthest = torch.iinfo(torch.int32).max
    distance = torch.where(candidates, farthest, -1).to(torch.int32).contiguous()
    chosen = []
    far = []
    for _ in range(count):
        value, index = distance.view(-1).max(dim=0)
        y, x = index // width, index % width
        chosen.append(torch.stack([x, y]))
        far.append(value)
        squared = (ys - y).square()[:, None] + (xs - x).square()[None, :]
        torch.minimum(distance, squared.to(torch.int32), out=distance)
    # Once every candidate is taken, the farthest one is 0 px away.
    return torch.stack(chosen)[torch.stack(far) > 0].float()


def _farthest_points_tiled(candidates: NDArray[np.bool_], count: int) -> NDArray[np.int32]:
    """The same points, looking only into tiles that may hold the farthest pixel.

    A tile's bound is never below the distance of its farthest pixel: it is the least over the chosen points of the
    distance to the tile's farthest corner, or the exact value of an earlier step. Every tile whose bound reaches the best exact
    distance is looked into, so the maximum and all its ties are found.
    """
    height, width = candidates.shape
    size = _TILE_PX
    rows, columns = -(-height // size), -(-width // size)
    padded = np.zeros((rows * size, columns * size), dtype=bool)
    padded[:height, :width] = candidates
    tiles = padded.reshape(rows, size, columns, size).transpose(0, 2, 1, 3).reshape(-1, size, size)
    occupied = np.flatnonzero(tiles.reshape(-1, size * size).any(axis=1))
    tiles = tiles[occupied]
    y_min = (occupied // columns * size).astype(np.int32)
    x_min = (occupied % columns * size).astype(np.int32)
    offsets = np.arange(size, dtype=np.int32)
    bound = np.full(occupied.size, np.iinfo(np.int32).max, dtype=np.int32)
    place = np.zeros(occupied.size, dtype=np.int64)
    points = np.empty((count, 2), dtype=np.int32)

    def look_into(which: NDArray[np.intp], known: NDArray[np.int32]) -> None:
        left, top = x_min[which, None], y_min[which, None]
        near_x = np.maximum(np.maximum(left - known[:, 0], known[:, 0] - left - (size - 1)), 0)
        near_y = np.maximum(np.maximum(top - known[:, 1], known[:, 1] - top - (size - 1)), 0)
        near = near_x * near_x + near_y * near_y
        # A point farther from the whole tile than the tile's bound is not the nearest one of any of its pixels.
        relevant = int((near <= bound[which, None]).sum(axis=1).max())
        nearest = np.argpartition(near, relevant - 1, axis=1)[:, :relevant]
        dx = left[..., None] + offsets - known[nearest, 0, None]
        dy = top[..., None] + offsets - known[nearest, 1, None]
        dx, dy = dx * dx, dy * dy
        distance = dy[:, 0, :, None] + dx[:, 0, None, :]
        for k in range(1, relevant):
            np.minimum(distance, dy[:, k, :, None] + dx[:, k, None, :], out=distance)
        distance[~tiles[which]] = -1
        flat = distance.reshape(which.size, -1)
        best = flat.argmax(axis=1)
        bound[which] = np.take_along_axis(flat, best[:, None], axis=1)[:, 0]
        place[which] = (top[:, 0] + best // size).astype(np.int64) * width + left[:, 0] + best % size

    first = int(candidates.argmax())
    points[0] = first % width, first // width
    for n in range(1, count):
        x, y = points[n - 1]
        far_x = np.maximum(x - x_min, x_min + (size - 1) - x)
        far_y = np.maximum(y - y_min, y_min + (size - 1) - y)
        np.minimum(bound, far_x * far_x + far_y * far_y, out=bound)
        top = min(_FIRST_TILES, bound.size)
        seen = np.argpartition(bound, bound.size - top)[-top:]
        look_into(seen, points[:n])
        fresh = bound >= bound[seen].max()
        fresh[seen] = False
        rest = np.flatnonzero(fresh)
        if rest.size:
            look_into(rest, points[:n])
            seen = np.concatenate([seen, rest])
        farthest = bound[seen].max()
        if farthest <= 0:
            return points[:n]
        index = int(place[seen[bound[seen] == farthest]].min())
        points[n] = index % width, index // width
    return points


def kmeans_points(candidates: Tensor, count: int, seed: int) -> Tensor:
    """The candidates nearest to the centres of k-means clusters (k-means++, Lloyd), without duplicates.

    Args:
        candidates: (H, W) bool with at least one True; of more than 10000, a random sample is clustered.
        count: Number of clusters; with fewer candidates, all of them.
        seed: Same seed, same points.

    Returns:
        (P, 2) float32 ``xy`` px on the same device, P <= count.
    """
    xy = _coordinates_xy(candidates)
    if len(xy) <= count:
        return xy
    if len(xy) > _KMEANS_SAMPLE:
        chosen = np.random.default_rng(seed).choice(len(xy), _KMEANS_SAMPLE, replace=False)
        xy = xy[torch.from_numpy(np.sort(chosen)).to(xy.device)]
    data = xy.cpu().numpy()
    cv2.setRNGSeed(seed)
    _, _, centres = cv2.kmeans(data, min(count, len(data)), None, _KMEANS_CRITERIA, 1, cv2.KMEANS_PP_CENTERS)
    # The faster matrix product takes squares of coordinates from one another, which leaves no digits for neighbouring pixels.
    exact = "donot_use_mm_for_euclid_dist"
    nearest = torch.cdist(torch.from_numpy(centres), torch.from_numpy(data), compute_mode=exact).argmin(dim=1)
    return xy[torch.from_numpy(np.unique(nearest)).to(xy.device)]


def random_points(candidates: Tensor, count: int, seed: int) -> Tensor:
    """A uniform random choice of candidates without replacement, the same on all devices.

    Args:
        candidates: (H, W) bool.
        count: Number of points; with fewer candidates, all of them.
        seed: Same seed, same points.

    Returns:
        (P, 2) float32 ``xy`` px on the same device.
    """
    xy = _coordinates_xy(candidates)
    chosen = np.random.default_rng(seed).choice(len(xy), min(count, len(xy)), replace=False)
    return xy[torch.from_numpy(chosen).to(xy.device)]


def oracle_points(instances: Tensor) -> Tensor:
    """A point well inside each object, for upper bounds in evaluation: the pixel farthest from the object's border.

    Args:
        instances: (H, W) integer labels, 0 background, each other value one object.

    Returns:
        (K, 2) float32 ``xy`` px by ascending label, on the same device.

    Raises:
        InputError: Not a two-dimensional integer tensor.
    """
    if instances.ndim != 2 or instances.is_floating_point():
        raise InputError(f"instance labels must be (H, W) integers, got {tuple(instances.shape)} {instances.dtype}")
    labels = instances.cpu().numpy()
    points = []
    for label in np.unique(labels[labels != 0]):
        inside = labels == label
        y, x = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
        # A margin of background, so that the image's edge is a border too.
        crop = np.pad(inside[y[0] : y[-1] + 1, x[0] : x[-1] + 1], 1).astype(np.uint8)
        depth = cv2.distanceTransform(crop, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        points.append((x[0] + column - 1, y[0] + row - 1))
    return torch.tensor(points, dtype=torch.float32, device=instances.device).reshape(-1, 2)


def _coordinates_xy(candidates: Tensor) -> Tensor:
    return torch.nonzero(candidates).flip(1).float()


def build_fps(config: PointPromptsConfig, runtime: Runtime) -> CandidatePoints:
    """Factory of farthest point sampling (UGainS)."""
    return CandidatePoints(config, lambda candidates, c: farthest_points(candidates, c.count))


def build_kmeans(config: PointPromptsConfig, runtime: Runtime) -> CandidatePoints:
    """Factory of k-means sampling."""
    return CandidatePoints(config, lambda candidates, c: kmeans_points(candidates, c.count, c.seed))


def build_random(config: PointPromptsConfig, runtime: Runtime) -> CandidatePoints:
    """Factory of random sampling."""
    return CandidatePoints(config, lambda candidates, c: random_points(candidates, c.count, c.seed))


def build_grid(config: PointPromptsConfig, runtime: Runtime) -> GridPoints:
    """Factory of the dense grid."""
    return GridPoints(config)
