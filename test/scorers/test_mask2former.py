from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.scorers.mask2former import EAM, MASK2ANOMALY, RBA, RBA_TANH, UNO, mask_scores
from ros2_ood_seg.scorers.network import CITYSCAPES_CLASSES
from ros2_ood_seg.scorers.networks.mask2former import Mask2Former
from ros2_ood_seg.scorers.networks.resnet import ResNet
from ros2_ood_seg.scorers.networks.swin import SwinTransformer

RULES = {"rba": RBA, "rba_tanh": RBA_TANH, "eam": EAM, "uno": UNO, "mask2anomaly": MASK2ANOMALY}


def reference(name: str, class_logits: Tensor, mask_logits: Tensor, size_hw: tuple[int, int]) -> np.ndarray:
    """The formulas query by query in float64."""
    height, width = size_hw
    padded = (-(-height // 32) * 32, -(-width // 32) * 32)
    masks = torch.nn.functional.interpolate(mask_logits[None].double(), size=padded, mode="bilinear")[0, :, :height, :width]
    m = 1 / (1 + np.exp(-masks.numpy()))
    p = np.exp(class_logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    semantic = sum(m[q] * p[q, :-1, None, None] for q in range(len(p)))
    if name == "rba":
        return -sum(semantic)
    if name == "rba_tanh":
        return -sum(np.tanh(c) for c in semantic)
    if name == "eam":
        return 1 - sum(m[q] * p[q, :-1].max() for q in range(len(p)))
    if name == "uno":
        return -sum(m[q] * (p[q, :-2].max() - p[q, -2]) for q in range(len(p)))
    return 1 - semantic.max(0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_float64_references(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # More queries than are upsampled at once, a size that is no multiple of 32.
    class_logits = 3 * torch.randn(37, 21, generator=generator)
    mask_logits = 4 * torch.randn(37, 16, 24, generator=generator)
    actual = mask_scores(RULES[name], class_logits, mask_logits, (50, 81)).scores
    expected = reference(name, class_logits, mask_logits, (50, 81))
    assert actual.dtype == torch.float32
    assert np.abs(actual.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def test_known_values() -> None:
    class_logits = torch.full((2, 21), -100.0)
    class_logits[0, 3] = class_logits[1, 19] = 100.0
    mask_logits = torch.full((2, 8, 8), -100.0)
    mask_logits[0, :, :4] = mask_logits[1, :4, 4:] = 100.0
    # Left: certainly class 3. Upper right: the output behind the classes. Lower right: no mask.
    left, other, empty = (16, 4), (4, 28), (28, 28)
    expected = {
        "rba": (-1.0, -1.0, 0.0), "rba_tanh": (-np.tanh(1.0), -np.tanh(1.0), 0.0), "eam": (0.0, 0.0, 1.0),
        "uno": (-1.0, 1.0, 0.0), "mask2anomaly": (0.0, 0.0, 1.0),
    }  # fmt: skip
    for name, values in expected.items():
        raw = mask_scores(RULES[name], class_logits, mask_logits, (32, 32))
        assert [raw.scores[at].item() for at in (left, other, empty)] == pytest.approx(values, abs=1e-6), name
        assert raw.classes[left] == 3


def test_classes_equal_transformers_post_processing() -> None:
    transformers = pytest.importorskip("transformers")
    class_logits, mask_logits = 3 * torch.randn(1, 20, 20), 4 * torch.randn(1, 20, 24, 24)
    outputs = SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)
    expected = transformers.Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs)[0]
    actual = mask_scores(RBA, class_logits[0], mask_logits[0], tuple(expected.shape)).classes
    assert (actual == expected).float().mean() > 0.9999


def official(outputs: int = 20) -> dict[str, Tensor]:
    """A slim random network in the release's layout, with the loss's buffer that detectron2 saves too."""
    torch.manual_seed(1)
    backbone = SwinTransformer(width=8, depths=(1, 2, 1, 1), heads=(1, 2, 2, 2), window=4)
    network = Mask2Former(backbone, outputs, 18, 32, 32, 1, 1, 48, 1, 1, 64)
    return {**network.state_dict(), "criterion.empty_weight": torch.ones(outputs)}


def ugains_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {
        key.replace("sem_seg_head.predictor.", "sem_seg_head.").replace("sem_seg_head.pixel_decoder.", "pixel_decoder."): value
        for key, value in state.items()
    }
    return {**result, "inlier_criterion.empty_weight": torch.ones(20)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model_final.pth"
    torch.save({"model": official(), "iteration": 90000}, path)
    return path


def config(name: str, weights: Path, **settings: object) -> ScorerConfig:
    return ScorerConfig(name=name, weights=str(weights), input_width=80, **settings)


def build(scorer: ScorerConfig, runtime: Runtime):
    return SCORERS.get(scorer.name)(scorer, runtime)


def test_both_released_layouts_give_the_formula_on_the_network(checkpoint: Path, tmp_path: Path, runtime: Runtime, image: Tensor) -> None:
    result = build(config("rba", checkpoint), runtime)(image)
    network = Mask2Former.like(official()).to_empty(device="cpu").eval()
    network.load_state_dict({key: value for key, value in official().items() if not key.startswith("criterion.")})
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    padded = torch.zeros(1, 3, 64, 96)
    padded[0, :, :48, :80] = ((image - mean) / std).permute(2, 0, 1)
    with torch.inference_mode():
        output = network(padded)
    expected = reference("rba", output.class_logits[0], output.mask_logits[0], (48, 80))
    np.testing.assert_allclose(result.scores.numpy(), expected, rtol=1e-4)
    assert result.class_names == CITYSCAPES_CLASSES
    assert result.semantic is not None
    assert result.semantic.max() < 19
    assert result.scores.std() > 0

    lightning = tmp_path / "rude0fhk.ckpt"
    torch.save({"state_dict": ugains_layout(official()), "epoch": 3}, lightning)
    assert torch.equal(build(config("rba", lightning), runtime)(image).scores, result.scores)


def test_tanh_and_mirroring(checkpoint: Path, runtime: Runtime, image: Tensor) -> None:
    plain = build(config("rba", checkpoint), runtime)(image).scores
    assert (build(config("rba", checkpoint, score="rba_tanh"), runtime)(image).scores > plain).all()
    scorer = build(config("mask2anomaly", checkpoint), runtime)
    torch.testing.assert_close(scorer(image.flip(1)).scores.flip(1), scorer(image).scores)


def test_resized_back_to_the_image(checkpoint: Path, runtime: Runtime) -> None:
    result = build(config("eam", checkpoint), runtime)(torch.zeros(33, 120, 3, dtype=torch.uint8))
    assert result.shape_hw == (33, 120)
    assert result.semantic is not None
    assert result.semantic.shape == (33, 120)


def test_uno_needs_its_negative_class(checkpoint: Path, tmp_path: Path, runtime: Runtime, image: Tensor) -> None:
    with pytest.raises(WeightsError, match=r"have 20 outputs per query, scorer 'uno' needs 21"):
        build(config("uno", checkpoint), runtime)
    path = tmp_path / "uno.pth"
    torch.save({"model": official(outputs=21)}, path)
    result = build(config("uno", path), runtime)(image)
    assert result.class_names == CITYSCAPES_CLASSES
    with pytest.raises(WeightsError, match=r"have 21 outputs per query, scorer 'rba' needs 20"):
        build(config("rba", path), runtime)


def test_wrong_checkpoints_are_explained(tmp_path: Path, runtime: Runtime) -> None:
    state = official()
    path = tmp_path / "broken.pth"
    del state["sem_seg_head.predictor.decoder_norm.weight"]
    state["sem_seg_head.predictor.ood_pred.conv.weight"] = torch.zeros(1)
    torch.save({"model": state}, path)
    with pytest.raises(WeightsError, match=r"family 'mask2former': 1 missing \(.*decoder_norm\.weight\); 1 unexpected \(.*ood_pred"):
        build(config("rba", path), runtime)
    torch.save({"model": {key: value for key, value in official().items() if "patch_embed.proj" not in key}}, path)
    with pytest.raises(WeightsError, match=r"backbone\.patch_embed\.proj\.weight is missing"):
        build(config("rba", path), runtime)


def test_uno_trained_with_synthetic_negatives_brings_their_generator_along(tmp_path: Path, runtime: Runtime, image: Tensor) -> None:
    generator = {"flow.transforms.0.net.weight": torch.zeros(3), "flow.transforms.0.initialized": torch.ones((), dtype=torch.bool)}
    found = []
    for extra in ({}, generator):
        torch.save({"model": {**official(21), **extra}}, tmp_path / "w.pth")
        found.append(build(config("uno", tmp_path / "w.pth"), runtime)(image).scores)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_mask2anomalys_own_release(tmp_path: Path, randomised, runtime: Runtime, image: Tensor) -> None:
    torch.manual_seed(3)
    backbone = ResNet(8, (4, 4, 8, 8), (16, 16, 32, 32), (1, 2, 1, 1))
    network = randomised(Mask2Former(backbone, 20, 18, 32, 32, 3, 1, 48, 3, 4, 64, global_attention=True))
    layers = "sem_seg_head.predictor.transformer_cross_attention_layers"
    extra = {f"{layers}.{k}.fusion_layer.weight": torch.zeros(1) for k in range(4)}
    torch.save({"model": {**network.state_dict(), **extra, "criterion.empty_weight": torch.ones(20)}}, tmp_path / "w.pth")
    found = build(config("mask2anomaly", tmp_path / "w.pth"), runtime)(image)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    expected = []
    for picture in (image, image.flip(1)):
        padded = torch.zeros(1, 3, 64, 96)
        padded[0, :, :48, :80] = ((picture - mean) / std).permute(2, 0, 1)
        with torch.inference_mode():
            output = network(padded)
        expected.append(reference("mask2anomaly", output.class_logits[0], output.mask_logits[0], (48, 80)))
    np.testing.assert_allclose(found.scores.numpy(), (expected[0] + expected[1][:, ::-1]) / 2, rtol=1e-4)
    assert found.scores.std() > 0


@pytest.mark.parametrize(("name", "score"), [("rba", "energy"), ("eam", "rba_tanh"), ("uno", "msp")])
def test_other_scores_are_refused(name: str, score: str, checkpoint: Path, runtime: Runtime) -> None:
    with pytest.raises(InputError, match=f"scorer.score is '{score}' but scorer '{name}'"):
        build(config(name, checkpoint, score=score), runtime)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = transformers.SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4, out_features=stages)
    settings = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32,
        encoder_layers=1, decoder_layers=3, num_queries=9, num_labels=19,
    )  # fmt: skip
    path = tmp_path / "mask2former-cityscapes"
    transformers.Mask2FormerForUniversalSegmentation(settings).save_pretrained(path)
    return path


def test_a_folder_of_transformers(folder: Path, runtime: Runtime, image: Tensor) -> None:
    scorer = config("rba", folder)
    result = build(scorer, runtime)(image)
    by_name = build(scorer.model_copy(update={"weights": folder.name}), replace(runtime, weights_dir=folder.parent))(image)
    assert torch.equal(result.scores, by_name.scores)
    assert result.class_names == CITYSCAPES_CLASSES
    assert result.scores.std() > 0
    reduced = build(scorer, replace(runtime, autocast_dtype=torch.bfloat16))(image)
    assert (reduced.scores - result.scores).abs().max() < 0.05 * result.scores.abs().max()


def test_a_folder_that_lacks_weights(folder: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["class_predictor.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 missing \(class_predictor\.weight\)"):
        build(config("rba", folder), runtime)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="holds no Mask2FormerForUniversalSegmentation that transformers can load"):
        build(config("rba", folder), runtime)

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="needs the Python package 'transformers'"):
        build(config("rba", folder), runtime)
