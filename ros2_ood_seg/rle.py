"""Uncompressed COCO run-length masks: column-major, alternating runs, the first one background."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ros2_ood_seg.errors import InputError


def encode(mask: Tensor | NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Run lengths of a mask.

    Args:
        mask: (H, W) bool, on any device; the runs are found there and only they are copied.

    Returns:
        (K,) uint32 run lengths that sum to H*W; the first counts background and may be 0.
    """
    flat = torch.as_tensor(mask).bool().t().reshape(-1)
    if flat.numel() == 0:
        return np.zeros(0, dtype=np.uint32)
    changes = (torch.nonzero(flat[1:] != flat[:-1]).squeeze(1) + 1).cpu().numpy()
    edges = np.concatenate([[0], changes, [flat.numel()]])
    runs = np.diff(edges)
    if bool(flat[0]):
        runs = np.concatenate([[0], runs])
    return runs.astype(np.uint32)


def decode(counts: Sequence[int] | NDArray[Any], height: int, width: int) -> NDArray[np.bool_]:
    """The mask of run lengths.

    Args:
        counts: Run lengths as :func:`encode` gives them.
        height: Rows of the mask, px.
        width: Columns of the mask, px.

    Raises:
        InputError: The runs do not sum to height*width.
    """
    runs = np.asarray(counts, dtype=np.int64)
    if int(runs.sum()) != height * width or bool((runs < 0).any()):
        raise InputError(f"run lengths sum to {int(runs.sum())}, a mask of {height}x{width} px needs {height * width}")
    values = (np.arange(runs.size) % 2).astype(bool)
    return np.repeat(values, runs).reshape(width, height).T
