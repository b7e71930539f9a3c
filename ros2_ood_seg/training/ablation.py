"""What the ablations of all methods share: variants of a profile, one score map for all of them, tables and plots."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ros2_ood_seg.config import load_profile, parse_overrides
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.cli import checked_output
from ros2_ood_seg.evaluation.component import TRACKS
from ros2_ood_seg.evaluation.datasets import DataSet, LabelledImage, open_dataset
from ros2_ood_seg.evaluation.evaluate import Evaluation, Options
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.scorers.base import Scorer
from ros2_ood_seg.types import Calibration, FrameResult, ScoreMap

Tell = Callable[[LabelledImage], None]
"""Takes the frame that comes next, with its ground truth."""


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        label: Its name.
        overrides: Settings that differ from the profile.
        alter: Puts stand-ins in the place of the pipeline's stages for this variant only; returns what has to know the ground truth.
    """

    label: str
    overrides: dict[str, Any] = field(default_factory=dict)
    alter: Callable[[Pipeline], Tell] | None = None


class CachedScorer:
    """Computes the score map of a picture once and keeps it on disk, without the classes.

    Args:
        scorer: What computes.
        folder: Where to keep the maps, 4 bytes a pixel.
    """

    def __init__(self, scorer: Scorer, folder: Path) -> None:
        self.name = scorer.name
        self._scorer = scorer
        self._folder = folder
        self._known: dict[str, tuple[str, Calibration, tuple[float, float] | None, float]] = {}
        self.last_ms = 0.0

    def __call__(self, image: Tensor, external: Tensor | None = None) -> ScoreMap:
        """See :class:`ros2_ood_seg.scorers.base.Scorer`; :attr:`last_ms` then holds what computing this map took."""
        pixels = image.cpu().numpy()
        key = hashlib.blake2b(pixels.tobytes(), digest_size=16, person=str(pixels.shape[1]).encode()).hexdigest()
        path = self._folder / f"{key}.npy"
        if key not in self._known:
            start = time.perf_counter()
            score_map = self._scorer(image, external)
            scores = score_map.scores.cpu().numpy()
            took_ms = (time.perf_counter() - start) * 1e3
            np.save(path, scores)
            self._known[key] = (score_map.scorer, score_map.calibration, score_map.road_end, took_ms)
        name, calibration, road_end, self.last_ms = self._known[key]
        return ScoreMap(torch.from_numpy(np.load(path)).to(image.device), name, calibration, road_end=road_end)

    def clear(self) -> None:
        """Removes the maps."""
        for key in self._known:
            (self._folder / f"{key}.npy").unlink()
        self._known = {}


@dataclass(frozen=True)
class Measured:
    """A variant on a data set.

    Args:
        report: The evaluation report.
        total_ms: Median time of a frame, with the time that its score map took when it was computed.
    """

    report: dict[str, Any]
    total_ms: float


class Sweep:
    """Runs the variants of a profile one after the other on one loaded pipeline; score maps are computed once.

    Args:
        profile: Name or path of the profile that is varied.
        overrides: Settings common to all variants.
        folder: Existing folder for intermediate results.
    """

    def __init__(self, profile: str, overrides: Mapping[str, Any], folder: Path) -> None:
        self._profile = profile
        self._overrides = {"tracking.enabled": False, **overrides}
        self._folder = folder
        self._pipeline: Pipeline | None = None
        self._cache: CachedScorer | None = None

    def measure(self, variant: Variant, dataset: DataSet, watch: Callable[[LabelledImage, FrameResult], None] | None = None) -> Measured:
        """Runs one variant on one data set.

        Args:
            variant: What differs.
            dataset: Labelled frames.
            watch: Sees every frame and what the pipeline made of it.
        """
        pipeline = self._pipeline = Pipeline(load_profile(self._profile, {**self._overrides, **variant.overrides}), self._pipeline)
        cache = self._cached(pipeline)
        stamp = {"variant": variant.label, "root": str(dataset.root)}
        score_ms = []
        with _altered(pipeline, variant) as tell:
            evaluation = Evaluation(pipeline, self._folder / "frames", Options(minimum=TRACKS[dataset.track]), stamp)
            for source in tqdm(dataset.sources, desc=f"{variant.label} on {dataset.root.name}", unit="image"):
                frame = dataset.load(source)
                tell(frame)
                result = evaluation.add(frame)
                score_ms.append(cache.last_ms)
                if watch is not None:
                    watch(frame, result)
            report, _ = evaluation.report(dataset.name, dataset.instance_rule)
            evaluation.finish()
        median = {stage: times["p50"] for stage, times in report["timings_ms"].items()}
        return Measured(report, median["total"] - median["score"] + float(np.median(score_ms)))

    def _cached(self, pipeline: Pipeline) -> CachedScorer:
        if not isinstance(pipeline.scorer, CachedScorer):
            if self._cache is not None:
                self._cache.clear()
            self._cache = pipeline.scorer = CachedScorer(pipeline.scorer, self._folder)
        return pipeline.scorer


@contextmanager
def _altered(pipeline: Pipeline, variant: Variant) -> Iterator[Tell]:
    """The variant's stand-ins, and afterwards the pipeline's own stages again, so that the next variant can take them over."""
    own = pipeline.box_prompts, pipeline.point_prompts, pipeline.segmenter, pipeline.fusion
    try:
        yield (lambda frame: None) if variant.alter is None else variant.alter(pipeline)
    finally:
        pipeline.box_prompts, pipeline.point_prompts, pipeline.segmenter, pipeline.fusion = own


class TableRow(Protocol):
    """Figures of one variant on one data set; a frozen dataclass, which is also what the JSON file holds."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def dataset(self) -> str:
        """Name of the data set's folder."""
        ...

    @property
    def variant(self) -> str:
        """Label of the variant."""
        ...


