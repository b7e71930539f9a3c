"""Device and precision of the networks, decided once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ros2_ood_seg.config import RuntimeConfig, build_config
from ros2_ood_seg.engines import OpenVinoNetwork, openvino_installed
from ros2_ood_seg.errors import InputError

Forward = Callable[[Tensor], tuple[Tensor, ...]]
"""A network that is ready to run: (B, C, h, w) float32 on the runtime's device to its outputs."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """What every stage needs to know about the machine.

    Args:
        device: Where networks and tensors live.
        autocast_dtype: Reduced precision of the networks, or None for float32.
        weights_dir: Folder of further weights, or None.
        engine: What runs the networks given to :meth:`prepare`.
    """

    device: torch.device
    autocast_dtype: torch.dtype | None = None
    weights_dir: Path | None = None
    engine: Literal["torch", "openvino"] = "torch"

    @classmethod
    def from_config(cls, config: RuntimeConfig) -> Runtime:
        """Resolves ``auto`` and checks that the device exists and computes.

        Raises:
            InputError: CUDA or OpenVINO was asked for and is not there, or the engine does not go with device and precision.
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
            if error := cuda_error(device):
                if config.device != "auto":
                    raise InputError(f"runtime.device is '{config.device}', on which torch {torch.__version__} cannot compute: {error}")
                _LOG.warning("the CPU is used, as torch %s cannot compute on the GPU: %s", torch.__version__, error)
                device = torch.device("cpu")
        if config.threads:
            torch.set_num_threads(config.threads)
        # torch's own question for bfloat16 counts GPUs in that only emulate it.
        has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        wants_bf16 = config.precision == "bfloat16" or (config.precision == "auto" and has_bf16)
        weights_dir = Path(config.weights_dir) if config.weights_dir else None
        if weights_dir is not None and not weights_dir.is_dir():
            raise InputError(f"runtime.weights_dir '{weights_dir}' is not a folder")
        engine = _engine(config.engine, can_openvino=device.type == "cpu" and not wants_bf16)
        return cls(device, torch.bfloat16 if wants_bf16 else None, weights_dir, engine)

    @classmethod
    def from_arguments(cls, **settings: str | int) -> Runtime:
        """The same for what a command line says; ``settings`` are fields of the configuration.

        Raises:
            InputError: As above, or a value that the settings do not allow.
        """
        return cls.from_config(build_config({"runtime": settings}, "arguments").runtime)

    def prepare(self, network: nn.Module, example: Tensor, *, parallel: bool = False) -> Forward:
        """Makes a network ready to run, with the engine.

        Args:
            network: In evaluation mode on the device, in channels-last memory format; returns a tuple of tensors.
            example: (B, C, h, w) float32 input to trace it with.
            parallel: The items of a batch are small; see :class:`~ros2_ood_seg.engines.OpenVinoNetwork`.
        """
        if self.engine == "openvino":
            try:
                return OpenVinoNetwork(network, example, torch.get_num_threads(), parallel=parallel)
            # The converter is no public part of OpenVINO: another version may lack it.
            except (RuntimeError, ImportError, AttributeError, OSError) as error:
                _LOG.warning("OpenVINO cannot run %s, torch runs it: %s", type(network).__name__, " ".join(str(error).split())[:200])

        def forward(x: Tensor) -> tuple[Tensor, ...]:
            with self.autocast():
                return tuple(network(x.contiguous(memory_format=torch.channels_last)))

        return forward

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Context in which the networks run."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def synchronize(self) -> None:
        """Waits for the device, so that wall-clock times mean something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_gpu_memory_mb(self) -> float:
        """Most memory that tensors of this process took on the device at a time, MB; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else 0.0


def cuda_error(device: torch.device) -> str:
    """Why a CUDA device that torch sees cannot compute, "" where it can: torch may hold no code for an old or a new GPU."""
    try:
        torch.ones(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return ""


def _engine(wanted: str, can_openvino: bool) -> Literal["torch", "openvino"]:
    if wanted == "torch":
        return "torch"
    installed = openvino_installed()
    if wanted == "openvino" and not installed:
        raise InputError("runtime.engine is 'openvino' but the package openvino is not installed: 'pip install openvino', or use 'auto'")
    if wanted == "openvino" and not can_openvino:
        raise InputError("runtime.engine is 'openvino', which runs in float32 on a CPU: use 'auto', or other runtime.device and precision")
    return "openvino" if installed and can_openvino else "torch"


def peak_memory_mb() -> float:
    """Peak resident memory of this process, MB, from Linux; ``ru_maxrss`` of a child process would begin with its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
