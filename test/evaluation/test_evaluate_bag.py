"""``ood-seg evaluate --bag`` on small recordings, with score maps from outside so that only the bag side is at work."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from ros2_ood_seg.cli import main
from ros2_ood_seg.config import PipelineConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation import clips, evaluate_bag
from ros2_ood_seg.evaluation.bag_evaluation import BagJob, BagRun, find_bags
from ros2_ood_seg.evaluation.bag_messages import instances_from_message, make_header, typestore
from ros2_ood_seg.evaluation.bag_writer import BagWriter
from ros2_ood_seg.evaluation.bags import BagImage, BagReader
from ros2_ood_seg.evaluation.evaluate import Options
from ros2_ood_seg.evaluation.events import EventRule
from ros2_ood_seg.evaluation.results_bag import INSTANCES_TOPIC, Answer, ResultsBag
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.types import Instances

HEIGHT, WIDTH = 64, 96
START_NS, STEP_NS, LAG_NS = 1_700_000_000_000_000_000, 500_000_000, 20_000_000
CHEAP = (
    "scorer.name=external",
    "runtime.device=cpu",
    "prompts.boxes.method=components",
    "prompts.points.method=none",
    "segmenter.name=grabcut",
)
SETTINGS = tuple(word for setting in CHEAP for word in ("--set", setting))
CLIPS = ("--clip-before", "1", "--clip-after", "1", "--clip-min-frames", "2", "--clip-min-score", "0.2")


def stamp(k: int) -> int:
    return START_NS + k * STEP_NS


def scene(k: int, shown: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grey road, with a red box that drives to the right when it is shown; its label and its score map."""
    image = np.random.default_rng(k).normal(110, 5, (HEIGHT, WIDTH, 3)).clip(0, 255).astype(np.uint8)
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    if shown:
        label[30:46, 20 + 2 * k : 40 + 2 * k] = 1
        image[label == 1] = (230, 60, 40)
    return image, label, np.where(label == 1, 0.9, 0.05).astype(np.float32)


def write_frames(bag: BagWriter, maps: Path, shown: range, frames: range = range(8), raw: bool = True, every_label: int = 2) -> None:
    maps.mkdir(exist_ok=True)
    for k in frames:
        image, label, scores = scene(k, k in shown)
        if raw:
            bag.write_image("/front/image", image, stamp(k), "front")
        else:
            bag.write_jpeg("/front/image/compressed", image, stamp(k), "front", time_ns=stamp(k) + LAG_NS)
        if k % every_label == 0:
            bag.write_image("/front/label", label, stamp(k))
        np.save(maps / f"{stamp(k)}.npy", scores)


def evaluate(tmp_path: Path, *arguments: Any, code: int = 0) -> dict[str, Any]:
    output = tmp_path / "out" / "report.json"
    command = ["evaluate", "--output", output, "--external", tmp_path / "maps", *SETTINGS, *arguments]
    assert main([*map(str, command)]) == code
    return json.loads(output.read_text()) if output.exists() else {}


def evaluate_drives(root: Path, *arguments: Any, code: int = 0) -> dict[str, Any]:
    bags = ("--bag", root / "raw", root / "small.mcap")
    return evaluate(root, *bags, "--label-topic", "/front/label", "--clips", root / "clips", *CLIPS, *arguments, code=code)


@pytest.fixture(scope="module")
def drives(tmp_path_factory) -> Path:
    """A raw sqlite3 recording and a compressed MCAP one, other topics beside the camera, evaluated together."""
    root = tmp_path_factory.mktemp("drives")
    with BagWriter(root / "raw", "sqlite3") as bag:
        write_frames(bag, root / "maps", range(3, 8))
        info = typestore().types["std_msgs/msg/Header"]
        bag.write("/front/camera_info", info(make_header(stamp(5), "front").stamp, "front"), stamp(5))
        bag.write("/speed", info(make_header(stamp(5), "car").stamp, "car"), stamp(5))
    with BagWriter(root / "small.mcap") as bag:
        write_frames(bag, root / "maps", range(3, 8), raw=False)
    evaluate_drives(root)
    return root


def figures(root: Path) -> dict[str, Any]:
    """What may not depend on who evaluated the recordings, index of the clips included."""
    report = json.loads((root / "out/report.json").read_text())
    report["clips"] = json.loads((root / "clips/clips.json").read_text())
    return {key: value for key, value in report.items() if key not in ("timings_ms", "outside_ms", "outside_share", "per_image")}


