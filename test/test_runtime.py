from __future__ import annotations

import pytest
import torch

from ros2_ood_seg.config import RuntimeConfig
from ros2_ood_seg.errors import InputError
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
    monkeypatch.setattr("ros2_ood_seg.runtime.cuda_error", lambda device: "")
    assert Runtime.from_config(RuntimeConfig(device="cuda:1", precision=precision)).autocast_dtype == dtype
    assert asked == ["cuda:1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which torch cannot compute with CUDA")
def test_a_gpu_that_torch_sees_but_cannot_use_is_left_alone_or_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    runtime = Runtime.from_config(RuntimeConfig())
    assert (runtime.device, runtime.autocast_dtype) == (torch.device("cpu"), None)
    assert "the CPU is used, as torch" in caplog.text
    with pytest.raises(InputError, match=r"^runtime.device is 'cuda:0', on which torch [\d.+a-z]+ cannot compute: \S+"):
        Runtime.from_config(RuntimeConfig(device="cuda:0"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, r"^arguments: 'runtime.device' is 'gpu', allowed: text \(auto, cpu, cuda, cuda:N\)$"),
        ({"device": "cpu", "threads": -1}, r"^arguments: 'runtime.threads' is -1, allowed: a whole number, at least 0 and at most 1024$"),
    ],
)
def test_what_a_command_line_says_is_checked_in_one_line(settings: dict[str, str | int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Runtime.from_arguments(**settings)
