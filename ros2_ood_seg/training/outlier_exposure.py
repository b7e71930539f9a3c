"""Outlier exposure: road images with objects pasted into them that do not belong there (S2M section 3.3, Eqs. 3-5).

Road images (inliers) come from :func:`read_camvid`, :func:`read_idd_lite`, :func:`read_cityscapes` or :func:`read_road_folder`; cut-outs
(outliers) from :func:`read_coco`, :func:`read_coco_panoptic`, :func:`read_mask_folder` or :func:`procedural_cutout`.
:class:`OutlierExposure` pastes the one into the other, deterministic by (seed, index), without writing to disk.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ros2_ood_seg.errors import InputError

IGNORE = 255
"""Label of pixels that carry no information."""

_INVALID = 254
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

# drivable, non-drivable, living things, vehicles, road-side objects, far objects, sky
_CAMVID = {0: 6, 1: 5, 2: 4, 3: 0, 4: 1, 5: 5, 6: 4, 7: 4, 8: 3, 9: 2, 10: 2, 11: IGNORE}
_IDD_LITE = {**{k: k for k in range(7)}, IGNORE: IGNORE}
_CITYSCAPES_IDS = {
    **dict.fromkeys(range(34), IGNORE),
    **{7: 0, 8: 1, 9: 0, 10: 1, 11: 5, 12: 5, 13: 4, 14: 4, 15: 5, 16: 5, 17: 4, 18: 4, 19: 4, 20: 4, 21: 5, 22: 1, 23: 6},
    **{24: 2, 25: 2, 26: 3, 27: 3, 28: 3, 29: 3, 30: 3, 31: 3, 32: 3, 33: 3},
}

KNOWN_CLASSES: Mapping[str, int] = {
    "person": 2,
    "bicycle": 3,
    "car": 3,
    "motorcycle": 3,
    "bus": 3,
    "truck": 3,
    "train": 3,
    "traffic light": 4,
    "stop sign": 4,
}
"""COCO classes that Cityscapes knows, with their in-distribution class: never anomalies."""

AMBIGUOUS_CLASSES = frozenset(
    {"fire hydrant", "parking meter", "bench", "potted plant", "backpack", "handbag", "umbrella", "tie", "dining table"}
)
"""COCO classes that belong to streets or to people, or whose masks hold other things: pasted in neither role."""


@dataclass(frozen=True)
class RoadImage:
    """One in-distribution frame.

    Args:
        image: Picture file.
        label: Label file in the data set's own values, or None when there are no classes.
        classes: The data set's label values to the common classes (see the compact network) or :data:`IGNORE`.
    """

    image: Path
    label: Path | None
    classes: Mapping[int, int]

    def read(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """(H, W, 3) RGB image and (H, W) common classes, :data:`IGNORE` everywhere without a label file.

        Raises:
            InputError: Unreadable file, sizes that differ, or a label value outside the layout.
        """
        image = read_rgb(self.image)
        if self.label is None:
            return image, np.full(image.shape[:2], IGNORE, np.uint8)
        raw = cv2.imread(str(self.label), cv2.IMREAD_UNCHANGED)
        if raw is None or raw.ndim != 2:
            raise InputError(f"label '{self.label}' cannot be read as an image of one channel")
        if raw.shape != image.shape[:2]:
            raise InputError(f"label '{self.label}' is {raw.shape[1]}x{raw.shape[0]}, its image is {image.shape[1]}x{image.shape[0]}")
        table = np.full(256, _INVALID, np.uint8)
        table[list(self.classes)] = list(self.classes.values())
        semantic = table[raw]
        if (semantic == _INVALID).any():
            found = sorted(int(v) for v in np.unique(raw[semantic == _INVALID]))
            raise InputError(f"label '{self.label}' holds values {found} outside its layout, allowed: {sorted(self.classes)}")
        return image, semantic


@dataclass(frozen=True, eq=False)
class Cutout:
    """One object that can be pasted; read from disk only when used.

    Args:
        image: Picture file.
        group: Image or sequence it comes from; training and validation are split by it.
        polygons: Outlines, each (K, 2) float px, or None when ``mask`` is given.
        mask: Mask file, or None when ``polygons`` are given.
        mask_id: Value of the object in ``mask`` (panoptic: R + 256 G + 65536 B).
        semantic: The in-distribution class of an object that Cityscapes knows, or :data:`IGNORE` for an anomaly.
    """

    image: Path
    group: str
    polygons: tuple[NDArray[np.float32], ...] | None = None
    mask: Path | None = None
    mask_id: int = 255
    semantic: int = IGNORE

    @property
    def is_anomaly(self) -> bool:
        """Whether Cityscapes does not know its class."""
        return self.semantic == IGNORE

    def read(self) -> NDArray[np.uint8]:
        """(h, w, 4) RGBA, cropped to the object.

        Raises:
            InputError: Unreadable files, or a mask that is empty or of another size.
        """
        image = read_rgb(self.image)
        alpha = self.mask_in((image.shape[0], image.shape[1]))
        x, y, w, h = cv2.boundingRect(alpha)
        return np.dstack([image, alpha])[y : y + h, x : x + w]

    def mask_in(self, shape_hw: tuple[int, int]) -> NDArray[np.uint8]:
        """(H, W) uint8, 255 on the object, for a picture of that shape.

        Raises:
            InputError: An unreadable mask, or one that is empty or of another size.
        """
        alpha = np.zeros(shape_hw, np.uint8)
        if self.polygons is not None:
            # COCO counts from pixel corners, OpenCV from pixel centres.
            cv2.fillPoly(alpha, [np.round((p - 0.5) * 8).astype(np.int32) for p in self.polygons], 255, shift=3)
        else:
            raw = cv2.imread(str(self.mask), cv2.IMREAD_UNCHANGED)
            if raw is None or raw.shape[:2] != shape_hw:
                raise InputError(f"mask '{self.mask}' cannot be read or differs in size from '{self.image}'")
            if raw.ndim == 3:
                raw = raw[..., 2].astype(np.int32) + 256 * raw[..., 1].astype(np.int32) + 65536 * raw[..., 0].astype(np.int32)
            alpha[raw == self.mask_id] = 255
        if not alpha.any():
            raise InputError(f"the mask of an object of '{self.image}' is empty")
        return alpha


@dataclass(frozen=True)
class PasteSettings:
    """How road images are cropped and objects pasted.

    Args:
        crop_hw: Size of the samples, px.
        frame_width_px: Range of the width that a whole frame is scaled to before cropping, log-uniform.
        objects_per_image: Range of the number of anomalies, inclusive.
        known_per_image: Range of the number of pasted objects of known classes (labelled normal), inclusive.
        object_px: Range of an object's longest side in the sample, log-uniform.
        object_scales: Scale factors of the cut-out to choose from instead of ``object_px``; empty for none.
        procedural: Chance that an anomaly is a random blob or the outline of any cut-out, filled with a piece of another picture (without
            cut-outs: with a random texture).
        illumination: Chance of sunlit and shaded patches, labelled normal.
        known_classes: In-distribution classes that may be pasted as normal. Without vehicles, unusual ones stay anomalies.
        perspective: Chance that an object's size follows its height in the image as on a flat road.
        on_road: Chance that an object stands on a pixel labelled drivable, where there are any.
        harmonise: Chance that an object takes over colour and brightness of its surroundings, by a random share.
        feather: Chance of a soft edge.
        shadow: Chance of a soft contact shadow.
        native: Chance to paste at the frame's own resolution, so that object and frame are equally sharp.
        augment: Flip, brightness, colour, gamma, blur, noise and JPEG of the finished sample.
    """

    crop_hw: tuple[int, int] = (288, 480)
    frame_width_px: tuple[float, float] = (480.0, 1500.0)
    objects_per_image: tuple[int, int] = (1, 4)
    known_per_image: tuple[int, int] = (0, 2)
    object_px: tuple[float, float] = (12.0, 420.0)
    object_scales: tuple[float, ...] = ()
    procedural: float = 0.12
    known_classes: tuple[int, ...] = (2, 4)
    perspective: float = 0.5
    on_road: float = 0.65
    harmonise: float = 0.4
    feather: float = 0.8
    shadow: float = 0.3
    native: float = 0.35
    illumination: float = 0.7
    augment: bool = True

    @classmethod
    def published(cls) -> PasteSettings:
        """S2M: one object, hard edge, uniformly random place, 700x700 crops, fixed scales."""
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
            feather=0.0,
            shadow=0.0,
            native=0.0,
            illumination=0.0,
            augment=False,
        )

    def __post_init__(self) -> None:
        for name in ("procedural", "perspective", "on_road", "harmonise", "feather", "shadow", "native", "illumination"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"paste setting '{name}' is {getattr(self, name)}, allowed: a number from 0 to 1")
        for name in ("frame_width_px", "objects_per_image", "known_per_image", "object_px"):
            low, high = getattr(self, name)
            if low < 0 or high < low:
                raise InputError(f"paste setting '{name}' is {(low, high)}, allowed: a range from low to high, not negative")


@dataclass(frozen=True)
class RoadSample:
    """One training sample.

    Args:
        image: (H, W, 3) uint8 RGB.
        semantic: (H, W) uint8 common class, :data:`IGNORE` for unknown and on anomalies.
        anomaly: (H, W) uint8, 0 normal, 1 anomaly, :data:`IGNORE` not counted.
        instances: (H, W) int32, 0 none, k the k-th visible anomaly.
        boxes_xyxy: (N, 4) float32 px, T_box of S2M Eq. 5: tight, maximum exclusive, row k - 1 for instance k.
    """

    image: NDArray[np.uint8]
    semantic: NDArray[np.uint8]
    anomaly: NDArray[np.uint8]
    instances: NDArray[np.int32]
    boxes_xyxy: NDArray[np.float32]


class OutlierExposure(Dataset[RoadSample]):
    """Road crops with pasted objects; sample ``index`` is always the same for the same seed and data.

    Args:
        roads: In-distribution frames, by source; a source is drawn with the chance of its weight.
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
        roads: Sequence[Sequence[RoadImage]],
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
            raise InputError("outlier exposure needs cut-outs of classes that Cityscapes does not know, got none")
        chances = np.asarray(weights if weights is not None else [1.0] * len(self.roads), np.float64)
        if chances.shape != (len(self.roads),) or (chances < 0).any() or chances.sum() == 0:
            raise InputError(f"outlier exposure needs one weight per source ({len(self.roads)}), not negative, got {list(chances)}")
        self.chances = chances / chances.sum()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> RoadSample:
        rng = np.random.default_rng([self.seed, index])
        source = self.roads[rng.choice(len(self.roads), p=self.chances)]
        image, semantic = source[int(rng.integers(len(source)))].read()
        canvas = _Canvas.cropped(image, semantic, self.settings, rng)
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
        return _cached(cutout), cutout.semantic

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
        self, image: NDArray[np.uint8], semantic: NDArray[np.uint8], settings: PasteSettings, scale: float, horizon_y: float
    ) -> None:
        self.image = image
        self.semantic = semantic
        self.instances = np.zeros(image.shape[:2], np.int32)
        self.settings = settings
        self.scale = scale
        self.horizon_y = horizon_y
        self.count = 0

    @classmethod
    def cropped(cls, image: NDArray[np.uint8], semantic: NDArray[np.uint8], settings: PasteSettings, rng: np.random.Generator) -> _Canvas:
        height, width = image.shape[:2]
        out_h, out_w = settings.crop_hw
        enlarge = max(_log_uniform(rng, settings.frame_width_px) / width, out_h / height, out_w / width)
        h, w = min(height, round(out_h / enlarge)), min(width, round(out_w / enlarge))
        y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        image, semantic = image[y : y + h, x : x + w].copy(), semantic[y : y + h, x : x + w].copy()
        horizon_y = 0.45 * height - y
        native = enlarge > 1.0 and rng.random() < settings.native
        if not native:
            image, semantic = _resize(image, (out_h, out_w)), _resize_labels(semantic, (out_h, out_w))
            horizon_y *= enlarge
        return cls(image, semantic, settings, h / out_h if native else 1.0, horizon_y)

    def paste(self, cutout: tuple[NDArray[np.uint8], int], rng: np.random.Generator) -> None:
        rgba, semantic = cutout
        s = self.settings
        height, width = self.image.shape[:2]
        foot_x, foot_y = self._foot(rng)
        longest = max(rgba.shape[:2])
        if s.object_scales:
            size = longest * float(rng.choice(s.object_scales))
        elif rng.random() < s.perspective and foot_y > self.horizon_y + 4:
            # On a flat road seen from 1.5 m, an object of that height reaches from its foot to the horizon.
            size = (foot_y - self.horizon_y) * _log_uniform(rng, (0.08, 1.2))
        else:
            size = self.scale * _log_uniform(rng, s.object_px)
        size = min(max(size, self.scale * s.object_px[0], 6.0), 2.0 * longest)
        stretch = 1.0 if s.object_scales else _log_uniform(rng, (0.8, 1.25))
        h = max(2, round(rgba.shape[0] * size / longest))
        w = max(2, round(rgba.shape[1] * size / longest * stretch))
        if rng.random() < 0.5:
            rgba = rgba[:, ::-1]
        rgba = _resize(rgba, (h, w))
        x, y = round(foot_x - w / 2), round(foot_y - h)
        left, top = max(0, -x), max(0, -y)
        right, bottom = min(w, width - x), min(h, height - y)
        if right - left < 2 or bottom - top < 2:
            return
        rgba = rgba[top:bottom, left:right]
        rows, columns = slice(y + top, y + bottom), slice(x + left, x + right)
        if rng.random() < s.shadow:
            self._shade(x + w / 2, y + h, w, rng)
        under = self.image[rows, columns].astype(np.float32)
        over = rgba[..., :3].astype(np.float32)
        alpha = rgba[..., 3].astype(np.float32) / 255.0
        if rng.random() < s.harmonise:
            over = _harmonised(over, alpha, under, rng)
        if rng.random() < s.feather:
            alpha = cv2.GaussianBlur(alpha, (0, 0), float(rng.uniform(0.4, 1.2)))
        self.image[rows, columns] = np.clip(under + alpha[..., None] * (over - under) + 0.5, 0, 255).astype(np.uint8)
        inside = alpha > 0.5
        self.semantic[rows, columns][inside] = semantic
        if semantic == IGNORE:
            self.count += 1
        self.instances[rows, columns][inside] = self.count if semantic == IGNORE else 0

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
        if self.settings.augment:
            if rng.random() < 0.5:
                image, semantic, ids = image[:, ::-1], semantic[:, ::-1], ids[:, ::-1]
            image = _photometric(np.ascontiguousarray(image), rng)
        present = np.flatnonzero(np.bincount(ids.ravel(), minlength=self.count + 1)[1:]) + 1
        renumber = np.zeros(self.count + 1, np.int32)
        renumber[present] = np.arange(1, len(present) + 1)
        instances = renumber[ids]
        return RoadSample(
            image=np.ascontiguousarray(image),
            semantic=np.ascontiguousarray(semantic),
            anomaly=(instances > 0).astype(np.uint8),
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


def procedural_outline(rng: np.random.Generator, size_px: int) -> NDArray[np.uint8]:
    """A random blob.

    Args:
        rng: Source of randomness.
        size_px: Its width and height.

    Returns:
        (size_px, size_px) uint8, 255 inside.
    """
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    radius = np.ones_like(angles)
    for k in range(1, 6):
        radius += rng.normal(0, 0.35 / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi))
    radius = np.maximum(radius, 0.15)
    points = np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)
    points = (points - points.min(0)) / np.ptp(points, axis=0) * (size_px - 1)
    alpha = np.zeros((size_px, size_px), np.uint8)
    cv2.fillPoly(alpha, [np.round(points).astype(np.int32)], 255)
    return alpha


