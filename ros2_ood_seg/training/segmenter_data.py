"""Objects with exact masks, and training samples for the compact segmenter made from them.

Everything is read once and kept in memory; samples are a function of a random generator alone, so that a run can be repeated and resumed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.datasets import read_labels
from ros2_ood_seg.image_encodings import read_rgb
from ros2_ood_seg.segmenters.compact import View, network_input
from ros2_ood_seg.segmenters.windows import OUTSIDE, Box, box_window, clip_box, point_window
from ros2_ood_seg.training.cutouts import Cutout, coco_parts, decode_runs, in_layout, read_json, read_mask, read_mask_folder
from ros2_ood_seg.training.road_images import is_held_out, list_images

Kind = Literal["box", "point", "both"]
Image = NDArray[np.uint8]

MIN_AREA_PX = 300
"""Smaller objects have too coarse masks to learn from."""
_HELD_OUT = 0.125
# Sides of a point's window, in lengths of the object: a window says nothing of the object's size, so the network has to see
# windows that hold only a part, or the object as a speck, to promise little there.
_POINT_WINDOWS = (1 / 6, 12.0)
# How far a warped sample is turned, sheared and stretched: degrees, tangent and natural logarithm.
_TURN_DEG, _SHEAR, _STRETCH = 30.0, 0.15, 0.25
_SOURCE_WEIGHTS = {"coco": 0.5, "coco_panoptic": 0.2, "davis": 0.2, "grabcut": 0.1}
# Fishyscapes Static pastes objects of PASCAL VOC, so its pictures are left out: "bike_2007_000364".
_VOC = re.compile(r"_20\d\d_\d{6}$")


@dataclass(frozen=True)
class SegmentedObject:
    """One object of one image.

    Args:
        image: (H, W, 3) uint8 RGB; objects of one image share it.
        x: Column of the mask's left edge, px.
        y: Row of the mask's upper edge, px.
        mask: (h, w) uint8, tight: 255 object, 0 background, 128 undecided.
        source: Data set.
        group: Image or sequence: objects of one group are either all trained on or all held out.
    """

    image: Image
    x: int
    y: int
    mask: Image
    source: str
    group: str

    @property
    def box_xyxy(self) -> Box:
        """Tight box of the decided pixels, px."""
        height, width = self.mask.shape
        return float(self.x), float(self.y), float(self.x + width), float(self.y + height)

    def full_mask(self) -> Image:
        """(H, W) uint8 mask of the whole image."""
        full = np.zeros(self.image.shape[:2], dtype=np.uint8)
        full[self.y : self.y + self.mask.shape[0], self.x : self.x + self.mask.shape[1]] = self.mask
        return full


def tight_object(image: Image, mask: Image, source: str, group: str) -> SegmentedObject | None:
    """Cuts a full-size mask to the box of its 255s; None when there are none."""
    x, y, width, height = cv2.boundingRect((mask == 255).astype(np.uint8))
    if width == 0:
        return None
    return SegmentedObject(image, x, y, np.ascontiguousarray(mask[y : y + height, x : x + width]), source, group)


def load_objects(root: Path, *, held_out: bool, min_area_px: int = MIN_AREA_PX) -> list[SegmentedObject]:
    """Reads a data set, or all of those in the folders of ``root``; each is recognised by its layout.

    Layouts: COCO instances, COCO panoptic, ``images`` and ``masks`` (see :mod:`~ros2_ood_seg.training.cutouts`).

    Args:
        root: Data set, or folder of data sets.
        held_out: The validation part rather than the training part.
        min_area_px: Smaller objects are left out.

    Raises:
        InputError: No data set is there, one is laid out wrongly, or nothing of this part can be learnt from.
    """
    readers = [(folder, reader) for folder in _folders(root) if (reader := _reader(folder)) is not None]
    if not readers:
        raise InputError(
            f"no objects to learn from in '{root}': it must be or hold data sets with instances.json (COCO), panoptic.json (COCO), "
            "or images/ and masks/"
        )
    objects = []
    for folder, reader in readers:
        for picture in reader(folder):
            if is_held_out(f"{folder.name}/{picture.group}", _HELD_OUT) != held_out:
                continue
            image = read_rgb(picture.image)
            found = (tight_object(image, mask, folder.name, picture.group) for mask in picture.masks(image.shape[:2]))
            objects += [item for item in found if item is not None and np.count_nonzero(item.mask == 255) >= min_area_px]
    if not objects:
        side = "held out: one of eight pictures is, chosen by name" if held_out else "left to learn from"
        raise InputError(f"no objects of {min_area_px} px or more in '{root}' are {side}: give more")
    return objects


def load_labelled(root: Path, min_area_px: int = 50) -> list[SegmentedObject]:
    """The connected anomalies of an evaluation set in the plain layout ``images/<stem>.*``, ``labels/<stem>.png``.

    Label 1 is anomaly, 0 normal, 255 ignore; ignored pixels become undecided.

    Raises:
        InputError: The layout is another, or a file cannot be read.
    """
    if not (root / "images").is_dir() or not (root / "labels").is_dir():
        raise InputError(f"'{root}' must hold folders images and labels")
    objects = []
    for path in list_images(root / "images"):
        image, label = read_rgb(path), read_labels(root / "labels" / f"{path.stem}.png")
        if label.shape != image.shape[:2]:
            raise InputError(f"the labels of '{path}' are {label.shape[1]}x{label.shape[0]} px, it is {image.shape[1]}x{image.shape[0]}")
        count, components = cv2.connectedComponents((label == 1).astype(np.uint8), connectivity=8)
        for index in range(1, count):
            mask = np.where(components == index, 255, np.where(label == 255, 128, 0)).astype(np.uint8)
            item = tight_object(image, mask, root.name, path.stem)
            if item is not None and np.count_nonzero(item.mask == 255) >= min_area_px:
                objects.append(item)
    return objects


def load_backgrounds(roots: Sequence[Path], per_folder: int, seed: int) -> list[Image]:
    """Road frames to paste objects on: at most ``per_folder`` images of each folder, chosen by ``seed``."""
    frames: list[Image] = []
    for root in roots:
        paths = list_images(root)
        chosen = np.random.default_rng(seed).permutation(len(paths))[:per_folder]
        frames += [read_rgb(paths[i]) for i in sorted(chosen)]
    return frames


@dataclass(frozen=True)
class _Picture:
    """An image file, the image or sequence it is split by, and how to read its objects' masks, given its height and width."""

    image: Path
    group: str
    masks: Callable[[tuple[int, ...]], list[Image]]


