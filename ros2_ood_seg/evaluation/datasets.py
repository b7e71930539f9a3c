"""Labelled data sets on disk, in their official layouts and in a plain one.

A layout only says which files belong together and what their label values mean; reading and checking is the same for all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.image_encodings import decode_compressed, decode_numbers, read_rgb

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
IDENTITY: Mapping[int, int] = {0: 0, 1: 1, 255: 255}
COMPONENT_RULE = "8-connected components of label 1"
CITYSCAPES_VOID = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)


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


def labelled_image(
    name: str, image: NDArray[np.uint8], label: NDArray[np.integer[Any]], instances: NDArray[np.integer[Any]] | None = None
) -> LabelledImage:
    """A frame whose label map comes as whole numbers of any type, checked; instance ids below 1 are none.

    Raises:
        InputError: Sizes that differ or a label other than 0, 1 and 255.
    """
    for what, array in (("label map", label), ("instance map", instances)):
        if array is not None and array.shape != image.shape[:2]:
            raise InputError(f"frame '{name}': the {what} is {_hw(array)}, the image {_hw(image)}; they must be equal")
    unknown = label[~np.isin(label, list(IDENTITY))]
    if unknown.size:
        raise InputError(f"frame '{name}' holds the label value {int(unknown[0])}; allowed are {_listed(IDENTITY)}")
    return LabelledImage(name, image, label.astype(np.uint8), None if instances is None else np.maximum(instances, 0).astype(np.int32))


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
        least_id: Smaller values of the instance files are no instances.
        cityscapes_ids: The label files hold Cityscapes instance ids (class, or class * 1000 + number) instead of ``values``.
    """

    name: str
    root: Path
    sources: tuple[Source, ...]
    values: Mapping[int, int] = field(default_factory=lambda: IDENTITY)
    track: str = "anomaly"
    instance_rule: str = COMPONENT_RULE
    least_id: int = 1
    cityscapes_ids: bool = False

    def __len__(self) -> int:
        return len(self.sources)

    def __iter__(self) -> Iterator[LabelledImage]:
        return (self.load(source) for source in self.sources)

    def head(self, count: int) -> DataSet:
        """The first ``count`` frames."""
        return replace(self, sources=self.sources[:count])

    def pixels(self) -> int:
        """Of all label files together; of most only the header is read.

        Raises:
            InputError: As :meth:`load`, of the first frame or one whose header says nothing.
        """
        return self.load(self.sources[0]).label.size + sum(map(self._label_pixels, self.sources[1:]))

    def _label_pixels(self, source: Source) -> int:
        # Comes with torchvision; OpenCV reads whole files only.
        from PIL import Image

        try:
            with Image.open(source.label) as label:
                return label.width * label.height
        except (OSError, Image.DecompressionBombError):
            return self.load(source).label.size

    def load(self, source: Source) -> LabelledImage:
        """Reads and checks one frame.

        Raises:
            InputError: An unreadable file, sizes that differ, or a label value the layout does not have.
        """
        image = read_rgb(source.image)
        label = read_cityscapes_ids(source.label) if self.cityscapes_ids else read_labels(source.label, self.values)
        if label.shape != image.shape[:2]:
            turned = decode_compressed(source.image.read_bytes()).shape[:2] == label.shape
            hint = ": it fits the picture turned as its orientation tag says, which is not applied here; save it turned, without the tag"
            raise InputError(
                f"'{source.label}' is {_hw(label)}, its image '{source.image}' is {_hw(image)}; they must be equal" + hint * turned
            )
        instances = None
        if source.instances is not None:
            instances = _read(source.instances).astype(np.int32)
            if instances.shape != label.shape:
                raise InputError(
                    f"'{source.instances}' is {'x'.join(map(str, instances.shape))}, its label map is {_hw(label)}; they must be equal"
                )
            instances[instances < self.least_id] = 0
        return LabelledImage(source.name, image, label, instances)


def _hw(array: NDArray[Any]) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"


def _read(path: Path) -> NDArray[Any]:
    try:
        return decode_numbers(path.read_bytes())
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"'{path}' cannot be read as labels: {error}") from error


