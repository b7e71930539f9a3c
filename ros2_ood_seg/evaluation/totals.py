"""What the report says of all frames together, added up frame by frame: memory grows by a few numbers a frame."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.evaluation import component, instance, s2m
from ros2_ood_seg.evaluation.measure import FrameMeasure

SIZE_EDGES_PX = (0, 100, 1_000, 10_000, 100_000, None)
BOTTOM_EDGES = (0.0, 0.45, 0.55, 0.7, 0.85, None)
RELIABILITY_BINS = 10


class _Column:
    """Numbers one after the other, eight bytes each."""

    def __init__(self) -> None:
        self._values = array("d")

    def extend(self, values: NDArray[Any]) -> None:
        self._values.frombytes(np.asarray(values, np.float64).tobytes())

    def values(self) -> NDArray[np.float64]:
        return np.array(self._values, np.float64)


class Totals:
    """Adds up frames."""

    def __init__(self) -> None:
        self.images = 0
        self.score_range = (np.inf, -np.inf)
        self.masks, self.masks_code = s2m.CurveMean(), s2m.CurveMean()
        self.per_image: list[dict[str, Any]] = []
        self._missed = np.zeros(instance.OVERLAPS.size, np.int64)
        self._columns: dict[str, _Column] = {}
        self._right = array("b")
        self._timings: dict[str, _Column] = {}
        self._outside: dict[str, _Column] = {}

    def _extend(self, **columns: NDArray[Any]) -> None:
        for key, values in columns.items():
            self._columns.setdefault(key, _Column()).extend(values)

    def _column(self, key: str) -> NDArray[np.float64]:
        return self._columns.setdefault(key, _Column()).values()

    def add(self, frame: FrameMeasure) -> instance.Verdicts:
        """Adds a frame; returns the verdicts on its predictions."""
        self.images += 1
        low, high = frame.score_range
        self.score_range = (min(self.score_range[0], low), max(self.score_range[1], high))
        iou, f1 = self.masks.add(frame.masks)
        self.masks_code.add(frame.masks_code)
        judged = instance.judge(frame.instances)
        self._missed += judged.missed
        self._right.frombytes(judged.right.tobytes())
        self._extend(score=judged.scores, area_px=frame.instances.area_px)
        self._extend(siou=frame.components.siou, ppv=frame.components.ppv)
        truth = frame.truth
        self._extend(truth_px=truth.area_px, bottom=truth.bottom, mask_iou=truth.mask_iou, box_iou=truth.box_iou)
        for columns, times in ((self._timings, frame.timings_ms), (self._outside, frame.outside_ms)):
            for stage, ms in times.items():
                columns.setdefault(stage, _Column()).extend(np.array([ms]))
        self.per_image.append(
            {
                "name": frame.name,
                "height": frame.height,
                "width": frame.width,
                "anomalous_px": frame.masks.positives,
                "iou": iou,
                "f1": f1,
                "instances": int(frame.instances.scores.size),
                "truth_instances": int(truth.area_px.size),
                "found": int(np.count_nonzero(truth.mask_iou > 0.5)),
                "total_ms": frame.timings_ms.get("total"),
            }
        )
        return judged

    def components(self) -> component.ComponentScores:
        """Components of the union of the masks."""
        return component.scores_of(component.ComponentMatch(self._column("siou"), self._column("ppv")))

    def instances(self) -> instance.InstanceScores:
        """Instance AP."""
        return instance.scores_of(instance.Verdicts(self._column("score"), self._verdicts(), self._missed))

    def _verdicts(self) -> NDArray[np.int8]:
        return np.array(self._right, np.int8).reshape(-1, instance.OVERLAPS.size)

    def timings(self) -> dict[str, dict[str, float]]:
        """Percentiles of the pipeline's stages, ms."""
        return _percentiles(self._timings)

    def outside(self) -> dict[str, dict[str, float]]:
        """Percentiles of the work beside the pipeline, ms."""
        return _percentiles(self._outside)

    def outside_share(self, pooled_ms: float) -> float:
        """Share of the time in which the pipeline waited for reading and measuring, and of pooling.

        Where the pipeline ran elsewhere its waits are not known, and what was measured counts instead.
        """
        counted = [self._outside["idle"]] if "idle" in self._outside else list(self._outside.values())
        outside = pooled_ms + sum(column.values().sum() for column in counted)
        inside = self._timings["total"].values().sum() if "total" in self._timings else 0.0
        return float(outside / (outside + inside))

    def sizes(self) -> list[dict[str, Any]]:
        """Recall by size of the ground-truth instance, px."""
        return self._recall(SIZE_EDGES_PX, self._column("truth_px"))

    def bands(self) -> list[dict[str, Any]]:
        """Recall by where the ground-truth instance ends in the image: on a road, lower is nearer."""
        return self._recall(BOTTOM_EDGES, self._column("bottom"))

    def _recall(self, edges: Sequence[float | None], key: NDArray[np.float64]) -> list[dict[str, Any]]:
        """Share of the ground-truth instances that a prediction, or a prompt box, overlaps with IoU above 0.5, by a key's range."""
        mask_iou, box_iou = self._column("mask_iou"), self._column("box_iou")
        rows = []
        for low, high in pairwise(edges):
            chosen = (key >= (low or 0.0)) & (key < (np.inf if high is None else high))
            count = int(chosen.sum())
            boxes = box_iou[chosen]
            rows.append(
                {
                    "from": low,
                    "to": high,
                    "truth": count,
                    "found": int(np.count_nonzero(mask_iou[chosen] > 0.5)),
                    "recall": float(np.mean(mask_iou[chosen] > 0.5)) if count else None,
                    "box_recall": float(np.mean(boxes > 0.5)) if count and np.isfinite(boxes).all() else None,
                    "mean_iou": float(mask_iou[chosen].mean()) if count else None,
                }
            )
        return rows

    def false_alarms(self) -> list[dict[str, Any]]:
        """False predictions (no IoU above 0.5, not excused by ignored area) by size."""
        wrong = self._column("area_px")[self._verdicts()[:, 0] < 0]
        counts = np.histogram(wrong, [*SIZE_EDGES_PX[:-1], np.inf])[0]
        return [
            {"from": low, "to": high, "count": int(count), "per_image": count / self.images}
            for low, high, count in zip(SIZE_EDGES_PX[:-1], SIZE_EDGES_PX[1:], counts, strict=True)
        ]

    def reliability(self) -> list[dict[str, Any]]:
        """How often instances of a score are right (IoU > 0.5), those on ignored area left out."""
        verdict = self._verdicts()[:, 0]
        scores, right = self._column("score")[verdict != 0], verdict[verdict != 0] > 0
        bins = np.minimum((scores * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
        return [
            {
                "from": k / RELIABILITY_BINS,
                "to": (k + 1) / RELIABILITY_BINS,
                "instances": int(np.count_nonzero(bins == k)),
                "mean_score": float(scores[bins == k].mean()) if np.any(bins == k) else None,
                "right": float(right[bins == k].mean()) if np.any(bins == k) else None,
            }
            for k in range(RELIABILITY_BINS)
        ]


def _percentiles(columns: Mapping[str, _Column]) -> dict[str, dict[str, float]]:
    result = {}
    for stage, column in columns.items():
        values = column.values()
        result[stage] = {"p50": float(np.percentile(values, 50)), "p95": float(np.percentile(values, 95)), "mean": float(values.mean())}
    return result
