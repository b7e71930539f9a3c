from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, softmax
from torch import Tensor, nn

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.scorers.networks.ladder_densenet import LadderDenseNet
from ros2_ood_seg.types import ScoreMap


def slim(randomised, outputs: int = 19, *, ood_head: bool = True) -> LadderDenseNet:
    torch.manual_seed(0)
    return randomised(LadderDenseNet(outputs, ood_head=ood_head, growth=4, blocks=(2, 1, 2, 1), stem=8, width=16, up_widths=(8, 8, 4)))


def released(network: LadderDenseNet) -> dict[str, Tensor]:
    """The layout of the release, whose decoder has classifiers for training at each step."""
    auxiliary = {f"upsample.upsample_layers.upsample_{step}.logits_aux.conv.bias": torch.zeros(1) for step in range(3)}
    return {**network.state_dict(), **auxiliary}


def score(name: str, weights: Path, image: Tensor, runtime: Runtime, **settings: object) -> ScoreMap:
    config = ScorerConfig(name=name, weights=str(weights), **{"input_width": image.shape[1], **settings})
    return SCORERS.get(name)(config, runtime)(image)


def upsampled(x: Tensor, image: Tensor) -> np.ndarray:
    return nn.functional.interpolate(x.double(), size=tuple(image.shape[:2]), mode="bilinear", align_corners=False)[0].numpy()


def test_dense_hybrid_adds_the_log_posterior(randomised, image, runtime, tmp_path: Path) -> None:
    network = slim(randomised)
    torch.save({f"module.{key}": value for key, value in released(network).items()}, tmp_path / "w.pth")
    with torch.inference_mode():
        output = network(image.permute(2, 0, 1)[None].float())
    logits = upsampled(output.logits, image)
    expected = log_softmax(upsampled(output.ood_logits, image), axis=0)[1] - logsumexp(logits, axis=0)
    found = score("dense_hybrid_ldn121", tmp_path / "w.pth", image, runtime)
    np.testing.assert_allclose(found.scores.numpy(), expected, atol=1e-5)
    assert np.array_equal(found.semantic.numpy(), logits.argmax(0))
    assert found.class_names[13] == "car"
    assert found.scores.std() > 0
    with pytest.raises(InputError, match="one score only"):
        score("dense_hybrid_ldn121", tmp_path / "w.pth", image, runtime, score="msp")


@pytest.mark.parametrize("ood_head", [False, True])
def test_plain_scores_need_no_posterior(ood_head: bool, randomised, image, runtime, tmp_path: Path) -> None:
    # StreetHazards has 12 classes.
    network = slim(randomised, 12, ood_head=ood_head)
    torch.save(released(network), tmp_path / "w.pth")
    with torch.inference_mode():
        p = softmax(upsampled(network(image.permute(2, 0, 1)[None].float()).logits, image), axis=0)
    found = score("ldn121", tmp_path / "w.pth", image, runtime)
    np.testing.assert_allclose(found.scores.numpy(), 1 - p.max(0), atol=1e-5)
    assert found.class_names == ()
    if not ood_head:
        with pytest.raises(WeightsError, match="family 'ldn121', scorer 'dense_hybrid_ldn121' needs dense_hybrid_ldn121"):
            score("dense_hybrid_ldn121", tmp_path / "w.pth", image, runtime)


def test_pyramid_and_steps_are_those_of_their_definition(randomised) -> None:
    network = slim(randomised)
    x = torch.randn(1, 4, 5, 9, generator=torch.Generator().manual_seed(2))
    pyramid = type(network.spp["spp"])(4, 16).eval()
    with torch.inference_mode():
        base = pyramid.spp["spp_bn"](x)
        # One row has round(9 / 5) = 2 columns.
        cells = torch.stack([base[0, :, :, :5].mean((1, 2)), base[0, :, :, 4:].mean((1, 2))], dim=-1)[None, :, None]
        coarsest = nn.functional.interpolate(pyramid.spp["spp3"](cells), size=(5, 9), mode="bilinear", align_corners=False)
        seen = []
        pyramid.spp["spp_fuse"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
        assert pyramid(x).shape == (1, 16, 5, 9)
    torch.testing.assert_close(seen[0][:, -4:], coarsest)
    torch.testing.assert_close(seen[0][:, :16], base)


def test_tells_the_architecture_from_the_weights_and_has_the_published_size() -> None:
    with torch.device("meta"):
        network = LadderDenseNet(ood_head=True)
    found = LadderDenseNet.like(network.state_dict()).state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in network.state_dict().items()}
    # The release's 11,067,928 less the three classifiers that only its training uses.
    assert sum(p.numel() for p in network.parameters()) == 11_067_928 - sum(2 * width + width + 1 for width in (512, 256, 256))


def test_refuses_what_is_missing_or_left_over(randomised, image, runtime, tmp_path: Path) -> None:
    state = released(slim(randomised))
    state["logits.extra"] = torch.zeros(1)
    del state["spp.spp.spp.spp2.norm.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 missing \(spp.spp.spp.spp2.norm.weight\); 1 unexpected \(logits.extra\)"):
        score("dense_hybrid_ldn121", tmp_path / "w.pth", image, runtime)
    del state["logits.extra"], state["spp.spp.spp.spp_fuse.conv.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"family 'Ladder-DenseNet-121': spp.spp.spp.spp_fuse.conv.weight is missing"):
        score("dense_hybrid_ldn121", tmp_path / "w.pth", image, runtime)
