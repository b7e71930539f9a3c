"""Pixel metrics, pooled over all valid pixels of a data set: AP, FPR at 95 % TPR, AuROC, best F1.

Everything a threshold sweep says follows from the positive pixels' scores and from how many negative pixels lie at and
between them. So one frame is reduced to its sorted scores (:class:`ScoreCounts`), and the frames are pooled exactly in two
passes (:func:`pool`) that hold the distinct positive scores and one frame in memory, never all pixels. The results equal
scikit-learn's on the concatenated pixels up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.errors import InputError

FprRule = Literal["ge", "gt", "closest"]
"""Where on the curve FPR95 is read: at the first threshold with recall >= 0.95 (``ge``: SegmentMeIfYouCan, Fishyscapes),
> 0.95 (``gt``: UGainS), or with the recall nearest to 0.95, which may be below it (``closest``: Hendrycks, PEBAL, RPL, S2M)."""

FPR_RULES: tuple[FprRule, ...] = get_args(FprRule)
MERGE_AT = 1 << 18
"""So many scores of anomalous pixels are collected before equal ones are added up."""


@dataclass(frozen=True)
class ScoreCounts:
    """Sorted scores of a set of pixels.

    Args:
        values: (K,) float32, ascending, finite.
        counts: (K,) uint32 number of pixels with each value, ``values`` then strictly ascending; None when every entry is one pixel.
    """

    values: NDArray[np.float32]
    counts: NDArray[np.uint32] | None = None

    @classmethod
    def from_values(cls, values: NDArray[np.float32], dropped_bits: int = 0) -> ScoreCounts:
        """Sorts scores.

        Args:
            values: (K,) float32, finite, any order.
            dropped_bits: Mantissa bits (0 to 22) that are cut off, downwards, to make many values equal: 0 keeps the scores
                exact, 12 leaves a relative resolution of 2**-11 and so bounds the number of distinct values.
        """
        if dropped_bits:
            dropped = np.uint32((1 << dropped_bits) - 1)
            bits = values.view(np.uint32)
            # Never upwards: what reaches a value when it is cut has to reach it as it was, or thresholds would mean something else.
            cut = (np.where(values < 0, bits + dropped, bits) & ~dropped).view(np.float32)
            values = np.maximum(cut, np.finfo(np.float32).min)
        result = cls(np.sort(values))
        distinct = np.count_nonzero(result.values[1:] != result.values[:-1]) + 1
        return cls(*result.distinct()) if 2 * distinct <= values.size else result

    @property
    def total(self) -> int:
        """Number of pixels."""
        return int(self.values.size if self.counts is None else self.counts.sum(dtype=np.int64))

    def distinct(self) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
        """The distinct values, strictly ascending, and how many pixels have each."""
        if self.counts is not None:
            return self.values, self.counts
        if self.values.size == 0:
            return self.values, np.zeros(0, np.uint32)
        starts = np.flatnonzero(np.concatenate([[True], self.values[1:] != self.values[:-1]]))
        return self.values[starts], np.diff(starts, append=self.values.size).astype(np.uint32)

    def above(self, thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
        """How many pixels score strictly above each threshold; (T,) int64."""
        at = np.searchsorted(self.values, _round_down(thresholds), side="right")
        if self.counts is None:
            return (self.values.size - at).astype(np.int64)
        cumulated = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        result: NDArray[np.int64] = cumulated[-1] - cumulated[at]
        return result

    def ranks(self, values: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many pixels score below each of some values, and how many at most that; both (V,) int64.

        Args:
            values: (V,) float32, strictly ascending.
        """
        cumulated = None if self.counts is None else np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        if values.size <= self.values.size // 4:
            below, up_to = (np.searchsorted(self.values, values, side=side).astype(np.int64) for side in ("left", "right"))
            return (below, up_to) if cumulated is None else (cumulated[below], cumulated[up_to])
        # Searching the shorter of the two lists in the longer one is what takes the time.
        at = np.searchsorted(values, self.values)
        ends = np.cumsum(np.bincount(at, minlength=values.size + 1))[: values.size]
        tied = values[np.minimum(at, values.size - 1)] == self.values
        starts = ends - np.bincount(at[tied], minlength=values.size)
        return (starts, ends) if cumulated is None else (cumulated[starts], cumulated[ends])


