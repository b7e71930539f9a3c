"""Seamless fractal noise, the raw material of all textures."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft

FloatImage = NDArray[np.floating[Any]]
"""Arithmetic in float32, whatever the type checker can prove."""


def as_float32(values: ArrayLike) -> NDArray[np.float32]:
    """Numbers as a float32 array."""
    return np.asarray(values, dtype=np.float32)


def fractal_noise(rng: np.random.Generator, shape_hw: tuple[int, int], exponent: float = 1.0) -> FloatImage:
    """Noise whose amplitude spectrum falls as ``1 / frequency**exponent``.

    Without seams it tiles where both sides have no prime factor above 5.

    Args:
        rng: Source of randomness.
        shape_hw: Size in px.
        exponent: 0 gives white noise, 1 a natural mixture of scales, 2 smooth clouds.

    Returns:
        (H, W) float32 of mean 0 and standard deviation 1.
    """
    height, width = (fft.next_fast_len(side, real=True) for side in shape_hw)
    frequency = np.hypot(fft.fftfreq(height)[:, None], fft.rfftfreq(width)[None]).astype(np.float32)
    frequency[0, 0] = np.inf
    spectrum = fft.rfft2(rng.standard_normal((height, width), dtype=np.float32)) / frequency**exponent
    noise = fft.irfft2(spectrum, s=(height, width))[: shape_hw[0], : shape_hw[1]]
    return np.asarray((noise - noise.mean()) / max(float(noise.std()), 1e-9), dtype=np.float32)


def smooth_step(values: FloatImage, low: float, high: float) -> FloatImage:
    """0 below ``low``, 1 above ``high``, a smooth S between them."""
    t = np.clip((values - low) / (high - low), 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t), dtype=np.float32)


def pyramid(image: FloatImage, levels: int) -> list[FloatImage]:
    """The image and ``levels - 1`` halvings of it, for sampling without aliasing; edges wrap around."""
    result = [image]
    for _ in range(levels - 1):
        blurred = cv2.GaussianBlur(np.pad(result[-1], [(4, 4), (4, 4)] + [(0, 0)] * (image.ndim - 2), mode="wrap"), (0, 0), 1.0)
        result.append(np.ascontiguousarray(blurred[4:-4:2, 4:-4:2]))
    return result