def procedural_cutout(rng: np.random.Generator, size_px: int) -> NDArray[np.uint8]:
    """A random blob with a random texture.

    Args:
        rng: Source of randomness.
        size_px: Longest side.

    Returns:
        (size_px, size_px, 4) uint8 RGBA.
    """
    alpha = procedural_outline(rng, size_px)
    yy, xx = np.mgrid[0:size_px, 0:size_px].astype(np.float32) / size_px
    kind = rng.integers(3)
    if kind == 0:
        pattern = sum(
            cv2.resize(rng.random((n, n), np.float32), (size_px, size_px), interpolation=cv2.INTER_CUBIC) / k
            for k, n in enumerate((3, 7, 15, 40), start=1)
        )
        pattern = np.asarray(pattern, np.float32) / 2.0
    elif kind == 1:
        angle = rng.uniform(0, np.pi)
        pattern = 0.5 + 0.5 * np.sign(np.sin(rng.uniform(10, 80) * (xx * np.cos(angle) + yy * np.sin(angle))))
    else:
        pattern = np.full_like(xx, 0.5)
    first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    colour = first + np.clip(pattern, 0, 1)[..., None] * (second - first)
    light = 1.0 + rng.uniform(-0.5, 0.5) * (xx - 0.5) + rng.uniform(-0.6, 0.2) * (yy - 0.5)
    return np.dstack([np.clip(colour * light[..., None], 0, 255).astype(np.uint8), alpha])


