"""Counts of every image, from which all figures can be computed again for any resampling of the images.

They lie beside ``report.json`` as ``report.images.npz``. Pixel AP comes from histograms at 256 thresholds and so differs from the
report's in the third digit.
"""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation import component, instance, s2m
from ros2_ood_seg.evaluation.pixel import PixelCurve, ScoreCounts

HISTOGRAM_BINS = 256


@dataclass(frozen=True)
class ImageCounts:
    """Counts of N images with P predicted instances in all.

    Args:
        names: (N,) str.
        score: (N, 2, B) int64, normal and anomalous pixels of the score map in each of B score ranges, ascending.
        refined: The same of the refined map.
        masks: (N, 3, 101) int64 hits, extra and positive pixels (:class:`~ros2_ood_seg.evaluation.s2m.MaskSweep`).
        baseline: The same of the scorer's own map.
        components: (N, 3, 11) int64 true positives, false negatives, false positives; N = 0 without them.
        instance_image: (P,) int64, which image a prediction is of.
        instance_score: (P,) float64.
        instance_right: (P, 10) int8 at each overlap: 1 right, -1 wrong, 0 excused.
        missed: (N, 10) int64 instances without a prediction.
    """

    names: NDArray[np.str_]
    score: NDArray[np.int64]
    refined: NDArray[np.int64]
    masks: NDArray[np.int64]
    baseline: NDArray[np.int64]
    components: NDArray[np.int64]
    instance_image: NDArray[np.int64]
    instance_score: NDArray[np.float64]
    instance_right: NDArray[np.int8]
    missed: NDArray[np.int64]

    @classmethod
    def load(cls, path: Path) -> ImageCounts:
        """Reads what :class:`CountsWriter` wrote.

        Raises:
            InputError: Missing or of another layout.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                return cls(**{field.name: data[field.name] for field in fields(cls)})
        # Damaged bytes can raise nearly anything: zlib.error, EOFError, TokenError, NotImplementedError and more.
        except Exception as error:
            raise InputError(f"'{path}' cannot be read as image counts of an evaluation: {error}") from error

    @cached_property
    def _curves(self) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """IoU and F1 of each image at each threshold."""
        groups = {"s2m": self.masks, "baseline": self.baseline}
        return {key: s2m.per_image([s2m.MaskSweep.from_table(row) for row in rows]) for key, rows in groups.items()}

    def figures(self, weights: NDArray[np.int64]) -> dict[str, float]:
        """The figures when each image counts ``weights`` times; those that have no value are left out.

        Args:
            weights: (N,) int64, not all 0.
        """
        found: dict[str, float | None] = {
            "pixel.ap": _average_precision(self.score, weights),
            "refined.ap": _average_precision(self.refined, weights),
        }
        for key, (iou, f1) in self._curves.items():
            scores = s2m.from_curves(np.average(iou, axis=0, weights=weights), np.average(f1, axis=0, weights=weights))
            found |= {f"{key}.{name}": getattr(scores, name) for name in ("iou", "iou_best", "auiou", "mean_f1")}
        if len(self.components):
            found["component.f1"] = component.f1_star(np.tensordot(weights, self.components, 1))
        times = weights[self.instance_image]
        right = np.repeat(self.instance_right, times, axis=0)
        pooled = instance.scores_of(instance.Verdicts(np.repeat(self.instance_score, times), right, weights @ self.missed))
        found |= {"instance.ap": pooled.ap, "instance.ap50": pooled.ap50}
        return {key: value for key, value in found.items() if value is not None}


def _average_precision(counts: NDArray[np.int64], weights: NDArray[np.int64]) -> float | None:
    negatives, positives = np.tensordot(weights, counts, 1)[:, ::-1]
    hits, alarms = np.cumsum(positives), np.cumsum(negatives)
    if not hits[-1]:
        return None
    return float(np.dot(positives, hits / np.maximum(hits + alarms, 1)) / hits[-1])


def histogram_edges(curve: PixelCurve, bins: int = HISTOGRAM_BINS) -> NDArray[np.float64]:
    """At most ``bins`` thresholds of a pooled curve, ascending and evenly spaced in recall; pixels above them are counted."""
    return np.nextafter(curve.thinned(bins).thresholds[::-1], np.float32(-np.inf)).astype(np.float64)


def histogram(edges: NDArray[np.float64], positives: ScoreCounts, negatives: ScoreCounts) -> NDArray[np.int64]:
    """Normal and anomalous pixels of an image below, between and above the edges; (2, E + 1) int64."""
    above = np.array([np.concatenate([[part.total], part.above(edges), [0]]) for part in (negatives, positives)])
    return -np.diff(above, axis=1)


class CountsWriter:
    """Writes :class:`ImageCounts` image by image; what was written lies on disk, not in memory.

    Args:
        folder: For the rows until :meth:`save`; files ``counts_<field>.rows`` appear in it.
    """

    SUFFIX = "rows"

    def __init__(self, folder: Path) -> None:
        self._files = {field.name: folder / f"counts_{field.name}.{self.SUFFIX}" for field in fields(ImageCounts)}
        self._shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._lengths: dict[str, int] = {}
        self._names: list[str] = []
        for path in self._files.values():
            path.unlink(missing_ok=True)

    def add_found(self, name: str, masks: s2m.MaskSweep, instances: instance.Verdicts) -> None:
        """Adds an image.

        Args:
            name: Of the image.
            masks: Of the masks.
            instances: Of the predictions.
        """
        index = np.full(instances.scores.size, len(self._names), np.int64)
        self._names.append(name)
        self._append("masks", masks.table()[None])
        self._append("instance_image", index)
        self._append("instance_score", instances.scores)
        self._append("instance_right", instances.right)
        self._append("missed", instances.missed[None])

    def add_scored(
        self, score: NDArray[np.int64], refined: NDArray[np.int64], baseline: s2m.MaskSweep, components: component.ComponentMatch | None
    ) -> None:
        """Adds what is known of an image when all have been pooled; call it once for each, in the same order.

        Args:
            score: Its :func:`histogram` of the score map.
            refined: The same of the refined map.
            baseline: Of the scorer's own map.
            components: None without them.
        """
        counted = np.zeros((0, 3, component.TAUS.size), np.int64) if components is None else component.counts_at_taus(components)[None]
        self._append("score", score[None])
        self._append("refined", refined[None])
        self._append("baseline", baseline.table()[None])
        self._append("components", counted)

    def _append(self, key: str, rows: NDArray[Any]) -> None:
        self._shapes[key] = (rows.dtype, rows.shape[1:])
        self._lengths[key] = self._lengths.get(key, 0) + len(rows)
        with self._files[key].open("ab") as file:
            file.write(rows.tobytes())

    def save(self, path: Path) -> None:
        """Writes the npz file that :meth:`ImageCounts.load` reads."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("names.npy", "w") as member:
                np.lib.format.write_array(member, np.array(self._names), allow_pickle=False)
            for key, (dtype, shape) in self._shapes.items():
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (self._lengths[key], *shape)}
                with archive.open(f"{key}.npy", "w", force_zip64=True) as member, self._files[key].open("rb") as rows:
                    np.lib.format.write_array_header_1_0(member, header)
                    shutil.copyfileobj(rows, member)


def counts_path(report: Path) -> Path:
    """Where the image counts of a report lie."""
    return report.with_suffix(".images.npz")
