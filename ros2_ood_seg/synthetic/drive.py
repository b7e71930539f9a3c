"""A seeded drive along a procedural road, with exact labels.

The camera moves forward at constant speed; unknown objects lie on the road and grow as they come closer. Image and labels are
drawn together, so the labels hold exactly the visible parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.synthetic import sprites
from ros2_ood_seg.synthetic.render import (
    CLASS_NAMES,
    FAR,
    FAR_M,
    IGNORE,
    LANE_M,
    LIGHTS,
    LIVING,
    ROADSIDE,
    VEHICLE,
    Buffers,
    House,
    Item,
    Maker,
    Renderer,
    View,
)
from ros2_ood_seg.synthetic.sprites import Sprite

__all__ = ["CLASS_NAMES", "IGNORE", "MIN_VISIBLE_FRACTION", "DriveFrame", "SyntheticDrive"]

MIN_VISIBLE_FRACTION = 1.0 / 8000.0
"""Unknown objects that show a smaller part of the frame are labelled :data:`IGNORE`, not anomaly: nobody can tell what they are."""

_START_NS = 1_700_000_000_000_000_000
_SPEED_M_S = 8.0

_Range = tuple[float, float]

Lighting = Literal["auto", "day", "overcast", "dusk"]
Surroundings = Literal["auto", "urban", "rural"]


@dataclass(frozen=True)
class DriveFrame:
    """One camera frame with its labels.

    Args:
        image: (H, W, 3) uint8 RGB.
        semantic: (H, W) uint8, index into :data:`CLASS_NAMES`, 255 where an unknown object is.
        anomaly: (H, W) uint8, 0 normal, 1 unknown object, 255 unknown object too small to tell.
        instances: (H, W) uint16, 0 where ``anomaly`` is not 1, else the number of the object, the same in all frames.
        stamp_ns: Time of the frame, ns.
    """

    image: NDArray[np.uint8]
    semantic: NDArray[np.uint8]
    anomaly: NDArray[np.uint8]
    instances: NDArray[np.uint16]
    stamp_ns: int


class SyntheticDrive:
    """An iterable of frames; the same arguments always give the same bytes.

    Args:
        seed: Chooses road, surroundings, light, and what lies on the road.
        height: Rows of the frames, px.
        width: Columns of the frames, px.
        frames: How many frames.
        fps: Frames per second of recording time.
        lighting: ``day``, ``overcast``, ``dusk``, or ``auto`` for the seed's choice.
        surroundings: ``urban``, ``rural``, or ``auto`` for the seed's choice.

    Raises:
        InputError: A value that is out of range.
    """

    def __init__(
        self,
        seed: int,
        height: int = 540,
        width: int = 960,
        frames: int = 40,
        fps: float = 10.0,
        *,
        lighting: Lighting = "auto",
        surroundings: Surroundings = "auto",
    ) -> None:
        if seed < 0:
            raise InputError(f"seed must be 0 or more, got {seed}")
        if not (32 <= height <= 4096 and 32 <= width <= 4096):
            raise InputError(f"frames must be 32 to 4096 px wide and high, got {width}x{height}")
        if not width / 4 <= height <= width * 2:
            raise InputError(f"frames must be at most 4 times as wide and 2 times as high as the other side, got {width}x{height}")
        if frames < 1 or not 0.1 <= fps <= 1000.0:
            raise InputError(f"a drive needs 1 or more frames at 0.1 to 1000 per second, got {frames} at {fps:g}")
        if lighting not in ("auto", *LIGHTS):
            raise InputError(f"lighting '{lighting}' is not known: use auto, {', '.join(LIGHTS)}")
        if surroundings not in ("auto", "urban", "rural"):
            raise InputError(f"surroundings '{surroundings}' are not known: use auto, urban, rural")
        self.seed, self.height, self.width, self.frames, self.fps = seed, height, width, frames, fps
        rng = np.random.default_rng([seed, 0])
        drawn_light, drawn_place = str(rng.choice(list(LIGHTS))), str(rng.choice(["urban", "rural"]))
        self.lighting = drawn_light if lighting == "auto" else lighting
        self.surroundings = drawn_place if surroundings == "auto" else surroundings
        self._renderer = Renderer(seed, height, width, LIGHTS[self.lighting], self.surroundings == "urban")
        self._course = rng.uniform(0.0, 2.0 * math.pi, 2)
        self._items = self._place_scenery(rng) + self._place_unknown(rng)
        self._houses = self._place_houses(rng) if self.surroundings == "urban" else []

    def __len__(self) -> int:
        return self.frames

    def __iter__(self) -> Iterator[DriveFrame]:
        return (self.frame(k) for k in range(self.frames))

    def frame(self, index: int) -> DriveFrame:
        """Draws one frame.

        Args:
            index: From 0 to ``frames - 1``.

        Raises:
            InputError: The index is outside the drive.
        """
        if not 0 <= index < self.frames:
            raise InputError(f"frame must be 0 to {self.frames - 1}, got {index}")
        time_s = index / self.fps
        view = View(self.height, self.width, _SPEED_M_S * time_s, self._course)
        items = [(item.along_m + item.speed_m_s * time_s - view.along_m, item) for item in self._items]
        buffers = self._renderer.draw(view, items, self._houses)
        image = self._renderer.photograph(buffers.color, np.random.default_rng([self.seed, 1, index]))
        return self._label(image, buffers, _START_NS + round(time_s * 1e9))

    def _label(self, image: NDArray[np.uint8], buffers: Buffers, stamp_ns: int) -> DriveFrame:
        instances = buffers.objects
        anomaly = (instances > 0).astype(np.uint8)
        sizes = np.bincount(instances.ravel())
        for number in np.flatnonzero(sizes[1:]) + 1:
            if sizes[number] < MIN_VISIBLE_FRACTION * instances.size:
                anomaly[instances == number] = IGNORE
                instances[instances == number] = 0
        buffers.semantic[anomaly > 0] = IGNORE
        return DriveFrame(image, buffers.semantic, anomaly, instances, stamp_ns)

    @property
    def _length_m(self) -> float:
        return _SPEED_M_S * self.frames / self.fps + FAR_M

    def _place_unknown(self, rng: np.random.Generator) -> list[Item]:
        kinds = list(sprites.UNKNOWN_OBJECTS)
        order: list[str] = []
        items: list[Item] = []
        along = float(rng.uniform(11.0, 15.0))
        # Beside the wheel tracks of ego and oncoming lane, so that nobody drives through them.
        bands = ((-LANE_M - 0.1, -LANE_M + 0.4), (-0.5, 0.1), (LANE_M - 0.3, LANE_M + 0.3))
        while along < self._length_m:
            if not order:
                order = [str(kind) for kind in rng.permutation(kinds)]
            low, high = bands[int(rng.integers(len(bands)))]
            make = sprites.UNKNOWN_OBJECTS[order.pop()]
            number = len(items) + 1
            items.append(Item(along, float(rng.uniform(low, high)), IGNORE, make, number, number=number))
            along += float(rng.uniform(6.0, 13.0))
        return items

    def _place_scenery(self, rng: np.random.Generator) -> list[Item]:
        urban = self.surroundings == "urban"
        edge = self._renderer.road_half_m
        items: list[Item] = []

        def row(side: float, step_m: _Range, from_edge_m: _Range, label: int, make: Maker, variants: int, speed_m_s: float = 0.0) -> None:
            along = float(rng.uniform(2.0, step_m[1]))
            while along < self._length_m:
                lateral = side * (edge + float(rng.uniform(*from_edge_m)))
                items.append(Item(along, lateral, label, make, int(rng.integers(variants)), speed_m_s))
                along += float(rng.uniform(*step_m))

        for side in (-1.0, 1.0):
            if urban:
                row(side, (9.0, 20.0), (2.2, 2.6), FAR, sprites.tree, 4)
                row(side, (24.0, 40.0), (0.5, 0.5), ROADSIDE, _lamp, 1)
                row(side, (6.2, 15.0), (-1.1, -1.1), VEHICLE, sprites.car if side > 0 else _car_front, 4)
                row(side, (12.0, 30.0), (0.9, 2.0), LIVING, sprites.pedestrian, 5, 1.2 * side)
            else:
                row(side, (5.0, 12.0), (4.0, 13.0), FAR, sprites.tree, 4)
                row(side, (24.0, 40.0), (0.5, 0.5), ROADSIDE, _post, 1)
                row(side, (4.0, 10.0), (2.0, 6.0), FAR, _bush, 4)
            row(side, (45.0, 80.0), (0.7, 0.7), ROADSIDE, _sign, 2)
        ahead = sprites.van if rng.uniform() < 0.3 else sprites.car
        items.append(Item(float(rng.uniform(26.0, 34.0)), LANE_M / 2.0, VEHICLE, ahead, 7, _SPEED_M_S))
        along = float(rng.uniform(50.0, 90.0))
        while along < self._length_m * 2.0:
            oncoming = _van_front if rng.uniform() < 0.3 else _car_front
            items.append(Item(along, -LANE_M / 2.0 - 0.1, VEHICLE, oncoming, int(rng.integers(4)), -_SPEED_M_S))
            along += float(rng.uniform(45.0, 110.0))
        return items

    def _place_houses(self, rng: np.random.Generator) -> list[House]:
        houses = []
        for side in (-1.0, 1.0):
            along = float(rng.uniform(-12.0, 0.0))
            while along < self._length_m:
                length = float(rng.uniform(9.0, 16.0))
                lateral = side * (self._renderer.road_half_m + float(rng.uniform(3.8, 6.0)))
                houses.append(House(along, length, lateral, float(rng.uniform(6.0, 13.0)), int(rng.integers(5))))
                along += length + (float(rng.uniform(2.0, 9.0)) if rng.uniform() < 0.35 else 0.0)
        return houses


def _car_front(rng: np.random.Generator) -> Sprite:
    return sprites.car(rng, front=True)


def _van_front(rng: np.random.Generator) -> Sprite:
    return sprites.van(rng, front=True)


def _bush(rng: np.random.Generator) -> Sprite:
    return sprites.tree(rng, bush=True)


def _lamp(rng: np.random.Generator) -> Sprite:
    return sprites.pole(rng, "lamp")


def _sign(rng: np.random.Generator) -> Sprite:
    return sprites.pole(rng, "sign")


def _post(rng: np.random.Generator) -> Sprite:
    return sprites.pole(rng, "post")
