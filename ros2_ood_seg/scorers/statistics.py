"""In-distribution statistics beside the weights: of the max logit (SML) and of features (Mahalanobis); read without running a pickle."""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.weights.store import load_weights


@dataclass(frozen=True)
class MaxLogitStatistics:
    """Mean and variance of the max logit over the in-distribution pixels of each predicted class (SML, Eq. 2).

    Args:
        mean: (K,) float32.
        variance: (K,) float32, positive.
    """

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class FeatureStatistics:
    """Gaussian of the in-distribution features of each class.

    Args:
        mean: (K, D) float32.
        inverse: (K, D, D) float32 inverse covariances.
    """

    mean: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class StatisticsSource:
    """Where a scorer's in-distribution statistics come from and go to.

    Args:
        observe: Takes a network input (1, 3, h, w), see :func:`ros2_ood_seg.scorers.network.network_input`; gives (D, N) float32 values
            of N pixels and their (N,) predicted classes.
        num_classes: Classes K of the network.
        path: The file that the scorer looks for.
    """

    observe: Callable[[Tensor], tuple[Tensor, Tensor]]
    num_classes: int
    path: Path


def statistics_path(weights: Path, suffix: str) -> Path:
    """Where the statistics of a weights file are: ``w.pth`` has ``w.statistics.json`` beside it."""
    return weights.with_suffix(f".statistics{suffix}")


def find_statistics(config: ScorerConfig, weights: Path, suffixes: tuple[str, ...]) -> Path:
    """The file of in-distribution statistics: the one the settings name, or ``<weights>.statistics<suffix>`` beside the weights.

    Raises:
        WeightsError: There is none.
    """
    if config.statistics:
        return Path(config.statistics)
    candidates = [statistics_path(weights, suffix) for suffix in suffixes]
    for path in candidates:
        if path.is_file():
            return path
    names = " or ".join(path.name for path in candidates)
    raise WeightsError(
        f"scorer '{config.name}' needs in-distribution statistics: make them with 'ood-seg calibrate --scorer {config.name} --images DIR', "
        f"put {names} into {weights.parent}, or set scorer.statistics"
    )


def read_max_logit_statistics(path: Path) -> MaxLogitStatistics:
    """Reads SML's statistics.

    Args:
        path: JSON ``{"mean": [...], "var": [...]}`` of one number per class, or the published ``*_mean.npy`` with ``*_var.npy`` beside it.

    Raises:
        WeightsError: Missing, damaged, of unequal length, not finite, or a variance that is not positive.
    """
    if path.suffix == ".npy":
        mean = read_class_values_npy(path)
        variance = read_class_values_npy(path.with_name(path.name.replace("mean", "var")))
    else:
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
            mean, variance = (np.asarray(loaded[key], dtype=np.float64) for key in ("mean", "var"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"statistics '{path}' must be JSON with number lists 'mean' and 'var': {error!r}") from error
    if mean.ndim != 1 or mean.shape != variance.shape or not mean.size:
        raise WeightsError(f"statistics '{path}' have {mean.shape} means and {variance.shape} variances, they need one per class")
    if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(variance)) and np.all(variance > 0)):
        raise WeightsError(f"statistics '{path}' must be finite, with positive variances")
    return MaxLogitStatistics(torch.from_numpy(mean).float(), torch.from_numpy(variance).float())


def read_class_values_npy(path: Path) -> NDArray[np.float64]:
    """One number per class from ``.npy``: a plain array, or the dict in a 0-d object array that the SML release saves.

    ``numpy.load(allow_pickle=True)`` would run whatever a file asks for. Here the pickle is read with four inert stand-ins for numpy's own
    constructors and nothing else, so a file can at worst be refused.

    Raises:
        WeightsError: Missing, no such array, or a pickle that needs anything else.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            _, _, dtype = reader(file)
            values = _unpickle_class_values(file) if dtype.hasobject else np.load(path, allow_pickle=False)
            return np.asarray(values, dtype=np.float64)
    # A damaged header or pickle can raise nearly anything: TokenError, MemoryError, KeyError, OverflowError and more.
    except Exception as error:
        raise WeightsError(f"statistics '{path}' cannot be read, no array or dict of one number per class: {error}") from error


class _Inert:
    """Stands in for numpy's constructors while a pickle is read: keeps the state it is given, does nothing."""

    def __init__(self, *args: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _InertUnpickler(pickle.Unpickler):
    _KNOWN = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }
    )

    def find_class(self, module_name: str, global_name: str, /) -> type[_Inert]:
        if (module_name, global_name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which was not run")
        return _Inert


def _unpickle_class_values(file: BinaryIO) -> Sequence[float]:
    array = _InertUnpickler(file).load()
    values = array.state[4][0]
    if not isinstance(values, dict) or sorted(values) != list(range(len(values))):
        raise ValueError("the object in it is no dict from class index to number")
    return [float(values[index]) for index in range(len(values))]


def read_feature_statistics(path: Path) -> FeatureStatistics:
    """Reads Mahalanobis estimates.

    Args:
        path: The ``.h5`` of the SegmentMeIfYouCan baselines (datasets ``means`` and ``inverse``; needs h5py), or safetensors with both.

    Raises:
        WeightsError: Missing, damaged, of shapes that do not belong together, or not finite.
        InputError: h5py is needed and not installed.
    """
    loaded = _read_h5(path) if path.suffix in (".h5", ".hdf5") else load_weights(path).state
    try:
        mean, inverse = loaded["means"].float(), loaded["inverse"].float()
    except KeyError as error:
        raise WeightsError(f"statistics '{path}' lack {error}: they hold {', '.join(loaded) or 'nothing'}") from error
    mean = mean.flatten(1) if mean.ndim >= 2 else mean
    if mean.ndim != 2 or tuple(inverse.shape) != (*mean.shape, mean.shape[1]):
        shapes = f"{tuple(mean.shape)} means and {tuple(inverse.shape)} inverse covariances"
        raise WeightsError(f"statistics '{path}' have {shapes}, they must be (K, D) and (K, D, D)")
    if not (torch.isfinite(mean).all() and torch.isfinite(inverse).all()):
        raise WeightsError(f"statistics '{path}' must be finite")
    return FeatureStatistics(mean, inverse)


def _read_h5(path: Path) -> Mapping[str, Tensor]:
    try:
        h5py = importlib.import_module("h5py")
    except ModuleNotFoundError as error:
        raise InputError(
            f"reading '{path}' needs the Python package 'h5py': install it, or save 'means' and 'inverse' as safetensors"
        ) from error
    try:
        with h5py.File(path, "r") as file:
            return {key: torch.from_numpy(np.asarray(file[key], dtype=np.float64)) for key in ("means", "inverse") if key in file}
    except (OSError, TypeError, ValueError) as error:
        raise WeightsError(f"statistics '{path}' cannot be read: {error}") from error
