"""Pictures taken outside that show unknown objects where they belong, from COCO's instances and panoptic masks.

Objects pasted into road images also teach what pasting looks like. In these pictures only the object itself tells it from what is
around it. Pictures of rooms are left out: a vehicle sees nothing like them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.image_encodings import read_rgb
from ros2_ood_seg.training.cutouts import (
    AMBIGUOUS_CLASSES,
    KNOWN_CLASSES,
    CocoRegion,
    check_files,
    coco_panoptic_regions,
    coco_regions,
)
from ros2_ood_seg.training.road_images import IGNORE, evenly_spread

UNCOUNTED = -1
"""Instance id of pixels that are neither normal nor anomalous."""

VEHICLES = 3
"""Their in-distribution class. COCO's hold old-timers, fire engines and tractors, which are to stay unusual, so none of them counts."""

STUFF_CLASSES = {
    "road": 0,
    **dict.fromkeys(("pavement-merged", "grass-merged", "dirt-merged"), 1),
    "fence-merged": 4,
    **dict.fromkeys(("tree-merged", "building-other-merged", "house", "mountain-merged", "bridge", "roof"), 5),
    "sky-other-merged": 6,
}
"""Background classes of COCO panoptic, all of them outside, with their in-distribution class."""

OUTDOOR_CLASSES = (
    frozenset(STUFF_CLASSES)
    | (frozenset(KNOWN_CLASSES) - {"person"})
    | frozenset(
        (
            *("airplane", "boat", "bird", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "fire hydrant", "parking meter"),
            *("frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
            "tennis racket",
        )
    )
)
"""A picture that shows one of these COCO classes was taken outside, unless it also shows one of :data:`INDOOR_CLASSES`."""

INDOOR_CLASSES = frozenset(
    (
        *("couch", "bed", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "microwave", "oven", "toaster", "sink", "refrigerator"),
        *("book", "vase", "toothbrush", "hair drier", "dining table", "wine glass", "fork", "knife", "spoon"),
    )
)
"""COCO classes of rooms."""

_MIN_AREA_PX = 40


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and the regions that are known in it.

    Args:
        image: Picture file.
        group: What training and validation are split by.
        regions: Where they overlap, the later one counts.
    """

    image: Path
    group: str
    regions: tuple[CocoRegion, ...]

    def read(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int32]]:
        """The picture and its labels.

        Returns:
            (H, W, 3) uint8 RGB; (H, W) uint8 common class, :data:`IGNORE` where unknown; (H, W) int32 ids of anomalies from 1, 0 where
            normal, :data:`UNCOUNTED` where it may be either: crowds, vehicles and ambiguous classes. Pixels outside all regions are normal.

        Raises:
            InputError: An unreadable file, or a mask that is empty or of another size.
        """
        image = read_rgb(self.image)
        shape_hw = (image.shape[0], image.shape[1])
        semantic = np.full(shape_hw, IGNORE, np.uint8)
        instances = np.zeros(shape_hw, np.int32)
        for index, region in enumerate(self.regions, start=1):
            inside = region.cutout.mask_in(shape_hw) > 0
            if region.is_crowd or region.name in AMBIGUOUS_CLASSES:
                instances[inside] = UNCOUNTED
                continue
            known = region.cutout.semantic if region.is_thing else STUFF_CLASSES.get(region.name, IGNORE)
            semantic[inside] = known
            if known == VEHICLES:
                instances[inside] = UNCOUNTED
            else:
                instances[inside] = index if region.is_thing and known == IGNORE else 0
        return image, semantic, instances


def read_scenes(coco: Path | None, coco_panoptic: Path | None) -> list[Scene]:
    """All pictures of both that were taken outside, with or without unknown objects in them.

    Args:
        coco: COCO instances, see :func:`~ros2_ood_seg.training.cutouts.coco_regions`; None for none.
        coco_panoptic: COCO panoptic; None for none.

    Raises:
        InputError: A malformed layout, an unreadable picture or mask, or no such picture.
    """
    sources = [(coco, coco_regions), (coco_panoptic, coco_panoptic_regions)]
    scenes: list[Scene] = []
    for root, regions in sources:
        if root is not None:
            found = _outside(regions(root))
            masks = (region.cutout.mask for scene in found for region in scene.regions)
            check_files([*(scene.image for scene in found), *masks], root)
            scenes += found
    if not scenes:
        raise InputError(
            f"no pictures taken outside in '{coco}' and '{coco_panoptic}': name COCO instances or panoptic masks that hold some"
        )
    for scene in evenly_spread(scenes):
        scene.read()
    return scenes


def _outside(regions: Iterable[CocoRegion]) -> list[Scene]:
    by_picture: dict[Path, list[CocoRegion]] = {}
    for region in regions:
        by_picture.setdefault(region.cutout.image, []).append(region)
    scenes = []
    for picture, found in by_picture.items():
        names = {region.name for region in found}
        if names & OUTDOOR_CLASSES and not names & INDOOR_CLASSES:
            # Smaller ones stand in front more often than behind.
            drawn = [region for region in found if region.area_px >= _MIN_AREA_PX and region.cutout.has_mask]
            drawn.sort(key=lambda region: -region.area_px)
            scenes.append(Scene(picture, found[0].cutout.group, tuple(drawn)))
    return scenes
