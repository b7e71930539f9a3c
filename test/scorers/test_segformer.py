from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import Tensor, nn

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.scorers.networks.mix_transformer import MixTransformer
from ros2_ood_seg.scorers.networks.segformer import GmmSeg, SegFormer
from ros2_ood_seg.types import ScoreMap

WIDTHS, DEPTHS = (8, 16, 40, 64), (1, 1, 1, 1)


def score(name: str, weights: Path, image: Tensor, runtime: Runtime, **settings: object) -> ScoreMap:
    config = ScorerConfig(name=name, weights=str(weights), **{"input_width": image.shape[1], **settings})
    return SCORERS.get(name)(config, runtime)(image)


def upsampled(x: Tensor, image: Tensor) -> np.ndarray:
    return nn.functional.interpolate(x.double(), size=tuple(image.shape[:2]), mode="bilinear", align_corners=False)[0].numpy()


def slim_gmm(randomised) -> GmmSeg:
    torch.manual_seed(0)
    network = randomised(GmmSeg(MixTransformer(WIDTHS, DEPTHS), 19, 2, 24, 16))
    network.decode_head.diagonal.data.uniform_(0.1, 0.2)
    return network


def test_gmmseg_is_the_negative_likelihood_of_the_best_class(randomised, image, runtime, tmp_path: Path) -> None:
    network = slim_gmm(randomised)
    training = {
        "queue": torch.zeros(38, 16, 2),
        "queue_ptr": torch.zeros(38),
        "eye_matrix": torch.ones(16),
        "iteration_counter": torch.zeros(1),
    }
    extra = {**{f"decode_head.{key}": value for key, value in training.items()}, "decode_head.conv_seg.bias": torch.zeros(19)}
    torch.save({"meta": {"CLASSES": ["road"]}, "state_dict": {**network.state_dict(), **extra}}, tmp_path / "w.pth")
    with torch.inference_mode():
        output = network(image.permute(2, 0, 1)[None].float())
    found = score("gmmseg", tmp_path / "w.pth", image, runtime)
    expected = -upsampled(output.log_likelihoods, image).max(0)
    np.testing.assert_allclose(found.scores.numpy(), expected, rtol=1e-5, atol=1e-4)
    assert np.array_equal(found.semantic.numpy(), upsampled(output.logits, image).argmax(0))
    assert found.class_names[13] == "car"
    assert found.scores.std() > 0
    with pytest.raises(InputError, match="one score only"):
        score("gmmseg", tmp_path / "w.pth", image, runtime, score="energy")
    with pytest.raises(WeightsError, match="family 'gmmseg', scorer 'segformer' needs segformer"):
        score("segformer", tmp_path / "w.pth", image, runtime)


def test_a_checkpoint_of_mmsegmentation(randomised, image, runtime, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = randomised(SegFormer(MixTransformer(WIDTHS, DEPTHS), 19, 24))
    torch.save({"state_dict": network.state_dict()}, tmp_path / "w.pth")
    with torch.inference_mode():
        p = softmax(upsampled(network(image.permute(2, 0, 1)[None].float()), image), axis=0)
    found = score("segformer", tmp_path / "w.pth", image, runtime)
    np.testing.assert_allclose(found.scores.numpy(), 1 - p.max(0), atol=1e-5)
    assert np.array_equal(found.semantic.numpy(), p.argmax(0))


def test_a_folder_of_transformers(image, runtime, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(hidden_sizes=WIDTHS, depths=DEPTHS, num_attention_heads=(1, 2, 5, 8), num_labels=19)
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    model.save_pretrained(tmp_path / "segformer-b0")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        logits = model(pixel_values=((image / 255 - mean) / std).permute(2, 0, 1)[None]).logits
    found = score("segformer", tmp_path / "segformer-b0", image, runtime, score="max_logit")
    np.testing.assert_allclose(found.scores.numpy(), -upsampled(logits, image).max(0), atol=1e-5)
    assert found.class_names[13] == "car"
    model.half().save_pretrained(tmp_path / "half")
    half = score("segformer", tmp_path / "half", image, runtime, score="max_logit")
    np.testing.assert_allclose(half.scores.numpy(), found.scores.numpy(), atol=2e-2)


def test_refuses_what_is_missing(randomised, image, runtime, tmp_path: Path) -> None:
    state = slim_gmm(randomised).state_dict()
    del state["decode_head.feat_norm.weight"]
    state["decode_head.other"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 missing \(decode_head.feat_norm.weight\); 1 unexpected \(decode_head.other\)"):
        score("gmmseg", tmp_path / "w.pth", image, runtime)


def test_gmmseg_runs_in_bfloat16(randomised, image, runtime, tmp_path: Path) -> None:
    network = slim_gmm(randomised)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "w.pth")
    exact = score("gmmseg", tmp_path / "w.pth", image, runtime).scores
    found = score("gmmseg", tmp_path / "w.pth", image, Runtime(torch.device("cpu"), torch.bfloat16)).scores
    assert float(np.corrcoef(found.flatten(), exact.flatten())[0, 1]) > 0.95
