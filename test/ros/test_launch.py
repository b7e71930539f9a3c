"""The launch files and the RViz set-up, against the node they are for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

pytest.importorskip("ros2_ood_seg.msg", reason="the messages are not built (colcon build)")

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import GetParameters
from rclpy.parameter import parameter_value_to_python

from ros2_ood_seg.config import iter_settings
from ros2_ood_seg.ros import qos
from ros2_ood_seg.ros.outputs import IMAGE_TOPICS
from ros2_ood_seg.ros.parameters import NodeConfig

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_FILES = ("ood_seg", "replay")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_launch", ROOT / "launch" / f"{name}.launch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_launch_files_compile(name: str) -> None:
    path = ROOT / "launch" / f"{name}.launch.py"
    compile(path.read_text(), str(path), "exec")


@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_launch_files_describe_what_they_start(name: str) -> None:
    pytest.importorskip("launch_ros", reason="launch is not installed")
    module = load(name)
    declared = module.generate_launch_description().get_launch_arguments()
    # Those of an included file follow.
    own = [name for name, _, _ in module.ARGUMENTS]
    assert [argument.name for argument in declared][: len(own)] == own


@pytest.mark.parametrize(("delay", "seconds"), [("10.0", 10.0), ("0", 0.001)])
def test_a_replay_may_start_at_once(delay: str, seconds: float) -> None:
    pytest.importorskip("launch_ros", reason="launch is not installed")
    from launch.actions import ExecuteProcess

    from launch import LaunchContext

    context = LaunchContext()
    context.launch_configurations.update(bag="drive", image="/camera/image", rate="1.0", delay=delay)
    (player,) = (action for action in load("replay").generate_launch_description().entities if isinstance(action, ExecuteProcess))
    words = ["".join(part.perform(context) for part in word) for word in player.cmd]
    assert words[:4] == ["ros2", "bag", "play", "drive"]
    # ros2 bag play wants a number above 0.
    assert float(words[words.index("--delay") + 1]) == seconds


@pytest.mark.parametrize(("word", "value"), [("true", True), ("True", True), ("1", True), ("false", False), ("0", False)])
def test_switches_are_read_as_conditions_are(word: str, value: bool) -> None:
    pytest.importorskip("launch_ros", reason="launch is not installed")
    from launch_ros.utilities import evaluate_parameters

    from launch import LaunchContext

    module = load("ood_seg")
    context = LaunchContext()
    given = {name: default for name, default, _ in module.ARGUMENTS} | {"autostart": word, "use_sim_time": word, "rviz": "false"}
    context.launch_configurations.update(given)
    node, _ = module.start(context)
    (parameters, *_) = evaluate_parameters(context, node._Node__parameters)
    assert (parameters["autostart"], parameters["use_sim_time"]) == (value, value)


def test_a_switch_that_is_neither_is_refused() -> None:
    pytest.importorskip("launch_ros", reason="launch is not installed")
    from launch.conditions import InvalidConditionExpressionError

    from launch import LaunchContext

    module = load("ood_seg")
    context = LaunchContext()
    context.launch_configurations.update({name: default for name, default, _ in module.ARGUMENTS} | {"autostart": "on"})
    with pytest.raises(InvalidConditionExpressionError, match="on"):
        module.start(context)


def test_rviz_shows_the_nodes_images_with_their_quality_of_service() -> None:
    displays = yaml.safe_load((ROOT / "rviz" / "ood_seg.rviz").read_text())["Visualization Manager"]["Displays"]
    topics = {display["Topic"]["Value"]: display["Topic"] for display in displays if display["Class"].endswith("/Image")}
    assert set(topics) == {f"ood_segmenter/{name}" for name in ("overlay", "instance_mask", "anomaly_map")}
    assert {name.removeprefix("ood_segmenter/") for name in topics} <= set(IMAGE_TOPICS)
    for topic in topics.values():
        policy = topic["Reliability Policy"].upper().replace(" ", "_")
        assert policy == qos.image_output().reliability.name


def test_the_defaults_are_those_of_the_node() -> None:
    pytest.importorskip("launch_ros", reason="launch is not installed")
    defaults = {setting.name: setting.value for setting in iter_settings(NodeConfig())}
    given = {name: default for name, default, _ in load("ood_seg").ARGUMENTS}
    assert given["profile"] == defaults["profile"]
    assert given["transport"] == defaults["image_transport"]
    assert (given["autostart"] == "true") == defaults["autostart"]
    assert given["weights_dir"] == defaults["weights_dir"]
    replay = {name: default for name, default, _ in load("replay").ARGUMENTS if name in given}
    assert {name: value for name, value in replay.items() if name not in ("image", "rviz")} == {
        name: given[name] for name in replay if name not in ("image", "rviz")
    }


LAUNCH = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
file, *arguments = sys.argv[1:]
service = LaunchService()
source = PythonLaunchDescriptionSource(file)
include = IncludeLaunchDescription(source, launch_arguments=[tuple(argument.split(":=", 1)) for argument in arguments])
service.include_launch_description(LaunchDescription([include]))
sys.exit(service.run())
"""


@pytest.mark.dds
def test_the_launched_node_has_the_names_and_settings_it_was_given(dds: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("launch_ros", reason="launch is not installed")
    from harness import PROFILE, Client, Process

    (tmp_path / "external.yaml").write_text(PROFILE)
    (tmp_path / "params.yaml").write_text("/front/ood_segmenter:\n  ros__parameters:\n    tracking.enabled: false\n    warm_up.height: 0\n")
    arguments = {"profile": tmp_path / "external.yaml", "params_file": tmp_path / "params.yaml", "namespace": "front"}
    arguments |= {"image": "/camera/image_raw", "device": "cpu", "autostart": "false", "transport": "compressed"}
    command = [sys.executable, "-c", LAUNCH, str(ROOT / "launch" / "ood_seg.launch.py")]
    launched = Process([*command, *(f"{name}:={value}" for name, value in arguments.items())], tmp_path, dds)
    request.addfinalizer(launched.kill)
    client = Client(dds, "/front")
    names = ["tracking.enabled", "runtime.device", "image_transport", "autostart", "profile"]
    reply = client.call(GetParameters, "get_parameters", GetParameters.Request(names=names))
    values = [parameter_value_to_python(value) for value in reply.values]
    assert values == [False, "cpu", "compressed", False, str(tmp_path / "external.yaml")]
    for transition in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
        assert client.call(ChangeState, "change_state", ChangeState.Request(transition=Transition(id=transition))).success
    client.until(lambda: client.node.count_subscribers("/camera/image_raw/compressed"), "the node to subscribe")
    client.close()
    assert launched.end() == 0
    assert "Traceback" not in launched.output
