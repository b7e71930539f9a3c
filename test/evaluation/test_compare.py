from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ros2_ood_seg.cli import main
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation import component, instance, s2m
from ros2_ood_seg.evaluation.compare import ImageCounts, bootstrap, comparison, counts_path, histogram
from ros2_ood_seg.evaluation.pixel import ScoreCounts, pool


def counts(images: int = 12, shift: float = 0.0, seed: int = 0) -> ImageCounts:
    """Counts of random images; a greater ``shift`` separates the anomalies better."""
    rng = np.random.default_rng(seed)
    parts, sweeps, matches = [], [], []
    rows: list[tuple[int, int, bool, float]] = []
    for k in range(images):
        positives = ScoreCounts.from_values((rng.normal(size=300) + 1 + shift).astype(np.float32))
        negatives = ScoreCounts.from_values(rng.normal(size=3000).astype(np.float32))
        parts.append((positives, negatives))
        sweeps.append(s2m.sweep(positives, [negatives]))
        quality = rng.uniform(0, 0.8, 3) + shift / 10
        matches.append(component.counts_at_taus(component.ComponentMatch(quality, quality)))
        rows += [(k, j, bool(quality[0] > 0.3 + j / 20), float(rng.uniform())) for j in range(10)]
    curve = pool([p for p, _ in parts], [n for _, n in parts])
    hist = histogram(curve, parts)
    masks = np.array([[s.hits, s.extra, np.full(101, s.positives)] for s in sweeps])
    image, overlap, right, score = (np.array(column) for column in zip(*rows, strict=True))
    missed = np.ones((images, 10), np.int64)
    return ImageCounts(np.arange(images).astype(str), hist, hist, masks, masks, np.array(matches), image, overlap, right, score, missed)


def test_equal_weights_give_the_plain_figures() -> None:
    found = counts()
    figures = found.figures(np.ones(12, np.int64))
    plain = s2m.summarise([s2m.MaskSweep(row[0], row[1], int(row[2, 0])) for row in found.masks])
    assert plain is not None
    assert figures["s2m.auiou"] == pytest.approx(plain.auiou)
    assert figures["component.f1"] == pytest.approx(component.f1_star(found.components.sum(axis=0)))
    at_50 = found.instance_overlap == 0
    right = found.instance_right[at_50]
    scores = found.instance_score[at_50]
    assert figures["instance.ap50"] == pytest.approx(instance.average_precision(scores[right], scores[~right], 12))


def test_histograms_approximate_ap() -> None:
    rng = np.random.default_rng(1)
    parts = [
        (
            ScoreCounts.from_values((rng.normal(size=500) + 2).astype(np.float32)),
            ScoreCounts.from_values(rng.normal(size=9000).astype(np.float32)),
        )
        for _ in range(5)
    ]
    curve = pool([p for p, _ in parts], [n for _, n in parts])
    hist = histogram(curve, parts)
    assert hist[:, 0].sum() == 45_000
    assert hist[:, 1].sum() == 2_500
    ap = dataclasses.replace(counts(5), score=hist).figures(np.ones(5, np.int64))["pixel.ap"]
    assert ap == pytest.approx(curve.ap(), abs=0.005)


def test_weights_are_repetitions() -> None:
    found = counts(6)
    weights = np.array([0, 2, 1, 0, 3, 0])
    index = np.repeat(np.arange(6), weights)
    rows = np.concatenate([np.flatnonzero(found.instance_image == k) for k in index])
    repeated = ImageCounts(
        found.names[index],
        found.score[index],
        found.refined[index],
        found.masks[index],
        found.baseline[index],
        found.components[index],
        np.repeat(np.arange(6), 10),
        found.instance_overlap[rows],
        found.instance_right[rows],
        found.instance_score[rows],
        found.missed[index],
    )
    expected = repeated.figures(np.ones(6, np.int64))
    assert found.figures(weights) == pytest.approx(expected)


def test_intervals_cover_a_clear_gain_and_not_zero() -> None:
    weak, strong = counts(), counts(shift=1.5)
    intervals = bootstrap(weak, strong, 60)
    gain = strong.figures(np.ones(12, np.int64))["pixel.ap"] - weak.figures(np.ones(12, np.int64))["pixel.ap"]
    assert 0.0 < intervals["pixel.ap"].low <= gain <= intervals["pixel.ap"].high
    same = bootstrap(weak, weak, 20)
    assert all((interval.low, interval.high) == (0.0, 0.0) for interval in same.values())


def test_other_images_are_refused() -> None:
    with pytest.raises(InputError, match="different images"):
        bootstrap(counts(), counts(5))


def test_counts_survive_the_file(tmp_path: Path) -> None:
    found = counts(3)
    found.save(tmp_path / "a.images.npz")
    loaded = ImageCounts.load(tmp_path / "a.images.npz")
    for field in dataclasses.fields(ImageCounts):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(found, field.name))
    (tmp_path / "b.images.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"b\.images\.npz' cannot be read"):
        ImageCounts.load(tmp_path / "b.images.npz")


def write_report(path: Path, ap: float | None, images: int = 12, shift: float = 0.0) -> Path:
    report: dict[str, Any] = {"dataset": "d", "profile": path.stem, "images": images, "pixel": {"ap": ap, "fpr95": 0.2}, "refined": {}}
    path.write_text(json.dumps(report))
    counts(images, shift).save(counts_path(path))
    return path


def test_table_shows_values_differences_and_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write_report(tmp_path / "a.json", 0.5), write_report(tmp_path / "b.json", 0.75, shift=1.0)]
    assert main(["compare", *(str(path) for path in paths), "--samples", "20"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("pixel.ap"))
    assert row.split()[1:4] == ["0.5000", "0.7500", "+0.2500"]
    assert "[" in row
    assert "instance.ap" not in printed
    assert "a (a)" in printed


def test_table_without_intervals(tmp_path: Path) -> None:
    paths = [write_report(tmp_path / "a.json", 0.5), write_report(tmp_path / "b.json", None, images=3)]
    printed = comparison(paths)
    assert "no intervals: the reports are of different images" in printed
    assert "not of the same data" in printed
    assert "[" not in comparison(paths, samples=0)


def test_bad_reports_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_report(tmp_path / "a.json", 0.5)
    (tmp_path / "b.json").write_text("[1, 2]")
    for arguments, message in (
        ([str(good)], "two or more reports"),
        ([str(good), str(tmp_path / "b.json")], "is no report"),
        ([str(good), str(tmp_path / "c.json")], "cannot be read"),
        ([str(good), str(good), "--samples", "-1"], "--samples is -1"),
    ):
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err
