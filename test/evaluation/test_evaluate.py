from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import average_precision_score

from ros2_ood_seg import rle
from ros2_ood_seg.cli import main
from ros2_ood_seg.config import load_profile
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.bag_writer import BagWriter
from ros2_ood_seg.evaluation.counts import ImageCounts
from ros2_ood_seg.evaluation.datasets import LabelledImage, open_dataset
from ros2_ood_seg.evaluation.evaluate import Evaluation, Options, evaluate_frames
from ros2_ood_seg.pipeline import Pipeline

EXTERNAL = ("--set", "scorer.name=external", "--set", "runtime.device=cpu", "--set", "prompts.points.count=8")
STAGES = {"score", "prompt", "segment", "fuse", "total"}


def scene(seed: int, shape: tuple[int, int] = (96, 128)) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """A road-grey image with two bright objects, its labels, and a score map that finds most of them."""
    rng = np.random.default_rng(seed)
    image = rng.normal(110, 8, (*shape, 3)).clip(0, 255).astype(np.uint8)
    label = np.zeros(shape, np.uint8)
    label[:8] = 255
    for _ in range(2):
        x, y, r = int(rng.integers(20, 100)), int(rng.integers(30, 80)), int(rng.integers(7, 13))
        cv2.circle(label, (x, y), r, 1, -1)
    image[label == 1] = (230, 60, 40)
    scores = ndimage.gaussian_filter((label == 1) * 0.9 + rng.normal(0, 0.15, shape), 1.2).astype(np.float32)
    return image, label, scores


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for folder in ("images", "labels", "maps"):
        (root / folder).mkdir(parents=True)
    for k in range(3):
        image, label, scores = scene(k)
        cv2.imwrite(str(root / "images" / f"{k}.png"), image[..., ::-1])
        cv2.imwrite(str(root / "labels" / f"{k}.png"), label)
        np.save(root / "maps" / f"{k}.npy", scores)
    return root


def run(data: Path, output: Path, *more: str, profile: str = "compact") -> dict[str, Any]:
    arguments = ["evaluate", "--dataset", "folder", "--root", str(data), "--external", str(data / "maps"), "--profile", profile]
    assert main([*arguments, "--output", str(output), *EXTERNAL, *more]) == 0
    report: dict[str, Any] = json.loads(output.read_text())
    return report