@dataclasses.dataclass
class Counter:
    """How many frames went through the pipeline, and after how many the user presses Ctrl-C."""

    frames: int = 0
    most: int | None = None


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter, whole = Counter(), Pipeline.run

    def counted(self: Pipeline, *frame: Any) -> Any:
        if counter.frames == counter.most:
            raise KeyboardInterrupt
        counter.frames += 1
        return whole(self, *frame)

    monkeypatch.setattr(Pipeline, "run", counted)
    return counter


def interrupt(root: Path, counter: Counter) -> None:
    """Evaluates the eight frames of the first drive and five of the second one."""
    counter.frames, counter.most = 0, 13
    evaluate_drives(root, code=130)
    counter.frames, counter.most = 0, None


def test_an_interrupted_evaluation_goes_on_with_the_recording_it_was_at(drives: Path, counter: Counter, capsys: Any) -> None:
    expected = figures(drives)
    interrupt(drives, counter)
    assert [clip["drive"] for clip in json.loads((drives / "clips/clips.json").read_text())] == ["raw"]
    evaluate_drives(drives)
    assert counter.frames == 8
    assert "1 of 2 recordings were finished by an earlier run" in capsys.readouterr().err
    assert figures(drives) == expected
    assert not (drives / "out/report.parts").exists()


@pytest.mark.parametrize("lost", ["out/report.raw.mcap", "clips/raw_0001.jpg", f"out/report.parts/raw_{stamp(2)}.part"])
def test_what_an_earlier_run_finished_counts_only_while_all_of_it_is_there(drives: Path, counter: Counter, lost: str) -> None:
    expected = figures(drives)
    interrupt(drives, counter)
    (drives / lost).unlink()
    evaluate_drives(drives)
    assert counter.frames == 16
    assert figures(drives) == expected


@dataclasses.dataclass(frozen=True)
class KilledBagJob(BagJob):
    """The first process that gets to the fourth frame of a recording is killed, as by a lack of memory."""

    def worker(self) -> Callable[[Sequence[BagRun]], int]:
        sentinel = self.output.parent / "killed"
        if not sentinel.exists():
            numbers, whole = itertools.count(), ResultsBag.add

            def add(bag: ResultsBag, answer: Any) -> None:
                if next(numbers) == 3:
                    sentinel.write_text(str(os.getpid()))
                    os.kill(os.getpid(), signal.SIGKILL)
                whole(bag, answer)

            ResultsBag.add = add
        return super().worker()


def test_ray_workers_share_the_recordings_and_give_the_same_report_although_one_is_killed(
    drives: Path, monkeypatch: pytest.MonkeyPatch, counter: Counter
) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ros2_ood_seg[ray]")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    # Workers start as fresh interpreters.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setattr(evaluate_bag, "BagJob", KilledBagJob)
    expected = figures(drives)
    evaluate_drives(drives, "--workers", 1)
    assert (drives / "out/killed").is_file()
    assert not counter.frames, "this process made the report only"
    assert figures(drives) == expected


def test_a_recording_is_remembered_as_it_was_and_counts_measured_frames_as_labelled() -> None:
    run = BagRun("drive", Path("drive"), "/camera", ("/label",), Path("results.mcap"), 3)
    image = BagImage("/camera", 5, "", 7, None, b"")
    found = Instances.from_masks(torch.ones(2, 4, 4, dtype=torch.bool), torch.tensor([0.9, 0.5]), torch.zeros(2), torch.zeros(2))
    found = dataclasses.replace(found, track_ids=torch.tensor([1, 2]))
    for ms in (0.1, 0.3):
        run.count(Answer(image, np.zeros((4, 4, 3), np.uint8), (image,), found, {"total": ms}, (), None))
    run.reject("first")
    run.reject("second")
    assert (run.frames, run.labelled, run.instances, run.rejected, run.problem) == (2, 0, 4, 2, "first")
    assert run.summary()["tracks"] == 2
    again = BagRun.from_plain(json.loads(json.dumps(run.to_plain())))
    assert again.to_plain() == run.to_plain()
    assert again.label_topics == run.label_topics


def test_every_frame_is_answered_and_those_with_labels_are_measured(drives):
    report = json.loads((drives / "out/report.json").read_text())
    assert (report["dataset"], report["images"]) == ("2 recordings", 8)
    assert 0.9 < report["pixel"]["ap"] <= 1.0
    names = [image["name"] for image in report["per_image"]]
    assert names == [f"{name}_{stamp(k)}" for name in ("raw", "small") for k in (0, 2, 4, 6)]
    bags = report["drive"]["bags"]
    assert [(b["name"], b["recorded"], b["frames"], b["labelled"], b["rejected"], b["problem"]) for b in bags] == [
        ("raw", 8, 8, 4, 0, None),
        ("small", 8, 8, 4, 0, None),
    ]
    assert [b["topic"] for b in bags] == ["/front/image", "/front/image/compressed"]
    page = (drives / "out/report.html").read_text()
    for text in ("<h2>Drive</h2>", "<h2>Summary</h2>", "<h2>Events</h2>", "raw_0001.jpg", "small_0001.mcap"):
        assert text in page


