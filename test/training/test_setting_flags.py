from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from ros2_ood_seg.cli import main
from ros2_ood_seg.training.outlier_exposure import PasteSettings
from ros2_ood_seg.training.prompt_generator import PromptTraining
from ros2_ood_seg.training.rba import RbaTraining
from ros2_ood_seg.training.scorer import ScorerTraining
from ros2_ood_seg.training.segmenter import SegmenterTraining
from ros2_ood_seg.training.setting_flags import descriptions


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
