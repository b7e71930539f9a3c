"""A recording through the node, watched in RViz: ros2 launch ros2_ood_seg replay.launch.py bag:=FOLDER image:=/camera/image_raw."""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, ExecuteProcess, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PythonExpression

from launch import LaunchDescription
from ros2_ood_seg.ros.transport import room_for_images

# Name, default (None: has to be given), description.
ARGUMENTS = (
    ("bag", None, "recording, MCAP or sqlite3"),
    ("image", None, "its image topic; with transport compressed without its /compressed"),
    ("rate", "1.0", "speed of the replay"),
    ("delay", "10.0", "seconds before the recording starts, in which the networks are loaded"),
    ("profile", "compact", "bundled profile or path of a YAML file"),
    ("transport", "raw", "raw or compressed"),
    ("device", "", "auto, cpu, cuda or cuda:N"),
    ("weights_dir", "", "folder of further weights"),
    ("params_file", "", "YAML file of parameters; wins over profile and arguments"),
    ("rviz", "true", "show overlay, instance mask and anomaly map"),
)
_FOR_THE_NODE = ("image", "profile", "transport", "device", "weights_dir", "params_file", "rviz")


def generate_launch_description() -> LaunchDescription:
    """What ros2 launch asks for."""
    arguments = [DeclareLaunchArgument(name, default_value=default, description=text) for name, default, text in ARGUMENTS]
    launch_file = Path(get_package_share_directory("ros2_ood_seg"), "launch", "ood_seg.launch.py")
    node = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(launch_file)),
        launch_arguments=[("use_sim_time", "true"), *((name, LaunchConfiguration(name)) for name in _FOR_THE_NODE)],
    )
    image = LaunchConfiguration("image")
    # ros2 bag play refuses a delay of 0.
    delay = PythonExpression(["float('", LaunchConfiguration("delay"), "') or 0.001"])
    player = ExecuteProcess(
        cmd=[
            *("ros2", "bag", "play", LaunchConfiguration("bag"), "--clock"),
            # Nothing else: the results of a node that ran while it was recorded would come beside those of this one.
            *("--topics", image, [image, "/compressed"], "/anomaly_map"),
            *("--rate", LaunchConfiguration("rate"), "--delay", delay),
        ],
        output="screen",
        # It publishes images, too.
        additional_env=room_for_images(),
    )
    return LaunchDescription([*arguments, node, player])
