"""``ood-seg bench`` says what it ran on."""

from __future__ import annotations

import pytest
import torch

from ros2_ood_seg.bench import hardware
from ros2_ood_seg.runtime import Runtime


@pytest.mark.parametrize(("device", "name", "memory_mb"), [("cuda:1", "second", 7.0), ("cuda:0", "first", 3.0), ("cpu", "none", 0.0)])
def test_name_and_memory_are_those_of_the_gpu_that_was_used(
    device: str, name: str, memory_mb: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = {None: ("first", 3.0), torch.device("cuda:0"): ("first", 3.0), torch.device("cuda:1"): ("second", 7.0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: gpus[device][0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: gpus[device][1] * 2**20)
    assert hardware(torch.device(device))["gpu"] == name
    assert Runtime(torch.device(device)).peak_gpu_memory_mb() == memory_mb
