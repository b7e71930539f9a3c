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


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [1000.0]
    monkeypatch.setattr(diagnostics.time, "monotonic", lambda: now_s[0])
    return now_s


@pytest.mark.parametrize("rejected", [False, True])
def test_images_that_nobody_answers_are_an_error(rejected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = clock(monkeypatch)
    statistics = FrameStatistics()
    for _ in range(130):
        now_s[0] += 0.1
        statistics.received()
        if rejected:
            statistics.rejected("the ignore mask is of another size")
    status = statistics.status("node", "active", {}, missing="no map")
    assert status.level == DiagnosticStatus.ERROR
    assert "none was answered for 13 s" in status.message
    assert status.message.endswith("another size" if rejected else "no map")
    statistics.answered({"total": 5.0})
    statistics.received()
    # One bad frame among good ones is a warning as before.
    assert statistics.status("node", "active", {}).level == (DiagnosticStatus.WARN if rejected else DiagnosticStatus.OK)


def test_a_slow_pipeline_is_not_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = clock(monkeypatch)
    statistics = FrameStatistics()
    statistics.answered({"total": 20_000.0})
    for _ in range(250):
        now_s[0] += 0.1
        statistics.received()
    assert statistics.status("node", "active", {}).level == DiagnosticStatus.OK
    for _ in range(400):
        now_s[0] += 0.1
        statistics.received()
    assert statistics.status("node", "active", {}).level == DiagnosticStatus.ERROR


def test_images_after_a_pause_get_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = clock(monkeypatch)
    statistics = FrameStatistics()
    statistics.received()
    statistics.answered({"total": 5.0})
    now_s[0] += 300.0
    assert "no images arrive" in statistics.status("node", "active", {}).message
    statistics.received()
    assert statistics.status("node", "active", {}).level == DiagnosticStatus.OK


def test_every_frame_is_counted_once_as_what_became_of_it() -> None:
    statistics = FrameStatistics()
    for _ in range(7):
        statistics.received()
    statistics.replaced()
    for _ in range(4):
        statistics.answered({})
    for _ in range(2):
        statistics.rejected("of another size")
    statistics.failed("no frame")
    counts = {"received": 7, "answered": 4, "replaced": 1, "rejected": 2}
    assert statistics.counts() == counts
    status = statistics.status("/camera/node", "active", {"device": "cpu"})
    assert (status.name, status.hardware_id, status.message) == ("/camera/node", "cpu", "no frame")
    assert counts == {entry.key.removeprefix("frames "): int(entry.value) for entry in status.values if "frames" in entry.key}


def test_percentiles_are_of_the_times_that_are_known() -> None:
    statistics = FrameStatistics()
    for ms in range(101):
        statistics.answered({"latency": float("nan"), "total": float(ms)})
    statistics.answered({"latency": 7.0, "total": 101.0})
    values = {entry.key: entry.value for entry in statistics.status("node", "active", {}).values}
    # Of the last hundred.
    assert (values["total p50 [ms]"], values["total p95 [ms]"]) == ("51.5", "96.0")
    assert (values["latency p50 [ms]"], values["latency p95 [ms]"]) == ("7.0", "7.0")


def test_rates_are_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = clock(monkeypatch)
    statistics = FrameStatistics()
    for frame in range(100):
        statistics.received()
        if frame % 2:
            statistics.answered({})
        now_s[0] += 0.25
    values = {entry.key: entry.value for entry in statistics.status("node", "active", {}).values}
    assert (values["input rate [Hz]"], values["output rate [Hz]"]) == ("4.00", "2.05")


def test_a_node_that_is_activated_again_is_given_time_for_its_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = clock(monkeypatch)
    statistics = FrameStatistics()
    statistics.received()
    statistics.rejected("of another size")
    now_s[0] += 11.0
    statistics.clear()
    statistics.received()
    status = statistics.status("node", "active", {})
    assert (status.level, statistics.counts()["rejected"]) == (DiagnosticStatus.OK, 0)
    assert {entry.key: entry.value for entry in status.values}["last error"] == ""
