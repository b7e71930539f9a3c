"""Outlier exposure: road images with objects pasted into them that do not belong there (S2M section 3.3, Eqs. 3-5).

Road images (inliers) come from :mod:`~ros2_ood_seg.training.road_images`, cut-outs (outliers) from
:mod:`~ros2_ood_seg.training.cutouts`.
:class:`OutlierExposure` pastes the one into the other, deterministic by (seed, index), without writing to disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.image_encodings import read_rgb
from ros2_ood_seg.training.cutouts import Cutout, procedural_cutout, procedural_outline, read_coco, read_coco_panoptic, read_mask_folder
from ros2_ood_seg.training.road_images import (
    IGNORE,
    RoadImage,
    is_held_out,
    list_images,
    read_camvid,
    read_cityscapes,
    read_idd_lite,
    read_road_folder,
)
from ros2_ood_seg.training.scenes import UNCOUNTED, Scene

__all__ = [
    "IGNORE",
    "Cutout",
    "OutlierExposure",
    "PasteSettings",
    "RoadImage",
    "RoadSample",
    "contact_sheet",
    "is_held_out",
    "list_images",
    "procedural_cutout",
    "procedural_outline",
    "read_camvid",
    "read_cityscapes",
    "read_coco",
    "read_coco_panoptic",
    "read_idd_lite",
    "read_mask_folder",
    "read_road_folder",
    "tight_boxes_xyxy",
]


@dataclass(frozen=True)
class PasteSettings:
    """How road images are cropped and objects pasted.

    Args:
        crop_hw: Size of the samples, px.
        frame_width_px: Range of the width that a whole frame is scaled to before cropping, log-uniform.
        scene_width_px: The same of pictures that show anomalies themselves, in which objects are larger.
        objects_per_image: Range of the number of anomalies, inclusive.
        known_per_image: Range of the number of pasted objects of known classes (labelled normal), inclusive.
        object_px: Range of an object's longest side in the sample, log-uniform.
        object_scales: As S2M instead of all that follows on size and place: cut-outs, never mirrored, are scaled by one of these factors,
            cut to the sample if larger, and lie anywhere entirely inside it; empty for none.
        procedural: Chance that an anomaly is a random blob or the outline of any cut-out, filled with a piece of another picture (without
            cut-outs: with a random texture).
        detail: Chance that an enlarged, soft frame gets fine texture and sharp edges before anything is pasted: otherwise sharpness alone
            would tell what was pasted.
        illumination: Chance of sunlit and shaded patches, labelled normal.
        known_classes: In-distribution classes that may be pasted as normal. Without vehicles, unusual ones stay anomalies.
        perspective: Chance that an object's size follows its height in the image as on a flat road.
        on_road: Chance that an object stands on a pixel labelled drivable, where there are any.
        harmonise: Chance that an object takes over colour and brightness of its surroundings, by a random share.
        blur: Chance that an object sharper than the frame is blurred to its sharpness.
        feather: Chance of a soft edge.
        shadow: Chance of a soft contact shadow.
        native: Chance to paste at the frame's own resolution, so that object and frame are equally sharp.
        mirror: Chance that the finished sample is mirrored.
        augment: Brightness, colour, gamma, blur, noise and JPEG of the finished sample.
    """

    crop_hw: tuple[int, int] = (288, 480)
    frame_width_px: tuple[float, float] = (480.0, 1600.0)
    scene_width_px: tuple[float, float] = (300.0, 1000.0)
    objects_per_image: tuple[int, int] = (1, 4)
    known_per_image: tuple[int, int] = (0, 2)
    object_px: tuple[float, float] = (10.0, 450.0)
    object_scales: tuple[float, ...] = ()
    procedural: float = 0.12
    known_classes: tuple[int, ...] = (2, 4)
    perspective: float = 0.4
    on_road: float = 0.55
    harmonise: float = 0.5
    blur: float = 0.25
    feather: float = 0.8
    shadow: float = 0.3
    native: float = 0.4
    detail: float = 0.0
    illumination: float = 0.6
    mirror: float = 0.5
    augment: bool = True

    @classmethod
    def published(cls) -> PasteSettings:
        """S2M: one cut-out, hard edge, uniformly random place, mirrored 700x700 crops, fixed scales."""
        return cls(
            crop_hw=(700, 700),
            frame_width_px=(2048.0, 2048.0),
            objects_per_image=(1, 1),
            known_per_image=(0, 0),
            object_scales=(0.25, 0.5, 0.5, 0.75, 0.1, 0.125),
            procedural=0.0,
            perspective=0.0,
            on_road=0.0,
            harmonise=0.0,
            blur=0.0,
            feather=0.0,
            shadow=0.0,
            native=0.0,
            detail=0.0,
            illumination=0.0,
            augment=False,
        )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            # Whatever is a single number is a chance.
            if isinstance(value, (int, float)) and not 0.0 <= value <= 1.0:
                raise InputError(f"paste setting '{name}' is {value}, allowed: a number from 0 to 1")
        for name in ("frame_width_px", "scene_width_px", "objects_per_image", "known_per_image", "object_px"):
            low, high = getattr(self, name)
            if low < 0 or high < low:
                raise InputError(f"paste setting '{name}' is {(low, high)}, allowed: a range from low to high, not negative")
        sizes = (self.frame_width_px[0], self.scene_width_px[0], self.object_px[0], *self.object_scales)
        if min(self.crop_hw) < 16 or min(sizes) <= 0:
            raise InputError(
                f"paste settings 'crop_hw' {self.crop_hw}, 'frame_width_px' {self.frame_width_px}, 'scene_width_px' {self.scene_width_px}, "
                f"'object_px' {self.object_px} and 'object_scales' {self.object_scales}, allowed: crops of 16 px or more, all else positive"
            )


@dataclass(frozen=True)
class RoadSample:
    """One training sample.

    Args:
        image: (H, W, 3) uint8 RGB.
        semantic: (H, W) uint8 common class, :data:`IGNORE` for unknown and on anomalies.
        anomaly: (H, W) uint8, 0 normal, 1 anomaly, :data:`IGNORE` not counted (only in scenes).
        instances: (H, W) int32, 0 none, k the k-th visible anomaly.
        boxes_xyxy: (N, 4) float32 px, T_box of S2M Eq. 5: tight, maximum exclusive, row k - 1 for instance k.
    """

    image: NDArray[np.uint8]
    semantic: NDArray[np.uint8]
    anomaly: NDArray[np.uint8]
    instances: NDArray[np.int32]
    boxes_xyxy: NDArray[np.float32]


class OutlierExposure(Dataset[RoadSample]):
    """Crops of road images and scenes with pasted objects; sample ``index`` is always the same for the same seed and data.

    Args:
        roads: In-distribution frames and pictures that hold anomalies, by source; a source is drawn with the chance of its weight.
        cutouts: Objects; anomalies and known ones.
        settings: How to paste.
        seed: Seed of everything random.
        length: Number of samples.
        weights: Weight per source of ``roads``; equal when None.

    Raises:
        InputError: No road images, or objects asked for and none there.
    """

    def __init__(
        self,
        roads: Sequence[Sequence[RoadImage | Scene]],
        cutouts: Sequence[Cutout],
        settings: PasteSettings,
        seed: int,
        length: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.roads = [source for source in roads if source]
        self.anomalies = [c for c in cutouts if c.is_anomaly]
        self.known = [c for c in cutouts if c.semantic in settings.known_classes]
        self.cutouts = cutouts
        self.settings = settings
        self.seed = seed
        self.length = length
        if not self.roads or len(self.roads) != len(roads):
            raise InputError("outlier exposure needs at least one road image in each source")
        if settings.objects_per_image[1] > 0 and not self.anomalies and settings.procedural < 1.0:
            raise InputError(
                "outlier exposure needs cut-outs of classes that Cityscapes does not know, got none on this side of the split: a share of "
                "them, chosen by name, is held out; give more with --coco, --coco-panoptic or --objects"
            )
        chances = np.asarray(weights if weights is not None else [1.0] * len(self.roads), np.float64)
        if chances.shape != (len(self.roads),) or (chances < 0).any() or chances.sum() == 0:
            raise InputError(f"outlier exposure needs one weight per source ({len(self.roads)}), not negative, got {list(chances)}")
        self.chances = chances / chances.sum()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> RoadSample:
        rng = np.random.default_rng([self.seed, index])
        source = self.roads[rng.choice(len(self.roads), p=self.chances)]
        frame = source[int(rng.integers(len(source)))]
        if isinstance(frame, Scene):
            canvas = _Canvas.cropped(*frame.read(), self.settings.scene_width_px, self.settings, rng)
        else:
            image, semantic = frame.read()
            canvas = _Canvas.cropped(image, semantic, np.zeros(semantic.shape, np.int32), self.settings.frame_width_px, self.settings, rng)
        if rng.random() < self.settings.illumination:
            canvas.relight(rng)
        jobs = [True] * _draw(rng, self.settings.objects_per_image) + [False] * (
            _draw(rng, self.settings.known_per_image) if self.known else 0
        )
        for is_anomaly in rng.permutation(jobs):
            canvas.paste(self._cutout(rng, bool(is_anomaly)), rng)
        return canvas.finished(rng)

    def _cutout(self, rng: np.random.Generator, is_anomaly: bool) -> tuple[NDArray[np.uint8], int]:
        if is_anomaly and (not self.anomalies or rng.random() < self.settings.procedural):
            return self._procedural(rng), IGNORE
        pool = self.anomalies if is_anomaly else self.known
        cutout = pool[rng.integers(len(pool))]
        return cutout.read() if self.settings.object_scales else _cached(cutout), cutout.semantic

    def _procedural(self, rng: np.random.Generator) -> NDArray[np.uint8]:
        rgba = procedural_cutout(rng, int(rng.integers(48, 240)))
        if not self.cutouts:
            return rgba
        shape, filling = (self.cutouts[int(k)] for k in rng.integers(len(self.cutouts), size=2))
        alpha = _cached(shape)[..., 3] if rng.random() < 0.5 else rgba[..., 3]
        picture = read_rgb(filling.image)
        h, w = min(alpha.shape[0], picture.shape[0]), min(alpha.shape[1], picture.shape[1])
        y, x = int(rng.integers(picture.shape[0] - h + 1)), int(rng.integers(picture.shape[1] - w + 1))
        return np.dstack([_resize(picture[y : y + h, x : x + w], alpha.shape), alpha])


class _Canvas:
    """A crop of a road image while objects are pasted into it; ``scale`` canvas pixels make one of the finished sample."""

    def __init__(
        self,
        image: NDArray[np.uint8],
        semantic: NDArray[np.uint8],
        instances: NDArray[np.int32],
        settings: PasteSettings,
        scale: float,
        horizon_y: float,
    ) -> None:
        self.image = image
        self.semantic = semantic
        self.instances = instances
        self.settings = settings
        self.scale = scale
        self.horizon_y = horizon_y
        self.count = int(instances.max(initial=0))

    @classmethod
    def cropped(
        cls,
        image: NDArray[np.uint8],
        semantic: NDArray[np.uint8],
        instances: NDArray[np.int32],
        width_px: tuple[float, float],
        settings: PasteSettings,
        rng: np.random.Generator,
    ) -> _Canvas:
        height, width = image.shape[:2]
        out_h, out_w = settings.crop_hw
        enlarge = max(_log_uniform(rng, width_px) / width, out_h / height, out_w / width)
        h, w = min(height, round(out_h / enlarge)), min(width, round(out_w / enlarge))
        y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        window = slice(y, y + h), slice(x, x + w)
        image, semantic, instances = image[window].copy(), semantic[window].copy(), instances[window].copy()
        horizon_y = 0.45 * height - y
        native = enlarge > 1.0 and rng.random() < settings.native
        if not native:
            image = _resize(image, (out_h, out_w))
            semantic, instances = _resize_labels(semantic, (out_h, out_w)), _resize_labels(instances, (out_h, out_w))
            horizon_y *= enlarge
            # Without the setting nothing is drawn: recipes from before it give the same samples.
            if settings.detail and enlarge > 1.0 and rng.random() < settings.detail:
                image = _detailed(image, enlarge, rng)
        return cls(image, semantic, instances, settings, h / out_h if native else 1.0, horizon_y)

    def paste(self, cutout: tuple[NDArray[np.uint8], int], rng: np.random.Generator) -> None:
        rgba, semantic = cutout
        if self.settings.object_scales:
            rgba, x, y = self._anywhere(rgba, rng)
        else:
            rgba, x, y = self._standing(rgba, rng)
        height, width = self.image.shape[:2]
        h, w = rgba.shape[:2]
        left, top = max(0, -x), max(0, -y)
        right, bottom = min(w, width - x), min(h, height - y)
        if right - left < 2 or bottom - top < 2:
            return
        rgba = rgba[top:bottom, left:right]
        rows, columns = slice(y + top, y + bottom), slice(x + left, x + right)
        s = self.settings
        if rng.random() < s.shadow:
            self._shade(x + w / 2, y + h, w, rng)
        under = self.image[rows, columns].astype(np.float32)
        over = rgba[..., :3].astype(np.float32)
        alpha = rgba[..., 3].astype(np.float32) / 255.0
        if rng.random() < s.harmonise:
            over = _harmonised(over, alpha, under, rng)
        if s.blur and rng.random() < s.blur:
            over = _no_sharper(over, self._frame_sharpness)
        if rng.random() < s.feather:
            alpha = cv2.GaussianBlur(alpha, (0, 0), float(rng.uniform(0.4, 1.2)))
        self.image[rows, columns] = np.clip(under + alpha[..., None] * (over - under) + 0.5, 0, 255).astype(np.uint8)
        inside = alpha > 0.5
        self.semantic[rows, columns][inside] = semantic
        if semantic == IGNORE:
            self.count += 1
        self.instances[rows, columns][inside] = self.count if semantic == IGNORE else 0

    def _standing(self, rgba: NDArray[np.uint8], rng: np.random.Generator) -> tuple[NDArray[np.uint8], int, int]:
        """The cut-out at its size in the canvas, and the column and row of its upper left corner, which may lie outside."""
        s = self.settings
        foot_x, foot_y = self._foot(rng)
        longest = max(rgba.shape[:2])
        if rng.random() < s.perspective and foot_y > self.horizon_y + 4:
            # On a flat road seen from 1.5 m, an object of that height reaches from its foot to the horizon.
            size = (foot_y - self.horizon_y) * _log_uniform(rng, (0.08, 1.2))
        else:
            size = self.scale * _log_uniform(rng, s.object_px)
        size = min(max(size, self.scale * s.object_px[0], 6.0), 2.0 * longest)
        stretch = _log_uniform(rng, (0.8, 1.25))
        h = max(2, round(rgba.shape[0] * size / longest))
        w = max(2, round(rgba.shape[1] * size / longest * stretch))
        if rng.random() < 0.5:
            rgba = rgba[:, ::-1]
        return _resize(rgba, (h, w)), round(foot_x - w / 2), round(foot_y - h)

    def _anywhere(self, rgba: NDArray[np.uint8], rng: np.random.Generator) -> tuple[NDArray[np.uint8], int, int]:
        """As :meth:`_standing` in the published way."""
        height, width = self.image.shape[:2]
        scale = float(rng.choice(self.settings.object_scales))
        shape = (max(2, round(rgba.shape[0] * scale)), max(2, round(rgba.shape[1] * scale)))
        rgba = np.dstack([_resize(rgba[..., :3], shape), _resize_labels(rgba[..., 3], shape)])
        h, w = min(height, shape[0]), min(width, shape[1])
        top, left = (shape[0] - h) // 2, (shape[1] - w) // 2
        x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        return rgba[top : top + h, left : left + w], x, y

    @cached_property
    def _frame_sharpness(self) -> float:
        return _sharpness(self.image)

    def relight(self, rng: np.random.Generator) -> None:
        height, width = self.image.shape[:2]
        gain = np.ones((height, width), np.float32)
        for _ in range(int(rng.integers(1, 8))):
            size = int(min(width, max(6.0, self.scale * _log_uniform(rng, (12.0, 400.0)))))
            blob = procedural_outline(rng, size)
            blob = _resize(blob, (max(2, round(size * rng.uniform(0.15, 1.0))), size))
            y, x = int(rng.integers(-blob.shape[0] // 2, height)), int(rng.integers(-size // 2, width))
            top, left = max(0, -y), max(0, -x)
            part = blob[top : height - y, left : width - x].astype(np.float32) / 255.0
            factor = _log_uniform(rng, (0.45, 1.0)) if rng.random() < 0.6 else _log_uniform(rng, (1.0, 1.8))
            y, x = max(0, y), max(0, x)
            gain[y : y + part.shape[0], x : x + part.shape[1]] *= 1.0 + (factor - 1.0) * part
        gain = cv2.GaussianBlur(gain, (0, 0), _log_uniform(rng, (0.4, 6.0)))
        self.image = np.clip(self.image * gain[..., None], 0, 255).astype(np.uint8)

    def finished(self, rng: np.random.Generator) -> RoadSample:
        shape = self.settings.crop_hw
        image = _resize(self.image, shape)
        semantic, ids = _resize_labels(self.semantic, shape), _resize_labels(self.instances, shape)
        if rng.random() < self.settings.mirror:
            image, semantic, ids = image[:, ::-1], semantic[:, ::-1], ids[:, ::-1]
        if self.settings.augment:
            image = _photometric(np.ascontiguousarray(image), rng)
        shown = np.maximum(ids, 0)
        present = np.flatnonzero(np.bincount(shown.ravel(), minlength=self.count + 1)[1:]) + 1
        renumber = np.zeros(self.count + 1, np.int32)
        renumber[present] = np.arange(1, len(present) + 1)
        instances = renumber[shown]
        return RoadSample(
            image=np.ascontiguousarray(image),
            semantic=np.ascontiguousarray(semantic),
            anomaly=np.where(ids == UNCOUNTED, IGNORE, instances > 0).astype(np.uint8),
            instances=instances,
            boxes_xyxy=tight_boxes_xyxy(instances),
        )

    def _foot(self, rng: np.random.Generator) -> tuple[float, float]:
        height, width = self.image.shape[:2]
        if rng.random() < self.settings.on_road:
            rows, columns = np.nonzero(self.semantic[::4, ::4] == 0)
            if rows.size:
                k = rng.integers(rows.size)
                return float(columns[k] * 4), float(rows[k] * 4)
        return float(rng.uniform(0, width)), float(rng.uniform(0.05, 1.25) * height)

    def _shade(self, foot_x: float, foot_y: float, width: float, rng: np.random.Generator) -> None:
        shadow = np.zeros(self.image.shape[:2], np.float32)
        axes = (max(1, round(width * rng.uniform(0.4, 0.7))), max(1, round(width * rng.uniform(0.06, 0.15))))
        cv2.ellipse(shadow, (round(foot_x), round(foot_y)), axes, 0, 0, 360, 1.0, -1)
        shadow = cv2.GaussianBlur(shadow, (0, 0), max(0.5, 0.05 * width))
        self.image = (self.image * (1.0 - float(rng.uniform(0.2, 0.6)) * shadow[..., None])).astype(np.uint8)


def _detailed(image: NDArray[np.uint8], enlarged: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Sharpens edges and adds grain of about a pixel, patchy and stronger where it is bright, as a camera of more pixels would show."""
    pixels = image.astype(np.float32)
    pixels += float(rng.uniform(0.3, 2.0)) * (pixels - cv2.GaussianBlur(pixels, (0, 0), 0.6 * enlarged))
    grain = rng.standard_normal(image.shape[:2], dtype=np.float32)
    fine = _log_uniform(rng, (0.4, 1.5))
    grain = cv2.GaussianBlur(grain, (0, 0), fine) - cv2.GaussianBlur(grain, (0, 0), 3.0 * fine)
    patches = cv2.GaussianBlur(rng.random(image.shape[:2], dtype=np.float32), (0, 0), _log_uniform(rng, (8.0, 60.0)))
    patches = (patches - patches.min()) / max(float(np.ptp(patches)), 1e-6)
    grain *= _log_uniform(rng, (2.0, 12.0)) / max(float(grain.std()), 1e-6) * patches
    pixels += (grain * (pixels.mean(axis=2) / 128.0))[..., None]
    detailed: NDArray[np.uint8] = np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
    return detailed


