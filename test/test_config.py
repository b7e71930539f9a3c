from __future__ import annotations

from pathlib import Path

import pytest

from ros2_ood_seg.config import (
    PipelineConfig,
    build_config,
    describe_allowed,
    format_value,
    iter_settings,
    load_profile,
    parse_overrides,
    profile_names,
)
from ros2_ood_seg.errors import InputError


def test_every_setting_is_described_and_its_default_allowed() -> None:
    names = set()
    for setting in iter_settings(PipelineConfig()):
        names.add(setting.name)
        assert setting.description
        assert setting.kind in (bool, int, float, str)
        assert isinstance(setting.value, setting.kind)
        if setting.low is not None:
            assert setting.value >= setting.low
        if setting.high is not None:
            assert setting.value <= setting.high
        if setting.choices:
            assert setting.value in setting.choices
        assert describe_allowed(setting)
    assert {"profile", "prompts.points.count", "fusion.nms_iou", "runtime.device"} <= names


def test_published_constants_are_the_defaults() -> None:
    config = PipelineConfig()
    assert config.fusion.nms_iou == 0.7
    assert config.fusion.floor_value == -1.0
    assert config.fusion.ignore_overlap_px == 100
    assert config.prompts.points.count == 50
    assert config.prompts.points.raw_threshold == -0.15
    assert config.prompts.boxes.min_confidence == 0.05


