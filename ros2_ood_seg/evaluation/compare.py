"""Comparing evaluations: differences between reports, with bootstrap intervals over images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.counts import ImageCounts, counts_path

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
    # Data sets number their images alike; that they hold as many anomalous pixels each is no chance.
    if not np.array_equal(first.names, second.names) or not np.array_equal(first.masks[:, 2, 0], second.masks[:, 2, 0]):
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
