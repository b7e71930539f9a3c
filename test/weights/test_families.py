"""Checkpoints are recognised by their names, whatever wrapped them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ros2_ood_seg import cli
from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.weights.families import recognise, without_prefixes
from ros2_ood_seg.weights.store import WeightFile, load_weights

WRN38 = ("mod1.conv1.weight", "mod7.block1.bn1.0.weight", "aspp.features.0.0.weight", "bot_fine.weight", "final.6.weight")
R101 = ("layer0.0.weight", "layer4.0.conv1.weight", "aspp.features.0.0.weight", "bot_fine.0.weight", "final1.0.weight", "final2.0.weight")


def entries(*names: str, outputs: int = 19) -> dict[str, Tensor]:
    return {name: torch.zeros(outputs, 1, 1, 1) for name in names}


@pytest.mark.parametrize("prefix", ["", "module.", "branch1.", "module.branch1.", "model.module."])
@pytest.mark.parametrize(
    ("state", "family"),
    [
        (entries(*WRN38), "deeplab_wrn38"),
        (entries(*WRN38, outputs=20), "pebal"),
        (entries(*WRN38, "residual_block.atten_aspp.features.0.0.weight"), "rpl"),
        (entries(*WRN38, "logits_ood.conv.weight"), "dense_hybrid"),
        (entries(*R101), "sml"),
        (entries("image_encoder.pos_embed", "prompt_encoder.no_mask_embed.weight", "mask_decoder.iou_token.weight"), "sam"),
    ],
)
def test_wrappers_do_not_hide_the_family(state: dict[str, Tensor], family: str, prefix: str) -> None:
    weights = WeightFile(Path("w.pth"), {prefix + key: value for key, value in state.items()}, {})
    assert recognise(without_prefixes(weights)).name == family
    assert set(without_prefixes(weights).state) == set(state)


def test_import_says_what_a_file_is_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"module.branch1.{key}": value for key, value in entries(*WRN38, outputs=20).items()}
    torch.save({"model": state}, tmp_path / "best_ad_ckpt.pth")
    assert cli.main(["weights", "import", str(tmp_path / "best_ad_ckpt.pth")]) == 0
    assert "PEBAL" in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()
    assert cli.main(["weights", "import", str(tmp_path / "best_ad_ckpt.pth"), "--weights-dir", str(tmp_path / "kept")]) == 0
    assert "scorer.name=pebal" in capsys.readouterr().out
    assert set(load_weights(tmp_path / "kept" / "pebal.safetensors").state) == set(WRN38)
    assert cli.main(["weights", "import", str(tmp_path / "best_ad_ckpt.pth"), "--weights-dir", str(tmp_path / "kept")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_unknown_files_list_what_they_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WeightsError, match=r"no known family.*fc\.weight"):
        recognise(WeightFile(Path("w.pth"), entries("fc.weight"), {}))
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "w.pth")
    assert cli.main(["weights", "import", str(tmp_path / "w.pth")]) == 2
    assert "no known family" in capsys.readouterr().err