def _single(path: Path, allowed: str) -> NDArray[Any]:
    """(H, W) numbers of a file with one channel, or with three equal ones."""
    raw = _read(path)
    if raw.ndim == 2:
        return raw
    if not all(np.array_equal(raw[..., 0], raw[..., c]) for c in range(1, min(raw.shape[2], 3))):
        raise InputError(f"'{path}' is a colour image; {allowed}")
    return np.ascontiguousarray(raw[..., 0])


def read_labels(path: Path, values: Mapping[int, int] = IDENTITY) -> NDArray[np.uint8]:
    """A label file as (H, W) uint8 of 0, 1 and 255.

    Args:
        path: Single-channel image, or one of three equal channels.
        values: Meaning of each value that may occur.

    Raises:
        InputError: Unreadable, coloured, or a value that is not in ``values``.
    """
    raw = _single(path, f"labels are single-channel with values {_listed(values)}")
    table = np.full(256, 254, np.uint8)
    for value, meaning in values.items():
        table[value] = meaning
    label: NDArray[np.uint8] = cv2.LUT(raw, table) if raw.dtype == np.uint8 else _wide(raw, table)
    unknown = label == 254
    if unknown.any():
        raise InputError(f"'{path}' holds the label value {int(raw[unknown][0])}; allowed are {_listed(values)}")
    return label


def read_cityscapes_ids(path: Path) -> NDArray[np.uint8]:
    """Cityscapes instance ids as (H, W) uint8: numbered instances are anomalies, classes that are void there are ignored.

    Raises:
        InputError: Unreadable or coloured.
    """
    ids = _single(path, "Cityscapes instance ids are single-channel numbers of 16 bit")
    label = np.where(np.isin(ids, CITYSCAPES_VOID), np.uint8(255), np.uint8(0))
    label[ids >= 1000] = 1
    return label


def read_map(path: Path) -> NDArray[np.float32]:
    """A score map from a .npy file.

    Raises:
        InputError: Missing, unreadable, or not two-dimensional finite numbers.
    """
    try:
        scores = np.load(path, allow_pickle=False)
    # Damaged bytes can raise nearly anything: EOFError, TokenError, BadZipFile and more.
    except Exception as error:
        raise InputError(f"score map '{path}' cannot be read: {error}") from error
    if not isinstance(scores, np.ndarray) or scores.ndim != 2 or scores.dtype.kind not in "fiu":
        raise InputError(f"score map '{path}' must be a two-dimensional array of numbers")
    with np.errstate(over="ignore"):
        scores = scores.astype(np.float32)
    if not np.isfinite(scores).all():
        raise InputError(f"score map '{path}' holds {np.count_nonzero(~np.isfinite(scores))} scores that are NaN or infinite in float32")
    return scores


def check_external(folder: Path | None, scorer: str) -> None:
    """Looks whether score maps from elsewhere and the scorer belong together, before anything is loaded.

    Args:
        folder: Of ``--external``, or None.
        scorer: ``scorer.name`` of the settings.

    Raises:
        InputError: Maps for a scorer that makes its own, no maps for the scorer ``external``, or no such folder.
    """
    if folder is None:
        if scorer == "external":
            raise InputError("scorer 'external' needs score maps: name their folder with --external")
        return
    if scorer != "external":
        raise InputError(f"scorer '{scorer}' makes its own maps and would not read those of --external: add --set scorer.name=external")
    if not folder.is_dir():
        raise InputError(f"--external '{folder}' is not a folder")


def _wide(raw: NDArray[np.uint8], table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    label: NDArray[np.uint8] = np.where(raw > 255, np.uint8(254), table[np.minimum(raw, 255).astype(np.uint8)])
    return label


def _listed(values: Mapping[int, int]) -> str:
    words = {0: "normal", 1: "anomaly", 255: "ignore"}
    if len(values) > 6:
        return ", ".join(f"{min(k for k in values if values[k] == m)}.. {words[m]}" for m in sorted(set(values.values())))
    return ", ".join(f"{value} {words[meaning]}" for value, meaning in sorted(values.items()))


def list_images(folder: Path) -> list[Path]:
    """Image files of a folder by name.

    Raises:
        InputError: No folder, or none in it.
    """
    if not folder.is_dir():
        raise InputError(f"'{folder}' is not a folder")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))
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
    images = list_images(root / "images")
    stems = {path.stem for path in images}
    orphans = sorted(path for path in list_images(root / "labels") if path.stem not in stems)
    if orphans:
        raise InputError(f"label file '{orphans[0]}' has no image in '{root / 'images'}'")
    # Not the folder of predictions that --save makes.
    with_instances = any((root / "instances").glob("*.png"))
    sources = _paired(
        images, lambda stem: root / "labels" / f"{stem}.png", (lambda stem: root / "instances" / f"{stem}.png") if with_instances else None
    )
    # The name that was given, which a link may have for itself, and that of where it leads.
    names = {os.path.basename(os.path.abspath(root)).lower(), root.resolve().name.lower()}
    obstacle = any(word in name for name in names for word in ("obstacle", "lost"))
    rule = "files in instances/; anomalous pixels without an id are ignored" if with_instances else COMPONENT_RULE
    return DataSet("folder", root, sources, track="obstacle" if obstacle else "anomaly", instance_rule=rule)


