"""``ood-seg bench``: speed of the pipeline's stages, of the scorers alone, and of the node around it."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from ros2_ood_seg import engines_bench, points_bench, scorers_bench
from ros2_ood_seg.config import load_profile, parse_overrides
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.runtime import peak_memory_mb
from ros2_ood_seg.synthetic.drive import SyntheticDrive


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``ood-seg bench {pipeline,scorers,engines,node}``."""
    parser = subparsers.add_parser("bench", help="measure speed")
    kinds = parser.add_subparsers(dest="bench", required=True)
    pipeline = kinds.add_parser("pipeline", help="milliseconds and memory per stage on one frame, over and over")
    pipeline.add_argument("--profile", default="compact")
    pipeline.add_argument("--image", type=Path, default=None, help="frame to run on; a generated road scene without")
    pipeline.add_argument("--width", type=int, default=1280, help="frames are resized to this width, px")
    pipeline.add_argument("--height", type=int, default=720, help="frames are resized to this height, px")
    pipeline.add_argument("--repeats", type=int, default=20, help="measured runs after three that warm up")
    pipeline.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    pipeline.add_argument("--output", type=Path, default=None, help="write the figures as JSON")
    pipeline.set_defaults(run=_bench_pipeline)
    scorers_bench.register(kinds)
    points_bench.register(kinds)
    engines_bench.register(kinds)
    # The node's bench belongs to ros/; without rclpy and the messages the command still exists and says so.
    if find_spec("rclpy") is not None and find_spec("ros2_ood_seg.msg") is not None:
        importlib.import_module("ros2_ood_seg.ros.bench").register(kinds)
    else:
        kinds.add_parser("node", help="needs a ROS 2 environment").set_defaults(run=_no_ros)


def _no_ros(args: argparse.Namespace) -> int:
    raise InputError("'ood-seg bench node' needs rclpy and the built messages: use 'make env' and '. ./env.sh', or source your ROS 2")


def hardware(device: torch.device) -> dict[str, str | int]:
    """What the figures were measured on, the GPU where ``device`` is one."""
    return {
        "processor": _processor(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _bench_pipeline(args: argparse.Namespace) -> int:
    if args.repeats < 1:
        raise InputError(f"--repeats is {args.repeats}, allowed: 1 or more")
    image = _frame(args)
    pipeline = Pipeline(load_profile(args.profile, parse_overrides(args.overrides)))
    for _ in range(3):
        result = pipeline.run(image)
    rows: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        result = pipeline.run(image)
        for stage, value in result.timings_ms.items():
            rows.setdefault(stage, []).append(value)
    timings = {stage: {"p50": float(np.percentile(ms, 50)), "p95": float(np.percentile(ms, 95))} for stage, ms in rows.items()}
    report = {
        "profile": args.profile,
        "image": [int(image.shape[1]), int(image.shape[0])],
        "prompts": len(result.prompts),
        "instances": len(result.instances),
        "timings_ms": timings,
        "peak_memory_mb": peak_memory_mb(),
        "peak_gpu_memory_mb": pipeline.runtime.peak_gpu_memory_mb(),
        "hardware": hardware(pipeline.runtime.device),
    }
    print(f"{args.profile} on {image.shape[1]}x{image.shape[0]}, {len(result.prompts)} prompts, {len(result.instances)} instances")
    for stage, ms in timings.items():
        print(f"  {stage:10} p50 {ms['p50']:8.1f} ms   p95 {ms['p95']:8.1f} ms")
    print(f"  peak memory {report['peak_memory_mb']:.0f} MB")
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _frame(args: argparse.Namespace) -> NDArray[np.uint8]:
    if args.image is None:
        return next(iter(SyntheticDrive(seed=0, height=args.height, width=args.width, frames=1))).image
    bgr = cv2.imread(str(args.image), cv2.IMREAD_COLOR)
    if bgr is None:
        raise InputError(f"image '{args.image}' does not exist or is no picture")
    resized = cv2.resize(bgr, (args.width, args.height), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.cvtColor(resized, cv2.COLOR_BGR2RGB), dtype=np.uint8)