def read_camvid(root: Path, split: str) -> list[RoadImage]:
    """``root/<split>/images`` and ``labels``, 12 label values as in the SegNet copy of CamVid."""
    return _paired(root / split, _CAMVID, "CamVid")


def read_idd_lite(root: Path, split: str) -> list[RoadImage]:
    """``root/<split>/images`` and ``labels``, level 1 of the IDD hierarchy."""
    return _paired(root / split, _IDD_LITE, "IDD-Lite")


def read_cityscapes(root: Path, split: str) -> list[RoadImage]:
    """``root/leftImg8bit/<split>/<city>`` and ``root/gtFine/<split>/<city>``, label ids."""
    images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    if not images:
        raise InputError(f"no Cityscapes images under '{root / 'leftImg8bit' / split}', expected <city>/*_leftImg8bit.png")
    items = []
    for image in images:
        label = root / "gtFine" / split / image.parent.name / image.name.replace("_leftImg8bit", "_gtFine_labelIds")
        if not label.is_file():
            raise InputError(f"Cityscapes image '{image}' has no label '{label}'")
        items.append(RoadImage(image, label, _CITYSCAPES_IDS))
    return _verified(items)


def read_road_folder(root: Path) -> list[RoadImage]:
    """A folder of road pictures without labels."""
    return [RoadImage(path, None, {}) for path in list_images(root)]


