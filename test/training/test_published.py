from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ros2_ood_seg.cli import main
from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.scorers.calibration import calibration_path
from ros2_ood_seg.scorers.networks.deeplab_anomaly import AnomalyDeepLab
from ros2_ood_seg.scorers.networks.deeplab_mobilenet_v2 import DeepLabMobileNetV2
from ros2_ood_seg.scorers.networks.deeplab_wrn38 import DeepLabWideResNet38
from ros2_ood_seg.training.exposure_batches import ExposureBatch, ExposureData, ExposureSamples, collate, picture_objects, read_picture
from ros2_ood_seg.training.outlier_exposure import IGNORE, PasteSettings, RoadSample, read_coco, read_mask_folder
from ros2_ood_seg.training.outlier_losses import OUTLIER, VOID
from ros2_ood_seg.training.published import METHODS, PublishedTraining, start_network, train_published
from ros2_ood_seg.training.scorer import ScorerData
from ros2_ood_seg.weights.store import load_weights, save_weights

PASTE = PasteSettings(crop_hw=(48, 64), frame_width_px=(80, 120), object_px=(15, 40), known_per_image=(0, 0))
PUBLISHED = [name for name in METHODS if name != "segmentation"]
CPU = torch.device("cpu")


def tiny(name: str, **changes: object) -> PublishedTraining:
    values = {"iterations": 3, "batch_size": 2, "learning_rate": 1e-4, "workers": 0, "checkpoint_minutes": 1e9, "paste": PASTE}
    return replace(METHODS[name].recipe, **{**values, **changes})


