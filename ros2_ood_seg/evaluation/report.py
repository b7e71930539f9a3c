"""Measured frames to ``report.json``."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ros2_ood_seg import __version__
from ros2_ood_seg.config import PipelineConfig
from ros2_ood_seg.evaluation import component, instance, pixel, s2m
from ros2_ood_seg.evaluation.compare import ImageCounts, histogram
from ros2_ood_seg.evaluation.measure import FrameMeasure, PartStore

RULES = {
    "pixel": "pooled over all images, label 255 left out; AP is the sum of recall steps times precision, as scikit-learn's",
    "fpr95": "ge: false positive rate at the first threshold with recall >= 0.95 (SegmentMeIfYouCan, Fishyscapes); "
    "gt: recall > 0.95 (UGainS); closest: recall nearest to 0.95, may be below it (PEBAL, RPL, S2M)",
    "baseline": "the scorer's own map under S2M's protocol, scaled by the lowest and highest score of the whole set, "
    "ignored pixels included (S2M Eq. 8); iou_best is at the best of 101 thresholds on this very set; label 255 left out",
    "s2m": "per image, then mean over images (an image without anomaly counts 0); iou: union of all masks, no threshold; "
    "iou_best: best of 101 thresholds; auiou: trapezoid over the thresholds; mean_f1: mean over the thresholds; label 255 left out",
    "s2m_code": "as s2m, but predictions on label 255 count as wrong, as the released code counts",
    "component": "SegmentMeIfYouCan: refined map above the threshold of its best pooled pixel F1, 8-connected, F1* over 11 thresholds",
    "component_masks": "the same on the union of the instance masks: no threshold, no minimum predicted size",
    "instance": "Cityscapes instance AP: overlaps 0.50:0.05:0.95, a match is IoU > overlap, minimum region 10 px, ranked by score",
}
SIZE_EDGES_PX = (0, 100, 1_000, 10_000, 100_000, None)
BOTTOM_EDGES = (0.0, 0.45, 0.55, 0.7, 0.85, None)
RELIABILITY_BINS = 10
CURVE_POINTS = 200


def build_report(
    store: PartStore,
    names: Sequence[str],
    *,
    dataset: str,
    config: PipelineConfig,
    device: str,
    fpr_rule: pixel.FprRule,
    minimum: component.Minimum,
    exact: bool,
    instance_rule: str,
) -> tuple[dict[str, Any], ImageCounts]:
    """Pools finished frames.

    Args:
        store: Where they are.
        names: Which, in order.
        dataset: Name for the report.
        config: What ran.
        device: Where it ran.
        fpr_rule: Which rule ``fpr95`` follows.
        minimum: Least component sizes.
        exact: Scores are not coarsened, and maps were kept.
        instance_rule: Where the ground-truth instances come from.

    Returns:
        Plain data, where a value that the profile or the data cannot have is None; the counts of every image.
    """
    start = time.perf_counter()
    frames = [store.load(name) for name in names]
    curves = {
        kind: pixel.pool((store.counts(name, kind, 1) for name in names), (store.counts(name, kind, 0) for name in names))
        for kind in ("score", "refined")
    }
    thresholds = s2m.scaled_thresholds(min(f.score_range[0] for f in frames), max(f.score_range[1] for f in frames))
    baseline_sweeps = [s2m.sweep(store.counts(name, "score", 1), [store.counts(name, "score", 0)], thresholds) for name in names]
    baseline, masks, masks_code = (
        s2m.summarise(sweeps) for sweeps in (baseline_sweeps, [f.masks for f in frames], [f.masks_code for f in frames])
    )
    best = curves["refined"].best_f1()
    # The benchmark predicts score > threshold; the next lower number makes that the same as score >= the best threshold.
    threshold = None if best is None or not exact else float(np.nextafter(np.float32(best[1]), np.float32(-np.inf)))
    matches = [] if threshold is None else [_component_match(store, name, threshold, minimum) for name in names]
    instances = instance.summarise(f.instances for f in frames)
    by_map = component.summarise(matches)
    by_mask = component.summarise(f.components for f in frames)
    iou, f1 = s2m.per_image([f.masks for f in frames])
    counts = ImageCounts(
        names=np.array(names),
        score=_histogram(store, names, "score", curves["score"]),
        refined=_histogram(store, names, "refined", curves["refined"]),
        masks=_sweeps([f.masks for f in frames]),
        baseline=_sweeps(baseline_sweeps),
        components=np.array([component.counts_at_taus(match) for match in matches], np.int64).reshape(-1, 3, component.TAUS.size),
        **_decisions([f.instances for f in frames]),
    )
    pooled_ms = (time.perf_counter() - start) * 1e3
    report = {
        "dataset": dataset,
        "profile": config.profile,
        "images": len(frames),
        "pixel": _pixel(curves["score"], fpr_rule, exact),
        "refined": _pixel(curves["refined"], fpr_rule, exact),
        "baseline": _s2m(baseline) | {"score_range": [float(thresholds[0]), float(thresholds[-1])]},
        "s2m": _s2m(masks),
        "s2m_code": _s2m(masks_code),
        "component": vars(by_map) | {"threshold": threshold},
        "component_masks": vars(by_mask),
        "instance": {"ap": instances.ap, "ap50": instances.ap50, "by_overlap": list(instances.by_overlap)},
        "timings_ms": _timings([f.timings_ms for f in frames]),
        "outside_ms": _timings([f.outside_ms for f in frames]) | {"pooling": {"total": pooled_ms}},
        "outside_share": _outside_share(frames, pooled_ms),
        "sizes": _recall(frames, SIZE_EDGES_PX, [f.truth.area_px for f in frames]),
        "bands": _recall(frames, BOTTOM_EDGES, [f.truth.bottom for f in frames]),
        "false_alarms": _false_alarms(frames),
        "reliability": _reliability(frames),
        "rules": RULES
        | {
            "fpr95_rule": fpr_rule,
            "component_minimum_px": vars(minimum),
            "instances_from": instance_rule,
            "exact": exact,
            "confidence": "the refined map"
            if config.fusion.name == "s2m"
            else "highest score of the instances that cover a pixel, 0 outside all of them",
        },
        "curves": {
            "thresholds": list(s2m.THRESHOLDS),
            "iou": {"s2m": _curve(masks, "iou_curve"), "baseline": _curve(baseline, "iou_curve")},
            "f1": {"s2m": _curve(masks, "f1_curve"), "baseline": _curve(baseline, "f1_curve")},
            "precision_recall": {kind: _precision_recall(curve) for kind, curve in curves.items()},
        },
        "per_image": [
            {
                "name": frame.name,
                "height": frame.height,
                "width": frame.width,
                "anomalous_px": frame.masks.positives,
                "iou": float(iou[k, 0]),
                "f1": float(f1[k, 0]),
                "baseline_iou": _ratio(baseline_sweeps[k], round((baseline.threshold if baseline else 0.0) * 100)),
                "instances": int(frame.instances.scores.size),
                "truth_instances": int(frame.instances.truth_px.size),
                "found": int(np.count_nonzero(frame.truth.mask_iou > 0.5)),
                "total_ms": frame.timings_ms.get("total"),
            }
            for k, frame in enumerate(frames)
        ],
        "config": config.model_dump(),
        "versions": versions(),
        "hardware": hardware(device),
    }
    return report, counts


def _histogram(store: PartStore, names: Sequence[str], kind: str, curve: pixel.PixelCurve) -> NDArray[np.int64]:
    return histogram(curve, ((store.counts(name, kind, 1), store.counts(name, kind, 0)) for name in names))


def _sweeps(sweeps: list[s2m.MaskSweep]) -> NDArray[np.int64]:
    return np.array([[sweep.hits, sweep.extra, np.full_like(sweep.hits, sweep.positives)] for sweep in sweeps])


def _decisions(images: list[instance.InstanceMatch]) -> dict[str, Any]:
    rows: list[tuple[int, int, bool, float]] = []
    missed = np.zeros((len(images), len(instance.OVERLAPS)), np.int64)
    for k, image in enumerate(images):
        for j, overlap in enumerate(instance.OVERLAPS):
            decided = instance.decide(image, overlap)
            missed[k, j] = decided.missed
            rows += [(k, j, True, score) for score in decided.right] + [(k, j, False, score) for score in decided.wrong]
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    return {
        "instance_image": np.array(columns[0], np.int64),
        "instance_overlap": np.array(columns[1], np.int64),
        "instance_right": np.array(columns[2], bool),
        "instance_score": np.array(columns[3], np.float64),
        "missed": missed,
    }


def _component_match(store: PartStore, name: str, threshold: float, minimum: component.Minimum) -> component.ComponentMatch:
    refined, label = store.map(name)
    return component.match(refined > np.float32(threshold), label, minimum)


def _pixel(curve: pixel.PixelCurve, rule: pixel.FprRule, exact: bool) -> dict[str, Any]:
    best = curve.best_f1()
    return {
        "ap": curve.ap(),
        "ap_bounds": None if exact else curve.ap_bounds(),
        "fpr95": curve.fpr_at_recall(rule=rule),
        **{f"fpr95_{name}": curve.fpr_at_recall(rule=name) for name in pixel.FPR_RULES},
        "auroc": curve.auroc(),
        "best_f1": best and best[0],
        "best_f1_threshold": best and best[1],
        "positives": curve.positives,
        "negatives": curve.negatives,
    }


def _s2m(scores: s2m.MaskScores | None) -> dict[str, Any]:
    keys = ("iou", "iou_best", "threshold", "auiou", "mean_f1")
    return {key: scores and getattr(scores, key) for key in keys}


def _curve(scores: s2m.MaskScores | None, name: str) -> list[float] | None:
    return None if scores is None else [round(float(v), 6) for v in getattr(scores, name)]


def _ratio(image: s2m.MaskSweep, at: int) -> float:
    union = int(image.extra[at]) + image.positives
    return int(image.hits[at]) / union if union else 0.0


def _precision_recall(curve: pixel.PixelCurve) -> dict[str, list[float]]:
    thin = curve.thinned(CURVE_POINTS)
    return {
        "recall": [round(float(v), 6) for v in thin.true_positives / max(curve.positives, 1)],
        "precision": [round(float(v), 6) for v in thin.precision],
    }


def _outside_share(frames: list[FrameMeasure], pooled_ms: float) -> float:
    """Share of the time that went into reading, measuring and pooling; on a GPU the first two ran beside the pipeline."""
    outside = pooled_ms + sum(sum(f.outside_ms.values()) for f in frames)
    inside = sum(f.timings_ms.get("total", 0.0) for f in frames)
    return outside / (outside + inside)


def _timings(frames: list[Any]) -> dict[str, dict[str, float]]:
    stages = list(dict.fromkeys(stage for frame in frames for stage in frame))
    result = {}
    for stage in stages:
        values = np.array([frame[stage] for frame in frames if stage in frame])
        result[stage] = {"p50": float(np.percentile(values, 50)), "p95": float(np.percentile(values, 95)), "mean": float(values.mean())}
    return result


def _recall(frames: list[FrameMeasure], edges: Sequence[float | None], keys: list[NDArray[Any]]) -> list[dict[str, Any]]:
    """Share of the ground-truth instances that a prediction, or a prompt box, overlaps with IoU above 0.5, by a key's range."""
    key = np.concatenate(keys)
    mask_iou = np.concatenate([f.truth.mask_iou for f in frames])
    box_iou = np.concatenate([f.truth.box_iou for f in frames])
    rows = []
    for low, high in pairwise(edges):
        chosen = (key >= low) & (key < (np.inf if high is None else high))
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


