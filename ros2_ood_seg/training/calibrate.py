"""Calibration of a scorer, and the statistics it needs, on frames in which nothing is anomalous (``ood-seg calibrate``)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ros2_ood_seg.config import ScorerConfig, build_config, parse_overrides
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.image_encodings import read_rgb
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.scorers.base import CalibratedScorer, Scorer
from ros2_ood_seg.scorers.calibration import write_calibration
from ros2_ood_seg.scorers.compact import SCORES, CompactScorer, score_of
from ros2_ood_seg.training.class_statistics import SOURCES, make_statistics
from ros2_ood_seg.training.outlier_exposure import list_images
from ros2_ood_seg.types import Calibration

PIXELS_PER_FRAME = 40_000
"""Enough that a few hundred frames resolve one pixel in a million."""


def calibrate(scorer: Scorer, images: Sequence[Path], device: torch.device, seed: int = 0) -> Calibration:
    """Fits a calibration to a scorer's scores on in-distribution frames.

    Args:
        scorer: Any scorer that works from images.
        images: Pictures in which nothing is anomalous.
        device: The scorer's device.
        seed: Of the choice of pixels.

    Raises:
        InputError: An unreadable picture, or scores that do not vary.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for path in tqdm(images, desc="calibrate", mininterval=5.0):
        scores = scorer(torch.from_numpy(read_rgb(path)).to(device)).scores.flatten().cpu().numpy()
        parts.append(scores[rng.integers(scores.size, size=PIXELS_PER_FRAME)])
    return _fit(parts)


def calibrate_compact(scorer: CompactScorer, images: Iterable[NDArray[np.uint8]]) -> dict[str, Calibration]:
    """Calibrations of all score functions of the compact scorer, from one run over the frames.

    Args:
        scorer: On the CPU.
        images: (H, W, 3) uint8 RGB each, nothing anomalous in them.
    """
    parts: dict[str, list[NDArray[np.float32]]] = {score: [] for score in SCORES}
    for image in images:
        output = scorer.logits(torch.from_numpy(image))
        for score, values in parts.items():
            values.append(score_of(score, output).flatten().cpu().numpy())
    return {score: _fit(values) for score, values in parts.items()}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``ood-seg calibrate``."""
    parser = subparsers.add_parser("calibrate", help="calibrate a scorer on in-distribution frames")
    parser.add_argument("--scorer", choices=[name for name in SCORERS.names if name != "external"], required=True)
    parser.add_argument("--score", default="default", help="score function of the scorer")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="pictures in which nothing is anomalous")
    parser.add_argument("--weights", default="", help="weights file or manifest name; empty takes the scorer's own")
    parser.add_argument("--weights-dir", default="", help="folder of further weights")
    parser.add_argument("--input-width", type=int, default=ScorerConfig().input_width, help="width the images are resized to, px")
    parser.add_argument(
        "--statistics", action="store_true", help=f"{', '.join(SOURCES)}: compute class statistics even where there are some"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="further settings of the scorer, as scorer.temperature; may be repeated",
    )
    parser.add_argument("--max-images", type=int, default=500, metavar="N", help="at most N pictures, evenly spread")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Calibrates and writes the result beside the weights."""
    images = list_images(args.images, recursive=True)
    if args.max_images < 1:
        raise InputError(f"--max-images is {args.max_images}, it must be 1 or more")
    images = [images[k] for k in np.unique(np.linspace(0, len(images) - 1, min(args.max_images, len(images))).astype(int))]
    runtime = Runtime.from_arguments(weights_dir=args.weights_dir)
    further = parse_overrides(args.set)
    if foreign := [key for key in further if key.rpartition(".")[0] != "scorer"]:
        raise InputError(f"--set {foreign[0]}: only settings of the scorer count here, as scorer.temperature")
    named = {"name": args.scorer, "score": args.score, "weights": args.weights, "input_width": args.input_width}
    config = build_config(
        {"scorer": {**named, **{key.removeprefix("scorer."): value for key, value in further.items()}}}, "calibrate"
    ).scorer
    if args.scorer in SOURCES:
        statistics = make_statistics(config, runtime, images, args.statistics)
        print(f"{statistics}: class statistics of {len(images)} frames" if statistics else "class statistics: there are some already")
    elif args.statistics:
        raise InputError(f"--statistics is for {' and '.join(SOURCES)}, scorer '{args.scorer}' needs none")
    scorer: CalibratedScorer = SCORERS.get(args.scorer)(config, runtime)
    if not os.access(scorer.weights_path.parent, os.W_OK):
        raise InputError(
            f"the calibration belongs beside '{scorer.weights_path}', whose folder cannot be written: "
            "copy the file to one of yours and name it with --weights, and with scorer.weights where it is used"
        )
    with torch.inference_mode():
        result = calibrate(scorer, images, runtime.device)
    path = write_calibration(scorer.weights_path, scorer.calibration_key, result)
    print(f"{path}: raw {result.raw[0]:.4g} to {result.raw[-1]:.4g} from {len(images)} frames")
    return 0


def _fit(parts: Sequence[NDArray[np.float32]]) -> Calibration:
    if not parts:
        raise InputError("calibration needs at least one frame")
    return Calibration.from_scores(np.concatenate(parts))
