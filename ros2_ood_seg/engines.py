"""Runs a network on the CPU with OpenVINO, which needs about half of torch's time for the small convolutions of the compact networks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ros2_ood_seg.config import cache_root
from ros2_ood_seg.errors import InputError

MAX_SHAPES = 8
"""Input shapes that stay compiled: the compact scorer's four looks at pictures of two shapes. One more costs a third of a second, and the
one unused for longest goes."""

_KEEP_DAYS = 60.0


def openvino_installed() -> bool:
    """Whether the package ``openvino`` is there; it is not imported."""
    return find_spec("openvino") is not None


def cache_dir() -> Path:
    """Where converted networks are kept; see :func:`~ros2_ood_seg.config.cache_root`."""
    return cache_root() / "openvino"


class OpenVinoNetwork:
    """A network converted to OpenVINO: float32 on the CPU.

    It is compiled once for every (C, h, w) that comes; for open sizes OpenVINO would be slower and take three times the memory.
    The conversion takes about two seconds and 100 MB, so it is kept in :func:`cache_dir`, under a name made from weights and code.

    Args:
        network: In evaluation mode on the CPU, of one (B, C, h, w) input; returns a tuple of tensors. No step may depend on values.
        example: An input to trace it with, small so that tracing is quick.
        threads: Of the CPU.
        parallel: Run the items of a batch at the same time, on one thread each, rather than one after the other on all threads.

    Raises:
        RuntimeError: OpenVINO cannot convert the network.
    """

    def __init__(self, network: nn.Module, example: Tensor, threads: int, *, parallel: bool = False) -> None:
        self._model = _converted(network, example)
        self._streams = threads if parallel else 1
        self._options = {
            "NUM_STREAMS": self._streams,
            "INFERENCE_NUM_THREADS": threads,
            # Pinned threads of two cameras' processes would share one core and leave the others idle.
            "ENABLE_CPU_PINNING": False,
            # Where the CPU has bfloat16, OpenVINO would use it without being asked, and scores would be off by a tenth.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._queues: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Runs the network on (B, C, h, w) float32; the outputs are the caller's own."""
        items = x.contiguous().numpy()
        queue = self._queue(items.shape[1:])
        outputs: list[Any] = [None] * len(items)

        def keep(request: Any, index: int) -> None:
            outputs[index] = [tensor.data.copy() for tensor in request.output_tensors]

        queue.set_callback(keep)
        for index in range(len(items)):
            queue.start_async({0: items[index : index + 1]}, index)
        queue.wait_all()
        return tuple(torch.from_numpy(np.concatenate(parts)) for parts in zip(*outputs, strict=True))

    def _queue(self, item_shape: tuple[int, ...]) -> Any:
        """The requests compiled for items of this shape."""
        if item_shape not in self._queues:
            openvino, core = _openvino()
            model = self._model.clone()
            model.reshape({0: [1, *item_shape]})
            self._queues[item_shape] = openvino.AsyncInferQueue(core.compile_model(model, "CPU", self._options), self._streams)
            if len(self._queues) > MAX_SHAPES:
                self._queues.popitem(last=False)
        self._queues.move_to_end(item_shape)
        return self._queues[item_shape]


@functools.cache
def _openvino() -> tuple[Any, Any]:
    """The package and its one core."""
    # OpenVINO reports its use over the network as soon as it is imported, unless its package for that is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino, openvino.Core()


def _converted(network: nn.Module, example: Tensor) -> Any:
    openvino, core = _openvino()
    name = f"{_fingerprint(network, example, openvino.get_version())}.xml"
    # A file that another version or a full disk left broken is made anew, and so is one in a folder that cannot be entered or found.
    with contextlib.suppress(OSError, RuntimeError, InputError):
        path = cache_dir() / name
        if path.is_file():
            model = core.read_model(path)
            # Others may own it.
            with contextlib.suppress(OSError):
                os.utime(path)
            return model
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = openvino.frontend.FrontEndManager().load_by_framework("pytorch")
    with torch.no_grad(), warnings.catch_warnings():
        # torch deprecates its tracer, and the tracer warns of sizes that OpenVINO reads from the graph as they are.
        warnings.simplefilter("ignore")
        # OpenVINO calls the decoder back while it converts, and does not keep it alive itself.
        decoder = TorchScriptPythonDecoder(network, example_input=example)
        model = frontend.convert(frontend.load(decoder))
    with contextlib.suppress(OSError, RuntimeError, InputError):
        path = cache_dir() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            openvino.save_model(model, Path(folder) / path.name, compress_to_fp16=False)
            # The weights first: a description without them would be taken for complete.
            for suffix in (".bin", ".xml"):
                (Path(folder) / path.name).with_suffix(suffix).replace(path.with_suffix(suffix))
        _remove_unused(path.parent)
    return model


def _remove_unused(folder: Path) -> None:
    """Networks of other weights and versions that nobody has read for long."""
    oldest_s = time.time() - _KEEP_DAYS * 86400.0
    for path in folder.glob("*.xml"):
        if path.stat().st_mtime < oldest_s:
            path.unlink(missing_ok=True)
            path.with_suffix(".bin").unlink(missing_ok=True)


def _fingerprint(network: nn.Module, example: Tensor, version: str) -> str:
    """Changes with everything that the converted network depends on."""
    digest = hashlib.sha256(f"{version} {torch.__version__} {tuple(example.shape)} {network}".encode())
    for kind in sorted({type(module) for module in network.modules()}, key=lambda kind: kind.__qualname__):
        if not kind.__module__.startswith("torch."):
            # The whole module: its functions and constants count, too.
            digest.update(inspect.getsource(sys.modules[kind.__module__]).encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