_Reader = Callable[[Path], Iterator[_Picture]]


def _folders(root: Path) -> list[Path]:
    below = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    return [root, *below]


def _reader(folder: Path) -> _Reader | None:
    """How to read the data set in a folder, None when there is none."""
    if (folder / "instances.json").is_file() or any((folder / "annotations").glob("instances_*.json")):
        return _coco
    if (folder / "panoptic.json").is_file() or any((folder / "annotations").glob("panoptic_*.json")):
        return _coco_panoptic
    return _masked if (folder / "masks").is_dir() else None


def _coco(root: Path) -> Iterator[_Picture]:
    for path, folder in coco_parts(root, "instances"):
        shapes: dict[int, list[Any]] = {}
        with in_layout(path, "COCO instances"):
            annotations = read_json(path)
            for annotation in annotations["annotations"]:
                # Tools export empty lists of polygons for what they cannot outline.
                if not annotation.get("iscrowd") and annotation["segmentation"]:
                    shapes.setdefault(annotation["image_id"], []).append(annotation["segmentation"])
            pictures = [(entry["id"], entry["file_name"]) for entry in annotations["images"]]
        for index, name in pictures:
            yield _Picture(folder / name, name, partial(_draw_objects, name, shapes.get(index, [])))


def _draw_objects(name: str, objects: list[Any], shape_hw: tuple[int, ...]) -> list[Image]:
    """One mask for each object, which is a list of polygons or run lengths."""
    height, width = shape_hw
    return [
        coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(item, height, width))) * np.uint8(255)
        if isinstance(item, list)
        else decode_runs(item, (height, width), name) * np.uint8(255)
        for item in objects
    ]


