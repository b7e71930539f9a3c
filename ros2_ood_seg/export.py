"""``ood-seg export``: the networks as ONNX, for TensorRT, ONNX Runtime and other engines."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.weights.store import find_weights, load_into, load_weights

STRIDE = 32
"""Sides of inputs are multiples of this."""


@dataclass(frozen=True)
class Exportable:
    """A network and what its file shall say.

    Args:
        network: In evaluation mode, of one input; returns a tensor or a tuple of tensors.
        example: (B, C, h, w) float32; the file takes this size.
        input_name: Of the file's input.
        output_names: Of its outputs.
        any_batch: The file takes any number of items, not just the example's.
    """

    network: nn.Module
    example: Tensor
    input_name: str
    output_names: tuple[str, ...]
    any_batch: bool = False


class DenseDetector(nn.Module):
    """A prompt generator up to its proposals: pyramid, objectness and box offsets of each level.

    Selecting proposals and pooling their features depends on values, which engines do in their own ways; it stays outside.

    Args:
        network: torchvision's ``GeneralizedRCNN``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backbone = cast("nn.Module", network.backbone)
        self.head = cast("nn.Module", cast("nn.Module", network.rpn).head)

    def forward(self, maps: Tensor) -> tuple[Tensor, ...]:
        """(B, C, h, w) normalised score maps to five tensors each of features, objectness logits and box offsets, finest level first."""
        features = list(self.backbone(maps).values())
        objectness, offsets = self.head(features)
        return (*features, *objectness, *offsets)


def scorer(weights: str, width: int, height: int) -> Exportable:
    """The compact scorer: RGB in [0, 255] to class logits and, as the last channel, the outlier logit."""
    from ros2_ood_seg.scorers.networks.compact import CompactNet, MergedHeads

    network = CompactNet.of(load_weights(find_weights(weights or "compact_scorer")))
    return Exportable(MergedHeads(network.eval()), torch.zeros(1, 3, height, width), "image", ("logits",))


def segmenter(weights: str, width: int, height: int) -> Exportable:
    """The compact segmenter: crops with their prompt maps to mask logits and the logit of the expected IoU."""
    from ros2_ood_seg.segmenters.compact import fold_all, load_network
    from ros2_ood_seg.segmenters.networks.compact import INPUT_CHANNELS

    example = torch.zeros(2, INPUT_CHANNELS, height, width)
    return Exportable(fold_all(load_network(weights)), example, "crops", ("mask_logits", "quality_logit"), any_batch=True)


def prompt_generator(weights: str, width: int, height: int) -> Exportable:
    """The dense part of a Faster R-CNN prompt generator; see :class:`DenseDetector`."""
    from ros2_ood_seg.prompts.faster_rcnn import COMPACT_WEIGHTS, load_detector
    from ros2_ood_seg.prompts.networks.rcnn import fuse_norms

    detector = load_detector(load_weights(find_weights(weights or COMPACT_WEIGHTS)))
    fuse_norms(detector.network)
    example = torch.zeros(1, len(detector.map_input.mean), height, width)
    names = tuple(f"{kind}_{level}" for kind in ("features", "objectness", "offsets") for level in range(5))
    return Exportable(DenseDetector(detector.network).eval(), example, "maps", names)


def sam_encoder(weights: str, model: str) -> Exportable:
    """Segment Anything's image encoder at its own 1024 x 1024, where nearly all of its time goes."""
    from segment_anything import sam_model_registry

    from ros2_ood_seg.segmenters.sam import OFFICIAL_WEIGHTS

    sam = sam_model_registry[model]()
    load_into(sam, load_weights(find_weights(weights or OFFICIAL_WEIGHTS[model])), f"segment-anything {model}")
    side = int(sam.image_encoder.img_size)
    return Exportable(sam.image_encoder.eval(), torch.zeros(1, 3, side, side), "pixels", ("embedding",))


_SIZED: dict[str, tuple[Callable[[str, int, int], Exportable], int, int]] = {
    "scorer": (scorer, 1152, 640),
    "segmenter": (segmenter, 192, 192),
    "prompt-generator": (prompt_generator, 640, 384),
}
"""What can be exported at a chosen size, with the width and height that the compact profiles use on 16:9 frames."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "export",
        help="write a network as ONNX",
        description="Writes a network as ONNX and, where onnxruntime is installed, checks it against torch on a random input.",
    )
    parser.add_argument("--what", required=True, choices=[*_SIZED, "sam"], help="sam: its image encoder")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.onnx")
    parser.add_argument("--weights", default="", help="weights file or name; the bundled or official ones without")
    parser.add_argument("--model", choices=("vit_b", "vit_l", "vit_h"), default="vit_b", help="sam: size (default: %(default)s)")
    parser.add_argument("--width", type=int, default=0, help="input width, px, a multiple of 32 (default: as on 1280x720 frames)")
    parser.add_argument("--height", type=int, default=0, help="input height, px, a multiple of 32 (default: as on 1280x720 frames)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        InputError: A size that is no multiple of 32, a missing exporter, an unwritable file; missing weights.
    """
    for option in ("width", "height"):
        size = getattr(args, option)
        if size < 0 or size % STRIDE or (size and args.what == "sam"):
            allowed = "none, sam has its own size" if args.what == "sam" else f"a multiple of {STRIDE}"
            raise InputError(f"--{option} is {size}, allowed: {allowed}")
    if args.what == "sam":
        exportable = sam_encoder(args.weights, args.model)
    else:
        build, width, height = _SIZED[args.what]
        exportable = build(args.weights, args.width or width, args.height or height)
    export(exportable, args.output)
    shape = "x".join(map(str, exportable.example.shape))
    print(f"{args.output}: input {exportable.input_name} {shape}, outputs {', '.join(exportable.output_names)}")
    if find_spec("onnxruntime") is None:
        print("not checked: 'pip install onnxruntime' to compare it with torch")
        return 0
    print(f"largest difference to torch on a random input, relative to the largest output: {difference(exportable, args.output):.1e}")
    return 0


def export(exportable: Exportable, path: Path) -> None:
    """Writes the file.

    Raises:
        InputError: torch's exporter is not installed, or the file cannot be written.
    """
    if find_spec("onnxscript") is None:
        raise InputError("exporting ONNX needs the package onnxscript: 'pip install onnxscript'")
    shapes = ({0: torch.export.Dim("items")},) if exportable.any_batch else None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            exportable.network,
            (exportable.example,),
            input_names=[exportable.input_name],
            output_names=list(exportable.output_names),
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cast("Any", program).save(path)
    except OSError as error:
        raise InputError(f"output '{path}' cannot be written: {error.strerror}") from error


def difference(exportable: Exportable, path: Path) -> float:
    """The largest difference between ONNX Runtime and torch over all outputs, as a fraction of each output's largest value."""
    import onnxruntime

    example = exportable.example
    batch = len(example) + 1 if exportable.any_batch else len(example)
    x = torch.rand((batch, *example.shape[1:]), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = exportable.network(x)
    expected = (expected,) if isinstance(expected, Tensor) else expected
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(list(exportable.output_names), {exportable.input_name: x.numpy()})
    return max(float(np.abs(a - b.numpy()).max() / (b.abs().max() + 1e-12)) for a, b in zip(found, expected, strict=True))
