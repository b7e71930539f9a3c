#!/usr/bin/env python3
"""Shows that evaluating a long drive takes no more memory than a short one.

    tools/evaluation_memory.py 1000
    tools/evaluation_memory.py 10000

Frames and results are made up (96x160 px, four objects, a score map, two masks), the evaluation is the real one: measuring,
pooling, report.json, report.html and the counts of every image. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ros2_ood_seg.config import load_profile
from ros2_ood_seg.evaluation.counts import counts_path
from ros2_ood_seg.evaluation.datasets import LabelledImage
from ros2_ood_seg.evaluation.evaluate import Evaluation, Options
from ros2_ood_seg.evaluation.report_page import report_html
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.runtime import peak_memory_mb
from ros2_ood_seg.types import Calibration, FrameResult, Instances, Prompts, ScoreMap

HEIGHT, WIDTH = 96, 160


def frame_and_result(number: int) -> tuple[LabelledImage, FrameResult]:
    """A frame with four objects, of which two are found, and a false alarm now and then."""
    rng = np.random.default_rng(number)
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    label[:6] = 255
    masks = torch.zeros((3, HEIGHT, WIDTH), dtype=torch.bool)
    for k in range(4):
        x, y, side = 8 + 38 * k + int(rng.integers(0, 16)), int(rng.integers(20, 80)), int(rng.integers(4, 14))
        label[y : y + side, x : x + side] = 1
        if k < 2:
            masks[k, y + 1 : y + side, x : x + side] = True
    if number % 5 == 0:
        masks[2, 8:16, 100:112] = True
    scores = (rng.standard_normal(label.shape) + 2 * (label == 1)).astype(np.float32)
    image = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    found = torch.from_numpy(rng.random(3, dtype=np.float32))
    score_map = ScoreMap(torch.from_numpy(scores), "made up", Calibration.linear())
    timings = {"score": 1.0, "total": 2.0}
    result = FrameResult(Instances.from_masks(masks, found, found, found), score_map, Prompts.empty(), score_map.scores, timings)
    return LabelledImage(f"{number:06d}", image, label), result


def evaluate(count: int, folder: Path, pixel_mode: str) -> float:
    """Evaluates ``count`` frames and writes all files of a report; returns the peak of resident memory before it, MB."""
    config = load_profile("compact", {"scorer.name": "external", "runtime.device": "cpu"})
    pipeline = Pipeline.from_config(config)
    evaluation = Evaluation(pipeline, folder / "parts", Options(pixel_mode=pixel_mode))
    before = peak_memory_mb()
    for number in range(count):
        evaluation.add_result(*frame_and_result(number))
    output = folder / "report.json"
    report, counts = evaluation.report("made up")
    output.write_text(json.dumps(report), encoding="utf-8")
    counts.save(counts_path(output))
    output.with_suffix(".html").write_text(report_html(report, evaluation.picture), encoding="utf-8")
    evaluation.finish()
    return before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", type=int)
    parser.add_argument("--pixel-mode", choices=("exact", "coarse"), default="coarse", help="a drive of 10,000 frames is pooled coarse")
    args = parser.parse_args()
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        before = evaluate(args.frames, Path(folder), args.pixel_mode)
        files = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}
    row = {
        "frames": args.frames,
        "loaded_mb": round(before),
        "peak_mb": round(peak_memory_mb()),
        "cpu_s": round(time.process_time() - start, 1),
    }
    print(json.dumps(row | {"bytes": files}))


if __name__ == "__main__":
    main()
