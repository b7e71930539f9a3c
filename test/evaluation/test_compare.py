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
from ros2_ood_seg.evaluation.compare import METRICS, bootstrap, comparison
from ros2_ood_seg.evaluation.counts import CountsWriter, ImageCounts, counts_path, histogram, histogram_edges
from ros2_ood_seg.evaluation.pixel import ScoreCounts, pool


def counts(images: int = 12, shift: float = 0.0, seed: int = 0) -> ImageCounts:
    """Counts of random images; a greater ``shift`` separates the anomalies better."""
    rng = np.random.default_rng(seed)
    parts, sweeps, matches, right = [], [], [], []
    for _ in range(images):
        positives = ScoreCounts.from_values((rng.normal(size=300) + 1 + shift).astype(np.float32))
        negatives = ScoreCounts.from_values(rng.normal(size=3000).astype(np.float32))
        parts.append((positives, negatives))
        sweeps.append(s2m.sweep(positives, [negatives]))
        quality = rng.uniform(0, 0.8, 3) + shift / 10
        matches.append(component.counts_at_taus(component.ComponentMatch(quality, quality)))
        right.append([1 if quality[0] > 0.3 + j / 20 else -1 for j in range(10)])
    edges = histogram_edges(pool([p for p, _ in parts], [n for _, n in parts]))
    hist = np.array([histogram(edges, *part) for part in parts])
    masks = np.array([sweep.table() for sweep in sweeps])
    return ImageCounts(
        names=np.arange(images).astype(str),
        score=hist,
        refined=hist,
        masks=masks,
        baseline=masks,
        components=np.array(matches),
        instance_image=np.arange(images),
        instance_score=rng.uniform(size=images),
        instance_right=np.array(right, np.int8),
        missed=np.ones((images, 10), np.int64),
    )


def test_equal_weights_give_the_plain_figures() -> None:
    other = counts(shift=1.0, seed=3)
    found = dataclasses.replace(counts(), baseline=other.masks, refined=other.score)
    figures = found.figures(np.ones(12, np.int64))
    without_intervals = {"pixel.fpr95", "refined.fpr95", "component.siou", "component.ppv", "timings_ms.total.p50"}
    assert set(METRICS) - figures.keys() == without_intervals
    plain = s2m.summarise(s2m.MaskSweep.from_table(row) for row in found.masks)
    assert plain is not None
    assert figures["s2m.auiou"] == pytest.approx(plain.auiou)
    scorers = s2m.summarise(s2m.MaskSweep.from_table(row) for row in found.baseline)
    assert scorers is not None
    assert figures["baseline.iou_best"] == pytest.approx(scorers.iou_best)
    assert figures["refined.ap"] == other.figures(np.ones(12, np.int64))["pixel.ap"] != figures["pixel.ap"]
    assert figures["component.f1"] == pytest.approx(component.f1_star(found.components.sum(axis=0)))
    right = found.instance_right[:, 0] == 1
    scores = found.instance_score
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
    hist = np.array([histogram(histogram_edges(curve), *part) for part in parts])
    assert hist[:, 0].sum() == 45_000
    assert hist[:, 1].sum() == 2_500
    ap = dataclasses.replace(counts(5), score=hist).figures(np.ones(5, np.int64))["pixel.ap"]
    assert ap == pytest.approx(curve.ap(), abs=0.005)


def test_histograms_of_few_scores_give_ap_exactly() -> None:
    rng = np.random.default_rng(2)
    positives, negatives = (
        [ScoreCounts.from_values((rng.normal(size=size) + mean).round(1).astype(np.float32)) for _ in range(3)]
        for size, mean in ((500, 2.0), (900, 0.0))
    )
    curve = pool(positives, negatives)
    hist = np.array([histogram(histogram_edges(curve), *part) for part in zip(positives, negatives, strict=True)])
    figures = dataclasses.replace(counts(3), score=hist).figures(np.ones(3, np.int64))
    assert figures["pixel.ap"] == pytest.approx(curve.ap(), abs=1e-12)
    # Without anomalous pixels there is no AP, and no interval of it.
    hist[:, 1] = 0
    normal = dataclasses.replace(counts(3), score=hist)
    assert normal.figures(np.ones(3, np.int64)).keys() == figures.keys() - {"pixel.ap"}
    assert bootstrap(normal, normal, 3).keys() == figures.keys() - {"pixel.ap"}


