"""``ood-seg train rba``: reads the data, fine-tunes Mask2Former, calibrates, and writes weights that the scorer ``rba`` loads."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.training.rba import LAYERS, PRESETS, RbaTraining, train_rba
from ros2_ood_seg.training.scorer import ScorerData
from ros2_ood_seg.training.scorer_command import calibrate_published, check_input_width
from ros2_ood_seg.training.setting_flags import descriptions

_OF_RECIPE = (
    *("iterations", "batch_size", "learning_rate", "clip_norm", "outlier_share", "inlier_max", "outlier_min", "outlier_weight"),
    *("segmentation_weight", "points", "seed", "workers", "checkpoint_minutes"),
)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``rba`` to the commands of ``ood-seg train``."""
    parser = subparsers.add_parser(
        "rba",
        help="fine-tune Mask2Former to reject pasted objects (RbA, UGainS)",
        description="Fine-tunes Mask2Former on road images with pasted objects; run it again to go on from the last checkpoint.",
    )
    parser.add_argument("--init", type=Path, required=True, help="Mask2Former to start from, in the layout of RbA or UGainS")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for checkpoint, log, curve and rba.safetensors")
    parser.add_argument("--cityscapes", type=Path, metavar="DIR", help="road images in the Cityscapes layout")
    parser.add_argument("--camvid", type=Path, metavar="DIR", help="road images in the CamVid layout (networks of the 7 common classes)")
    parser.add_argument("--idd-lite", type=Path, metavar="DIR", help="road images in the IDD-Lite layout (the same)")
    parser.add_argument(
        "--roads", type=Path, nargs="+", default=[], metavar="DIR", help="road images without labels (with --segmentation-weight 0)"
    )
    parser.add_argument("--coco", type=Path, metavar="DIR", help="objects: images/ and instances.json")
    parser.add_argument("--coco-panoptic", type=Path, metavar="DIR", help="objects: images/, panoptic/ and panoptic.json")
    parser.add_argument("--objects", type=Path, nargs="+", default=[], metavar="DIR", help="objects: images/ and masks/")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="ugains", help="published recipe to start from (%(default)s)")
    parser.add_argument("--layers", choices=tuple(LAYERS), help="what is trained (default: the preset's)")
    parser.add_argument("--unbounded", action="store_true", help="no tanh on each class before the sum")
    parser.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="size of the training crops, multiples of 32")
    parser.add_argument("--frame-width", type=float, nargs=2, metavar=("LOW", "HIGH"), help="range of the width frames are scaled to, px")
    parser.add_argument(
        "--object-px",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="range of the objects' longest side, px, instead of their own size",
    )
    known = descriptions(RbaTraining)
    for name in _OF_RECIPE:
        default = getattr(PRESETS["ugains"], name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), help=f"{known[name]} (ugains: {default})")
    parser.add_argument("--bfloat16", action="store_true", help="autocast of the backbone")
    parser.add_argument("--input-width", type=int, default=2048, help="scorer.input_width that is calibrated for (%(default)s)")
    parser.add_argument(
        "--calibration-frames", type=int, default=200, metavar="N", help="held-out frames per set for the calibration (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 leaves torch's choice")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains and calibrates.

    Raises:
        InputError: Anything in the arguments, the data or the weights that cannot be used.
    """
    data = ScorerData(args.camvid, args.idd_lite, args.cityscapes, tuple(args.roads), args.coco, args.coco_panoptic, tuple(args.objects))
    if args.calibration_frames < 1:
        raise InputError(f"--calibration-frames is {args.calibration_frames}, allowed: 1 or more")
    check_input_width(args.input_width)
    recipe = PRESETS[args.preset]
    paste = recipe.paste
    if args.crop:
        paste = replace(paste, crop_hw=tuple(args.crop))
    if args.frame_width:
        paste = replace(paste, frame_width_px=tuple(args.frame_width))
    if args.object_px:
        paste = replace(paste, object_px=tuple(args.object_px), object_scales=())
    given = {name: getattr(args, name) for name in (*_OF_RECIPE, "layers") if getattr(args, name) is not None}
    recipe = replace(recipe, **given, bounded=not args.unbounded, bfloat16=args.bfloat16, paste=paste)
    runtime = Runtime.from_arguments(device=args.device, precision="float32", threads=args.threads)
    weights = train_rba(data, recipe, args.output, args.init, runtime.device)
    calibrate_published(weights, data, args.calibration_frames, runtime, args.input_width)
    print(weights)
    return 0
