from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.special import log_softmax, logsumexp, softmax
from torch import Tensor, nn

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.scorers.calibration import calibration_path, write_calibration
from ros2_ood_seg.scorers.networks.deeplab_resnet101 import DeepLabResNet101
from ros2_ood_seg.scorers.networks.deeplab_wrn38 import DeepLabWideResNet38
from ros2_ood_seg.scorers.sml import dilated_smoothing, suppress_boundaries
from ros2_ood_seg.types import Calibration, ScoreMap

Randomised = Callable[[nn.Module], nn.Module]


def slim(randomised: Randomised, outputs: int = 19, **parts: bool) -> DeepLabWideResNet38:
    torch.manual_seed(0)
    return randomised(DeepLabWideResNet38(outputs, stem=8, structure=(1,) * 6, **parts))


def score(name: str, weights: Path, image: Tensor, runtime: Runtime, **settings: object) -> ScoreMap:
    config = ScorerConfig(name=name, weights=str(weights), **{"input_width": image.shape[1], **settings})
    return SCORERS.get(name)(config, runtime)(image)


def upsampled(x: Tensor, image: Tensor) -> np.ndarray:
    size = tuple(image.shape[:2])
    return nn.functional.interpolate(x.double(), size=size, mode="bilinear", align_corners=True)[0].numpy()


def batch(image: Tensor) -> Tensor:
    return image.permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("name", ["msp", "entropy", "energy", "max_logit"])
def test_plain_scores_through_lightning_and_data_parallel(name: str, randomised, image, runtime, tmp_path: Path) -> None:
    network = slim(randomised)
    state = {f"module.{key}": value for key, value in network.state_dict().items() if "num_batches" not in key}
    torch.save({"epoch": 4, "mean_iu": np.float64(0.8), "state_dict": state}, tmp_path / "w.pth")
    found = score("deeplab_wrn38", tmp_path / "w.pth", image, runtime, score=name)
    with torch.inference_mode():
        logits = upsampled(network(batch(image)).logits, image)
    p = softmax(logits, axis=0)
    expected = {
        "msp": 1 - p.max(0),
        "entropy": -(p * np.log(p)).sum(0) / np.log(19),
        "energy": -logsumexp(logits, axis=0),
        "max_logit": -logits.max(0),
    }[name]
    np.testing.assert_allclose(found.scores.numpy(), expected, atol=1e-5)
    assert np.array_equal(found.semantic.numpy(), logits.argmax(0))
    assert found.class_names[13] == "car"
    assert found.scorer == "deeplab_wrn38"


def blurred(scores: np.ndarray) -> np.ndarray:
    taps = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    return ndimage.correlate(scores, np.outer(taps, taps) / taps.sum() ** 2, mode="mirror")


