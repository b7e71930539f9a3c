"""Draws a road scene, image and labels together, from far to near."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.synthetic import sprites
from ros2_ood_seg.synthetic.noise import FloatImage, as_float32, fractal_noise, pyramid, smooth_step
from ros2_ood_seg.synthetic.sprites import Sprite

CLASS_NAMES = ("drivable", "non-drivable", "living things", "vehicles", "road-side objects", "far objects", "sky")
"""In-distribution classes, those of IDD-Lite."""

DRIVABLE, NON_DRIVABLE, LIVING, VEHICLE, ROADSIDE, FAR, SKY = range(7)
IGNORE = 255

LANE_M = 3.4
NEAR_M = 1.6
FAR_M = 160.0

_CAMERA_HEIGHT_M = 1.45
_FOCAL_PER_WIDTH = 0.95
_TILE_M = 12.0

Maker = Callable[[np.random.Generator], Sprite]


@dataclass(frozen=True)
class Light:
    """Time of day and weather.

    Args:
        zenith: Colour of the sky above.
        horizon: Colour of the sky and of the haze at the horizon.
        cloud: Colour of the clouds.
        cover: Cloudiness, 0 to 1.
        tint: What the light multiplies colours with.
        haze_m: Distance at which haze takes over.
    """

    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    cloud: tuple[float, float, float]
    cover: float
    tint: tuple[float, float, float]
    haze_m: float


LIGHTS = {
    "day": Light((0.36, 0.53, 0.78), (0.76, 0.83, 0.88), (0.93, 0.94, 0.95), 0.45, (1.06, 1.03, 0.97), 260.0),
    "overcast": Light((0.68, 0.7, 0.73), (0.8, 0.81, 0.82), (0.86, 0.86, 0.87), 0.9, (0.93, 0.94, 0.96), 200.0),
    "dusk": Light((0.3, 0.36, 0.5), (0.75, 0.6, 0.48), (0.6, 0.5, 0.48), 0.5, (0.74, 0.66, 0.62), 220.0),
}


@dataclass(frozen=True)
class Item:
    """Something that stands on the ground and always faces the camera.

    Args:
        along_m: Where it stands along the road at the start.
        lateral_m: Where it stands across the road, right of the centre line is positive.
        label: Its class.
        make: Draws its sprite from a generator.
        variant: Seed of the sprite; items with the same maker and variant share one.
        speed_m_s: How fast it moves along the road.
        number: Number of the unknown object, 0 for known things.
    """

    along_m: float
    lateral_m: float
    label: int
    make: Maker
    variant: int
    speed_m_s: float = 0.0
    number: int = 0


@dataclass(frozen=True)
class House:
    """A wall along the road and the front that looks at the camera.

    Args:
        along_m: Near end.
        length_m: Length along the road.
        lateral_m: Where the wall stands.
        height_m: Height of the wall.
        variant: Which facade it has.
    """

    along_m: float
    length_m: float
    lateral_m: float
    height_m: float
    variant: int


@dataclass
class Buffers:
    """What a frame is drawn into, image and labels together."""

    color: FloatImage
    semantic: NDArray[np.uint8]
    objects: NDArray[np.uint16]


class View:
    """Where the camera is in one frame and where it looks.

    Args:
        height: Rows of the frame, px.
        width: Columns of the frame, px.
        along_m: Distance driven.
        phase: Two angles that choose the course of the road, radians.
    """

    def __init__(self, height: int, width: int, along_m: float, phase: NDArray[np.float64]) -> None:
        self.along_m = along_m
        self.lateral_m = LANE_M / 2.0 + 0.15 * math.sin(along_m / 17.0 + phase[0])
        self.curvature = 0.0012 * math.sin(along_m / 90.0 + phase[1])
        self.heading = 0.0012 * 90.0 * -math.cos(along_m / 90.0 + phase[1])
        self.focal_px = _FOCAL_PER_WIDTH * width
        self.center_px = width / 2.0
        pitch = 0.0025 * math.sin(along_m / 2.3) + 0.0015 * math.sin(along_m / 0.9 + phase[0])
        self.horizon_px = height * 0.43 + pitch * self.focal_px

    def bend(self, distance_m: FloatImage) -> FloatImage:
        """How far the road has swung to the right at a distance, metres."""
        return np.asarray(0.5 * self.curvature * np.minimum(distance_m, FAR_M) ** 2, dtype=np.float32)

    def project(self, lateral_m: float, distance_m: float) -> tuple[float, float]:
        """Pixel of a point on the ground."""
        right_m = lateral_m - self.lateral_m + 0.5 * self.curvature * min(distance_m, FAR_M) ** 2
        scale = self.focal_px / distance_m
        return self.center_px + right_m * scale, self.horizon_px + _CAMERA_HEIGHT_M * scale


class Renderer:
    """Draws the frames of one drive.

    Args:
        seed: Chooses textures and sprites.
        height: Rows, px.
        width: Columns, px.
        light: Time of day and weather.
        urban: Pavements and kerbs, or gravel and grass.
    """

    def __init__(self, seed: int, height: int, width: int, light: Light, urban: bool) -> None:
        self.seed, self.height, self.width, self.urban = seed, height, width, urban
        self._light = light
        self._sprites: dict[tuple[str, int], Sprite] = {}
        self._facades: dict[int, FloatImage] = {}
        self._tile_px = 1024 if width > 640 else 512

    @property
    def road_half_m(self) -> float:
        """Half the width of the road, with its shoulders."""
        return LANE_M + (2.4 if self.urban else 0.7)

    def draw(self, view: View, items: Sequence[tuple[float, Item]], houses: Sequence[House]) -> Buffers:
        """Draws one frame.

        Args:
            view: Where the camera is.
            items: Distance from the camera along the road in metres, and what stands there.
            houses: All houses.

        Returns:
            Image before the camera's own traces, and labels.
        """
        shape = (self.height, self.width)
        buffers = Buffers(np.zeros((*shape, 3), np.float32), np.full(shape, SKY, np.uint8), np.zeros(shape, np.uint16))
        self._draw_sky(buffers, view)
        self._draw_ground(buffers, view)
        self._draw_things(buffers, view, items, houses)
        return buffers

    @cached_property
    def _tiles(self) -> dict[str, list[FloatImage]]:
        """Ground textures with their mip levels: multiplicative detail of mean 0."""
        rng = np.random.default_rng([self.seed, 2])
        side = self._tile_px
        shape = (side, side)
        coarse, fine = fractal_noise(rng, shape, 1.3), fractal_noise(rng, shape, 0.15)
        asphalt = 0.035 * coarse + 0.05 * fine
        cracks = np.abs(fractal_noise(rng, shape, 1.6))
        asphalt -= 0.1 * smooth_step(0.012 - cracks, 0.0, 0.012) * smooth_step(coarse, 0.3, 1.0)
        grass = 0.16 * fractal_noise(rng, shape, 0.7) + 0.12 * fractal_noise(rng, shape, 1.4)
        paving = 0.03 * fractal_noise(rng, shape, 1.2) + 0.03 * fractal_noise(rng, shape, 0.2)
        slab = side // 24
        paving[::slab] -= 0.12
        paving[:, ::slab] -= 0.12
        return {name: pyramid(tile.astype(np.float32), 7) for name, tile in (("asphalt", asphalt), ("grass", grass), ("paving", paving))}

    @cached_property
    def _clouds(self) -> FloatImage:
        return fractal_noise(np.random.default_rng([self.seed, 3]), (512, 1024), 1.7)

    @cached_property
    def _skyline(self) -> FloatImage:
        """(2, 4096) height in degrees of the far and the near line of trees and hills, around the whole horizon."""
        rng = np.random.default_rng([self.seed, 4])
        hills = np.stack([fractal_noise(rng, (2, 4096), 1.5)[0], fractal_noise(rng, (2, 4096), 1.0)[0]])
        return np.asarray(np.clip(as_float32([[1.4], [1.0]]) + as_float32([[0.7], [0.35]]) * hills, 0.15, 4.0), dtype=np.float32)

    def _draw_sky(self, buffers: Buffers, view: View) -> None:
        light = self._light
        rows, columns = np.arange(self.height, dtype=np.float32), np.arange(self.width, dtype=np.float32)
        elevation = (view.horizon_px - rows) / view.focal_px
        blend = np.clip(elevation / 0.42, 0.0, 1.0)[:, None, None] ** 0.6
        sky = as_float32(light.horizon) * (1.0 - blend) + as_float32(light.zenith) * blend
        buffers.color[:] = sky
        above = max(1, min(self.height, math.ceil(view.horizon_px)))
        # Clouds lie on a plane overhead: small near the horizon, large above.
        height = np.maximum(elevation[:above], 0.02)[:, None]
        azimuth = (columns - view.center_px)[None] / view.focal_px + view.heading
        map_x = np.asarray(azimuth / height * 40.0 + 512.0, dtype=np.float32)
        map_y = np.broadcast_to(60.0 / height, map_x.shape).astype(np.float32)
        noise = cv2.remap(self._clouds, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        weight = smooth_step(noise + 2.2 * light.cover - 1.1, -0.2, 1.4) * np.clip(elevation[:above] / 0.16, 0.0, 1.0)[:, None]
        buffers.color[:above] += (as_float32(light.cloud) - buffers.color[:above]) * (0.85 * weight)[..., None]
        self._draw_skyline(buffers, view, elevation, azimuth[0])

    def _draw_skyline(self, buffers: Buffers, view: View, elevation: FloatImage, azimuth: FloatImage) -> None:
        colors = (as_float32([0.3, 0.36, 0.36]), as_float32([0.15, 0.2, 0.11]))
        band = slice(max(0, int(view.horizon_px - 0.08 * view.focal_px)), min(self.height, int(view.horizon_px) + 2))
        for line, color, haze, roughness in zip(self._skyline, colors, (0.62, 0.35), (0.04, 0.22), strict=True):
            samples = (azimuth / (2.0 * math.pi) * 4096.0) % 4096.0
            tops = np.radians(np.interp(samples, np.arange(4097), np.append(line, line[0]))).astype(np.float32)
            cover = np.clip((tops[None] - elevation[band, None]) * view.focal_px + 0.5, 0.0, 1.0)
            map_x = np.broadcast_to((azimuth * 2600.0).astype(np.float32), cover.shape)
            map_y = np.broadcast_to((elevation[band, None] * 2600.0).astype(np.float32), cover.shape)
            leaves = cv2.remap(self._tiles["grass"][2], map_x.copy(), map_y.copy(), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
            shade = (color * (1.0 + roughness * 4.0 * leaves[..., None])) * (1.0 - haze) + as_float32(self._light.horizon) * haze
            buffers.color[band] += (shade - buffers.color[band]) * cover[..., None]
            buffers.semantic[band][cover >= 0.5] = FAR

    def _draw_ground(self, buffers: Buffers, view: View) -> None:
        first = max(0, math.floor(view.horizon_px) + 1)
        if first >= self.height:
            return
        rows = np.arange(first, self.height, dtype=np.float32)[:, None]
        columns = np.arange(self.width, dtype=np.float32)[None]
        depth = np.minimum(view.focal_px * _CAMERA_HEIGHT_M / np.maximum(rows - view.horizon_px, 0.25), 2000.0)
        lateral = (columns - view.center_px) * depth / view.focal_px + view.lateral_m - view.bend(depth)
        along = depth + view.along_m
        footprint = depth / view.focal_px
        # A pixel is much longer than wide on the ground; the geometric mean keeps detail without flicker.
        detail_m = footprint * np.sqrt(np.maximum(depth / _CAMERA_HEIGHT_M, 1.0))
        color, semantic = self._ground_materials(lateral, along, footprint, detail_m)
        haze = (1.0 - np.exp(-np.minimum(depth, FAR_M) / self._light.haze_m))[..., None]
        color *= as_float32(self._light.tint)
        color += (as_float32(self._light.horizon) * 0.95 - color) * haze
        buffers.color[first:] = color
        buffers.semantic[first:] = semantic

    def _ground_materials(
        self, lateral: FloatImage, along: FloatImage, footprint: FloatImage, detail_m: FloatImage
    ) -> tuple[FloatImage, NDArray[np.uint8]]:
        edge = self.road_half_m
        distance = np.abs(lateral)
        road = self._cover(edge - distance, footprint)
        texture = {name: self._sample(levels, lateral, along, detail_m) for name, levels in self._tiles.items()}
        # Tyres polish two tracks per lane.
        tracks = np.cos((distance - LANE_M / 2.0) * (2.0 * math.pi / 1.7)) * 0.018
        asphalt = as_float32([0.33, 0.33, 0.335]) * (1.0 + texture["asphalt"] - tracks)[..., None]
        grass = as_float32([0.25, 0.3, 0.14]) * (1.0 + texture["grass"])[..., None]
        verge = as_float32([0.4, 0.37, 0.31]) * (1.0 + 0.7 * texture["grass"])[..., None]
        if self.urban:
            paving = as_float32([0.46, 0.45, 0.43]) * (1.0 + texture["paving"])[..., None]
            kerb = self._cover(edge + 0.18 - distance, footprint)[..., None]
            walk = self._cover(edge + 3.2 - distance, footprint)[..., None]
            color = grass + (paving - grass) * walk
            color += (as_float32([0.55, 0.55, 0.53]) * (1.0 + texture["paving"])[..., None] - color) * kerb
        else:
            gravel = np.exp(-np.maximum(distance - edge, 0.0) / 0.5)[..., None]
            color = grass + (verge - grass) * gravel
        color += (asphalt - color) * road[..., None]
        dashes = self._cover(1.5 - np.abs((along % 9.0) - 4.5), footprint * 6.0)
        line = self._cover(0.07 - distance, footprint) * dashes
        border = LANE_M + (0.15 if not self.urban else 0.1)
        line = np.maximum(line, self._cover(0.06 - np.abs(distance - border), footprint))
        worn = np.clip(0.62 + 2.5 * texture["asphalt"], 0.2, 0.85)
        color += (as_float32([0.72, 0.72, 0.69]) - color) * (line * worn)[..., None]
        semantic = np.where(road >= 0.5, np.uint8(DRIVABLE), np.uint8(NON_DRIVABLE))
        return color, semantic

    @staticmethod
    def _cover(inside_m: FloatImage, footprint: FloatImage) -> FloatImage:
        """How much of a pixel lies inside an edge, from the signed distance to it."""
        return np.asarray(np.clip(inside_m / np.maximum(footprint, 1e-4) + 0.5, 0.0, 1.0), dtype=np.float32)

    def _sample(self, levels: list[FloatImage], lateral: FloatImage, along: FloatImage, detail_m: FloatImage) -> FloatImage:
        """Looks a texture up in the world, each row between the two mip levels that fit its distance."""
        per_metre = self._tile_px / _TILE_M
        exact = np.clip(np.log2(np.maximum(detail_m * per_metre, 1.0)), 0.0, len(levels) - 1.001)[:, 0]
        result = np.zeros(lateral.shape, np.float32)
        for k, tile in enumerate(levels):
            weight = np.clip(1.0 - np.abs(exact - k), 0.0, 1.0).astype(np.float32)
            rows = np.flatnonzero(weight > 0.0)
            if not rows.size:
                continue
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            scale = per_metre / 2**k
            map_x = ((lateral[part] % _TILE_M) * scale).astype(np.float32)
            map_y = np.broadcast_to((along[part] % _TILE_M) * scale, map_x.shape).astype(np.float32)
            found = cv2.remap(tile, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
            result[part] += found * weight[part, None]
        return result

    def _draw_things(self, buffers: Buffers, view: View, items: Sequence[tuple[float, Item]], houses: Sequence[House]) -> None:
        queue: list[tuple[float, Item | House]] = [entry for entry in items if NEAR_M < entry[0] < FAR_M]
        for house in houses:
            near, far = house.along_m - view.along_m, house.along_m + house.length_m - view.along_m
            if far > NEAR_M and near < FAR_M:
                # A wall is sorted by its far end, or trees in front of it would vanish behind it.
                queue.append((far, house))
        for distance, thing in sorted(queue, key=lambda entry: -entry[0]):
            if isinstance(thing, House):
                self._draw_house(buffers, view, thing)
            else:
                self._draw_item(buffers, view, thing, distance)

    def _sprite(self, item: Item) -> Sprite:
        key = (item.make.__name__, item.variant)
        if key not in self._sprites:
            name = [ord(c) for c in key[0]]
            self._sprites[key] = item.make(np.random.default_rng([self.seed, 5, item.variant, *name]))
        return self._sprites[key]

    def _draw_item(self, buffers: Buffers, view: View, item: Item, distance: float) -> None:
        sprite = self._sprite(item)
        scale = view.focal_px / distance
        x, y = view.project(item.lateral_m, distance)
        width, height = sprite.width_m * scale, sprite.height_m * scale
        left, top = x - width / 2.0, y - height
        if left >= self.width or left + width <= 0 or top >= self.height or y <= 0 or width < 0.5 or height < 0.5:
            return
        self._draw_shadow(buffers, x, y, width, sprite.shadow)
        level = sprite.levels[0]
        for smaller in sprite.levels[1:]:
            if level.shape[1] < 2.0 * width or level.shape[0] < 2.0 * height:
                break
            level = smaller
        x0, x1 = max(0, math.floor(left)), min(self.width, math.ceil(left + width))
        y0, y1 = max(0, math.floor(top)), min(self.height, math.ceil(y))
        if x1 <= x0 or y1 <= y0:
            return
        # From a pixel of the window to one of the sprite level, half-pixel centres on both sides.
        step_x, step_y = level.shape[1] / width, level.shape[0] / height
        matrix = as_float32(
            [
                [step_x, 0.0, (x0 - left + 0.5) * step_x - 0.5],
                [0.0, step_y, (y0 - top + 0.5) * step_y - 0.5],
            ]
        )
        rgba = cv2.warpAffine(
            level, matrix, (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_CONSTANT
        )
        alpha = rgba[..., 3:]
        haze = 1.0 - math.exp(-distance / self._light.haze_m)
        rgb = rgba[..., :3] * (as_float32(self._light.tint) * (1.0 - haze)) + as_float32(self._light.horizon) * (0.95 * haze) * alpha
        window = (slice(y0, y1), slice(x0, x1))
        buffers.color[window] *= 1.0 - alpha
        buffers.color[window] += rgb
        solid = alpha[..., 0] >= 0.5
        buffers.semantic[window][solid] = item.label
        buffers.objects[window][solid] = item.number

    def _draw_shadow(self, buffers: Buffers, x: float, y: float, width: float, darkness: float) -> None:
        """Darkens the ground below a thing, softly; the light comes from the upper left."""
        radius_x, radius_y = width * 0.6, max(width * 0.12, 0.6)
        center_x, center_y = x + width * 0.08, y - radius_y * 0.15
        x0, x1 = max(0, math.floor(center_x - 1.6 * radius_x)), min(self.width, math.ceil(center_x + 1.6 * radius_x))
        y0, y1 = max(0, math.floor(center_y - 1.6 * radius_y)), min(self.height, math.ceil(center_y + 1.6 * radius_y))
        if x1 <= x0 or y1 <= y0:
            return
        across = ((np.arange(x0, x1, dtype=np.float32) - center_x) / radius_x)[None]
        down = ((np.arange(y0, y1, dtype=np.float32) - center_y) / radius_y)[:, None]
        strength = np.clip(1.25 - np.sqrt(across**2 + down**2), 0.0, 1.0) ** 1.5 * darkness
        on_ground = buffers.semantic[y0:y1, x0:x1] <= NON_DRIVABLE
        buffers.color[y0:y1, x0:x1] *= 1.0 - (np.minimum(strength, darkness) * on_ground)[..., None]

    def _draw_house(self, buffers: Buffers, view: View, house: House) -> None:
        texture = self._facades.get(house.variant)
        if texture is None:
            texture = sprites.facade(np.random.default_rng([self.seed, 6, house.variant]), 12.0, 9.0)
            self._facades[house.variant] = texture
        near, far = max(house.along_m - view.along_m, NEAR_M), min(house.along_m + house.length_m - view.along_m, FAR_M)
        start = (near - (house.along_m - view.along_m)) / house.length_m
        end = (far - (house.along_m - view.along_m)) / house.length_m
        depth_m = math.copysign(7.0, house.lateral_m)
        # The gable that faces the camera, then the wall along the road over it.
        if house.along_m - view.along_m > NEAR_M:
            gable = [(house.lateral_m, near), (house.lateral_m + depth_m, near)]
            self._draw_wall(buffers, view, texture, house.height_m, gable, (0.0, 0.55), 0.82)
        wall = [(house.lateral_m, near), (house.lateral_m, far)]
        self._draw_wall(buffers, view, texture, house.height_m, wall, (start, end), 0.66 if house.lateral_m < 0 else 0.92)

    def _draw_wall(
        self,
        buffers: Buffers,
        view: View,
        texture: FloatImage,
        height_m: float,
        ends: list[tuple[float, float]],
        span: tuple[float, float],
        shade: float,
    ) -> None:
        """Draws an upright rectangle between two points of the ground, given as (lateral, distance) in metres."""
        corners = []
        for lateral, distance in ends:
            x, y = view.project(lateral, distance)
            corners += [(x, y), (x, y - height_m * view.focal_px / distance)]
        (x_a, base_a), (_, top_a), (x_b, base_b), (_, top_b) = corners
        xs, ys = [c[0] for c in corners], [c[1] for c in corners]
        x0, x1 = max(0, math.floor(min(xs))), min(self.width, math.ceil(max(xs)))
        y0, y1 = max(0, math.floor(min(ys))), min(self.height, math.ceil(max(ys)))
        if x1 - x0 < 1 or y1 - y0 < 1:
            return
        visible_px = max(abs(x_b - x_a), 1.0)
        while texture.shape[1] * (span[1] - span[0]) > 2.5 * visible_px and min(texture.shape[:2]) > 8:
            texture = cv2.resize(texture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        rows, columns = texture.shape[:2]
        source = as_float32([(span[0] * columns, rows), (span[0] * columns, 0), (span[1] * columns, rows), (span[1] * columns, 0)])
        target = as_float32([(x_a - x0, base_a - y0), (x_a - x0, top_a - y0), (x_b - x0, base_b - y0), (x_b - x0, top_b - y0)])
        matrix = cv2.getPerspectiveTransform(source, target)
        size = (x1 - x0, y1 - y0)
        picture = cv2.warpPerspective(texture, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        cover = np.zeros((size[1], size[0]), np.uint8)
        cv2.fillConvexPoly(cover, np.round(target[[0, 1, 3, 2]] * 16.0).astype(np.int32), 255, cv2.LINE_AA, shift=4)
        haze = 1.0 - math.exp(-min(d for _, d in ends) / self._light.haze_m)
        picture = picture * (as_float32(self._light.tint) * (shade * (1.0 - haze))) + as_float32(self._light.horizon) * haze
        weight = (cover / np.float32(255))[..., None]
        window = (slice(y0, y1), slice(x0, x1))
        buffers.color[window] += (picture - buffers.color[window]) * weight
        solid = cover >= 128
        buffers.semantic[window][solid] = FAR
        buffers.objects[window][solid] = 0

    def photograph(self, color: FloatImage, rng: np.random.Generator) -> NDArray[np.uint8]:
        """What a camera makes of the scene: soft lens, vignette, tone curve, noise and JPEG."""
        color = cv2.GaussianBlur(color, (0, 0), 0.55 * max(1.0, self.width / 1100.0))
        across = (np.arange(self.width, dtype=np.float32) / self.width - 0.5)[None]
        down = (np.arange(self.height, dtype=np.float32) / self.height - 0.5)[:, None]
        color *= (1.03 - 0.32 * (across**2 + down**2))[..., None]
        color = np.clip(color, 0.0, 1.0)
        color = color + 0.18 * color * (1.0 - color) * (2.0 * color - 0.7)
        coarse = rng.standard_normal((self.height // 2 + 1, self.width // 2 + 1, 3), dtype=np.float32)
        noise = cv2.resize(coarse, (self.width, self.height), interpolation=cv2.INTER_LINEAR)
        fine = rng.standard_normal((self.height, self.width, 1), dtype=np.float32)
        color += (0.005 * noise + 0.008 * fine) * np.sqrt(np.clip(color, 0.05, 1.0))
        bgr = np.clip(color[..., ::-1] * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8)
        jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        return np.asarray(cv2.cvtColor(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), dtype=np.uint8)
