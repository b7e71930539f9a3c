"""``ood-seg ablate ugains`` on a tiny data set, with a scorer of random weights or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from ros2_ood_seg.cli import main
from ros2_ood_seg.config import load_profile
from ros2_ood_seg.evaluation.datasets import LabelledImage
from ros2_ood_seg.fusion import FUSIONS
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.training.ablate_ugains import ComponentMasks, OraclePoints, Row, SegmenterScores, markdown
from ros2_ood_seg.types import Calibration, Masks, Prompts, ScoreMap


def run(labelled_set: Path, output: Path, *words: str) -> list[dict[str, Any]]:
    settings = [f"scorer.weights={labelled_set.parent / 'scorer.safetensors'}", "scorer.input_width=96", "segmenter.name=grabcut"]
    settings += ["prompts.points.count=6", "prompts.points.grid_side=3", "prompts.points.threshold=0"]
    flags = [word for setting in settings for word in ("--set", setting)]
    assert main(["ablate", "ugains", "--root", str(labelled_set), "--output", str(output), "--device", "cpu", *flags, *words]) == 0
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"]
    return rows


def test_bounds_enclose_the_method(labelled_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["variant"]: row for row in run(labelled_set, tmp_path / "bounds.json", "--what", "bounds")}
    assert list(rows) == [
        "connected components",
        "dense grid",
        "sampled points, no NMS",
        "sampled points, NMS",
        "and this profile's ranking",
        "oracle centres",
        "oracle centres, segmenter's score",
    ]
    oracle = rows["oracle centres"]
    assert oracle["point_precision"] == oracle["point_recall"] == 1.0
    assert oracle["prompts"] == 1.0
    assert rows["dense grid"]["prompts"] == 9.0
    counts = [rows[name]["instances"] for name in ("sampled points, no NMS", "sampled points, NMS", "and this profile's ranking")]
    assert counts == sorted(counts, reverse=True)
    assert len({row["ap"] for row in rows.values()}) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"bounds.json", "bounds.md", "bounds.png"}
    assert cv2.imread(str(tmp_path / "bounds.png")) is not None
    assert (tmp_path / "bounds.md").read_text() in capsys.readouterr().out


def test_counts_and_samplers_are_rows(labelled_set: Path, tmp_path: Path) -> None:
    counts = run(labelled_set, tmp_path / "counts.json", "--what", "points", "--counts", "2", "5", "--max-images", "1")
    assert [(row["variant"], row["prompts"]) for row in counts] == [("2", 2.0), ("5", 5.0)]
    sampling = run(labelled_set, tmp_path / "sampling.json", "--what", "sampling", "--max-images", "1")
    assert [row["variant"] for row in sampling] == ["random", "kmeans", "fps", "grid"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--what", "points", "--counts", "0"), "'prompts.points.count' is 0, allowed: a whole number, at least 1"),
        (("--what", "bounds", "--max-images", "-1"), "--max-images is -1"),
        (("--what", "scorers", "--scorers", "nothing"), "unknown scorer 'nothing'"),
    ],
)
def test_unusable_arguments_are_refused(
    labelled_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert main(["ablate", "ugains", "--root", str(labelled_set), "--output", str(tmp_path / "t.json"), "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


def score_map(scores: torch.Tensor) -> ScoreMap:
    return ScoreMap(scores, "test", Calibration.linear())


def test_oracle_has_one_point_in_each_object() -> None:
    label = np.zeros((50, 200), np.uint8)
    label[5:15, 150:190] = label[30:40, 10:20] = 1
    label[30:40, 60:70] = 255
    oracle = OraclePoints()
    oracle.tell(LabelledImage("frame", np.zeros((50, 200, 3), np.uint8), label))
    x, y = oracle(score_map(torch.zeros(50, 200))).points_xy.long().T.numpy()
    assert label[y, x].tolist() == [1, 1]
    assert sorted(x // 100) == [0, 1]


def test_components_are_the_instances() -> None:
    scores = torch.zeros(40, 60)
    scores[5:15, 5:15] = 0.9
    scores[20:30, 30:45] = 0.7
    scores[38, 58] = 1.0
    config = load_profile("compact_ugains", {"prompts.points.threshold": 0.5, "prompts.boxes.min_area_px": 50})
    components = ComponentMasks(config)
    ignore = torch.zeros(40, 60, dtype=torch.bool)
    ignore[:, 50:] = True
    prompts = components.prompts(score_map(scores), ignore)
    masks = components(torch.zeros(40, 60, 3, dtype=torch.uint8), prompts)
    assert torch.equal(masks.masks, torch.stack([scores == 0.9, scores == 0.7]))
    assert all(mask[y, x] for mask, (x, y) in zip(masks.masks, prompts.points_xy.long().tolist(), strict=True))
    assert len(components(torch.zeros(40, 60, 3, dtype=torch.uint8), Prompts.from_points(torch.zeros(1, 2)))) == 0

    fewer = ComponentMasks(load_profile("compact_ugains", {"prompts.points.threshold": 0.5, "prompts.boxes.max_boxes": 1}))
    assert fewer.prompts(score_map(scores)).num_points == 1
    assert torch.equal(fewer._masks[0], scores == 0.7)
    none = components.prompts(score_map(torch.zeros(40, 60)))
    assert components(torch.zeros(40, 60, 3, dtype=torch.uint8), none).masks.shape == (0, 40, 60)


def test_instances_ranked_by_the_segmenter() -> None:
    config = load_profile("compact_ugains", {"fusion.min_score": 0.0})
    fusion = SegmenterScores(FUSIONS.get("ugains")(config.fusion, Runtime(torch.device("cpu"))))
    scores = torch.zeros(20, 20)
    scores[:5], scores[10:15], scores[15:] = 0.9, 0.6, 0.3
    masks = torch.stack([scores == value for value in (0.9, 0.6, 0.3)])
    points = Prompts.from_points(torch.tensor([[0.0, 0.0], [0.0, 12.0], [0.0, 17.0]]))
    instances = fusion(score_map(scores), points, Masks(masks, torch.tensor([0.2, 0.8, torch.nan]))).instances
    torch.testing.assert_close(instances.scores, torch.tensor([0.8, 0.2, 0.0]))
    assert torch.equal(instances.masks, masks[[1, 0, 2]])


def test_table_shows_percent_and_leaves_out_what_is_not_there() -> None:
    row = Row("set", "fps", 0.5, 0.25, 0.625, None, 0.1, 0.2, None, 1.0, 50.0, 7.25, 12.4)
    assert markdown([row]).splitlines()[-1] == "| set | fps | 50.0 | 25.0 | 62.5 |  | 10.0 | 20.0 |  | 100.0 | 50.0 | 7.2 | 12 |"