def _coco_panoptic(root: Path) -> Iterator[_Picture]:
    for path, folder in coco_parts(root, "panoptic"):
        with in_layout(path, "COCO panoptic"):
            tree = read_json(path)
            things = {category["id"] for category in tree["categories"] if category["isthing"]}
            files = {entry["id"]: folder / entry["file_name"] for entry in tree["images"]}
            pictures = [
                (
                    files[entry["image_id"]],
                    entry["file_name"],
                    [s["id"] for s in entry["segments_info"] if s["category_id"] in things and not s.get("iscrowd")],
                )
                for entry in tree["annotations"]
            ]
        for image, name, segments in pictures:
            yield _Picture(image, name, partial(_pick_segments, path.with_suffix("") / name, segments))


def _pick_segments(path: Path, segments: list[int], shape_hw: tuple[int, ...]) -> list[Image]:
    colour = read_rgb(path).astype(np.int32)
    if colour.shape[:2] != shape_hw:
        raise InputError(f"mask '{path}' is {colour.shape[1]}x{colour.shape[0]}, its image is {shape_hw[1]}x{shape_hw[0]}")
    ids = colour[..., 0] + 256 * colour[..., 1] + 65536 * colour[..., 2]
    return [(ids == segment).astype(np.uint8) * np.uint8(255) for segment in segments]


def _masked(root: Path) -> Iterator[_Picture]:
    for cutout in read_mask_folder(root, keep=lambda name: not _VOC.search(name)):
        yield _Picture(cutout.image, cutout.group.removeprefix(f"{root.name}/"), partial(_read_masks, cutout))


def _read_masks(cutout: Cutout, shape_hw: tuple[int, ...]) -> list[Image]:
    mask = read_mask(Path(str(cutout.mask)))
    if mask.shape != shape_hw:
        raise InputError(f"mask '{cutout.mask}' is {mask.shape[1]}x{mask.shape[0]}, its image is {shape_hw[1]}x{shape_hw[0]}")
    return [mask]


@dataclass(frozen=True)
class Batch:
    """Training samples of one crop size S.

    Args:
        crops: (N, 5, S, S) float32, the network's input.
        targets: (N, 1, S, S) float32 in [0, 1]: object, 0.5 where undecided.
        hidden: (N,) float32 >= 0: area of the object outside the crop, as a fraction of the crop.
    """

    crops: Tensor
    targets: Tensor
    hidden: Tensor


class SampleMaker:
    """Makes training samples; thread-safe, without state.

    Args:
        objects: What to segment; drawn by data set, then larger ones, whose masks are more exact, more often.
        backgrounds: Road frames; a part of the samples shows an object pasted on one. Empty for none.
        warped: Share of the samples that are turned, sheared and stretched, in [0, 1].
        crowded: Share of the samples in which another object stands before or beside the wanted one, in [0, 1].
    """

    def __init__(
        self, objects: Sequence[SegmentedObject], backgrounds: Sequence[Image] = (), warped: float = 0.0, crowded: float = 0.0
    ) -> None:
        self._warped, self._crowded = warped, crowded
        self._by_source: dict[str, list[SegmentedObject]] = {}
        for item in objects:
            self._by_source.setdefault(item.source, []).append(item)
        self._weights = _normalised([_SOURCE_WEIGHTS.get(source, 0.5) for source in self._by_source])
        self._chances = [_normalised([min(max(*item.mask.shape, 30), 120) for item in pool]) for pool in self._by_source.values()]
        self._backgrounds = list(backgrounds)

    def batch(self, count: int, size: int, rng: np.random.Generator) -> Batch:
        """Draws ``count`` samples with crops of side ``size`` px."""
        samples = [self._sample(size, rng) for _ in range(count)]
        return Batch(
            torch.cat([crop for crop, _, _ in samples]),
            torch.from_numpy(np.stack([target for _, target, _ in samples]))[:, None],
            torch.tensor([hidden for _, _, hidden in samples]),
        )

    def _sample(self, size: int, rng: np.random.Generator) -> tuple[Tensor, NDArray[np.float32], float]:
        item = self._draw(rng)
        if self._backgrounds and rng.random() < 0.25:
            item = paste(item, self._backgrounds[rng.integers(len(self._backgrounds))], rng)
        kind: Kind = ("box", "point", "both")[rng.choice(3, p=(0.45, 0.4, 0.15))]
        item = _surroundings(item)
        # Zero draws nothing, so that recipes without these keep their samples.
        if self._crowded and rng.random() < self._crowded:
            item = cover(item, self._draw(rng), rng)
        item = _shrink(item, rng)
        if rng.random() < 0.5:
            item = _mirror(item)
        if self._warped and rng.random() < self._warped:
            item = warp(item, rng)
        view = _view(item, kind, rng)
        rows, columns = view.window.clipped(item.image.shape[:2])
        image = np.array(item.image, order="C")
        image[rows, columns] = _degrade(image[rows, columns], rng)
        full = np.pad(item.full_mask(), _padding(view, item.image.shape[:2]))
        top, left = max(view.window.y, 0), max(view.window.x, 0)
        inside = full[top : top + view.window.height, left : left + view.window.width]
        enlarging = size > max(inside.shape)
        target = cv2.resize(inside, (size, size), interpolation=cv2.INTER_LINEAR if enlarging else cv2.INTER_AREA)
        hidden = (np.count_nonzero(full > 128) - np.count_nonzero(inside > 128)) / inside.size
        return network_input(torch.from_numpy(image), [view], size), target.astype(np.float32) / 255.0, float(hidden)

    def _draw(self, rng: np.random.Generator) -> SegmentedObject:
        sources = list(self._by_source.values())
        source = int(rng.choice(len(sources), p=self._weights))
        return sources[source][rng.choice(len(sources[source]), p=self._chances[source])]


