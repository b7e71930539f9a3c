"""Score maps on disk: labels follow the map's size, an interrupted run goes on, other recipes are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.training.outlier_exposure import RoadSample, tight_boxes_xyxy
from ros2_ood_seg.training.road_images import IGNORE
from ros2_ood_seg.training.score_maps import SHARD_SIZE, ScoreMaps, check_recipe, score_sample, write_score_maps
from ros2_ood_seg.types import Calibration, ScoreMap

CPU = torch.device("cpu")


class RedScorer:
    """Scores a pixel by its red channel, in -10..0."""

    name = "red"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image: Tensor, external: Tensor | None = None) -> ScoreMap:
        self.calls += 1
        return ScoreMap(image[..., 0].float() / 25.5 - 10.0, self.name, Calibration((-10.0, 0.0), (0.0, 1.0)))


class Rectangles:
    """One or no bright wide object per image, far from the diagonal, so that swapped axes show."""

    def __init__(self, length: int, height: int = 60, width: int = 160) -> None:
        self.length, self.height, self.width = length, height, width

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> RoadSample:
        image = np.zeros((self.height, self.width, 3), np.uint8)
        instances = np.zeros((self.height, self.width), np.int32)
        if index % 3:
            instances[6:16, 100:140] = 1
            image[6:16, 100:140, 0] = 100 + index
        none = np.zeros_like(image[..., 0])
        return RoadSample(image, none, (instances > 0).astype(np.uint8), instances, tight_boxes_xyxy(instances))


def test_boxes_are_x_then_y_in_the_pixels_of_the_stored_map() -> None:
    entry, calibration = score_sample(Rectangles(2)[1], RedScorer(), 80, CPU)
    assert entry.scores.shape == (30, 80)
    np.testing.assert_allclose(entry.boxes_xyxy, [[50, 3, 70, 8]])
    np.testing.assert_allclose(entry.peaks, [101 / 255], rtol=1e-5)
    rows, columns = np.nonzero(entry.scores > -8.0)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (50, 3, 70, 8)
    assert calibration.raw == (-10.0, 0.0)


def test_pixels_that_do_not_count_are_dark() -> None:
    sample = Rectangles(2)[1]
    crowd = np.zeros_like(sample.anomaly)
    crowd[30:50, 20:60] = IGNORE
    bright = np.where(crowd[..., None] == IGNORE, np.uint8(255), sample.image)
    entry, calibration = score_sample(replace(sample, image=bright, anomaly=sample.anomaly | crowd), RedScorer(), 80, CPU)
    assert (entry.scores[16:24, 11:29] == calibration.raw[0]).all()
    assert entry.scores[5, 60] > calibration.raw[0]


def test_interrupted_run_goes_on_and_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    source, scorer = Rectangles(SHARD_SIZE + 3), RedScorer()
    write_score_maps(tmp_path / "a", source, scorer, 80, {"seed": 0}, CPU)
    assert scorer.calls == SHARD_SIZE + 3
    (tmp_path / "a" / "maps_00001.npz").unlink()
    write_score_maps(tmp_path / "a", source, scorer, 80, {"seed": 0}, CPU)
    assert scorer.calls == SHARD_SIZE + 6
    maps = ScoreMaps.read(tmp_path / "a")
    assert len(maps) == SHARD_SIZE + 3
    for index in (0, 1, SHARD_SIZE + 2):
        expected, _ = score_sample(source[index], scorer, 80, CPU)
        np.testing.assert_allclose(maps[index].scores, expected.scores, atol=5e-3)
        np.testing.assert_array_equal(maps[index].boxes_xyxy, expected.boxes_xyxy)
    assert [len(b) for b in maps.boxes_xyxy[:4]] == [0, 1, 1, 0]


def test_maps_of_another_recipe_are_refused(tmp_path: Path) -> None:
    write_score_maps(tmp_path, Rectangles(2), RedScorer(), 80, {"seed": 0}, CPU)
    with pytest.raises(InputError, match="another recipe"):
        write_score_maps(tmp_path, Rectangles(2), RedScorer(), 80, {"seed": 1}, CPU)
    with pytest.raises(InputError, match="another recipe"):
        write_score_maps(tmp_path, Rectangles(3), RedScorer(), 80, {"seed": 0}, CPU)


def test_several_processes_share_the_scoring(tmp_path: Path) -> None:
    source, scorers = Rectangles(2 * SHARD_SIZE + 3), (RedScorer(), RedScorer())
    for k, scorer in enumerate(scorers):
        write_score_maps(tmp_path / "parts", source, scorer, 20, {}, CPU, part=(k, 2))
    write_score_maps(tmp_path / "whole", source, RedScorer(), 20, {}, CPU)
    assert [scorer.calls for scorer in scorers] == [SHARD_SIZE + 3, SHARD_SIZE]
    parts, whole = ScoreMaps.read(tmp_path / "parts"), ScoreMaps.read(tmp_path / "whole")
    np.testing.assert_array_equal(parts.scores, whole.scores)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())


def test_fields_that_are_younger_than_the_maps_had_their_default(tmp_path: Path) -> None:
    write_score_maps(tmp_path, Rectangles(2), RedScorer(), 80, {"paste": {"shadow": 0.3}}, CPU)
    check_recipe(tmp_path, {"paste": {"shadow": 0.3, "blur": 0.0}}, {"paste": {"blur": 0.0}})
    with pytest.raises(InputError, match=r"\(paste.blur 0.0 instead of 0.5\)"):
        check_recipe(tmp_path, {"paste": {"shadow": 0.3, "blur": 0.5}}, {"paste": {"blur": 0.0}})


def test_damaged_maps_are_refused_by_name(tmp_path: Path) -> None:
    write_score_maps(tmp_path, Rectangles(2), RedScorer(), 80, {}, CPU)
    shard = tmp_path / "maps_00000.npz"
    whole = shard.read_bytes()
    # Compressed bytes begin after the name of the first array and its header.
    for damaged in (b"PK half a file", b"", whole[:100] + bytes(byte ^ 255 for byte in whole[100:160]) + whole[160:]):
        shard.write_bytes(damaged)
        with pytest.raises(InputError, match=r"maps_00000.npz' cannot be read, delete the file"):
            ScoreMaps.read(tmp_path)


def test_folders_without_maps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no score maps"):
        ScoreMaps.read(tmp_path)


def test_split_needs_something_to_train_on(tmp_path: Path) -> None:
    write_score_maps(tmp_path, Rectangles(4), RedScorer(), 80, {}, CPU)
    maps = ScoreMaps.read(tmp_path)
    training, measured = maps.split(1)
    assert (len(training), len(measured)) == (3, 1)
    np.testing.assert_array_equal(measured[0].scores, maps[3].scores)
    with pytest.raises(InputError, match="4 of 4"):
        maps.split(4)
