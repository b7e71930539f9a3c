"""Runs a pipeline over labelled frames, one after the other, and keeps what the report needs."""

from __future__ import annotations

import glob
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

import ros2_ood_seg
from ros2_ood_seg.config import PipelineConfig, iter_settings
from ros2_ood_seg.errors import InputError, naming
from ros2_ood_seg.evaluation import component
from ros2_ood_seg.evaluation.counts import CountsWriter
from ros2_ood_seg.evaluation.datasets import DataSet, LabelledImage, Source
from ros2_ood_seg.evaluation.measure import Maps, box_slice, instances_json, measure
from ros2_ood_seg.evaluation.pixel import FprRule
from ros2_ood_seg.evaluation.report import build_report
from ros2_ood_seg.evaluation.store import PartStore
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.types import FrameResult, Instances, boxes_from_masks
from ros2_ood_seg.visualization import draw_overlay
from ros2_ood_seg.weights.store import search_dirs

EXACT_PIXELS = 512_000_000
"""Up to this many pixels scores are pooled exactly (about 20 bytes of disk a pixel while it runs); beyond it they are coarsened."""
COARSE_BITS = 12
PICTURE_WIDTH_PX = 640
STAMP_BYTES = 1 << 20
"""Of large weights files the beginning and the end tell two apart: weights of another training differ everywhere."""

PixelMode = Literal["auto", "exact", "coarse"]


@dataclass(frozen=True)
class Options:
    """How to evaluate.

    Args:
        fpr_rule: Which rule ``fpr95`` follows; the others are reported beside it.
        minimum: Least component sizes.
        save: Folder for maps and instances of every frame, or None.
        pixel_mode: ``exact`` pools every score; ``coarse`` cuts 12 mantissa bits (relative resolution 2**-11), keeps no maps and so needs
            little disk; the report then states the bounds of AP and gives no component metrics of the map. ``auto`` is exact up to
            :data:`EXACT_PIXELS`.
    """

    fpr_rule: FprRule = "ge"
    minimum: component.Minimum = component.TRACKS["anomaly"]
    save: Path | None = None
    pixel_mode: PixelMode = "auto"


