"""Training and measuring of the compact segmenter (``ood-seg train segmenter``)."""

from __future__ import annotations

import argparse
import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from ros2_ood_seg.config import SegmenterConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.cli import checked_output
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.segmenters import SEGMENTERS
from ros2_ood_seg.segmenters.base import PromptableSegmenter
from ros2_ood_seg.segmenters.compact import CROP_PX, FAMILY, POINT_CROP_PX, from_network
from ros2_ood_seg.segmenters.networks.compact import CompactNet
from ros2_ood_seg.training.averaging import add_averaging, average_weights, check_averaging
from ros2_ood_seg.training.loop import TrainingLoop, state_stamp
from ros2_ood_seg.training.segmenter_data import (
    Batch,
    Image,
    SampleMaker,
    SegmentedObject,
    jitter_box,
    load_backgrounds,
    load_labelled,
    load_objects,
    random_point,
    rescale,
)
from ros2_ood_seg.training.setting_flags import descriptions, distinct_name
from ros2_ood_seg.types import Prompts
from ros2_ood_seg.weights import WeightFile, load_weights, save_weights
from ros2_ood_seg.weights.store import load_into

PROMPT_KINDS = ("box", "shifted_box", "point")
"""The true box; every side of it moved by up to 15 % of the box; one random pixel of the object."""
_SHIFT = 0.15
_STRIDE = 32
_FAR_PX = 24.0
_SIZES_PX = ((0, 32), (32, 96), (96, 256), (256, 100_000))
_PANELS = (("total", "bce", "dice", "quality"), ("iou", *(f"val_{kind}" for kind in PROMPT_KINDS)))
_MAY_CHANGE = ("iterations", "cool_down", "checkpoint_minutes", "bfloat16")


