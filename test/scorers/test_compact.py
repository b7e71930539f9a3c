from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import mobilenet_v2

from ros2_ood_seg.config import ScorerConfig, load_profile
from ros2_ood_seg.efficientnet import efficientnet_lite_features
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import functions
from ros2_ood_seg.scorers.calibration import write_calibration
from ros2_ood_seg.scorers.compact import SCORES, CompactScorer, build, from_weights
from ros2_ood_seg.scorers.network import smooth
from ros2_ood_seg.scorers.networks.compact import CLASS_NAMES, STRIDE, CompactNet, CompactOutput
from ros2_ood_seg.types import Calibration
from ros2_ood_seg.weights.store import WeightFile, save_weights
from ros2_ood_seg.zoom import raise_to, window_at

CPU = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def weights() -> WeightFile:
    torch.manual_seed(0)
    calibrations = {score: Calibration.linear(-k - 1.0, k + 1.0).to_dict() for k, score in enumerate(SCORES)}
    return WeightFile(Path("random"), CompactNet().state_dict(), {"calibrations": calibrations, "default_score": "outlier"})


@pytest.fixture
def image() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (70, 130, 3), dtype=np.uint8))


def make(weights: WeightFile, runtime: Runtime = CPU, **settings: object) -> CompactScorer:
    return from_weights(weights, ScorerConfig(**{"input_width": 128, **settings}), runtime)


