from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.datasets import LabelledImage, open_dataset
from ros2_ood_seg.evaluation.pixel import ScoreCounts, check_scores, curve_of, pool


def closest_rule(label: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    """FPR at the recall nearest to 0.95, as the evaluator shared by Hendrycks, PEBAL and RPL walks the curve."""
    order = np.argsort(scores, kind="mergesort")[::-1]
    label, scores = label[order], scores[order]
    last = np.append(np.flatnonzero(np.diff(scores)), label.size - 1)
    hits = np.cumsum(label)[last]
    alarms = 1 + last - hits
    recall = hits / hits[-1]
    down = slice(int(np.searchsorted(hits, hits[-1])), None, -1)
    recall, alarms = np.append(recall[down], 1), np.append(alarms[down], 0)
    return float(alarms[np.argmin(np.abs(recall - 0.95))] / np.count_nonzero(label == 0))


def assert_like_sklearn(scores: NDArray[np.float32], label: NDArray[np.uint8]) -> None:
    curve = curve_of(scores, label)
    valid = label.ravel() != 255
    s, y = scores.ravel()[valid].astype(np.float64), label.ravel()[valid].astype(np.int64)
    assert curve.ap() == pytest.approx(average_precision_score(y, s), abs=1e-9)
    assert curve.auroc() == pytest.approx(roc_auc_score(y, s), abs=1e-9)
    fpr, tpr, _ = roc_curve(y, s, drop_intermediate=False)
    assert curve.fpr_at_recall(rule="ge") == pytest.approx(fpr[np.searchsorted(tpr, 0.95)], abs=1e-12)
    assert curve.fpr_at_recall(rule="gt") == pytest.approx(fpr[np.flatnonzero(tpr > 0.95)[0]], abs=1e-12)
    assert curve.fpr_at_recall(rule="closest") == pytest.approx(closest_rule(y, s), abs=1e-12)
    precision, recall, thresholds = precision_recall_curve(y, s)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    best = curve.best_f1()
    assert best is not None
    assert best[0] == pytest.approx(f1.max(), abs=1e-9)
    at = f1[:-1][thresholds == best[1]]
    assert at == pytest.approx(f1.max(), abs=1e-9)


maps = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(max_examples=60, deadline=None)
@given(
    label=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=st.sampled_from([0, 1, 255])),
    rng=maps,
    levels=st.sampled_from([1, 2, 5, 50, 0]),
)
def test_equals_scikit_learn_on_random_maps_with_ties(label: NDArray[np.uint8], rng: np.random.Generator, levels: int) -> None:
    label = label.copy()
    label.flat[0] = 0
    label = np.vstack([label, np.ones((1, label.shape[1]), np.uint8)])
    scores = rng.standard_normal(label.shape).astype(np.float32)
    if levels:
        scores = np.round(scores * levels / 4) / np.float32(levels)
    assert_like_sklearn(scores, label)


@pytest.mark.parametrize("name", ["road_anomaly_21", "road_obstacle_21", "fishyscapes_static"])
def test_equals_scikit_learn_on_real_labels(shared_dir: Path, name: str) -> None:
    dataset = open_dataset("folder", shared_dir / "data" / name)
    frames = [dataset.load(source) for source in dataset.sources[:2]]
    frames = [LabelledImage(f.name, f.image[::2, ::2], f.label[::2, ::2]) for f in frames]
    rng = np.random.default_rng(0)
    scores = [(frame.image.mean(axis=2) * rng.uniform(0.9, 1.1, frame.label.shape)).astype(np.float32) for frame in frames]
    assert_like_sklearn(np.concatenate([s.ravel() for s in scores])[None], np.concatenate([f.label.ravel() for f in frames])[None])


@settings(max_examples=30, deadline=None)
@given(rng=maps, frames=st.integers(1, 6), levels=st.sampled_from([3, 1000]))
def test_pooling_frames_equals_pooling_their_pixels(rng: np.random.Generator, frames: int, levels: int) -> None:
    scores = [np.floor(rng.uniform(0, levels, 200)).astype(np.float32) for _ in range(frames)]
    labels = [(rng.uniform(size=200) < 0.3).astype(np.uint8) for _ in range(frames)]
    labels[0][:2] = [0, 1]
    pooled = pool(
        [ScoreCounts.from_values(s[y == 1]) for s, y in zip(scores, labels, strict=True)],
        [ScoreCounts.from_values(s[y == 0]) for s, y in zip(scores, labels, strict=True)],
    )
    together = curve_of(np.concatenate(scores)[None], np.concatenate(labels)[None])
    for field, values in vars(pooled).items():
        np.testing.assert_array_equal(values, getattr(together, field))


def test_the_three_fpr_rules_differ_on_a_mask_only_map() -> None:
    # 2000 anomalous of 100000 px, a mask of constant score that finds 91 % of them and 300 others.
    label = np.zeros(100_000, np.uint8)
    label[:2000] = 1
    scores = np.zeros(100_000, np.float32)
    scores[:1820] = 0.9
    scores[2000:2300] = 0.9
    curve = curve_of(scores, label)
    assert curve.fpr_at_recall(rule="closest") == pytest.approx(300 / 98_000)
    assert curve.fpr_at_recall(rule="ge") == 1.0
    assert curve.fpr_at_recall(rule="gt") == 1.0


def test_constant_scores_give_the_prevalence() -> None:
    label = np.array([[0, 0, 0, 1, 255]], np.uint8)
    curve = curve_of(np.full(label.shape, 3.0, np.float32), label)
    assert curve.ap() == pytest.approx(0.25)
    assert curve.auroc() == pytest.approx(0.5)


