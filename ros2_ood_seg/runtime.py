"""Device and precision of the networks, decided once."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ros2_ood_seg.config import RuntimeConfig
from ros2_ood_seg.errors import InputError


@dataclass(frozen=True)
class Runtime:
    """What every stage needs to know about the machine.

    Args:
        device: Where networks and tensors live.
        autocast_dtype: Reduced precision of the networks, or None for float32.
        weights_dir: Folder of further weights, or None.
    """

    device: torch.device
    autocast_dtype: torch.dtype | None = None
    weights_dir: Path | None = None

    @classmethod
    def from_config(cls, config: RuntimeConfig) -> Runtime:
        """Resolves ``auto`` and checks that the device exists.

        Raises:
            InputError: CUDA was asked for and is not there.
        """
        cuda = torch.cuda.is_available()
        name = config.device if config.device != "auto" else ("cuda" if cuda else "cpu")
        device = torch.device(name)
        if device.type == "cuda":
            found = torch.cuda.device_count() if cuda else 0
            if not cuda or (device.index or 0) >= found:
                raise InputError(
                    f"runtime.device is '{config.device}' but torch {torch.__version__} sees {found} CUDA devices: use 'cpu' or 'auto'"
                )
        if config.threads:
            torch.set_num_threads(config.threads)
        wants_bf16 = config.precision == "bfloat16" or (
            config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        weights_dir = Path(config.weights_dir) if config.weights_dir else None
        if weights_dir is not None and not weights_dir.is_dir():
            raise InputError(f"runtime.weights_dir '{weights_dir}' is not a folder")
        return cls(device, torch.bfloat16 if wants_bf16 else None, weights_dir)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Context in which the networks run."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def synchronize(self) -> None:
        """Waits for the device, so that wall-clock times mean something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
