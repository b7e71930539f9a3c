"""Greedy suppression of duplicate masks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def greedy_nms(iou: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Keeps a mask unless a better one that was kept overlaps it by more than ``threshold``.

    Args:
        iou: (N, N) pairwise IoU.
        scores: (N,) ranking, higher first; of equal ones the first.
        threshold: Greatest IoU that two kept masks may have.

    Returns:
        (K,) int64 indices of the kept masks, best first, on the device of ``scores``.
    """
    order = torch.argsort(scores, descending=True, stable=True).cpu().numpy()
    duplicates = (iou > threshold).cpu().numpy()
    suppressed = np.zeros(len(order), dtype=bool)
    kept = []
    for n in order:
        if not suppressed[n]:
            kept.append(int(n))
            suppressed |= duplicates[n]
    return torch.tensor(kept, dtype=torch.int64, device=scores.device)


def drop_contained(inside: Tensor, kept: Tensor, threshold: float) -> Tensor:
    """Leaves out masks that lie in better ones, as the parts of an object do; their IoU may be small.

    Args:
        inside: (N, N) share of the row's mask that the column's mask covers.
        kept: (K,) int64 indices of the masks in question, best first.
        threshold: A mask is left out when a better one that stays covers more than this share of it; 1 for none.

    Returns:
        (K',) int64, what stays of ``kept``, in its order.
    """
    covered = (inside[kept][:, kept] > threshold).cpu().numpy()
    stays = np.zeros(len(kept), dtype=bool)
    for n in range(len(kept)):
        stays[n] = not (covered[n, :n] & stays[:n]).any()
    return kept[torch.from_numpy(stays).to(kept.device)]
