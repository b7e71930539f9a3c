from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ros2_ood_seg.config import load_profile
from ros2_ood_seg.evaluation.bag_messages import make_header, timing_message
from ros2_ood_seg.evaluation.bag_writer import BagWriter
from ros2_ood_seg.evaluation.bags import BagReader
from ros2_ood_seg.evaluation.drive_page import drive_html, unmeasured_report
from ros2_ood_seg.evaluation.replayed import PlayedFrame, PlayReport, Recording, iter_answers, node_figures, stale_share
from ros2_ood_seg.evaluation.replayed import _result as replayed_result
from ros2_ood_seg.evaluation.results_bag import ResultsBag, result_messages
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.types import Calibration, FrameResult, Instances, Prompts, ScoreMap

FRAMES = (
    PlayedFrame(1_000, 31_000_000 + 1_000, 10.0, 10.2),
    PlayedFrame(2_000, 31_000_000 + 2_000, 10.1),
    PlayedFrame(3_000, 31_000_000 + 3_000, 10.2, 10.5),
)


def result(k: int) -> FrameResult:
    """One instance, a square that moves with the frame's number."""
    masks = torch.zeros((1, 32, 48), dtype=torch.bool)
    masks[0, 4:12, k : k + 8] = True
    one = torch.tensor([0.5])
    instances = Instances.from_masks(masks, one, one * 7, one)
    scores = ScoreMap(torch.zeros(32, 48), "some scorer", Calibration.linear())
    return FrameResult(instances, scores, Prompts.empty(), scores.scores, {"score": 2.0, "total": 3.0}, "compact")


def test_a_play_report_survives_its_file(tmp_path):
    report = PlayReport(7, False, FRAMES)
    report.save(tmp_path / "played.json")
    assert PlayReport.load(tmp_path / "played.json") == report
    assert report.answered == 2
    assert report.duration_s == pytest.approx(0.5)
    assert PlayReport(0, True, ()).duration_s == 0.0


def test_stale_time_by_hand():
    # Answers of images 10.0 and 10.2 arrive at 10.2 and 10.5. With 0.25 s allowed, what is at hand is stale from 10.25 (of 10.0) to 10.5.
    assert stale_share(FRAMES, 0.25) == pytest.approx(0.25 / 0.5)
    assert stale_share(FRAMES, 1.0) == 0.0
    assert stale_share([PlayedFrame(1, 1, 0.0), PlayedFrame(2, 2, 4.0)], 1.0) == pytest.approx(0.75), (
        "no answer: the first image's age counts"
    )
    assert stale_share([], 1.0) is None
    assert stale_share([PlayedFrame(1, 1, 0.0)], 1.0) is None


@given(
    gaps=st.lists(st.tuples(st.floats(0.01, 1.0), st.one_of(st.none(), st.floats(0.0, 2.0))), min_size=2, max_size=8),
    after_s=st.floats(0.05, 1.0),
)
def test_stale_time_agrees_with_looking_at_every_moment(gaps, after_s):
    sent = np.cumsum([gap for gap, _ in gaps])
    frames = [
        PlayedFrame(k, k, float(s), None if late is None else float(s + late))
        for k, (s, (_, late)) in enumerate(zip(sent, gaps, strict=True))
    ]
    end = max([frames[-1].sent_s, *(f.answered_s for f in frames if f.answered_s is not None)])
    moments = np.linspace(frames[0].sent_s, end, 2001)
    newest = [max([frames[0].sent_s, *(f.sent_s for f in frames if f.answered_s is not None and f.answered_s <= t)]) for t in moments]
    seen = np.mean([t - n > after_s for t, n in zip(moments, newest, strict=True)])
    assert stale_share(frames, after_s) == pytest.approx(seen, abs=0.02)


def write_answers(path, stamps, replaced=0):
    with BagWriter(path) as bag:
        for number, stamp in enumerate(stamps, start=1):
            message = timing_message({"score": 1.0, "total": 2.0}, "compact", number, make_header(stamp, "cam"))
            message.replaced, message.received = replaced, number + replaced
            bag.write("/ood_segmenter/timing", message, stamp)
    return path


def test_figures_of_the_node(tmp_path):
    recording = Recording(write_answers(tmp_path / "answers.mcap", [1_000, 3_000], replaced=1), PlayReport(3, True, FRAMES), "as recorded")
    figures = node_figures(recording, 0.25)
    assert (figures["frames_recorded"], figures["frames_played"], figures["frames_answered"]) == (3, 3, 2)
    assert (figures["frames_replaced"], figures["frames_lost"], figures["frames_rejected"]) == (1, 0, 0)
    assert figures["drop_rate"] == pytest.approx(1 / 3)
    assert figures["fps"] == pytest.approx(4.0)
    assert figures["latency_ms"] == {f"p{p}": pytest.approx(np.percentile([200.0, 300.0], p)) for p in (50, 90, 95, 99)}
    assert figures["age_ms"]["p50"] == pytest.approx(250.0 + 31.0), "the camera's own delay comes on top"
    assert figures["stale"] == {"after_s": 0.25, "rate": pytest.approx(0.5)}
    assert figures["timeline"] == {"sent_s": [0.0, 0.1, 0.2], "latency_ms": [200.0, None, 300.0]}


