"""Comparing evaluations: differences between reports, with bootstrap intervals over images.

Beside ``report.json`` lies ``report.images.npz``, the counts of every image from which all figures can be computed again for any
resampling of the images. Pixel AP comes from histograms at 256 thresholds and so differs from the report's in the third digit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation import component, instance, s2m
from ros2_ood_seg.evaluation.pixel import PixelCurve, ScoreCounts

METRICS = (
    "pixel.ap",
    "pixel.fpr95",
    "refined.ap",
    "refined.fpr95",
    "baseline.iou_best",
    "s2m.iou",
    "s2m.iou_best",
    "s2m.auiou",
    "s2m.mean_f1",
    "component.siou",
    "component.ppv",
    "component.f1",
    "instance.ap",
    "instance.ap50",
    "timings_ms.total.p50",
)
"""What ``ood-seg compare`` shows."""


@dataclass(frozen=True)
class ImageCounts:
    """Counts of N images.

    Args:
        names: (N,) str.
        score: (N, 2, B) int64, normal and anomalous pixels of the score map in each of B score ranges, ascending.
        refined: The same of the refined map.
        masks: (N, 3, 101) int64 hits, extra and positive pixels (:class:`~ros2_ood_seg.evaluation.s2m.MaskSweep`).
        baseline: The same of the scorer's own map.
        components: (N, 3, 11) int64 true positives, false negatives, false positives; N = 0 without them.
        instance_image: (E,) int64, which image a decision is of.
        instance_overlap: (E,) int64, at which of the ten overlaps.
        instance_right: (E,) bool.
        instance_score: (E,) float64.
        missed: (N, 10) int64 instances without a prediction.
    """

    names: NDArray[np.str_]
    score: NDArray[np.int64]
    refined: NDArray[np.int64]
    masks: NDArray[np.int64]
    baseline: NDArray[np.int64]
    components: NDArray[np.int64]
    instance_image: NDArray[np.int64]
    instance_overlap: NDArray[np.int64]
    instance_right: NDArray[np.bool_]
    instance_score: NDArray[np.float64]
    missed: NDArray[np.int64]

    def save(self, path: Path) -> None:
        """Writes an npz file."""
        np.savez_compressed(path, allow_pickle=False, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> ImageCounts:
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: Missing or of another layout.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                return cls(**{field.name: data[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"'{path}' cannot be read as image counts of an evaluation: {error}") from error

    @cached_property
    def _curves(self) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """IoU and F1 of each image at each threshold."""
        groups = {"s2m": self.masks, "baseline": self.baseline}
        return {key: s2m.per_image([s2m.MaskSweep(row[0], row[1], int(row[2, 0])) for row in rows]) for key, rows in groups.items()}

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
        aps = []
        for k in range(len(instance.OVERLAPS)):
            chosen = self.instance_overlap == k
            times = weights[self.instance_image[chosen]]
            scores_k, right = np.repeat(self.instance_score[chosen], times), np.repeat(self.instance_right[chosen], times)
            aps.append(instance.average_precision(scores_k[right], scores_k[~right], int(weights @ self.missed[:, k])))
        known = [ap for ap in aps if ap is not None]
        found |= {"instance.ap": float(np.mean(known)) if known else None, "instance.ap50": aps[0]}
        return {key: value for key, value in found.items() if value is not None}


def histogram(curve: PixelCurve, parts: Iterable[tuple[ScoreCounts, ScoreCounts]], bins: int = 256) -> NDArray[np.int64]:
    """Pixels of each image between thresholds of the pooled curve that are evenly spaced in recall; (N, 2, B) int64.

    Args:
        curve: Pooled.
        parts: Scores of the anomalous and of the normal pixels of each image.
        bins: Most thresholds.
    """
    edges = np.nextafter(curve.thinned(bins).thresholds[::-1], np.float32(-np.inf)).astype(np.float64)
    rows = []
    for positives, negatives in parts:
        above = np.array([np.concatenate([[part.total], part.above(edges), [0]]) for part in (negatives, positives)])
        rows.append(-np.diff(above, axis=1))
    return np.array(rows)


def _average_precision(counts: NDArray[np.int64], weights: NDArray[np.int64]) -> float | None:
    negatives, positives = np.tensordot(weights, counts, 1)[:, ::-1]
    hits, alarms = np.cumsum(positives), np.cumsum(negatives)
    if not hits[-1]:
        return None
    return float(np.dot(positives, hits / np.maximum(hits + alarms, 1)) / hits[-1])


def counts_path(report: Path) -> Path:
    """Where the image counts of a report lie."""
    return report.with_suffix(".images.npz")


@dataclass(frozen=True)
class Interval:
    """A difference to the first report and its 95 % interval."""

    low: float
    high: float


def bootstrap(first: ImageCounts, second: ImageCounts, samples: int = 500, seed: int = 0) -> dict[str, Interval]:
    """95 % intervals of ``second - first`` over resampled images.

    Args:
        first: Of one report.
        second: Of another on the same images.
        samples: Resamplings.
        seed: Of the resampling.

    Raises:
        InputError: Other images.
    """
    if not np.array_equal(first.names, second.names):
        raise InputError("the reports are of different images, only reports of the same images can be compared image by image")
    rng = np.random.default_rng(seed)
    count = len(first.names)
    differences: dict[str, list[float]] = {}
    for _ in range(samples):
        weights = np.bincount(rng.integers(0, count, count), minlength=count)
        left, right = first.figures(weights), second.figures(weights)
        for key in left.keys() & right.keys():
            differences.setdefault(key, []).append(right[key] - left[key])
    return {key: Interval(*(float(v) for v in np.quantile(values, [0.025, 0.975]))) for key, values in differences.items()}


def value_of(report: dict[str, Any], metric: str) -> float | None:
    """A figure of a report by its dotted name; None when it has none."""
    node: Any = report
    for key in metric.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return float(node) if isinstance(node, int | float) else None


def load_report(path: Path) -> dict[str, Any]:
    """Reads a report.json.

    Raises:
        InputError: Missing or no report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"report '{path}' cannot be read: {error}") from error
    if not isinstance(report, dict) or "pixel" not in report or "profile" not in report:
        raise InputError(f"'{path}' is no report of 'ood-seg evaluate'")
    return report