def tight_boxes_xyxy(instances: NDArray[np.int32]) -> NDArray[np.float32]:
    """T_box (S2M Eq. 5): the tight box of each instance.

    Args:
        instances: (H, W), 0 none, ids 1..N.

    Returns:
        (N, 4) float32 ``(x_min, y_min, x_max, y_max)`` px, maximum exclusive, zeros for an id that has no pixel.
    """
    boxes = np.zeros((int(instances.max(initial=0)), 4), np.float32)
    for k in range(len(boxes)):
        x, y, w, h = cv2.boundingRect((instances == k + 1).view(np.uint8))
        boxes[k] = (x, y, x + w, y + h)
    return boxes


def contact_sheet(samples: Iterable[RoadSample], columns: int = 4) -> NDArray[np.uint8]:
    """Samples side by side with anomalies outlined in red and boxes in yellow, (H, W, 3) uint8 RGB."""
    tiles = []
    for sample in samples:
        tile = sample.image.copy()
        contours, _ = cv2.findContours(sample.anomaly % IGNORE, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(tile, contours, -1, (255, 0, 0), 1)
        for x0, y0, x1, y1 in sample.boxes_xyxy.astype(int).tolist():
            cv2.rectangle(tile, (x0, y0), (x1 - 1, y1 - 1), (255, 220, 0), 1)
        tiles.append(tile)
    if not tiles:
        raise InputError("a contact sheet needs at least one sample")
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[k : k + columns]) for k in range(0, len(tiles), columns)])


