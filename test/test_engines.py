"""OpenVINO computes what torch computes; skipped where it is not installed."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ros2_ood_seg import engines, runtime
from ros2_ood_seg.config import RuntimeConfig, ScorerConfig, SegmenterConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.segmenters import SEGMENTERS
from ros2_ood_seg.types import Prompts

CPU = torch.device("cpu")
needs_openvino = pytest.mark.skipif(not engines.openvino_installed(), reason="openvino is not installed")


class Doubler(nn.Module):
    """Two outputs of different size, one of them without height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return nn.functional.interpolate(y, size=x.shape[-2:], mode="bilinear"), y.mean((2, 3))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ros2_ood_seg" / "openvino"


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Doubler().eval().requires_grad_(False)


@needs_openvino
@pytest.mark.parametrize("parallel", [False, True])
def test_every_shape_and_batch_size_gives_torchs_numbers(network: nn.Module, parallel: bool) -> None:
    fast = engines.OpenVinoNetwork(network, torch.zeros(1, 3, 8, 8), 2, parallel=parallel)
    for shape in ((1, 3, 8, 8), (5, 3, 20, 12), *((2, 3, 16, 8 * n) for n in range(1, engines.MAX_SHAPES + 2)), (1, 3, 8, 8)):
        x = torch.rand(shape)
        for found, expected in zip(fast(x), network(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_openvino
def test_outputs_stay_when_the_next_frame_comes(network: nn.Module) -> None:
    fast = engines.OpenVinoNetwork(network, torch.zeros(1, 3, 8, 8), 1)
    first = fast(torch.ones(1, 3, 8, 8))[0]
    kept = first.clone()
    fast(torch.zeros(1, 3, 8, 8))
    assert torch.equal(first, kept)


@needs_openvino
def test_a_conversion_is_kept_for_these_weights_only(network: nn.Module, cache: Path) -> None:
    example, x = torch.zeros(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    first = engines.OpenVinoNetwork(network, example, 1)(x)
    kept = sorted(path.name for path in cache.iterdir())
    assert [Path(name).suffix for name in kept] == [".bin", ".xml"]
    again = engines.OpenVinoNetwork(network, example, 1)(x)
    assert sorted(path.name for path in cache.iterdir()) == kept
    assert torch.equal(first[0], again[0])
    network.conv.bias += 1.0  # type: ignore[operator,union-attr]
    other = engines.OpenVinoNetwork(network, example, 1)(x)
    torch.testing.assert_close(other[1], first[1] + 1.0)
    assert len(list(cache.iterdir())) == 4


@needs_openvino
def test_a_broken_or_read_only_cache_does_no_harm(network: nn.Module, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, x = torch.zeros(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    engines.OpenVinoNetwork(network, example, 1)
    for path in cache.iterdir():
        path.write_bytes(b"half of i")
    torch.testing.assert_close(engines.OpenVinoNetwork(network, example, 1)(x)[1], network(x)[1], rtol=1e-4, atol=1e-5)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    torch.testing.assert_close(engines.OpenVinoNetwork(network, example, 1)(x)[1], network(x)[1], rtol=1e-4, atol=1e-5)
    is_file = Path.is_file

    def locked(path: Path) -> bool:
        if path.suffix == ".xml":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    # As in a home that belongs to someone else; root, who may run the tests, can enter all.
    monkeypatch.setattr(Path, "is_file", locked)
    torch.testing.assert_close(engines.OpenVinoNetwork(network, example, 1)(x)[1], network(x)[1], rtol=1e-4, atol=1e-5)


@needs_openvino
def test_a_user_without_a_home_has_openvino_too(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(f"uid not found: {uid}")

    # As in a container that runs under a number without an account.
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(InputError, match="neither XDG_CACHE_HOME nor HOME says where files can be kept"):
        engines.cache_dir()
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(engines.OpenVinoNetwork(network, x, 1)(x)[1], network(x)[1], rtol=1e-4, atol=1e-5)


@needs_openvino
def test_openvino_is_used_without_its_usage_reports() -> None:
    code = "from ros2_ood_seg import engines; engines._openvino(); from openvino.tools import ovc; print(type(ovc.telemetry).__module__)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "openvino.tools.ovc.telemetry_stub"


@needs_openvino
@pytest.mark.parametrize("size", [(90, 160), (97, 131)])
def test_the_bundled_scorer_scores_the_same(size: tuple[int, int]) -> None:
    config = ScorerConfig(input_width=128)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    slow, fast = (SCORERS.get("compact")(config, Runtime(CPU, engine=engine))(image) for engine in ("torch", "openvino"))
    assert float((slow.scores - fast.scores).abs().max()) < 1e-3
    assert slow.semantic is not None
    assert fast.semantic is not None
    assert float((slow.semantic != fast.semantic).float().mean()) < 1e-3


@needs_openvino
def test_a_real_image_scores_the_same(shared_dir: Path) -> None:
    path = min((shared_dir / "data" / "road_anomaly_21" / "images").iterdir())
    image = torch.from_numpy(cv2.resize(cv2.imread(str(path)), (320, 180), interpolation=cv2.INTER_AREA))
    config = ScorerConfig(input_width=320)
    slow, fast = (SCORERS.get("compact")(config, Runtime(CPU, engine=engine))(image).scores for engine in ("torch", "openvino"))
    assert float((slow - fast).abs().max()) < 1e-3


@needs_openvino
def test_the_bundled_segmenter_masks_the_same() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    prompts = Prompts(torch.tensor([[10.0, 10, 50, 60], [60, 5, 110, 30]]), torch.ones(2), torch.tensor([[20.0, 20]]))
    slow, fast = (SEGMENTERS.get("compact")(SegmenterConfig(), Runtime(CPU, engine=e))(image, prompts) for e in ("torch", "openvino"))
    assert float((slow.masks != fast.masks).float().mean()) < 1e-3
    torch.testing.assert_close(slow.quality, fast.quality, atol=1e-3, rtol=0)


def test_auto_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = {"device": "cpu"}
    monkeypatch.setattr(runtime, "openvino_installed", lambda: False)
    assert Runtime.from_config(RuntimeConfig.model_validate(on_cpu)).engine == "torch"
    with pytest.raises(InputError, match="the package openvino is not installed"):
        Runtime.from_config(RuntimeConfig.model_validate({**on_cpu, "engine": "openvino"}))
    monkeypatch.setattr(runtime, "openvino_installed", lambda: True)
    assert Runtime.from_config(RuntimeConfig.model_validate(on_cpu)).engine == "openvino"
    assert Runtime.from_config(RuntimeConfig.model_validate({**on_cpu, "engine": "torch"})).engine == "torch"
    assert Runtime.from_config(RuntimeConfig.model_validate({**on_cpu, "precision": "bfloat16"})).engine == "torch"
    with pytest.raises(InputError, match=r"runs in float32 on a CPU"):
        Runtime.from_config(RuntimeConfig.model_validate({**on_cpu, "precision": "bfloat16", "engine": "openvino"}))


def test_torch_takes_over_what_openvino_cannot_convert(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such\noperation")

    monkeypatch.setattr(runtime, "OpenVinoNetwork", refuse)
    x = torch.rand(2, 3, 8, 8)
    forward = Runtime(CPU, engine="openvino").prepare(network, x)
    assert "OpenVINO cannot run Doubler, torch runs it: no such operation" in caplog.text
    torch.testing.assert_close(forward(x)[1], network(x)[1])


@needs_openvino
def test_a_conversion_depends_on_the_functions_of_its_module(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    example = torch.zeros(1, 3, 8, 8)
    before = engines._fingerprint(network, example, "1")
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda thing: source(thing) + ("# changed" if inspect.ismodule(thing) else ""))
    assert engines._fingerprint(network, example, "1") != before


@needs_openvino
def test_conversions_that_nobody_read_for_long_go(network: nn.Module, cache: Path) -> None:
    engines.OpenVinoNetwork(network, torch.zeros(1, 3, 8, 8), 1)
    old = {path.name for path in cache.iterdir()}
    for path in cache.iterdir():
        os.utime(path, (0, 0))
    network.conv.bias += 1.0  # type: ignore[operator,union-attr]
    engines.OpenVinoNetwork(network, torch.zeros(1, 3, 8, 8), 1)
    kept = {path.name for path in cache.iterdir()}
    assert len(kept) == 2
    assert not kept & old