def test_results_bags_hold_frames_overlays_and_messages_at_the_times_of_the_recording(drives):
    for name, topic, lag_ns in (("raw", "/front/image/compressed", 0), ("small", "/front/image/compressed", LAG_NS)):
        with BagReader(drives / "out" / f"report.{name}.mcap") as bag:
            node = "/ood_segmenter"
            wanted = {topic, f"{node}/instances", f"{node}/boxes", f"{node}/timing", f"{node}/overlay/compressed"}
            assert {t.name: t.count for t in bag.topics} == dict.fromkeys(wanted, 8)
            assert {raw.time_ns for raw in bag.iter_raw()} == {stamp(k) + lag_ns for k in range(8)}
            assert [image.stamp_ns for image in bag.iter_images(f"{node}/overlay")] == [stamp(k) for k in range(8)]
            assert [bag.message(raw).answered for raw in bag.iter_raw([f"{node}/timing"])] == list(range(1, 9))
            found = [instances_from_message(bag.message(raw), (HEIGHT, WIDTH)) for raw in bag.iter_raw([f"{node}/instances"])]
        assert [len(instances) > 0 for instances in found] == [k >= 3 for k in range(8)]
        assert len({int(track) for instances in found for track in instances.track_ids[:1]}) == 1, "one object, one track"
    with BagReader(drives / "small.mcap") as source, BagReader(drives / "out/report.small.mcap") as results:
        copies = zip(source.iter_raw(["/front/image/compressed"]), results.iter_raw(["/front/image/compressed"]), strict=True)
        assert all(a.data == b.data for a, b in copies), "compressed images are copied, not compressed again"


def test_clips_hold_what_was_recorded_around_the_event(drives):
    index = json.loads((drives / "clips/clips.json").read_text())
    assert [(clip["drive"], clip["bag"]) for clip in index] == [("raw", "raw_0001.mcap"), ("small", "small_0001.mcap")]
    for clip in index:
        assert clip["start_s"] == pytest.approx(0.5 + (LAG_NS / 1e9 if clip["drive"] == "small" else 0.0))
        assert clip["duration_s"] == pytest.approx(2.0)
        assert max(track["best_score"] for track in clip["tracks"]) > 0.2
        strip = cv2.imread(str(drives / "clips" / clip["picture"]))
        assert strip.shape[1] > 4 * 480
    with BagReader(drives / "clips/raw_0001.mcap") as clip, BagReader(drives / "raw") as source:
        counts = {topic.name: topic.count for topic in clip.topics}
        assert counts["/front/image"] == 5
        assert counts["/front/label"] == 2
        assert counts["/front/camera_info"] == 1
        assert counts["/ood_segmenter/overlay/compressed"] == 5
        assert "/speed" not in counts
        originals = {raw.time_ns: raw.data for raw in source.iter_raw(["/front/image"])}
        assert all(originals[raw.time_ns] == raw.data for raw in clip.iter_raw(["/front/image"]))


def test_a_drive_without_labels_and_clips_of_all_topics(tmp_path, capsys):
    text = "float64 value\nother_msgs/Unit unit\n" + "=" * 80 + "\nMSG: other_msgs/Unit\nstring name\n"
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(2, 8), every_label=100)
        bag.write_raw("/gauge", "other_msgs/msg/Gauge", stamp(3), bytes(32), text)
    (tmp_path / "clips").mkdir()
    stale = tmp_path / "clips" / "drive_0009.jpg"
    stale.write_bytes(b"old")
    (tmp_path / "clips/clips.json").write_text(json.dumps([{"bag": "drive_0009.mcap", "picture": stale.name}]))
    arguments = ("--bag", tmp_path / "drive", "--image-topic", "/front/image", "--clips", tmp_path / "clips", *CLIPS, "--clip-all-topics")
    report = evaluate(tmp_path, *arguments, "--results", "messages")
    assert report["images"] == 8
    assert report["pixel"] == {"ap": None, "fpr95": None, "auroc": None}
    assert report["timings_ms"]["total"]["p95"] > 0
    assert "8 frames, 1 clips" in capsys.readouterr().out
    assert not stale.exists(), "clips of the run before are gone"
    with BagReader(tmp_path / "clips/drive_0001.mcap") as clip:
        assert "string name" in clip.definitions["other_msgs/msg/Gauge"]
        assert {"/gauge", "/front/label"} <= {topic.name for topic in clip.topics} | {"/front/label"}
        assert [raw.data for raw in clip.iter_raw(["/gauge"])] == [bytes(32)]
    with BagReader(tmp_path / "out/report.mcap") as results:
        assert {t.name.rsplit("/", 1)[1] for t in results.topics} == {"instances", "boxes", "timing"}
    assert "<h2>Summary</h2>" not in (tmp_path / "out/report.html").read_text()


