"""The node, on request with RViz: ros2 launch ros2_ood_seg ood_seg.launch.py image:=/camera/image_raw."""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.conditions import IfCondition, evaluate_condition_expression
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchContext, LaunchDescription
from ros2_ood_seg.ros.transport import room_for_images

# Name, default, description. An empty default leaves the choice to the profile.
ARGUMENTS = (
    ("profile", "compact", "bundled profile or path of a YAML file"),
    ("namespace", "", "one per camera"),
    ("image", "image", "topic of the camera; with transport compressed without its /compressed"),
    ("transport", "raw", "raw or compressed"),
    ("device", "", "auto, cpu, cuda or cuda:N"),
    ("weights_dir", "", "folder of further weights"),
    ("params_file", "", "YAML file of parameters; wins over profile and arguments"),
    ("autostart", "true", "configure and activate at start"),
    ("use_sim_time", "false", "take time from /clock"),
    ("rviz", "false", "show overlay, instance mask and anomaly map"),
)


def start(context: LaunchContext) -> list[Node]:
    """The node and RViz with the arguments of this launch."""

    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    def is_true(name: str) -> bool:
        # As conditions read them: true, false, 1 and 0 only.
        return bool(evaluate_condition_expression(context, [LaunchConfiguration(name)]))

    parameters = {
        "profile": value("profile"),
        "image_transport": value("transport"),
        "autostart": is_true("autostart"),
        "use_sim_time": is_true("use_sim_time"),
    }
    parameters |= {
        name: value(argument) for name, argument in (("runtime.device", "device"), ("weights_dir", "weights_dir")) if value(argument)
    }
    files = [value("params_file")] if value("params_file") else []
    node = Node(
        package="ros2_ood_seg",
        executable="ood_seg_node",
        name="ood_segmenter",
        namespace=value("namespace"),
        parameters=[parameters, *files],
        remappings=[("image", value("image"))] if value("image") != "image" else [],
        output="screen",
    )
    rviz = Node(
        package="rviz2",
        executable="rviz2",
        namespace=value("namespace"),
        arguments=["-d", str(Path(get_package_share_directory("ros2_ood_seg"), "rviz", "ood_seg.rviz"))],
        parameters=[{"use_sim_time": parameters["use_sim_time"]}],
        # The node does this for itself; other nodes of a larger launch are not touched.
        additional_env=room_for_images(),
        condition=IfCondition(LaunchConfiguration("rviz")),
    )
    return [node, rviz]


def generate_launch_description() -> LaunchDescription:
    """What ros2 launch asks for."""
    arguments = [DeclareLaunchArgument(name, default_value=default, description=text) for name, default, text in ARGUMENTS]
    return LaunchDescription([*arguments, OpaqueFunction(function=start)])