def _round_down(thresholds: NDArray[np.float64]) -> NDArray[np.float32]:
    """The greatest float32 not above each threshold: ``float32 > threshold`` decides the same against either."""
    rounded = np.asarray(thresholds, dtype=np.float64).astype(np.float32)
    lower: NDArray[np.float32] = np.where(rounded > thresholds, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    return lower


def check_scores(scores: NDArray[Any], label: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
    """Checks a score map against its label map.

    Args:
        scores: (H, W) real numbers, higher = more anomalous.
        label: (H, W) uint8: 0 normal, 1 anomaly, 255 ignore.
        name: The frame, for messages.

    Returns:
        ``scores`` as float32.

    Raises:
        InputError: Another shape, or a score that is NaN or infinite, ignored pixels included.
    """
    scores = np.asarray(scores, dtype=np.float32)
    if scores.shape != label.shape:
        raise InputError(f"{name}: the score map is {_size(scores)}, its label map {_size(label)}; they must be equal")
    if scores.size and not (np.isfinite(scores.min()) and np.isfinite(scores.max())):
        finite = np.isfinite(scores)
        y, x = np.argwhere(~finite)[0]
        raise InputError(
            f"{name}: {np.count_nonzero(~finite)} scores are not finite, the first is {scores[y, x]} at x={x}, y={y}; "
            "only finite scores can be ranked"
        )
    return scores


def _size(array: NDArray[Any]) -> str:
    return "x".join(str(n) for n in array.shape)


@dataclass(frozen=True)
class PixelCurve:
    """The pooled threshold sweep, one entry per distinct score of a positive pixel, from the highest score down.

    Args:
        thresholds: (K,) float32, strictly descending; a pixel is predicted anomalous when its score is >= the threshold.
        true_positives: (K,) int64, cumulative.
        false_positives: (K,) int64, cumulative, at the threshold.
        false_positives_end: (K,) int64, at the lowest threshold that still has the same recall.
        ties: (K,) int64 negatives with exactly the threshold's score.
        negatives: Number of negative pixels.
    """

    thresholds: NDArray[np.float32]
    true_positives: NDArray[np.int64]
    false_positives: NDArray[np.int64]
    false_positives_end: NDArray[np.int64]
    ties: NDArray[np.int64]
    negatives: int

    @property
    def positives(self) -> int:
        """Number of positive pixels."""
        return int(self.true_positives[-1]) if self.true_positives.size else 0

    @property
    def recall(self) -> NDArray[np.float64]:
        """(K,) share of the positives found."""
        return self.true_positives / max(self.positives, 1)

    @property
    def precision(self) -> NDArray[np.float64]:
        """(K,) share of the predicted pixels that are positive."""
        return self.true_positives / (self.true_positives + self.false_positives)

    def _gained(self) -> NDArray[np.int64]:
        return np.diff(self.true_positives, prepend=0)

    def ap(self) -> float | None:
        """Step-wise area under precision over recall (scikit-learn's ``average_precision_score``); None without positives."""
        if not self.positives:
            return None
        return float(np.dot(self._gained(), self.precision) / self.positives)

    def ap_bounds(self) -> tuple[float, float] | None:
        """What AP lies between in any order among equal scores, wider than it need be: the error of :func:`pool` on coarsened scores."""
        if not self.positives:
            return None
        gained = self._gained()
        before = self.true_positives - gained
        lower = np.dot(gained, (before + 1) / (before + 1 + self.false_positives))
        upper = np.dot(gained, self.true_positives / (self.true_positives + self.false_positives - self.ties))
        return float(lower / self.positives), float(upper / self.positives)

    def auroc(self) -> float | None:
        """Chance that a positive pixel outscores a negative one, ties counting half; None without both kinds."""
        if not self.positives or not self.negatives:
            return None
        below = self.negatives - self.false_positives + 0.5 * self.ties
        return float(np.dot(self._gained() / self.positives, below / self.negatives))

    def fpr_at_recall(self, recall: float = 0.95, rule: FprRule = "ge") -> float | None:
        """False positive rate where the recall is reached, read by one of :data:`FPR_RULES`; None without both kinds.

        Raises:
            InputError: An unknown rule.
        """
        if rule not in FPR_RULES:
            raise InputError(f"FPR rule '{rule}' is unknown: use one of {', '.join(FPR_RULES)}")
        if not self.positives or not self.negatives:
            return None
        reached = self.recall
        if rule == "closest":
            # As the evaluator that Hendrycks, PEBAL and RPL share: from full recall down, the first of the nearest ones wins,
            # and at equal recall the lowest threshold, except at full recall, where its curve starts at the highest.
            at = self.thresholds.size - 1 - int(np.argmin(np.abs(reached[::-1] - recall)))
            last = at == self.thresholds.size - 1
            return float((self.false_positives if last else self.false_positives_end)[at] / self.negatives)
        side: Literal["left", "right"] = "left" if rule == "ge" else "right"
        at = min(int(np.searchsorted(reached, recall, side=side)), self.thresholds.size - 1)
        return float(self.false_positives[at] / self.negatives)

    def best_f1(self) -> tuple[float, float] | None:
        """Greatest pixel F1 and the threshold (score >= threshold) that reaches it; None without positives."""
        if not self.positives:
            return None
        f1 = 2 * self.true_positives / (self.true_positives + self.false_positives + self.positives)
        at = int(np.argmax(f1))
        return float(f1[at]), float(self.thresholds[at])

    def thinned(self, points: int = 256) -> PixelCurve:
        """At most ``points`` entries, evenly spaced in recall, for plots."""
        if self.thresholds.size <= points:
            return self
        targets = np.linspace(self.true_positives[0], self.positives, points)
        keep = np.unique(np.searchsorted(self.true_positives, targets))
        return PixelCurve(
            self.thresholds[keep],
            self.true_positives[keep],
            self.false_positives[keep],
            self.false_positives_end[keep],
            self.ties[keep],
            self.negatives,
        )


def pool(positives: Iterable[ScoreCounts], negatives: Iterable[ScoreCounts]) -> PixelCurve:
    """Pools frames into one threshold sweep, exactly.

    Args:
        positives: Sorted scores of each frame's anomalous pixels; iterated once, their distinct values are kept.
        negatives: Sorted scores of each frame's normal pixels; iterated once, one frame in memory at a time.
    """
    values, gained = _merged(positives)
    below, up_to = np.zeros(values.size, np.int64), np.zeros(values.size, np.int64)
    total = 0
    for frame in negatives:
        total += frame.total
        frame_below, frame_up_to = frame.ranks(values)
        below += frame_below
        up_to += frame_up_to
    return PixelCurve(
        thresholds=values[::-1],
        true_positives=np.cumsum(gained[::-1]),
        false_positives=total - below[::-1],
        false_positives_end=total - np.append(0, up_to)[-2::-1],
        ties=(up_to - below)[::-1],
        negatives=total,
    )


def _merged(parts: Iterable[ScoreCounts]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Distinct scores of many frames, strictly ascending, and how many pixels have each."""
    values, counts = np.zeros(0, np.float32), np.zeros(0, np.int64)
    waiting: list[tuple[NDArray[np.float32], NDArray[Any]]] = []
    size = 0
    for part in parts:
        # Copies: views of files would keep two descriptors open for every frame.
        waiting.append(tuple(np.array(array) for array in part.distinct()))  # type: ignore[arg-type]
        size += waiting[-1][0].size
        # As much again as there is: each score is moved a few times in all, and equal scores do not pile up.
        if size > max(MERGE_AT, values.size):
            values, counts = _union([(values, counts), *waiting])
            waiting, size = [], 0
    return _union([(values, counts), *waiting])


def _union(parts: Sequence[tuple[NDArray[np.float32], NDArray[Any]]]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    values = np.unique(np.concatenate([part for part, _ in parts]))
    counts = np.zeros(values.size, np.int64)
    for part, times in parts:
        counts[np.searchsorted(values, part)] += times
    return values, counts


def curve_of(scores: NDArray[Any], label: NDArray[np.uint8], name: str = "score map") -> PixelCurve:
    """The sweep of one map, or of maps concatenated by the caller.

    Args:
        scores: Finite scores, any shape.
        label: Same shape, uint8: 0 normal, 1 anomaly, 255 ignore.
        name: For messages.

    Raises:
        InputError: Shapes that differ or scores that are not finite.
    """
    checked = check_scores(np.atleast_2d(scores), np.atleast_2d(label), name)
    label = np.atleast_2d(label)
    return pool([ScoreCounts.from_values(checked[label == 1])], [ScoreCounts.from_values(checked[label == 0])])
