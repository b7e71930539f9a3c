#!/usr/bin/env python3
"""Draws the worst frames of evaluations for a model card: score maps and masks without the photographs, whose licences differ.

    ood-seg evaluate --dataset folder --root DIR --profile compact_s2m --output out/NAME.json --save out/NAME
    tools/failure_pictures.py --evaluated out/NAME.json out/NAME DIR --output failures.png

Each panel is the calibrated score map (dark to bright), found instances in green and the ground truth outlined in white.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import matplotlib
import numpy as np

from ros2_ood_seg import rle
from ros2_ood_seg.types import Calibration
from ros2_ood_seg.weights.store import find_weights, load_weights

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluated", nargs=3, action="append", required=True, metavar=("REPORT", "SAVED", "ROOT"), type=Path)
    parser.add_argument("--frames", type=int, default=3, help="of each set, the ones with the lowest IoU")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    weights = load_weights(find_weights("compact_scorer"))
    calibration = Calibration.from_dict(weights.metadata["calibrations"]["outlier"])
    figure, axes = plt.subplots(len(args.evaluated), args.frames, squeeze=False, figsize=(4 * args.frames, 2.4 * len(args.evaluated)))
    for row, (report_path, saved, root) in zip(axes, args.evaluated, strict=True):
        report = json.loads(report_path.read_text(encoding="utf-8"))
        worst = sorted((frame for frame in report["per_image"] if frame["anomalous_px"]), key=lambda frame: frame["iou"])
        for panel, frame in zip(row, worst, strict=False):
            scores = np.load(saved / "score" / f"{frame['name']}.npy")
            panel.imshow(np.interp(scores, calibration.raw, calibration.unit), cmap="magma", vmin=0, vmax=1)
            label = cv2.imread(str(root / "labels" / f"{frame['name']}.png"), cv2.IMREAD_UNCHANGED)
            panel.contour(label == 1, levels=[0.5], colors="white", linewidths=0.8)
            found = json.loads((saved / "instances" / f"{frame['name']}.json").read_text(encoding="utf-8"))["instances"]
            union = np.zeros(label.shape, bool)
            for instance in found:
                union |= rle.decode(np.array(instance["segmentation"]["counts"]), *label.shape)
            if union.any():
                panel.contour(union, levels=[0.5], colors="lime", linewidths=0.8)
            panel.set_title(f"{root.name} {frame['name']}: IoU {frame['iou']:.2f}", fontsize=8)
        for panel in row:
            panel.axis("off")
    figure.tight_layout()
    figure.savefig(args.output, dpi=80)


if __name__ == "__main__":
    main()