@lru_cache(maxsize=1024)
def _cached(cutout: Cutout) -> NDArray[np.uint8]:
    rgba = cutout.read()
    shrink = 400 / max(rgba.shape[:2])
    return _resize(rgba, (max(2, round(rgba.shape[0] * shrink)), max(2, round(rgba.shape[1] * shrink)))) if shrink < 1 else rgba


def _harmonised(
    over: NDArray[np.float32], alpha: NDArray[np.float32], under: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    weight = alpha[..., None] + 1e-6
    mean = (over * weight).sum((0, 1)) / weight.sum()
    target = under.mean((0, 1))
    brightness, colour = rng.uniform(0, 0.7), rng.uniform(0, 0.4)
    shift = target - mean
    common = shift.mean()
    contrast = rng.uniform(0.6, 1.1)
    return np.asarray((over - mean) * contrast + mean + brightness * common + colour * (shift - common), np.float32)


def _sharpness(image: NDArray[Any]) -> float:
    """Second over first derivatives, which blur lowers and contrast leaves alone."""
    grey = np.asarray(image, np.float32).mean(axis=2)
    slope = np.abs(cv2.Sobel(grey, cv2.CV_32F, 1, 0)).mean() + np.abs(cv2.Sobel(grey, cv2.CV_32F, 0, 1)).mean()
    return float(np.abs(cv2.Laplacian(grey, cv2.CV_32F)).mean() / max(slope, 1e-3))


def _no_sharper(over: NDArray[np.float32], limit: float) -> NDArray[np.float32]:
    for sigma in (0.0, 0.5, 0.8, 1.2, 1.8):
        blurred = np.asarray(cv2.GaussianBlur(over, (0, 0), sigma), np.float32) if sigma else over
        if _sharpness(blurred) <= limit:
            break
    return blurred


def _photometric(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    ramp = np.arange(256, dtype=np.float32) / 255.0
    night = rng.random() < 0.1
    gamma = _log_uniform(rng, (1.2, 2.0)) if night else _log_uniform(rng, (0.65, 1.5))
    gain = _log_uniform(rng, (0.4, 0.9)) if night else _log_uniform(rng, (0.75, 1.35))
    tint = np.exp(rng.normal(0, 0.06, 3)).astype(np.float32)
    offset = rng.normal(0, 0.04)
    table = np.clip(255.0 * (gain * tint[None] * ramp[:, None] ** gamma + offset), 0, 255).astype(np.uint8)
    image = np.asarray(cv2.LUT(image, table.reshape(256, 1, 3)), np.uint8)
    if rng.random() < 0.3:
        grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        keep = float(rng.uniform(0.0, 1.6))
        image = np.asarray(cv2.addWeighted(image, keep, grey, 1.0 - keep, 0.0), np.uint8)
    if rng.random() < 0.25:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.3, 1.6))), np.uint8)
    if rng.random() < 0.35:
        noise = rng.standard_normal((*image.shape[:2], 1), np.float32) * np.float32(rng.uniform(2, 14))
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.35:
        _, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 90))])
        image = np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR), np.uint8)
    return image


def _resize(image: NDArray[np.uint8], shape_hw: tuple[int, int]) -> NDArray[np.uint8]:
    h, w = shape_hw
    if image.shape[:2] == (h, w):
        return image
    shrinks = h * w < image.shape[0] * image.shape[1]
    image = np.ascontiguousarray(image)
    return np.asarray(cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR), np.uint8)


def _resize_labels(labels: NDArray[Any], shape_hw: tuple[int, int]) -> NDArray[Any]:
    if labels.shape == tuple(shape_hw):
        return labels
    return np.asarray(cv2.resize(np.ascontiguousarray(labels), shape_hw[::-1], interpolation=cv2.INTER_NEAREST))


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]))))


def _draw(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))
