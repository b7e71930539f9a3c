"""``ood-seg bench engines``: torch and OpenVINO side by side on the compact profiles, with a fixed number of box prompts."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ros2_ood_seg.config import load_profile
from ros2_ood_seg.engines import openvino_installed
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.runtime import peak_memory_mb
from ros2_ood_seg.synthetic.drive import SyntheticDrive
from ros2_ood_seg.types import Prompts

PROFILES = ("compact", "compact_s2m", "compact_ugains")
STAGES = ("score", "prompt", "segment", "fuse")


def register(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``ood-seg bench engines``."""
    parser = kinds.add_parser("engines", help="torch and OpenVINO side by side: milliseconds per stage and peak memory, on the CPU")
    parser.add_argument("--profiles", nargs="+", default=["compact_s2m"], help=f"(default: %(default)s; bundled: {', '.join(PROFILES)})")
    parser.add_argument("--width", type=int, default=1280, help="of the frame, px")
    parser.add_argument("--height", type=int, default=720, help="of the frame, px")
    parser.add_argument("--prompts", type=int, default=10, help="boxes that the segmenter gets, whatever the profile finds")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=10, help="measured runs after two that warm up")
    parser.add_argument("--output", type=Path, default=None, help="write the figures as JSON")
    parser.set_defaults(run=_run)


def measure(profile: str, engine: str, size_wh: tuple[int, int], prompts: int, threads: int, repeats: int) -> dict[str, float]:
    """Runs the stages one by one, the segmenter on boxes of a fixed number.

    Args:
        profile: Name or path.
        engine: As ``runtime.engine``.
        size_wh: Of the frame, px.
        prompts: Boxes for the segmenter.
        threads: CPU threads.
        repeats: Measured runs.

    Returns:
        Least milliseconds of each stage and of the sum (other programs only add), the sum's median, the least CPU time of a frame in
        all threads, seconds to load with the first frame, and the peak memory of the process in MB.
    """
    width, height = size_wh
    image = torch.from_numpy(next(iter(SyntheticDrive(seed=0, height=height, width=width, frames=1))).image)
    start = time.perf_counter()
    pipeline = Pipeline(load_profile(profile, {"runtime.device": "cpu", "runtime.engine": engine, "runtime.threads": threads}))
    boxes = Prompts.from_boxes(spread_boxes(prompts, width, height), torch.ones(prompts))
    _frame(pipeline, image, boxes)
    loaded = time.perf_counter() - start
    _frame(pipeline, image, boxes)
    rows = [_frame(pipeline, image, boxes) for _ in range(repeats)]
    times = np.array(rows) * 1e3
    figures = {stage: float(ms) for stage, ms in zip(STAGES, times.min(axis=0)[:-1], strict=True)}
    return {
        **figures,
        "total": float(times[:, :-1].sum(axis=1).min()),
        "total_p50": float(np.median(times[:, :-1].sum(axis=1))),
        "cpu": float(times[:, -1].min()),
        "load_s": loaded,
        "peak_memory_mb": peak_memory_mb(),
    }


def spread_boxes(count: int, width: int, height: int) -> Tensor:
    """``count`` boxes over the lower half of a frame, (N, 4) float32 px, the nearer the larger: 3 to 35 % of the height."""
    near = torch.linspace(0.0, 1.0, count)
    side = (0.03 + 0.32 * near) * height
    x = (torch.arange(count) * 0.382 % 1.0) * (width - side)
    y = height * (0.5 + 0.15 * near)
    return torch.stack([x, y, x + side, y + side], dim=1)


def _frame(pipeline: Pipeline, image: Tensor, boxes: Prompts) -> list[float]:
    """Seconds of each stage, then the CPU time of all threads."""
    start = time.process_time()
    with torch.inference_mode():
        ticks = [time.perf_counter()]
        score_map = pipeline.scorer(image)
        ticks.append(time.perf_counter())
        for generate in pipeline.prompt_generators:
            generate(score_map)
        ticks.append(time.perf_counter())
        masks = pipeline.segmenter(image, boxes)
        ticks.append(time.perf_counter())
        pipeline.fusion(score_map, boxes, masks)
        ticks.append(time.perf_counter())
    return [*np.diff(ticks).tolist(), time.process_time() - start]


def _run(args: argparse.Namespace) -> int:
    from ros2_ood_seg.bench import hardware

    for option, least in (("width", 64), ("height", 64), ("prompts", 1), ("threads", 1), ("repeats", 1)):
        if getattr(args, option) < least:
            raise InputError(f"--{option} is {getattr(args, option)}, allowed: {least} or more")
    engines = ("torch", "openvino") if openvino_installed() else ("torch",)
    report = []
    print(f"{args.width}x{args.height}, {args.prompts} boxes, {args.threads} threads; least milliseconds of {args.repeats} runs")
    print(f"{'profile':16}{'engine':10}" + "".join(f"{stage:>9}" for stage in (*STAGES, "total", "p50", "CPU")) + "    load s   peak MB")
    for profile in args.profiles:
        for engine in engines:
            row = _in_own_process(measure, profile, engine, (args.width, args.height), args.prompts, args.threads, args.repeats)
            report.append({"profile": profile, "engine": engine, **row})
            cells = "".join(f"{row[stage]:9.0f}" for stage in (*STAGES, "total", "total_p50", "cpu"))
            print(f"{profile:16}{engine:10}{cells}{row['load_s']:10.1f}{row['peak_memory_mb']:10.0f}", flush=True)
    torch_mb = _memory_of_torch_mb()
    print(f"importing torch {torch.__version__} alone takes {torch_mb:.0f} MB of that")
    if "openvino" not in engines:
        print("openvino is not installed: 'pip install openvino'")
    if args.output is not None:
        whole = {"engines": report, "import_torch_mb": torch_mb, "hardware": hardware(torch.device("cpu"))}
        args.output.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return 0


def _memory_of_torch_mb() -> float:
    """Peak memory of a process that imports torch and does nothing else: the build decides it, and no setting of ours."""
    code = "import torch; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout) / 1024


def _in_own_process(function: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """Calls a function in a process of its own, because the peak memory of a process never falls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
