from __future__ import annotations

import numpy as np
import pytest

from ros2_ood_seg.synthetic.noise import fractal_noise, pyramid, smooth_step


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_spectrum_falls_as_stated(exponent):
    noise = fractal_noise(np.random.default_rng(0), (256, 256), exponent)
    assert noise.mean() == pytest.approx(0.0, abs=1e-4)
    assert noise.std() == pytest.approx(1.0, abs=1e-3)
    amplitude = np.abs(np.fft.fft2(noise))
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None])
    low, high = (amplitude[(frequency > f) & (frequency < 1.25 * f)].mean() for f in (0.02, 0.16))
    assert np.log(low / high) / np.log(8.0) == pytest.approx(exponent, abs=0.15)


def test_tiles_have_no_seam():
    noise = fractal_noise(np.random.default_rng(1), (128, 128), 1.5)
    inside = np.abs(np.diff(noise, axis=1)).mean()
    assert np.abs(noise[:, 0] - noise[:, -1]).mean() < 1.5 * inside


def test_pyramid_halves_and_keeps_the_mean():
    image = np.random.default_rng(2).random((64, 32)).astype(np.float32)
    levels = pyramid(image, 4)
    assert [level.shape for level in levels] == [(64, 32), (32, 16), (16, 8), (8, 4)]
    for level in levels:
        assert level.mean() == pytest.approx(image.mean(), abs=0.03)
    assert levels[3].std() < 0.5 * image.std()


def test_smooth_step():
    assert smooth_step(np.array([-1.0, 0.0, 0.5, 1.0, 9.0]), 0.0, 1.0).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
