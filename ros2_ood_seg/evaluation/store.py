"""Finished frames on disk, so that an interrupted evaluation goes on where it stopped and memory does not grow."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation import component, instance, s2m
from ros2_ood_seg.evaluation.counts import CountsWriter
from ros2_ood_seg.evaluation.measure import FrameMeasure, MapCounts, Truth
from ros2_ood_seg.evaluation.pixel import ScoreCounts

COUNTS = ("score_1", "score_0", "refined_1", "refined_0")
MAPS = ("refined_map", "label_map")
MARKS = frozenset(("part", "group"))
"""Files that mark a frame as finished."""
KINDS = MARKS | frozenset(("picture", "tmp", CountsWriter.SUFFIX, *MAPS, *COUNTS, *(f"{key}_counts" for key in COUNTS)))
_SOURCES = "sources.json"


class PartStore:
    """A folder of finished frames.

    Args:
        folder: Made when missing. Parts made with another ``fingerprint`` are thrown away.
        fingerprint: Everything the parts depend on.
        join: Another process made the folder: nothing is thrown away.

    Raises:
        InputError: The folder exists and was not made by this class; or, with ``join``, it is of another fingerprint.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], join: bool = False) -> None:
        self.folder = folder
        stamp = json.dumps(fingerprint, sort_keys=True)
        path = folder / "fingerprint.json"
        same = path.is_file() and path.read_text(encoding="utf-8") == stamp
        if join and not same:
            raise InputError(f"'{folder}' belongs to an evaluation with other code, weights, settings or data, or is not visible here")
        if folder.exists() and not path.is_file():
            raise InputError(
                f"'{folder}' is needed for intermediate results but was made by something else: remove it or name another output"
            )
        if not same:
            self.clear()
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(stamp, encoding="utf-8")

    def clear(self) -> None:
        """Removes the folder and what this class wrote into it."""
        if not self.folder.is_dir():
            return
        # What marks a frame as finished goes first: when this is interrupted, the next run must not count on the rest.
        for kinds in (MARKS, KINDS):
            for path in self.folder.iterdir():
                if path.suffix[1:] in kinds:
                    path.unlink()
        # The fingerprint goes last: it is what marks the folder as ours.
        for name in (_SOURCES, "fingerprint.json"):
            (self.folder / name).unlink(missing_ok=True)
        # What someone else put there stays.
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def keep(self, stamps: Mapping[str, Any]) -> None:
        """Forgets finished frames whose files are others than when they were measured.

        Args:
            stamps: What the result of each frame depends on, by its name; plain data.
        """
        path = self.folder / _SOURCES
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        now = {name: json.loads(json.dumps(stamp)) for name, stamp in stamps.items()}
        for name, stamp in now.items():
            if before.get(name) != stamp:
                self._file(name, "part").unlink(missing_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps({**before, **now}), encoding="utf-8")
        partial.replace(path)

    def has(self, name: str) -> bool:
        """Whether the frame is finished."""
        return self._file(name, "part").is_file()

    def _file(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}.{kind}"

    def save_pixels(
        self, name: str, score: MapCounts, refined: MapCounts, maps: tuple[NDArray[np.float32], NDArray[np.uint8]] | None = None
    ) -> None:
        """Writes what is large.

        Args:
            name: Of the frame.
            score: Sorted scores of the score map.
            refined: Sorted scores of the refined map.
            maps: Refined map and labels for a second look, or None to keep none.
        """
        if maps is not None:
            self._put(name, MAPS[0], maps[0])
            self._put(name, MAPS[1], maps[1])
        for key, counts in zip(COUNTS, (*score, *refined), strict=True):
            self._put(name, key, counts.values)
            if counts.counts is not None:
                self._put(name, f"{key}_counts", counts.counts)
            else:
                self._file(name, f"{key}_counts").unlink(missing_ok=True)

    def save(self, figures: FrameMeasure, picture: bytes) -> None:
        """Writes the rest of a frame and with it marks it as finished, at once.

        Args:
            figures: Of the frame.
            picture: JPEG of the result, for the report.
        """
        self._file(figures.name, "picture").write_bytes(picture)
        arrays: dict[str, NDArray[Any]] = {"masks": figures.masks.table(), "masks_code": figures.masks_code.table()}
        for key, group in (("component", figures.components), ("instance", figures.instances), ("truth", figures.truth)):
            arrays.update({f"{key}.{name}": value for name, value in vars(group).items()})
        head = {
            "name": figures.name,
            "height": figures.height,
            "width": figures.width,
            "score_range": figures.score_range,
            "timings_ms": dict(figures.timings_ms),
            "outside_ms": dict(figures.outside_ms),
        }
        arrays["head"] = np.array(json.dumps(head))
        temporary = self._file(figures.name, "tmp")
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        temporary.rename(self._file(figures.name, "part"))

    def save_group(self, name: str, data: Mapping[str, Any]) -> None:
        """Marks a group of frames, such as a recording, as finished, at once.

        Args:
            name: Of the group.
            data: Plain, what has to be known of it beside its frames.
        """
        temporary = self._file(name, "tmp")
        temporary.write_text(json.dumps(data), encoding="utf-8")
        temporary.rename(self._file(name, "group"))

    def group(self, name: str) -> dict[str, Any] | None:
        """What :meth:`save_group` was given; None when the group is not finished."""
        path = self._file(name, "group")
        if not path.is_file():
            return None
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return data

    def _put(self, name: str, kind: str, array: NDArray[Any]) -> None:
        with self._file(name, kind).open("wb") as file:
            np.save(file, array)

    def _get(self, name: str, kind: str) -> NDArray[Any]:
        """An array that is read from disk where it is looked at: a search touches a few pages only."""
        return np.asarray(np.load(self._file(name, kind), mmap_mode="r"))

    def load(self, name: str) -> FrameMeasure:
        """The small part of a finished frame."""
        with np.load(self._file(name, "part")) as part:
            head = json.loads(str(part["head"]))
            groups: dict[str, dict[str, NDArray[Any]]] = {"component": {}, "instance": {}, "truth": {}}
            for key in part.files:
                group, _, name_in_group = key.partition(".")
                if name_in_group:
                    groups[group][name_in_group] = part[key]
            sweeps = [s2m.MaskSweep.from_table(part[key]) for key in ("masks", "masks_code")]
        return FrameMeasure(
            head["name"],
            head["height"],
            head["width"],
            tuple(head["score_range"]),
            sweeps[0],
            sweeps[1],
            component.ComponentMatch(**groups["component"]),
            instance.InstanceMatch(**groups["instance"]),
            Truth(**groups["truth"]),
            head["timings_ms"],
            head["outside_ms"],
        )

    def counts(self, name: str, kind: str, label: int) -> ScoreCounts:
        """Sorted scores of a finished frame.

        Args:
            name: Frame.
            kind: ``score`` or ``refined``.
            label: 1 for the anomalous pixels, 0 for the normal ones.
        """
        key = f"{kind}_{label}"
        counted = self._file(name, f"{key}_counts").is_file()
        return ScoreCounts(self._get(name, key), self._get(name, f"{key}_counts") if counted else None)

    def maps(self, name: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Refined map and label map of a finished frame, if they were kept."""
        refined, label = (self._get(name, kind) for kind in MAPS)
        return refined, label

    def picture(self, name: str) -> bytes:
        """JPEG of a finished frame's result."""
        return self._file(name, "picture").read_bytes()
