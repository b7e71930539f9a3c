"""``ood-seg bench points``: time of each point sampler on one map of candidates, and whether it chose as the definition says."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ros2_ood_seg.config import PointPromptsConfig, build_config
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.prompts import POINT_PROMPTS
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Calibration, ScoreMap

SAMPLERS = ("fps", "kmeans", "random")


def register(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``ood-seg bench points``."""
    parser = kinds.add_parser("points", help="milliseconds of each point sampler on one map of uncertain pixels")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--width", type=int, default=1920, help="px")
    parser.add_argument("--height", type=int, default=1080, help="px")
    parser.add_argument("--share", type=float, default=1.0, help="share of the pixels that are candidates, spread at random (%(default)s)")
    parser.add_argument("--count", type=int, default=50, help="points (%(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="measured runs after two that warm up")
    parser.add_argument("--check", action="store_true", help="compare farthest points with the sequential definition in float64; seconds")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--output", type=Path, default=None, help="write the figures as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and prints.

    Raises:
        InputError: Numbers that cannot be used.
    """
    if min(args.width, args.height, args.repeats) < 1 or not 0.0 < args.share <= 1.0:
        raise InputError("--width, --height and --repeats must be 1 or more, --share above 0 and at most 1")
    runtime = Runtime.from_arguments(device=args.device)
    candidates = np.random.default_rng(0).random((args.height, args.width)) < args.share
    candidates[0, 0] = True
    score_map = ScoreMap(torch.from_numpy(candidates).float().to(runtime.device), "bench", Calibration.linear())
    figures = {}
    for name in args.samplers:
        config = build_config({"prompts": {"points": {"method": name, "count": args.count}}}, "arguments").prompts.points
        figures[name] = _measure(name, config, score_map, args.repeats, runtime)
        shown = "   ".join(f"{key} {value:.1f} ms" for key, value in figures[name].items())
        print(f"{name:8} {shown}", flush=True)
    print(f"{int(candidates.sum())} candidates of {args.width}x{args.height} px on {runtime.device}")
    if args.check:
        points = POINT_PROMPTS.get("fps")(PointPromptsConfig(method="fps", count=args.count), runtime)(score_map).points_xy.cpu().numpy()
        same = np.array_equal(points, farthest_points_float64(candidates, args.count))
        print(f"fps {'equals' if same else 'DIFFERS FROM'} the sequential definition")
        if not same:
            return 1
    if args.output is not None:
        args.output.write_text(
            json.dumps({"candidates": int(candidates.sum()), "milliseconds": figures}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


def _measure(name: str, config: PointPromptsConfig, score_map: ScoreMap, repeats: int, runtime: Runtime) -> dict[str, float]:
    """Wall clock, and time of the processor alone, which a busy machine does not stretch."""
    generate = POINT_PROMPTS.get(name)(config, runtime)
    wall, processor = [], []
    for _ in range(repeats + 2):
        start, start_processor = time.perf_counter(), time.process_time()
        generate(score_map)
        runtime.synchronize()
        wall.append((time.perf_counter() - start) * 1e3)
        processor.append((time.process_time() - start_processor) * 1e3)
    return {
        "p50": float(np.percentile(wall[2:], 50)),
        "p95": float(np.percentile(wall[2:], 95)),
        "least": min(wall[2:]),
        "processor": float(np.percentile(processor[2:], 50)),
    }


def farthest_points_float64(candidates: NDArray[np.bool_], count: int) -> NDArray[np.float64]:
    """Farthest point sampling as it is defined, one candidate after the other, in float64.

    Args:
        candidates: (H, W) bool.
        count: Number of points; with fewer candidates each is taken once.

    Returns:
        (P, 2) ``xy`` px.
    """
    y, x = np.nonzero(candidates)
    xy = np.stack([x, y], axis=1).astype(np.float64)
    if not len(xy):
        return xy
    chosen = [0]
    distance = np.full(len(xy), np.inf)
    while len(chosen) < min(count, len(xy)):
        distance = np.minimum(distance, np.linalg.norm(xy - xy[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return xy[chosen]