def test_a_recording_that_breaks_off_leaves_report_results_and_clips(tmp_path, capsys):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(6), range(5))
        bag.write_raw("/front/image", "sensor_msgs/msg/Image", stamp(5), b"\x00\x01\x00\x00" + bytes(3))
        write_frames(bag, tmp_path / "maps", range(6), range(6, 8))
    arguments = ("--bag", tmp_path / "drive", "--image-topic", "/front/image", "--label-topic", "/front/label")
    report = evaluate(tmp_path, *arguments, "--clips", tmp_path / "clips", *CLIPS, code=2)
    assert "cannot be read" in capsys.readouterr().err
    assert (report["drive"]["bags"][0]["frames"], report["images"]) == (5, 3)
    assert "cannot be read" in report["drive"]["bags"][0]["problem"]
    with BagReader(tmp_path / "out/report.mcap") as results:
        assert next(t.count for t in results.topics if t.name.endswith("/instances")) == 5
    assert (tmp_path / "clips/drive_0001.jpg").is_file()


def test_recordings_that_break_off_are_named_and_do_not_keep_the_others_from_being_evaluated(tmp_path, capsys):
    image = typestore().types["sensor_msgs/msg/Image"]
    for name, frames in (("broken", range(2)), ("short", range(1)), ("whole", range(20, 24))):
        with BagWriter(tmp_path / name) as bag:
            bag.write("/front/image", image(make_header(stamp(9), ""), 4, 4, "depth9", 0, 4, np.zeros(16, np.uint8)), stamp(0) - 1)
            write_frames(bag, tmp_path / "maps", frames, frames)
            if name != "whole":
                bag.write_raw("/front/image", "sensor_msgs/msg/Image", stamp(frames.stop), b"\x00\x01\x00\x00" + bytes(3))
    np.save(tmp_path / "maps" / f"{stamp(9)}.npy", np.zeros((4, 4)))
    bags = [tmp_path / name for name in ("broken", "short", "whole")]
    report = evaluate(tmp_path, "--bag", *bags, "--image-topic", "/front/image", code=2)
    assert [b["frames"] for b in report["drive"]["bags"]] == [2, 1, 4]
    with BagReader(tmp_path / "out/report.whole.mcap") as bag:
        found = [instances_from_message(bag.message(raw), (HEIGHT, WIDTH)) for raw in bag.iter_raw([INSTANCES_TOPIC])]
    assert {int(track) for instances in found for track in instances.track_ids} == {1}, "tracks of another drive are none of this one's"
    assert report["timings_ms"]["total"]["p95"] > 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-2].startswith("whole: 1 frames could not be used")
    assert f"frame {stamp(9)}: image encoding 'depth9'" in lines[-2]
    for name, frames in (("broken", 2), ("short", 1)):
        assert re.search(f"{name}' cannot be read: [^;]*; the report holds the {frames} frames before", lines[-1])


def test_instances_are_those_of_their_labels(tmp_path, capsys):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(8), range(5), every_label=1)
        for k in range(5):
            # Of the third and fourth frame, the instances do not fit the picture.
            bag.write_image("/front/instance", scene(k, True)[1][: HEIGHT - 4 * (k > 1)] * 5, stamp(k))
    arguments = ("--image-topic", "/front/image", "--label-topic", "/front/label", "--instance-topic", "/front/instance")
    report = evaluate(tmp_path, "--bag", tmp_path / "drive", *arguments, "--max-images", 4)
    (drive,) = report["drive"]["bags"]
    assert (report["images"], drive["frames"], drive["labelled"], drive["instances"], drive["tracks"]) == (2, 4, 2, 4, 1)
    assert [image["name"] for image in report["per_image"]] == [str(stamp(k)) for k in range(2)]
    assert "topic /front/instance" in json.dumps(report)
    assert "data:image/jpeg" in (tmp_path / "out/report.html").read_text()
    assert "2 labels could not be used, the first: label of drive" in capsys.readouterr().err
    # The results are a recording of their own, and no report of them replaces them.
    results = (tmp_path / "out/report.mcap").read_bytes()
    topic = "/ood_segmenter/overlay/compressed"
    evaluate(tmp_path, "--bag", tmp_path / "out/report.mcap", "--image-topic", topic, code=2)
    assert "would replace a recording" in capsys.readouterr().err
    assert (tmp_path / "out/report.mcap").read_bytes() == results


