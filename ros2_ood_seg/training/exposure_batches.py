"""Batches for the published outlier-exposure methods: road images with pasted objects, and the pictures that objects come from."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.image_encodings import read_rgb
from ros2_ood_seg.scorers.network import CITYSCAPES_CLASSES
from ros2_ood_seg.scorers.networks.compact import CLASS_NAMES
from ros2_ood_seg.training.cutouts import coco_panoptic_regions, coco_regions
from ros2_ood_seg.training.outlier_exposure import IGNORE, Cutout, OutlierExposure, PasteSettings, RoadImage, RoadSample
from ros2_ood_seg.training.outlier_losses import OUTLIER, VOID
from ros2_ood_seg.training.scorer import ScorerData

CITYSCAPES_TRAIN_IDS = {
    **dict.fromkeys(range(34), IGNORE),
    **{label: k for k, label in enumerate((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33))},
}
"""Cityscapes label ids to the 19 classes of its benchmark."""

_VALIDATION_BATCH = 6


@dataclass(frozen=True)
class ExposureBatch:
    """Samples as tensors.

    Args:
        image: (B, 3, H, W) uint8 road images.
        target: (B, H, W) int64 class, :data:`OUTLIER` or :data:`VOID`.
        picture: (P, 3, H, W) uint8 pictures that objects come from, P = B or 0.
        picture_target: (P, H, W) int64, 0 around the objects, :data:`OUTLIER` or :data:`VOID`.
    """

    image: Tensor
    target: Tensor
    picture: Tensor
    picture_target: Tensor

    def images(self) -> Tensor:
        """The network's input, (B + P, 3, H, W) float32."""
        return torch.cat([self.image, self.picture]).float()

    def to(self, device: torch.device) -> ExposureBatch:
        """The same on another device."""
        return ExposureBatch(self.image.to(device), self.target.to(device), self.picture.to(device), self.picture_target.to(device))


@dataclass(frozen=True)
class Picture:
    """A picture that objects come from.

    Args:
        image: (H, W, 3) uint8 RGB.
        target: (H, W) uint8, see :class:`ExposureBatch`.
    """

    image: NDArray[np.uint8]
    target: NDArray[np.uint8]


Sample = tuple[RoadSample, Picture | None]


def collate(samples: Sequence[Sample]) -> ExposureBatch:
    """Stacks samples. A road image without any label counts as normal wherever nothing was pasted."""
    roads = [road for road, _ in samples]
    pictures = [picture for _, picture in samples if picture is not None]
    targets = []
    for road in roads:
        target = road.semantic if (road.semantic != IGNORE).any() else np.zeros_like(road.semantic)
        targets.append(np.where(road.anomaly == 1, OUTLIER, np.where(road.anomaly == IGNORE, VOID, target)))
    shape = targets[0].shape
    return ExposureBatch(
        torch.from_numpy(np.stack([road.image for road in roads])).permute(0, 3, 1, 2),
        torch.from_numpy(np.stack(targets)).long(),
        torch.from_numpy(np.stack([p.image for p in pictures])).permute(0, 3, 1, 2) if pictures else torch.zeros(0, 3, *shape).byte(),
        torch.from_numpy(np.stack([p.target for p in pictures])).long() if pictures else torch.zeros(0, *shape).long(),
    )


@dataclass(frozen=True)
class ExposureData:
    """Road images by source and objects, both sides of the split, in the classes of a network.

    Args:
        train: Road images and objects to learn from.
        held_out: Those to validate on.
        class_names: Names of the network's classes, empty when unknown.
        known_objects: Whether objects of known classes may be pasted as normal.
    """

    train: tuple[list[list[RoadImage]], list[Cutout]]
    held_out: tuple[list[list[RoadImage]], list[Cutout]]
    class_names: tuple[str, ...]
    known_objects: bool
    data: ScorerData

    @classmethod
    def read(cls, data: ScorerData, num_classes: int, needs_labels: bool) -> ExposureData:
        """Reads both sides.

        Args:
            data: Folders.
            num_classes: Classes of the network: the 7 common ones or the 19 of Cityscapes.
            needs_labels: Whether every road image must have labels in these classes.

        Raises:
            InputError: A folder that is empty or laid out otherwise, or labels that the network's classes are not among.
        """
        names = {len(CLASS_NAMES): CLASS_NAMES, len(CITYSCAPES_CLASSES): CITYSCAPES_CLASSES}.get(num_classes, ())
        if needs_labels and not names:
            raise InputError(f"the network has {num_classes} classes, there are labels for {len(CLASS_NAMES)} or {len(CITYSCAPES_CLASSES)}")
        if needs_labels and data.roads:
            raise InputError(f"this method learns from class labels, '{data.roads[0]}' of --roads has none: leave --roads out")
        cityscapes = names == CITYSCAPES_CLASSES
        if needs_labels and cityscapes and (data.camvid or data.idd_lite):
            raise InputError(
                "the network has the 19 classes of Cityscapes, CamVid and IDD-Lite are not labelled in them: name --cityscapes"
            )
        sides = []
        for held_out in (False, True):
            roads, cutouts = data.read(held_out=held_out)
            if cityscapes and needs_labels:
                roads = [[replace(road, classes=CITYSCAPES_TRAIN_IDS) for road in source] for source in roads]
            sides.append((roads, cutouts))
        return cls(sides[0], sides[1], names, known_objects=needs_labels and not cityscapes, data=data)

    def samples(self, paste: PasteSettings, seed: int, length: int, outlier_share: float, pictures: bool) -> ExposureSamples:
        """The training samples; see :class:`ExposureSamples`."""
        roads, cutouts = self.train
        objects = picture_objects(cutouts, self.data) if pictures else None
        return ExposureSamples(roads, cutouts, self._allowed(paste), seed, length, outlier_share, objects)

    def validation(self, paste: PasteSettings, seed: int, count: int = 24) -> list[ExposureBatch]:
        """Batches of held-out road images, all with held-out objects."""
        roads, cutouts = self.held_out
        dataset = ExposureSamples(roads, cutouts, self._allowed(paste), seed, count, 1.0)
        return [collate([dataset[j] for j in range(k, min(k + _VALIDATION_BATCH, count))]) for k in range(0, count, _VALIDATION_BATCH)]

    def _allowed(self, paste: PasteSettings) -> PasteSettings:
        return paste if self.known_objects else replace(paste, known_per_image=(0, 0))


