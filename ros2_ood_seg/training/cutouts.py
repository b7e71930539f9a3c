"""Objects that can be pasted into road images: COCO instances and panoptic masks, folders of masks, and procedural textures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.image_encodings import check_image_file, read_rgb
from ros2_ood_seg.training.road_images import IGNORE, check_all, evenly_spread, list_images

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

PUBLISHED_EXCLUSION = frozenset(KNOWN_CLASSES) - {"train"}
"""Pictures that show one of these are no outliers in Meta-OoD's preparation of COCO, which RPL and S2M take over."""

PUBLISHED_MIN_SIDE_PX = 480
"""Smaller pictures are left out there."""

AMBIGUOUS_CLASSES = frozenset(
    {"fire hydrant", "parking meter", "bench", "potted plant", "backpack", "handbag", "umbrella", "tie", "dining table"}
)
"""COCO classes that belong to streets or to people, or whose masks hold other things: pasted in neither role."""


@dataclass(frozen=True, eq=False)
class Cutout:
    """One object that can be pasted, or as S2M does, all objects of a picture; read from disk only when used.

    Args:
        image: Picture file.
        group: Image or sequence it comes from; training and validation are split by it.
        polygons: Outlines, each (K, 2) float px, or None when ``mask`` is given.
        coded: Further masks in COCO's run-length encoding, ``{"size": [h, w], "counts": ...}``.
        mask: Mask file, or None when ``polygons`` are given.
        mask_id: Value of the object in ``mask`` (panoptic: R + 256 G + 65536 B).
        semantic: The in-distribution class of an object that Cityscapes knows, or :data:`IGNORE` for an anomaly.
    """

    image: Path
    group: str
    polygons: tuple[NDArray[np.float32], ...] | None = None
    coded: tuple[Mapping[str, Any], ...] = ()
    mask: Path | None = None
    mask_id: int = 255
    semantic: int = IGNORE

    @property
    def has_mask(self) -> bool:
        """Whether anything says where it is: tools export empty lists of polygons for what they cannot outline."""
        return self.mask is not None or bool(self.polygons or self.coded)

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
            for polygon in self.polygons:
                # COCO counts from pixel corners, OpenCV from pixel centres.
                cv2.fillPoly(alpha, [np.round((polygon - 0.5) * 8).astype(np.int32)], 255, shift=3)
            for mask in self.coded:
                alpha[decode_runs(mask, shape_hw, self.image)] = 255
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


@dataclass(frozen=True)
class CocoRegion:
    """One annotated region of a COCO picture.

    Args:
        cutout: Where it is.
        name: Class.
        area_px: As annotated.
        is_thing: An object rather than background as road or sky.
        is_crowd: Several objects in one mask.
    """

    cutout: Cutout
    name: str
    area_px: float
    is_thing: bool
    is_crowd: bool


def coco_regions(root: Path) -> Iterator[CocoRegion]:
    """COCO instances: ``root/instances.json`` and ``images``, or as published, ``root/annotations/instances_<split>.json`` and ``<split>``.

    Raises:
        InputError: The annotation file is missing or malformed.
    """
    for path, pictures in coco_parts(root, "instances"):
        tree = read_json(path)
        with in_layout(path, "COCO instances"):
            names = {c["id"]: c["name"] for c in tree["categories"]}
            files = {i["id"]: pictures / i["file_name"] for i in tree["images"]}
            for item in tree["annotations"]:
                picture, shapes, name = files[item["image_id"]], item["segmentation"], names[item["category_id"]]
                polygons, coded = (_polygons(shapes), ()) if isinstance(shapes, list) else ((), (shapes,))
                cutout = Cutout(picture, f"coco/{picture.stem}", polygons=polygons, coded=coded, semantic=KNOWN_CLASSES.get(name, IGNORE))
                yield CocoRegion(cutout, name, item["area"], True, bool(item.get("iscrowd")))


def coco_panoptic_regions(root: Path) -> Iterator[CocoRegion]:
    """COCO panoptic.

    ``root/panoptic.json``, ``panoptic`` and ``images``, or as published, ``root/annotations/panoptic_<split>.json``,
    ``annotations/panoptic_<split>`` and ``<split>``.

    Raises:
        InputError: The annotation file is missing or malformed.
    """
    for path, pictures in coco_parts(root, "panoptic"):
        tree = read_json(path)
        with in_layout(path, "COCO panoptic"):
            classes = {c["id"]: (c["name"], bool(c["isthing"])) for c in tree["categories"]}
            files = {i["id"]: pictures / i["file_name"] for i in tree["images"]}
            for item in tree["annotations"]:
                picture, mask = files[item["image_id"]], path.with_suffix("") / item["file_name"]
                for segment in item["segments_info"]:
                    name, is_thing = classes[segment["category_id"]]
                    cutout = Cutout(
                        picture,
                        f"coco/{picture.stem}",
                        mask=mask,
                        mask_id=int(segment["id"]),
                        semantic=KNOWN_CLASSES.get(name, IGNORE),
                    )
                    yield CocoRegion(cutout, name, segment["area"], is_thing, bool(segment.get("iscrowd")))