@pytest.mark.parametrize(("label", "negatives"), [([255, 255, 255], 0), ([0, 0, 255], 2)])
def test_without_anomalies_there_is_no_value(label: list[int], negatives: int) -> None:
    curve = curve_of(np.array([[0.1, 0.2, 0.3]], np.float32), np.array([label], np.uint8))
    assert curve.negatives == negatives
    assert (curve.ap(), curve.auroc(), curve.fpr_at_recall(), curve.best_f1(), curve.ap_bounds()) == (None, None, None, None, None)


def test_with_anomalies_only_ap_is_one() -> None:
    curve = curve_of(np.array([[0.1, 0.2]], np.float32), np.ones((1, 2), np.uint8))
    assert curve.ap() == 1.0
    assert curve.auroc() is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    scores = np.zeros((4, 5), np.float32)
    scores[2, 3] = bad
    with pytest.raises(InputError, match=r"frame 7: 1 scores are not finite.*x=3, y=2"):
        check_scores(scores, np.full((4, 5), 255, np.uint8), "frame 7")


def test_sizes_that_differ_are_refused() -> None:
    with pytest.raises(InputError, match=r"4x5.*4x6"):
        check_scores(np.zeros((4, 5), np.float32), np.zeros((4, 6), np.uint8), "frame")


def test_an_unknown_rule_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="ge, gt, closest"):
        curve_of(np.zeros((1, 2), np.float32), np.array([[0, 1]], np.uint8)).fpr_at_recall(rule="best")  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    values=hnp.arrays(np.float32, st.integers(0, 60), elements=st.sampled_from([0.0, 0.25, 0.3, 0.7, 1.0, -2.0])),
    thresholds=hnp.arrays(np.float64, 5, elements=st.sampled_from([0.0, 0.3, float(np.float32(0.3)), 0.7, 1.0, -3.0, 5.0])),
)
def test_counts_above_decide_like_comparison_in_double(values: NDArray[np.float32], thresholds: NDArray[np.float64]) -> None:
    counts = ScoreCounts.from_values(values)
    expected = [np.count_nonzero(values.astype(np.float64) > t) for t in thresholds]
    np.testing.assert_array_equal(counts.above(thresholds), expected)
    assert counts.total == values.size


def test_coarse_scores_bound_the_exact_ap() -> None:
    rng = np.random.default_rng(3)
    label = (rng.uniform(size=40_000) < 0.05).astype(np.uint8)
    scores = (rng.normal(size=label.size) + 1.5 * label).astype(np.float32)
    exact = curve_of(scores[None], label[None]).ap()
    coarse = pool([ScoreCounts.from_values(scores[label == 1], 12)], [ScoreCounts.from_values(scores[label == 0], 12)])
    bounds = coarse.ap_bounds()
    assert exact is not None
    assert bounds is not None
    assert bounds[0] <= exact <= bounds[1]
    assert bounds[1] - bounds[0] < 0.01
    assert coarse.ap() == pytest.approx(exact, abs=2e-3)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_threshold_of_coarse_scores_is_one_of_the_exact_ones(sign: float) -> None:
    rng = np.random.default_rng(5)
    label = (rng.uniform(size=20_000) < 0.1).astype(np.uint8)
    # As masks of one score each, none of which the bits that stay can hold.
    scores = sign * rng.choice([0.3, 0.7, 1.7], size=label.size) + 2.1 * label.astype(np.float32) * (rng.uniform(size=label.size) < 0.8)
    scores = (scores - 3.0 * (sign < 0)).astype(np.float32)
    coarse = pool([ScoreCounts.from_values(scores[label == 1], 12)], [ScoreCounts.from_values(scores[label == 0], 12)])
    best = coarse.best_f1()
    assert best is not None
    predicted = scores >= np.float32(best[1])
    f1 = 2 * np.count_nonzero(predicted & (label == 1)) / (np.count_nonzero(predicted) + np.count_nonzero(label))
    assert best[0] == pytest.approx(f1)


def test_coarse_scores_stay_finite() -> None:
    ends = np.array([np.finfo(np.float32).min, np.finfo(np.float32).max], np.float32)
    for bits in (1, 12, 22):
        assert np.isfinite(ScoreCounts.from_values(ends, bits).values).all()


def test_a_thinned_curve_keeps_the_ends() -> None:
    rng = np.random.default_rng(0)
    label = (rng.uniform(size=5000) < 0.5).astype(np.uint8)
    curve = curve_of(rng.normal(size=(1, 5000)), label[None])
    thin = curve.thinned(50)
    assert thin.thresholds.size <= 50
    assert thin.positives == curve.positives
    assert thin.ap() == pytest.approx(curve.ap(), abs=0.03)


def test_pooling_many_files_needs_few_descriptors(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")

    def frames() -> Iterator[ScoreCounts]:
        for k in range(150):
            paths = [tmp_path / f"{k}_{what}.npy" for what in ("values", "counts")]
            np.save(paths[0], np.array([0.1, 0.9], np.float32))
            np.save(paths[1], np.array([3, 5]))
            yield ScoreCounts(*(np.load(path, mmap_mode="r") for path in paths))

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 60, hard))
    try:
        curve = pool(frames(), [ScoreCounts.from_values(np.array([0.1, 0.2], np.float32))])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert curve.true_positives.tolist() == [750, 1200]
