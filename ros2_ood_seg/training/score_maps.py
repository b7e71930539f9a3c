"""Score maps with boxes, computed once with a frozen scorer: what a prompt generator is trained on (S2M Eqs. 5-6)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from tqdm import tqdm

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.scorers.base import Scorer
from ros2_ood_seg.training.loop import changes
from ros2_ood_seg.training.outlier_exposure import RoadSample
from ros2_ood_seg.training.road_images import IGNORE
from ros2_ood_seg.types import Calibration

SHARD_SIZE = 50
"""Maps per file; an interrupted run goes on after the last complete file."""
_INDEX = "index.json"
_NONE: Mapping[str, Any] = MappingProxyType({})


class SampleSource(Protocol):
    """Samples by number; :class:`~ros2_ood_seg.training.outlier_exposure.OutlierExposure` is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RoadSample: ...


@dataclass(frozen=True)
class LabelledMap:
    """A score map with the boxes of the objects in it.

    Args:
        scores: (h, w) float32, the scorer's own range.
        boxes_xyxy: (N, 4) float32 px of ``scores``, maximum exclusive.
        peaks: (N,) float32 in [0, 1], the highest calibrated score on each object.
    """

    scores: NDArray[np.float32]
    boxes_xyxy: NDArray[np.float32]
    peaks: NDArray[np.float32]


def score_sample(sample: RoadSample, scorer: Scorer, width: int, device: torch.device) -> tuple[LabelledMap, Calibration]:
    """Scores one image and scales map and boxes. Pixels that do not count as either get the lowest score: no box is to be found there.

    Args:
        sample: Image, instances and their boxes, and what does not count.
        scorer: Frozen.
        width: Width of the stored map, px.
        device: Where the scorer runs.
    """
    score_map = scorer(torch.from_numpy(sample.image).to(device))
    instances = torch.from_numpy(sample.instances.astype(np.int64)).to(device)
    peaks = torch.zeros(len(sample.boxes_xyxy) + 1, device=device)
    peaks.scatter_reduce_(0, instances.ravel(), score_map.calibrated().ravel(), "amax")
    height = max(1, round(score_map.shape_hw[0] * width / score_map.shape_hw[1]))
    uncounted = torch.from_numpy(sample.anomaly == IGNORE).to(device)
    counted = score_map.scores.masked_fill(uncounted, score_map.calibration.raw[0])
    scores = F.interpolate(counted[None, None], size=(height, width), mode="bilinear", antialias=True)[0, 0]
    scale = np.array([width / score_map.shape_hw[1], height / score_map.shape_hw[0]] * 2, np.float32)
    return LabelledMap(scores.cpu().numpy(), sample.boxes_xyxy * scale, peaks[1:].cpu().numpy()), score_map.calibration


def check_recipe(folder: Path, recipe: Mapping[str, Any], defaults: Mapping[str, Any] = _NONE) -> None:
    """Refuses a folder whose maps were made in another way; one without maps is fine.

    Args:
        folder: See :func:`write_score_maps`.
        recipe: JSON values that say how the samples are made and scored.
        defaults: What those fields were that older folders do not name.

    Raises:
        InputError: The folder holds maps of another recipe, or a damaged index.
    """
    if (folder / _INDEX).is_file():
        different = changes(_read_index(folder)["recipe"], _json(recipe), _json(defaults))
        if different:
            raise InputError(
                f"score maps in '{folder}' were made by another recipe ({'; '.join(different)}): choose another folder or delete it"
            )


