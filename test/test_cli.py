"""The command line as a user meets it: exit codes and messages."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ros2_ood_seg import __version__, cli


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in cli.COMMANDS)


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: ood-seg" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["settings", "no_such_profile"], ("no_such_profile", "compact")),
        (["settings", "--set", "prompts.points.cout=3"], ("prompts.points.cout", "prompts.points.count")),
        (["settings", "--set", "prompts.points.count=0"], ("prompts.points.count", "at least 1")),
        (["settings", "--set", "nothing"], ("KEY=VALUE",)),
        (["weights", "verify", "no_such_weights"], ("no_such_weights", "sam_vit_b_01ec64")),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], names: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(name in error for name in names)


def test_an_unknown_command_lists_the_known_ones() -> None:
    done = subprocess.run([sys.executable, "-m", "ros2_ood_seg.cli", "sgment"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "segment" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_show_what_was_overridden(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["settings", "compact", "--set", "prompts.points.count=77"]) == 0
    assert "prompts.points.count = 77" in capsys.readouterr().out


def test_what_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error, words in (
        (OSError(28, "No space left on device"), "ood-seg: No space"),
        (PermissionError(13, "no", "/a"), "ood-seg: '/a': no"),
        (
            OSError("230400 requested and 99 written"),
            "ood-seg: an array cannot be written, the disk is full (230400 requested and 99 written",
        ),
    ):

        def run(_args: object, error: OSError = error) -> int:
            raise error

        monkeypatch.setattr("ros2_ood_seg.settings_command._run", run)
        assert cli.main(["settings"]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(words)
        assert printed.count("\n") == 1


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = f"set -o pipefail; {sys.executable} -m ros2_ood_seg.cli settings | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