def test_frames_that_cannot_be_used_are_counted_and_named(tmp_path, capsys):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(0), range(2))
        image = typestore().types["sensor_msgs/msg/Image"]
        bag.write("/front/image", image(make_header(stamp(2), ""), 4, 4, "depth9", 0, 4, np.zeros(16, np.uint8)), stamp(2))
        np.save(tmp_path / "maps" / f"{stamp(2)}.npy", np.zeros((4, 4)))
        write_frames(bag, tmp_path / "maps", range(0), range(3, 5))
    report = evaluate(tmp_path, "--bag", tmp_path / "drive", "--image-topic", "/front/image")
    drive = report["drive"]["bags"][0]
    assert (drive["recorded"], drive["frames"], drive["rejected"]) == (5, 4, 1)
    assert "depth9" in drive["problem"]
    assert "1 frames could not be used" in capsys.readouterr().err


def test_labels_that_match_no_image_are_an_error_after_the_report(tmp_path, capsys):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(0), range(2), every_label=100)
        bag.write_image("/other", np.zeros((HEIGHT, WIDTH), np.uint8), stamp(9))
    report = evaluate(tmp_path, "--bag", tmp_path / "drive", "--image-topic", "/front/image", "--label-topic", "/other", code=2)
    assert "has the same stamp as a label of /other" in capsys.readouterr().err
    assert report["images"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image-topic", "/rear"), "has no topic '/rear'; its topics: /empty"),
        (("--image-topic", "/empty"), "topic '/empty' holds"),
        (("--label-topic", "/nothing", "--image-topic", "/front/image"), "has no topic '/nothing'"),
        (("--image-topic", "/front/image", "--realtime", "0"), "--realtime is 0, it must be above 0"),
        (("--image-topic", "/front/image", "--realtime", "--stale-after", "0"), "--stale-after is 0"),
        (("--image-topic", "/front/image", "--realtime", "--workers", "2"), "--realtime measures one node"),
        (("--image-topic", "/front/image", "--realtime"), "the scorer 'external' would wait"),
        (("--image-topic", "/front/image", "--clips", "{clips}", "--set", "tracking.enabled=false"), "need tracking.enabled=true"),
        (("--image-topic", "/front/image", "--clips", "{clips}", "--clip-min-score", "2"), "--clip-min-score is 2"),
        (("--image-topic", "/front/image", "--external", "{clips}"), "is not a folder"),
        (("--image-topic", "/front/image", "--bag", "{drive}", "{clips}"), "does not exist"),
    ],
)
def test_what_cannot_be_evaluated_is_named_before_anything_runs(tmp_path, capsys, arguments, message):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(0), range(1))
        bag.write("/empty", make_header(1, ""), stamp(0))
    filled = [a.format(clips=tmp_path / "clips", drive=tmp_path / "drive") for a in arguments]
    assert evaluate(tmp_path, "--bag", tmp_path / "drive", *filled, code=2) == {}
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ood-seg: ")
    assert message in error


def test_the_results_bag_does_not_replace_the_recording(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with BagWriter(tmp_path / "out/report.mcap") as bag:
        write_frames(bag, tmp_path / "maps", range(0), range(1))
    evaluate(tmp_path, "--bag", tmp_path / "out/report.mcap", "--image-topic", "/front/image", code=2)
    assert "would replace a recording" in capsys.readouterr().err


def test_the_results_bag_replaces_results_and_no_other_bag(tmp_path, capsys):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(8))
    (tmp_path / "out").mkdir()
    with BagWriter(tmp_path / "out/report.mcap") as bag:
        write_frames(bag, tmp_path / "maps", range(0), range(1))
    arguments = ("--bag", tmp_path / "drive", "--image-topic", "/front/image")
    evaluate(tmp_path, *arguments, code=2)
    assert "would replace a recording" in capsys.readouterr().err
    (tmp_path / "out/report.mcap").unlink()
    evaluate(tmp_path, *arguments)
    evaluate(tmp_path, *arguments)


