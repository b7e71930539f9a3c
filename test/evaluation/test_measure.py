from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.component import Minimum
from ros2_ood_seg.evaluation.datasets import LabelledImage
from ros2_ood_seg.evaluation.measure import FrameMeasure, MapCounts, Maps, measure
from ros2_ood_seg.evaluation.store import PartStore
from ros2_ood_seg.types import Calibration, FrameResult, Instances, Prompts, ScoreMap

SHAPE = (40, 60)


def frame() -> LabelledImage:
    """An anomaly of 100 px, one of 36 px that ends at row 36, and ignored rows."""
    label = np.zeros(SHAPE, np.uint8)
    label[5:15, 10:20] = 1
    label[30:36, 40:46] = 1
    label[:3] = 255
    return LabelledImage("0", np.zeros((*SHAPE, 3), np.uint8), label)


def maps(prompts: list[list[float]] | None) -> Maps:
    """One mask that covers 80 of the first object's pixels and nothing else."""
    mask = np.zeros((1, *SHAPE), bool)
    mask[0, 5:13, 10:20] = True
    confidence = np.where(mask[0], np.float32(0.5), np.float32(0))
    scores = np.linspace(-3, 7, mask[0].size, dtype=np.float32).reshape(SHAPE)
    boxes = None if prompts is None else np.array(prompts, np.float32).reshape(-1, 4)
    box = np.array([[10, 5, 20, 13]], np.float32)
    return Maps(scores, confidence, confidence, mask, box, np.array([0.5], np.float32), np.array([2.0], np.float32), boxes)


def figures(prompts: list[list[float]] | None) -> FrameMeasure:
    return measure(frame(), maps(prompts), Minimum(0, 0))[0]


def test_truth_has_size_place_and_best_overlaps() -> None:
    found = figures([[10, 5, 20, 10], [10, 5, 20, 15], [0, 0, 5, 5]]).truth
    np.testing.assert_array_equal(found.area_px, [100, 36])
    np.testing.assert_allclose(found.bottom, [15 / 40, 36 / 40])
    np.testing.assert_allclose(found.mask_iou, [0.8, 0.0])
    np.testing.assert_allclose(found.box_iou, [1.0, 0.0])


def test_box_recall_is_zero_without_boxes_and_unknown_without_box_prompts() -> None:
    np.testing.assert_array_equal(figures([]).truth.box_iou, [0.0, 0.0])
    assert np.isnan(figures(None).truth.box_iou).all()


def test_without_predictions_nothing_is_found() -> None:
    one = maps([])
    none = dataclasses.replace(
        one, masks=one.masks[:0], boxes_xyxy=one.boxes_xyxy[:0], scores=one.scores[:0], raw_scores=one.raw_scores[:0]
    )
    found = measure(frame(), none, Minimum(0, 0))[0]
    np.testing.assert_array_equal(found.truth.area_px, [100, 36])
    np.testing.assert_array_equal(found.truth.mask_iou, [0.0, 0.0])
    assert found.instances.scores.size == 0


def test_least_sizes_are_those_of_the_truth_and_ranks_follow_the_scores() -> None:
    found = measure(frame(), maps(None), Minimum(1000, 50))[0]
    # The object of 36 px is ignored; the predicted component of 80 px counts, as it was not made by a threshold.
    np.testing.assert_allclose(found.components.siou, [0.8])
    np.testing.assert_allclose(found.components.ppv, [1.0])
    np.testing.assert_allclose(found.instances.scores, [0.5], atol=1e-8)


def test_sweeps_and_range() -> None:
    found = figures(None)
    assert found.score_range == (-3.0, 7.0)
    assert (found.masks.positives, found.masks.hits[0], found.masks.extra[0]) == (136, 80, 0)
    assert (found.masks.hits[49], found.masks.hits[50]) == (80, 0)


def test_released_code_counts_what_is_predicted_on_ignored_pixels_as_wrong() -> None:
    one = maps(None)
    confidence = one.confidence.copy()
    confidence[1:4, :7] = 0.25
    found = measure(frame(), dataclasses.replace(one, confidence=confidence), Minimum(0, 0))[0]
    # Of the 21 px more, 14 are ignored.
    assert (found.masks.hits[0], found.masks.extra[0], found.masks.extra[25]) == (80, 7, 0)
    assert (found.masks_code.hits[0], found.masks_code.extra[0], found.masks_code.extra[25]) == (80, 21, 0)


