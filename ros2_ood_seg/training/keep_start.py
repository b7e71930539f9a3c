"""Fine-tuned weights averaged with those they started from (WiSE-FT, Wortsman et al., CVPR 2022), for ``--keep-start``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.weights.store import WeightFile, load_into, load_weights, save_weights


def add_keep_start(parser: argparse.ArgumentParser, model: str, note: str = "") -> None:
    """Adds ``--keep-start``.

    Args:
        parser: Of the training.
        model: What ``--init`` has to be, as ``scorer``.
        note: Put before the help.
    """
    parser.add_argument(
        "--keep-start",
        type=float,
        default=0.0,
        metavar="SHARE",
        help=f"{note}this share of the finished weights is --init's, an earlier {model}; 0.5 often does better on other cameras than "
        "either (WiSE-FT, Wortsman et al. 2022)",
    )


def check_keep_start(share: float, model: str, start: WeightFile | None, is_model: bool) -> None:
    """Refuses what could only fail after the training.

    Args:
        share: Of ``--keep-start``.
        model: As for :func:`add_keep_start`.
        start: Of ``--init``.
        is_model: Whether that is an earlier model.

    Raises:
        InputError: A share out of range, or nothing to keep.
    """
    if not 0.0 <= share < 1.0:
        raise InputError(f"--keep-start is {share}, allowed: 0 to below 1")
    if share and (start is None or not is_model):
        raise InputError(f"--keep-start needs an earlier {model} as --init, whose weights it keeps")


def average_with_start(trained: Path, start: WeightFile, share: float, network: nn.Module, family: str, half: bool) -> Path:
    """Mixes a fine-tuned network with what it started from, weight by weight.

    Args:
        trained: Averaged weights of the training.
        start: The earlier weights.
        share: Of the start, in (0, 1).
        network: Of this shape; its weights are overwritten.
        family: Its name, for messages.
        half: Save as float16.

    Returns:
        ``averaged.safetensors`` beside ``trained``, with its metadata and ``keep_start``.

    Raises:
        WeightsError: ``start`` does not fit the network.
    """
    after = load_weights(trained)
    load_into(network, start, family)
    earlier = network.state_dict()
    mixed = {
        name: torch.lerp(value.float(), earlier[name].float(), share) if value.is_floating_point() else value
        for name, value in after.state.items()
    }
    path = trained.with_name("averaged.safetensors")
    save_weights(path, mixed, {**after.metadata, "keep_start": share}, half=half)
    return path