class Evaluation:
    """Measures frames one by one and reports at the end; memory does not grow with the number of frames but for a few kB each.

    Args:
        pipeline: What is evaluated.
        work: Folder of finished frames, kept until :meth:`finish`.
        options: How.
        fingerprint: What finished frames depend on beside the pipeline's settings, code and weights.
        expected_pixels: Of all frames together, to choose between exact and coarse; 0 when unknown.
        join: Another process made the folder, and nothing of it is thrown away.

    Raises:
        InputError: A folder cannot be made or used.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        work: Path,
        options: Options,
        fingerprint: Mapping[str, Any] | None = None,
        expected_pixels: int = 0,
        join: bool = False,
    ) -> None:
        self.pipeline = pipeline
        self.options = options
        self.exact = options.pixel_mode == "exact" or (options.pixel_mode == "auto" and expected_pixels <= EXACT_PIXELS)
        stamp = {
            "exact": self.exact,
            "minimum": vars(options.minimum),
            "pipeline": pipeline_stamp(pipeline.config),
            "save": str(options.save or ""),
        }
        self.store = PartStore(work, {**stamp, **(fingerprint or {})}, join)
        self._names: dict[str, None] = {}
        self._warm = False
        # On a CPU the work beside the pipeline would slow it down and so spoil its times.
        self.overlap = pipeline.runtime.device.type != "cpu"
        self._worker = ThreadPoolExecutor(1, "measure")
        self._measuring: Future[None] | None = None
        self._idle_since: float | None = None
        if options.save is not None:
            try:
                for folder in ("score", "refined", "instances"):
                    (options.save / folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"--save '{options.save}': the folder cannot be made: {error.strerror}") from error

    def has(self, name: str) -> bool:
        """Whether an earlier run finished this frame, saved files included."""
        save = self.options.save
        return self.store.has(name) and (save is None or (save / "instances" / f"{name}.json").is_file())

    @property
    def count(self) -> int:
        """Frames so far."""
        return len(self._names)

    def order(self, names: Iterable[str]) -> None:
        """Sets which finished frames are reported, in this order; without it those of :meth:`add`, in the order of the calls."""
        self._names = dict.fromkeys(names)

    def add(self, frame: LabelledImage, external: NDArray[np.float32] | None = None, load_ms: float = 0.0) -> FrameResult:
        """Runs one frame and measures it in the background: on a GPU while the next one runs, on a CPU while the caller reads it.

        Args:
            frame: With its ground truth; the report keeps the order of the calls.
            external: Score map for the scorer ``external``.
            load_ms: What reading the frame took, for the report.

        Returns:
            What the pipeline said.

        Raises:
            InputError: A name that came before, or an image or score map that cannot be used, of this frame or of the one before.
        """
        if frame.name in self._names:
            raise InputError(f"two frames are named '{frame.name}'; names must be unique")
        if not self.overlap:
            self._finish_measuring()
        idle_ms = load_ms if self._idle_since is None else (time.perf_counter() - self._idle_since) * 1e3
        with naming(f"frame '{frame.name}'"):
            if not self._warm:
                self.pipeline.warm_up(*frame.label.shape)
                self._warm = True
            result = self.pipeline.run(frame.image, external)
        self._idle_since = time.perf_counter()
        self._start_measuring(frame, result, {"load": load_ms, "idle": idle_ms})
        return result

    def add_result(self, frame: LabelledImage, result: FrameResult) -> None:
        """Measures what was found elsewhere, for example by a running node with the pipeline's settings.

        Args:
            frame: With its ground truth.
            result: Of this frame.

        Raises:
            InputError: See :meth:`add`.
        """
        if frame.name in self._names:
            raise InputError(f"two frames are named '{frame.name}'; names must be unique")
        self._start_measuring(frame, result, {})
        if not self.overlap:
            self._finish_measuring()

    def wait(self) -> None:
        """Waits until the last frame is finished, and raises what stopped it.

        Raises:
            InputError: The frame cannot be used.
        """
        self._finish_measuring()
        # What the caller does until the next frame is none of the evaluation's time.
        self._idle_since = None

    def _start_measuring(self, frame: LabelledImage, result: FrameResult, outside_ms: Mapping[str, float]) -> None:
        self._finish_measuring()
        self._names[frame.name] = None
        self._measuring = self._worker.submit(self._measure, frame, result, outside_ms)

    def _finish_measuring(self) -> None:
        if self._measuring is not None:
            measuring, self._measuring = self._measuring, None
            measuring.result()

    def _measure(self, frame: LabelledImage, result: FrameResult, outside_ms: Mapping[str, float]) -> None:
        start = time.perf_counter()
        config = self.pipeline.config
        maps = Maps.from_result(result, config.fusion.name == "s2m", config.prompts.boxes.method != "none")
        figures, score, refined = measure(frame, maps, self.options.minimum, 0 if self.exact else COARSE_BITS)
        if self.options.save is not None:
            _save(self.options.save, frame.name, maps, config.profile)
        picture = _picture(frame, result)
        self.store.save_pixels(frame.name, score, refined, (maps.refined, frame.label) if self.exact else None)
        outside = {**outside_ms, "measure": (time.perf_counter() - start) * 1e3}
        self.store.save(replace(figures, timings_ms=dict(result.timings_ms), outside_ms=outside), picture)

    def report(self, dataset: str, instance_rule: str = "as labelled") -> tuple[dict[str, Any], CountsWriter]:
        """Pools everything that was measured.

        Args:
            dataset: Its name.
            instance_rule: Where the ground-truth instances come from.

        Returns:
            Plain data for ``report.json``, where a value that the profile or the data cannot have is None; the counts of every image,
            for comparisons, to be saved before :meth:`finish`.

        Raises:
            InputError: No frame was measured.
        """
        if not self._names:
            raise InputError(f"data set '{dataset}' gave no frames to evaluate")
        self.wait()
        options = self.options
        return build_report(
            self.store,
            list(self._names),
            dataset=dataset,
            config=self.pipeline.config,
            device=str(self.pipeline.runtime.device),
            fpr_rule=options.fpr_rule,
            minimum=options.minimum,
            exact=self.exact,
            instance_rule=instance_rule,
        )

    def picture(self, name: str) -> bytes:
        """JPEG of a finished frame: instances over the image, the ground truth as a white outline."""
        return self.store.picture(name)

    def finish(self) -> None:
        """Removes the folder of finished frames."""
        self._worker.shutdown()
        self.store.clear()


def pipeline_stamp(config: PipelineConfig) -> str:
    """A hash of what a pipeline's results depend on, the same on every machine: settings, this package's code, weights, calibration."""
    digest = hashlib.sha256(json.dumps(config.model_dump(), sort_keys=True).encode())
    digest.update(_code_stamp())
    package = Path(ros2_ood_seg.__file__).parent
    # Other texts are names, which folders of results may have, too.
    named = [Path(str(s.value)) for s in iter_settings(config) if s.names_file and s.value]
    folders = [package / "weights", *(path for path in named if path.is_dir())]
    folders += [path for path in search_dirs(None)[1:] if path.is_dir()]
    files = [path for path in named if path.is_file()]
    # Calibration and class statistics lie beside the weights.
    kinds = ("calibration", "statistics")
    files += [beside for path in files for kind in kinds for beside in sorted(path.parent.glob(f"{glob.escape(path.stem)}.{kind}.*"))]
    files += [path for folder in folders for path in sorted(folder.rglob("*"))]
    for path in files:
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(STAMP_BYTES))
                file.seek(max(0, path.stat().st_size - STAMP_BYTES))
                digest.update(file.read())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _code_stamp() -> bytes:
    """A hash of this package's code, as it was when it was first asked for."""
    digest = hashlib.sha256()
    for path in sorted(Path(ros2_ood_seg.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def _save(folder: Path, name: str, maps: Maps, profile: str) -> None:
    np.save(folder / "score" / f"{name}.npy", maps.score)
    np.save(folder / "refined" / f"{name}.npy", maps.refined)
    (folder / "instances" / f"{name}.json").write_text(json.dumps(instances_json(maps, profile)), encoding="utf-8")


def _picture(frame: LabelledImage, result: FrameResult) -> bytes:
    """Instances over the image, the ground truth as a white outline, as a small JPEG."""
    height, width = frame.label.shape
    scale = min(1.0, PICTURE_WIDTH_PX / width)
    small = (round(width * scale), max(1, round(height * scale)))
    image = cv2.resize(frame.image, small, interpolation=cv2.INTER_AREA)
    overlay = draw_overlay(image, _shrunk(result.instances.to("cpu"), small[::-1]))
    contours, _ = cv2.findContours((frame.label == 1).view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(overlay, [(contour * scale).astype(np.int32) for contour in contours], -1, (255, 255, 255), 1)
    done, data = cv2.imencode(".jpg", overlay[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return bytes(data) if done else b""


def _shrunk(found: Instances, shape_hw: tuple[int, int]) -> Instances:
    """Instances of a smaller image; a pixel of it belongs to a mask when any pixel there did, so that small ones stay visible."""
    if tuple(found.masks.shape[1:]) == shape_hw:
        return found
    height, width = found.masks.shape[1:]
    masks = np.zeros((len(found), *shape_hw), bool)
    for small, mask, box in zip(masks, found.masks.numpy(), found.boxes_xyxy.numpy(), strict=True):
        window = box_slice(box)
        rows, columns = np.nonzero(mask[window])
        small[(rows + window[0].start) * shape_hw[0] // height, (columns + window[1].start) * shape_hw[1] // width] = True
    tight, area = boxes_from_masks(torch.from_numpy(masks))
    return replace(found, masks=torch.from_numpy(masks), boxes_xyxy=tight, area_px=area)


def evaluate_frames(
    frames: Iterable[LabelledImage], pipeline: Pipeline, work: Path, options: Options | None = None, dataset: str = "frames"
) -> dict[str, Any]:
    """Evaluates frames that come one by one, for example from a bag.

    Args:
        frames: With ground truth and unique names.
        pipeline: What is evaluated.
        work: Folder for intermediate results, emptied first and removed at the end.
        options: How; by default exact.
        dataset: Name for the report.

    Returns:
        The report, see :meth:`Evaluation.report`.

    Raises:
        InputError: No frames, or one that cannot be used.
    """
    evaluation = Evaluation(pipeline, work, options or Options(), {"started": time.time()})
    for frame in frames:
        evaluation.add(frame)
    report, _ = evaluation.report(dataset)
    evaluation.finish()
    return report


def load_frames(dataset: DataSet, sources: Iterable[Source], ahead: bool) -> Iterator[tuple[LabelledImage, float]]:
    """Frames and the milliseconds that reading each took; with ``ahead`` the next one is read while the caller works on this one."""

    def load(source: Source) -> tuple[LabelledImage, float]:
        start = time.perf_counter()
        frame = dataset.load(source)
        return frame, (time.perf_counter() - start) * 1e3

    if not ahead:
        yield from map(load, sources)
        return
    with ThreadPoolExecutor(1, "load") as reader:
        reading: Future[tuple[LabelledImage, float]] | None = None
        for source in sources:
            before, reading = reading, reader.submit(load, source)
            if before is not None:
                yield before.result()
        if reading is not None:
            yield reading.result()


def source_stamps(dataset: DataSet, external: Path | None = None) -> dict[str, list[list[str | int]]]:
    """The files of each frame by size and time, to notice a change between two runs.

    Args:
        dataset: The frames.
        external: Folder of score maps, or None.
    """
    stamps: dict[str, list[list[str | int]]] = {}
    for source in dataset.sources:
        maps = None if external is None else external / f"{source.name}.npy"
        paths = [path for path in (source.image, source.label, source.instances, maps) if path is not None and path.is_file()]
        stamps[source.name] = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return stamps