class ExposureSamples(Dataset[Sample]):
    """Road images, a share of them with pasted objects; sample ``index`` is always the same for the same seed and data.

    Args:
        roads: In-distribution frames by source.
        cutouts: Objects.
        paste: How to crop and paste.
        seed: Seed of everything random.
        length: Number of samples.
        outlier_share: Share of samples with pasted outliers.
        pictures: Each sample has one of these pictures, too, as :func:`picture_objects` gives them; None for none.

    Raises:
        InputError: No road images, or no objects of unknown classes.
    """

    def __init__(
        self,
        roads: Sequence[Sequence[RoadImage]],
        cutouts: Sequence[Cutout],
        paste: PasteSettings,
        seed: int,
        length: int,
        outlier_share: float,
        pictures: Sequence[Sequence[Cutout]] | None = None,
    ) -> None:
        self._pasted = OutlierExposure(roads, cutouts, paste, seed, length)
        self._clean = OutlierExposure(roads, cutouts, replace(paste, objects_per_image=(0, 0)), seed, length)
        self._share, self._seed, self._length = outlier_share, seed, length
        self._shape_hw = paste.crop_hw
        self._pictures = pictures or []
        if pictures is not None and not pictures:
            raise InputError("this method also learns from the pictures that objects come from, and all of them show known classes too")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        # A stream of its own beside those of the pasting.
        rng = np.random.default_rng([self._seed, index, 1])
        road = (self._pasted if rng.random() < self._share else self._clean)[index]
        if not self._pictures:
            return road, None
        return road, read_picture(self._pictures[int(rng.integers(len(self._pictures)))], self._shape_hw)


def read_picture(objects: Sequence[Cutout], shape_hw: tuple[int, int]) -> Picture:
    """A picture in the middle of a sample, with all its objects marked; larger ones are shrunk, around smaller ones it is void.

    Args:
        objects: Of one picture; those whose mask is empty or of another size are left out.
        shape_hw: Of the sample.

    Raises:
        InputError: An unreadable picture, or none of its masks can be used.
    """
    image = read_rgb(objects[0].image)
    mask = np.zeros(image.shape[:2], np.uint8)
    for cutout in objects:
        # What is too small or too crowded to be pasted may be annotated in any way: outside the picture, without a pixel.
        with contextlib.suppress(InputError):
            mask |= cutout.mask_in((image.shape[0], image.shape[1]))
    if not mask.any():
        raise InputError(f"no object of '{objects[0].image}' has a mask that fits it")
    height, width = shape_hw
    shrink = min(1.0, height / image.shape[0], width / image.shape[1])
    size = (min(width, max(1, round(image.shape[1] * shrink))), min(height, max(1, round(image.shape[0] * shrink))))
    image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    mask = np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST), np.uint8)
    y, x = (height - size[1]) // 2, (width - size[0]) // 2
    result = Picture(np.zeros((height, width, 3), np.uint8), np.full((height, width), VOID, np.uint8))
    result.image[y : y + size[1], x : x + size[0]] = image
    result.target[y : y + size[1], x : x + size[0]] = np.where(mask > 0, OUTLIER, 0)
    return result


def picture_objects(cutouts: Sequence[Cutout], data: ScorerData) -> list[list[Cutout]]:
    """The objects of each picture that shows none of a known class, as RPL and PEBAL choose and label them.

    All that is annotated counts, also crowds and what is too small or too ambiguous to be pasted.

    Args:
        cutouts: Their pictures.
        data: Where they come from.
    """
    annotated: dict[str, list[Cutout]] = {}
    if not data.whole_pictures:
        readers = ((data.coco, coco_regions), (data.coco_panoptic, coco_panoptic_regions))
        for region in (region for root, read in readers if root for region in read(root)):
            if region.is_thing and region.cutout.has_mask:
                annotated.setdefault(str(region.cutout.image), []).append(region.cutout)
    by_image: dict[str, list[Cutout]] = {}
    for cutout in cutouts:
        by_image.setdefault(str(cutout.image), []).append(cutout)
    pictures = [annotated.get(image, objects) for image, objects in by_image.items()]
    return [objects for objects in pictures if all(cutout.is_anomaly for cutout in objects)]
