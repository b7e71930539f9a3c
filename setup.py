"""Installs the package without ROS (Python API and ``ood-seg``); with ROS, colcon builds it through CMakeLists.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r"<version>([^<]+)</version>", (ROOT / "package.xml").read_text(encoding="utf-8")).group(1)


def requirements(name):
    """The lines of a requirement file."""
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


setup(
    name="ros2_ood_seg",
    version=VERSION,
    description="Anomaly instance segmentation for vehicles: S2M and UGainS as a library, a command and a ROS 2 node",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["ros2_ood_seg", "ros2_ood_seg.*"]), "ros2_ood_seg.profiles", "ros2_ood_seg.interfaces"],
    # Profiles and message definitions live at the top level, where ROS looks for them, and travel inside the wheel.
    package_dir={"ros2_ood_seg.profiles": "config", "ros2_ood_seg.interfaces": "msg"},
    package_data={
        "ros2_ood_seg": ["py.typed"],
        "ros2_ood_seg.ros": ["*.xml"],
        "ros2_ood_seg.weights": ["*.safetensors", "*.yaml", "*.md", "*.png"],
        "ros2_ood_seg.profiles": ["*.yaml"],
        "ros2_ood_seg.interfaces": ["*.msg"],
    },
    install_requires=requirements("runtime.txt"),
    extras_require={"extra": requirements("extra.txt"), "ray": ["ray>=2.9"], "export": ["onnxscript>=0.5", "onnxruntime>=1.18"]},
    entry_points={"console_scripts": ["ood-seg = ros2_ood_seg.cli:main"]},
)
