from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.scorers.statistics import read_class_values_npy, read_feature_statistics, read_max_logit_statistics

MEAN = {c: 5.0 + 0.25 * c for c in range(19)}
VARIANCE = {c: 1.0 + 0.5 * c for c in range(19)}


def save_published(folder: Path, mean: object = MEAN) -> Path:
    np.save(folder / "cityscapes_mean.npy", mean, allow_pickle=True)
    np.save(folder / "cityscapes_var.npy", VARIANCE, allow_pickle=True)
    return folder / "cityscapes_mean.npy"


def test_reads_the_published_pair(tmp_path: Path) -> None:
    found = read_max_logit_statistics(save_published(tmp_path))
    assert found.mean.tolist() == list(MEAN.values())
    assert found.variance.tolist() == list(VARIANCE.values())


def test_reads_json_and_plain_arrays(tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps({"mean": [1, 2], "var": [3, 4]}))
    assert read_max_logit_statistics(path).variance.tolist() == [3.0, 4.0]
    np.save(tmp_path / "values.npy", np.arange(4.0))
    assert read_class_values_npy(tmp_path / "values.npy").tolist() == [0.0, 1.0, 2.0, 3.0]


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_refuses_pickles_without_running_them(tmp_path: Path) -> None:
    path = save_published(tmp_path, {0: Bomb(tmp_path / "run")})
    with pytest.raises(WeightsError, match="which was not run"):
        read_max_logit_statistics(path)
    assert not (tmp_path / "run").exists()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_files_are_weights_errors(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = save_published(tmp_path_factory.mktemp("npy"))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(WeightsError):
        assert read_class_values_npy(path).dtype == np.float64


@pytest.mark.parametrize(
    "text", ['{"mean": [1]}', '{"mean": [1], "var": [1, 2]}', '{"mean": [1], "var": [0]}', '{"mean": [1e999], "var": [1]}', "[", "[1]"]
)
def test_refuses_unusable_statistics(text: str, tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    path.write_text(text)
    with pytest.raises(WeightsError, match=r"statistics\.json"):
        read_max_logit_statistics(path)


def test_reads_estimates_from_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "estimates.safetensors"
    save_file({"means": torch.ones(2, 3, 1), "inverse": torch.ones(2, 3, 3)}, path)
    assert read_feature_statistics(path).mean.shape == (2, 3)
    save_file({"means": torch.ones(2, 3), "inverse": torch.ones(2, 3)}, path)
    with pytest.raises(WeightsError, match=r"\(K, D, D\)"):
        read_feature_statistics(path)
    save_file({"means": torch.ones(2, 3)}, path)
    with pytest.raises(WeightsError, match="lack 'inverse'"):
        read_feature_statistics(path)


def test_reads_published_estimates_from_hdf5(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is an optional dependency")
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["means"], file["inverse"] = np.ones((2, 3, 1, 1)), np.ones((2, 3, 3))
    assert read_feature_statistics(tmp_path / "e.h5").inverse.shape == (2, 3, 3)
    (tmp_path / "e.h5").write_bytes(b"no hdf5")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_feature_statistics(tmp_path / "e.h5")


def test_hdf5_without_h5py_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(InputError, match="needs the Python package 'h5py'"):
        read_feature_statistics(tmp_path / "e.h5")
