"""Image in, scored anomaly instances out.

image -> scorer -> score map -> prompt generators -> prompts -> segmenter -> masks -> fusion -> instances, refined map
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor

from ros2_ood_seg.config import PipelineConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.fusion import FUSIONS
from ros2_ood_seg.prompts import BOX_PROMPTS, POINT_PROMPTS
from ros2_ood_seg.registry import Registry
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.segmenters import SEGMENTERS
from ros2_ood_seg.tracking.iou import IoUTracker
from ros2_ood_seg.types import FrameResult, Prompts

if TYPE_CHECKING:
    from ros2_ood_seg.fusion.base import Fusion
    from ros2_ood_seg.prompts.base import PromptGenerator
    from ros2_ood_seg.scorers.base import Scorer
    from ros2_ood_seg.segmenters.base import PromptableSegmenter

MIN_SIDE_PX = 16
MAX_SIDE_PX = 16384
MAX_TALLNESS = 8
"""Height over width: networks see pictures at a fixed width, so that a very tall one would need any amount of memory."""


class Pipeline:
    """Runs the stages that a configuration names, on one device.

    Not thread-safe: one pipeline serves one stream of frames.

    Args:
        config: All settings.
        reuse: A pipeline whose loaded stages are taken over wherever their settings are the same.

    Raises:
        InputError: An unknown stage, missing weights, a device that is not there; the message says what is allowed.
    """

    config: PipelineConfig
    runtime: Runtime
    tracker: IoUTracker

    def __init__(self, config: PipelineConfig, reuse: Pipeline | None = None) -> None:
        tracker = reuse.tracker if reuse is not None else None
        if reuse is not None and reuse.config.runtime != config.runtime:
            reuse = None
        old = reuse.config if reuse is not None else None
        check_stages(config)
        boxes, points = config.prompts.boxes, config.prompts.points
        self.config = config
        self.runtime = reuse.runtime if reuse is not None else Runtime.from_config(config.runtime)

        def stage(registry: Registry, name: str, section: BaseModel, before: BaseModel | None, loaded: Any) -> Any:
            return loaded if before == section else registry.get(name)(section, self.runtime)

        self.scorer: Scorer = stage(SCORERS, config.scorer.name, config.scorer, old and old.scorer, reuse and reuse.scorer)
        self.box_prompts: PromptGenerator | None = None
        if boxes.method != "none":
            self.box_prompts = stage(BOX_PROMPTS, boxes.method, boxes, old and old.prompts.boxes, reuse and reuse.box_prompts)
        self.point_prompts: PromptGenerator | None = None
        if points.method != "none":
            self.point_prompts = stage(POINT_PROMPTS, points.method, points, old and old.prompts.points, reuse and reuse.point_prompts)
        self.segmenter: PromptableSegmenter = stage(
            SEGMENTERS, config.segmenter.name, config.segmenter, old and old.segmenter, reuse and reuse.segmenter
        )
        self.fusion: Fusion = stage(FUSIONS, config.fusion.name, config.fusion, old and old.fusion, reuse and reuse.fusion)
        self._ignore = _read_ignore_mask(config.runtime.ignore_mask, self.runtime.device)
        # Track ids go on: a new tracker would give numbers of objects that are still there to others. Last, because the pipeline
        # that it is taken from stays in use when this one cannot be made.
        self.tracker = tracker or IoUTracker(config.tracking)
        self.tracker.configure(config.tracking)

    @classmethod
    def from_config(cls, config: PipelineConfig) -> Pipeline:
        """The pipeline of these settings; same as calling the class."""
        return cls(config)

    @property
    def prompt_generators(self) -> tuple[PromptGenerator, ...]:
        """The generators that are on, boxes before points."""
        return tuple(generate for generate in (self.box_prompts, self.point_prompts) if generate is not None)

    def run(self, image: NDArray[np.uint8] | Tensor, external: NDArray[np.floating[Any]] | Tensor | None = None) -> FrameResult:
        """Finds the anomalies in one image.

        Args:
            image: (H, W, 3) uint8 RGB, sides of 16 to 16384 px, at most 8 times as high as wide.
            external: (h, w) score map from elsewhere, only with the scorer ``external``.

        Returns:
            Instances, maps and prompts on the pipeline's device, and the time of each stage in milliseconds.

        Raises:
            InputError: The image or the external map cannot be used; the pipeline is as good as new for the next frame.
        """
        timings: dict[str, float] = {}
        start = time.perf_counter()
        with torch.inference_mode():
            with self._timed("upload", timings):
                pixels = _check_image(image).to(self.runtime.device)
                outside = None if external is None else _as_scores(external).to(self.runtime.device)
                ignore = self.ignore_for(int(pixels.shape[0]), int(pixels.shape[1]))
            with self._timed("score", timings):
                score_map = self.scorer(pixels, outside)
            with self._timed("prompt", timings):
                prompts = Prompts.empty(self.runtime.device)
                for generate in self.prompt_generators:
                    prompts = prompts.merged(generate(score_map, ignore))
            with self._timed("segment", timings):
                masks = self.segmenter(pixels, prompts)
            with self._timed("fuse", timings):
                fused = self.fusion(score_map, prompts, masks, ignore)
            instances = fused.instances
            if self.config.tracking.enabled:
                with self._timed("track", timings):
                    instances = self.tracker.update(instances)
        timings["total"] = (time.perf_counter() - start) * 1e3
        config = self.config
        return FrameResult(instances, score_map, prompts, fused.refined, timings, config.profile, config.fusion.min_area_px)

    def warm_up(self, height: int, width: int) -> None:
        """Runs every network once on an empty image, so that the first real frame is not slow.

        Args:
            height: Of the image, px; with an ignore mask it has that one's size, which is the camera's.
            width: The same.
        """
        if self._ignore is not None:
            height, width = (int(side) for side in self._ignore.shape)
        image = torch.zeros((height, width, 3), dtype=torch.uint8, device=self.runtime.device)
        if self.config.scorer.name != "external":
            self.run(image)
        box = torch.tensor([[width * 0.25, height * 0.25, width * 0.75, height * 0.75]], device=self.runtime.device)
        prompts = Prompts(box, box.new_ones(1), box[:, :2] * 2.0)
        with torch.inference_mode():
            self.segmenter(image, prompts)
        self.reset()

    def reset(self) -> None:
        """Forgets earlier frames: call it before another stream; tracks are numbered from 1 again."""
        self.tracker.reset()

    def forget(self) -> None:
        """The same where the stream goes on, as after a jump of time: no number of a track is used again."""
        self.tracker.forget()

    @contextmanager
    def _timed(self, stage: str, timings: dict[str, float]) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.runtime.synchronize()
        timings[stage] = (time.perf_counter() - start) * 1e3

    def ignore_for(self, height: int, width: int) -> Tensor | None:
        """(H, W) bool on the device, True where nothing is to be found in images of this size; None for nowhere.

        Raises:
            InputError: The ignore mask is of another size.
        """
        if self._ignore is not None and tuple(self._ignore.shape) != (height, width):
            own_height, own_width = self._ignore.shape
            raise InputError(
                f"ignore mask '{self.config.runtime.ignore_mask}' is {own_width}x{own_height} px, the image is {width}x{height}"
            )
        return self._ignore


def _as_scores(external: NDArray[np.floating[Any]] | Tensor) -> Tensor:
    # torch takes neither negative strides nor another byte order.
    return external.float() if isinstance(external, Tensor) else torch.from_numpy(np.ascontiguousarray(external, dtype=np.float32))


def check_stages(config: PipelineConfig) -> None:
    """Looks for what keeps a pipeline of these settings from being made, without loading anything.

    Raises:
        InputError: An unknown stage, or no prompts at all.
    """
    boxes, points = config.prompts.boxes.method, config.prompts.points.method
    if boxes == points == "none":
        raise InputError("prompts.boxes.method and prompts.points.method are both 'none': one of them has to generate prompts")
    named = ((SCORERS, config.scorer.name), (SEGMENTERS, config.segmenter.name), (FUSIONS, config.fusion.name))
    prompts = ((BOX_PROMPTS, boxes), (POINT_PROMPTS, points))
    for registry, name in (*named, *(pair for pair in prompts if pair[1] != "none")):
        registry.check(name)


def _check_image(image: NDArray[np.uint8] | Tensor) -> Tensor:
    if not isinstance(image, Tensor):
        if not isinstance(image, np.ndarray):
            raise InputError(f"image must be a numpy array or a tensor, got {type(image).__name__}")
        if image.dtype != np.uint8:
            raise InputError(f"image must be uint8, got {image.dtype}")
        image = torch.from_numpy(np.ascontiguousarray(image))
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"image must be (H, W, 3) uint8 RGB, got shape {tuple(image.shape)} of {image.dtype}")
    if not all(MIN_SIDE_PX <= side <= MAX_SIDE_PX for side in image.shape[:2]):
        raise InputError(f"image is {image.shape[1]}x{image.shape[0]} px, its sides must be {MIN_SIDE_PX} to {MAX_SIDE_PX} px")
    if image.shape[0] > MAX_TALLNESS * image.shape[1]:
        raise InputError(f"image is {image.shape[1]}x{image.shape[0]} px, it must be at most {MAX_TALLNESS} times as high as wide")
    return image.contiguous()


def _read_ignore_mask(path: str, device: torch.device) -> Tensor | None:
    if not path:
        return None
    mask = cv2.imread(path, cv2.IMREAD_UNCHANGED) if Path(path).is_file() else None
    if mask is None:
        raise InputError(f"ignore mask '{path}' does not exist or is no picture")
    if mask.ndim == 3:
        mask = mask[..., :3].max(axis=2)
    return torch.from_numpy(np.ascontiguousarray(mask > 0)).to(device)