def read_coco(root: Path, *, min_area_px: int = 400, whole_pictures: bool = False) -> list[Cutout]:
    """The objects of COCO instances; for the layout see :func:`coco_regions`.

    Args:
        root: The folder.
        min_area_px: Smaller objects are left out; crowds are, too.
        whole_pictures: As S2M: all objects of a picture, crowds included, are one cut-out, and pictures that show one of
            :data:`PUBLISHED_EXCLUSION` or have a side below :data:`PUBLISHED_MIN_SIDE_PX` are left out.

    Raises:
        InputError: The annotation file is missing or malformed, an image is missing, or nothing usable is left.
    """
    if not whole_pictures:
        return _existing(_objects(coco_regions(root), min_area_px), root)
    cutouts: list[Cutout] = []
    for path, pictures in coco_parts(root, "instances"):
        tree = read_json(path)
        with in_layout(path, "COCO instances"):
            names = {c["id"]: c["name"] for c in tree["categories"]}
            files = {i["id"]: pictures / i["file_name"] for i in tree["images"]}
            cutouts += _whole_pictures(tree, names, files)
    return _existing(cutouts, root)


def read_coco_panoptic(root: Path, *, min_area_px: int = 400) -> list[Cutout]:
    """The objects of COCO panoptic; crowds are left out. For the layout see :func:`coco_panoptic_regions`."""
    return _existing(_objects(coco_panoptic_regions(root), min_area_px), root)


def _objects(regions: Iterator[CocoRegion], min_area_px: int) -> list[Cutout]:
    """Objects that can be pasted."""
    return [
        region.cutout
        for region in regions
        if region.is_thing
        and not region.is_crowd
        and region.name not in AMBIGUOUS_CLASSES
        and region.area_px >= min_area_px
        and region.cutout.has_mask
    ]


def coco_parts(root: Path, kind: str) -> list[tuple[Path, Path]]:
    """The annotation files of a COCO layout, each with its folder of pictures.

    Args:
        root: Folder with ``<kind>.json`` and ``images``, or with ``annotations/<kind>_<split>.json`` and ``<split>``.
        kind: ``instances`` or ``panoptic``.

    Raises:
        InputError: Neither is there.
    """
    if (root / f"{kind}.json").is_file():
        return [(root / f"{kind}.json", root / "images")]
    parts = []
    for path in sorted((root / "annotations").glob(f"{kind}_*.json")):
        split = path.stem.removeprefix(f"{kind}_")
        parts += [(path, folder) for folder in (root / split, root / "images" / split) if folder.is_dir()][:1]
    if not parts:
        raise InputError(
            f"'{root}' is not in the COCO layout: expected {kind}.json and images/, or annotations/{kind}_<split>.json and <split>/"
        )
    return parts


def read_mask_folder(root: Path, *, keep: Callable[[str], bool] = lambda name: True) -> list[Cutout]:
    """``root/images`` and ``root/masks``, flat or one sub-folder per sequence; all objects are anomalies.

    Masks have one channel: 255 object, 0 background, 128 undecided. An image whose mask shows no object is left out.

    Args:
        root: The folder.
        keep: Whether to use the image or sequence of this name.

    Raises:
        InputError: No images, an image without a mask, a mask without an image, or one with other values.
    """
    for folder in (root / "images", root / "masks"):
        if not folder.is_dir():
            raise InputError(f"folder of objects '{folder}' does not exist: expected '{root}' to hold images/ and masks/")
    images = list_images(root / "images", recursive=True)
    masks = {path.relative_to(root / "masks").with_suffix(""): path for path in list_images(root / "masks", recursive=True)}
    cutouts = []
    for image in images:
        relative = image.relative_to(root / "images").with_suffix("")
        if relative not in masks:
            raise InputError(f"image '{image}' has no mask '{root / 'masks' / relative}.png'")
        mask = masks.pop(relative)
        name = relative.parts[0]
        if keep(name):
            cutouts.append(Cutout(image, f"{root.name}/{name}", mask=mask))
    if masks:
        raise InputError(f"mask '{min(masks.values())}' matches no image in '{root / 'images'}'")
    shown = check_all(_shows_object, [cutout.mask for cutout in cutouts if cutout.mask is not None], "check masks")
    return _existing([cutout for cutout, is_shown in zip(cutouts, shown, strict=True) if is_shown], root)


