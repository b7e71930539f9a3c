"""``report.html``: one file with the figures, the rules they follow, curves and pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

PICTURES = 4
BLUE, ORANGE, GREY = "#1f6feb", "#e8710a", "#8b949e"
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#1f2328}
h1{font-size:1.6em;margin-bottom:.1em} h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #d0d7de}
table{border-collapse:collapse;margin:.5em 0} td,th{padding:.25em .8em;text-align:left;border-bottom:1px solid #eaeef2;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums} small,.rule{color:#57606a;font-size:.88em}
.row{display:flex;flex-wrap:wrap;gap:1em} figure{margin:0;flex:1 1 260px;max-width:570px} img{max-width:100%;border-radius:4px}
details{margin:.5em 0} pre{overflow:auto;background:#f6f8fa;padding:.8em;font-size:.85em}
"""


def report_html(report: dict[str, Any], picture: Callable[[str], bytes], more: Sequence[str] = ()) -> str:
    """The report as one self-contained page.

    Args:
        report: As :func:`~ros2_ood_seg.evaluation.report.build_report` gives it.
        picture: JPEG of a frame by name.
        more: HTML of further sections, to follow the summary.
    """
    title = f"{report['profile']} on {report['dataset']}"
    ranked = sorted((image for image in report["per_image"] if image["anomalous_px"]), key=lambda image: float(image["f1"]))
    worst = ranked[: min(PICTURES, len(ranked) // 2 or 1)]
    best = [image for image in ranked[::-1][:PICTURES] if image not in worst]
    sections = [
        "<h2>Summary</h2>" + _summary(report),
        *more,
        "<h2>Curves</h2><div class=row>" + embedded(_precision_recall(report)) + embedded(_iou(report)) + "</div>",
        "<h2>Worst frames</h2>" + _frames(worst, picture),
        "<h2>Best frames</h2>" + _frames(best, picture),
        "<small>White: outline of the labelled anomalies. Coloured: predicted instances with rank and score.</small>",
        "<h2>Found, missed, invented</h2><div class=row>"
        + embedded(_sizes(report))
        + embedded(_bands(report))
        + "</div>"
        + _size_table(report),
        "<h2>Scores and time</h2><div class=row>" + embedded(_reliability(report)) + embedded(timings_plot(report)) + "</div>",
        "<h2>How it was measured</h2>" + how_measured(report),
    ]
    return page(title, report, sections)


def page(title: str, report: dict[str, Any], sections: Sequence[str]) -> str:
    """A self-contained page: headline, what was measured on which machine, and sections of HTML."""
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    top = f"<h1>{html.escape(title)}</h1><small>{report['images']} images · {html.escape(_machine(report))}</small>"
    return f"<!doctype html><html lang=en>{head}{top}{''.join(sections)}</html>\n"


def number(value: float | None, digits: int = 4) -> str:
    """A figure for people."""
    return "–" if value is None else f"{value:.{digits}f}"


def _machine(report: dict[str, Any]) -> str:
    hardware = report["hardware"]
    return f"{hardware.get('gpu') or hardware['machine']}, {hardware['cpus']} CPUs, ros2_ood_seg {report['versions']['ros2_ood_seg']}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 1) -> str:
    """A table whose columns from ``numbers`` on are right-aligned."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=n' if k >= numbers else ''}>{html.escape(cell)}</{tag}>" for k, cell in enumerate(row))

    lines = [cells(head, "th"), *(cells(row, "td") for row in rows)]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _summary(report: dict[str, Any]) -> str:
    rule = report["rules"]["fpr95_rule"]
    pixel_head = ("per pixel", "AP", f"FPR95 ({rule})", "≥ 0.95", "> 0.95", "closest", "AuROC", "best F1")
    keys = ("ap", "fpr95", "fpr95_ge", "fpr95_gt", "fpr95_closest", "auroc", "best_f1")
    pixel_rows = [(name, *(number(report[group][key]) for key in keys)) for name, group in (("scorer", "pixel"), ("refined", "refined"))]
    mask_rows = [
        (name, *(number(report[group][key]) for key in ("iou", "iou_best", "threshold", "auiou", "mean_f1")))
        for name, group in (("scorer's own map", "baseline"), ("masks", "s2m"), ("masks, ignored pixels counted", "s2m_code"))
    ]
    object_rows = [
        ("components of the refined map", *(number(report["component"][key]) for key in ("siou", "ppv", "f1")), "–", "–"),
        ("components of the masks", *(number(report["component_masks"][key]) for key in ("siou", "ppv", "f1")), "–", "–"),
        ("instances", "–", "–", "–", number(report["instance"]["ap"]), number(report["instance"]["ap50"])),
    ]
    return (
        table(pixel_head, pixel_rows)
        + table(("per image", "IoU, no threshold", "best IoU", "at", "AuIoU", "mean F1"), mask_rows)
        + table(("per object", "sIoU", "PPV", "F1*", "AP", "AP50"), object_rows)
    )


def how_measured(report: dict[str, Any]) -> str:
    """Rules, versions and settings."""
    rules = "".join(
        f"<tr><td>{html.escape(key)}</td><td class=rule>{html.escape(_plain(value))}</td></tr>" for key, value in report["rules"].items()
    )
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    settings = html.escape("\n".join(_settings(report["config"])))
    return (
        f"<table>{rules}</table><small>{html.escape(versions)}</small>"
        f"<details><summary>All settings</summary><pre>{settings}</pre></details>"
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def _settings(tree: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key, value in tree.items():
        lines += _settings(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}: {value}"]
    return lines


def _frames(images: Sequence[dict[str, Any]], picture: Callable[[str], bytes]) -> str:
    if not images:
        return "<p>none with labelled anomalies</p>"
    parts = []
    for image in images:
        data = base64.b64encode(picture(image["name"])).decode()
        text = (
            f"{image['name']}: IoU {image['iou']:.3f}, F1 {image['f1']:.3f}, {image['found']} of {image['truth_instances']} objects found"
        )
        parts.append(
            f'<figure><img src="data:image/jpeg;base64,{data}" alt=""><figcaption><small>{html.escape(text)}</small></figcaption></figure>'
        )
    return f"<div class=row>{''.join(parts)}</div>"


def embedded(figure: Figure) -> str:
    """A plot as HTML."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<figure><img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt=""></figure>'


def new_axes(title: str, x_label: str, y_label: str) -> tuple[Figure, Any]:
    """A plot to draw into, and its axes."""
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _precision_recall(report: dict[str, Any]) -> Figure:
    figure, axes = new_axes("Precision over recall, pooled pixels", "recall", "precision")
    for kind, group, color in (("score", "pixel", GREY), ("refined", "refined", BLUE)):
        curve = report["curves"]["precision_recall"][kind]
        label = f"{'scorer' if kind == 'score' else 'refined'}, AP {number(report[group]['ap'], 3)}"
        axes.step(curve["recall"], curve["precision"], where="pre", color=color, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.legend()
    return figure


def _iou(report: dict[str, Any]) -> Figure:
    figure, axes = new_axes("IoU over the threshold, mean over images", "threshold (scorer: scaled by its range)", "IoU")
    curves = report["curves"]
    for group, name, color in (("baseline", "scorer", GREY), ("s2m", "masks", BLUE)):
        if curves["iou"][group] is not None:
            axes.plot(curves["thresholds"], curves["iou"][group], color=color, label=f"{name}, best {number(report[group]['iou_best'], 3)}")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    return figure


def _range(low: float | None, high: float | None, percent: bool = False) -> str:
    def show(value: float) -> str:
        if percent:
            return f"{value * 100:.0f} %"
        return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"

    if high is None:
        return f"over {show(low or 0.0)}"
    return f"{show(low or 0.0)} – {show(high)}"


def _sizes(report: dict[str, Any]) -> Figure:
    figure, axes = new_axes("Objects by size", "area, px", "objects")
    rows, alarms = report["sizes"], report["false_alarms"]
    places = range(len(rows))
    found = [row["found"] for row in rows]
    axes.bar([p - 0.2 for p in places], found, 0.4, color=BLUE, label="found (IoU > 0.5)")
    axes.bar([p - 0.2 for p in places], [row["truth"] - row["found"] for row in rows], 0.4, bottom=found, color=ORANGE, label="missed")
    axes.bar([p + 0.2 for p in places], [row["count"] for row in alarms], 0.4, color=GREY, label="invented")
    axes.set_xticks(list(places), [_range(row["from"], row["to"]) for row in rows], fontsize=8)
    axes.legend()
    return figure


def _bands(report: dict[str, Any]) -> Figure:
    figure, axes = new_axes("Recall by where the object ends in the image", "lower edge, % of image height (lower is nearer)", "recall")
    rows = report["bands"]
    axes.bar(range(len(rows)), [row["recall"] or 0.0 for row in rows], 0.6, color=BLUE)
    for k, row in enumerate(rows):
        axes.text(k, (row["recall"] or 0.0) + 0.02, f"{row['found']}/{row['truth']}", ha="center", fontsize=8)
    axes.set_xticks(range(len(rows)), [_range(row["from"], row["to"], percent=True) for row in rows], fontsize=8)
    axes.set_ylim(0, 1.1)
    return figure


def _size_table(report: dict[str, Any]) -> str:
    rows = [
        (
            _range(row["from"], row["to"]),
            str(row["truth"]),
            str(row["found"]),
            number(row["recall"], 3),
            number(row["box_recall"], 3),
            number(row["mean_iou"], 3),
            f"{alarm['count']} ({alarm['per_image']:.2f})",
        )
        for row, alarm in zip(report["sizes"], report["false_alarms"], strict=True)
    ]
    return table(("area, px", "objects", "found", "recall", "box prompt recall", "mean IoU", "invented (per image)"), rows)


def _reliability(report: dict[str, Any]) -> Figure:
    figure, axes = new_axes("How often instances of a score are right", "score", "share with IoU > 0.5")
    rows = [row for row in report["reliability"] if row["instances"]]
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    axes.bar([(row["from"] + row["to"]) / 2 for row in rows], [row["right"] for row in rows], 0.09, color=BLUE)
    for row in rows:
        axes.text((row["from"] + row["to"]) / 2, row["right"] + 0.02, str(row["instances"]), ha="center", fontsize=8)
    axes.set(xlim=(0, 1), ylim=(0, 1.1))
    return figure


def timings_plot(report: dict[str, Any]) -> Figure:
    """Median and 95th percentile of every stage."""
    figure, axes = new_axes("Time per image", "ms", "")
    stages = list(report["timings_ms"])[::-1]
    values = [report["timings_ms"][stage] for stage in stages]
    axes.barh(stages, [value["p95"] for value in values], color="#cfe2ff", label="95th percentile")
    axes.barh(stages, [value["p50"] for value in values], color=BLUE, label="median")
    for k, value in enumerate(values):
        axes.text(value["p95"], k, f" {value['p50']:.0f} / {value['p95']:.0f}", va="center", fontsize=8)
    axes.margins(x=0.15)
    axes.legend(loc="lower right")
    return figure