def read_coco(root: Path, *, min_area_px: int = 400) -> list[Cutout]:
    """COCO layout: ``root/images`` and ``root/instances.json`` with polygons; crowds are left out.

    Raises:
        InputError: The annotation file is missing or malformed, an image is missing, or nothing usable is left.
    """
    tree = _read_json(root / "instances.json")
    try:
        names = {c["id"]: c["name"] for c in tree["categories"]}
        files = {i["id"]: root / "images" / i["file_name"] for i in tree["images"]}
        cutouts = []
        for item in tree["annotations"]:
            role = _role(names[item["category_id"]])
            shapes = item["segmentation"]
            if item.get("iscrowd") or role is None or item["area"] < min_area_px or not isinstance(shapes, list):
                continue
            path = files[item["image_id"]]
            polygons = tuple(np.asarray(p, np.float32).reshape(-1, 2) for p in shapes)
            cutouts.append(Cutout(path, f"coco/{path.stem}", polygons=polygons, semantic=role))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"'{root / 'instances.json'}' is not in the COCO instances layout: {error!r}") from error
    return _existing(cutouts, root)


def read_coco_panoptic(root: Path, *, min_area_px: int = 400) -> list[Cutout]:
    """COCO panoptic layout: ``root/images``, ``root/panoptic/*.png`` and ``root/panoptic.json``; things only, crowds are left out."""
    tree = _read_json(root / "panoptic.json")
    try:
        names = {c["id"]: c["name"] for c in tree["categories"] if c["isthing"]}
        files = {i["id"]: root / "images" / i["file_name"] for i in tree["images"]}
        cutouts = []
        for item in tree["annotations"]:
            path, mask = files[item["image_id"]], root / "panoptic" / item["file_name"]
            for segment in item["segments_info"]:
                role = _role(names[segment["category_id"]]) if segment["category_id"] in names else None
                if segment.get("iscrowd") or role is None or segment["area"] < min_area_px:
                    continue
                cutouts.append(Cutout(path, f"coco/{path.stem}", mask=mask, mask_id=int(segment["id"]), semantic=role))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"'{root / 'panoptic.json'}' is not in the COCO panoptic layout: {error!r}") from error
    return _existing(cutouts, root)


