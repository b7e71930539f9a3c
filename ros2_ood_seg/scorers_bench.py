"""``ood-seg bench scorers``: time and memory of each scorer on one frame. Speed does not depend on the weights, so they are random."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models import segmentation

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.runtime import Runtime, peak_memory_mb
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.scorers.networks.compact import CompactNet
from ros2_ood_seg.scorers.networks.deeplab_mobilenet_v2 import DeepLabMobileNetV2
from ros2_ood_seg.scorers.networks.deeplab_resnet101 import DeepLabResNet101
from ros2_ood_seg.scorers.networks.deeplab_wrn38 import DeepLabWideResNet38
from ros2_ood_seg.scorers.networks.ladder_densenet import LadderDenseNet
from ros2_ood_seg.scorers.networks.mask2former import Mask2Former
from ros2_ood_seg.scorers.networks.mix_transformer import MixTransformer
from ros2_ood_seg.scorers.networks.resnet import ResNet
from ros2_ood_seg.scorers.networks.segformer import GmmSeg, SegFormer
from ros2_ood_seg.scorers.networks.swin import SwinTransformer
from ros2_ood_seg.weights.store import find_weights, load_weights, save_weights


def _mask2former(backbone: SwinTransformer | ResNet, classes: int = 20, *, levels: int = 3, global_attention: bool = False) -> Mask2Former:
    """In the size of the releases: 100 queries, six encoder layers, nine decoder layers on three levels or one on one."""
    layers = 9 if levels == 3 else 1
    return Mask2Former(backbone, classes, 100, 256, 256, levels, 6, 1024, levels, layers, 2048, global_attention=global_attention)


def _mit_b5() -> MixTransformer:
    return MixTransformer((64, 128, 320, 512), (3, 6, 40, 3))


def _swin_b() -> SwinTransformer:
    return SwinTransformer(128, (2, 2, 18, 2), (4, 8, 16, 32), 12)


def _swin_l() -> SwinTransformer:
    return SwinTransformer(192, (2, 2, 18, 2), (6, 12, 24, 48), 12)


def _resnet50() -> ResNet:
    return ResNet(64, (64, 128, 256, 512), (256, 512, 1024, 2048), (3, 4, 6, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "deeplab_wrn38": DeepLabWideResNet38,
    "deeplab_mobilenet_v2": lambda: DeepLabMobileNetV2(19),
    "max_entropy": DeepLabWideResNet38,
    "pebal": lambda: DeepLabWideResNet38(20),
    "rpl": lambda: DeepLabWideResNet38(residual=True, projection=True),
    "dense_hybrid": lambda: DeepLabWideResNet38(ood_head=True),
    "mahalanobis": DeepLabWideResNet38,
    "sml": DeepLabResNet101,
    "ldn121": LadderDenseNet,
    "dense_hybrid_ldn121": lambda: LadderDenseNet(ood_head=True),
    "segformer": lambda: SegFormer(_mit_b5(), 19, 768),
    "gmmseg": lambda: GmmSeg(_mit_b5(), 19, 5, 768, 64),
    "rba": lambda: _mask2former(_swin_b(), levels=1),
    "eam": lambda: _mask2former(_swin_l()),
    "uno": lambda: _mask2former(_swin_l(), 21),
    "mask2anomaly": lambda: _mask2former(_resnet50(), global_attention=True),
    "torchvision_segmentation": lambda: segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
}
"""Networks of the scorers whose weights are not bundled, in the sizes of their releases."""


def register(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``ood-seg bench scorers``."""
    parser = kinds.add_parser("scorers", help="milliseconds and peak memory per scorer on one frame")
    names = ("compact", *NETWORKS)
    parser.add_argument("--scorers", nargs="+", choices=names, default=list(names), help="which ones, all without")
    parser.add_argument("--width", type=int, default=2048, help="width of the frame and of the network input, px")
    parser.add_argument("--height", type=int, default=1024, help="height of the frame, px")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs after one that warms up")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on GPUs that have it")
    parser.add_argument("--output", type=Path, default=None, help="write the figures as JSON")
    parser.set_defaults(run=_run)


