"""In-distribution statistics of SML and Mahalanobis, from pictures in which nothing is anomalous."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.image_encodings import read_rgb
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import deeplab, sml
from ros2_ood_seg.scorers.network import network_input
from ros2_ood_seg.scorers.statistics import StatisticsSource
from ros2_ood_seg.weights.store import save_weights

_CHUNK = 65_536
"""Pixels that are held in float64 at a time."""

_LOG = logging.getLogger(__name__)


class ClassMoments:
    """Count, mean and covariance of the values of each class, summed in float64 picture by picture.

    Sums are taken around the mean of the first picture, so that a large common offset costs no digits.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        self.count = torch.zeros(num_classes, dtype=torch.float64)
        """(K,) pixels of each class."""
        self._origin = torch.zeros(0)
        self._sum = torch.zeros(0)
        self._outer = torch.zeros(0)

    def add(self, values: Tensor, classes: Tensor) -> None:
        """Adds N pixels.

        Args:
            values: (D, N) float.
            classes: (N,) int in [0, K).
        """
        if not self._sum.numel():
            labels, features = len(self.count), len(values)
            self._origin = values.double().mean(dim=1, keepdim=True)
            self._sum = self._origin.new_zeros((labels, features))
            self._outer = self._origin.new_zeros((labels, features, features))
        for part, label_of in zip(torch.split(values, _CHUNK, dim=1), torch.split(classes, _CHUNK), strict=True):
            centred = part.double() - self._origin
            for label in torch.bincount(label_of).nonzero()[:, 0].tolist():
                own = centred[:, label_of == label]
                self.count[label] += own.shape[1]
                self._sum[label] += own.sum(dim=1)
                self._outer[label] += own @ own.T

    def mean(self) -> Tensor:
        """(K, D) float64; that of all pixels for a class without any."""
        offset = self._sum.cpu() / self.count.clamp(min=1.0)[:, None]
        everything = self._sum.cpu().sum(dim=0) / self.count.sum()
        return torch.where(self.count[:, None] > 0, offset, everything) + self._origin.cpu()[:, 0]

    def covariance(self) -> Tensor:
        """(K, D, D) float64, unbiased; zeros for a class with fewer than two pixels."""
        offset = self._sum.cpu() / self.count.clamp(min=1.0)[:, None]
        scatter = self._outer.cpu() - self.count[:, None, None] * offset[:, :, None] * offset[:, None, :]
        return torch.where(self.count[:, None, None] > 1, scatter / (self.count - 1.0).clamp(min=1.0)[:, None, None], 0.0)

    def pooled(self) -> Tensor:
        """(D, D) float64 covariance around the mean of each pixel's class."""
        freedom = (self.count - 1.0).clamp(min=0.0)
        return (self.covariance() * freedom[:, None, None]).sum(dim=0) / freedom.sum().clamp(min=1.0)


def write_max_logit_statistics(moments: ClassMoments, path: Path) -> None:
    """Writes what :func:`ros2_ood_seg.scorers.statistics.read_max_logit_statistics` reads.

    A class that is hardly predicted takes the pooled variance, and one that never is the mean of all pixels.
    """
    variance = moments.covariance()[:, 0, 0]
    variance = torch.where(variance > 0, variance, moments.pooled()[0, 0])
    if not (variance > 0).all():
        raise InputError("the max logit is the same at every pixel: no statistics can be made of these pictures")
    values = {"mean": moments.mean()[:, 0].tolist(), "var": variance.tolist(), "count": moments.count.long().tolist()}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def write_feature_statistics(moments: ClassMoments, path: Path) -> None:
    """Writes what :func:`ros2_ood_seg.scorers.statistics.read_feature_statistics` reads.

    A class's covariance counts as many pixels as there are features from the pooled one on top of its own, so that it can be inverted
    however few it has. A class that never occurs repeats the most frequent one, which leaves every least distance as it is.
    """
    pooled, features = moments.pooled(), moments.mean().shape[1]
    ridge = 1e-6 * pooled.diagonal().mean() * torch.eye(features, dtype=torch.float64)
    if not ridge[0, 0] > 0:
        raise InputError("the features are the same at every pixel: no statistics can be made of these pictures")
    own = moments.count[:, None, None]
    covariance = (own * moments.covariance() + features * pooled) / (own + features) + ridge
    source = torch.where(moments.count > 0, torch.arange(len(moments.count)), moments.count.argmax())
    state = {"means": moments.mean()[source].float(), "inverse": torch.linalg.inv(covariance)[source].float()}
    save_weights(path, state, {"count": moments.count.long().tolist()}, half=False)


SOURCES: dict[str, tuple[Callable[[ScorerConfig, Runtime], StatisticsSource], Callable[[ClassMoments, Path], None]]] = {
    "sml": (sml.statistics_source, write_max_logit_statistics),
    "mahalanobis": (deeplab.mahalanobis_statistics_source, write_feature_statistics),
}
"""Scorers that need statistics: what they are made of, and how they are written."""


def make_statistics(config: ScorerConfig, runtime: Runtime, images: Sequence[Path], anew: bool = False) -> Path | None:
    """Computes a scorer's statistics, where it has none, and saves them beside its weights, where the scorer finds them.

    Args:
        config: Of a scorer in :data:`SOURCES`.
        runtime: Where to run.
        images: Pictures in which nothing is anomalous.
        anew: Compute them even where there are some.

    Returns:
        The file, or None when there are statistics already.

    Raises:
        InputError: No pictures, an unreadable one, a folder that cannot be written, or values that do not vary.
        WeightsError: The scorer's weights cannot be used.
    """
    make_source, write = SOURCES[config.name]
    source = make_source(config, runtime)
    found = [path for path in source.path.parent.glob(f"{glob.escape(source.path.stem)}.*") if path.suffix != ".partial"]
    if not anew and (config.statistics or found):
        return None
    if config.statistics:
        raise InputError(f"scorer.statistics names '{config.statistics}', which is never written to: leave it out to compute them")
    if not os.access(source.path.parent, os.W_OK):
        raise InputError(
            f"class statistics belong into '{source.path.parent}', which cannot be written: "
            "copy the weights to a folder of yours and name them with --weights, and with scorer.weights where they are used"
        )
    moments = ClassMoments(source.num_classes)
    for path in tqdm(images, desc="statistics", mininterval=5.0):
        image = torch.from_numpy(read_rgb(path)).to(runtime.device)
        with torch.inference_mode():
            moments.add(*source.observe(network_input(image, config.input_width)))
    if not moments.count.sum() > 0:
        raise InputError("statistics need at least one picture")
    unseen = torch.nonzero(moments.count == 0)[:, 0].tolist()
    if unseen:
        _LOG.warning("no pixel of %d pictures is predicted as class %s", len(images), ", ".join(map(str, unseen)))
    write(moments, source.path)
    return source.path