@pytest.mark.parametrize(
    "topics",
    [
        {"/front/image": "jpeg"},
        {"/front/image": "raw", INSTANCES_TOPIC: "header"},
        {"/front/image": "jpeg", "/rear/image": "jpeg", INSTANCES_TOPIC: "header"},
    ],
)
def test_what_other_bags_hold_is_not_replaced(tmp_path, topics):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(0), range(1))
    with BagWriter(tmp_path / "report.mcap") as bag:
        for topic, kind in topics.items():
            if kind == "header":
                bag.write(topic, make_header(0, ""), 0)
            else:
                (bag.write_jpeg if kind == "jpeg" else bag.write_image)(topic, scene(0, False)[0], stamp(0), "front")
    with pytest.raises(InputError, match=r"the results bag '.*report\.mcap' would replace a recording"):
        find_bags([tmp_path / "drive"], tmp_path / "report.json", "/front/image", ())
    (run,) = find_bags([tmp_path / "drive"], tmp_path / "report.json", "/front/image", (), "own.mcap")
    assert run.results == tmp_path / "own.mcap"


def test_a_frame_without_its_score_map_is_rejected_and_the_others_go_on(tmp_path, capsys):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(8))
    (tmp_path / "maps" / f"{stamp(3)}.npy").unlink()
    report = evaluate(tmp_path, "--bag", tmp_path / "drive", "--image-topic", "/front/image")
    assert f"{stamp(3)}.npy" in capsys.readouterr().err
    assert report["drive"]["frames"] == 7


def test_recordings_that_an_earlier_run_finished_depend_on_their_score_maps(tmp_path):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(2), range(2))
    runs = find_bags([tmp_path / "drive"], tmp_path / "report.json", "/front/image", ())
    job = BagJob(PipelineConfig(), tmp_path / "report.json", Options(), tuple(runs), external=tmp_path / "maps")
    before = job.fingerprint()
    assert job.fingerprint() == before
    np.save(tmp_path / "maps" / f"{stamp(1)}.npy", np.zeros((HEIGHT, WIDTH + 1), np.float32))
    assert job.fingerprint() != before


@pytest.mark.parametrize("storage", ["sqlite3", "mcap"])
def test_recordings_that_an_earlier_run_finished_depend_on_how_and_of_what(tmp_path, storage):
    with BagWriter(tmp_path / "drive", storage) as bag:
        write_frames(bag, tmp_path / "maps", range(2), range(2))
    (run,) = find_bags([tmp_path / "drive"], tmp_path / "report.json", "/front/image", ["/front/label"])
    job = BagJob(PipelineConfig(), tmp_path / "report.json", Options(), (run,))
    others = [
        {"external": tmp_path},
        {"most": 1},
        {"clips": tmp_path},
        {"rule": EventRule(min_frames=7)},
        {"all_topics": True},
        {"pictures": False},
        {"replayed": "1.0 0.3"},
        {"runs": (dataclasses.replace(run, label_topics=()),)},
    ]
    jobs = [job, *(dataclasses.replace(job, **other) for other in others)]
    assert len({json.dumps(one.fingerprint()) for one in jobs}) == len(jobs)
    before = job.fingerprint()
    (file,) = (path for path in (tmp_path / "drive").iterdir() if path.suffix != ".yaml")
    os.utime(file, ns=(0, 0))
    assert job.fingerprint() != before


def test_the_pixels_of_a_job_are_those_of_all_its_frames(tmp_path):
    for name in ("one/drive", "two/drive"):
        with BagWriter(tmp_path / name) as bag:
            write_frames(bag, tmp_path / "maps", range(2), range(5))
    bags = [tmp_path / "one/drive", tmp_path / "two/drive"]
    runs = tuple(find_bags(bags, tmp_path / "report.json", "/front/image", ["/front/label"]))
    assert [(run.name, run.results.name) for run in runs] == [("drive", "report.drive.mcap"), ("drive_", "report.drive_.mcap")]
    job = BagJob(PipelineConfig(), tmp_path / "report.json", Options(), runs)
    assert job.pixels() == 10 * HEIGHT * WIDTH
    assert dataclasses.replace(job, most=3).pixels() == 6 * HEIGHT * WIDTH
    assert dataclasses.replace(job, most=30).pixels() == 10 * HEIGHT * WIDTH
    assert dataclasses.replace(job, runs=tuple(dataclasses.replace(run, label_topics=()) for run in runs)).pixels() == 0
    shutil.rmtree(tmp_path / "one")
    assert job.pixels() == 0, "the evaluation says why"


def test_a_label_that_cannot_be_used_is_counted_and_the_others_go_on(tmp_path, capsys):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(8), range(7))
        image, _, scores = scene(8, True)
        bag.write_image("/front/image", image, stamp(8), "front")
        bag.write_image("/front/label", np.full((HEIGHT, WIDTH), 7, np.uint8), stamp(8))
        np.save(tmp_path / "maps" / f"{stamp(8)}.npy", scores)
    report = evaluate(tmp_path, "--bag", tmp_path / "drive", "--image-topic", "/front/image", "--label-topic", "/front/label")
    assert (report["images"], report["drive"]["bags"][0]["frames"], report["drive"]["bags"][0]["labelled"]) == (4, 8, 4)
    assert "1 labels could not be used, the first: label of drive" in capsys.readouterr().err


