from __future__ import annotations

import numpy as np
import pytest

from ros2_ood_seg.synthetic import sprites

KNOWN = {
    "car": sprites.car,
    "car_front": lambda rng: sprites.car(rng, front=True),
    "van": sprites.van,
    "van_front": lambda rng: sprites.van(rng, front=True),
    "pedestrian": sprites.pedestrian,
    "tree": sprites.tree,
    "bush": lambda rng: sprites.tree(rng, bush=True),
    "lamp": lambda rng: sprites.pole(rng, "lamp"),
    "sign": lambda rng: sprites.pole(rng, "sign"),
    "post": lambda rng: sprites.pole(rng, "post"),
}


@pytest.mark.parametrize("name", [*KNOWN, *sprites.UNKNOWN_OBJECTS])
def test_sprites_are_premultiplied_and_stand_on_the_ground(name):
    make = {**KNOWN, **sprites.UNKNOWN_OBJECTS}[name]
    for seed in range(2):
        sprite = make(np.random.default_rng(seed))
        assert 0.1 < sprite.height_m < 11.0
        assert 0.1 < sprite.width_m < 11.0
        for level in sprite.levels:
            assert level.dtype == np.float32
            assert level.min() >= 0.0
            assert (level[..., :3] <= level[..., 3:] + 1e-5).all(), "premultiplied colours never exceed alpha"
        alpha = sprite.levels[0][..., 3]
        assert 0.02 < alpha.mean() < 0.98
        rows = np.flatnonzero((alpha > 0.5).any(axis=1))
        assert rows[-1] > 0.85 * alpha.shape[0], "the lowest part touches the ground"
        assert rows[0] < 0.35 * alpha.shape[0], "the height is the stated one"
        assert sprite.levels[0][alpha > 0.9][:, :3].std() > 0.005, "no flat colour"


def test_facades_have_windows():
    wall = sprites.facade(np.random.default_rng(0), 12.0, 9.0)
    assert wall.shape == (288, 384, 3)
    assert 0.0 <= wall.min() < wall.max() <= 1.0
    assert (wall.max(axis=2) < 0.3).mean() > 0.03
