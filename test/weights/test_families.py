"""Checkpoints are recognised by their names, whatever wrapped them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ros2_ood_seg import cli
from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.segmenters.sam import OFFICIAL_WEIGHTS
from ros2_ood_seg.weights.families import FAMILIES, recognise, without_prefixes
from ros2_ood_seg.weights.store import WeightFile, find_weights, load_weights

WRN38 = ("mod1.conv1.weight", "mod7.block1.bn1.0.weight", "aspp.features.0.0.weight", "bot_fine.weight", "final.6.weight")
R101 = ("layer0.0.weight", "layer4.0.conv1.weight", "aspp.features.0.0.weight", "bot_fine.0.weight", "final1.0.weight", "final2.0.weight")
LDN121 = ("backbone.features.denseblock4.denselayer1.norm1.weight", "spp.spp.spp.spp0.conv.weight", "logits.conv.weight",
          "upsample.upsample_layers.upsample_0.bottleneck.conv.weight")  # fmt: skip
SEGFORMER = ("backbone.layers.0.0.projection.weight", "backbone.layers.0.1.0.ffn.layers.0.weight", "decode_head.fusion_conv.conv.weight")
MASK2FORMER = ("backbone.x", "sem_seg_head.pixel_decoder.mask_features.weight", "sem_seg_head.predictor.class_embed.weight")
GLOBAL_ATTENTION = "sem_seg_head.predictor.transformer_cross_attention_layers.0.multihead_attn_background.in_proj_weight"
SAM = ("image_encoder.patch_embed.proj.bias", "prompt_encoder.no_mask_embed.weight", "mask_decoder.iou_token.weight")


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
        (entries(*SAM, outputs=768), "sam"),
        (entries(*LDN121), "ldn121"),
        (entries(*LDN121, "logits_ood.conv.weight"), "dense_hybrid_ldn121"),
        (entries(*SEGFORMER, "decode_head.conv_seg.weight"), "segformer"),
        (entries(*SEGFORMER, "decode_head.conv_seg.weight", "decode_head.means", "decode_head.diagonal"), "gmmseg"),
        (entries(*MASK2FORMER, "backbone.patch_embed.proj.weight", outputs=20), "mask2former"),
        (entries(*MASK2FORMER, "backbone.stem.conv1.weight", outputs=20), "mask2former"),
        (entries(*MASK2FORMER, outputs=21), "uno"),
        (entries(*MASK2FORMER, GLOBAL_ATTENTION, outputs=20), "mask2anomaly"),
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


@pytest.mark.parametrize(
    ("state", "name", "expected", "words"),
    [
        (entries(*WRN38), "", "deeplab_wrn38", "--name max_entropy"),
        (entries(*WRN38), "max_entropy", "max_entropy", "scorer.name=deeplab_wrn38 or max_entropy"),
        (entries(*MASK2FORMER, outputs=20), "", "rba", "--name eam or uno or mask2anomaly"),
        (entries(*MASK2FORMER, outputs=20), "eam", "eam", "rba or eam"),
        (entries(*SAM, outputs=1280), "", "sam_vit_h_4b8939", "segmenter.model=vit_h"),
    ],
)
def test_import_keeps_a_file_where_the_settings_look(
    state: dict[str, Tensor], name: str, expected: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(state, tmp_path / "w.pth")
    arguments = ["weights", "import", str(tmp_path / "w.pth"), "--weights-dir", str(tmp_path / "kept")]
    assert cli.main([*arguments, *(["--name", name] if name else [])]) == 0
    assert words in capsys.readouterr().out
    assert find_weights(expected, tmp_path / "kept") == tmp_path / "kept" / f"{expected}.safetensors"
    assert cli.main([*arguments, "--name", "sml"]) == 2
    assert "--name is 'sml', allowed for" in capsys.readouterr().err


@pytest.mark.parametrize(
    "state",
    [
        # HQ-SAM, and Mask R-CNN: the same names and some more.
        entries(*SAM, "mask_decoder.hf_token.weight", outputs=768),
        entries(
            "backbone.bottom_up.stem.conv1.weight",
            "proposal_generator.rpn_head.conv.weight",
            "roi_heads.box_predictor.cls_score.weight",
            "roi_heads.mask_head.predictor.weight",
        ),
    ],
)
def test_networks_built_on_a_known_one_are_not_kept_as_that(
    state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(state, tmp_path / "w.pth")
    assert cli.main(["weights", "import", str(tmp_path / "w.pth"), "--weights-dir", str(tmp_path / "kept")]) == 2
    assert "no known family" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()


def test_every_name_is_one_that_some_setting_looks_for() -> None:
    known = {*SCORERS.names, *OFFICIAL_WEIGHTS.values(), "compact_scorer", "s2m_prompt_generator", "rude0fhk"}
    assert {name for family in FAMILIES for name in family.file_names} <= known


def test_unknown_files_list_what_they_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WeightsError, match=r"no known family.*fc\.weight"):
        recognise(WeightFile(Path("w.pth"), entries("fc.weight"), {}))
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "w.pth")
    assert cli.main(["weights", "import", str(tmp_path / "w.pth")]) == 2
    assert "no known family" in capsys.readouterr().err