def measure(name: str, folder: Path, width: int, height: int, repeats: int, device: str, precision: str) -> dict[str, float]:
    """Runs one scorer on a random frame.

    Args:
        name: ``compact`` or one of :data:`NETWORKS`.
        folder: Where :func:`write_random_weights` put its weights.
        width: Of frame and network input, px.
        height: Of the frame, px.
        repeats: Measured runs.
        device: As ``runtime.device``.
        precision: As ``runtime.precision``.

    Returns:
        ``p50_ms``, ``p95_ms``, ``peak_memory_mb`` of the process and ``peak_gpu_memory_mb``.
    """
    runtime = Runtime.from_arguments(device=device, precision=precision)
    weights = str(folder / "w.safetensors") if name in NETWORKS else ""
    scorer = SCORERS.get(name)(ScorerConfig(name=name, input_width=width, weights=weights), runtime)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).to(runtime.device)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        scorer(image)
        runtime.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return {
        "p50_ms": float(np.percentile(times[1:], 50)),
        "p95_ms": float(np.percentile(times[1:], 95)),
        "peak_memory_mb": peak_memory_mb(),
        "peak_gpu_memory_mb": runtime.peak_gpu_memory_mb(),
    }


def write_random_weights(name: str, folder: Path) -> int:
    """Writes a checkpoint and, where the scorer needs them, statistics.

    Args:
        name: One of :data:`NETWORKS`.
        folder: Where to.

    Returns:
        Number of parameters.
    """
    torch.manual_seed(0)
    network = NETWORKS[name]()
    save_weights(folder / "w.safetensors", network.state_dict(), {}, half=False)
    if name == "mahalanobis":
        inverse = torch.eye(256).expand(19, 256, 256)
        save_weights(folder / "w.statistics.safetensors", {"means": torch.zeros(19, 256), "inverse": inverse}, {}, half=False)
    if name == "sml":
        (folder / "w.statistics.json").write_text(json.dumps({"mean": [0.0] * 19, "var": [1.0] * 19}), encoding="utf-8")
    return sum(p.numel() for p in network.parameters())


def _bundled_parameters() -> int:
    network = CompactNet.of(load_weights(find_weights("compact_scorer")))
    return sum(p.numel() for p in network.parameters())


def _run(args: argparse.Namespace) -> int:
    from ros2_ood_seg.bench import hardware

    for option, least in (("width", 64), ("height", 64), ("repeats", 1)):
        if getattr(args, option) < least:
            raise InputError(f"--{option} is {getattr(args, option)}, allowed: {least} or more")
    device = Runtime.from_arguments(device=args.device).device
    figures = {}
    print(f"random weights but for compact, one frame of {args.width}x{args.height}")
    for name in args.scorers:
        with tempfile.TemporaryDirectory() as folder:
            parameters = _in_own_process(write_random_weights, name, Path(folder)) if name in NETWORKS else _bundled_parameters()
            rest = (args.width, args.height, args.repeats, args.device, args.precision)
            row = {"parameters": parameters, **_in_own_process(measure, name, Path(folder), *rest)}
        figures[name] = row
        memory = f"{row['peak_memory_mb']:6.0f} MB" + (f", GPU {row['peak_gpu_memory_mb']:6.0f} MB" if row["peak_gpu_memory_mb"] else "")
        print(f"{name:26} {row['parameters'] / 1e6:6.1f} M  p50 {row['p50_ms']:9.1f} ms  p95 {row['p95_ms']:9.1f} ms  {memory}", flush=True)
    report = {
        "image": [args.width, args.height],
        "precision": args.precision,
        "weights": "random but for compact",
        "scorers": figures,
        "hardware": hardware(device),
    }
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Calls a function in a process of its own, because the peak memory of a process never falls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
