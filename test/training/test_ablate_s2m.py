"""``ood-seg ablate s2m`` on a tiny data set, with a scorer of random weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.datasets import LabelledImage
from ros2_ood_seg.training.ablate_s2m import OracleBoxes, Row, markdown, register
from ros2_ood_seg.types import Calibration, ScoreMap


def run(labelled_set: Path, output: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    settings = [f"scorer.weights={labelled_set.parent / 'scorer.safetensors'}", "scorer.input_width=96", "segmenter.name=grabcut"]
    settings += ["prompts.boxes.method=components"]
    flags = [word for setting in settings for word in ("--set", setting)]
    args = parser.parse_args(["s2m", "--root", str(labelled_set), "--output", str(output), "--device", "cpu", *flags, *words])
    return int(args.run(args))


def test_ground_truth_boxes_show_what_the_prompts_lose(labelled_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "oracle.json"
    assert run(labelled_set, output, "--what", "oracle") == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["generated boxes", "ground-truth boxes"]
    assert rows[1]["iou"] > 0.6
    assert rows[1]["iou"] > rows[0]["iou"]
    assert set(rows[1]["box_recall"].values()) == {1.0}
    assert rows[0]["baseline_iou"] == rows[1]["baseline_iou"]
    assert cv2.imread(str(tmp_path / "oracle.png")) is not None
    assert "ground-truth boxes" in (tmp_path / "oracle.md").read_text()
    assert "| tiny |" in capsys.readouterr().out


def test_prompt_kinds_are_rows_of_one_table(labelled_set: Path, tmp_path: Path) -> None:
    output = tmp_path / "prompts.json"
    assert run(labelled_set, output, "--what", "prompts", "--methods", "components", "--max-images", "1") == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["boxes: components", "points: fps", "boxes and points: components"]
    assert rows[1]["box_recall"] == dict.fromkeys(rows[0]["box_recall"])


def test_rules_for_masks_are_rows_and_the_last_keeps_no_more_than_all(labelled_set: Path, tmp_path: Path) -> None:
    output = tmp_path / "masks.json"
    flags = [word for setting in ("prompts.boxes.threshold=0.01", "fusion.min_score=0.6") for word in ("--set", setting)]
    assert run(labelled_set, output, "--what", "masks", *flags) == 0
    rows = {row["variant"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == [
        "confidence from 0.05, as published",
        "confidence from 0.25",
        "this profile's boxes, all masks",
        "and this profile's least score",
    ]
    # Components have a confidence of their own and no least one, so that the first three see the same boxes.
    assert rows["confidence from 0.05, as published"]["iou"] == rows["this profile's boxes, all masks"]["iou"]
    assert rows["and this profile's least score"]["iou"] != rows["this profile's boxes, all masks"]["iou"]


def test_oracle_knows_the_boxes_of_a_frame_off_the_diagonal() -> None:
    oracle = OracleBoxes()
    label = np.zeros((50, 200), np.uint8)
    label[5:15, 150:190] = 1
    label[30:40, 10:20] = 255
    oracle.tell(LabelledImage("frame", np.zeros((50, 200, 3), np.uint8), label, None))
    prompts = oracle(ScoreMap(torch.zeros(50, 200), "test", Calibration.linear()))
    assert prompts.boxes_xyxy.tolist() == [[150, 5, 190, 15]]
    assert prompts.confidence.tolist() == [1.0]


def test_table_shows_percent_and_leaves_out_what_is_not_there() -> None:
    rows = [Row("set", "a", 0.5, 0.25, None, 0.4, 0.1, {"0": 1.0, "1000": None}, 12.4)]
    assert markdown(rows).splitlines()[-1] == "| set | a | 50.0 | 25.0 |  | 40.0 | 10.0 | 100.0 |  | 12 |"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--what", "noise"), "--maps"),
        (("--what", "segmenters", "--segmenters", "nothing"), "unknown segmenter 'nothing'"),
        (("--what", "oracle", "--profile", "nothing"), "unknown profile 'nothing'"),
    ],
)
def test_unusable_arguments_are_refused(labelled_set: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(labelled_set, tmp_path / "table.json", *words)
