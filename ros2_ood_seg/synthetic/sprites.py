"""Procedural pictures of things along a road: known ones (vehicles, people, trees, buildings) and unknown ones.

A sprite is drawn upright as seen from the road, once per drive, and scaled by perspective in every frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ros2_ood_seg.synthetic.noise import FloatImage, as_float32, fractal_noise, smooth_step

Rgb = tuple[float, float, float]
Point = tuple[float, float]

_SUPERSAMPLING = 2
_MAX_SIDE_PX = 192


@dataclass(frozen=True)
class Sprite:
    """A picture with transparency and a size in the world.

    Args:
        levels: Premultiplied RGBA float32 in [0, 1], each level half as large as the one before.
        width_m: Width in metres.
        height_m: Height in metres.
        shadow: Darkness of the contact shadow, 0 to 1.
    """

    levels: tuple[FloatImage, ...]
    width_m: float
    height_m: float
    shadow: float = 0.55


class Canvas:
    """Paints a sprite in coordinates from 0 to 1 (x right, y down), with anti-aliased edges.

    Args:
        width_m: Width in metres.
        height_m: Height in metres.
        rng: Source of randomness.
    """

    def __init__(self, width_m: float, height_m: float, rng: np.random.Generator) -> None:
        per_metre = min(200.0, _MAX_SIDE_PX / max(width_m, height_m)) * _SUPERSAMPLING
        self.size_m = (width_m, height_m)
        self.width = max(16, round(width_m * per_metre))
        self.height = max(16, round(height_m * per_metre))
        self.rng = rng
        self.color: FloatImage = np.zeros((self.height, self.width, 3), np.float32)
        self.alpha: FloatImage = np.zeros((self.height, self.width), np.float32)

    def polygon_mask(self, points: Sequence[Point]) -> FloatImage:
        """(H, W) coverage of a polygon."""
        mask = np.zeros((self.height, self.width), np.uint8)
        scaled = np.round(np.array(points) * (self.width - 1, self.height - 1)).astype(np.int32)
        cv2.fillPoly(mask, [scaled], 255, cv2.LINE_AA)
        return (mask / np.float32(255)).astype(np.float32)

    def ellipse_mask(self, center: Point, radii: Point, angle_deg: float = 0.0) -> FloatImage:
        """(H, W) coverage of an ellipse; radii as fractions of width and height."""
        mask = np.zeros((self.height, self.width), np.uint8)
        middle = (round(center[0] * self.width), round(center[1] * self.height))
        axes = (max(1, round(radii[0] * self.width)), max(1, round(radii[1] * self.height)))
        cv2.ellipse(mask, middle, axes, angle_deg, 0, 360, 255, cv2.FILLED, cv2.LINE_AA)
        return (mask / np.float32(255)).astype(np.float32)

    def box_mask(self, x_min: float, y_min: float, x_max: float, y_max: float, corner: float = 0.0) -> FloatImage:
        """(H, W) coverage of a rectangle whose corners are rounded by ``corner`` (fraction of its shorter side)."""
        left, top, right, bottom = x_min * self.width, y_min * self.height, x_max * self.width, y_max * self.height
        radius = corner * min(right - left, bottom - top)
        x = np.abs(np.arange(self.width) + 0.5 - (left + right) / 2.0) - (right - left) / 2.0 + radius
        y = np.abs(np.arange(self.height) + 0.5 - (top + bottom) / 2.0) - (bottom - top) / 2.0 + radius
        # The signed distance to a rounded rectangle, negative inside.
        corner_distance = np.hypot(np.maximum(x, 0.0)[None], np.maximum(y, 0.0)[:, None])
        distance = corner_distance + np.minimum(np.maximum(x[None], y[:, None]), 0.0) - radius
        return as_float32(np.clip(0.5 - distance, 0.0, 1.0))

    def paint(self, mask: FloatImage, color: Rgb | FloatImage, opacity: float = 1.0) -> None:
        """Covers ``mask`` with a colour or an (H, W, 3) picture."""
        weight = (mask * opacity)[..., None]
        self.color += (np.asarray(color, np.float32) - self.color) * weight
        self.alpha = np.maximum(self.alpha, mask * opacity)

    def tint(self, mask: FloatImage, color: Rgb | FloatImage, opacity: float = 1.0) -> None:
        """As :meth:`paint`, but only where something is painted already."""
        weight = (mask * opacity * self.alpha)[..., None]
        self.color += (np.asarray(color, np.float32) - self.color) * weight

    def gradient(self, color: Rgb, top: float = 1.15, bottom: float = 0.7) -> FloatImage:
        """(H, W, 3) picture of a colour that gets darker downwards."""
        ramp = np.linspace(top, bottom, self.height, dtype=np.float32)[:, None, None]
        return np.broadcast_to(np.asarray(color, np.float32) * ramp, self.color.shape).astype(np.float32)

    def grain(self, amount: float, exponent: float = 0.8) -> None:
        """Multiplies the colours by fractal noise."""
        self.color *= 1.0 + amount * fractal_noise(self.rng, (self.height, self.width), exponent)[..., None]

    def round_off(self, strength: float, radius: float, light_x: float = -0.5) -> None:
        """Shades the silhouette as if it were a body lit from above and from one side.

        Args:
            strength: How much darker the far side gets.
            radius: Width of the rounding, as a fraction of the height.
            light_x: Direction of the light, -1 from the left, 1 from the right.
        """
        height_map = cv2.GaussianBlur(self.alpha, (0, 0), max(1.0, radius * self.height))
        slope_y, slope_x = np.gradient(height_map)
        slope_x *= radius * self.height
        slope_y *= radius * self.height
        shade = 1.0 + strength * (slope_y * 1.6 - slope_x * 1.6 * light_x)
        self.color *= np.clip(shade, 0.35, 1.5)[..., None]

    def finish(self, shadow: float = 0.55) -> Sprite:
        """Brings the picture to its final size and makes the levels."""
        rgba = np.dstack([np.clip(self.color, 0.0, 1.0) * self.alpha[..., None], self.alpha]).astype(np.float32)
        size = (max(8, self.width // _SUPERSAMPLING), max(8, self.height // _SUPERSAMPLING))
        level = cv2.resize(rgba, size, interpolation=cv2.INTER_AREA)
        levels = [level]
        while min(level.shape[:2]) > 4:
            level = cv2.resize(level, (max(1, level.shape[1] // 2), max(1, level.shape[0] // 2)), interpolation=cv2.INTER_AREA)
            levels.append(level)
        return Sprite(tuple(levels), *self.size_m, shadow)


def _soft_color(rng: np.random.Generator, low: float = 0.15, high: float = 0.6, saturation: float = 0.35) -> Rgb:
    value = rng.uniform(low, high)
    hue = rng.uniform(0.0, 1.0)
    rgb = cv2.cvtColor(as_float32([[[hue * 360.0, rng.uniform(0.0, saturation), value]]]), cv2.COLOR_HSV2RGB)[0, 0]
    return float(rgb[0]), float(rgb[1]), float(rgb[2])


def _scaled(color: Rgb, factor: float) -> Rgb:
    return color[0] * factor, color[1] * factor, color[2] * factor


def car(rng: np.random.Generator, front: bool = False) -> Sprite:
    """A passenger car from behind or from the front."""
    paints: list[Rgb] = [
        (0.09, 0.09, 0.1),
        (0.35, 0.36, 0.38),
        (0.55, 0.56, 0.57),
        (0.62, 0.62, 0.6),
        (0.35, 0.06, 0.06),
        (0.08, 0.13, 0.25),
    ]
    body = paints[int(rng.integers(len(paints)))]
    tall = float(rng.uniform(0.0, 0.06))
    canvas = Canvas(1.85, 1.48 + 3.0 * tall, rng)
    for x in (0.07, 0.75):
        canvas.paint(canvas.box_mask(x, 0.78, x + 0.18, 1.0, 0.35), (0.03, 0.03, 0.03))
    canvas.paint(canvas.box_mask(0.1, 0.72, 0.9, 0.93), (0.02, 0.02, 0.02))
    cabin = [(0.13, 0.44), (0.22, 0.09), (0.32, 0.02), (0.68, 0.02), (0.78, 0.09), (0.87, 0.44)]
    canvas.paint(canvas.polygon_mask(cabin), canvas.gradient(body, 1.3, 0.8))
    canvas.paint(canvas.box_mask(0.02, 0.36, 0.98, 0.84, 0.45), canvas.gradient(body, 1.35, 0.55))
    glass = [(0.2, 0.38), (0.27, 0.12), (0.35, 0.08), (0.65, 0.08), (0.73, 0.12), (0.8, 0.38)]
    canvas.paint(canvas.polygon_mask(glass), canvas.gradient((0.16, 0.19, 0.22), 1.7, 0.2))
    canvas.tint(canvas.box_mask(0.02, 0.7, 0.98, 0.84, 0.3), (0.06, 0.06, 0.065), 0.75)
    light: Rgb = (0.8, 0.8, 0.75) if front else (0.42, 0.03, 0.03)
    for x in (0.05, 0.79):
        canvas.tint(canvas.box_mask(x, 0.47, x + 0.16, 0.57, 0.5), light, 0.95)
    if front:
        canvas.tint(canvas.box_mask(0.26, 0.5, 0.74, 0.62, 0.4), (0.04, 0.04, 0.045), 0.9)
    canvas.tint(canvas.box_mask(0.39, 0.62, 0.61, 0.69), (0.7, 0.7, 0.66), 0.9)
    canvas.tint(canvas.box_mask(0.02, 0.435, 0.98, 0.445), (0.02, 0.02, 0.02), 0.4)
    canvas.round_off(0.35, 0.05)
    canvas.grain(0.02)
    return canvas.finish(0.75)


def van(rng: np.random.Generator, front: bool = False) -> Sprite:
    """A delivery van from behind or from the front."""
    body = _soft_color(rng, 0.45, 0.7, 0.12)
    canvas = Canvas(2.05, 2.4, rng)
    for x in (0.08, 0.76):
        canvas.paint(canvas.box_mask(x, 0.84, x + 0.16, 1.0, 0.35), (0.03, 0.03, 0.03))
    canvas.paint(canvas.box_mask(0.1, 0.8, 0.9, 0.95), (0.02, 0.02, 0.02))
    canvas.paint(canvas.box_mask(0.03, 0.02, 0.97, 0.9, 0.12), canvas.gradient(body, 1.15, 0.7))
    windows = [(0.1, 0.12, 0.9, 0.42)] if front else [(0.12, 0.14, 0.47, 0.38), (0.53, 0.14, 0.88, 0.38)]
    for window in windows:
        canvas.tint(canvas.box_mask(*window, 0.2), canvas.gradient((0.14, 0.17, 0.2), 1.5, 0.3), 0.95)
    if not front:
        canvas.tint(canvas.box_mask(0.495, 0.04, 0.505, 0.82), (0.05, 0.05, 0.05), 0.6)
    light: Rgb = (0.8, 0.8, 0.75) if front else (0.42, 0.04, 0.03)
    for x in (0.05, 0.87):
        canvas.tint(canvas.box_mask(x, 0.5, x + 0.08, 0.68, 0.4), light, 0.9)
    canvas.tint(canvas.box_mask(0.03, 0.8, 0.97, 0.9), (0.07, 0.07, 0.075), 0.8)
    canvas.tint(canvas.box_mask(0.4, 0.7, 0.6, 0.76), (0.7, 0.7, 0.66), 0.9)
    canvas.round_off(0.3, 0.03)
    canvas.grain(0.02)
    return canvas.finish(0.75)


def pedestrian(rng: np.random.Generator) -> Sprite:
    """A person standing or walking, from behind."""
    canvas = Canvas(0.62, float(rng.uniform(1.6, 1.85)), rng)
    coat, trousers = _soft_color(rng, 0.12, 0.45, 0.45), _soft_color(rng, 0.06, 0.25, 0.3)
    skin: Rgb = [(0.62, 0.45, 0.36), (0.5, 0.34, 0.25), (0.33, 0.21, 0.15)][int(rng.integers(3))]
    stride = float(rng.uniform(0.02, 0.12))
    for side, x in ((-1, 0.42), (1, 0.58)):
        foot = x + side * stride
        leg = [(x - 0.1, 0.5), (x + 0.1, 0.5), (foot + 0.08, 0.97), (foot - 0.08, 0.97)]
        canvas.paint(canvas.polygon_mask(leg), _scaled(trousers, 1.0 if side > 0 else 0.75))
        canvas.paint(canvas.ellipse_mask((foot, 0.975), (0.1, 0.02)), (0.05, 0.05, 0.05))
    for side in (-1, 1):
        arm = [(0.5 + side * 0.17, 0.2), (0.5 + side * 0.28, 0.24), (0.5 + side * 0.34, 0.5), (0.5 + side * 0.22, 0.52)]
        canvas.paint(canvas.polygon_mask(arm), _scaled(coat, 0.85))
        canvas.paint(canvas.ellipse_mask((0.5 + side * 0.29, 0.52), (0.05, 0.02)), skin)
    torso = [(0.32, 0.17), (0.68, 0.17), (0.75, 0.25), (0.7, 0.56), (0.3, 0.56), (0.25, 0.25)]
    canvas.paint(canvas.polygon_mask(torso), canvas.gradient(coat, 1.15, 0.8))
    canvas.paint(canvas.box_mask(0.44, 0.12, 0.56, 0.19), skin)
    canvas.paint(canvas.ellipse_mask((0.5, 0.085), (0.15, 0.07)), skin)
    hair = _scaled((0.3, 0.2, 0.12), float(rng.uniform(0.3, 1.2)))
    canvas.paint(canvas.ellipse_mask((0.5, 0.07), (0.16, 0.06)), hair)
    canvas.round_off(0.5, 0.02)
    canvas.grain(0.05)
    return canvas.finish(0.4)


def tree(rng: np.random.Generator, bush: bool = False) -> Sprite:
    """A deciduous tree, or a bush without trunk."""
    height_m = float(rng.uniform(1.0, 1.8) if bush else rng.uniform(6.0, 10.0))
    width_m = height_m * float(rng.uniform(1.2, 1.8) if bush else rng.uniform(0.65, 0.9))
    canvas = Canvas(width_m, height_m, rng)
    shape = (canvas.height, canvas.width)
    if not bush:
        half = 0.12 / width_m * float(rng.uniform(0.8, 1.4))
        canvas.paint(
            canvas.polygon_mask([(0.5 - half, 0.5), (0.5 + half, 0.5), (0.5 + 1.4 * half, 1.0), (0.5 - 1.4 * half, 1.0)]), (0.16, 0.13, 0.1)
        )
    bottom = 0.95 if bush else 0.68
    crown = np.zeros(shape, np.float32)
    clumps = np.full(shape, 0.8, np.float32)
    down = np.linspace(0.0, 1.0, canvas.height, dtype=np.float32)[:, None]
    for _ in range(60):
        radius = float(rng.uniform(0.06, 0.2))
        angle, distance = rng.uniform(0.0, 2.0 * math.pi), math.sqrt(rng.uniform(0.0, 1.0))
        x = 0.5 + (0.5 - radius) * distance * math.cos(angle)
        y = bottom / 2.0 + (bottom / 2.0 - radius * 0.7) * distance * math.sin(angle)
        clump = canvas.ellipse_mask((x, y), (radius, radius * 0.8))
        crown = np.maximum(crown, clump)
        # Every clump of leaves is bright above and dark below.
        light = float(rng.uniform(0.9, 1.2)) - 0.45 * np.clip((down - y) / (radius * 0.8), -1.0, 1.0)
        clumps += (light - clumps) * cv2.GaussianBlur(clump, (0, 0), 0.012 * canvas.height)
    leaves, twigs = fractal_noise(rng, shape, 0.9), fractal_noise(rng, shape, 0.35)
    crown = smooth_step(cv2.GaussianBlur(crown, (0, 0), 0.03 * canvas.height) + 0.2 * leaves + 0.1 * twigs, 0.42, 0.56)
    base = as_float32([0.15, 0.175, 0.1]) * float(rng.uniform(0.85, 1.2)) + as_float32(rng.uniform(-0.02, 0.03, 3))
    lit = clumps * (1.0 + 0.2 * leaves + 0.16 * twigs) * (1.15 - 0.35 * down)
    canvas.paint(crown, np.clip(lit, 0.2, 2.2)[..., None] * base)
    return canvas.finish(0.35)


def pole(rng: np.random.Generator, kind: str) -> Sprite:
    """A lamp post, a traffic sign or a fence post."""
    if kind == "lamp":
        canvas = Canvas(1.4, 6.5, rng)
        canvas.paint(canvas.box_mask(0.46, 0.02, 0.54, 1.0), (0.28, 0.29, 0.29))
        canvas.paint(canvas.box_mask(0.46, 0.02, 0.96, 0.033), (0.28, 0.29, 0.29))
        canvas.paint(canvas.box_mask(0.74, 0.025, 0.98, 0.05, 0.4), (0.42, 0.42, 0.4))
    elif kind == "sign":
        canvas = Canvas(0.75, 2.7, rng)
        canvas.paint(canvas.box_mask(0.46, 0.05, 0.54, 1.0), (0.42, 0.43, 0.43))
        if rng.uniform() < 0.5:
            canvas.paint(canvas.ellipse_mask((0.5, 0.14), (0.48, 0.133)), (0.6, 0.07, 0.07))
            canvas.paint(canvas.ellipse_mask((0.5, 0.14), (0.36, 0.1)), (0.78, 0.78, 0.75))
            canvas.tint(canvas.box_mask(0.36, 0.11, 0.64, 0.17), (0.08, 0.08, 0.08), 0.8)
        else:
            canvas.paint(canvas.box_mask(0.04, 0.01, 0.96, 0.26, 0.1), (0.08, 0.2, 0.5))
            canvas.tint(canvas.polygon_mask([(0.5, 0.05), (0.75, 0.2), (0.25, 0.2)]), (0.75, 0.76, 0.76))
    else:
        canvas = Canvas(0.14, 1.1, rng)
        canvas.paint(canvas.box_mask(0.2, 0.0, 0.8, 1.0, 0.3), (0.66, 0.66, 0.63))
        canvas.tint(canvas.box_mask(0.0, 0.12, 1.0, 0.25), (0.06, 0.06, 0.06))
    canvas.round_off(0.3, 0.01)
    canvas.grain(0.03)
    return canvas.finish(0.25)


def facade(rng: np.random.Generator, width_m: float, height_m: float) -> FloatImage:
    """The front of a house: (H, W, 3) float32 RGB in [0, 1], 32 px per metre."""
    per_metre = 32
    height, width = round(height_m * per_metre), round(width_m * per_metre)
    walls: list[Rgb] = [(0.5, 0.44, 0.36), (0.42, 0.27, 0.21), (0.55, 0.53, 0.48), (0.38, 0.36, 0.34), (0.52, 0.46, 0.4)]
    wall = as_float32(walls[int(rng.integers(len(walls)))]) * float(rng.uniform(0.8, 1.1))
    picture = np.broadcast_to(wall, (height, width, 3)).copy()
    picture *= 1.0 + 0.05 * fractal_noise(rng, (height, width), 1.2)[..., None] + 0.03 * fractal_noise(rng, (height, width), 0.2)[..., None]
    floor_m, bay_m = float(rng.uniform(2.8, 3.3)), float(rng.uniform(2.0, 3.2))
    floors, bays = max(1, int(height_m / floor_m)), max(1, int(width_m / bay_m))
    window_w, window_h = round(bay_m * 0.45 * per_metre), round(floor_m * 0.52 * per_metre)
    for floor in range(floors):
        y = height - round((floor + 0.82) * floor_m * per_metre)
        for bay in range(bays):
            x = round((bay + 0.5) * width / bays) - window_w // 2
            if y < 2 or x < 2 or x + window_w + 2 >= width:
                continue
            picture[y - 2 : y + window_h + 3, x - 2 : x + window_w + 2] = wall * 1.25
            glass = np.linspace(rng.uniform(0.2, 0.45), rng.uniform(0.08, 0.18), window_h, dtype=np.float32)[:, None, None]
            picture[y : y + window_h, x : x + window_w] = glass * as_float32([0.92, 1.0, 1.08])
            picture[y : y + window_h, x + window_w // 2] = wall * 1.1
            picture[y + window_h : y + window_h + 3, x - 3 : x + window_w + 3] = wall * 0.7
        edge = height - round((floor + 1.0) * floor_m * per_metre)
        if edge > 2:
            picture[edge : edge + 2] *= 0.82
    picture[-round(0.5 * per_metre) :] *= 0.72
    picture[: max(2, round(0.25 * per_metre))] *= 0.62
    return as_float32(np.clip(cv2.GaussianBlur(picture, (0, 0), 0.7), 0.0, 1.0))


def carton(rng: np.random.Generator) -> Sprite:
    """A cardboard box seen over one corner."""
    canvas = Canvas(float(rng.uniform(0.5, 0.95)), float(rng.uniform(0.45, 0.8)), rng)
    brown = as_float32([0.5, 0.36, 0.22]) * float(rng.uniform(0.8, 1.2))
    split, lid = float(rng.uniform(0.45, 0.7)), float(rng.uniform(0.14, 0.26))
    front = [(0.02, lid), (split, lid + 0.05), (split, 0.99), (0.03, 0.92)]
    side = [(split, lid + 0.05), (0.98, lid - 0.02), (0.97, 0.88), (split, 0.99)]
    top = [(0.02, lid), (0.38, 0.01), (0.98, lid - 0.02), (split, lid + 0.05)]
    for polygon, shade in ((front, 1.0), (side, 0.62), (top, 1.3)):
        canvas.paint(canvas.polygon_mask(polygon), (brown[0] * shade, brown[1] * shade, brown[2] * shade))
    canvas.tint(canvas.polygon_mask([(0.3, lid), (0.38, lid), (0.39, 0.97), (0.31, 0.96)]), (0.62, 0.52, 0.38), 0.7)
    canvas.grain(0.07)
    return canvas.finish()


def barrel(rng: np.random.Generator) -> Sprite:
    """A steel or plastic drum, standing."""
    canvas = Canvas(0.6, 0.88, rng)
    color = [(0.12, 0.25, 0.45), (0.5, 0.14, 0.08), (0.12, 0.33, 0.2), (0.55, 0.45, 0.1)][int(rng.integers(4))]
    canvas.paint(canvas.box_mask(0.04, 0.08, 0.96, 0.94), color)
    canvas.paint(canvas.ellipse_mask((0.5, 0.93), (0.46, 0.06)), color)
    across = np.cos(np.linspace(-1.35, 1.5, canvas.width, dtype=np.float32))[None, :, None]
    canvas.color *= 0.35 + 0.95 * across
    canvas.paint(canvas.ellipse_mask((0.5, 0.08), (0.46, 0.065)), _scaled(color, 1.2))
    canvas.tint(canvas.ellipse_mask((0.5, 0.085), (0.4, 0.05)), _scaled(color, 0.7))
    for y in (0.34, 0.62):
        canvas.tint(canvas.box_mask(0.0, y, 1.0, y + 0.025), _scaled(color, 0.5), 0.7)
    canvas.grain(0.06)
    return canvas.finish()


def tyre(rng: np.random.Generator) -> Sprite:
    """A lost tyre, lying flat or standing."""
    flat = rng.uniform() < 0.6
    canvas = Canvas(0.72, 0.34 if flat else 0.72, rng)
    black: Rgb = (0.07, 0.07, 0.075)
    if flat:
        canvas.paint(canvas.ellipse_mask((0.5, 0.66), (0.48, 0.32)), _scaled(black, 0.7))
        canvas.paint(canvas.ellipse_mask((0.5, 0.4), (0.48, 0.36)), _scaled(black, 1.5))
        canvas.paint(canvas.ellipse_mask((0.5, 0.42), (0.27, 0.19)), (0.012, 0.012, 0.012))
    else:
        canvas.paint(canvas.ellipse_mask((0.5, 0.5), (0.49, 0.49)), black)
        canvas.tint(canvas.ellipse_mask((0.5, 0.5), (0.38, 0.38)), _scaled(black, 1.6))
        canvas.tint(canvas.ellipse_mask((0.5, 0.5), (0.27, 0.27)), (0.3, 0.3, 0.31))
    canvas.round_off(0.8, 0.05)
    canvas.grain(0.12)
    return canvas.finish()


def mattress(rng: np.random.Generator) -> Sprite:
    """A mattress or sofa cushion that fell from a car, lying."""
    canvas = Canvas(float(rng.uniform(1.2, 1.9)), float(rng.uniform(0.4, 0.65)), rng)
    cloth = _soft_color(rng, 0.45, 0.75, 0.35)
    canvas.paint(canvas.polygon_mask([(0.02, 0.55), (0.2, 0.05), (0.97, 0.1), (0.9, 0.62)]), _scaled(cloth, 1.15))
    canvas.paint(canvas.polygon_mask([(0.02, 0.55), (0.9, 0.62), (0.9, 0.97), (0.03, 0.9)]), _scaled(cloth, 0.62))
    canvas.paint(canvas.polygon_mask([(0.9, 0.62), (0.97, 0.1), (0.98, 0.45), (0.9, 0.97)]), _scaled(cloth, 0.45))
    pattern = fractal_noise(rng, (canvas.height, canvas.width), 0.3)
    canvas.tint(smooth_step(pattern, 1.0, 1.5), _soft_color(rng, 0.2, 0.5, 0.6), 0.5)
    canvas.grain(0.05)
    return canvas.finish()


def animal(rng: np.random.Generator) -> Sprite:
    """A four-legged animal from the side: dog, deer, sheep or cow by its proportions."""
    height_m = float(rng.uniform(0.6, 1.35))
    leg, neck, bulk = float(rng.uniform(0.32, 0.5)), float(rng.uniform(0.0, 0.22)), float(rng.uniform(0.15, 0.23))
    canvas = Canvas(height_m * float(rng.uniform(1.2, 1.5)), height_m, rng)
    furs: list[Rgb] = [(0.3, 0.2, 0.12), (0.42, 0.3, 0.18), (0.1, 0.09, 0.08), (0.55, 0.52, 0.47), (0.34, 0.33, 0.32)]
    fur = furs[int(rng.integers(len(furs)))]
    back = 1.0 - leg - bulk
    for x, shade in ((0.24, 0.6), (0.68, 0.6), (0.18, 0.9), (0.62, 0.9)):
        knee = x + float(rng.uniform(-0.03, 0.03))
        points = [(x - 0.05, back), (x + 0.055, back), (knee + 0.022, 0.99), (knee - 0.025, 0.99)]
        canvas.paint(canvas.polygon_mask(points), _scaled(fur, shade))
    canvas.paint(canvas.ellipse_mask((0.43, back), (0.34, bulk)), fur)
    canvas.paint(canvas.ellipse_mask((0.24, back - 0.02), (0.16, bulk * 0.95)), fur)
    head_y = max(0.14, back - bulk * 0.5 - neck)
    canvas.paint(canvas.polygon_mask([(0.6, back - 0.1), (0.76, back + 0.1), (0.88, head_y + 0.03), (0.76, head_y - 0.05)]), fur)
    canvas.paint(canvas.ellipse_mask((0.85, head_y), (0.12, 0.075), 18.0), fur)
    for x in (0.77, 0.82):
        canvas.paint(
            canvas.polygon_mask([(x - 0.02, head_y - 0.03), (x + 0.03, head_y - 0.05), (x - 0.01, head_y - 0.13)]), _scaled(fur, 0.8)
        )
    canvas.paint(
        canvas.polygon_mask([(0.09, back - 0.06), (0.13, back - 0.09), (0.03, back + 0.22), (0.01, back + 0.2)]), _scaled(fur, 0.85)
    )
    if rng.uniform() < 0.4:
        spots = smooth_step(fractal_noise(rng, (canvas.height, canvas.width), 1.6), 0.4, 0.7)
        canvas.tint(spots, (0.7, 0.68, 0.64), 0.9)
    canvas.grain(0.13, 0.5)
    canvas.round_off(0.9, 0.05)
    if rng.uniform() < 0.5:
        canvas.color = np.ascontiguousarray(canvas.color[:, ::-1])
        canvas.alpha = np.ascontiguousarray(canvas.alpha[:, ::-1])
    return canvas.finish()


def rubble(rng: np.random.Generator) -> Sprite:
    """Broken things in a heap: planks, sheets and stones."""
    canvas = Canvas(float(rng.uniform(0.8, 1.7)), float(rng.uniform(0.35, 0.8)), rng)
    for _ in range(int(rng.integers(6, 12))):
        x, width = float(rng.uniform(0.12, 0.88)), float(rng.uniform(0.08, 0.3))
        top = float(rng.uniform(0.1, 0.7)) * (0.35 + 1.3 * abs(x - 0.5))
        corners = [(x - width / 2, top + rng.uniform(-0.1, 0.25)), (x + width / 2, top + rng.uniform(0.0, 0.2))]
        corners += [(x + width / 2 * rng.uniform(0.6, 1.2), 0.98), (x - width / 2 * rng.uniform(0.6, 1.2), 0.98)]
        canvas.paint(canvas.polygon_mask(np.clip(corners, 0.01, 0.99).tolist()), _soft_color(rng, 0.15, 0.65, 0.5))
    canvas.round_off(0.5, 0.04)
    canvas.grain(0.15)
    return canvas.finish()


def suitcase(rng: np.random.Generator) -> Sprite:
    """A suitcase with handle and ribs."""
    canvas = Canvas(float(rng.uniform(0.45, 0.75)), float(rng.uniform(0.5, 0.75)), rng)
    shell = _soft_color(rng, 0.2, 0.6, 0.85)
    for handle in ((0.36, 0.01, 0.64, 0.05), (0.36, 0.01, 0.41, 0.15), (0.59, 0.01, 0.64, 0.15)):
        canvas.paint(canvas.box_mask(*handle, 0.3), (0.05, 0.05, 0.05))
    canvas.paint(canvas.box_mask(0.03, 0.1, 0.97, 0.95, 0.25), canvas.gradient(shell, 1.25, 0.65))
    for x in np.linspace(0.16, 0.84, 6):
        canvas.tint(canvas.box_mask(float(x) - 0.012, 0.14, float(x) + 0.012, 0.92), _scaled(shell, 0.6), 0.7)
    for x in (0.14, 0.86):
        canvas.paint(canvas.ellipse_mask((x, 0.965), (0.05, 0.035)), (0.04, 0.04, 0.04))
    canvas.round_off(0.6, 0.04)
    canvas.grain(0.04)
    return canvas.finish()


def bin_bag(rng: np.random.Generator) -> Sprite:
    """A full, wrinkled plastic bag."""
    canvas = Canvas(float(rng.uniform(0.5, 0.95)), float(rng.uniform(0.45, 0.8)), rng)
    color = [(0.06, 0.06, 0.07), (0.55, 0.56, 0.58), (0.1, 0.2, 0.42), (0.15, 0.3, 0.18)][int(rng.integers(4))]
    angles = np.linspace(0.0, 2.0 * math.pi, 40, endpoint=False)
    wobble = 1.0 + 0.06 * np.sin(angles * 5 + rng.uniform(0, 6)) + 0.05 * rng.standard_normal(40)
    outline = [(0.5 + 0.43 * w * math.cos(a), 0.58 + 0.38 * w * math.sin(a)) for a, w in zip(angles, wobble, strict=True)]
    canvas.paint(canvas.polygon_mask([(0.42, 0.26), (0.34, 0.02), (0.5, 0.09), (0.64, 0.01), (0.58, 0.26)]), _scaled(color, 1.2))
    canvas.paint(canvas.polygon_mask(np.clip(outline, 0.01, 0.98).tolist()), color)
    folds = np.abs(fractal_noise(rng, (canvas.height, canvas.width), 1.5))
    canvas.tint(smooth_step(0.3 - folds, 0.0, 0.3), _scaled(color, 2.6) if max(color) < 0.3 else (0.8, 0.8, 0.82), 0.55)
    canvas.round_off(1.0, 0.08)
    return canvas.finish()


def ball(rng: np.random.Generator) -> Sprite:
    """A large ball of two colours."""
    size_m = float(rng.uniform(0.4, 0.8))
    canvas = Canvas(size_m, size_m, rng)
    canvas.paint(canvas.ellipse_mask((0.5, 0.5), (0.48, 0.48)), _soft_color(rng, 0.5, 0.8, 0.9))
    canvas.tint(canvas.ellipse_mask((0.5, 0.5), (0.2, 0.48)), _soft_color(rng, 0.6, 0.85, 0.2))
    yy, xx = np.mgrid[-1.0 : 1.0 : canvas.height * 1j, -1.0 : 1.0 : canvas.width * 1j].astype(np.float32)
    depth = np.sqrt(np.clip(1.0 - xx**2 - yy**2, 0.0, 1.0))
    canvas.color *= np.clip(0.35 + 0.6 * depth - 0.35 * yy - 0.2 * xx, 0.2, 1.3)[..., None]
    canvas.tint(canvas.ellipse_mask((0.36, 0.3), (0.07, 0.05), -30.0), (0.95, 0.95, 0.95), 0.6)
    return canvas.finish()


def boulder(rng: np.random.Generator) -> Sprite:
    """A stone that fell onto the road."""
    canvas = Canvas(float(rng.uniform(0.5, 1.1)), float(rng.uniform(0.35, 0.75)), rng)
    angles = np.linspace(0.0, 2.0 * math.pi, 11, endpoint=False) + rng.uniform(-0.2, 0.2, 11)
    radii = rng.uniform(0.85, 1.0, 11)
    outline = [(0.5 + 0.49 * r * math.cos(a), 0.55 + 0.54 * r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]
    canvas.paint(canvas.polygon_mask(np.clip(outline, 0.0, 0.97).tolist()), _soft_color(rng, 0.35, 0.55, 0.2))
    canvas.grain(0.2, 1.1)
    canvas.round_off(1.0, 0.1)
    return canvas.finish()


UNKNOWN_OBJECTS: dict[str, Callable[[np.random.Generator], Sprite]] = {
    "animal": animal,
    "carton": carton,
    "barrel": barrel,
    "tyre": tyre,
    "mattress": mattress,
    "rubble": rubble,
    "suitcase": suitcase,
    "bin_bag": bin_bag,
    "ball": ball,
    "boulder": boulder,
}
"""What a vehicle's segmentation network has no class for, by name."""
