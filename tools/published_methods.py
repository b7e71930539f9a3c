#!/usr/bin/env python3
"""Shows that the published trainings work on a small network: AP on labelled images before and after each of them.

    tools/published_methods.py --camvid DIR --idd-lite DIR --coco DIR --objects DIR... --features mobilenet_v2.safetensors \
        --evaluate DIR/road_anomaly_21 --output runs/published

Trains DeepLabV3+ MobileNetV2 on the classes, then each method from it, and scores the labelled images with the same score before and
after. Writes figures.json and prints a table. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.evaluation.datasets import open_dataset
from ros2_ood_seg.evaluation.pixel import ScoreCounts, pool
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.training.outlier_exposure import PasteSettings
from ros2_ood_seg.training.published import METHODS, train_published
from ros2_ood_seg.training.scorer import ScorerData

PLAIN = "deeplab_mobilenet_v2"
# For a small network and a few hundred steps: most published rates are for 14,840 steps of a large one.
METHOD_CHANGES = {
    "max_entropy": {"outlier_share": 1.0},
    "dense_hybrid": {"learning_rate": 3e-4},
    "pebal": {"learning_rate": 1e-3, "outlier_share": 0.5},
    "rpl": {"learning_rate": 3e-4},
}
BEFORE = {
    "max_entropy": {"score": "entropy"},
    "dense_hybrid": {"score": "energy"},
    "pebal": {"score": "energy", "smoothing_px": 7},
    "rpl": {"score": "energy", "smoothing_px": 7},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("camvid", "idd-lite", "coco", "coco-panoptic", "features", "evaluate", "output"):
        parser.add_argument(f"--{name}", type=Path, required=name in ("features", "evaluate", "output"))
    parser.add_argument("--objects", type=Path, nargs="+", default=[])
    parser.add_argument("--base-iterations", type=int, default=600)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    data = ScorerData(
        camvid=args.camvid, idd_lite=args.idd_lite, coco=args.coco, coco_panoptic=args.coco_panoptic, objects=tuple(args.objects)
    )
    small = {"batch_size": 4, "workers": 0, "paste": PasteSettings(crop_hw=(192, 320))}
    path = args.output / "figures.json"
    figures: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    recipe = replace(METHODS["segmentation"].recipe, iterations=args.base_iterations, learning_rate=2e-3, **small)
    base = train_published(data, recipe, args.output / "segmentation", args.features)
    for method, changes in METHOD_CHANGES.items():
        if method not in figures:
            recipe = replace(METHODS[method].recipe, iterations=args.iterations, **small, **changes)
            trained = train_published(data, recipe, args.output / method, base)
            before = average_precision_of(args.evaluate, ScorerConfig(name=PLAIN, weights=str(base), input_width=768, **BEFORE[method]))
            figures[method] = [
                before,
                average_precision_of(args.evaluate, ScorerConfig(name=method, weights=str(trained), input_width=768)),
            ]
            path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print("| method | AP before | AP after |\n|---|---|---|")
    for method, (before, after) in figures.items():
        print(f"| `{method}` | {before:.3f} | {after:.3f} |")


def average_precision_of(root: Path, config: ScorerConfig) -> float:
    """Pooled over all valid pixels of the labelled images below ``root``."""
    scorer = SCORERS.get(config.name)(config, Runtime(torch.device("cpu")))
    dataset = open_dataset("folder", root)
    anomalous, normal = [], []
    for source in dataset.sources:
        frame = dataset.load(source)
        with torch.inference_mode():
            scores = scorer(torch.from_numpy(frame.image)).scores.numpy().astype(np.float32)
        anomalous.append(ScoreCounts.from_values(scores[frame.label == 1]))
        normal.append(ScoreCounts.from_values(scores[frame.label == 0]))
    ap = pool(anomalous, normal).ap()
    assert ap is not None, "labelled images have anomalies"
    return ap


if __name__ == "__main__":
    main()
