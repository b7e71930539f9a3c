"""What trainings share around their own step: resuming, checkpoints, log, curve, progress, and a look at the loss.

A training makes its parts (networks, optimizer, averages), opens a :class:`TrainingLoop` on them, and gives it the batches from
:attr:`TrainingLoop.done` on, the step, and what to do at a checkpoint. When batch and step k depend on (recipe, k) alone, a resumed
run equals one that was never interrupted, its log included.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import pickle
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ros2_ood_seg.errors import InputError

LOG_EVERY = 20
"""Iterations whose mean makes one row of the log."""
_Batch = TypeVar("_Batch")


class Stateful(Protocol):
    """What a checkpoint can hold: networks, optimizers, schedules, averaged models."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Puts back what :meth:`state_dict` gave."""
        ...


class Recipe(Protocol):
    """A frozen dataclass of plain values, all with defaults; it may hold further such dataclasses."""

    @property
    def iterations(self) -> int:
        """Steps in all."""
        ...

    @property
    def learning_rate(self) -> float:
        """The greatest one, for messages."""
        ...


class CsvLog:
    """A CSV file whose first column is the iteration.

    Args:
        path: The file; what it holds up to iteration ``done`` is kept, what was logged after it will be learnt and logged once more.
        columns: The others.
        done: Iterations done.
    """

    def __init__(self, path: Path, columns: Sequence[str], done: int) -> None:
        self.path = path
        self._columns = ("iteration", *columns)
        kept = [row for row in self.rows() if int(float(row["iteration"])) <= done] if path.is_file() else []
        partial = path.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        partial.replace(path)

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Adds a row; columns without a finite value stay empty."""
        known = {name: f"{value:.5g}" for name, value in values.items() if math.isfinite(value)}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([iteration, *(known.get(name, "") for name in self._columns[1:])])

    def rows(self) -> list[dict[str, str]]:
        """All rows by column name."""
        with self.path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def plot(self, path: Path, panels: Sequence[Sequence[str]]) -> None:
        """Draws columns over the iterations, one axis per panel; the first one is logarithmic."""
        from matplotlib.figure import Figure

        rows = self.rows()
        figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, names in zip(axes, panels, strict=True):
            for name in names:
                points = [(int(float(row["iteration"])), float(row[name])) for row in rows if row[name]]
                if points:
                    axis.plot(*zip(*points, strict=True), label=name)
            axis.set_xlabel("iteration")
            axis.grid(alpha=0.3)
            if axis.lines:
                # Above the panel, where it hides no curve.
                axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize="small")
        axes[0].set_yscale("log")
        figure.savefig(path, dpi=110)


class TrainingLoop:
    """Runs the steps of a training that may be interrupted at any time and goes on from its last checkpoint.

    Args:
        output: Folder of the run, made if missing, for checkpoint, ``log.csv`` and ``curve.png``.
        recipe: All that the result depends on.
        parts: What a checkpoint holds, by name; loaded from it when there is one.
        title: Said before the progress bar.
        panels: Columns of the log by the axis that they are drawn on. The first are the losses: one is ``total``, or they sum up to it.
        may_change: Fields of ``recipe`` that a resumed run may change.
        checkpoint_every: Iterations between checkpoints, None for ``checkpoint_minutes``; there always is one at the end.
        checkpoint_minutes: Time between checkpoints, used without ``checkpoint_every``.
        checkpoint_name: File name in ``output``.
        writes: Whether this process writes and shows anything; under ``torchrun`` only the first one does.
        origin: What the training begins from and learns from beside its recipe, as :func:`file_stamp` of the first weights.

    Raises:
        InputError: The checkpoint is damaged, of another recipe, origin or network, or further than the recipe goes.
    """

    def __init__(
        self,
        output: Path,
        recipe: Recipe,
        parts: Mapping[str, Stateful],
        *,
        title: str,
        panels: Sequence[Sequence[str]],
        may_change: Collection[str] = (),
        checkpoint_every: int | None = None,
        checkpoint_minutes: float = 5.0,
        checkpoint_name: str = "checkpoint.pt",
        writes: bool = True,
        origin: Mapping[str, str] | None = None,
    ) -> None:
        self._origin = dict(origin or {})
        self.done = 0
        """Iterations done."""
        self.seconds = 0.0
        """Time spent in the steps and checkpoints of all runs up to here."""
        self._recipe, self._parts, self._title = recipe, parts, title
        self._panels = panels
        self._every, self._minutes, self._writes = checkpoint_every, checkpoint_minutes, writes
        self._recent: list[dict[str, float]] = []
        self._checkpoint = output / checkpoint_name
        output.mkdir(parents=True, exist_ok=True)
        if self._checkpoint.is_file():
            self._resume(may_change)
        self._log = CsvLog(output / "log.csv", [name for names in panels for name in names], self.done) if writes else None

    def run(
        self,
        batches: Iterable[_Batch],
        step: Callable[[_Batch], Mapping[str, Tensor]],
        at_checkpoint: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """Runs one step for each batch.

        Args:
            batches: Those of the iterations from :attr:`done` up to the last.
            step: Learns from a batch, see :meth:`descend`; gives scalars for the log. :attr:`done` is its number.
            at_checkpoint: Measures and writes what belongs to a checkpoint, before that itself is written; gives values for the log.
        """
        started = saved_at = time.monotonic()
        before = self.seconds
        total = self._recipe.iterations
        progress = tqdm(batches, total=total, initial=self.done, desc=self._title, mininterval=10.0, disable=not self._writes)
        for batch in progress:
            self._recent.append({name: float(value.detach()) for name, value in step(batch).items()})
            self.done += 1
            if self.done % LOG_EVERY == 0:
                progress.set_postfix(loss=f"{self._log_recent():.3f}", refresh=False)
            due = self.done % self._every == 0 if self._every else time.monotonic() - saved_at >= 60.0 * self._minutes
            if self._log is not None and (due or self.done == total):
                values = at_checkpoint()
                if values:
                    self._log.write(self.done, values)
                self._log.plot(self._checkpoint.with_name("curve.png"), self._panels)
                saved_at = time.monotonic()
                self.seconds = before + saved_at - started
                self._save()

    def descend(self, optimizer: torch.optim.Optimizer, loss: Tensor, clip_norm: float = 0.0) -> None:
        """One step of the optimizer down the gradient of ``loss``, whose norm is clipped unless ``clip_norm`` is 0.

        Raises:
            InputError: The loss is not finite; nothing was changed.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(f"the loss is {value} at iteration {self.done}: lower the learning rate ({self._recipe.learning_rate})")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if clip_norm:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
        optimizer.step()

    def _log_recent(self) -> float:
        """Logs the mean of the steps since the last row, and returns that of the total loss."""
        mean = {name: sum(row[name] for row in self._recent) / len(self._recent) for name in self._recent[0]}
        self._recent = []
        if self._log is not None:
            self._log.write(self.done, mean)
        return mean["total"] if "total" in mean else sum(mean[name] for name in self._panels[0])

    def _save(self) -> None:
        state = {name: part.state_dict() for name, part in self._parts.items()}
        recipe = asdict(self._recipe)  # type: ignore[call-overload]
        progress = {"done": self.done, "seconds": self.seconds, "recent": self._recent, "recipe": recipe, "origin": self._origin}
        partial = self._checkpoint.with_suffix(".partial")
        # Into a file of Python's, so that a full disk is said to be one.
        with partial.open("wb") as file:
            torch.save({**state, **progress}, file)
        partial.replace(self._checkpoint)

    def _resume(self, may_change: Collection[str]) -> None:
        try:
            saved = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise InputError(f"checkpoint '{self._checkpoint}' cannot be read, delete it to start anew: {error}") from error
        defaults = asdict(type(self._recipe)())  # type: ignore[call-overload]
        changed = changes(saved.get("recipe"), asdict(self._recipe), defaults, may_change)  # type: ignore[call-overload]
        if changed:
            raise InputError(f"checkpoint '{self._checkpoint}' is of another recipe ({'; '.join(changed)}): choose another output folder")
        # Checkpoints of earlier versions do not say where they came from.
        others = changes(saved.get("origin") or None, self._origin, self._origin)
        if others:
            raise InputError(
                f"checkpoint '{self._checkpoint}' began from something else ({'; '.join(others)}): choose another output folder"
            )
        try:
            for name, part in self._parts.items():
                part.load_state_dict(saved[name])
            # Prompt generators of the first version counted under another name.
            self.done = int(saved["done"] if "done" in saved else saved["iteration"])
        except (RuntimeError, ValueError, KeyError) as error:
            text = " ".join(str(error).split())[:200]
            raise InputError(f"checkpoint '{self._checkpoint}' is of another network, choose another output folder: {text}") from error
        if self.done > self._recipe.iterations:
            raise InputError(
                f"checkpoint '{self._checkpoint}' has {self.done} iterations behind it, --iterations is {self._recipe.iterations}: "
                "choose another output folder, or no fewer than it has"
            )
        self.seconds = float(saved.get("seconds", 0.0))
        self._recent = list(saved.get("recent", []))


def file_stamp(path: Path | None) -> str:
    """What tells a file from others, wherever it lies: a hash of its content; "none" without one."""
    return "none" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def value_stamp(values: Mapping[str, Any] | None) -> str:
    """As :func:`file_stamp` for JSON values."""
    return "none" if values is None else hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def state_stamp(state: Mapping[str, Tensor] | None) -> str:
    """As :func:`file_stamp` for weights in memory."""
    if state is None:
        return "none"
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def changes(
    before: Mapping[str, Any] | None, now: Mapping[str, Any], defaults: Mapping[str, Any], may_change: Collection[str] = ()
) -> list[str]:
    """The fields in which a recipe differs from a saved one, for people: ``noise 0.01 instead of 0.04``.

    Args:
        before: As saved, nested; a field that is younger than the file is missing and had its default. None: nothing is known.
        now: As it is to be.
        defaults: Of the fields that may be missing.
        may_change: Fields that do not count.
    """
    if before is None:
        return []
    old, new = {**_flat(defaults), **_flat(before)}, _flat(now)
    return [f"{key} {old.get(key)} instead of {new[key]}" for key in new if key not in may_change and old.get(key) != new[key]]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
