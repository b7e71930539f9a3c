"""The stages together, with parts that need no weights."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ros2_ood_seg.config import PipelineConfig, build_config, load_profile
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.pipeline import Pipeline, check_stages

HEIGHT, WIDTH = 96, 160
BLOBS = ((20, 30, 24, 20), (100, 50, 30, 26))


def settings(**sections: object) -> PipelineConfig:
    tree: dict[str, object] = {
        "scorer": {"name": "external"},
        "prompts": {"boxes": {"method": "components"}},
        "segmenter": {"name": "grabcut"},
        "fusion": {"name": "s2m"},
    }
    return build_config({**tree, **sections}, "test")


def scene() -> tuple[np.ndarray, np.ndarray]:
    """Two textured boxes on a grey road, and a score map that shows them."""
    rng = np.random.default_rng(0)
    image = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
    image += rng.integers(0, 8, image.shape, dtype=np.uint8)
    scores = np.full((HEIGHT, WIDTH), 0.05, np.float32)
    for (x, y, w, h), colour in zip(BLOBS, ((200, 30, 30), (20, 60, 220)), strict=True):
        image[y : y + h, x : x + w] = colour
        scores[y : y + h, x : x + w] = 0.9
    return image, scores


def test_external_scores_become_instances_at_the_right_places() -> None:
    image, scores = scene()
    result = Pipeline(settings()).run(image, scores)
    assert len(result.instances) == len(BLOBS)
    boxes = sorted(result.instances.boxes_xyxy.tolist())
    for box, (x, y, w, h) in zip(boxes, sorted(BLOBS), strict=True):
        np.testing.assert_allclose(box, [x, y, x + w, y + h], atol=2)
    assert set(result.timings_ms) == {"upload", "score", "prompt", "segment", "fuse", "total"}
    assert result.timings_ms["total"] >= result.timings_ms["segment"]
    assert result.refined.shape == (HEIGHT, WIDTH)


@pytest.mark.parametrize("fusion", ["s2m", "ugains", "hybrid"])
def test_every_fusion_runs_on_boxes_and_points(fusion: str) -> None:
    image, scores = scene()
    config = settings(prompts={"boxes": {"method": "components"}, "points": {"method": "fps", "count": 4}}, fusion={"name": fusion})
    result = Pipeline(config).run(image, scores)
    assert result.prompts.num_boxes == len(BLOBS)
    assert result.prompts.num_points == 4
    assert len(result.instances) >= len(BLOBS)
    assert bool((result.instances.scores[:-1] >= result.instances.scores[1:]).all())


def test_a_quiet_frame_gives_no_instances_and_no_prompts() -> None:
    image, scores = scene()
    result = Pipeline(settings(prompts={"points": {"method": "fps"}}, fusion={"name": "ugains"})).run(image, np.zeros_like(scores))
    assert len(result.prompts) == 0
    assert len(result.instances) == 0
    assert result.instances.masks.shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("image", "names"),
    [
        (np.zeros((HEIGHT, WIDTH), np.uint8), f"({HEIGHT}, {WIDTH})"),
        (np.zeros((HEIGHT, WIDTH, 3), np.float32), "float32"),
        (np.zeros((8, WIDTH, 3), np.uint8), f"{WIDTH}x8"),
        (np.zeros((200, 20, 3), np.uint8), "20x200 px, it must be at most 8 times as high as wide"),
        ("picture.png", "str"),
    ],
)
def test_an_unusable_image_is_named(image: object, names: str) -> None:
    with pytest.raises(InputError, match=r".*") as error:
        Pipeline(settings()).run(image, np.zeros((HEIGHT, WIDTH), np.float32))  # type: ignore[arg-type]
    assert names in str(error.value)


def test_a_bad_map_is_refused_and_the_next_frame_works() -> None:
    image, scores = scene()
    pipeline = Pipeline(settings())
    broken = scores.copy()
    broken[3, 4] = np.nan
    with pytest.raises(InputError, match="1"):
        pipeline.run(image, broken)
    with pytest.raises(InputError, match="external"):
        pipeline.run(image)
    assert len(pipeline.run(image, scores).instances) == len(BLOBS)


def test_the_ignore_mask_hides_what_is_under_it(tmp_path: Path) -> None:
    image, scores = scene()
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, : WIDTH // 2] = 255
    cv2.imwrite(str(tmp_path / "hood.png"), mask)
    config = settings(runtime={"ignore_mask": str(tmp_path / "hood.png")})
    result = Pipeline(config).run(image, scores)
    assert len(result.instances) == 1
    assert float(result.instances.boxes_xyxy[0, 0]) >= WIDTH // 2
    with pytest.raises(InputError, match=f"{WIDTH}x{HEIGHT} px, the image is {WIDTH}x{HEIGHT // 2}"):
        Pipeline(config).run(image[: HEIGHT // 2], scores[: HEIGHT // 2])


def test_warming_up_takes_the_size_of_the_ignore_mask(tmp_path: Path) -> None:
    image, _ = scene()
    cv2.imwrite(str(tmp_path / "hood.png"), np.zeros((HEIGHT, WIDTH), np.uint8))
    pipeline = Pipeline(load_profile("compact_s2m", {"scorer.input_width": 160, "runtime.ignore_mask": str(tmp_path / "hood.png")}))
    pipeline.warm_up(720, 1280)
    assert pipeline.run(image).refined.shape == (HEIGHT, WIDTH)


def test_a_missing_ignore_mask_is_named() -> None:
    with pytest.raises(InputError, match=r"no_such\.png"):
        Pipeline(settings(runtime={"ignore_mask": "no_such.png"}))


def test_stages_with_unchanged_settings_are_taken_over() -> None:
    first = Pipeline(settings())
    second = Pipeline(settings(fusion={"name": "s2m", "min_score": 0.5}), reuse=first)
    assert second.scorer is first.scorer
    assert second.segmenter is first.segmenter
    assert second.fusion is not first.fusion
    third = Pipeline(settings(runtime={"device": "cpu", "precision": "bfloat16"}), reuse=first)
    assert third.scorer is not first.scorer


def test_tracks_go_on_under_other_settings() -> None:
    image, scores = scene()
    pipeline = Pipeline(settings(tracking={"enabled": True}))
    before = pipeline.run(image, scores).instances.track_ids.tolist()
    changed: list[dict[str, dict[str, object]]] = [
        {"tracking": {"enabled": True}, "fusion": {"name": "s2m", "min_area_px": 5}},
        {"tracking": {"enabled": True, "iou": 0.4}},
        {"tracking": {"enabled": True}, "runtime": {"device": "cpu", "threads": 1}},
    ]
    for sections in changed:
        pipeline = Pipeline(settings(**sections), reuse=pipeline)
        assert pipeline.run(image, scores).instances.track_ids.tolist() == before, sections


def test_a_pipeline_that_cannot_be_made_leaves_the_tracks_alone() -> None:
    image, scores = scene()
    pipeline = Pipeline(settings(tracking={"enabled": True}))
    before = pipeline.run(image, scores).instances.track_ids
    with pytest.raises(InputError):
        Pipeline(settings(runtime={"ignore_mask": "missing.png"}), reuse=pipeline)
    assert torch.equal(pipeline.run(image, scores).instances.track_ids, before)


def test_tracking_switched_off_and_on_uses_no_number_again() -> None:
    image, scores = scene()
    on = Pipeline(settings(tracking={"enabled": True}))
    before = on.run(image, scores).instances.track_ids
    off = Pipeline(settings(), reuse=on)
    assert not off.run(image, scores).instances.track_ids.any()
    again = Pipeline(settings(tracking={"enabled": True}), reuse=off).run(image, scores).instances.track_ids
    assert again.min() > before.max()


def test_external_maps_may_lie_in_memory_as_they_like() -> None:
    image, scores = scene()
    expected = Pipeline(settings()).run(image, scores).instances.masks
    for other in (scores[:, ::-1].copy()[:, ::-1], scores.astype(">f4"), np.asfortranarray(scores), scores.astype(np.float64)):
        assert torch.equal(Pipeline(settings()).run(image, other).instances.masks, expected)


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ({"prompts": {}}, "both 'none'"),
        ({"prompts": {"boxes": {"method": "guesses"}}}, "unknown box prompt generator 'guesses': use one of components"),
        ({"prompts": {"points": {"method": "guesses"}}}, "unknown point prompt generator 'guesses'"),
        ({"scorer": {"name": "guess"}}, "unknown scorer 'guess'"),
        ({"segmenter": {"name": "guess"}}, "unknown segmenter 'guess'"),
        ({"fusion": {"name": "guess"}}, "unknown fusion 'guess'"),
    ],
)
def test_a_pipeline_that_cannot_be_made_is_named_before_anything_is_loaded(section: dict[str, object], names: str) -> None:
    with pytest.raises(InputError, match=names):
        check_stages(settings(**section))
    with pytest.raises(InputError, match=names):
        Pipeline(settings(**section))


def test_tracks_carry_over_and_reset_forgets() -> None:
    image, scores = scene()
    pipeline = Pipeline(settings(tracking={"enabled": True}))
    first = pipeline.run(image, scores).instances.track_ids
    second = pipeline.run(image, scores).instances.track_ids
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert min(first.tolist()) >= 1
    pipeline.reset()
    assert len(pipeline.run(image, scores).instances.track_ids) == len(first)


def test_bundled_profiles_run_and_find_a_pasted_object() -> None:
    image, _ = scene()
    for name in ("compact", "compact_s2m", "compact_ugains"):
        pipeline = Pipeline(load_profile(name, {"scorer.input_width": 160}))
        pipeline.warm_up(HEIGHT, WIDTH)
        result = pipeline.run(image)
        assert result.profile == name
        assert bool(torch.isfinite(result.refined).all())
        for x, y, w, h in BLOBS:
            shares = result.instances.masks[:, y : y + h, x : x + w].float().mean(dim=(1, 2))
            assert shares.numel() > 0
            assert float(shares.max()) > 0.6, f"{name} finds the object at {x}, {y}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_and_cpu_find_the_same_instances() -> None:
    image, scores = scene()
    overrides = {"scorer.name": "external", "runtime.precision": "float32"}
    on_cpu = Pipeline(load_profile("compact", {**overrides, "runtime.device": "cpu"})).run(image, scores)
    on_gpu = Pipeline(load_profile("compact", {**overrides, "runtime.device": "cuda"})).run(image, scores)
    assert len(on_cpu.instances) == len(on_gpu.instances)
    for cpu_mask, gpu_mask in zip(on_cpu.instances.masks, on_gpu.instances.masks.cpu(), strict=True):
        assert int((cpu_mask & gpu_mask).sum()) / int((cpu_mask | gpu_mask).sum()) >= 0.98
    torch.testing.assert_close(on_gpu.instances.scores.cpu(), on_cpu.instances.scores, atol=1e-3, rtol=0)
