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