def _normalised(weights: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(weights, dtype=np.float64)
    return np.asarray(values / values.sum())


def _padding(view: View, shape_hw: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pixels to add on each side of an image for the view's window to lie inside it."""
    window, (height, width) = view.window, shape_hw[:2]
    below, right = window.y + window.height - height, window.x + window.width - width
    return (max(-window.y, 0), max(below, 0)), (max(-window.x, 0), max(right, 0))


def _view(item: SegmentedObject, kind: Kind, rng: np.random.Generator) -> View:
    shape_hw = (item.image.shape[0], item.image.shape[1])
    point = None if kind == "box" else random_point(item, rng, interior=0.6)
    if point is not None and kind == "point":
        side = max(item.mask.shape) * np.exp(rng.uniform(*np.log(_POINT_WINDOWS)))
        return View(point_window(*point, float(np.clip(side, 16, max(16, *shape_hw)))), point_xy=point)
    box = clip_box(jitter_box(item.box_xyxy, _jitter(rng)), shape_hw) or item.box_xyxy
    return View(box_window(box), box_xyxy=box, point_xy=point)


def _jitter(rng: np.random.Generator) -> NDArray[np.float64]:
    """How far each side of a box moves outwards, as fractions of the box: tight, shifted, too large or too small."""
    kind = rng.choice(4, p=(0.3, 0.4, 0.18, 0.12))
    low, high = ((-0.02, 0.02), (-0.15, 0.15), (0.0, 0.3), (-0.2, 0.0))[kind]
    return rng.uniform(low, high, size=4)


def jitter_box(box_xyxy: Box, outwards: NDArray[np.float64]) -> Box:
    """Moves the left, upper, right and lower side of a box outwards by fractions of its width and height."""
    x0, y0, x1, y1 = box_xyxy
    width, height = x1 - x0, y1 - y0
    left, up, right, down = outwards.tolist()
    return x0 - left * width, y0 - up * height, x1 + right * width, y1 + down * height


def random_point(item: SegmentedObject, rng: np.random.Generator, interior: float = 0.0) -> tuple[float, float]:
    """A pixel of the object: any with equal chance, or with probability ``interior`` one far from the object's edge."""
    weights = np.asarray(item.mask == 255, dtype=np.float64)
    if rng.random() < interior:
        padded = np.pad((item.mask == 255).astype(np.uint8), 1)
        weights = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1].astype(np.float64)
    cumulated = np.cumsum(weights.ravel())
    index = int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))
    row, column = divmod(min(index, weights.size - 1), weights.shape[1])
    return float(item.x + column), float(item.y + row)


