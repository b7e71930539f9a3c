"""``report.html`` of recorded drives: what was found, how late the running node was, and the usual sections where there are labels."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ros2_ood_seg.config import PipelineConfig
from ros2_ood_seg.evaluation.replayed import percentiles
from ros2_ood_seg.evaluation.report import hardware, versions
from ros2_ood_seg.evaluation.report_page import (
    BLUE,
    ORANGE,
    embedded,
    how_measured,
    new_axes,
    number,
    page,
    report_html,
    table,
    timings_plot,
)

CLIPS_SHOWN = 12
_UNMEASURED = {
    "pixel": ("ap", "fpr95", "auroc"),
    "refined": ("ap", "fpr95", "auroc"),
    "baseline": ("iou_best", "threshold", "auiou", "mean_f1"),
    "s2m": ("iou", "iou_best", "auiou", "mean_f1"),
    "s2m_code": ("iou", "iou_best", "auiou", "mean_f1"),
    "component": ("siou", "ppv", "f1"),
    "instance": ("ap", "ap50"),
}


def unmeasured_report(
    dataset: str, config: PipelineConfig, device: str, frames: int, timings_ms: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """The report of a drive without labels: the same keys, None for all that would need labels.

    Args:
        dataset: Name for the report.
        config: What ran.
        device: Where it ran.
        frames: How many were answered.
        timings_ms: Every stage's times.
    """
    return {
        "dataset": dataset,
        "profile": config.profile,
        "images": frames,
        **{group: dict.fromkeys(keys) for group, keys in _UNMEASURED.items()},
        "timings_ms": {stage: percentiles(values) for stage, values in timings_ms.items()},
        "rules": {"labels": "none, so nothing could be measured but time"},
        "config": config.model_dump(),
        "versions": versions(),
        "hardware": hardware(device),
    }


def drive_html(report: dict[str, Any], picture: Callable[[str], bytes] | None) -> str:
    """The page of a report with the key ``drive``.

    Args:
        report: Plain data.
        picture: JPEG of a measured frame by name; None when there were no labels.
    """
    sections = ["<h2>Drive</h2>" + _bags(report), *_nodes(report), *_events(report)]
    if picture is not None:
        return report_html(report, picture, sections)
    time = "<h2>Time</h2><div class=row>" + embedded(timings_plot(report)) + "</div>" if report["timings_ms"] else ""
    return page(
        f"{report['profile']} on {report['dataset']}", report, [*sections, time, "<h2>How it was measured</h2>" + how_measured(report)]
    )


def _bags(report: dict[str, Any]) -> str:
    keys = ("recorded", "frames", "labelled", "rejected", "instances", "tracks")
    rows = [(bag["name"], bag["topic"], *(str(bag[key]) for key in keys)) for bag in report["drive"]["bags"]]
    problems = "".join(f"<p>{html.escape(bag['problem'])}</p>" for bag in report["drive"]["bags"] if bag["problem"])
    head = ("recording", "camera", "images", "answered", "with labels", "not usable", "instances", "tracks")
    return table(head, rows, numbers=2) + problems


def _nodes(report: dict[str, Any]) -> list[str]:
    bags = [bag for bag in report["drive"]["bags"] if bag["node"]]
    if not bags:
        return []
    head = ("recording", "latency p50, ms", "p90", "p99", "age p50, ms", "p99", "replaced", "lost", "refused", "dropped", "stale")
    rows = [(bag["name"], *_node_row(bag["node"])) for bag in bags]
    note = (
        f"<small>{html.escape(bags[0]['node']['mode'])}. Latency: from publishing an image to receiving its instances in another process. "
        "Age: from the stamp of the camera. Dropped: share of the images without an answer. Stale: share of the time in which the newest "
        f"instances were of an image older than {bags[0]['node']['stale']['after_s']:g} s.</small>"
    )
    plots = "".join(embedded(_latency(bag)) for bag in bags[:4])
    return [f"<h2>Running node</h2>{table(head, rows)}{note}<div class=row>{plots}</div>"]


def _node_row(node: dict[str, Any]) -> list[str]:
    latency, age = node["latency_ms"] or {}, node["age_ms"] or {}
    times = [latency.get("p50"), latency.get("p90"), latency.get("p99"), age.get("p50"), age.get("p99")]
    counts = [node["frames_replaced"], node["frames_lost"], node["frames_rejected"]]
    return [
        *(number(ms, 0) for ms in times),
        *("–" if count is None else str(count) for count in counts),
        *(number(share, 3) for share in (node["drop_rate"], node["stale"]["rate"])),
    ]


def _latency(bag: dict[str, Any]) -> Figure:
    figure, axes = new_axes(f"Latency, {bag['name']}", "s since the first image", "ms")
    timeline = bag["node"]["timeline"]
    pairs = list(zip(timeline["sent_s"], timeline["latency_ms"], strict=True))
    answered = [pair for pair in pairs if pair[1] is not None]
    axes.plot([sent for sent, _ in answered], [ms for _, ms in answered], ".-", color=BLUE, linewidth=0.8, markersize=3, label="answered")
    dropped = [sent for sent, ms in pairs if ms is None]
    if dropped:
        axes.plot(dropped, [0.0] * len(dropped), "|", color=ORANGE, markersize=8, label="dropped")
    axes.set_ylim(bottom=0.0)
    axes.legend()
    return figure


def _events(report: dict[str, Any]) -> list[str]:
    folder = report["drive"]["clips"]
    if folder is None:
        return []
    clips = [clip for bag in report["drive"]["bags"] for clip in bag["clips"]]
    if not clips:
        return ["<h2>Events</h2><p>No track fits the rule.</p>"]
    rows = [
        (
            clip["bag"],
            clip["drive"],
            number(clip["start_s"], 1),
            number(clip["duration_s"], 1),
            str(len(clip["tracks"])),
            number(_best(clip), 2),
        )
        for clip in clips
    ]
    shown = sorted(clips, key=_best, reverse=True)[:CLIPS_SHOWN]
    pictures = "".join(_picture(Path(folder) / clip["picture"]) for clip in shown)
    head = ("clip", "recording", "from, s", "length, s", "tracks", "best score")
    note = "<small>Above: moments of the clip, seconds from the first track's appearance. Below: each track at its best, enlarged.</small>"
    return [f"<h2>Events</h2>{table(head, rows, numbers=2)}{pictures}{note}"]


def _best(clip: dict[str, Any]) -> float:
    return max(float(track["best_score"]) for track in clip["tracks"])


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img src="data:image/jpeg;base64,{data}" alt=""><br><small>{html.escape(path.name)}</small></p>'