def test_scores_are_in_image_pixels_and_deterministic(weights: WeightFile, image: torch.Tensor) -> None:
    scorer = make(weights)
    first, second = scorer(image), scorer(image)
    assert first.shape_hw == (70, 130)
    assert first.scores.dtype == torch.float32
    assert torch.equal(first.scores, second.scores)
    assert first.class_names == CLASS_NAMES
    assert first.semantic is not None
    assert first.semantic.shape == (70, 130)
    assert first.semantic.dtype == torch.uint8
    classes = F.interpolate(scorer.logits(image).class_logits, size=(70, 130), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(first.semantic, classes.to(torch.uint8))
    assert make(weights, runtime=Runtime(torch.device("cpu"), torch.bfloat16))(image).scores.dtype == torch.float32


@pytest.mark.parametrize("score", SCORES)
def test_each_score_has_its_own_calibration(weights: WeightFile, image: torch.Tensor, score: str) -> None:
    scorer = make(weights, score=score)
    result = scorer(image)
    assert result.calibration == Calibration.from_dict(weights.metadata["calibrations"][score])
    assert scorer.calibration_key == f"compact/{score}"
    output = scorer.logits(image)
    coarse = output.outlier_logit if score == "outlier" else getattr(functions, score)(output.class_logits)
    assert float(coarse.min()) - 1e-4 <= float(result.scores.min())
    assert float(result.scores.max()) <= float(coarse.max()) + 1e-4


def test_a_temperature_is_that_of_the_energy(weights: WeightFile, image: torch.Tensor) -> None:
    own = Calibration.linear(-9.0, 3.0)
    config = ScorerConfig(input_width=128, score="energy", temperature=4.0)
    scorer = from_weights(WeightFile(weights.path, weights.state, {}), config, CPU, own)
    result = scorer(image)
    assert result.calibration == own
    coarse = functions.energy(scorer.logits(image).class_logits, 4.0)
    torch.testing.assert_close(result.scores, F.interpolate(coarse[None], size=(70, 130), mode="bilinear", align_corners=False)[0, 0])
    assert torch.equal(make(weights, score="msp", temperature=4.0)(image).scores, make(weights, score="msp")(image).scores)


def test_calibrations_beside_the_weights_come_before_the_published_ones(weights: WeightFile, tmp_path: Path) -> None:
    file = WeightFile(tmp_path / "own.safetensors", weights.state, {"calibrations": {"msp": Calibration.linear(0, 0.5).to_dict()}})
    own = Calibration.linear(-2.0, 7.0)
    write_calibration(file.path, "compact/entropy", own)
    found = [make(file, score=score)._calibration for score in ("entropy", "msp", "outlier")]
    assert found == [own, Calibration.linear(0, 0.5), Calibration.linear()]


def test_weights_are_found_by_name_and_bundled_without_one(weights: WeightFile, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_weights(path, weights.state, {**weights.metadata, "family": "compact_scorer"})
    assert build(ScorerConfig(weights="own"), Runtime(torch.device("cpu"), weights_dir=tmp_path)).weights_path == path
    assert build(ScorerConfig(), CPU).weights_path.name == "compact_scorer.safetensors"


def test_the_road_that_ends_is_the_drivable_class(weights: WeightFile, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    roads: list[np.ndarray] = []
    monkeypatch.setattr("ros2_ood_seg.scorers.compact.road_end", roads.append)
    output = CompactOutput(torch.rand(1, len(CLASS_NAMES), 16, 24, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 16, 24))
    scorer = make(weights)
    monkeypatch.setattr(scorer, "logits", lambda image: output)
    scorer(image)
    assert np.array_equal(roads[0], output.class_logits[0].argmax(0).numpy() == CLASS_NAMES.index("drivable"))


def test_default_score_is_the_weights_choice(weights: WeightFile, image: torch.Tensor) -> None:
    chosen = WeightFile(weights.path, weights.state, {**weights.metadata, "default_score": "entropy"})
    torch.testing.assert_close(make(chosen)(image).scores, make(weights, score="entropy")(image).scores)


def test_scores_lie_where_the_cause_is(weights: WeightFile) -> None:
    # A disturbance near the right edge must change the map there, not elsewhere: catches swapped axes and crops of the padding.
    plain = torch.full((96, 256, 3), 128, dtype=torch.uint8)
    disturbed = plain.clone()
    disturbed[20:36, 200:216] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    scorer = make(weights, input_width=256)
    change = (scorer(disturbed).scores - scorer(plain).scores).abs()
    y, x = divmod(int(change.argmax()), 256)
    assert 12 <= y < 44
    assert 190 <= x < 226


@pytest.mark.parametrize(("width", "input_width", "size"), [(120, 100, (2 * STRIDE, 3 * STRIDE)), (96, 96, (3 * STRIDE, 3 * STRIDE))])
def test_the_network_sees_whole_strides_and_no_border(weights: WeightFile, width: int, input_width: int, size: tuple[int, int]) -> None:
    scorer = make(weights, input_width=input_width, second_scale=1.0, coarse_scale=1.0)
    image = torch.randint(0, 256, (83, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pixels = image.permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
    net = CompactNet().eval()
    net.load_state_dict(weights.state)
    with torch.no_grad():
        expected = net(resized)
    found = scorer.logits(image)
    torch.testing.assert_close(found.outlier_logit, expected.outlier_logit, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.class_logits, expected.class_logits, rtol=1e-3, atol=1e-4)
    assert scorer(image).scores.shape == (83, width)


def test_further_looks_are_averaged_in(weights: WeightFile, image: torch.Tensor) -> None:
    def once(width: int) -> torch.Tensor:
        return make(weights, input_width=width, second_scale=1.0, coarse_scale=1.0).logits(image).outlier_logit

    fine = once(256)
    size = tuple(fine.shape[-2:])
    coarse, middle = (F.interpolate(once(width)[:, None], size=size, mode="bilinear", align_corners=False)[:, 0] for width in (64, 128))
    three = make(weights, input_width=128, second_scale=2.0, coarse_scale=0.5).logits(image).outlier_logit
    torch.testing.assert_close(three, (coarse + middle + fine) / 3)
    without_coarse = make(weights, input_width=128, second_scale=2.0, coarse_scale=1.0).logits(image).outlier_logit
    torch.testing.assert_close(without_coarse, (middle + fine) / 2)


@pytest.mark.parametrize("score", ["outlier", "max_logit"])
def test_a_picture_with_more_detail_is_looked_at_twice_where_the_road_ends(
    weights: WeightFile, monkeypatch: pytest.MonkeyPatch, score: str
) -> None:
    image = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (140, 260, 3), dtype=np.uint8))
    monkeypatch.setattr("ros2_ood_seg.scorers.compact.road_end", lambda road: (0.5, 0.4))
    scorer = partial(make, weights, score=score)
    assert scorer(zoom=0.0)(image).road_end == (0.5, 0.4), "for the prompt generator, too"
    plain, zoomed = scorer(zoom=0.0)(image).scores, scorer(zoom=0.5)(image).scores
    left, top, right, bottom = window_at((0.5, 0.4), 0.5, (140, 260))
    alone = scorer(input_width=right - left, coarse_scale=1.0, second_scale=1.0, zoom=0.0)(image[top:bottom, left:right]).scores
    torch.testing.assert_close(zoomed, raise_to(plain, alone, (left, top, right, bottom)))
    assert not torch.equal(zoomed, plain)
    assert torch.equal(scorer(input_width=256, zoom=0.5)(image).scores, scorer(input_width=256, zoom=0.0)(image).scores)
    monkeypatch.setattr("ros2_ood_seg.scorers.compact.road_end", lambda road: None)
    assert torch.equal(scorer(zoom=0.5)(image).scores, plain)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # The window of 150 px at the widest look's 128.
        ({}, [128, 32, 64, 128]),
        ({"input_width": 64, "coarse_scale": 0.5, "second_scale": 2.0}, [64, 32, 128, 128]),
        ({"input_width": 224}, [224, 64, 128, 160]),
        ({"input_width": 240}, [256, 64, 128, 160]),
        # The picture has no more detail than has been seen.
        ({"second_scale": 2.0}, [128, 32, 256]),
        ({"input_width": 0}, [288, 64, 160]),
        ({"zoom": 0.0}, [128, 32, 64]),
    ],
)
def test_the_closer_look_is_no_wider_than_the_widest(
    weights: WeightFile, monkeypatch: pytest.MonkeyPatch, settings: dict[str, float], expected: list[int]
) -> None:
    monkeypatch.setattr("ros2_ood_seg.scorers.compact.road_end", lambda road: (0.5, 0.4))
    scorer = make(weights, **{"zoom": 0.5, **settings})
    widths: list[int] = []
    forward = scorer._forward
    monkeypatch.setattr(scorer, "_forward", lambda x: (widths.append(int(x.shape[3])), forward(x))[1])
    scorer(torch.zeros((100, 300, 3), dtype=torch.uint8))
    assert widths == expected


def test_smoothing_flattens(weights: WeightFile, image: torch.Tensor) -> None:
    plain, flat = make(weights)(image).scores, make(weights, smoothing_px=15)(image).scores
    torch.testing.assert_close(flat, smooth(plain, 15))
    assert float(flat.diff(dim=1).abs().mean()) < float(plain.diff(dim=1).abs().mean())
    assert make(weights, smoothing_px=63)(image[:20, :30]).scores.shape == (20, 30)


def test_refusals(weights: WeightFile, image: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"set scorer\.name to 'external'"):
        make(weights)(image, torch.zeros(70, 130))
    with pytest.raises(WeightsError, match="no calibration for score 'outlier', it has none"):
        make(WeightFile(weights.path, weights.state, {}))
    with pytest.raises(WeightsError, match="has no score 'rba_tanh': use one of outlier, msp"):
        make(weights, score="rba_tanh")
    with pytest.raises(WeightsError, match="calibrated for temperature 1"):
        make(weights, score="energy", temperature=2.0)
    broken = {**weights.state, "outlier_head.bias": torch.tensor([float("nan")])}
    with pytest.raises(WeightsError, match=r"values that are not finite, in outlier_head\.bias"):
        make(WeightFile(weights.path, broken, weights.metadata))
    great = {**weights.state, "outlier_head.weight": torch.full_like(weights.state["outlier_head.weight"], 3e38)}
    with pytest.raises(InputError, match=r"[1-9]\d* scores that are not finite"):
        make(WeightFile(weights.path, great, weights.metadata))(image)
    other = tmp_path / "other.safetensors"
    save_weights(other, {"conv.weight": torch.zeros(1)}, {})
    with pytest.raises(WeightsError, match="not of the family 'compact_scorer'"):
        build(ScorerConfig(weights=str(other)), CPU)


def test_one_score_that_is_not_finite_is_enough(weights: WeightFile, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = make(weights)
    monkeypatch.setattr(scorer, "_score_of", lambda output: torch.zeros(1, 70, 130).index_fill_(2, torch.tensor([7]), float("nan")))
    with pytest.raises(InputError, match="gave 70 scores that are not finite"):
        scorer(image)


def test_fused_features_compute_what_torchvision_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = mobilenet_v2(weights=None).features.eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
    net = CompactNet().eval()
    net.load_imagenet_features(WeightFile(tmp_path, reference.state_dict(), {}))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.features(x), reference[:18](x), rtol=1e-3, atol=1e-4)


def test_frozen_blocks_get_no_gradient(weights: WeightFile) -> None:
    net = CompactNet()
    net(torch.rand(1, 3, 64, 64) * 255, trainable_from=4).outlier_logit.sum().backward()
    assert all(p.grad is None for p in net.features[:4].parameters())
    assert all(p.grad is not None for p in net.features[4:].parameters())


def test_the_network_is_built_on_the_encoder_that_its_weights_name(image: torch.Tensor) -> None:
    net = CompactNet(encoder="efficientnet_lite0")
    metadata = {"encoder": "efficientnet_lite0", "calibrations": {"outlier": Calibration.linear().to_dict()}}
    scorer = make(WeightFile(Path("lite0"), net.state_dict(), metadata))
    assert scorer(image).shape_hw == (70, 130)
    with pytest.raises(WeightsError, match="family 'compact_scorer'"):
        make(WeightFile(Path("lite0"), net.state_dict(), {**metadata, "encoder": "mobilenet_v2"}))
    with pytest.raises(WeightsError, match=r"built on 'resnet', known are mobilenet_v2, efficientnet_lite0"):
        make(WeightFile(Path("other"), net.state_dict(), {**metadata, "encoder": "resnet"}))


def test_imagenet_weights_of_an_efficientnet_are_read_under_their_published_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    features, taps, _ = efficientnet_lite_features("efficientnet_lite0")
    for module in features.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    published = {}
    for key, value in features.state_dict().items():
        block, _, rest = key.partition(".")
        if block == "0":
            published[f"{'_conv_stem' if rest.startswith('0.') else '_bn0'}.{rest.partition('.')[2]}"] = value
            continue
        *place, entry = rest.removeprefix("conv.").split(".")
        layers = {"0.0": "_depthwise_conv", "0.1": "_bn1", "1": "_project_conv", "2": "_bn2"} if block == "1" else {
            "0.0": "_expand_conv", "0.1": "_bn0", "1.0": "_depthwise_conv", "1.1": "_bn1", "2": "_project_conv", "3": "_bn2",
        }  # fmt: skip
        published[f"_blocks.{int(block) - 1}.{layers['.'.join(place)]}.{entry}"] = value
    net = CompactNet(encoder="efficientnet_lite0").eval()
    net.load_imagenet_features(WeightFile(tmp_path, published, {}))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.features(x), features.eval()(x), rtol=1e-3, atol=1e-4)
    assert net.taps == taps
    with pytest.raises(WeightsError, match="efficientnet_lite0 with ImageNet classes"):
        net.load_imagenet_features(WeightFile(tmp_path, {"features.0.0.weight": torch.zeros(1)}, {}))


def test_width_0_is_the_images_own(weights: WeightFile, image: torch.Tensor) -> None:
    own, same = make(weights, input_width=0)(image), make(weights, input_width=int(image.shape[1]))(image)
    assert torch.equal(own.scores, same.scores)
    with pytest.raises(ValueError, match="40 px is too narrow"):
        make(weights, input_width=40)
    with pytest.raises(InputError, match=r"'scorer\.input_width' is 40, allowed: 0, or a whole number from 64 to 8192"):
        load_profile("compact", {"scorer.input_width": 40})