def rescale(item: SegmentedObject, scale: float) -> SegmentedObject:
    """The object in its image resized by ``scale`` <= 1; the object itself when nothing of it would be left."""
    height, width = item.image.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    mask = cv2.resize(item.full_mask(), size, interpolation=cv2.INTER_AREA)
    image = np.asarray(cv2.resize(item.image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return tight_object(image, _decided(mask), item.source, item.group) or item


def _decided(mask: NDArray[Any]) -> Image:
    """A resampled mask: 255 object, 0 background, 128 where it is about as much of both."""
    return np.where(mask > 160, 255, np.where(mask < 96, 0, 128)).astype(np.uint8)


def _surroundings(item: SegmentedObject) -> SegmentedObject:
    """The object in as much of its image as any window around it can show."""
    margin = int(_POINT_WINDOWS[1] / 2 * max(item.mask.shape)) + 1
    left, top = max(item.x - margin, 0), max(item.y - margin, 0)
    image = item.image[top : item.y + item.mask.shape[0] + margin, left : item.x + item.mask.shape[1] + margin]
    return replace(item, image=image, x=item.x - left, y=item.y - top)


def _shrink(item: SegmentedObject, rng: np.random.Generator) -> SegmentedObject:
    """Far objects: 45 % of the samples show the object 10 to 60 px long, as far as it is longer."""
    longest = max(item.mask.shape)
    wanted = float(np.exp(rng.uniform(np.log(10), np.log(60))))
    if rng.random() < 0.45:
        return rescale(item, wanted / longest) if wanted < longest else item
    return rescale(item, float(rng.uniform(0.5, 1.0))) if rng.random() < 0.3 and longest > 100 else item


def _mirror(item: SegmentedObject) -> SegmentedObject:
    return replace(
        item,
        image=np.ascontiguousarray(item.image[:, ::-1]),
        mask=np.ascontiguousarray(item.mask[:, ::-1]),
        x=item.image.shape[1] - item.x - item.mask.shape[1],
    )


def warp(item: SegmentedObject, rng: np.random.Generator) -> SegmentedObject:
    """Turns, shears and stretches image and object about the object's centre; grey where the image has nothing to show."""
    angle = np.deg2rad(rng.uniform(-_TURN_DEG, _TURN_DEG))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1.0, rng.uniform(-_SHEAR, _SHEAR)], [0.0, 1.0]])
    matrix = turn @ shear @ np.diag(np.exp(rng.uniform(-_STRETCH, _STRETCH, size=2)))
    height, width = item.image.shape[:2]
    corners = matrix @ np.array([[0, width, 0, width], [0, 0, height, height]], dtype=np.float64)
    low = corners.min(axis=1)
    size = (max(1, round(np.ptp(corners[0]))), max(1, round(np.ptp(corners[1]))))
    # Rows and columns are those of pixel centres.
    moved = np.column_stack([matrix, matrix @ (0.5, 0.5) - low - 0.5])
    image = np.asarray(cv2.warpAffine(item.image, moved, size, flags=cv2.INTER_LINEAR, borderValue=(OUTSIDE,) * 3), dtype=np.uint8)
    mask = cv2.warpAffine(item.full_mask(), moved, size, flags=cv2.INTER_LINEAR)
    return tight_object(image, _decided(mask), item.source, item.group) or item