def test_clips_of_recordings_with_dots_in_their_names(tmp_path):
    with BagWriter(tmp_path / "drive.v1.2") as bag:
        write_frames(bag, tmp_path / "maps", range(8))
    report = evaluate(tmp_path, "--bag", tmp_path / "drive.v1.2", "--image-topic", "/front/image", "--clips", tmp_path / "clips", *CLIPS)
    assert report["drive"]["bags"][0]["name"] == "drive.v1.2"
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == ["clips.json", "drive.v1.2_0001.jpg", "drive.v1.2_0001.mcap"]


def test_clips_replace_clips_and_no_recording(tmp_path, capsys):
    clips = tmp_path / "clips"
    for name in ("drive.mcap", "clips/drive_0001.mcap"):
        with BagWriter(tmp_path / name) as bag:
            write_frames(bag, tmp_path / "maps", range(8))
    arguments = ("--image-topic", "/front/image", "--clips", clips, *CLIPS)
    before = (clips / "drive_0001.mcap").read_bytes()
    evaluate(tmp_path, "--bag", tmp_path / "drive.mcap", *arguments, code=2)
    assert "clips would replace the recording" in capsys.readouterr().err
    assert (clips / "drive_0001.mcap").read_bytes() == before
    # A clip that stands in no index was left by a run that was killed.
    (clips / "drive_0001.mcap").unlink()
    evaluate(tmp_path, "--bag", tmp_path / "drive.mcap", *arguments)
    (clips / "clips.json").unlink()
    evaluate(tmp_path, "--bag", tmp_path / "drive.mcap", *arguments, "--max-images", "7")
    # A clip is a recording, too.
    before = (clips / "drive_0001.mcap").read_bytes()
    evaluate(tmp_path, "--bag", clips / "drive_0001.mcap", *arguments, code=2)
    assert "clips would replace the recording" in capsys.readouterr().err
    assert (clips / "drive_0001.mcap").read_bytes() == before


def test_clips_that_are_interrupted_while_they_are_written_leave_nothing(tmp_path, monkeypatch):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(8))

    def interrupted(*_: Any) -> Any:
        assert (tmp_path / "clips/drive_0001.mcap").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(clips, "contact_strip", interrupted)
    evaluate(tmp_path, "--bag", tmp_path / "drive", "--image-topic", "/front/image", "--clips", tmp_path / "clips", *CLIPS, code=130)
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["clips.json"]


def test_clips_of_workers_that_no_index_lists_are_replaced_by_those_of_the_next_run(tmp_path, monkeypatch):
    for name in ("first", "second"):
        with BagWriter(tmp_path / f"{name}.mcap") as bag:
            write_frames(bag, tmp_path / "maps", range(8))
    bags = ("--bag", tmp_path / "first.mcap", tmp_path / "second.mcap", "--image-topic", "/front/image")
    arguments = (*bags, "--clips", tmp_path / "clips", *CLIPS)

    def interrupted(job: BagJob, parts: Sequence[Sequence[BagRun]], *_: Any) -> None:
        job.worker()(parts[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate_bag, "run_on_ray", interrupted)
        evaluate(tmp_path, *arguments, "--workers", 2, code=130)
    assert (tmp_path / "clips/first_0001.mcap").is_file()
    (tmp_path / "clips/notes.txt").touch()
    # The same command would have taken them; this one finds nothing.
    evaluate(tmp_path, *arguments, "--clip-min-frames", 50)
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == ["clips.json", "notes.txt"]


def test_clips_end_where_the_recording_breaks_off(tmp_path, monkeypatch, capsys):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(8), raw=False)
    read = BagReader.iter_raw

    def broken(self: BagReader, topics: Any = (), start_ns: int | None = None, stop_ns: int | None = None) -> Any:
        """As a file whose second half is damaged: every reader of these messages fails there."""
        for raw in read(self, topics, start_ns, stop_ns):
            if self.path.name == "drive" and raw.time_ns >= stamp(5):
                raise InputError("the chunk is damaged")
            yield raw

    arguments = ("--bag", tmp_path / "drive", "--image-topic", "/front/image", "--clips", tmp_path / "clips", *CLIPS, "--clip-after", "9")

    def images_of_the_clip(report: dict[str, Any]) -> int:
        (clip,) = report["drive"]["bags"][0]["clips"]
        with BagReader(tmp_path / "clips" / clip["bag"]) as bag:
            return len(list(bag.iter_images("/front/image")))

    assert images_of_the_clip(evaluate(tmp_path, *arguments, "--max-images", 5)) == 8, "it goes on behind the last frame looked at"
    monkeypatch.setattr(BagReader, "iter_raw", broken)
    report = evaluate(tmp_path, *arguments, code=2)
    assert "the chunk is damaged; the report holds the 5 frames before" in capsys.readouterr().err
    assert images_of_the_clip(report) == 5