def _smiyc(name: str, track: str, prefix: str) -> Callable[[Path], DataSet]:
    def find(root: Path) -> DataSet:
        """``images/<stem>.*`` and ``labels_masks/<stem>_labels_semantic.png``; only the validation images have labels."""
        images = [path for path in list_images(root / "images") if path.stem.startswith(prefix)]
        folder = root / "labels_masks"
        labelled = [path for path in images if (folder / f"{path.stem}_labels_semantic.png").is_file()]
        if not labelled:
            raise InputError(
                f"'{folder}' has no <stem>_labels_semantic.png for any image: the labels of the test split are hidden; "
                f"'{name}' evaluates the validation split, scores of the test split are submitted to segmentmeifyoucan.com"
            )
        return DataSet(name, root, _paired(labelled, lambda stem: folder / f"{stem}_labels_semantic.png"), track=track)

    return find


def files_below(root: Path) -> list[Path]:
    """All files below a folder, sorted, also through links to folders; those that begin with a dot are of the system."""
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def files_ending(root: Path, end: str, *, by_folder: bool = False) -> dict[str, Path]:
    """Files below a folder whose names end so, by what comes before.

    Args:
        root: The folder.
        end: As ``_labels.png``.
        by_folder: The folders below ``root`` belong to the name, as ``t5_1``: numbers start anew in each.

    Raises:
        InputError: Two files of one name.
    """
    found: dict[str, Path] = {}
    for path in files_below(root):
        if not path.name.endswith(end):
            continue
        name = ("_".join(path.relative_to(root).parts) if by_folder else path.name)[: -len(end)]
        if name in found:
            raise InputError(f"'{found[name]}' and '{path}' have the same name; results are named by it")
        found[name] = path
    return found


def _fishyscapes(name: str, folder: str, track: str) -> Callable[[Path], DataSet]:
    def find(root: Path) -> DataSet:
        """``original/`` and ``labels/`` of equal stems, or Lost & Found's images beside the official ``*_labels.png``."""
        root = root / folder if (root / folder).is_dir() else root
        if (root / "original").is_dir():
            sources = _paired(list_images(root / "original"), lambda stem: root / "labels" / f"{stem}.png")
            return DataSet(name, root, sources, track=track)
        labels = files_ending(root, "_labels.png")
        images = files_ending(root, "_leftImg8bit.png")
        if not labels:
            raise InputError(f"'{root}' has neither original/ with labels/ nor files *_labels.png: the labels of the test split are hidden")
        # Official label files are numbered: 0000_04_Maurener_Weg_8_000000_000030_labels.png.
        found = {fid: (images.get(fid.split("_", 1)[-1]), label) for fid, label in labels.items()}
        return DataSet(name, root, _required(found, root), track=track)

    return find


def _required(found: Mapping[str, tuple[Path | None, Path]], root: Path) -> tuple[Source, ...]:
    for name, (image, label) in found.items():
        if image is None:
            raise InputError(f"label file '{label}' has no image for '{name}' below '{root}'")
    return tuple(Source(name, image, label) for name, (image, label) in found.items() if image is not None)


def _road_anomaly(root: Path) -> DataSet:
    """``frames/<stem>.jpg`` with ``frames/<stem>.labels/labels_semantic.png`` (0 normal, 2 anomaly), or ``original/`` and ``labels/``."""
    if (root / "original").is_dir():
        sources = _paired(list_images(root / "original"), lambda stem: root / "labels" / f"{stem}.png")
    else:
        sources = _paired(list_images(root / "frames"), lambda stem: root / "frames" / f"{stem}.labels" / "labels_semantic.png")
    return DataSet("road_anomaly", root, sources, {0: 0, 1: 1, 2: 1, 255: 255})


