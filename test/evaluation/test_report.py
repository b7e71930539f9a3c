from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ros2_ood_seg.config import load_profile
from ros2_ood_seg.engines import openvino_installed
from ros2_ood_seg.evaluation.component import Minimum
from ros2_ood_seg.evaluation.datasets import LabelledImage
from ros2_ood_seg.evaluation.measure import Maps, measure
from ros2_ood_seg.evaluation.report import RULES, build_report, versions
from ros2_ood_seg.evaluation.report_page import report_html
from ros2_ood_seg.evaluation.store import PartStore
from ros2_ood_seg.evaluation.totals import RELIABILITY_BINS, SIZE_EDGES_PX, Totals

SHAPE = (100, 200)
Box = tuple[int, int, int, int]


def filled(box: Box) -> NDArray[np.bool_]:
    """A rectangle x0, y0, x1, y1."""
    mask = np.zeros(SHAPE, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def put(store: PartStore, name: str, label: NDArray[np.uint8], found: list[tuple[Box, float]], score_map: NDArray[np.float32]) -> None:
    """Measures a frame with rectangles as instances, and each rectangle as the box prompt of its mask."""
    masks = np.array([filled(box) for box, _ in found], bool).reshape(-1, *SHAPE)
    boxes = np.array([box for box, _ in found], np.float32).reshape(-1, 4)
    scores = np.array([score for _, score in found], np.float32)
    confidence = np.zeros(SHAPE, np.float32)
    for mask, score in zip(masks, scores, strict=True):
        confidence[mask] = np.maximum(confidence[mask], score)
    maps = Maps(score_map, confidence, confidence, masks, boxes, scores, scores, boxes)
    figures, score_counts, refined = measure(LabelledImage(name, np.zeros((*SHAPE, 3), np.uint8), label), maps, Minimum(0, 0))
    store.save_pixels(name, score_counts, refined, (confidence, label))
    store.save(dataclasses.replace(figures, timings_ms={"total": 30.0}, outside_ms={"load": 2.0, "measure": 3.0}), b"jpeg")


@pytest.fixture
def totals(tmp_path: Path) -> Totals:
    """Two frames: objects of 36, 400 and 2,500 px, of which the last two are found, two false alarms and one on ignored area."""
    store = PartStore(tmp_path / "parts", {})
    label = np.zeros(SHAPE, np.uint8)
    label[:10] = 255
    for box in ((10, 20, 16, 26), (40, 40, 60, 60)):
        label[filled(box)] = 1
    map_of = np.zeros(SHAPE, np.float32)
    put(store, "0", label, [((40, 40, 60, 60), 0.95), ((150, 50, 160, 58), 0.91), ((0, 0, 30, 10), 0.6)], map_of)
    label = np.zeros(SHAPE, np.uint8)
    label[filled((100, 45, 150, 95))] = 1
    put(store, "1", label, [((100, 45, 150, 90), 0.55), ((5, 5, 65, 45), 0.2)], map_of)
    result = Totals()
    for name in ("0", "1"):
        result.add(store.load(name))
    return result


def by_range(rows: list[dict[str, Any]]) -> dict[float, dict[str, Any]]:
    return {row["from"]: row for row in rows}


def test_recall_by_size(totals: Totals) -> None:
    rows = by_range(totals.sizes())
    assert list(rows) == list(SIZE_EDGES_PX[:-1])
    assert {low: (row["truth"], row["found"], row["recall"], row["box_recall"]) for low, row in rows.items() if row["truth"]} == {
        0: (1, 0, 0.0, 0.0),
        100: (1, 1, 1.0, 1.0),
        1000: (1, 1, 1.0, 1.0),
    }
    assert rows[1000]["mean_iou"] == pytest.approx(0.9)
    assert (rows[10_000]["recall"], rows[10_000]["box_recall"], rows[10_000]["mean_iou"]) == (None, None, None)


def test_half_an_object_is_not_found_and_means_are_of_all_objects_of_a_size(tmp_path: Path) -> None:
    store = PartStore(tmp_path / "more", {})
    label = np.zeros(SHAPE, np.uint8)
    # Of 100, 900 and 1,000 px: the first is the least of its range, and so is the last.
    for box in ((0, 0, 10, 10), (20, 20, 50, 50), (100, 40, 150, 60)):
        label[filled(box)] = 1
    scores = np.where(label == 1, np.float32(7.0), np.float32(-3.0))
    put(store, "0", label, [((0, 0, 10, 5), 0.9), ((20, 20, 50, 50), 0.8)], scores)
    result = Totals()
    result.add(store.load("0"))
    rows = by_range(result.sizes())
    assert {low: (row["truth"], row["found"], row["recall"]) for low, row in rows.items() if row["truth"]} == {
        100: (2, 1, 0.5),
        1000: (1, 0, 0.0),
    }
    assert rows[100]["mean_iou"] == pytest.approx(0.75)
    assert result.per_image[0]["found"] == 1
    assert result.score_range == (-3.0, 7.0)
    assert [(row["from"], row["to"]) for row in result.reliability()][:2] == [(0.0, 0.1), (0.1, 0.2)]


def test_recall_by_distance_band(totals: Totals) -> None:
    # They end at 26, 60 and 95 % of the image height.
    rows = by_range(totals.bands())
    assert {low: (row["truth"], row["found"]) for low, row in rows.items()} == {
        0.0: (1, 0),
        0.45: (0, 0),
        0.55: (1, 1),
        0.7: (0, 0),
        0.85: (1, 1),
    }


def test_false_alarms_by_size_leave_out_what_lies_on_ignored_area(totals: Totals) -> None:
    rows = by_range(totals.false_alarms())
    assert {low: (row["count"], row["per_image"]) for low, row in rows.items() if row["count"]} == {0: (1, 0.5), 1000: (1, 0.5)}


def test_reliability_leaves_out_what_lies_on_ignored_area(totals: Totals) -> None:
    rows = {round(row["from"] * RELIABILITY_BINS): row for row in totals.reliability()}
    assert sum(row["instances"] for row in rows.values()) == 4
    assert (rows[9]["instances"], rows[9]["right"]) == (2, 0.5)
    assert rows[9]["mean_score"] == pytest.approx(0.93)
    assert (rows[5]["right"], rows[2]["right"], rows[6]["right"]) == (1.0, 0.0, None)


def test_share_of_time_outside_the_pipeline(totals: Totals, tmp_path: Path) -> None:
    # Two frames of 30 ms in the pipeline and 2 + 3 ms beside it, and 5 ms of pooling.
    assert totals.outside_share(5.0) == pytest.approx(15 / 75)
    # Where the pipeline's waits are known, they count, and not what was done in them.
    store = PartStore(tmp_path / "more", {})
    put(store, "0", np.zeros(SHAPE, np.uint8), [], np.zeros(SHAPE, np.float32))
    waited = Totals()
    waited.add(dataclasses.replace(store.load("0"), outside_ms={"load": 2.0, "measure": 3.0, "idle": 4.0}))
    assert waited.outside_share(6.0) == pytest.approx(10 / 40)


def report_of(store: PartStore, names: list[str]) -> dict[str, Any]:
    report, _ = build_report(
        store,
        names,
        dataset="made <up>",
        config=load_profile("compact_s2m"),
        device="cpu",
        fpr_rule="gt",
        minimum=Minimum(0, 0),
        exact=True,
        instance_rule="components",
    )
    return report


def text_of(page: str) -> str:
    """What a reader sees of a page, without its pictures."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", " ", body))


EDGE_CASES: dict[str, tuple[NDArray[np.uint8], list[tuple[Box, float]], list[float | None]]] = {
    # Labels, predictions; pixel AP of a constant map, AP of the refined map, S2M's IoU and AuIoU, F1*, instance AP.
    "no anomaly": (np.zeros(SHAPE, np.uint8), [((10, 10, 30, 30), 0.5)], [None, None, 0.0, 0.0, None, None]),
    "no anomaly, no prediction": (np.zeros(SHAPE, np.uint8), [], [None, None, 0.0, 0.0, None, None]),
    "empty prediction": (filled((20, 20, 50, 50)).astype(np.uint8), [], [0.045, 0.045, 0.0, 0.0, 0.0, 0.0]),
    "all ignore": (np.full(SHAPE, 255, np.uint8), [((10, 10, 30, 30), 0.5)], [None, None, 0.0, 0.0, None, None]),
    "one pixel": (filled((20, 20, 21, 21)).astype(np.uint8), [((20, 20, 21, 21), 0.5)], [1 / 20_000, 1.0, 1.0, 0.495, 1.0, None]),
    "ties": (
        filled((20, 20, 50, 50)).astype(np.uint8),
        [((20, 20, 50, 50), 0.5), ((60, 20, 90, 50), 0.5)],
        [0.045, 0.5, 0.5, 0.2475, 2 / 3, 0.75],
    ),
}


@pytest.mark.parametrize("case", EDGE_CASES)
def test_edge_cases_have_figures(tmp_path: Path, case: str) -> None:
    label, found, expected = EDGE_CASES[case]
    store = PartStore(tmp_path / "parts", {})
    put(store, "0", label, found, np.full(SHAPE, 0.25, np.float32))
    report = report_of(store, ["0"])
    paths = (("pixel", "ap"), ("refined", "ap"), ("s2m", "iou"), ("s2m", "auiou"), ("component", "f1"), ("instance", "ap"))
    assert [report[group][key] for group, key in paths] == pytest.approx(expected, abs=1e-12)
    json.dumps(report, allow_nan=False)
    if case == "all ignore":
        seen = text_of(report_html(report, store.picture).split("<details>")[0])
        assert "none with labelled anomalies" in seen
        assert not re.search(r"\b(None|nan)\b", seen)


@pytest.mark.skipif(not openvino_installed(), reason="openvino is not installed")
def test_versions_name_what_ran_the_networks() -> None:
    assert {"torch", "openvino"} <= set(versions())


def test_the_page_lists_everything(totals: Totals, tmp_path: Path) -> None:
    store = PartStore(tmp_path / "parts", {})
    page = report_html(report_of(store, ["0", "1"]), store.picture)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        *("Summary", "Curves", "Worst frames", "Best frames", "Found, missed, invented", "Scores and time", "How it was measured")
    ]
    seen = text_of(page)
    for words in (
        *("compact_s2m on made <up>", "2 images", "FPR95 (gt)", "AuROC", "best F1", "IoU, no threshold", "AuIoU", "mean F1"),
        *("scorer's own map", "masks, ignored pixels counted", "sIoU", "PPV", "F1*", "AP50", "box prompt recall", "invented (per image)"),
        *("0: IoU", "1: IoU", "1 of 2 objects found", "1 of 1 objects found", "fusion.name: s2m", *RULES, *RULES.values()),
    ):
        assert words in seen, words
    # Two curves, objects by size, recall by distance band, reliability, stage times.
    assert page.count("data:image/png;base64,") == 6
    assert "http" not in page