def cover(item: SegmentedObject, other: SegmentedObject, rng: np.random.Generator) -> SegmentedObject:
    """Puts another object before or beside the wanted one, 0.3 to 1.5 times as long; it hides at most half of it.

    Returns:
        What is still to be seen of the object; the object as it was where too little would be.
    """
    height, width = item.image.shape[:2]
    longest = max(item.mask.shape) * float(np.exp(rng.uniform(np.log(0.3), np.log(1.5))))
    cutout, alpha = _cut_out(other, longest / max(other.mask.shape))
    size = alpha.shape[::-1]
    alpha = cv2.GaussianBlur(alpha, (0, 0), float(rng.uniform(0.3, 0.9)))
    # Its centre lies in the object's box or up to half of the box beside it.
    x = round(item.x + rng.uniform(-0.5, 1.5) * item.mask.shape[1] - size[0] / 2)
    y = round(item.y + rng.uniform(-0.5, 1.5) * item.mask.shape[0] - size[1] / 2)
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + size[0], width), min(y + size[1], height)
    if right <= left or bottom <= top:
        return item
    seen = (slice(top - y, bottom - y), slice(left - x, right - x))
    image, mask = item.image.copy(), item.full_mask()
    place = image[top:bottom, left:right]
    soft = alpha[seen][..., None]
    place[...] = np.rint(soft * cutout[seen] + (1 - soft) * place).astype(np.uint8)
    mask[top:bottom, left:right][alpha[seen] > 0.5] = 0
    if np.count_nonzero(mask == 255) < 0.5 * np.count_nonzero(item.mask == 255):
        return item
    return tight_object(image, mask, item.source, item.group) or item


def _cut_out(item: SegmentedObject, scale: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The object's box resized, at least 4 px a side: (h, w, 3) colours from 0 to 255 and (h, w) share of each pixel that is object."""
    h, w = item.mask.shape
    size = (max(4, round(w * scale)), max(4, round(h * scale)))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    colours = cv2.resize(item.image[item.y : item.y + h, item.x : item.x + w], size, interpolation=interpolation).astype(np.float32)
    alpha = cv2.resize((item.mask == 255).astype(np.float32), size, interpolation=interpolation)
    return colours, np.asarray(alpha, dtype=np.float32)


def paste(item: SegmentedObject, background: Image, rng: np.random.Generator) -> SegmentedObject:
    """Puts the object on a road frame, in its lower two thirds, with a feathered edge and in half of the cases its brightness."""
    height, width = background.shape[:2]
    h, w = item.mask.shape
    wanted = float(np.exp(rng.uniform(np.log(14), np.log(0.6 * height))))
    scale = min(wanted / max(h, w), 1.5, 0.95 * height / h, 0.95 * width / w)
    cutout, alpha = _cut_out(item, scale)
    size = alpha.shape[::-1]
    x = int(rng.integers(0, width - size[0] + 1))
    y = int(rng.integers(min(height // 3, height - size[1]), height - size[1] + 1))
    image = background.copy()
    place = image[y : y + size[1], x : x + size[0]].astype(np.float32)
    if rng.random() < 0.5:
        cutout += 0.7 * (place.mean() - cutout[alpha > 0.5].mean()) if np.any(alpha > 0.5) else 0.0
    soft = cv2.GaussianBlur(alpha, (0, 0), float(rng.uniform(0.3, 0.9)))[..., None]
    image[y : y + size[1], x : x + size[0]] = np.clip(soft * cutout + (1 - soft) * place, 0, 255).astype(np.uint8)
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[y : y + size[1], x : x + size[0]] = np.where(alpha > 0.5, 255, 0)
    return tight_object(image, mask, item.source, item.group) or item


def _degrade(image: Image, rng: np.random.Generator) -> Image:
    """Light, colour, blur, noise and compression of another camera."""
    changed = image
    if rng.random() < 0.7:
        contrast, saturation = rng.uniform(0.65, 1.3), rng.uniform(0.2, 1.5)
        gain = rng.uniform(0.7, 1.3) * rng.uniform(0.9, 1.1, size=3)
        mixing = contrast * (saturation * np.eye(3) + (1 - saturation) / 3)
        offset = (gain - contrast) * float(changed.mean())
        changed = np.asarray(cv2.transform(changed, np.column_stack([mixing, offset])), dtype=np.uint8)
    if rng.random() < 0.3:
        changed = np.asarray(cv2.GaussianBlur(changed, (0, 0), float(rng.uniform(0.3, 1.2))), dtype=np.uint8)
    if rng.random() < 0.3:
        noise = rng.standard_normal(changed.shape, dtype=np.float32) * np.float32(rng.uniform(1.0, 8.0))
        changed = np.clip(changed + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.3 and min(changed.shape[:2]) >= 8:
        _, encoded = cv2.imencode(".jpg", changed, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 95))])
        changed = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), dtype=np.uint8)
    return changed
