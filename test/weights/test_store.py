from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.weights.store import BUNDLED_DIR, ENVIRONMENT_VARIABLE, find_weights, load_into, load_weights, save_weights


class Malicious:
    """Would run a command when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def state() -> dict[str, torch.Tensor]:
    return torch.nn.Linear(3, 2).state_dict()


def test_safetensors_round_trip_with_metadata(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    own = {**state(), "steps": torch.tensor(5)}
    save_weights(path, own, {"classes": ["road", "sky"]}, half=False)
    found = load_weights(path)
    assert found.metadata == {"classes": ["road", "sky"]}
    assert all(torch.equal(found.state[key], value) for key, value in own.items())
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


def test_tied_layers_are_stored(tmp_path: Path) -> None:
    values = torch.arange(6.0)
    save_weights(tmp_path / "tied.safetensors", {"encoder": values, "decoder": values, "bias": values[:2]}, {}, half=False)
    stored = load_weights(tmp_path / "tied.safetensors").state
    assert {name: value.tolist() for name, value in stored.items()} == {
        "encoder": [0, 1, 2, 3, 4, 5],
        "decoder": [0, 1, 2, 3, 4, 5],
        "bias": [0, 1],
    }


def test_others_may_read_the_file_as_far_as_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_weights(tmp_path / "w.safetensors", {"a": torch.ones(1)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o644


def test_half_precision_is_stored_and_widened(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_weights(path, {"weight": torch.tensor([1.0, 1 / 3]), "steps": torch.tensor(5)}, {})
    found = load_weights(path).state
    assert found["weight"].dtype == torch.float32
    torch.testing.assert_close(found["weight"], torch.tensor([1.0, 1 / 3]), atol=1e-3, rtol=0)
    assert found["steps"].item() == 5


def test_numbers_too_great_for_half_precision_are_kept_in_full(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_weights(path, {"variance": torch.tensor([0.5, 75845.4]), "bound": torch.tensor([-torch.inf, 1.0])}, {})
    with safe_open(path, "pt") as stored:
        assert stored.get_tensor("variance").dtype == torch.float32
        assert stored.get_tensor("bound").dtype == torch.float16
    assert load_weights(path).state["variance"].tolist() == pytest.approx([0.5, 75845.4])


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_weights(path, {**state(), "bias": torch.tensor([0.0, torch.inf])}, {})
    with pytest.raises(WeightsError, match=r"net.safetensors' holds values that are not finite, in bias"):
        load_into(torch.nn.Linear(3, 2), load_weights(path), "linear")


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 3}, lambda s: {"model_state": s}]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_usual_wrappers_are_taken_off(tmp_path: Path, wrap: object, prefix: str) -> None:
    assert callable(wrap)
    path = tmp_path / "net.pth"
    torch.save(wrap({prefix + key: value for key, value in state().items()}), path)
    assert set(load_weights(path).state) == {"weight", "bias"}


def test_a_pickle_with_code_is_refused_without_running_it(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    torch.save({"state_dict": state(), "extra": Malicious(touched)}, tmp_path / "net.pth")
    with pytest.raises(WeightsError, match="refused without running it") as caught:
        load_weights(tmp_path / "net.pth")
    assert not touched.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 20, 0.5, 0.95])
def test_truncated_files_are_refused(tmp_path: Path, name: str, keep: float) -> None:
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(state(), path)
    else:
        save_weights(path, state(), {})
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(WeightsError, match=name):
        load_weights(path)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_files_of_another_kind_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<!DOCTYPE html><html>404</html>" * 40)
    with pytest.raises(WeightsError, match=name):
        load_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"), [([1, 2], "must hold a state dict, got list"), ({"epoch": 3}, "holds no tensors; its keys are epoch")]
)
def test_torch_files_without_tensors_are_refused(tmp_path: Path, content: object, words: str) -> None:
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=words):
        load_weights(tmp_path / "net.pth")


def test_another_family_is_refused_by_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_weights(path, {"weight": torch.zeros(4, 3), "other": torch.zeros(1)}, {})
    net = torch.nn.Linear(3, 2)
    before = net.weight.clone()
    with pytest.raises(WeightsError, match="not of the family 'linear'") as caught:
        load_into(net, load_weights(path), "linear")
    for part in ("1 missing (bias)", "1 unexpected (other)", r"weight (4, 3) instead of (2, 3)"):
        assert part in str(caught.value)
    assert torch.equal(net.weight, before)


def test_matching_weights_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    own = state()
    save_weights(path, own, {}, half=False)
    net = torch.nn.Linear(3, 2)
    load_into(net, load_weights(path), "linear")
    assert torch.equal(net.weight, own["weight"])


def test_weights_are_found_by_name_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, other = tmp_path / "given", tmp_path / "other"
    for folder in (given, other):
        folder.mkdir()
        torch.save(state(), folder / "both.pth")
    torch.save(state(), other / "only.pth")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, os.pathsep.join([str(tmp_path / "nowhere"), str(other)]))
    assert find_weights("both", given) == given / "both.pth"
    assert find_weights("both.pth") == other / "both.pth"
    assert find_weights("only", given) == other / "only.pth"
    assert find_weights(str(other / "only.pth")) == other / "only.pth"


def test_missing_weights_say_where_they_were_looked_for(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights 'nothing' in") as caught:
        find_weights("nothing", tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert ENVIRONMENT_VARIABLE in str(caught.value)
    with pytest.raises(WeightsError, match="does not exist"):
        find_weights(str(tmp_path / "nothing.pth"))


def test_bundled_weights_that_hide_a_file_of_ones_own_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_weights(tmp_path / "compact_scorer.safetensors", state(), {})
    assert find_weights("compact_scorer", tmp_path).parent == BUNDLED_DIR
    assert f"comes before '{tmp_path / 'compact_scorer.safetensors'}'" in caplog.text


def test_damaged_torch_files_are_refused_whatever_they_raise(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        with pytest.raises(WeightsError):
            load_weights(path)