def test_weights_are_repetitions() -> None:
    found = counts(6)
    weights = np.array([0, 2, 1, 0, 3, 0])
    index = np.repeat(np.arange(6), weights)
    repeated = ImageCounts(**{field.name: getattr(found, field.name)[index] for field in dataclasses.fields(ImageCounts)})
    repeated = dataclasses.replace(repeated, instance_image=np.arange(6))
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
    other = counts()
    numbered_alike = dataclasses.replace(other, masks=other.masks + 1)
    with pytest.raises(InputError, match="different images"):
        bootstrap(other, numbered_alike)


def save(found: ImageCounts, path: Path) -> None:
    rows = dataclasses.asdict(found) | {"names": found.names}
    np.savez_compressed(path, allow_pickle=False, **rows)


def test_rows_of_a_run_that_was_interrupted_do_not_count(tmp_path: Path) -> None:
    found = counts(2)
    sweeps = [s2m.MaskSweep.from_table(row) for row in found.masks]
    nothing = instance.Verdicts(np.zeros(0), np.zeros((0, 10), np.int8), found.missed[0])
    CountsWriter(tmp_path).add_found("before", sweeps[0], nothing)
    writer = CountsWriter(tmp_path)
    writer.add_found("now", sweeps[1], nothing)
    writer.add_scored(found.score[1], found.refined[1], sweeps[1], None)
    writer.save(tmp_path / "a.images.npz")
    loaded = ImageCounts.load(tmp_path / "a.images.npz")
    assert loaded.names.tolist() == ["now"]
    np.testing.assert_array_equal(loaded.masks, found.masks[1:])


@pytest.mark.parametrize("with_components", [True, False])
def test_counts_written_image_by_image_are_read_as_one(tmp_path: Path, with_components: bool) -> None:
    found = counts(3)
    writer = CountsWriter(tmp_path)
    matches = [component.ComponentMatch(np.array([0.3, 0.9]), np.array([0.5])) if with_components else None for _ in range(3)]
    for k in range(3):
        sweep = s2m.MaskSweep.from_table(found.masks[k])
        verdicts = instance.Verdicts(found.instance_score[:k], found.instance_right[:k], found.missed[k])
        writer.add_found(f"frame {k}", sweep, verdicts)
    for k in range(3):
        writer.add_scored(found.score[k], found.refined[k], s2m.MaskSweep.from_table(found.masks[k]), matches[k])
    writer.save(tmp_path / "a.images.npz")
    loaded = ImageCounts.load(tmp_path / "a.images.npz")
    assert loaded.names.tolist() == ["frame 0", "frame 1", "frame 2"]
    for key in ("score", "refined", "masks", "baseline", "missed"):
        np.testing.assert_array_equal(getattr(loaded, key), getattr(found, key))
    assert loaded.instance_image.tolist() == [1, 2, 2]
    np.testing.assert_array_equal(loaded.instance_right, found.instance_right[[0, 0, 1]])
    expected = [component.counts_at_taus(match) for match in matches if match is not None]
    np.testing.assert_array_equal(loaded.components, np.array(expected).reshape(-1, 3, 11))


def test_damaged_counts_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "b.images.npz"
    save(counts(3), path)
    whole = path.read_bytes()
    # In the middle there are compressed bytes.
    middle = len(whole) // 2
    for damaged in (
        b"nothing",
        b"",
        whole[:middle],
        whole[:middle] + bytes(byte ^ 255 for byte in whole[middle:][:60]) + whole[middle + 60 :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"b\.images\.npz' cannot be read"):
            ImageCounts.load(path)


def write_report(path: Path, ap: float | None, images: int = 12, shift: float = 0.0) -> Path:
    report: dict[str, Any] = {"dataset": "d", "profile": path.stem, "images": images, "pixel": {"ap": ap, "fpr95": 0.2}, "refined": {}}
    path.write_text(json.dumps(report))
    save(counts(images, shift), counts_path(path))
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
    # What one of them has is shown, without a difference.
    assert next(line for line in printed.splitlines() if line.startswith("pixel.ap")).split() == ["pixel.ap", "0.5000", "-"]
    assert "in brackets" not in printed
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