def test_a_recording_that_cannot_be_read_is_not_replaced(tmp_path, capsys):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(8))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.mcap").write_bytes(b"half a recording")
    evaluate(tmp_path, "--bag", tmp_path / "drive", "--image-topic", "/front/image", code=2)
    assert "would replace a recording" in capsys.readouterr().err
    assert (tmp_path / "out/report.mcap").read_bytes() == b"half a recording"


def test_results_of_a_camera_of_any_name_and_of_nothing_are_replaced(tmp_path):
    with BagWriter(tmp_path / "drive") as bag:
        for k in range(3):
            image, _, scores = scene(k, True)
            bag.write_jpeg("/front/jpeg", image, stamp(k), "front")
            (tmp_path / "maps").mkdir(exist_ok=True)
            np.save(tmp_path / "maps" / f"{stamp(k)}.npy", scores)
    arguments = ("--bag", tmp_path / "drive", "--image-topic", "/front/jpeg")
    # No score map has the name of a frame: nothing is answered, and what is left behind is no recording.
    evaluate(tmp_path, *arguments, "--external", tmp_path, code=2)
    evaluate(tmp_path, *arguments)
    assert evaluate(tmp_path, *arguments)["drive"]["frames"] == 3


def test_frames_recorded_twice_are_measured_once(tmp_path, capsys):
    with BagWriter(tmp_path / "drive") as bag:
        for _ in range(2):
            write_frames(bag, tmp_path / "maps", range(4), range(4), every_label=1)
    report = evaluate(tmp_path, "--bag", tmp_path / "drive", "--image-topic", "/front/image", "--label-topic", "/front/label")
    assert (report["images"], report["drive"]["bags"][0]["frames"]) == (4, 8)
    assert "the stamp occurs twice" in capsys.readouterr().err


def test_a_report_may_lie_in_the_folder_of_the_recording(tmp_path, monkeypatch):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(8))
    monkeypatch.chdir(tmp_path / "drive")
    words = ["evaluate", "--bag", ".", "--image-topic", "/front/image", "--external", str(tmp_path / "maps"), *SETTINGS]
    assert main([*words, "--output", "report.json"]) == 0
    (run,) = find_bags([Path(".")], Path("report.json"), "/front/image", [])
    assert run.name == "drive"
    before = BagJob(PipelineConfig(), Path("report.json"), Options(), (run,)).fingerprint()
    assert main([*words, "--output", "report.json"]) == 0
    assert BagJob(PipelineConfig(), Path("report.json"), Options(), (run,)).fingerprint() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root", "set", "--clips", "clips"], "--clips is of recordings"),
        (["--root", "set", "--realtime"], "--realtime is of recordings"),
        (["--bag", "drive", "--dataset", "folder"], "--dataset is of data sets"),
        (["--bag", "drive", "--save", "maps"], "name --label-topic"),
        (["--bag", "drive", "--clip-min-score", "0.7"], "--clip-min-score goes with --clips"),
        (["--bag", "drive", "--clip-all-topics"], "--clip-all-topics goes with --clips"),
        (["--bag", "drive", "--stale-after", "0.5"], "--stale-after goes with --realtime"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(tmp_path, capsys, arguments, message):
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(8))
    words = [str(tmp_path / word) if word in ("set", "drive", "clips", "maps") else word for word in arguments]
    assert main(["evaluate", *words, "--output", str(tmp_path / "report.json"), *SETTINGS]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("given", "tracks"), [("", True), ("tracking: {enabled: false}\n", False)])
def test_a_profile_decides_about_tracks_of_recordings(tmp_path, given, tracks):
    (tmp_path / "own.yaml").write_text(f"{given}extends: compact_s2m\n")
    with BagWriter(tmp_path / "drive") as bag:
        write_frames(bag, tmp_path / "maps", range(3), range(3))
    words = [word for word in SETTINGS if not str(word).startswith("tracking")]
    report = evaluate(tmp_path, "--bag", tmp_path / "drive", "--image-topic", "/front/image", "--profile", tmp_path / "own.yaml", *words)
    assert ("track" in report["timings_ms"]) == tracks
