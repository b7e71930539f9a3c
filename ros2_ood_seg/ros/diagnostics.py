"""What the node says about itself on /diagnostics."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping

import numpy as np
import torch
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from ros2_ood_seg.runtime import peak_memory_mb

WINDOW = 100
"""Rates and percentiles look at so many of the last frames."""
_RATE_WINDOW_S = 10.0
_ERROR_MEMORY_S = 10.0


class FrameStatistics:
    """Counts frames and remembers their last times; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._counts: Counter[str] = Counter()
            self._received_s: deque[float] = deque(maxlen=WINDOW)
            self._answered_s: deque[float] = deque(maxlen=WINDOW)
            self._stages_ms: dict[str, deque[float]] = {}
            self._error = ""
            self._error_s = -np.inf

    def received(self, replaced: bool) -> None:
        """A frame came in, perhaps in place of one that was still waiting."""
        with self._lock:
            self._counts["received"] += 1
            self._counts["replaced"] += int(replaced)
            self._received_s.append(time.monotonic())

    def answered(self, times_ms: Mapping[str, float]) -> None:
        """A frame's instances went out; ``times_ms`` holds its stages and its latency, NaN where that is not known."""
        with self._lock:
            self._counts["answered"] += 1
            self._answered_s.append(time.monotonic())
            for name, value in times_ms.items():
                if math.isnan(value):
                    continue
                self._stages_ms.setdefault(name, deque(maxlen=WINDOW)).append(value)

    def rejected(self, error: str) -> None:
        """A frame could not be used."""
        with self._lock:
            self._counts["rejected"] += 1
        self.failed(error)

    def failed(self, error: str) -> None:
        """Something else went wrong."""
        with self._lock:
            self._error, self._error_s = error, time.monotonic()

    def counts(self) -> dict[str, int]:
        """Frames received, answered, replaced and rejected."""
        with self._lock:
            return {name: self._counts[name] for name in ("received", "answered", "replaced", "rejected")}

    def status(self, name: str, state: str, about: Mapping[str, str], failure: str = "") -> DiagnosticStatus:
        """The diagnostics entry.

        Args:
            name: Full name of the node.
            state: Lifecycle state.
            about: Further entries: profile, device.
            failure: What keeps the node from doing what it was told, until it is mended; other errors are forgotten after a while.
        """
        counts = self.counts()
        with self._lock:
            input_hz, output_hz = _rate_hz(self._received_s), _rate_hz(self._answered_s)
            values = {"state": state, **about, "input rate [Hz]": f"{input_hz:.2f}", "output rate [Hz]": f"{output_hz:.2f}"}
            values |= {f"frames {what}": str(count) for what, count in counts.items()}
            for stage, times_ms in self._stages_ms.items():
                p50, p95 = np.percentile(times_ms, (50, 95))
                values[f"{stage} p50 [ms]"], values[f"{stage} p95 [ms]"] = f"{p50:.1f}", f"{p95:.1f}"
            values |= {"last error": self._error, "memory, peak [MiB]": f"{peak_memory_mb():.0f}"}
            recent_error = failure or (self._error if time.monotonic() - self._error_s < _ERROR_MEMORY_S else "")
        if torch.cuda.is_initialized():
            values["GPU memory [MiB]"] = f"{torch.cuda.memory_allocated() / 2**20:.0f}"
        level, message = DiagnosticStatus.OK, f"{state}, {output_hz:.1f} Hz"
        if recent_error:
            level, message = (DiagnosticStatus.WARN if state == "active" else DiagnosticStatus.ERROR), recent_error
        elif state == "active" and not input_hz:
            level, message = DiagnosticStatus.WARN, "active, but no images arrive"
        entries = [KeyValue(key=key, value=value) for key, value in values.items()]
        return DiagnosticStatus(level=level, name=name, message=message, hardware_id=about.get("device", ""), values=entries)


def _rate_hz(times_s: deque[float]) -> float:
    now = time.monotonic()
    recent = [t for t in times_s if now - t < _RATE_WINDOW_S]
    if not recent:
        return 0.0
    return len(recent) / max(now - recent[0], 1.0)
