from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import mahalanobis

from ros2_ood_seg.scorers.mahalanobis import mahalanobis_distance, upsampled_mahalanobis_distance
from ros2_ood_seg.scorers.statistics import FeatureStatistics


def statistics(classes: int = 3, features: int = 5) -> FeatureStatistics:
    rng = np.random.default_rng(2)
    roots = rng.normal(size=(classes, features, features))
    inverse = roots @ roots.transpose(0, 2, 1) + np.eye(features)
    return FeatureStatistics(torch.from_numpy(rng.normal(size=(classes, features))).float(), torch.from_numpy(inverse).float())


def test_distance_is_scipys_squared_to_the_nearest_class() -> None:
    known = statistics()
    features = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
    distances, nearest = mahalanobis_distance(features, known)
    for y in range(4):
        for x in range(6):
            each = [mahalanobis(features[:, y, x], m, s) ** 2 for m, s in zip(known.mean.numpy(), known.inverse.numpy(), strict=True)]
            assert distances[y, x].item() == pytest.approx(min(each), rel=1e-4)
            assert nearest[y, x].item() == int(np.argmin(each))


@pytest.mark.parametrize("size", [(7, 9), (150, 40), (20, 25), (1, 1)])
def test_strips_equal_upsampling_at_once(size: tuple[int, int]) -> None:
    known = statistics()
    features = torch.randn(5, 20, 25, generator=torch.Generator().manual_seed(0))
    expected, classes = mahalanobis_distance(F.interpolate(features[None], size=size, mode="bilinear", align_corners=True)[0], known)
    found, nearest = upsampled_mahalanobis_distance(features, known, size)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (nearest == classes).float().mean() > 0.99
