"""In-distribution road images with their labels in common classes: Cityscapes, CamVid, IDD and IDD-Lite, and plain folders."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.image_encodings import check_image_file, read_rgb

IGNORE = 255
"""Label of pixels that carry no information."""

_INVALID = 254
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# drivable, non-drivable, living things, vehicles, road-side objects, far objects, sky
_CAMVID = {0: 6, 1: 5, 2: 4, 3: 0, 4: 1, 5: 5, 6: 4, 7: 4, 8: 3, 9: 2, 10: 2, 11: IGNORE}
_CITYSCAPES_IDS = {
    **dict.fromkeys(range(34), IGNORE),
    **{7: 0, 8: 1, 9: 0, 10: 1, 11: 5, 12: 5, 13: 4, 14: 4, 15: 5, 16: 5, 17: 4, 18: 4, 19: 4, 20: 4, 21: 5, 22: 1, 23: 6},
    **{24: 2, 25: 2, 26: 3, 27: 3, 28: 3, 29: 3, 30: 3, 31: 3, 32: 3, 33: 3},
}


def _by_bounds(first_of_class: Sequence[int], count: int) -> dict[int, int]:
    """Values 0..count-1, in the order of the common classes, to those; a value from the last bound on is void."""
    table = {value: sum(value >= first for first in first_of_class) - 1 for value in range(count)}
    return {value: index if index < 7 else IGNORE for value, index in table.items()} | {IGNORE: IGNORE}


# IDD's own hierarchy at three of its levels (AutoNUE/public-code, helpers/anue_labels.py); level 1 is the common classes.
_IDD_LEVEL_1 = _by_bounds(range(7), 7)
_IDD_LABELS = {
    "_label.png": _IDD_LEVEL_1,
    "_gtFine_labellevel1Ids.png": _IDD_LEVEL_1,
    "_gtFine_labellevel3Ids.png": _by_bounds((0, 2, 4, 6, 13, 22, 25), 26),
    "_gtFine_labelids.png": _by_bounds((0, 3, 6, 9, 19, 29, 33, 35), 40),
}


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
        semantic = self.read_label()
        if semantic.shape != image.shape[:2]:
            height, width = semantic.shape
            raise InputError(f"label '{self.label}' is {width}x{height}, its image is {image.shape[1]}x{image.shape[0]}")
        return image, semantic

    def read_label(self) -> NDArray[np.uint8]:
        """(H, W) common classes of a frame that has a label file.

        Raises:
            InputError: Unreadable file or a label value outside the layout.
        """
        raw = cv2.imread(str(self.label), cv2.IMREAD_UNCHANGED)
        if raw is None or raw.ndim != 2 or raw.dtype != np.uint8:
            raise InputError(f"label '{self.label}' cannot be read as an image of one 8-bit channel")
        table = np.full(256, _INVALID, np.uint8)
        table[list(self.classes)] = list(self.classes.values())
        semantic = np.asarray(table[raw], np.uint8)
        if (semantic == _INVALID).any():
            found = sorted(int(v) for v in np.unique(raw[semantic == _INVALID]))
            raise InputError(f"label '{self.label}' holds values {found} outside its layout, allowed: {sorted(self.classes)}")
        return semantic


def read_camvid(root: Path, split: str) -> list[RoadImage]:
    """CamVid with the 12 label values of its SegNet copy.

    ``root/<split>/images`` and ``labels``, or as that copy has it, ``root/<split>`` and ``root/<split>annot``.
    """
    if (root / f"{split}annot").is_dir():
        return _paired(root / split, root / f"{split}annot", _CAMVID, "CamVid")
    return _paired(root / split / "images", root / split / "labels", _CAMVID, "CamVid")


def read_idd_lite(root: Path, split: str) -> list[RoadImage]:
    """IDD and IDD-Lite.

    ``root/<split>/images`` and ``labels`` (values of level 1), or as published, ``root/leftImg8bit/<split>/<drive>`` and
    ``root/gtFine/<split>/<drive>``: ``*_image.jpg`` with ``*_label.png`` (Lite), or ``*_leftImg8bit.*`` with the labels that IDD's tools
    make, of level 1, level 3 or all ids.
    """
    pictures = root / "leftImg8bit" / split
    if not pictures.is_dir():
        return _paired(root / split / "images", root / split / "labels", _IDD_LEVEL_1, "IDD-Lite")
    items = []
    for image in list_images(pictures, recursive=True):
        stem = image.stem.removesuffix("_image").removesuffix("_leftImg8bit")
        start = root / "gtFine" / split / image.parent.relative_to(pictures) / stem
        labels = {path: classes for end, classes in _IDD_LABELS.items() if (path := Path(f"{start}{end}")).is_file()}
        if not labels:
            raise InputError(f"IDD image '{image}' has no label '{start}*', expected one that ends in {', '.join(_IDD_LABELS)}")
        items.append(RoadImage(image, *next(iter(labels.items()))))
    return _checked(items)


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
    return _checked(items)


def read_road_folder(root: Path) -> list[RoadImage]:
    """A folder of road pictures without labels."""
    items = [RoadImage(path, None, {}) for path in list_images(root)]
    check_all(check_image_file, [item.image for item in items], "check pictures")
    for item in evenly_spread(items):
        item.read()
    return items


def list_images(folder: Path, *, recursive: bool = False) -> list[Path]:
    """The pictures of a folder, sorted.

    Raises:
        InputError: There is no such folder, or it holds no pictures.
    """
    if not folder.is_dir():
        raise InputError(f"folder '{folder}' does not exist")
    found = folder.glob("**/*" if recursive else "*")
    paths = sorted(path for path in found if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith("."))
    if not paths:
        raise InputError(f"folder '{folder}' holds no pictures ({', '.join(_IMAGE_SUFFIXES)})")
    return paths


def is_held_out(group: str, fraction: float) -> bool:
    """Whether an image or sequence of this name belongs to the held-out share; always the same answer."""
    return zlib.crc32(group.encode()) % 1000 < 1000 * fraction


def evenly_spread(items: Sequence[_Item], count: int = 16) -> list[_Item]:
    """At most ``count`` of the items, the first and the last among them."""
    return [items[k] for k in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def check_all(check: Callable[[_Item], _Result], items: Sequence[_Item], what: str) -> list[_Result]:
    """What ``check`` gives for each item, from several threads; shows a progress bar when that takes long.

    Raises:
        InputError: The first one that ``check`` raises.
    """
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(check, items), total=len(items), desc=what, delay=3.0, leave=False))


def _paired(pictures: Path, annotations: Path, classes: Mapping[int, int], layout: str) -> list[RoadImage]:
    for folder in (pictures, annotations):
        if not folder.is_dir():
            raise InputError(f"{layout} folder '{folder}' does not exist: expected pictures in '{pictures}', labels in '{annotations}'")
    images = list_images(pictures)
    labels = {path.stem: path for path in list_images(annotations)}
    missing = [path.name for path in images if path.stem not in labels]
    extra = sorted(labels.keys() - {path.stem for path in images})
    if missing or extra:
        raise InputError(f"{layout} folder '{pictures.parent}': image without label {missing[:3]}, label without image {extra[:3]}")
    return _checked([RoadImage(path, labels[path.stem], classes) for path in images])


def _checked(items: list[RoadImage]) -> list[RoadImage]:
    """Reads every label and some pictures, so that bad data is found now and not after hours of work."""
    for item in evenly_spread(items):
        item.read()
    check_all(check_image_file, [item.image for item in items], "check pictures")
    check_all(RoadImage.read_label, items, "check labels")
    return items
