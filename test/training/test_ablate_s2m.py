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
from ros2_ood_seg.scorers.networks.compact import CompactNet
from ros2_ood_seg.training.ablate_s2m import OracleBoxes, Row, markdown, register
from ros2_ood_seg.types import Calibration, ScoreMap
from ros2_ood_seg.weights.store import save_weights


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets") / "tiny"
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(2):
        image = np.clip(rng.normal(90, 4, (96, 160, 3)), 0, 255).astype(np.uint8)
        label = np.zeros((96, 160), np.uint8)
        cv2.ellipse(image, (110, 30 + 20 * k), (24, 12), 0, 0, 360, (20, 30, 220), -1)
        cv2.ellipse(label, (110, 30 + 20 * k), (24, 12), 0, 0, 360, 1, -1)
        cv2.imwrite(str(root / "images" / f"{k}.png"), image)
        cv2.imwrite(str(root / "labels" / f"{k}.png"), label)
    torch.manual_seed(0)
    calibration = Calibration((-1.0, 1.0), (0.0, 1.0)).to_dict()
    metadata = {"default_score": "outlier", "calibrations": {"outlier": calibration}}
    save_weights(root.parent / "scorer.safetensors", CompactNet().state_dict(), metadata)
    return root


def run(dataset: Path, output: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    settings = [f"scorer.weights={dataset.parent / 'scorer.safetensors'}", "scorer.input_width=96", "segmenter.name=grabcut"]
    settings += ["prompts.boxes.method=components"]
    flags = [word for setting in settings for word in ("--set", setting)]
    args = parser.parse_args(["ablate", "s2m", "--root", str(dataset), "--output", str(output), "--device", "cpu", *flags, *words])
    return int(args.run(args))


def test_ground_truth_boxes_show_what_the_prompts_lose(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "oracle.json"
    assert run(dataset, output, "--what", "oracle") == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["generated boxes", "ground-truth boxes"]
    assert rows[1]["iou"] > 0.6
    assert rows[1]["iou"] > rows[0]["iou"]
    assert set(rows[1]["box_recall"].values()) == {1.0}
    assert rows[0]["baseline_iou"] == rows[1]["baseline_iou"]
    assert cv2.imread(str(tmp_path / "oracle.png")) is not None
    assert "ground-truth boxes" in (tmp_path / "oracle.md").read_text()
    assert "| tiny |" in capsys.readouterr().out


def test_prompt_kinds_are_rows_of_one_table(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "prompts.json"
    assert run(dataset, output, "--what", "prompts", "--methods", "components", "--max-images", "1") == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["boxes: components", "points: fps", "boxes and points: components"]
    assert rows[1]["box_recall"] == dict.fromkeys(rows[0]["box_recall"])


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
def test_unusable_arguments_are_refused(dataset: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(dataset, tmp_path / "table.json", *words)