def test_overrides_reach_their_leaf() -> None:
    config = load_profile("compact", {"prompts.points.count": 7, "fusion.nms_iou": "0.5", "tracking.enabled": "true"})
    assert config.prompts.points.count == 7
    assert config.fusion.nms_iou == 0.5
    assert config.tracking.enabled is True
    assert config.profile == "compact"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fusion.nms_iuo", 0.5, "unknown setting 'fusion.nms_iuo': did you mean fusion.nms_iou"),
        ("fusion.nms_iou", 1.5, r"'fusion.nms_iou' is 1.5, allowed: a number.* 1"),
        ("fusion.half_score", 1.0, r"'fusion.half_score' is 1.0, allowed: a number, above 0 and below 1"),
        ("prompts.points.count", 0, r"'prompts.points.count' is 0, allowed: a whole number.* 1024"),
        ("prompts.points.count", "many", r"'prompts.points.count' is 'many', allowed: a whole number"),
        ("scorer.smoothing_px", 4, r"'scorer.smoothing_px' is 4, allowed: 0, or an odd number up to 63"),
        ("fusion.compat", "book", r"'fusion.compat' is 'book', allowed: one of paper, code"),
        ("fusion.floor_value", float("nan"), r"'fusion.floor_value' is nan"),
        ("runtime.device", "tpu", r"'runtime.device' is 'tpu', allowed: .*cuda"),
    ],
)
def test_bad_overrides_say_what_is_allowed(key: str, value: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_profile("compact", {key: value})


def test_a_file_holds_only_what_differs(tmp_path: Path) -> None:
    base, derived = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text("prompts:\n  points:\n    method: fps\n    count: 9\n", encoding="utf-8")
    derived.write_text(f"extends: {base}\nprompts:\n  points:\n    count: 11\n", encoding="utf-8")
    config = load_profile(derived)
    assert (config.prompts.points.method, config.prompts.points.count) == ("fps", 11)
    assert config.profile == "mine"


def test_a_file_that_is_extended_lies_beside_the_one_that_extends_it(tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / "base.yaml").write_text(
        "extends: compact\nprompts:\n  points:\n    count: 9\nscorer:\n  coarse_scale: 0.4\n", encoding="utf-8"
    )
    (folder / "mine.yaml").write_text("extends: base.yaml\nscorer:\n", encoding="utf-8")
    # A group that is named and left empty changes nothing, and takes overrides.
    config = load_profile(folder / "mine.yaml", {"scorer.zoom": 0.0})
    assert (config.prompts.points.count, config.scorer.zoom, config.scorer.coarse_scale) == (9, 0.0, 0.4)
    assert load_profile(folder / "mine.yaml").scorer.coarse_scale == 0.4
    (folder / "base.yaml").write_text("extends: mine.yaml\n", encoding="utf-8")
    with pytest.raises(InputError, match="extends itself"):
        load_profile(folder / "mine.yaml")


def test_an_override_below_what_is_no_group_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: compact\nscorer: 3\n", encoding="utf-8")
    with pytest.raises(InputError, match="'scorer' is 3, allowed: a group of settings"):
        load_profile(path, {"scorer.zoom": 0.0})


def test_a_file_may_extend_a_bundled_profile(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: compact\nfusion:\n  name: s2m\n", encoding="utf-8")
    assert load_profile(path).fusion.name == "s2m"
    assert load_profile(path).scorer == load_profile("compact").scorer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fusion:\n  colour: red\n", "unknown setting 'fusion.colour'"),
        ("promts:\n  points:\n    count: 30\n", "unknown setting 'promts': did you mean prompts or"),
        ("prompts:\n  point:\n    count: 30\n", "unknown setting 'prompts.point': did you mean prompts.points or"),
        ("fusion: 3\n", "'fusion' is 3, allowed: a group of settings"),
        ("- 1\n- 2\n", "must be a mapping of settings, got list"),
        ("fusion: {name: [\n", "cannot be read"),
        ("extends: nowhere\n", "unknown profile 'nowhere': use one of .*compact"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)


def test_texts_on_the_command_line_are_taken_as_they_are() -> None:
    words = ["runtime.weights_dir=2024", "scorer.weights = null", "prompts.points.count=7", "tracking.enabled=yes", "fusion.floor_value=-2"]
    config = load_profile("compact", parse_overrides(words))
    assert (config.runtime.weights_dir, config.scorer.weights) == ("2024", "null")
    assert (config.prompts.points.count, config.tracking.enabled, config.fusion.floor_value) == (7, True, -2.0)
    with pytest.raises(InputError, match=r"--set '=3' must be KEY=VALUE"):
        parse_overrides(["=3"])


def test_a_circle_of_profiles_is_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(f"extends: {second}\n", encoding="utf-8")
    second.write_text(f"extends: {first}\n", encoding="utf-8")
    with pytest.raises(InputError, match="extends itself"):
        load_profile(first)


def test_unknown_profiles_list_the_bundled_ones() -> None:
    with pytest.raises(InputError, match=r"unknown profile 'compcat': use one of .*compact"):
        load_profile("compcat")
    with pytest.raises(InputError, match=r"'no/such.yaml' does not exist; bundled profiles: .*compact"):
        load_profile("no/such.yaml")
    assert "compact" in profile_names()


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text("", encoding="utf-8")
    assert load_profile(path).fusion == PipelineConfig().fusion


def test_settings_are_frozen_and_comparable() -> None:
    config = build_config({"fusion": {"nms_iou": 0.5}}, "test")
    assert config == build_config({"fusion": {"nms_iou": 0.5}}, "test")
    assert config != PipelineConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.fusion.nms_iou = 0.7


@pytest.mark.parametrize(("value", "text"), [(True, "true"), (0.5, "0.5"), ("", "''"), (7, "7"), ("fps", "fps")])
def test_values_are_written_as_yaml(value: bool | int | float | str, text: str) -> None:
    assert format_value(value) == text


def test_the_profiles_of_the_papers_rank_as_published() -> None:
    s2m, ugains = load_profile("s2m").fusion, load_profile("ugains").fusion
    assert (s2m.name, s2m.box_weight, s2m.quality_power, s2m.min_score, s2m.compat) == ("s2m", 1.0, 0.0, 0.0, "paper")
    assert load_profile("s2m").prompts.boxes.min_confidence == 0.05
    assert (ugains.name, ugains.quality_power, ugains.min_score) == ("ugains", 0.0, 0.0)
    assert (ugains.nms_iou, ugains.nms_containment, ugains.floor, ugains.floor_value) == (0.7, 1.0, "value", -1.0)


def test_settings_that_name_files_say_so() -> None:
    named = {setting.name for setting in iter_settings(PipelineConfig()) if setting.names_file}
    weights = {"scorer.weights", "prompts.boxes.weights", "segmenter.weights"}
    assert named == weights | {"scorer.statistics", "runtime.ignore_mask", "runtime.weights_dir"}
