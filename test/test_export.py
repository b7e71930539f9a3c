"""Exported files compute what torch computes; skipped where exporter or ONNX Runtime are not installed."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT

from ros2_ood_seg import cli, export
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.export import Exportable, difference

needs_onnx = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnxscript") is None, reason="onnxruntime or onnxscript is not installed"
)


@needs_onnx
@pytest.mark.parametrize(
    ("what", "names"), [("scorer", "logits"), ("segmenter", "mask_logits, quality_logit"), ("prompt-generator", "features_0, features_1")]
)
def test_the_bundled_networks(what: str, names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "network.onnx"
    assert cli.main(["export", "--what", what, "--width", "128", "--height", "64", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "x64x128" in printed
    assert f"outputs {names}" in printed
    assert float(printed.split()[-1]) < 1e-3
    assert path.is_file()


@needs_onnx
def test_sams_image_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    encoder = ImageEncoderViT(
        64, embed_dim=32, depth=2, num_heads=2, out_chans=16, norm_layer=norm, use_rel_pos=True, window_size=3, global_attn_indexes=(1,)
    )
    exportable = Exportable(encoder.eval(), torch.zeros(1, 3, 64, 64), "pixels", ("embedding",))
    export.export(exportable, tmp_path / "sam.onnx")
    assert difference(exportable, tmp_path / "sam.onnx") < 1e-3


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "x.onnx")]
    assert cli.main(["export", "--what", "scorer", "--width", "100", *output]) == 2
    assert "--width is 100, allowed: a multiple of 32" in capsys.readouterr().err
    assert cli.main(["export", "--what", "sam", "--height", "64", *output]) == 2
    assert "sam has its own size" in capsys.readouterr().err
    assert cli.main(["export", "--what", "sam", "--weights", "nowhere", *output]) == 2
    assert "no weights 'nowhere'" in capsys.readouterr().err
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package onnxscript"):
        export.export(Exportable(torch.nn.Identity(), torch.zeros(1), "x", ("y",)), tmp_path / "x.onnx")