def read_json(path: Path) -> Any:
    """The content of an annotation file.

    Raises:
        InputError: It is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"annotation file '{path}' cannot be read: {error}") from error


def read_mask(path: Path) -> NDArray[np.uint8]:
    """(H, W) uint8: 255 object, 0 background, 128 undecided.

    Raises:
        InputError: Unreadable, of several channels, or with other values.
    """
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if mask is None or mask.ndim != 2 or mask.dtype != np.uint8:
        raise InputError(f"mask '{path}' cannot be read as an image of one 8-bit channel")
    others = np.setdiff1d(mask, (0, 128, 255))
    if len(others):
        found = f"{others[:5].tolist()}{' and more' if len(others) > 5 else ''}"
        raise InputError(f"mask '{path}' holds values {found}, allowed: 255 object, 0 background, 128 undecided")
    return np.asarray(mask, np.uint8)


def _shows_object(path: Path) -> bool:
    return bool((read_mask(path) == 255).any())


def _whole_pictures(tree: Any, names: Mapping[int, str], files: Mapping[int, Path]) -> Iterator[Cutout]:
    by_picture: dict[int, list[Any]] = {}
    for item in tree["annotations"]:
        by_picture.setdefault(item["image_id"], []).append(item)
    large = {i["id"] for i in tree["images"] if min(i["height"], i["width"]) >= PUBLISHED_MIN_SIDE_PX}
    for picture, items in by_picture.items():
        if picture not in large or any(names[item["category_id"]] in PUBLISHED_EXCLUSION for item in items):
            continue
        shapes = [item["segmentation"] for item in items]
        polygons = tuple(polygon for shape in shapes if isinstance(shape, list) for polygon in _polygons(shape))
        coded = tuple(shape for shape in shapes if not isinstance(shape, list))
        cutout = Cutout(files[picture], f"coco/{files[picture].stem}", polygons=polygons, coded=coded)
        if cutout.has_mask:
            yield cutout


def _polygons(shapes: list[Any]) -> tuple[NDArray[np.float32], ...]:
    return tuple(np.asarray(shape, np.float32).reshape(-1, 2) for shape in shapes)


def decode_runs(mask: Mapping[str, Any], shape_hw: tuple[int, int], picture: object) -> NDArray[np.bool_]:
    """A mask in COCO's run-length encoding, compressed or not, as (H, W) bool.

    Args:
        mask: ``{"size": [h, w], "counts": ...}``.
        shape_hw: Of the picture.
        picture: For messages.

    Raises:
        InputError: The mask is of another size.
    """
    if tuple(mask["size"]) != shape_hw:
        raise InputError(f"a mask of '{picture}' is for {mask['size'][1]}x{mask['size'][0]} px, it has {shape_hw[1]}x{shape_hw[0]}")
    compressed = coco_mask.frPyObjects(dict(mask), *shape_hw) if isinstance(mask["counts"], list) else mask
    return np.asarray(coco_mask.decode(compressed), np.bool_)


@contextmanager
def in_layout(path: Path, name: str) -> Iterator[None]:
    """Says which file is not in the layout ``name`` when something that belongs to it is missing.

    Raises:
        InputError: Instead of what a missing key or another type raises.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"'{path}' is not in the {name} layout: {error!r}") from error


def check_files(paths: Iterable[Path | None], root: Path) -> None:
    """Looks at the pictures and masks that a data set names, each once.

    Raises:
        InputError: One is missing, empty or cut short.
    """
    files = sorted({path for path in paths if path is not None})
    for path in files:
        if not path.is_file():
            raise InputError(f"'{root}' names the file '{path}', which does not exist")
    check_all(check_image_file, files, "check pictures")


def _existing(cutouts: list[Cutout], root: Path) -> list[Cutout]:
    """Checks that all files are there, and reads some objects."""
    if not cutouts:
        raise InputError(f"'{root}' holds no usable objects")
    check_files((path for cutout in cutouts for path in (cutout.image, cutout.mask)), root)
    for cutout in evenly_spread(cutouts):
        cutout.read()
    return cutouts
