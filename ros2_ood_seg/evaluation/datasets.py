"""Labelled data sets on disk, in their official layouts and in a plain one.

A layout only says which files belong together and what their label values mean; reading and checking is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
IDENTITY: Mapping[int, int] = {0: 0, 1: 1, 255: 255}


@dataclass(frozen=True)
class LabelledImage:
    """One frame with its ground truth.

    Args:
        name: Stem of the frame, unique in its data set.
        image: (H, W, 3) uint8 RGB.
        label: (H, W) uint8: 0 normal, 1 anomaly, 255 ignore.
        instances: (H, W) int32 ids, 0 for none; None when the data set has none.
    """

    name: str
    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    instances: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Source:
    """The files of one frame."""

    name: str
    image: Path
    label: Path
    instances: Path | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set that was found and whose files are paired.

    Args:
        name: Registered name.
        root: Its folder.
        sources: Frames in order.
        values: What each value of the label files means: 0, 1 or 255.
        track: Whose minimum component sizes apply: ``anomaly`` or ``obstacle`` (SegmentMeIfYouCan).
        instance_rule: Where instances come from, for the report.
    """

    name: str
    root: Path
    sources: tuple[Source, ...]
    values: Mapping[int, int] = field(default_factory=lambda: IDENTITY)
    track: str = "anomaly"
    instance_rule: str = "8-connected components of label 1"

    def __len__(self) -> int:
        return len(self.sources)

    def __iter__(self) -> Iterator[LabelledImage]:
        return (self.load(source) for source in self.sources)

    def head(self, count: int) -> DataSet:
        """The first ``count`` frames."""
        return DataSet(self.name, self.root, self.sources[:count], self.values, self.track, self.instance_rule)

    def load(self, source: Source) -> LabelledImage:
        """Reads and checks one frame.

        Raises:
            InputError: An unreadable file, sizes that differ, or a label value the layout does not have.
        """
        image = read_rgb(source.image)
        label = read_labels(source.label, self.values)
        if label.shape != image.shape[:2]:
            raise InputError(f"'{source.label}' is {_hw(label)}, its image '{source.image}' is {_hw(image)}; they must be equal")
        instances = None
        if source.instances is not None:
            instances = _read(source.instances, cv2.IMREAD_UNCHANGED).astype(np.int32)
            if instances.shape != label.shape:
                raise InputError(
                    f"'{source.instances}' is {'x'.join(map(str, instances.shape))}, its label map is {_hw(label)}; they must be equal"
                )
        return LabelledImage(source.name, image, label, instances)


def _hw(array: NDArray[np.uint8]) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"