@pytest.fixture(scope="module")
def data(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ScorerData:
    """CamVid frames, and pictures that show unknown objects only."""
    root = tmp_path_factory.mktemp("things")
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for k in range(12):
        picture = np.full((50, 60, 3), (20, 20 * k, 200), np.uint8)
        mask = np.zeros((50, 60), np.uint8)
        mask[10:40, 5:45] = 255
        picture[mask > 0] = (250, 40, 10 * k)
        cv2.imwrite(str(root / "images" / f"thing{k}.png"), picture)
        cv2.imwrite(str(root / "masks" / f"thing{k}.png"), mask)
    return ScorerData(camvid=data_dir / "camvid", objects=[root])


def segmentation_network(kind: str, classes: int = 7) -> AnomalyDeepLab:
    torch.manual_seed(0)
    if kind == "wrn38":
        return DeepLabWideResNet38(classes, stem=8, structure=(1,) * 6)
    network = DeepLabMobileNetV2(classes)
    for module in network.features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return network


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("starts")
    paths = {}
    for kind in ("mobilenet_v2", "wrn38"):
        paths[kind] = folder / f"{kind}.safetensors"
        # NVIDIA's checkpoint is older than the counters of batches.
        state = {key: value for key, value in segmentation_network(kind).state_dict().items() if "num_batches" not in key}
        save_weights(paths[kind], state, {}, half=False)
    return paths


@pytest.mark.parametrize("kind", ["mobilenet_v2", "wrn38"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_method_starts_from_the_segmentation_it_is_given(name: str, kind: str, starts: dict[str, Path]) -> None:
    network, base = start_network(METHODS[name], starts[kind]).eval(), segmentation_network(kind).eval()
    image = 255 * torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = network(image)
        # One more output takes another way through the convolution: equal up to rounding.
        torch.testing.assert_close(output.logits[:, :7], base(image).logits)
        assert output.logits.shape[1] == (8 if name == "pebal" else 7)
    if name == "rpl":
        assert network.residual_block is not None
        assert torch.equal(network.residual_block.atten_aspp.features[1][0].weight, network.aspp.features[1][0].weight)
        assert torch.equal(network.residual_block.bot_atten_aspp.weight, network.bot_aspp.weight)
        assert not torch.equal(output.residual_logits, output.logits)


def test_start_weights_of_another_kind_are_refused(starts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"method 'rpl' starts from a segmentation network.*--init"):
        start_network(METHODS["rpl"], None)
    rpl = tmp_path / "rpl.safetensors"
    save_weights(rpl, start_network(METHODS["rpl"], starts["mobilenet_v2"]).state_dict(), {}, half=False)
    with pytest.raises(WeightsError, match="of the family 'rpl', training starts from deeplab_wrn38 or deeplab_mobilenet_v2"):
        start_network(METHODS["pebal"], rpl)
    state = segmentation_network("mobilenet_v2").state_dict()
    del state["bot_aspp.weight"]
    save_weights(tmp_path / "lacks.safetensors", state, {}, half=False)
    with pytest.raises(WeightsError, match=r"1 missing \(bot_aspp.weight\)"):
        start_network(METHODS["max_entropy"], tmp_path / "lacks.safetensors")
    save_weights(tmp_path / "other.safetensors", {"0.0.weight": torch.zeros(3)}, {})
    with pytest.raises(WeightsError, match="torchvision mobilenet_v2 features"):
        start_network(METHODS["segmentation"], tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_method_changes_what_it_trains_and_nothing_else(name: str, data: ScorerData, starts: dict[str, Path], tmp_path: Path) -> None:
    path = train_published(data, tiny(name, outlier_share=0.7), tmp_path, starts["mobilenet_v2"])
    assert path == tmp_path / f"{name}.safetensors"
    trained, before = load_weights(path), load_weights(starts["mobilenet_v2"])
    assert trained.metadata["recipe"]["method"] == name
    assert trained.metadata["start"] == "mobilenet_v2.safetensors"
    changed = {key for key, value in before.state.items() if not torch.equal(trained.state[key], value)}
    if name == "rpl":
        assert not changed
        assert any(key.startswith("residual_block.") for key in trained.state)
    elif name == "pebal":
        # The running means of the other norms follow the new pictures, as in the release.
        assert {key.split(".")[0] for key in changed if key.endswith(("weight", "bias"))} == {"final"}
    else:
        assert {"features", "aspp", "final"} <= {key.split(".")[0] for key in changed}
    scorer = SCORERS.get(name)(ScorerConfig(name=name, weights=str(path), input_width=64), Runtime(CPU))
    assert scorer(torch.zeros(48, 64, 3, dtype=torch.uint8)).shape_hw == (48, 64)


def test_trains_the_published_network_too(data: ScorerData, starts: dict[str, Path], tmp_path: Path) -> None:
    path = train_published(data, tiny("pebal", iterations=1, outlier_share=1.0), tmp_path, starts["wrn38"])
    assert load_weights(path).state["final.6.weight"].shape[0] == 7


def one_batch(data: ScorerData, classes: int, name: str) -> ExposureBatch:
    method = METHODS[name]
    exposure = ExposureData.read(data, classes, method.needs_labels)
    dataset = exposure.samples(PASTE, 0, 4, 1.0, method.pictures)
    return collate([dataset[k] for k in range(4)])


@pytest.mark.parametrize("name", list(METHODS))
def test_the_loss_of_a_batch_falls_when_it_is_learnt(name: str, data: ScorerData, starts: dict[str, Path]) -> None:
    method = METHODS[name]
    network = start_network(method, starts["mobilenet_v2"])
    batch = one_batch(data, 7, name)
    network.train()
    optimizer = torch.optim.Adam([p for key, p in network.named_parameters() if key.startswith(method.trains)], lr=1e-3)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        terms = method.loss(network(batch.images()), batch)
        assert set(terms) == {"total", *method.terms}
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        losses.append(terms["total"].item())
    assert losses[-1] < 0.95 * losses[0]


def test_interrupted_training_equals_uninterrupted(
    data: ScorerData, starts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny("rpl")
    whole = train_published(data, recipe, tmp_path / "whole", starts["mobilenet_v2"])
    read = ExposureSamples.__getitem__

    def interrupted(self: ExposureSamples, index: int) -> object:
        if len(self) == 6 and index > 3:
            raise KeyboardInterrupt
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(ExposureSamples, "__getitem__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_published(data, replace(recipe, checkpoint_minutes=0.0), tmp_path / "parts", starts["mobilenet_v2"])
    parts = train_published(data, recipe, tmp_path / "parts", starts["mobilenet_v2"])
    expected = load_weights(whole).state
    for key, value in load_weights(parts).state.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="of another recipe"):
        train_published(data, replace(recipe, batch_size=3), tmp_path / "parts", starts["mobilenet_v2"])
    with pytest.raises(InputError, match="of another recipe"):
        train_published(data, tiny("pebal"), tmp_path / "parts", starts["mobilenet_v2"])


def sample(semantic: int) -> RoadSample:
    instances = np.zeros((8, 10), np.int32)
    instances[2:4, 3:6] = 1
    classes = np.where(instances > 0, IGNORE, semantic).astype(np.uint8)
    classes[0] = IGNORE
    return RoadSample(np.zeros((8, 10, 3), np.uint8), classes, (instances > 0).astype(np.uint8), instances, np.zeros((1, 4), np.float32))


def test_targets_are_classes_outliers_and_void() -> None:
    target = collate([(sample(3), None)]).target[0]
    assert target[2, 3] == OUTLIER
    assert target[5, 5] == 3
    assert target[0, 0] == VOID
    unlabelled = collate([(sample(IGNORE), None)])
    assert set(unlabelled.target.unique().tolist()) == {0, OUTLIER}
    assert unlabelled.images().shape == (1, 3, 8, 10)


def test_pictures_keep_their_objects_in_the_middle(data: ScorerData) -> None:
    cutouts = read_mask_folder(data.objects[0])
    picture = read_picture(cutouts[:1], (70, 80))
    assert (picture.target == VOID).sum() == 70 * 80 - 50 * 60
    assert (picture.target == OUTLIER).sum() == 30 * 40
    assert picture.target[10 + 10, 10 + 5] == OUTLIER
    assert (read_picture(cutouts[:1], (25, 60)).target == OUTLIER).sum() == pytest.approx(15 * 20, abs=40)


def test_pictures_show_all_that_is_annotated_and_nothing_known(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for k in range(2):
        cv2.imwrite(str(tmp_path / "images" / f"{k}.png"), np.full((60, 80, 3), 90, np.uint8))

    def box(picture: int, category: int, left: int, side: int, crowd: int = 0) -> dict[str, object]:
        right = left + side
        outline = [left, 5, left, 5 + side, right, 5 + side, right, 5]
        return {"image_id": picture, "category_id": category, "area": side * side, "iscrowd": crowd, "segmentation": [outline]}

    annotations = [box(0, 1, 5, 30), box(0, 1, 40, 10), box(0, 1, 60, 12, crowd=1), box(1, 1, 5, 30), box(1, 2, 50, 8)]
    tree = {
        "images": [{"id": k, "file_name": f"{k}.png"} for k in range(2)],
        "categories": [{"id": 1, "name": "zebra"}, {"id": 2, "name": "person"}],
        "annotations": annotations,
    }
    (tmp_path / "instances.json").write_text(json.dumps(tree))
    cutouts = read_coco(tmp_path)
    assert len(cutouts) == 2, "one object of each picture is large enough to be pasted"
    # Outside the picture, without a pixel and of another size: nothing of it ends a training.
    outside = {**annotations[0], "segmentation": [[200.0, 200.0, 210.0, 200.0, 210.0, 210.0]], "area": 12}
    empty = {**annotations[0], "iscrowd": 1, "segmentation": {"counts": [60 * 80], "size": [60, 80]}, "area": 5}
    other = {**empty, "segmentation": {"counts": [0, 50 * 80], "size": [50, 80]}}
    (tmp_path / "instances.json").write_text(json.dumps({**tree, "annotations": [*annotations, outside, empty, other]}))
    # The second picture is left out for a person that is too small to be pasted.
    (objects,) = picture_objects(cutouts, ScorerData(coco=tmp_path))
    target = read_picture(objects, (60, 80)).target
    assert [int(target[8, x]) for x in (10, 45, 65)] == [OUTLIER] * 3
    assert target[50, 70] == 0


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 20), (0.5, 10)])
def test_share_of_outliers(share: float, expected: int, data: ScorerData) -> None:
    exposure = ExposureData.read(data, 7, True)
    dataset = exposure.samples(PASTE, 0, 20, share, False)
    found = sum(bool((dataset[k][0].anomaly == 1).any()) for k in range(20))
    assert found == pytest.approx(expected, abs=4 if 0 < share < 1 else 0)


def test_labels_must_be_those_of_the_network(data: ScorerData, data_dir: Path) -> None:
    with pytest.raises(InputError, match="19 classes of Cityscapes"):
        ExposureData.read(data, 19, True)
    with pytest.raises(InputError, match="network has 5 classes"):
        ExposureData.read(data, 5, True)
    with pytest.raises(InputError, match="--roads has none"):
        ExposureData.read(replace(data, roads=[data_dir / "roads"]), 7, True)
    unlabelled = ExposureData.read(replace(data, camvid=None, roads=[data_dir / "roads"]), 5, False)
    dataset = unlabelled.samples(PASTE, 0, 1, 1.0, True)
    assert set(collate([dataset[0]]).target.unique().tolist()) == {0, OUTLIER}
    cityscapes = replace(data, camvid=None, cityscapes=data_dir / "cityscapes")
    semantic = ExposureData.read(cityscapes, 19, True).train[0][0][0].read()[1]
    assert set(np.unique(semantic)) == {0, 10}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"batch_size": 1}, "batch_size is 1"), ({"iterations": 0}, "iterations is 0"), ({"outlier_share": 1.5}, "outlier_share is 1.5")],
)
def test_recipes_out_of_range_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(METHODS["rpl"].recipe, **changes)