def test_confidence_is_the_best_score_of_the_masks_at_a_pixel() -> None:
    masks = torch.zeros((3, 6, 9), dtype=torch.bool)
    masks[0, 1:3, 1:4], masks[1, 2:5, 2:8], masks[2, 5, :3] = True, True, True
    scores = torch.tensor([0.9, 0.4, 0.0])
    instances = Instances.from_masks(masks, scores, 10 * scores, scores)
    refined = torch.linspace(-1, 1, 54).reshape(6, 9)
    prompts = Prompts.from_boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(1))
    result = FrameResult(instances, ScoreMap(refined * 2, "test", Calibration.linear()), prompts, refined)
    made = Maps.from_result(result, refined_is_confidence=False, has_boxes=True)
    expected = np.where(masks[0], np.float32(0.9), np.where(masks[1], np.float32(0.4), np.float32(0)))
    np.testing.assert_array_equal(np.where(masks[2], 0, made.confidence), expected)
    # An instance of score 0 belongs to the union of all masks.
    np.testing.assert_array_equal(made.confidence > 0, masks.any(dim=0))
    assert (made.confidence[masks[2].numpy()] < 0.01).all()
    np.testing.assert_array_equal(made.refined, refined)
    np.testing.assert_array_equal(made.score, 2 * refined)
    np.testing.assert_array_equal(made.prompt_boxes_xyxy, [[1, 2, 3, 4]])
    assert made.raw_scores.tolist() == pytest.approx([9.0, 4.0, 0.0])
    s2m = Maps.from_result(result, refined_is_confidence=True, has_boxes=False)
    assert s2m.confidence is s2m.refined
    assert s2m.prompt_boxes_xyxy is None


@pytest.mark.parametrize("exact", [True, False])
def test_parts_survive_the_disk(tmp_path: Path, exact: bool) -> None:
    one = maps([[10, 5, 20, 15]])
    found, score, refined = measure(frame(), one, Minimum(0, 0), 0 if exact else 12)
    store = PartStore(tmp_path / "parts", {"a": 1})
    found = dataclasses.replace(found, timings_ms={"total": 2.0}, outside_ms={"load": 1.0})
    store.save_pixels("0", score, refined, (one.refined, frame().label) if exact else None)
    assert not store.has("0")
    store.save(found, b"jpeg")
    again = PartStore(tmp_path / "parts", {"a": 1})
    assert again.has("0")
    loaded = again.load("0")
    assert (loaded.timings_ms, loaded.outside_ms, again.picture("0")) == ({"total": 2.0}, {"load": 1.0}, b"jpeg")
    for group in ("masks", "masks_code", "components", "instances", "truth"):
        for key, value in vars(getattr(found, group)).items():
            np.testing.assert_array_equal(getattr(getattr(loaded, group), key), value)
    for kind, parts in (("score", score), ("refined", refined)):
        for label, part in ((1, parts[0]), (0, parts[1])):
            kept = again.counts("0", kind, label)
            np.testing.assert_array_equal(kept.distinct(), part.distinct())
    if exact:
        np.testing.assert_array_equal(again.maps("0")[0], one.refined)


def test_clearing_that_is_interrupted_leaves_no_frame_that_seems_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PartStore(tmp_path / "parts", {})
    for name in ("0", "1"):
        put(store, measure(dataclasses.replace(frame(), name=name), maps(None), Minimum(0, 0)))
    unlink, iterdir = Path.unlink, Path.iterdir

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        if path.suffix not in (".part", ".group"):
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", interrupted)
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(iterdir(path))))
    with pytest.raises(KeyboardInterrupt):
        store.clear()
    assert not any(PartStore(tmp_path / "parts", {}).has(name) for name in ("0", "1"))


def put(store: PartStore, measured: tuple[FrameMeasure, MapCounts, MapCounts]) -> None:
    store.save_pixels("0", *measured[1:])
    store.save(measured[0], b"")


def test_parts_of_other_settings_are_thrown_away(tmp_path: Path) -> None:
    put(PartStore(tmp_path / "parts", {"a": 1}), measure(frame(), maps(None), Minimum(0, 0)))
    with pytest.raises(InputError, match="other code, weights, settings or data"):
        PartStore(tmp_path / "parts", {"a": 2}, join=True)
    assert PartStore(tmp_path / "parts", {"a": 1}, join=True).has("0")
    assert not PartStore(tmp_path / "parts", {"a": 2}).has("0")


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "thesis.json").write_text("{}")
    with pytest.raises(InputError, match="made by something else"):
        PartStore(tmp_path / "parts", {})
    assert (tmp_path / "parts" / "thesis.json").is_file()


def test_clearing_leaves_nothing_and_touches_nothing_else(tmp_path: Path) -> None:
    store = PartStore(tmp_path / "parts", {})
    put(store, measure(frame(), maps(None), Minimum(0, 0)))
    beside: NDArray[np.float32] = np.zeros(1, np.float32)
    np.save(tmp_path / "mine.npy", beside)
    store.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.npy"]