@pytest.mark.parametrize("profile", ["compact", "compact_s2m", "compact_ugains"])
def test_report_has_the_fixed_keys_and_agrees_with_the_saved_files(data: Path, tmp_path: Path, profile: str) -> None:
    save = tmp_path / "saved"
    report = run(data, tmp_path / "report.json", "--save", str(save), "--track", "obstacle", profile=profile)
    assert (report["dataset"], report["profile"], report["images"]) == ("folder", profile, 3)
    assert report["images_with_anomaly"] == sum((frame.label == 1).any() for frame in open_dataset("folder", data))
    assert set(report["timings_ms"]) >= STAGES
    assert all(set(times) >= {"p50", "p95"} for times in report["timings_ms"].values())
    for group, keys in {
        "pixel": ("ap", "fpr95"),
        "refined": ("ap", "fpr95"),
        "baseline": ("iou_best", "threshold", "auiou", "mean_f1"),
        "s2m": ("iou", "iou_best", "auiou", "mean_f1"),
        "s2m_code": ("iou", "iou_best", "auiou", "mean_f1"),
        "component": ("siou", "ppv", "f1"),
        "instance": ("ap", "ap50"),
    }.items():
        for key in keys:
            assert 0.0 <= report[group][key] <= 1.0, (group, key)
    dataset = open_dataset("folder", data)
    frames = {frame.name: frame for frame in dataset}
    labels = np.concatenate([frame.label.ravel() for frame in frames.values()])
    for kind in ("score", "refined"):
        maps = [np.load(save / kind / f"{name}.npy") for name in frames]
        assert all(m.dtype == np.float32 and m.shape == (96, 128) for m in maps)
        pooled = np.concatenate([m.ravel() for m in maps])
        expected = average_precision_score(labels[labels != 255], pooled[labels != 255])
        assert report["pixel" if kind == "score" else "refined"]["ap"] == pytest.approx(expected, abs=1e-9)
    ious = []
    for name, frame in frames.items():
        saved = json.loads((save / "instances" / f"{name}.json").read_text())
        union = np.zeros(frame.label.shape, bool)
        for instance in saved["instances"]:
            mask = rle.decode(instance["segmentation"]["counts"], *instance["segmentation"]["size"])
            rows, columns = np.nonzero(mask)
            assert instance["box_xyxy"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert 0.0 <= instance["score"] <= 1.0
            union |= mask
        union &= frame.label != 255
        ious.append((union & (frame.label == 1)).sum() / (union | (frame.label == 1)).sum())
    assert report["s2m"]["iou"] == pytest.approx(np.mean(ious), abs=1e-9)
    assert not (tmp_path / "report.parts").exists()
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert page.count("data:image/jpeg;base64,") == 3
    assert "http" not in page
    assert f"{report['s2m']['iou_best']:.4f}" in page
    counts = ImageCounts.load(tmp_path / "report.images.npz")
    figures = counts.figures(np.ones(3, np.int64))
    for key in ("s2m.auiou", "baseline.iou_best", "component.f1", "instance.ap"):
        group, name = key.split(".")
        assert figures[key] == pytest.approx(report[group][name], abs=1e-9)


def test_s2m_metrics_follow_the_refined_map_in_an_s2m_profile(data: Path, tmp_path: Path) -> None:
    save = tmp_path / "saved"
    report = run(data, tmp_path / "report.json", "--save", str(save), profile="compact_s2m")
    means = []
    for t in np.arange(101) / 100:
        values = []
        for frame in open_dataset("folder", data):
            predicted = (np.load(save / "refined" / f"{frame.name}.npy").astype(np.float64) > t) & (frame.label != 255)
            values.append((predicted & (frame.label == 1)).sum() / (predicted | (frame.label == 1)).sum())
        means.append(np.mean(values))
    assert report["s2m"]["iou_best"] == pytest.approx(max(means), abs=1e-12)
    assert report["curves"]["iou"]["s2m"] == pytest.approx(means, abs=1e-6)


def test_baseline_scales_by_the_range_of_the_whole_set(data: Path, tmp_path: Path) -> None:
    report = run(data, tmp_path / "report.json")
    frames = list(open_dataset("folder", data))
    maps = [np.load(data / "maps" / f"{frame.name}.npy").astype(np.float64) for frame in frames]
    low, high = min(m.min() for m in maps), max(m.max() for m in maps)
    means = []
    for t in np.arange(101) / 100:
        predicted = [(m > t * (high - low) + low) & (frame.label != 255) for m, frame in zip(maps, frames, strict=True)]
        means.append(np.mean([(p & (f.label == 1)).sum() / (p | (f.label == 1)).sum() for p, f in zip(predicted, frames, strict=True)]))
    assert report["baseline"]["iou_best"] == pytest.approx(max(means), abs=1e-12)
    assert report["baseline"]["threshold"] == pytest.approx(np.argmax(means) / 100)


def test_resumes_only_what_is_missing_and_only_with_the_same_settings(data: Path, tmp_path: Path) -> None:
    config = load_profile("compact", {"scorer.name": "external", "runtime.device": "cpu"})
    frames = list(open_dataset("folder", data))
    work = tmp_path / "work"
    first = Evaluation(Pipeline.from_config(config), work, Options(), {"data": 1})
    for frame in frames[:2]:
        first.add(frame, scene(int(frame.name))[2])
    again = Evaluation(Pipeline.from_config(config), work, Options(), {"data": 1})
    assert [again.has(frame.name) for frame in frames] == [True, True, False]
    again.add(frames[2], scene(2)[2])
    again.order(frame.name for frame in frames)
    resumed, _ = again.report("set")
    whole = Evaluation(Pipeline.from_config(config), tmp_path / "other", Options(), {"data": 1})
    for frame in frames:
        whole.add(frame, scene(int(frame.name))[2])
    expected, _ = whole.report("set")
    for group in ("pixel", "refined", "baseline", "s2m", "s2m_code", "component", "instance", "sizes"):
        assert resumed[group] == expected[group]
    other = config.model_copy(update={"fusion": config.fusion.model_copy(update={"nms_iou": 0.5})})
    assert not Evaluation(Pipeline.from_config(other), work, Options(), {"data": 1}).has("0")


def test_coarse_mode_bounds_ap_and_keeps_no_maps(data: Path, tmp_path: Path) -> None:
    exact = run(data, tmp_path / "exact.json")
    coarse = run(data, tmp_path / "coarse.json", "--pixel-mode", "coarse")
    low, high = coarse["pixel"]["ap_bounds"]
    assert low <= exact["pixel"]["ap"] <= high
    assert coarse["s2m"] == exact["s2m"]
    assert coarse["instance"] == exact["instance"]
    assert coarse["component"]["f1"] is None
    assert coarse["rules"]["exact"] is False


def test_frames_without_anomalies_have_no_pixel_metrics(tmp_path: Path) -> None:
    config = load_profile("compact", {"scorer.name": "external", "runtime.device": "cpu"})
    pipeline = Pipeline.from_config(config)
    image, _, scores = scene(0)
    evaluation = Evaluation(pipeline, tmp_path / "work", Options())
    evaluation.add(LabelledImage("empty", image, np.zeros((96, 128), np.uint8)), np.zeros_like(scores))
    evaluation.add(LabelledImage("ignored", image, np.full((96, 128), 255, np.uint8)), np.zeros_like(scores))
    report, _ = evaluation.report("nothing")
    assert (report["pixel"]["ap"], report["pixel"]["fpr95"], report["instance"]["ap"]) == (None, None, None)
    assert report["s2m"]["iou"] == 0.0
    assert (report["images"], report["images_with_anomaly"]) == (2, 0)
    with pytest.raises(InputError, match="two frames are named 'empty'"):
        evaluation.add(LabelledImage("empty", image, np.zeros((96, 128), np.uint8)), np.zeros_like(scores))
    with pytest.raises(InputError, match="no frames"):
        evaluate_frames([], pipeline, tmp_path / "none")


def test_a_labelled_bag(tmp_path: Path) -> None:
    with BagWriter(tmp_path / "bag") as bag:
        for k in range(3):
            image, label, scores = scene(k)
            stamp_ns = 1_000_000_000 + k * 100_000_000
            bag.write_image("/camera/image", image, stamp_ns)
            bag.write_image("/camera/labels", label, stamp_ns)
            np.save(tmp_path / f"{stamp_ns}.npy", scores)
    output = tmp_path / "report.json"
    arguments = ["evaluate", "--bag", str(tmp_path / "bag"), "--image-topic", "/camera/image", "--label-topic", "/camera/labels"]
    assert main([*arguments, "--output", str(output), "--max-images", "2", "--external", str(tmp_path), *EXTERNAL]) == 0
    report = json.loads(output.read_text())
    assert (report["dataset"], report["images"]) == ("bag", 2)
    assert [image["name"] for image in report["per_image"]] == ["1000000000", "1100000000"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --root"),
        (("--root", "a", "--bag", "b"), "either --root"),
        (("--bag", "b"), "bag 'b' does not exist"),
        (("--bag", "b", "--instance-topic", "i"), "--instance-topic needs --label-topic"),
        (("--root", "{data}", "--max-images", "-1"), "--max-images is -1"),
        (("--root", "{data}/nowhere"), "is not a folder"),
        (("--root", "{data}", "--set", "fusion.nms_iou"), "KEY=VALUE"),
        (("--root", "{data}", "--set", "fusion.nms=1"), "unknown setting 'fusion.nms'"),
        (("--root", "{data}", "--profile", "best"), "unknown profile 'best'"),
        (("--root", "{data}", "--external", "{data}/images"), "cannot be read"),
        (("--root", "{data}", "--external", "{data}/nowhere"), "--external '{data}/nowhere' is not a folder"),
        (("--root", "{data}"), "name their folder with --external"),
        (("--root", "{data}", "--external", "{data}/maps", "--set", "scorer.name=compact"), "add --set scorer.name=external"),
    ],
)
def test_bad_arguments_end_with_2_and_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    filled = [argument.format(data=data) for argument in arguments]
    assert main(["evaluate", "--output", str(tmp_path / "report.json"), *EXTERNAL, *filled]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ood-seg: ")
    assert message.format(data=data) in error


def test_score_maps_that_are_not_finite_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = scene(1)[2]
    scores[5, 6] = np.nan
    np.save(data / "maps" / "1.npy", scores)
    arguments = ["evaluate", "--root", str(data), "--external", str(data / "maps"), "--output", str(tmp_path / "report.json"), *EXTERNAL]
    assert main(arguments) == 2
    assert "finite" in capsys.readouterr().err


def test_pictures_that_cannot_be_used_are_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("images", "labels"):
        cv2.imwrite(str(data / folder / "1.png"), np.zeros((8, 200), np.uint8))
    arguments = ["evaluate", "--root", str(data), "--external", str(data / "maps"), "--output", str(tmp_path / "report.json")]
    assert main([*arguments, *EXTERNAL]) == 2
    assert "frame '1': image is 200x8 px, its sides must be 16 to 16384 px" in capsys.readouterr().err


def test_masks_of_0_and_255_are_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (data / "labels").iterdir():
        cv2.imwrite(str(path), np.where(cv2.imread(str(path), cv2.IMREAD_UNCHANGED) == 1, 255, 0).astype(np.uint8))
    run(data, tmp_path / "report.json")
    assert "no pixel is labelled 1 (anomaly)" in capsys.readouterr().out


def test_a_report_has_to_be_json(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("report.html", "compact_0.5", "report"):
        assert main(["evaluate", "--root", str(data), "--output", str(tmp_path / name)]) == 2
        assert f"{name}' must end in .json" in capsys.readouterr().err