def _judged(frames: list[FrameMeasure]) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    """Score, area and rightness (IoU > 0.5) of every prediction that is not excused by ignored area."""
    parts = [(instance.judge(f.instances), f.instances) for f in frames]
    kept = [(m.scores[~j.excused], m.area_px[~j.excused], j.right[~j.excused]) for j, m in parts]
    scores, area, right = (np.concatenate(column) for column in zip(*kept, strict=True))
    return scores, area, right


def _false_alarms(frames: list[FrameMeasure]) -> list[dict[str, Any]]:
    _, area, right = _judged(frames)
    wrong = area[~right]
    counts = np.histogram(wrong, [*SIZE_EDGES_PX[:-1], np.inf])[0]
    return [
        {"from": low, "to": high, "count": int(count), "per_image": count / len(frames)}
        for low, high, count in zip(SIZE_EDGES_PX[:-1], SIZE_EDGES_PX[1:], counts, strict=True)
    ]


def _reliability(frames: list[FrameMeasure]) -> list[dict[str, Any]]:
    """How often instances of a score are right (IoU > 0.5)."""
    scores, _, right = _judged(frames)
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


PACKAGES = ("torch", "torchvision", "numpy", "opencv-python-headless", "opencv-python", "scipy", "segment-anything", "transformers")


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    installed = {str(package.metadata["Name"]).lower(): package.version for package in distributions()}
    found = {package: installed[package] for package in PACKAGES if package in installed}
    return {"ros2_ood_seg": __version__, "python": platform.python_version()} | found


def hardware(device: str) -> dict[str, Any]:
    """What the times were measured on."""
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": device,
    }
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(torch.device(device))
    return facts
