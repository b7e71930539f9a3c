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
_STALLED_S = 10.0


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
            self._since_s = -math.inf
            self._stages_ms: dict[str, deque[float]] = {}
            self._error = ""
            self._error_s = -np.inf

    def received(self) -> None:
        """An image came in."""
        with self._lock:
            self._counts["received"] += 1
            now_s = time.monotonic()
            if not self._received_s or now_s - self._received_s[-1] > _RATE_WINDOW_S:
                self._since_s = now_s
            self._received_s.append(now_s)

    def replaced(self) -> None:
        """A frame took the place of one that was still waiting, or came after a newer one."""
        with self._lock:
            self._counts["replaced"] += 1

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

    def status(
        self, name: str, state: str, about: Mapping[str, str], failure: str = "", missing: str = "", unheard: str = ""
    ) -> DiagnosticStatus:
        """The diagnostics entry.

        Args:
            name: Full name of the node.
            state: Lifecycle state.
            about: Further entries: profile, device.
            failure: What keeps the node from doing what it was told, until it is mended; other errors are forgotten after a while.
            missing: What images have to come with, to say why none of them is answered.
            unheard: Which publisher of an input does not fit, as long as it is there.
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
            recent_error = failure or (self._error if time.monotonic() - self._error_s < _ERROR_MEMORY_S else unheard)
            # So long ago is the last answer, or the first image after a pause.
            waited_s = time.monotonic() - max([self._since_s, *self._answered_s]) if input_hz else 0.0
            # A pipeline that takes longer than that is slow, not stalled.
            stalled_s = max(_STALLED_S, 3e-3 * max(self._stages_ms.get("total", (0.0,)), default=0.0))
        if torch.cuda.is_initialized() and about.get("device", "").startswith("cuda"):
            values["GPU memory [MiB]"] = f"{torch.cuda.memory_allocated(about['device']) / 2**20:.0f}"
        level, message = DiagnosticStatus.OK, f"{state}, {output_hz:.1f} Hz"
        if state == "active" and waited_s > stalled_s:
            reason = recent_error or missing
            level, message = DiagnosticStatus.ERROR, f"images arrive, none was answered for {waited_s:.0f} s" + f": {reason}" * bool(reason)
        elif recent_error:
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
