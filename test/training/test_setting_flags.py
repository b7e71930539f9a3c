from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from ros2_ood_seg.cli import main
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.training.outlier_exposure import PasteSettings
from ros2_ood_seg.training.prompt_generator import PromptTraining
from ros2_ood_seg.training.rba import RbaTraining
from ros2_ood_seg.training.scorer import ScorerTraining
from ros2_ood_seg.training.segmenter import SegmenterTraining
from ros2_ood_seg.training.setting_flags import descriptions, distinct_name


@pytest.mark.parametrize("recipe", [PasteSettings, PromptTraining, RbaTraining, ScorerTraining, SegmenterTraining])
def test_every_field_of_a_recipe_is_described(recipe: type) -> None:
    known = descriptions(recipe)
    for field in fields(recipe):
        assert len(known[field.name]) > 5, field.name
        assert "`" not in known[field.name]
        # Argparse takes a single % for a field.
        argparse.ArgumentParser().add_argument("--x", help=known[field.name])


@pytest.mark.parametrize("command", ["scorer", "prompt-generator", "segmenter", "rba"])
def test_help_says_what_the_flags_are(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Steps in all" in text
    assert "recipe (" not in text
    assert "pasting (" not in text


def test_folders_of_one_name_are_told_apart_and_a_folder_counts_once() -> None:
    first, second = Path("a/val"), Path("b/val")
    taken = [distinct_name(first, [], "--labelled")]
    taken.append(distinct_name(second, taken, "--labelled"))
    assert taken == ["val", "b/val"]
    with pytest.raises(InputError, match="--labelled names 'b/val' twice"):
        distinct_name(second, taken, "--labelled")
