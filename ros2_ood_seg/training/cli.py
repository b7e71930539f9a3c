"""``ood-seg train`` and ``ood-seg calibrate``."""

from __future__ import annotations

import argparse

from ros2_ood_seg.training import calibrate, prompt_generator_cli, rba_command, scorer_command, segmenter

TRAINERS = (scorer_command, rba_command, prompt_generator_cli, segmenter)
"""Modules whose ``register`` adds one model to ``ood-seg train``."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds both commands."""
    train = subparsers.add_parser("train", help="train scorer, prompt generator or segmenter")
    models = train.add_subparsers(dest="model", metavar="MODEL", required=True)
    for trainer in TRAINERS:
        trainer.register(models)
    calibrate.register(subparsers)