AnyRow = TypeVar("AnyRow", bound=TableRow)


@dataclass(frozen=True)
class Table:
    """How the rows of a method are shown.

    Args:
        markdown: Rows to a table.
        plot: Rows and a ``.png`` to write.
    """

    markdown: Callable[[Sequence[Any]], str]
    plot: Callable[[Sequence[Any], Path], None]


def run_sweep(
    args: argparse.Namespace, variants: Iterable[Variant], measure: Callable[[Sweep, Variant, DataSet], AnyRow], table: Table
) -> int:
    """Measures all variants on all data sets and writes the table after each, so that an interrupted run leaves what it has.

    Args:
        args: What :func:`add_arguments` added.
        variants: Rows to be; made one by one, each just before it is measured.
        measure: Measures one variant on one data set.
        table: How to show the rows.

    Raises:
        InputError: Anything in the arguments or the data that cannot be used.
    """
    if args.max_images < 0:
        raise InputError(f"--max-images is {args.max_images}, it must be 1 or more, or 0 for all")
    datasets = [open_dataset(args.dataset, root) for root in args.root]
    datasets = [dataset.head(args.max_images) if args.max_images else dataset for dataset in datasets]
    overrides = {"runtime.device": args.device, **parse_overrides(args.set)}
    output = checked_output(args.output)
    order = [dataset.root.name for dataset in datasets]
    if twice := sorted({name for name in order if order.count(name) > 1}):
        raise InputError(
            f"--root names several folders called '{twice[0]}', which the table could not tell apart: use links of other names"
        )
    rows: list[AnyRow] = []
    with TemporaryDirectory(prefix=f".{output.stem}-", dir=output.parent) as folder:
        sweep = Sweep(args.profile, overrides, Path(folder))
        for variant in variants:
            for dataset in datasets:
                rows.append(measure(sweep, variant, dataset))
                rows.sort(key=lambda row: order.index(row.dataset))
                tree = {"what": args.what, "profile": args.profile, "set": args.set, "rows": [asdict(row) for row in rows]}
                output.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
                output.with_suffix(".md").write_text(table.markdown(rows), encoding="utf-8")
                table.plot(rows, output.with_suffix(".png"))
    print(table.markdown(rows))
    return 0


def add_arguments(parser: argparse.ArgumentParser, what: Sequence[str], profile: str) -> None:
    """Adds what all ablations take.

    Args:
        parser: Of one method.
        what: What can be varied.
        profile: Profile that is varied unless another one is named.
    """
    parser.add_argument("--what", choices=tuple(what), required=True, help="what is varied")
    parser.add_argument("--root", nargs="+", required=True, help="folders of data sets")
    parser.add_argument("--dataset", default="folder", help="their layout, as in 'ood-seg evaluate' (%(default)s)")
    parser.add_argument("--profile", default=profile, help="profile that is varied (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the profile; may be repeated")
    parser.add_argument("--max-images", type=int, default=0, metavar="N", help="only the first N images of each set")
    parser.add_argument("--output", type=Path, required=True, help="table.json to write; .md and .png appear beside it")
    parser.add_argument("--scorers", nargs="+", default=["compact", "compact:msp", "compact:entropy"], help="scorers: NAME or NAME:SCORE")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")


def scorer_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """Other scorers, or other scores of the same network, under the same prompts (S2M Table 4, UGainS Table 3)."""
    for item in args.scorers:
        name, _, score = item.partition(":")
        yield Variant(item, {"scorer.name": name, "scorer.score": score or "default"})


def percent(value: float | None) -> str:
    """A fraction in percent, nothing where there is none."""
    return "" if value is None else f"{100 * value:.1f}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells as a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def plot_rows(
    rows: Sequence[AnyRow],
    path: Path,
    ylabel: str,
    series: Mapping[str, Callable[[AnyRow], float | None]],
    level: tuple[str, Callable[[AnyRow], float | None]] | None = None,
    steps_of: str = "",
) -> None:
    """Draws the variants, one panel for each data set.

    Args:
        rows: Data set by data set.
        path: ``.png`` to write.
        ylabel: What the figures are.
        series: Legend to the figure of a row, a fraction.
        level: Legend and figure of a row, drawn as a line across its place.
        steps_of: What the variants are steps of: lines over it instead of bars.
    """
    from matplotlib.figure import Figure

    datasets = list(dict.fromkeys(row.dataset for row in rows))
    figure = Figure(figsize=(max(4.2, 1.2 + 0.8 * len(rows) / len(datasets)) * len(datasets), 3.8), layout="constrained")
    for axis, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        chosen = [row for row in rows if row.dataset == dataset]
        at = np.arange(len(chosen))
        for k, (name, figure_of) in enumerate(series.items()):
            values = [100 * (figure_of(row) or 0.0) for row in chosen]
            if steps_of:
                axis.plot(at, values, marker="o", label=name)
            else:
                width = 0.8 / len(series)
                axis.bar(at + (k + 0.5) * width - 0.4, values, width, label=name)
        if level is not None:
            levels = [100 * (level[1](row) or 0.0) for row in chosen]
            axis.hlines(levels, at - 0.5, at + 0.5, color="tab:red", label=level[0])
        if steps_of:
            axis.set_xticks(at, [row.variant for row in chosen])
            axis.set_xlabel(steps_of)
        else:
            axis.set_xticks(at, [row.variant for row in chosen], rotation=30, ha="right")
        axis.set_title(dataset)
        axis.set_ylabel(ylabel)
        axis.grid(axis="y", alpha=0.3)
    # Beside the panels, where it hides no bar.
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=110)