def _lost_and_found(root: Path) -> DataSet:
    """``leftImg8bit/test``, ``gtCoarse/test``: 0 ignore, 1 road, 2 to 200 obstacles; frames without any label are left out, as usual."""
    images = files_ending(root / "leftImg8bit" / "test", "_leftImg8bit.png")
    labels = files_ending(root / "gtCoarse" / "test", "_gtCoarse_labelIds.png")
    instances = files_ending(root / "gtCoarse" / "test", "_gtCoarse_instanceIds.png")
    if not images:
        raise InputError(f"'{root / 'leftImg8bit' / 'test'}' holds no *_leftImg8bit.png")
    missing = sorted(set(images) - set(labels))
    if missing:
        raise InputError(f"image '{images[missing[0]]}' has no label file *_gtCoarse_labelIds.png below '{root / 'gtCoarse' / 'test'}'")
    values = {0: 255, 1: 0} | dict.fromkeys(range(2, 201), 1)
    sources = tuple(Source(fid, image, labels[fid], instances.get(fid)) for fid, image in images.items())
    labelled = tuple(source for source in sources if (read_labels(source.label, values) != 255).any())
    rule = "instance ids of gtCoarse" if instances else COMPONENT_RULE
    return DataSet("lost_and_found", root, labelled, values, "obstacle", rule, least_id=1000)


def _street_hazards(root: Path) -> DataSet:
    """``images/test/**/<stem>.png``, ``annotations/test/**/<stem>.png``: 14 anomaly, 1 to 13 normal."""
    images = files_ending(root / "images" / "test", ".png", by_folder=True)
    labels = files_ending(root / "annotations" / "test", ".png", by_folder=True)
    if not labels:
        raise InputError(f"'{root / 'annotations' / 'test'}' holds no label files")
    found = {stem: (images.get(stem), label) for stem, label in labels.items()}
    return DataSet("street_hazards", root, _required(found, root), {0: 255, 14: 1} | dict.fromkeys(range(1, 14), 0))


def _oodis(root: Path) -> DataSet:
    """Images and ``*_instanceIds.png`` below one folder, as OoDIS and UGainS publish the ground truth of Fishyscapes Lost & Found."""
    labels = files_ending(root, "_instanceIds.png")
    if not labels:
        raise InputError(f"'{root}' holds no *_instanceIds.png: OoDIS keeps the labels of its test sets hidden")
    images: dict[str, Path] = {}
    for path in files_below(root):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.endswith(("Ids.png", "_labels.png", "_color.png")):
            continue
        # Label maps of the same names may lie beside the images.
        if any(part.startswith(("labels", "gt")) for part in path.relative_to(root).parts[:-1]):
            continue
        stem = path.stem.removesuffix("_leftImg8bit")
        if stem in images:
            raise InputError(f"'{images[stem]}' and '{path}' have the same name; results are named by it")
        images[stem] = path
    found = {fid: (images.get(fid.removesuffix("_gtCoarse")), label) for fid, label in labels.items()}
    sources = tuple(replace(source, instances=source.label) for source in _required(found, root))
    return DataSet("oodis", root, sources, track="obstacle", instance_rule="instance ids", least_id=1000, cityscapes_ids=True)


LAYOUTS: dict[str, Callable[[Path], DataSet]] = {
    "folder": _folder,
    "road_anomaly_21": _smiyc("road_anomaly_21", "anomaly", "validation"),
    "road_obstacle_21": _smiyc("road_obstacle_21", "obstacle", "validation"),
    "fishyscapes_static": _fishyscapes("fishyscapes_static", "Static", "anomaly"),
    "fishyscapes_laf": _fishyscapes("fishyscapes_laf", "LostAndFound", "anomaly"),
    "road_anomaly": _road_anomaly,
    "lost_and_found": _lost_and_found,
    "street_hazards": _street_hazards,
    "oodis": _oodis,
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
    dataset = LAYOUTS[name](folder)
    if not len(dataset):
        raise InputError(f"'{root}' holds no labelled frame of '{name}'")
    return dataset
