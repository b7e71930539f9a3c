from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models import segmentation

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.scorers.torchvision_segmentation import _network_like

CONSTRUCTORS = {
    name: getattr(segmentation, name)
    for name in ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "deeplabv3_resnet101")
}


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_scores_torchvisions_own_output(name: str, image: Tensor, runtime: Runtime, tmp_path: Path) -> None:
    torch.manual_seed(0)
    auxiliary = {} if name.startswith("lraspp") else {"aux_loss": True}
    network = CONSTRUCTORS[name](weights=None, weights_backbone=None, num_classes=21, **auxiliary).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    config = ScorerConfig(name="torchvision_segmentation", weights=str(tmp_path / "w.pth"), input_width=80)
    found = SCORERS.get(config.name)(config, runtime)(image)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        logits = network(((image / 255 - mean) / std).permute(2, 0, 1)[None])["out"][0]
    torch.testing.assert_close(found.scores, 1 - logits.softmax(0).amax(0))
    assert torch.equal(found.semantic.long(), logits.argmax(0))
    assert found.class_names[15] == "person"


@pytest.mark.parametrize("name", list(CONSTRUCTORS))
def test_tells_the_architecture_from_the_weights(name: str) -> None:
    with torch.device("meta"):
        network = CONSTRUCTORS[name](weights=None, weights_backbone=None, num_classes=5)
    found = _network_like(network.state_dict()).state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in network.state_dict().items()}


def test_refuses_a_network_cut_short(image: Tensor, runtime: Runtime, tmp_path: Path) -> None:
    state = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).state_dict()
    del state["classifier.scale.1.weight"]
    torch.save(state, tmp_path / "w.pth")
    config = ScorerConfig(name="torchvision_segmentation", weights=str(tmp_path / "w.pth"))
    with pytest.raises(WeightsError, match=r"1 missing \(classifier\.scale\.1\.weight\)"):
        SCORERS.get(config.name)(config, runtime)
