"""What holds the package together: versions, profiles, and that nothing outside ros/ needs ROS."""

from __future__ import annotations

import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ros2_ood_seg
from ros2_ood_seg import cli
from ros2_ood_seg.config import load_profile, profile_names
from ros2_ood_seg.fusion import FUSIONS
from ros2_ood_seg.prompts import BOX_PROMPTS, POINT_PROMPTS
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.segmenters import SEGMENTERS
from ros2_ood_seg.settings_command import settings_markdown
from ros2_ood_seg.weights.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[1]


def test_one_version() -> None:
    declared = re.search(r"<version>([^<]+)</version>", (ROOT / "package.xml").read_text(encoding="utf-8"))
    assert declared is not None
    assert declared.group(1) == ros2_ood_seg.__version__


@pytest.mark.parametrize("name", profile_names())
def test_profiles_name_registered_stages(name: str) -> None:
    config = load_profile(name)
    assert config.profile == name
    assert config.scorer.name in SCORERS.names
    assert config.prompts.boxes.method in (*BOX_PROMPTS.names, "none")
    assert config.prompts.points.method in (*POINT_PROMPTS.names, "none")
    assert config.segmenter.name in SEGMENTERS.names
    assert config.fusion.name in FUSIONS.names


@pytest.mark.parametrize("registry", [SCORERS, BOX_PROMPTS, POINT_PROMPTS, SEGMENTERS, FUSIONS], ids=lambda r: r.kind)
def test_registered_names_resolve(registry: object) -> None:
    assert all(callable(registry.get(name)) for name in registry.names)  # type: ignore[attr-defined]


def test_the_manifest_names_bundled_profiles_and_present_files() -> None:
    for entry in read_manifest().values():
        assert set(entry.profiles) <= set(profile_names())
        if entry.bundled:
            assert (Path(ros2_ood_seg.__path__[0]) / "weights" / entry.file_name).is_file()


def test_everything_outside_ros_imports_without_ros() -> None:
    modules = [
        name
        for _, name, _ in pkgutil.walk_packages([str(ROOT / "ros2_ood_seg")], "ros2_ood_seg.")
        if not name.startswith(("ros2_ood_seg.ros", "ros2_ood_seg.msg"))
    ]
    assert "ros2_ood_seg.pipeline" in modules
    script = f"""
import importlib, importlib.abc, sys
class NoRos(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"rclpy", "sensor_msgs", "std_msgs", "cv_bridge", "message_filters", "diagnostic_msgs"}}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, NoRos())
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_messages_keep_their_fixed_fields() -> None:
    fixed = {
        "InstanceMask": ["uint32 height", "uint32 width", "uint32[] counts"],
        "BoundingBox": ["float32 x_min", "float32 y_min", "float32 x_max", "float32 y_max", "float32 confidence"],
        "BoundingBoxArray": ["std_msgs/Header header", "BoundingBox[] boxes"],
        "AnomalyInstance": [
            "uint16 id",
            "uint32 track_id",
            "float32 score",
            "float32 raw_score",
            "float32 mask_quality",
            "uint32 area",
            "BoundingBox box",
            "InstanceMask mask",
        ],
        "AnomalyInstanceArray": ["std_msgs/Header header", "string profile", "string scorer", "AnomalyInstance[] instances"],
    }
    for message, fields in fixed.items():
        lines = (ROOT / "msg" / f"{message}.msg").read_text(encoding="utf-8").splitlines()
        declared = [" ".join(line.split("#")[0].split()) for line in lines]
        assert [field for field in fields if field not in declared] == []


def test_the_settings_document_is_what_the_code_says() -> None:
    document = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert settings_markdown(load_profile("compact")) in document, "run: ood-seg settings --markdown, and put it into docs/settings.md"


PLACEHOLDERS = {"BENCHMARK --dataset NAME": "smiyc --dataset lost_and_found", "--scorer NAME": "--scorer compact", "WHAT": "scorers"}


def documented_commands(document: Path) -> list[str]:
    """The ``ood-seg`` commands in its code blocks, and those in its sentences that have two options or more."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^ *(ood-seg .*)$", text, re.MULTILINE)
    return blocks + [command for command in re.findall(r"`(ood-seg [^`\n]+)`", text) if command.count(" --") > 1]


@pytest.mark.parametrize(
    "document",
    [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "ros2_ood_seg" / "weights").glob("*.md"))],
    ids=lambda path: path.name,
)
def test_documented_commands_are_complete(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in documented_commands(document):
        written = re.sub(r"\.\.\.|…|\$[A-Z]+|\|[a-z|-]+", "", command)
        for placeholder, example in PLACEHOLDERS.items():
            written = written.replace(placeholder, example)
        arguments = shlex.split(written, comments=True)[1:]
        if "--help" in arguments:
            continue
        try:
            cli.build_parser(arguments[0]).parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{command}: {capsys.readouterr().err}")


def test_processes_that_the_command_starts_can_import_its_script() -> None:
    names = runpy.run_path(str(ROOT / "scripts" / "ood-seg"), run_name="__mp_main__")
    assert callable(names["main"])


def test_every_module_is_held_to_the_layering() -> None:
    tomllib = pytest.importorskip("tomllib")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = set(contracts[0]["source_modules"])
    package = ROOT / "ros2_ood_seg"
    modules = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert {f"ros2_ood_seg.{name}" for name in modules - {"__init__", "ros"}} == named


def test_a_wheel_holds_every_file_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools")
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    for folder in (ROOT / "ros2_ood_seg", *(path for path in (ROOT / "ros2_ood_seg").rglob("*") if path.is_dir())):
        package = ".".join(folder.relative_to(ROOT).parts)
        others = {path.name for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert not others - {path.name for pattern in given["package_data"].get(package, ()) for path in folder.glob(pattern)}, package


def test_tools_with_an_interpreter_can_be_run() -> None:
    for path in [*(ROOT / "tools").iterdir(), *(ROOT / "scripts").iterdir()]:
        if path.is_file() and path.read_bytes().startswith(b"#!"):
            assert os.access(path, os.X_OK), path
