from __future__ import annotations

import pytest
import torch

from ros2_ood_seg.config import RuntimeConfig
from ros2_ood_seg.runtime import Runtime


@pytest.mark.parametrize(
    ("capability", "precision", "dtype"),
    [
        ((7, 5), "auto", None),
        ((8, 0), "auto", torch.bfloat16),
        ((9, 0), "auto", torch.bfloat16),
        ((9, 0), "float32", None),
        ((7, 5), "bfloat16", torch.bfloat16),
    ],
)
def test_bfloat16_by_itself_only_where_the_gpu_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str, dtype: torch.dtype | None
) -> None:
    asked = []

    def of(device: torch.device) -> tuple[int, int]:
        asked.append(str(device))
        return capability

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", of)
    assert Runtime.from_config(RuntimeConfig(device="cuda:1", precision=precision)).autocast_dtype == dtype
    assert asked == ["cuda:1"]
