"""Averages of weights: of several trainings, and of these with what they started from, for ``--average-with`` and ``--keep-start``.

Model soups (Wortsman et al., ICML 2022) and WiSE-FT (Wortsman et al., CVPR 2022): networks fine-tuned from the same weights may be
averaged weight by weight, and the average often does better on data unlike the training's than any of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.weights.store import WeightFile, load_into, load_weights, save_weights


def add_averaging(parser: argparse.ArgumentParser, model: str, note: str = "") -> None:
    """Adds ``--average-with`` and ``--keep-start``.

    Args:
        parser: Of the training.
        model: What is averaged, as ``scorer``.
        note: Put before the help.
    """
    parser.add_argument(
        "--average-with",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"{note}weights of other trainings that started from --init, averaged in equal parts with this one's, before --keep-start",
    )
    parser.add_argument(
        "--keep-start",
        type=float,
        default=0.0,
        metavar="SHARE",
        help=f"{note}this share of the finished weights is --init's, an earlier {model}; 0.5 often does better on other cameras than "
        "either (WiSE-FT, Wortsman et al. 2022)",
    )


def check_averaging(share: float, others: Sequence[Path], model: str, start: WeightFile | None, network: nn.Module | None) -> None:
    """Refuses what could only fail after the training.

    Args:
        share: Of ``--keep-start``.
        others: Of ``--average-with``.
        model: As for :func:`add_averaging`.
        start: Of ``--init``.
        network: One that fits ``--init``; its weights are overwritten. None when that is no earlier model.

    Raises:
        InputError: A share out of range, or nothing to keep.
        WeightsError: Weights that are missing, damaged or of another network.
    """
    if not 0.0 <= share < 1.0:
        raise InputError(f"--keep-start is {share}, allowed: 0 to below 1")
    for flag, is_used in (("--keep-start", bool(share)), ("--average-with", bool(others))):
        if is_used and (start is None or network is None):
            raise InputError(f"{flag} needs an earlier {model} as --init, from which all that is averaged was trained")
    if network is not None:
        for path in others:
            load_into(network, load_weights(path), model)


def average_weights(
    trained: Path, start: WeightFile, share: float, network: nn.Module, family: str, half: bool, others: Sequence[Path] = ()
) -> Path:
    """Mixes fine-tuned networks with each other and with what they started from, weight by weight.

    Args:
        trained: Averaged weights of the training.
        start: The earlier weights.
        share: Of the start, at least 0 and below 1; the rest is shared equally by ``trained`` and ``others``.
        network: Of this shape; its weights are overwritten.
        family: Its name, for messages.
        half: Save as float16.
        others: Weights of other trainings from the same start.

    Returns:
        ``averaged.safetensors`` beside ``trained``, with its metadata, ``keep_start`` and the recipes of the others, ``averaged_with``.

    Raises:
        WeightsError: Any of them does not fit the network.
    """
    after, further = load_weights(trained), [load_weights(path) for path in others]
    fitting = []
    for weights in (after, *further, start):
        load_into(network, weights, family)
        fitting.append({name: value.clone() for name, value in network.state_dict().items()})
    *tuned, earlier = fitting
    mixed = {name: _mix([state[name] for state in tuned], earlier[name], share) for name in earlier}
    metadata = {**after.metadata, "keep_start": share}
    if further:
        metadata["averaged_with"] = [weights.metadata.get("recipe") for weights in further]
    path = trained.with_name("averaged.safetensors")
    save_weights(path, mixed, metadata, half=half)
    return path


def _mix(tuned: Sequence[Tensor], earlier: Tensor, share: float) -> Tensor:
    if not earlier.is_floating_point():
        return tuned[0]
    return torch.lerp(torch.stack([value.float() for value in tuned]).mean(0), earlier.float(), share)
