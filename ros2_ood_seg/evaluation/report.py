"""Measured frames to ``report.json``."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ros2_ood_seg import __version__
from ros2_ood_seg.config import PipelineConfig
from ros2_ood_seg.evaluation import component, pixel, s2m
from ros2_ood_seg.evaluation.counts import CountsWriter, histogram, histogram_edges
from ros2_ood_seg.evaluation.store import PartStore
from ros2_ood_seg.evaluation.totals import Totals

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
) -> tuple[dict[str, Any], CountsWriter]:
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
    totals = Totals()
    counts = CountsWriter(store.folder)
    for name in names:
        frame = store.load(name)
        counts.add_found(name, frame.masks, totals.add(frame))
    pooled = {kind: _pool(store, names, kind, fpr_rule, exact) for kind in ("score", "refined")}
    best = pooled["refined"].figures["best_f1_threshold"]
    # The benchmark predicts score > threshold; the next lower number makes that the same as score >= the best threshold.
    threshold = None if best is None or not exact else float(np.nextafter(np.float32(best), np.float32(-np.inf)))
    scaled = s2m.scaled_thresholds(*totals.score_range)
    baseline_mean = s2m.CurveMean()
    matches: list[component.ComponentMatch] = []
    for name in names:
        positives, negatives = (store.counts(name, "score", label) for label in (1, 0))
        sweep = s2m.sweep(positives, [negatives], scaled)
        baseline_mean.add(sweep)
        match = None if threshold is None else _component_match(store, name, threshold, minimum)
        matches += [] if match is None else [match]
        refined = (store.counts(name, "refined", label) for label in (1, 0))
        counts.add_scored(
            histogram(pooled["score"].edges, positives, negatives), histogram(pooled["refined"].edges, *refined), sweep, match
        )
    masks, masks_code, baseline = totals.masks.scores(), totals.masks_code.scores(), baseline_mean.scores()
    best_scaled = scaled[[round((baseline.threshold if baseline else 0.0) * 100)]]
    for image in totals.per_image:
        positives, negatives = (store.counts(image["name"], "score", label) for label in (1, 0))
        image["baseline_iou"] = _ratio(s2m.sweep(positives, [negatives], best_scaled))
    instances = totals.instances()
    pooled_ms = (time.perf_counter() - start) * 1e3
    report = {
        "dataset": dataset,
        "profile": config.profile,
        "images": totals.images,
        "images_with_anomaly": sum(image["anomalous_px"] > 0 for image in totals.per_image),
        "pixel": pooled["score"].figures,
        "refined": pooled["refined"].figures,
        "baseline": _s2m(baseline) | {"score_range": [float(scaled[0]), float(scaled[-1])]},
        "s2m": _s2m(masks),
        "s2m_code": _s2m(masks_code),
        "component": vars(component.summarise(matches)) | {"threshold": threshold},
        "component_masks": vars(totals.components()),
        "instance": {"ap": instances.ap, "ap50": instances.ap50, "by_overlap": list(instances.by_overlap)},
        "timings_ms": totals.timings(),
        "outside_ms": totals.outside() | {"pooling": {"total": pooled_ms}},
        "outside_share": totals.outside_share(pooled_ms),
        "sizes": totals.sizes(),
        "bands": totals.bands(),
        "false_alarms": totals.false_alarms(),
        "reliability": totals.reliability(),
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
            "precision_recall": {kind: pooled[kind].precision_recall for kind in ("score", "refined")},
        },
        "per_image": totals.per_image,
        "config": config.model_dump(),
        "versions": versions(),
        "hardware": hardware(device),
    }
    return report, counts


@dataclass(frozen=True)
class _Pooled:
    """What the report keeps of a pooled curve, which can be large.

    Args:
        figures: For ``report.json``.
        precision_recall: The same, for the plot.
        edges: Of the histograms of single images.
    """

    figures: dict[str, Any]
    precision_recall: dict[str, list[float]]
    edges: NDArray[np.float64]


def _pool(store: PartStore, names: Sequence[str], kind: str, rule: pixel.FprRule, exact: bool) -> _Pooled:
    curve = pixel.pool((store.counts(name, kind, 1) for name in names), (store.counts(name, kind, 0) for name in names))
    return _Pooled(_pixel(curve, rule, exact), _precision_recall(curve), histogram_edges(curve))


def _component_match(store: PartStore, name: str, threshold: float, minimum: component.Minimum) -> component.ComponentMatch:
    refined, label = store.maps(name)
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


def _ratio(image: s2m.MaskSweep) -> float:
    union = int(image.extra[0]) + image.positives
    return int(image.hits[0]) / union if union else 0.0


def _precision_recall(curve: pixel.PixelCurve) -> dict[str, list[float]]:
    thin = curve.thinned(CURVE_POINTS)
    return {
        "recall": [round(float(v), 6) for v in thin.true_positives / max(curve.positives, 1)],
        "precision": [round(float(v), 6) for v in thin.precision],
    }


PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "opencv-python-headless",
    "opencv-python",
    "scipy",
    "segment-anything",
    "transformers",
    "openvino",
)


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"ros2_ood_seg": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


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
