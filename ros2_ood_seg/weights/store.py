"""Finding and reading weights files; nothing is ever downloaded from here, and no pickle is executed."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ros2_ood_seg.errors import WeightsError

_LOG = logging.getLogger(__name__)
BUNDLED_DIR = Path(__file__).resolve().parent
WEIGHTS_NAME = "model.safetensors"
"""The weights inside a folder of transformers; calibrations lie beside it."""

ENVIRONMENT_VARIABLE = "OOD_SEG_WEIGHTS"
_NUMPY_SCALARS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((cast("Callable[..., Any]", np.float64(0).__reduce__()[0]), f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float16", "float32", "float64", "int32", "int64", "bool")),
]
"""What a pickled number of numpy needs; NVIDIA's, SML's and others' checkpoints hold the epoch's score as one."""

_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".pkl", "")


@dataclass(frozen=True)
class WeightFile:
    """A state dict with what was written beside it.

    Args:
        path: Where it came from.
        state: Parameter name to tensor, on the CPU; half precision is widened to float32.
        metadata: What :func:`save_weights` stored (recipe, calibration, class names); empty for other formats.
    """

    path: Path
    state: dict[str, Tensor]
    metadata: dict[str, Any]


def search_dirs(weights_dir: Path | None) -> list[Path]:
    """Where weights are looked up, in order: the package, ``weights_dir``, the folders of ``OOD_SEG_WEIGHTS``."""
    dirs = [BUNDLED_DIR]
    if weights_dir is not None:
        dirs.append(weights_dir)
    dirs += [Path(part) for part in os.environ.get(ENVIRONMENT_VARIABLE, "").split(os.pathsep) if part]
    return dirs


def find_weights(name: str, weights_dir: Path | None = None) -> Path:
    """The file of a weights name or path.

    Args:
        name: A path, or a name with or without its ending (``compact_scorer``).
        weights_dir: Folder searched after the package's own.

    Raises:
        WeightsError: There is none; lists where it was looked for.
    """
    if "/" in name or Path(name).is_file():
        if Path(name).is_file():
            return Path(name)
        raise WeightsError(f"weights file '{name}' does not exist")
    dirs = search_dirs(weights_dir)
    found = [path for folder in dirs for suffix in _SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
    if found:
        if found[0].parent == BUNDLED_DIR and len(found) > 1:
            _LOG.warning(
                "the bundled '%s' comes before '%s': name that file in the settings (scorer.weights, ...) to use it", name, found[1]
            )
        return found[0]
    looked = ", ".join(str(folder) for folder in dirs)
    raise WeightsError(
        f"no weights '{name}' in {looked}: see 'ood-seg weights list', then set runtime.weights_dir or {ENVIRONMENT_VARIABLE}"
    )


def load_weights(path: Path) -> WeightFile:
    """Reads a state dict: safetensors, or a torch file through ``weights_only``, unwrapping the usual containers.

    Known wrappers: ``{"state_dict": ...}`` (Lightning, NVIDIA), ``{"model": ...}`` (detectron2, RPL), ``{"model_state": ...}``, and the
    ``module.`` prefix of DataParallel.

    Raises:
        WeightsError: Not readable, truncated, or holding something other than tensors.
    """
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"weights file '{path}' holds more than tensors and was refused without running it: {_line(error)}") from error
    # Damaged files fail in any way: struct, index and lookup errors, failed assertions.
    except Exception as error:
        raise WeightsError(f"weights file '{path}' cannot be read, it is damaged or no torch file: {_line(error)}") from error
    for key in ("state_dict", "model", "model_state"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"weights file '{path}' must hold a state dict, got {type(loaded).__name__}")
    state = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
    if not state:
        raise WeightsError(f"weights file '{path}' holds no tensors; its keys are {', '.join(map(str, list(loaded)[:5]))}")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return WeightFile(path, _widen(state), {})


def save_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any], *, half: bool = True) -> None:
    """Writes a safetensors file, all at once: a reader never sees half of it.

    Args:
        path: ``*.safetensors``.
        state: Parameter name to tensor.
        metadata: JSON-serialisable; read back by :func:`load_weights`.
        half: Store floating-point tensors as float16, but those that hold greater numbers than it knows.
    """
    tensors = {k: (_halved(v) if half and v.is_floating_point() else v).detach().cpu().contiguous() for k, v in state.items()}
    # Layers that are tied share their memory, which the format does not know.
    storages: set[int] = set()
    for name, value in tensors.items():
        storage = value.untyped_storage().data_ptr()
        if storage in storages:
            tensors[name] = value.clone()
        storages.add(storage)
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not save_file, which makes files that only their owner may read.
    partial.write_bytes(save(tensors, metadata={"ros2_ood_seg": json.dumps(dict(metadata), sort_keys=True)}))
    partial.replace(path)


def _halved(values: Tensor) -> Tensor:
    """In float16, but as they are where a number would become infinite: variances of a batch norm can be that great."""
    half = values.half()
    return half if torch.equal(half.isfinite(), values.isfinite()) else values


def load_into(module: torch.nn.Module, weights: WeightFile, expected: str) -> None:
    """Loads a state dict strictly.

    Args:
        module: The network.
        weights: What was read.
        expected: Name of the family, for the message.

    Raises:
        WeightsError: Missing, unexpected or differently shaped entries, or values that are not finite; lists the first few.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in weights.state]
    extra = [key for key in weights.state if key not in own]
    shapes = [
        f"{key} {tuple(weights.state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights.state and weights.state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise WeightsError(f"weights file '{weights.path}' is not of the family '{expected}': {'; '.join(problems)}")
    not_finite = [key for key in own if not torch.isfinite(weights.state[key]).all()]
    if not_finite:
        raise WeightsError(f"weights file '{weights.path}' holds values that are not finite, in {', '.join(not_finite[:3])}")
    module.load_state_dict(weights.state)


def _load_safetensors(path: Path) -> WeightFile:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get("ros2_ood_seg", "{}")
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = json.loads(text)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise WeightsError(f"weights file '{path}' cannot be read, it is damaged or no safetensors file: {_line(error)}") from error
    return WeightFile(path, _widen(state), metadata)


def _widen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() if value.dtype in (torch.float16, torch.bfloat16) else value for key, value in state.items()}


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + "…"