def comparison(paths: Sequence[Path], samples: int = 500) -> str:
    """A table of the reports' figures and their differences to the first.

    Args:
        paths: Two or more report.json.
        samples: Bootstrap resamplings; 0 for no intervals.

    Raises:
        InputError: Fewer than two reports, or one that cannot be read.
    """
    if len(paths) < 2:
        raise InputError(f"compare needs two or more reports, got {len(paths)}")
    reports = [load_report(path) for path in paths]
    titles = [f"{report['profile']} ({path.stem})" for path, report in zip(paths, reports, strict=True)]
    intervals: list[dict[str, Interval]] = [{} for _ in paths]
    notes = []
    if samples:
        try:
            counts = [ImageCounts.load(counts_path(path)) for path in paths]
            intervals = [{}, *(bootstrap(counts[0], other, samples) for other in counts[1:])]
        except InputError as error:
            notes.append(f"no intervals: {error}")
    rows = [["", *titles]]
    for metric in METRICS:
        values = [value_of(report, metric) for report in reports]
        if all(value is None for value in values):
            continue
        digits = 1 if metric.startswith("timings_ms") else 4
        row = [metric]
        for k, value in enumerate(values):
            text = "-" if value is None else f"{value:.{digits}f}"
            if k and value is not None and values[0] is not None:
                text += f"  {_signed(value - values[0], digits)}"
                if metric in intervals[k]:
                    text += f" [{_signed(intervals[k][metric].low, digits)}, {_signed(intervals[k][metric].high, digits)}]"
            row.append(text)
        rows.append(row)
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len({report["dataset"] for report in reports}) > 1 or len({report["images"] for report in reports}) > 1:
        notes.append("the reports are not of the same data")
    if any(intervals):
        notes.append(f"in brackets: 95 % interval of the difference to the first, {samples} resamplings of the images")
    return "\n".join([*lines, *(f"({note})" for note in notes)])


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}"