def test_clocks_that_differ_give_no_age(tmp_path):
    frames = (PlayedFrame(5, 10**18, 0.0, 0.1), PlayedFrame(6, 10**18 + 1, 1.0, 1.1))
    figures = node_figures(Recording(write_answers(tmp_path / "a.mcap", [5, 6]), PlayReport(2, True, frames), ""), 0.3)
    assert figures["age_ms"] is None
    assert figures["latency_ms"]["p50"] == pytest.approx(100.0)


def test_a_node_that_never_answered_has_no_figures(tmp_path):
    with BagWriter(tmp_path / "a.mcap"):
        pass
    figures = node_figures(Recording(tmp_path / "a.mcap", PlayReport(2, True, (PlayedFrame(1, 1, 0.0), PlayedFrame(2, 2, 1.0))), ""), 0.5)
    assert (figures["latency_ms"], figures["frames_replaced"], figures["frames_lost"], figures["fps"]) == (None, None, None, 0.0)
    assert figures["drop_rate"] == 1.0
    assert figures["stale"]["rate"] == pytest.approx(0.5)


def test_answers_are_joined_with_their_images(tmp_path):
    stamps = [100 + 10 * k for k in range(6)]
    with BagWriter(tmp_path / "drive") as bag:
        for stamp in stamps:
            bag.write_image("/cam", np.full((32, 48, 3), stamp, np.uint8), stamp, "front")
    with BagReader(tmp_path / "drive") as bag, BagWriter(tmp_path / "answers.mcap") as answers:
        for k, image in enumerate(bag.iter_images("/cam")):
            if k in (0, 3, 5):
                for message in result_messages(result(k), image, k + 1):
                    answers.write_raw(message.topic, message.msgtype, image.stamp_ns, message.data)
    recording = Recording(tmp_path / "answers.mcap", PlayReport(6, True, ()), "")
    with BagReader(tmp_path / "drive") as bag, ResultsBag(tmp_path / "results.mcap") as results:
        answers = list(iter_answers(bag, "/cam", (), recording, None))
        for answer in answers:
            results.add(answer)
    assert [a.image.stamp_ns for a in answers] == [100, 130, 150]
    for answer, k in zip(answers, (0, 3, 5), strict=True):
        assert int(answer.rgb[0, 0, 0]) == 100 + 10 * k
        assert torch.equal(answer.instances.masks, result(k).instances.masks)
        assert answer.timings_ms == {"score": 2.0, "total": 3.0}
        assert answer.result is None
    with BagReader(tmp_path / "results.mcap") as bag:
        assert {t.name: t.count for t in bag.topics} == {
            "/cam/compressed": 3,
            "/ood_segmenter/boxes": 3,
            "/ood_segmenter/instances": 3,
            "/ood_segmenter/overlay/compressed": 3,
            "/ood_segmenter/timing": 3,
        }
        assert "ros2_ood_seg/InstanceMask" in bag.definitions["ros2_ood_seg/msg/AnomalyInstanceArray"], "viewers can read it"


def test_box_prompts_of_a_replay_heed_the_ignore_mask(tmp_path):
    ignored = np.zeros((32, 48), np.uint8)
    ignored[:, 24:] = 255
    cv2.imwrite(str(tmp_path / "hood.png"), ignored)
    settings = {"scorer.name": "external", "prompts.boxes.method": "components", "segmenter.name": "grabcut", "runtime.device": "cpu"}
    pipeline = Pipeline(load_profile("compact", {**settings, "runtime.ignore_mask": str(tmp_path / "hood.png")}))
    scores = torch.zeros(32, 48)
    scores[4:14, 4:14] = scores[4:14, 30:40] = 1.0
    pipeline.scorer = lambda image, external: ScoreMap(scores, "some scorer", Calibration.linear())
    rgb, found = np.zeros((32, 48, 3), np.uint8), result(0)
    replayed = replayed_result(pipeline, rgb, found.instances, found.refined.numpy(), {})
    assert replayed.prompts.boxes_xyxy.tolist() == [[4, 4, 14, 14]]
    assert torch.equal(replayed.prompts.boxes_xyxy, pipeline.box_prompts(replayed.score_map, pipeline.ignore_for(32, 48)).boxes_xyxy)


def test_the_page_shows_latency_drops_and_problems(tmp_path):
    recording = Recording(write_answers(tmp_path / "answers.mcap", [1_000, 3_000], replaced=1), PlayReport(3, True, FRAMES), "as recorded")
    report = unmeasured_report("drive", load_profile("compact"), "cpu", 2, {"total": [1.0, 2.0]})
    bag = {"name": "a <drive>", "topic": "/cam", "recorded": 3, "frames": 2, "labelled": 0, "rejected": 1, "instances": 4, "tracks": 2}
    bag |= {"problem": "frame 7: no picture", "node": node_figures(recording, 0.25), "clips": []}
    report["drive"] = {"frames": 2, "rule": {}, "clips": str(tmp_path), "bags": [bag]}
    json.dumps(report, allow_nan=False)
    page = drive_html(report, None)
    for text in ("a &lt;drive&gt;", "frame 7: no picture", "Running node", ">250<", "0.333", "No track fits the rule"):
        assert text in page
    assert page.count("data:image/png;base64,") == 2
    assert report["pixel"]["ap"] is None
