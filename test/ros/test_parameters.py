from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

import rclpy
from rcl_interfaces.msg import ParameterType
from rclpy.node import Node
from rclpy.parameter import Parameter

from ros2_ood_seg.config import PipelineConfig, iter_settings, load_profile
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.ros.parameters import NodeConfig, Parameters

KINDS = {
    bool: ParameterType.PARAMETER_BOOL,
    int: ParameterType.PARAMETER_INTEGER,
    float: ParameterType.PARAMETER_DOUBLE,
    str: ParameterType.PARAMETER_STRING,
}
MakeNode = Callable[..., Node]


@pytest.fixture
def make_node(dds: int) -> Iterator[MakeNode]:
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=dds)
    nodes: list[Node] = []

    def make(**overrides: Any) -> Node:
        given = [Parameter(name.replace("__", "."), value=value) for name, value in overrides.items()]
        nodes.append(Node("test_parameters", context=context, parameter_overrides=given, start_parameter_services=False))
        return nodes[-1]

    yield make
    for node in nodes:
        node.destroy_node()
    rclpy.shutdown(context=context)


def test_every_setting_is_a_described_parameter_with_the_profiles_value(make_node: MakeNode) -> None:
    node = make_node(profile="compact_s2m")
    Parameters(node)
    settings = {s.name: s for tree in (load_profile("compact_s2m"), NodeConfig()) for s in iter_settings(tree)}
    for name, setting in settings.items():
        value = "compact_s2m" if name == "profile" else setting.value
        assert node.get_parameter(name).value == value, name
        descriptor = node.describe_parameter(name)
        assert descriptor.type == KINDS[setting.kind]
        assert descriptor.description == setting.description != ""
        bounds = [*descriptor.integer_range, *descriptor.floating_point_range]
        assert len(bounds) == (setting.low is not None or setting.high is not None), name
        if setting.low is not None:
            assert bounds[0].from_value == setting.low
        if setting.high is not None:
            assert bounds[0].to_value == setting.high


def test_the_settings_of_the_node_do_not_hide_those_of_the_pipeline() -> None:
    own = {setting.name.split(".")[0] for setting in iter_settings(NodeConfig())}
    assert own & {setting.name.split(".")[0] for setting in iter_settings(PipelineConfig())} == {"profile"}


def test_profile_then_overrides(make_node: MakeNode, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: compact_ugains\nprompts:\n  points:\n    count: 7\nfusion:\n  nms_iou: 0.5\n")
    parameters = Parameters(make_node(profile=str(tmp_path / "mine.yaml"), fusion__nms_iou=0.25, weights_dir="/there"))
    config = parameters.pipeline_config
    assert (config.profile, config.prompts.points.count, config.fusion.name, config.fusion.nms_iou) == ("mine", 7, "ugains", 0.25)
    assert config.runtime.weights_dir == "/there"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"profile": "nonsense"}, "unknown profile 'nonsense': use one of compact, "),
        ({"prompts__points__count": 0}, r"'prompts.points.count' must be a whole number, .*1024: .*0"),
        ({"prompts__points__count": "many"}, r"'prompts.points.count' must be a whole number, .*1024: .*many"),
        ({"fusion__nms_iou": 2.0}, r"'fusion.nms_iou' must be a number, .* 1: .*2\.0"),
        ({"fusion__nms_iou": 0.0}, r"'fusion.nms_iou' is 0\.0, allowed: a number, above 0"),
        ({"image_transport": "theora"}, "'image_transport' is 'theora', allowed: one of raw, compressed"),
        ({"scorer__score": "best"}, "'scorer.score' is 'best', allowed: one of default, msp"),
        ({"runtime__device": "tpu"}, "'runtime.device' is 'tpu', allowed: .*cuda"),
        ({"overlay__jpeg_quality": 101}, r"'overlay.jpeg_quality' must be a whole number, .* 100: .*101"),
    ],
)
def test_bad_overrides_are_named(make_node: MakeNode, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Parameters(make_node(**overrides))


def test_live_changes_are_checked_then_taken_over(make_node: MakeNode) -> None:
    node = make_node()
    parameters = Parameters(node)
    before = parameters.pipeline_config
    (result,) = node.set_parameters([Parameter("prompts.points.count", value=12)])
    assert result.successful
    assert parameters.pipeline_config.prompts.points.count == 12
    assert before.prompts.points.count != 12
    (result,) = node.set_parameters([Parameter("overlay.jpeg_quality", value=33)])
    assert parameters.node_config.overlay.jpeg_quality == 33


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("prompts.points.count", 5000, "prompts.points.count out of range. Min: 1, Max: 1024, value: 5000"),
        ("fusion.nms_iou", -0.5, "fusion.nms_iou out of range"),
        ("fusion.nms_iou", "half", "Wrong parameter type"),
        ("fusion.compat", "guess", "'fusion.compat' is 'guess', allowed: one of paper, code"),
        ("scorer.smoothing_px", 4, "'scorer.smoothing_px' is 4, allowed: 0, or an odd number up to 63"),
        ("runtime.device", "cpu", "read-only parameter: runtime.device"),
        ("scorer.weights", "other.safetensors", "read-only parameter: scorer.weights"),
    ],
)
def test_refused_changes_say_why(make_node: MakeNode, name: str, value: Any, reason: str) -> None:
    node = make_node()
    parameters = Parameters(node)
    before = parameters.pipeline_config
    (result,) = node.set_parameters([Parameter(name, value=value)])
    assert not result.successful
    assert reason in result.reason
    assert parameters.pipeline_config == before


def test_changes_that_only_fit_together_are_judged_together(make_node: MakeNode) -> None:
    node = make_node()
    parameters = Parameters(node)
    result = node.set_parameters_atomically([Parameter("prompts.points.count", value=3), Parameter("fusion.compat", value="guess")])
    assert not result.successful
    assert parameters.pipeline_config.prompts.points.count != 3


def test_unknown_overrides_are_pointed_out(make_node: MakeNode, capfd: pytest.CaptureFixture[str]) -> None:
    Parameters(make_node(prompts__points__cuont=3, qos_overrides__x=1))
    output = "".join(capfd.readouterr())
    assert "'prompts.points.cuont' does not exist and is ignored, did you mean prompts.points.count" in output
    assert "qos_overrides" not in output