def write_score_maps(
    folder: Path,
    source: SampleSource,
    scorer: Scorer,
    width: int,
    recipe: Mapping[str, Any],
    device: torch.device,
    *,
    defaults: Mapping[str, Any] = _NONE,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Computes the maps that are not there yet.

    Args:
        folder: One file per :data:`SHARD_SIZE` maps, float16, and an index with scorer calibration and ``recipe``.
        source: All samples; nothing but their maps and boxes is kept.
        scorer: Frozen.
        width: Width of the stored maps, px.
        recipe: JSON values that say how the samples were made; a folder made otherwise is refused.
        device: Where the scorer runs.
        defaults: See :func:`check_recipe`.
        part: ``(k, n)``: only files k, k + n, ...; with n processes, process k makes these.

    Raises:
        InputError: The folder holds maps of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / _INDEX
    recipe = _json({**recipe, "width": width, "count": len(source)})
    check_recipe(folder, recipe, defaults)
    shards = [range(start, min(start + SHARD_SIZE, len(source))) for start in range(0, len(source), SHARD_SIZE)]
    mine = [number for number in range(part[0], len(shards), part[1]) if not _shard(folder, number).is_file()]
    for number in tqdm(mine, desc="score maps", unit="file", disable=part[0] > 0 or not mine):
        path, members = _shard(folder, number), shards[number]
        labelled = [score_sample(source[k], scorer, width, device) for k in members]
        if not index.is_file():
            unfinished = path.with_suffix(".index")
            unfinished.write_text(json.dumps({"recipe": recipe, "calibration": labelled[0][1].to_dict()}, indent=1), encoding="utf-8")
            unfinished.replace(index)
        maps = [entry for entry, _ in labelled]
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(
                file,
                scores=np.stack([m.scores for m in maps]).astype(np.float16),
                boxes=np.concatenate([m.boxes_xyxy for m in maps]),
                peaks=np.concatenate([m.peaks for m in maps]),
                counts=np.array([len(m.boxes_xyxy) for m in maps]),
            )
        partial.replace(path)


class ScoreMaps:
    """Labelled maps in memory.

    Args:
        scores: (N, h, w) float16 or float32, the scorer's own range.
        boxes_xyxy: (n, 4) float32 px per map.
        peaks: (n,) float32 per map.
        calibration: The scorer's.
    """

    def __init__(
        self,
        scores: NDArray[np.floating[Any]],
        boxes_xyxy: Sequence[NDArray[np.float32]],
        peaks: Sequence[NDArray[np.float32]],
        calibration: Calibration,
    ) -> None:
        self.scores = scores
        self.boxes_xyxy = list(boxes_xyxy)
        self.peaks = list(peaks)
        self.calibration = calibration

    @classmethod
    def read(cls, folder: Path) -> ScoreMaps:
        """Reads what :func:`write_score_maps` wrote, as far as it got.

        Raises:
            InputError: No folder, nothing in it, or a damaged file.
        """
        calibration = Calibration.from_dict(_read_index(folder)["calibration"])
        scores, boxes, peaks = [], [], []
        for path in sorted(folder.glob("*.npz")):
            shard = _read_shard(path)
            splits = np.cumsum(shard["counts"])[:-1]
            scores.append(shard["scores"])
            boxes += np.split(shard["boxes"], splits)
            peaks += np.split(shard["peaks"], splits)
        if not scores:
            raise InputError(f"folder '{folder}' holds no score maps (*.npz)")
        return cls(np.concatenate(scores), boxes, peaks, calibration)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: int) -> LabelledMap:
        return LabelledMap(self.scores[index].astype(np.float32), self.boxes_xyxy[index], self.peaks[index])

    def split(self, held_out: int) -> tuple[ScoreMaps, ScoreMaps]:
        """All but the last ``held_out`` maps, and those."""
        cut = len(self) - held_out
        if held_out < 0 or cut < 1:
            raise InputError(f"{held_out} of {len(self)} score maps cannot be held out: allowed are 0 to {len(self) - 1}")
        first, second = slice(None, cut), slice(cut, None)
        return tuple(  # type: ignore[return-value]
            ScoreMaps(self.scores[part], self.boxes_xyxy[part], self.peaks[part], self.calibration) for part in (first, second)
        )


def _shard(folder: Path, number: int) -> Path:
    return folder / f"maps_{number:05d}.npz"


def _read_shard(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path) as shard:
            return {name: shard[name] for name in ("scores", "boxes", "peaks", "counts")}
    # Damaged bytes can raise nearly anything: zlib.error, EOFError, TokenError, NotImplementedError and more.
    except Exception as error:
        raise InputError(f"score maps '{path}' cannot be read, delete the file to have it made anew: {error}") from error


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a JSON file."""
    return dict(json.loads(json.dumps(dict(values))))


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / _INDEX).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"folder '{folder}' holds no score maps: {error}") from error