@dataclass(frozen=True)
class SegmenterTraining:
    """The recipe.

    Args:
        iterations: Steps in all. The learning rate is constant until the last ``cool_down`` of them, so that a run can still be
            made shorter or longer while it goes on.
        batch_size: Samples per step.
        crop_sizes: Sides of the crops in px, multiples of 32; every batch draws one.
        learning_rate: Of the decoder; the encoder takes ``encoder_rate`` of it.
        encoder_rate: See ``learning_rate``.
        warm_up: Steps of linear warm-up.
        cool_down: Share of the steps over which the learning rate falls linearly to zero.
        ema: Decay of the averaged weights, which are what is saved.
        quality_weight: Weight of the squared error of the predicted IoU.
        width: Channels of the decoder.
        warped: Share of the samples that are turned, sheared and stretched.
        crowded: Share of the samples in which another object stands before or beside the wanted one.
        bfloat16: Autocast of the forward pass.
        seed: Seed of weights and data.
        checkpoint_minutes: Time between checkpoints.
    """

    iterations: int = 5000
    batch_size: int = 16
    crop_sizes: tuple[int, ...] = (POINT_CROP_PX, 160, CROP_PX)
    learning_rate: float = 1e-3
    encoder_rate: float = 0.3
    warm_up: int = 100
    cool_down: float = 0.35
    ema: float = 0.998
    quality_weight: float = 2.0
    width: int = 64
    warped: float = 0.0
    crowded: float = 0.0
    bfloat16: bool = False
    seed: int = 0
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "learning_rate", "width"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, allowed: a number above 0")
        for name in ("warped", "crowded"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, allowed: a number from 0 to 1")
        if not self.crop_sizes or any(size <= 0 or size % _STRIDE for size in self.crop_sizes):
            raise InputError(f"crop_sizes is {self.crop_sizes}, allowed: one or more positive multiples of {_STRIDE}")

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step."""
        left = (self.iterations - step) / max(1.0, self.cool_down * self.iterations)
        return max(0.0, min((step + 1) / max(1, self.warm_up), left, 1.0))


def segmenter_loss(logits: Tensor, quality: Tensor, batch: Batch, quality_weight: float) -> dict[str, Tensor]:
    """Binary cross-entropy plus Dice of the mask, and the squared error of its predicted IoU.

    Args:
        logits: (N, 1, S/2, S/2) mask logits.
        quality: (N,) logits of the predicted IoU.
        batch: The samples.
        quality_weight: Weight of the third term.

    Returns:
        The terms, their weighted sum ``total``, and the mean IoU ``iou`` of the masks with the whole objects.
    """
    mask = F.interpolate(logits.float(), size=batch.targets.shape[-2:], mode="bilinear", align_corners=False)
    bce = F.binary_cross_entropy_with_logits(mask, batch.targets)
    inside = mask.sigmoid()
    overlap = (inside * batch.targets).sum(dim=(1, 2, 3))
    dice = 1 - ((2 * overlap + 1) / (inside.sum(dim=(1, 2, 3)) + batch.targets.sum(dim=(1, 2, 3)) + 1)).mean()
    with torch.no_grad():
        found, wanted = mask > 0, batch.targets > 0.5
        hidden = batch.hidden * batch.targets[0].numel()
        iou = (found & wanted).sum(dim=(1, 2, 3)) / ((found | wanted).sum(dim=(1, 2, 3)) + hidden).clamp_min(1)
    error = F.mse_loss(quality.float().sigmoid(), iou)
    return {"total": bce + dice + quality_weight * error, "bce": bce, "dice": dice, "quality": error, "iou": iou.mean()}


def train_segmenter(
    objects: Sequence[SegmentedObject],
    backgrounds: Sequence[Image],
    held_out: Sequence[SegmentedObject],
    recipe: SegmenterTraining,
    output: Path,
    init: WeightFile | None = None,
    device: torch.device | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Trains until ``recipe.iterations``, going on from the checkpoint in ``output`` when there is one.

    Args:
        objects: What to learn from.
        backgrounds: Road frames on which a part of the objects is pasted.
        held_out: Objects on which progress is measured at each checkpoint.
        recipe: How.
        output: Folder for ``checkpoint.pt``, ``log.csv``, ``curve.png`` and ``segmenter.safetensors`` (averaged weights, float16).
        init: torchvision ``mobilenet_v2`` features or an earlier segmenter to start from; None for random weights.
        device: Where to train; CPU when None.
        provenance: Written into the weights file: data, start weights.

    Returns:
        The file with the averaged weights.

    Raises:
        InputError: Unusable weights, a checkpoint of another recipe, or a loss that is not finite.
    """
    device = device or torch.device("cpu")
    torch.manual_seed(recipe.seed)
    net = CompactNet(recipe.width)
    if init is not None:
        _start_from(net, init)
    net = net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = AveragedModel(net, multi_avg_fn=partial(_average, recipe.ema), use_buffers=True)
    encoder = [parameter for parameter in net.encoder.parameters() if parameter.requires_grad]
    decoder = [parameter for name, parameter in net.named_parameters() if not name.startswith("encoder.")]
    optimizer = torch.optim.AdamW([{"params": encoder, "share": recipe.encoder_rate}, {"params": decoder, "share": 1.0}], weight_decay=1e-4)
    loop = TrainingLoop(
        output,
        recipe,
        {"net": net, "average": average, "optimizer": optimizer},
        title="train segmenter",
        panels=_PANELS,
        may_change=_MAY_CHANGE,
        checkpoint_minutes=recipe.checkpoint_minutes,
        origin={"init": state_stamp(init.state if init else None), "data": f"{len(objects)} objects, {len(backgrounds)} road frames"},
    )
    net.train()

    def step(batch: Batch) -> dict[str, Tensor]:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * group["share"] * recipe.rate(loop.done)
        batch = _to_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
            logits, quality = net(batch.crops)
        terms = segmenter_loss(logits, quality, batch, recipe.quality_weight)
        loop.descend(optimizer, terms["total"], clip_norm=5.0)
        average.update_parameters(net)
        return terms

    def at_checkpoint() -> dict[str, float]:
        measured = _validate(cast("CompactNet", average.module), held_out, device)
        metadata = {"family": FAMILY, "width": net.width, "recipe": asdict(recipe), "done": loop.done, "validation": measured}
        save_weights(output / "segmenter.safetensors", average.module.state_dict(), {**metadata, **(provenance or {})})
        return measured

    loop.run(_batches(SampleMaker(objects, backgrounds, recipe.warped, recipe.crowded), recipe, loop.done), step, at_checkpoint)
    return output / "segmenter.safetensors"


def _batches(maker: SampleMaker, recipe: SegmenterTraining, done: int) -> Iterator[Batch]:
    """The batches of the steps from ``done`` on, each made while the one before is learnt."""

    def make(step: int) -> Batch:
        # One generator per step: a resumed run sees what an uninterrupted one would have seen.
        rng = np.random.default_rng([recipe.seed, step])
        return maker.batch(recipe.batch_size, int(rng.choice(recipe.crop_sizes)), rng)

    with ThreadPoolExecutor(max_workers=1) as worker:
        upcoming = worker.submit(make, done)
        for step in range(done, recipe.iterations):
            batch = upcoming.result()
            if step + 1 < recipe.iterations:
                upcoming = worker.submit(make, step + 1)
            yield batch


def _average(decay: float, averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
    """Exponential average of one kind of tensors; short at first, so that it soon forgets the random start."""
    weight = 1.0 - min(decay, (1.0 + float(count)) / (10.0 + float(count)))
    for old, new in zip(averaged, current, strict=True):
        if old.is_floating_point():
            old.lerp_(new.to(old.dtype), weight)
        else:
            old.copy_(new)


def _start_from(net: CompactNet, init: WeightFile) -> None:
    if init.metadata.get("family") == FAMILY:
        load_into(net, init, FAMILY)
    else:
        net.load_imagenet(init)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    crops = batch.crops.to(device).contiguous(memory_format=torch.channels_last)
    return Batch(crops, batch.targets.to(device), batch.hidden.to(device))


def _validate(network: CompactNet, objects: Sequence[SegmentedObject], device: torch.device) -> dict[str, float]:
    if not objects:
        return {}
    segmenter = from_network(copy.deepcopy(network), Runtime(device))
    return {f"val_{kind}": values["iou"] for kind, values in measure(segmenter, objects, device).items()}


def measure(
    segmenter: PromptableSegmenter,
    objects: Sequence[SegmentedObject],
    device: torch.device | None = None,
    seed: int = 0,
    far_px: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Mean IoU of a segmenter's masks given each object's box, shifted box and point.

    Args:
        segmenter: Any promptable segmenter.
        objects: What to segment; undecided pixels are left out.
        device: The segmenter's; CPU when None.
        seed: Seed of shifts and points.
        far_px: Shrink each image first, so that the longest side of the object is this long; None leaves the images.

    Returns:
        For each of :data:`PROMPT_KINDS`: ``iou`` (mean over objects), ``objects`` (their number), ``iou_by_longest_side_px``,
        ``iou_by_source``, and ``quality_error``, the mean absolute error of the predicted IoU (None when it predicts none).

    Raises:
        InputError: There are no objects.
    """
    if not objects:
        raise InputError("measuring a segmenter needs at least one object")
    device = device or torch.device("cpu")
    ious: dict[str, list[float]] = {kind: [] for kind in PROMPT_KINDS}
    errors: dict[str, list[float]] = {kind: [] for kind in PROMPT_KINDS}
    shown = [rescale(item, min(1.0, far_px / max(*item.mask.shape))) if far_px else item for item in objects]
    for index, item in enumerate(shown):
        rng = np.random.default_rng([seed, index])
        shifted = jitter_box(item.box_xyxy, rng.uniform(-_SHIFT, _SHIFT, size=4))
        prompts = Prompts(
            torch.tensor([item.box_xyxy, shifted], device=device),
            torch.ones(2, device=device),
            torch.tensor([random_point(item, rng)], device=device),
        )
        result = segmenter(torch.from_numpy(item.image).to(device), prompts)
        truth = item.full_mask()
        for kind, mask, quality in zip(PROMPT_KINDS, result.masks.cpu().numpy(), result.quality.tolist(), strict=True):
            value = _iou(mask, truth)
            ious[kind].append(value)
            errors[kind].append(abs(quality - value))
    return {kind: _summary(shown, np.array(ious[kind]), np.array(errors[kind])) for kind in PROMPT_KINDS}


def _iou(mask: NDArray[np.bool_], truth: Image) -> float:
    wanted = truth == 255
    union = (mask | wanted) & (truth != 128)
    return float((mask & wanted).sum() / np.maximum(union.sum(), 1))


def _summary(objects: Sequence[SegmentedObject], ious: NDArray[np.float64], errors: NDArray[np.float64]) -> dict[str, Any]:
    longest = np.array([max(*item.mask.shape) for item in objects])
    sources = np.array([item.source for item in objects])
    sizes = {f"{low}-{high}": (longest >= low) & (longest < high) for low, high in _SIZES_PX}
    return {
        "iou": float(ious.mean()),
        "objects": len(objects),
        "quality_error": None if np.isnan(errors).any() else float(errors.mean()),
        "iou_by_longest_side_px": {name: float(ious[chosen].mean()) for name, chosen in sizes.items() if chosen.any()},
        "iou_by_source": {str(name): float(ious[sources == name].mean()) for name in np.unique(sources)},
    }


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``segmenter`` to the commands of ``ood-seg train``."""
    defaults = SegmenterTraining()
    parser = subparsers.add_parser(
        "segmenter",
        help="train or measure the promptable segmenter",
        description="Trains the compact segmenter on objects with masks; with --evaluate, measures any segmenter instead.",
    )
    parser.add_argument("--objects", type=Path, help="data set of objects with masks, or folder of such (docs/training.md)")
    parser.add_argument("--roads", type=Path, nargs="*", default=[], help="folders of road frames to paste objects on")
    parser.add_argument("--frames-per-folder", type=int, default=150, help="road frames used of each folder (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run, or the report (*.json) of --evaluate")
    parser.add_argument("--init", type=Path, help="mobilenet_v2 features or an earlier segmenter to start from")
    add_averaging(parser, "segmenter")
    parser.add_argument("--validate-on", type=int, default=120, help="held-out objects measured at every checkpoint (%(default)s)")
    known = descriptions(SegmenterTraining)
    for field in fields(SegmenterTraining):
        if field.name not in ("crop_sizes", "bfloat16"):
            default = getattr(defaults, field.name)
            parser.add_argument(
                f"--{field.name.replace('_', '-')}", type=type(default), default=default, help=f"{known[field.name]} (%(default)s)"
            )
    parser.add_argument("--crop-sizes", type=int, nargs="+", default=list(defaults.crop_sizes), help=f"{known['crop_sizes']} (%(default)s)")
    parser.add_argument("--bfloat16", action="store_true", help="autocast the forward pass; slower on CPUs without AMX")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 leaves torch's choice")
    parser.add_argument("--evaluate", metavar="SEGMENTER", help=f"measure this one ({', '.join(SEGMENTERS.names)}) instead of training")
    parser.add_argument("--weights", default="", help="weights of --evaluate")
    parser.add_argument("--labelled", type=Path, nargs="*", default=[], help="sets of images and labels to measure on too (--evaluate)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    for flag in ("seed", "validate_on", "frames_per_folder"):
        if getattr(args, flag) < 0:
            raise InputError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}, allowed: 0 or more")
    runtime = Runtime.from_arguments(device=args.device, precision="float32", threads=args.threads)
    if args.evaluate:
        return _run_evaluation(args, runtime)
    if args.objects is None:
        raise InputError("training needs --objects, a data set of objects with masks or a folder of such")
    recipe = SegmenterTraining(**{field.name: getattr(args, field.name) for field in fields(SegmenterTraining)})
    recipe = replace(recipe, crop_sizes=tuple(recipe.crop_sizes))
    init = load_weights(args.init) if args.init else None
    is_segmenter = init is not None and init.metadata.get("family") == FAMILY
    check_averaging(args.keep_start, args.average_with, "segmenter", init, CompactNet(recipe.width) if is_segmenter else None)
    objects = load_objects(args.objects, held_out=False)
    held_out = load_objects(args.objects, held_out=True)
    chosen = np.linspace(0, len(held_out) - 1, min(len(held_out), args.validate_on)).astype(int)
    provenance = {
        "start": {"file": args.init.name, **init.metadata} if init else None,
        "objects": dict(Counter(item.source for item in objects)),
        "roads": [
            folder.parent.parent.name + "/" + folder.parent.name if folder.name == "images" else folder.name for folder in args.roads
        ],
    }
    backgrounds = load_backgrounds(args.roads, args.frames_per_folder, recipe.seed)
    path = train_segmenter(
        objects, backgrounds, [held_out[i] for i in chosen], recipe, args.output, init, runtime.device, provenance=provenance
    )
    if init is not None and (args.keep_start or args.average_with):
        path = average_weights(path, init, args.keep_start, CompactNet(recipe.width), FAMILY, half=True, others=args.average_with)
    print(path)
    return 0


def _run_evaluation(args: argparse.Namespace, runtime: Runtime) -> int:
    output = checked_output(args.output)
    segmenter = SEGMENTERS.get(args.evaluate)(SegmenterConfig(name=args.evaluate, weights=args.weights), runtime)
    sets: dict[str, list[SegmentedObject]] = {}
    for folder in args.labelled:
        sets[distinct_name(folder, {"held_out", "held_out_far", *sets}, "--labelled")] = load_labelled(folder)
    report: dict[str, Any] = {}
    if args.objects:
        held_out = load_objects(args.objects, held_out=True)
        report["held_out"] = measure(segmenter, held_out, runtime.device, args.seed)
        report["held_out_far"] = measure(segmenter, held_out, runtime.device, args.seed, far_px=_FAR_PX)
    report.update({name: measure(segmenter, objects, runtime.device, args.seed) for name, objects in sets.items()})
    if not report:
        raise InputError("--evaluate needs --objects or --labelled")
    output.write_text(json.dumps({"segmenter": args.evaluate, **report}, indent=2) + "\n", encoding="utf-8")
    for name, kinds in report.items():
        print(f"{name}: " + ", ".join(f"{kind} {values['iou']:.3f}" for kind, values in kinds.items()))
    return 0