def test_command_trains_and_calibrates(
    data: ScorerData, starts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train", "scorer", "--camvid", data.camvid, "--objects", data.objects[0], "--crop", 48, 64, "--workers", 0]
    common += ["--batch-size", 2, "--iterations", 2, "--device", "cpu", "--calibration-frames", 2]
    run: Callable[..., int] = lambda *extra: main([str(a) for a in [*common, *extra]])  # noqa: E731
    assert run("--method", "segmentation", "--output", tmp_path / "base") == 0
    base = tmp_path / "base" / "deeplab_mobilenet_v2.safetensors"
    assert run("--method", "dense_hybrid", "--init", base, "--output", tmp_path) == 0
    weights = tmp_path / "dense_hybrid.safetensors"
    assert str(weights) in capsys.readouterr().out
    assert "dense_hybrid/hybrid" in calibration_path(weights).read_text()
    scorer = SCORERS.get("dense_hybrid")(ScorerConfig(name="dense_hybrid", weights=str(weights), input_width=64), Runtime(CPU))
    scores: Tensor = scorer(torch.zeros(48, 64, 3, dtype=torch.uint8)).scores
    assert torch.isfinite(scores).all()
    assert run("--method", "rpl", "--output", tmp_path / "rpl") == 2
    assert "--method segmentation" in capsys.readouterr().err
    assert run("--method", "rpl", "--frozen-blocks", 3, "--output", tmp_path / "rpl") == 2
    assert "--frozen-blocks is no setting of method 'rpl'" in capsys.readouterr().err
    assert run("--outlier-share", 0.5, "--output", tmp_path / "rpl") == 2
    assert "--outlier-share is no setting of method 'compact'" in capsys.readouterr().err
