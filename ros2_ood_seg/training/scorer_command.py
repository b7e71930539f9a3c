"""``ood-seg train scorer``: reads the data, trains, calibrates, and writes weights that the pipeline can use."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ros2_ood_seg.config import RuntimeConfig, ScorerConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers.compact import from_weights
from ros2_ood_seg.scorers.networks.compact import STRIDE
from ros2_ood_seg.training.calibrate import calibrate_compact
from ros2_ood_seg.training.outlier_exposure import OutlierExposure, PasteSettings, contact_sheet, read_rgb
from ros2_ood_seg.training.scorer import ScorerData, ScorerTraining, train_scorer
from ros2_ood_seg.types import Calibration
from ros2_ood_seg.weights.store import load_weights, save_weights


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``scorer`` to the commands of ``ood-seg train``."""
    recipe = ScorerTraining()
    parser = subparsers.add_parser(
        "scorer",
        help="train the compact scorer by outlier exposure",
        description="Trains the compact scorer on road images with pasted objects; run it again to go on from the last checkpoint.",
    )
    parser.add_argument("--camvid", type=Path, metavar="DIR", help="road images in the CamVid layout")
    parser.add_argument("--idd-lite", type=Path, metavar="DIR", help="road images in the IDD-Lite layout")
    parser.add_argument("--cityscapes", type=Path, metavar="DIR", help="road images in the Cityscapes layout")
    parser.add_argument(
        "--roads", type=Path, nargs="+", default=[], metavar="DIR", help="road images without labels, nothing anomalous in them"
    )
    parser.add_argument("--coco", type=Path, metavar="DIR", help="objects: images/ and instances.json")
    parser.add_argument("--coco-panoptic", type=Path, metavar="DIR", help="objects: images/, panoptic/ and panoptic.json")
    parser.add_argument("--objects", type=Path, nargs="+", default=[], metavar="DIR", help="objects: images/ and masks/")
    parser.add_argument("--init", type=Path, help="mobilenet_v2 features or an earlier compact scorer to start from")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for checkpoints, log, curve and weights")
    parser.add_argument("--preview", action="store_true", help="only write preview.png with training samples")
    parser.add_argument("--published-pasting", action="store_true", help="one object per 700x700 crop, as S2M was published")
    parser.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="size of the training crops, multiples of 32")
    for name in ("iterations", "batch_size", "learning_rate", "frozen_blocks", "seed", "workers", "checkpoint_minutes"):
        default = getattr(recipe, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="(default: %(default)s)")
    parser.add_argument("--bfloat16", action="store_true", help="autocast the forward pass; slower on CPUs without AMX")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 leaves torch's choice")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains, or writes the preview.

    Raises:
        InputError: Anything in the arguments or the data that cannot be used.
    """
    data = ScorerData(args.camvid, args.idd_lite, args.cityscapes, tuple(args.roads), args.coco, args.coco_panoptic, tuple(args.objects))
    paste = PasteSettings.published() if args.published_pasting else PasteSettings()
    if args.crop:
        if any(side <= 0 or side % STRIDE for side in args.crop):
            raise InputError(f"--crop is {args.crop[0]} {args.crop[1]}, allowed: positive multiples of {STRIDE}")
        paste = replace(paste, crop_hw=tuple(args.crop))
    recipe = ScorerTraining(
        iterations=args.iterations,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        frozen_blocks=args.frozen_blocks,
        bfloat16=args.bfloat16,
        seed=args.seed,
        workers=args.workers,
        checkpoint_minutes=args.checkpoint_minutes,
        paste=paste,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    if args.preview:
        roads, cutouts = data.read(held_out=False)
        dataset = OutlierExposure(roads, cutouts, paste, recipe.seed, 24)
        sheet = contact_sheet(dataset[k] for k in range(len(dataset)))
        cv2.imwrite(str(args.output / "preview.png"), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
        print(args.output / "preview.png")
        return 0
    runtime = Runtime.from_config(RuntimeConfig(device=args.device, precision="float32", threads=args.threads))
    trained = train_scorer(data, recipe, args.output, args.init, runtime.device)
    released = args.output / "compact_scorer.safetensors"
    release(trained, data, released, {"start": args.init.name if args.init else "random"})
    print(released)
    return 0


def release(trained: Path, data: ScorerData, path: Path, provenance: dict[str, str], max_frames_per_source: int = 200) -> None:
    """Calibrates on held-out in-distribution frames and writes half-precision weights with all that belongs to them.

    Args:
        trained: Averaged weights of the training.
        data: What it was trained from; the held-out side is used.
        path: ``*.safetensors`` to write.
        provenance: Further entries of the metadata.
        max_frames_per_source: Frames per set of road images, evenly spread.

    Raises:
        InputError: There are no held-out frames.
    """
    weights = load_weights(trained)
    scorer = from_weights(weights, ScorerConfig(score="outlier"), Runtime(torch.device("cpu")), Calibration.linear())
    with torch.inference_mode():
        calibrations = calibrate_compact(scorer, _held_out_frames(data, max_frames_per_source))
    metadata = {
        **weights.metadata,
        **provenance,
        "default_score": "outlier",
        "calibrations": {score: calibration.to_dict() for score, calibration in calibrations.items()},
    }
    save_weights(path, weights.state, metadata, half=True)


def _held_out_frames(data: ScorerData, max_frames_per_source: int) -> Iterator[NDArray[np.uint8]]:
    roads, _ = data.read(held_out=True)
    for source in roads:
        chosen = np.unique(np.linspace(0, len(source) - 1, min(len(source), max_frames_per_source)).astype(int))
        for k in tqdm(chosen, desc=f"calibrate on {source[0].image.parent}", mininterval=5.0):
            yield read_rgb(source[k].image)
