from __future__ import annotations

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

from diagnostic_msgs.msg import DiagnosticStatus

from ros2_ood_seg.ros import diagnostics
from ros2_ood_seg.ros.diagnostics import FrameStatistics


def test_an_error_is_forgotten_and_a_failure_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = FrameStatistics()
    statistics.failed("weights are missing")
    status = statistics.status("node", "unconfigured", {})
    assert (status.level, status.message) == (DiagnosticStatus.ERROR, "weights are missing")
    monkeypatch.setattr(diagnostics, "_ERROR_MEMORY_S", 0.0)
    status = statistics.status("node", "unconfigured", {})
    assert (status.level, status.message) == (DiagnosticStatus.OK, "unconfigured, 0.0 Hz")
    assert {entry.key: entry.value for entry in status.values}["last error"] == "weights are missing"
    status = statistics.status("node", "unconfigured", {}, "cannot configure")
    assert (status.level, status.message) == (DiagnosticStatus.ERROR, "cannot configure")
    assert statistics.status("node", "active", {}, "not taken").level == DiagnosticStatus.WARN