def _read(path: Path, flags: int) -> NDArray[np.uint8]:
    image = cv2.imread(str(path), flags)
    if image is None:
        raise InputError(f"'{path}' cannot be read as an image")
    return image  # type: ignore[no-any-return]


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """An image file as (H, W, 3) uint8 RGB, whatever its depth and channels; orientation tags are not applied."""
    bgr = _read(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    rgb: NDArray[np.uint8] = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    return rgb


def read_labels(path: Path, values: Mapping[int, int] = IDENTITY) -> NDArray[np.uint8]:
    """A label file as (H, W) uint8 of 0, 1 and 255.

    Args:
        path: Single-channel image, or one of three equal channels.
        values: Meaning of each value that may occur.

    Raises:
        InputError: Unreadable, coloured, or a value that is not in ``values``.
    """
    raw = _read(path, cv2.IMREAD_UNCHANGED)
    if raw.ndim == 3:
        if not all(np.array_equal(raw[..., 0], raw[..., c]) for c in range(1, min(raw.shape[2], 3))):
            raise InputError(f"'{path}' is a colour image; labels are single-channel with values {_listed(values)}")
        raw = raw[..., 0]
    table = np.full(256, 254, np.uint8)
    for value, meaning in values.items():
        table[value] = meaning
    label: NDArray[np.uint8] = table[np.minimum(raw, 255)] if raw.dtype == np.uint8 else _wide(raw, table)
    unknown = label == 254
    if unknown.any():
        raise InputError(f"'{path}' holds the label value {int(raw[unknown][0])}; allowed are {_listed(values)}")
    return label


def _wide(raw: NDArray[np.uint8], table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    label: NDArray[np.uint8] = np.where(raw > 255, np.uint8(254), table[np.minimum(raw, 255).astype(np.uint8)])
    return label


def _listed(values: Mapping[int, int]) -> str:
    words = {0: "normal", 1: "anomaly", 255: "ignore"}
    if len(values) > 6:
        return ", ".join(f"{min(k for k in values if values[k] == m)}.. {words[m]}" for m in sorted(set(values.values())))
    return ", ".join(f"{value} {words[meaning]}" for value, meaning in sorted(values.items()))


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"'{folder}' is not a folder")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise InputError(f"'{folder}' holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _paired(
    images: Iterable[Path], label_of: Callable[[str], Path], instances_of: Callable[[str], Path] | None = None
) -> tuple[Source, ...]:
    sources: dict[str, Source] = {}
    for image in images:
        label = label_of(image.stem)
        if not label.is_file():
            raise InputError(f"image '{image}' has no label file '{label}'")
        if image.stem in sources:
            raise InputError(f"'{sources[image.stem].image}' and '{image}' have the same stem; results are named by stem")
        instances = instances_of(image.stem) if instances_of else None
        if instances is not None and not instances.is_file():
            raise InputError(f"image '{image}' has no instance file '{instances}', others have one")
        sources[image.stem] = Source(image.stem, image, label, instances)
    return tuple(sources.values())


def _folder(root: Path) -> DataSet:
    """``images/<stem>.*``, ``labels/<stem>.png`` (0, 1, 255), optional ``instances/<stem>.png`` (0 none, k = id)."""
    images = _images(root / "images")
    stems = {path.stem for path in images}
    orphans = sorted(path for path in _images(root / "labels") if path.stem not in stems)
    if orphans:
        raise InputError(f"label file '{orphans[0]}' has no image in '{root / 'images'}'")
    with_instances = (root / "instances").is_dir()
    sources = _paired(
        images, lambda stem: root / "labels" / f"{stem}.png", (lambda stem: root / "instances" / f"{stem}.png") if with_instances else None
    )
    obstacle = any(word in root.resolve().name.lower() for word in ("obstacle", "lost"))
    rule = "files in instances/; anomalous pixels without an id are ignored" if with_instances else "8-connected components of label 1"
    return DataSet("folder", root, sources, track="obstacle" if obstacle else "anomaly", instance_rule=rule)


def _smiyc(name: str, track: str, prefix: str) -> Callable[[Path], DataSet]:
    def find(root: Path) -> DataSet:
        images = [path for path in _images(root / "images") if path.stem.startswith(prefix)]
        folder = root / "labels_masks"
        labelled = [path for path in images if (folder / f"{path.stem}_labels_semantic.png").is_file()]
        if not labelled:
            raise InputError(
                f"'{folder}' has no <stem>_labels_semantic.png for any image: the labels of the test split are hidden; "
                f"'{name}' evaluates the validation split, scores of the test split are submitted to segmentmeifyoucan.com"
            )
        return DataSet(name, root, _paired(labelled, lambda stem: folder / f"{stem}_labels_semantic.png"), track=track)

    return find


LAYOUTS: dict[str, Callable[[Path], DataSet]] = {
    "folder": _folder,
    "road_anomaly_21": _smiyc("road_anomaly_21", "anomaly", "validation"),
    "road_obstacle_21": _smiyc("road_obstacle_21", "obstacle", "validation"),
}


def open_dataset(name: str, root: str | Path) -> DataSet:
    """Finds a data set's files and pairs them; nothing is decoded yet.

    Args:
        name: A key of :data:`LAYOUTS`.
        root: Its folder.

    Raises:
        InputError: An unknown name, a folder that is not laid out as expected, or an image without its label.
    """
    if name not in LAYOUTS:
        raise InputError(f"unknown data set '{name}': use one of {', '.join(LAYOUTS)}")
    folder = Path(root)
    if not folder.is_dir():
        raise InputError(f"--root '{root}' is not a folder")
    return LAYOUTS[name](folder)
