"""``ood-seg ablate``: what each stage of a method contributes."""

from __future__ import annotations

import argparse

from ros2_ood_seg.training import ablate_s2m, ablate_ugains


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``ablate``."""
    parser = subparsers.add_parser("ablate", help="measure what each stage of a method contributes")
    methods = parser.add_subparsers(dest="method", metavar="METHOD", required=True)
    for method in (ablate_s2m, ablate_ugains):
        method.register(methods)