def test_pebal_is_the_blurred_energy_without_abstention(randomised, image, runtime, tmp_path: Path) -> None:
    network = slim(randomised, 20)
    torch.save({f"module.branch1.{key}": value for key, value in network.state_dict().items()}, tmp_path / "w.pth")
    with torch.inference_mode():
        energy = -logsumexp(upsampled(network(batch(image)).logits[:, :19], image), axis=0)
    np.testing.assert_allclose(score("pebal", tmp_path / "w.pth", image, runtime).scores.numpy(), blurred(energy), atol=1e-5)
    plain = score("pebal", tmp_path / "w.pth", image, runtime, smoothing_px=1)
    np.testing.assert_allclose(plain.scores.numpy(), energy, atol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
def test_rpl_scores_the_residual_and_keeps_the_segmentation(projection: bool, randomised, image, runtime, tmp_path: Path) -> None:
    network = slim(randomised, residual=True, projection=projection)
    torch.save({"model": {f"branch1.{key}": value for key, value in network.state_dict().items()}}, tmp_path / "w.pth")
    found = score("rpl", tmp_path / "w.pth", image, runtime)
    with torch.inference_mode():
        output = network(batch(image))
    energy = -logsumexp(upsampled(output.residual_logits, image), axis=0)
    np.testing.assert_allclose(found.scores.numpy(), blurred(energy), atol=1e-5)
    assert np.array_equal(found.semantic.numpy(), upsampled(output.logits, image).argmax(0))


def test_dense_hybrid_adds_the_log_posterior(randomised, image, runtime, tmp_path: Path) -> None:
    network = slim(randomised, ood_head=True)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with torch.inference_mode():
        output = network(batch(image))
    posterior = log_softmax(upsampled(output.ood_logits, image), axis=0)[1]
    expected = -logsumexp(upsampled(output.logits, image), axis=0) + posterior
    np.testing.assert_allclose(score("dense_hybrid", tmp_path / "w.pth", image, runtime).scores.numpy(), expected, atol=1e-5)
    with pytest.raises(InputError, match="one score only"):
        score("dense_hybrid", tmp_path / "w.pth", image, runtime, score="msp")


def test_mahalanobis_reads_estimates_beside_the_weights(randomised, image, runtime, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    network = slim(randomised)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.statistics\.h5"):
        score("mahalanobis", tmp_path / "w.pth", image, runtime)
    inverse = torch.eye(32).expand(19, 32, 32).contiguous()
    save_file({"means": torch.zeros(19, 32, 1), "inverse": inverse}, tmp_path / "w.statistics.safetensors")
    with torch.inference_mode():
        features = upsampled(network.penultimate(batch(image)), image)
    found = score("mahalanobis", tmp_path / "w.pth", image, runtime)
    np.testing.assert_allclose(found.scores.numpy(), (features**2).sum(0), rtol=1e-4)
    save_file({"means": torch.zeros(19, 30), "inverse": torch.zeros(19, 30, 30)}, tmp_path / "w.statistics.safetensors")
    with pytest.raises(WeightsError, match="30 features, the network has 32"):
        score("mahalanobis", tmp_path / "w.pth", image, runtime)


def test_sml_ignores_what_only_training_needs(randomised, image, runtime, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = randomised(DeepLabResNet101(19, stem=8, structure=(1, 1, 1, 1)))
    extra = {"dsn.0.weight": torch.zeros(2), "multi_scale.first_conv.weight": torch.ones(1, 1, 3, 3)}
    torch.save({"state_dict": {f"module.{k}": v for k, v in {**network.state_dict(), **extra}.items()}}, tmp_path / "w.pth")
    with torch.inference_mode():
        logits = upsampled(network(batch(image)), image)
    plain = score("sml", tmp_path / "w.pth", image, runtime, score="max_logit")
    np.testing.assert_allclose(plain.scores.numpy(), -logits.max(0), atol=1e-5)
    (tmp_path / "w.statistics.json").write_text(json.dumps({"mean": [1.0] * 19, "var": [4.0] * 19}))
    found = score("sml", tmp_path / "w.pth", image, runtime)
    standardized, classes = torch.from_numpy((1 - logits.max(0)) / 2).float(), torch.from_numpy(logits.argmax(0))
    torch.testing.assert_close(found.scores, dilated_smoothing(suppress_boundaries(standardized, classes)), atol=1e-5, rtol=0)
    (tmp_path / "w.statistics.json").write_text(json.dumps({"mean": [1.0], "var": [4.0]}))
    with pytest.raises(WeightsError, match="1 classes, the network has 19"):
        score("sml", tmp_path / "w.pth", image, runtime)


def test_other_widths_come_back_in_the_images_pixels(randomised, image, runtime, tmp_path: Path) -> None:
    torch.save(slim(randomised).state_dict(), tmp_path / "w.pth")
    found = score("deeplab_wrn38", tmp_path / "w.pth", image, runtime, input_width=64)
    assert found.scores.shape == found.semantic.shape == (48, 80)
    assert found.scores.dtype == torch.float32
    assert found.semantic.dtype == torch.uint8


def test_calibration_beside_the_weights(randomised, image, runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = tmp_path / "w.pth"
    torch.save(slim(randomised).state_dict(), weights)
    with caplog.at_level(logging.WARNING):
        assert score("deeplab_wrn38", weights, image, runtime, score="energy").calibration == Calibration.linear(-30, 0)
    assert "ood-seg calibrate --scorer deeplab_wrn38" in caplog.text
    caplog.clear()
    fitted = Calibration((-4.0, -2.0, 1.0), (0.1, 0.5, 1.0))
    write_calibration(weights, "deeplab_wrn38/energy", fitted)
    write_calibration(weights, "deeplab_wrn38/msp", Calibration.linear(0, 0.5))
    assert score("deeplab_wrn38", weights, image, runtime, score="energy").calibration == fitted
    assert not caplog.text
    assert score("deeplab_wrn38", weights, image, runtime, score="energy", temperature=2.0).calibration == Calibration.linear(-30, 0)
    calibration_path(weights).write_text("[1]")
    with pytest.raises(WeightsError, match=r"w\.calibration\.json"):
        score("deeplab_wrn38", weights, image, runtime)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_refuses_files_that_are_no_weights(randomised, image, runtime, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    torch.save({"state_dict": slim(randomised).state_dict(), "args": Bomb(tmp_path / "run")}, weights)
    with pytest.raises(WeightsError, match="refused without running"):
        score("deeplab_wrn38", weights, image, runtime)
    weights.write_bytes(pickle.dumps(Bomb(tmp_path / "run"), 2))
    with pytest.raises(WeightsError):
        score("deeplab_wrn38", weights, image, runtime)
    assert not (tmp_path / "run").exists()
    torch.save(slim(randomised).state_dict(), weights)
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="damaged"):
        score("deeplab_wrn38", weights, image, runtime)


def test_names_family_and_entries_of_other_files(randomised, image, runtime, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    state = slim(randomised).state_dict()
    torch.save(state, weights)
    with pytest.raises(WeightsError, match="family 'deeplab_wrn38', scorer 'rpl' needs rpl"):
        score("rpl", weights, image, runtime)
    torch.save({key: value for key, value in state.items() if key != "bot_aspp.weight"}, weights)
    with pytest.raises(WeightsError, match=r"1 missing \(bot_aspp.weight\)"):
        score("deeplab_wrn38", weights, image, runtime)
    torch.save({**state, "final.9.weight": torch.zeros(1)}, weights)
    with pytest.raises(WeightsError, match=r"1 unexpected \(final.9.weight\)"):
        score("deeplab_wrn38", weights, image, runtime)
    torch.save({"fc.weight": torch.zeros(1)}, weights)
    with pytest.raises(WeightsError, match=r"no known family.*fc.weight"):
        score("deeplab_wrn38", weights, image, runtime)


def test_bad_values_are_input_errors(randomised, image, runtime, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    network = slim(randomised)
    torch.save(network.state_dict(), weights)
    build = SCORERS.get("deeplab_wrn38")
    scorer = build(ScorerConfig(name="deeplab_wrn38", weights=str(weights), input_width=80), runtime)
    with pytest.raises(InputError, match=r"\(48, 80, 1\)"):
        scorer(image[..., :1])
    with pytest.raises(InputError, match="takes none from elsewhere"):
        scorer(image, torch.zeros(48, 80))
    with pytest.raises(InputError, match="no such output"):
        build(ScorerConfig(name="deeplab_wrn38", weights=str(weights), score="outlier"), runtime)
    for value in (float("nan"), float("-inf")):
        network.final[6].weight.data[3, 0] = value
        torch.save(network.state_dict(), weights)
        with pytest.raises(InputError, match="not finite"):
            score("deeplab_wrn38", weights, image, runtime, score="max_logit")