def read_mask_folder(root: Path, *, keep: Callable[[str], bool] = lambda name: True) -> list[Cutout]:
    """``root/images`` and ``root/masks`` (PNG, 255 object), flat or one sub-folder per sequence; all objects are anomalies.

    Args:
        root: The folder.
        keep: Whether to use the image or sequence of this name.

    Raises:
        InputError: No images, an image without a mask, or a mask without an image.
    """
    images = list_images(root / "images", recursive=True)
    masks = {path.relative_to(root / "masks").with_suffix("") for path in list_images(root / "masks", recursive=True)}
    cutouts = []
    for image in images:
        relative = image.relative_to(root / "images").with_suffix("")
        if relative not in masks:
            raise InputError(f"image '{image}' has no mask '{root / 'masks' / relative}.png'")
        masks.remove(relative)
        name = relative.parts[0]
        if keep(name):
            cutouts.append(Cutout(image, f"{root.name}/{name}", mask=root / "masks" / relative.with_suffix(".png")))
    if masks:
        raise InputError(f"mask '{root / 'masks' / min(masks)}.png' matches no image in '{root / 'images'}'")
    return _existing(cutouts, root)


def list_images(folder: Path, *, recursive: bool = False) -> list[Path]:
    """The pictures of a folder, sorted.

    Raises:
        InputError: There is no such folder, or it holds no pictures.
    """
    if not folder.is_dir():
        raise InputError(f"folder '{folder}' does not exist")
    paths = sorted(p for p in folder.glob("**/*" if recursive else "*") if p.suffix.lower() in _IMAGE_SUFFIXES)
    if not paths:
        raise InputError(f"folder '{folder}' holds no pictures ({', '.join(_IMAGE_SUFFIXES)})")
    return paths


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB.

    Raises:
        InputError: The file is missing or no picture.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise InputError(f"picture '{path}' cannot be read")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def is_held_out(group: str, fraction: float) -> bool:
    """Whether an image or sequence of this name belongs to the held-out share; always the same answer."""
    return zlib.crc32(group.encode()) % 1000 < 1000 * fraction


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


def _role(name: str) -> int | None:
    return None if name in AMBIGUOUS_CLASSES else KNOWN_CLASSES.get(name, IGNORE)


def _paired(folder: Path, classes: Mapping[int, int], layout: str) -> list[RoadImage]:
    images = list_images(folder / "images")
    labels = {path.stem: path for path in list_images(folder / "labels")}
    missing = [path.name for path in images if path.stem not in labels]
    extra = sorted(labels.keys() - {path.stem for path in images})
    if missing or extra:
        raise InputError(f"{layout} folder '{folder}': image without label {missing[:3]}, label without image {extra[:3]}")
    return _verified([RoadImage(path, labels[path.stem], classes) for path in images])


def _verified(items: list[RoadImage], count: int = 16) -> list[RoadImage]:
    for k in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int):
        items[k].read()
    return items


def _existing(cutouts: list[Cutout], root: Path) -> list[Cutout]:
    if not cutouts:
        raise InputError(f"'{root}' holds no usable objects")
    for path in {p for c in cutouts for p in (c.image, c.mask) if p is not None}:
        if not path.is_file():
            raise InputError(f"'{root}' names the file '{path}', which does not exist")
    return cutouts


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"annotation file '{path}' cannot be read: {error}") from error
