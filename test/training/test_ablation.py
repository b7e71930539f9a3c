from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes

from ros2_ood_seg.evaluation.datasets import DataSet, LabelledImage, open_dataset
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.training.ablation import CachedScorer, Sweep, Table, Variant, add_arguments, markdown_table, plot_rows, run_sweep
from ros2_ood_seg.types import Calibration, Prompts, ScoreMap

SETTINGS = {
    "runtime.device": "cpu",
    "scorer.input_width": 96,
    "segmenter.name": "grabcut",
    "prompts.points.count": 2,
    "prompts.points.threshold": 0.0,
}


class CountingScorer:
    name = "counting"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image: torch.Tensor, external: torch.Tensor | None = None) -> ScoreMap:
        self.calls += 1
        return ScoreMap(image.float().mean(2), "counting", Calibration.linear(0.0, 255.0), torch.zeros(image.shape[:2], dtype=torch.uint8))


def test_a_map_is_computed_once_for_a_picture(tmp_path: Path) -> None:
    scorer = CountingScorer()
    cached = CachedScorer(scorer, tmp_path)
    pictures = [torch.randint(0, 256, (24, 32, 3), dtype=torch.uint8) for _ in range(2)]
    pictures += [pictures[0].reshape(32, 24, 3)]
    for _ in range(3):
        for picture in pictures:
            found, expected = cached(picture), scorer(picture)
            assert torch.equal(found.scores, expected.scores)
            assert (found.scorer, found.calibration) == (expected.scorer, expected.calibration)
            assert cached.last_ms > 0
    assert scorer.calls == 9 + len(pictures)
    cached.clear()
    assert not list(tmp_path.iterdir())


def measured_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of scorers that were built and how often each ran."""
    calls: list[int] = []
    get = SCORERS.get

    def counting(name: str):
        def build(config, runtime):
            scorer = get(name)(config, runtime)
            calls.append(0)
            index = len(calls) - 1

            class Counted:
                name = scorer.name

                def __call__(self, image, external=None):
                    calls[index] += 1
                    return scorer(image, external)

            return Counted()

        return build

    monkeypatch.setattr(SCORERS, "get", counting)
    return calls


def test_variants_share_the_score_maps(labelled_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = measured_calls(monkeypatch)
    dataset = open_dataset("folder", labelled_set)
    weights = {"scorer.weights": str(labelled_set.parent / "scorer.safetensors")}
    sweep = Sweep("compact_ugains", {**SETTINGS, **weights}, tmp_path)
    seen: list[str] = []

    def stand_in(pipeline: Pipeline):
        pipeline.point_prompts = lambda score_map, ignore=None: Prompts.from_points(torch.tensor([[110.0, 30.0]]))
        return lambda frame: seen.append(frame.name)

    variants = [Variant("2"), Variant("3", {"prompts.points.count": 3}), Variant("told", alter=stand_in), Variant("again")]
    prompts: list[int] = []

    def watch(frame: LabelledImage, result) -> None:
        prompts.append(len(result.prompts))

    reports = [sweep.measure(variant, dataset, watch) for variant in variants]
    # Two pictures, and the empty one of the warm-up.
    assert calls == [3]
    assert seen == ["0", "1"]
    assert prompts == [2, 2, 3, 3, 1, 1, 2, 2]
    assert reports[0].report["refined"] == reports[3].report["refined"]
    assert reports[0].report["refined"] != reports[2].report["refined"]
    assert all(measured.total_ms > 0 for measured in reports)

    sweep.measure(Variant("other scorer", {"scorer.coarse_scale": 1.0}), dataset)
    assert calls == [3, 3]


@dataclass(frozen=True)
class Cell:
    dataset: str
    variant: str


def test_an_interrupted_sweep_leaves_what_it_has(labelled_set: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, ["one"], "compact_ugains")
    output = tmp_path / "table.json"
    args = parser.parse_args(["--what", "one", "--root", str(labelled_set), "--output", str(output)])

    def variants() -> Iterator[Variant]:
        yield Variant("first")
        raise KeyboardInterrupt

    def measure(sweep: Sweep, variant: Variant, dataset: DataSet) -> Cell:
        return Cell(dataset.root.name, variant.label)

    table = Table(lambda rows: markdown_table(["variant"], [[row.variant] for row in rows]), lambda rows, path: path.write_bytes(b""))
    with pytest.raises(KeyboardInterrupt):
        run_sweep(args, variants(), measure, table)
    assert json.loads(output.read_text())["rows"] == [{"dataset": "tiny", "variant": "first"}]
    assert output.with_suffix(".md").read_text() == "| variant |\n| --- |\n| first |\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json", "table.md", "table.png"]


@dataclass(frozen=True)
class PlottedRow:
    dataset: str
    variant: str
    figure: float
    level: float


def test_every_variant_has_a_level_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[float]] = []
    hlines = Axes.hlines
    monkeypatch.setattr(Axes, "hlines", lambda axis, y, *args, **more: (drawn.append(list(y)), hlines(axis, y, *args, **more))[1])
    rows = [PlottedRow(dataset, variant, 0.7, level) for dataset in "ab" for variant, level in (("x", 0.5), ("y", 0.25))]
    plot_rows(rows, tmp_path / "plot.png", "IoU (%)", {"figure": lambda row: row.figure}, ("level", lambda row: row.level))
    assert drawn == [[50.0, 25.0], [50.0, 25.0]]
    assert (tmp_path / "plot.png").stat().st_size > 0
