from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from ros2_ood_seg.config import SegmenterConfig
from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.segmenters import SEGMENTERS
from ros2_ood_seg.segmenters.sam import OFFICIAL_WEIGHTS, SamSegmenter
from ros2_ood_seg.types import Prompts

SIDE = 128
CPU = Runtime(torch.device("cpu"))


def tiny_sam() -> Sam:
    """Sam's own modules, small and randomly initialised."""
    torch.manual_seed(0)
    grid = SIDE // 16
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=SIDE,
            embed_dim=32,
            depth=2,
            num_heads=2,
            out_chans=32,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=4,
            global_attn_indexes=(1,),
        ),
        prompt_encoder=PromptEncoder(embed_dim=32, image_embedding_size=(grid, grid), input_image_size=(SIDE, SIDE), mask_in_chans=4),
        mask_decoder=MaskDecoder(
            transformer_dim=32, transformer=TwoWayTransformer(depth=2, embedding_dim=32, num_heads=2, mlp_dim=64), iou_head_hidden_dim=32
        ),
    )
    return sam.eval()


def picture(height: int, width: int) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([rows * 200 / height, columns * 200 / width, 127 + 100 * np.sin(rows / 9) * np.cos(columns / 7)], axis=2)
    return smooth.astype(np.uint8)


def some_prompts(width: int, height: int, boxes: int = 3, points: int = 4) -> Prompts:
    rng = np.random.default_rng(1)
    low = rng.uniform(0.0, 0.5, (boxes, 2))
    xyxy = np.concatenate([low, low + rng.uniform(0.1, 0.5, (boxes, 2))], axis=1) * [width, height, width, height]
    xy = rng.uniform(0.0, 1.0, (points, 2)) * [width, height]
    return Prompts(torch.tensor(xyxy).float(), torch.ones(boxes), torch.tensor(xy).float())


def asked_of_the_predictor(predictor: SamPredictor, prompts: Prompts, scale_xy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One call per prompt, as S2M and UGainS use SAM."""
    masks, quality = [], []
    for box in prompts.boxes_xyxy:
        found, iou, _ = predictor.predict_torch(None, None, boxes=(box * scale_xy.repeat(2))[None], multimask_output=False)
        masks.append(found[0, 0])
        quality.append(iou[0, 0])
    for point in prompts.points_xy:
        found, iou, _ = predictor.predict_torch((point * scale_xy)[None, None], torch.ones(1, 1), multimask_output=True)
        masks.append(found[0, iou[0].argmax()])
        quality.append(iou[0].max())
    return torch.stack(masks), torch.stack(quality)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_boxes_and_points_give_the_predictors_masks(batch_size: int) -> None:
    sam = tiny_sam()
    image = picture(96, SIDE)
    prompts = some_prompts(SIDE, 96)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    expected, quality = asked_of_the_predictor(predictor, prompts, torch.ones(2))
    found = SamSegmenter(sam, SegmenterConfig(batch_size=batch_size), CPU)(torch.from_numpy(image), prompts)
    assert expected.any()
    assert not expected.all()
    # Batched matrix products round differently, which can flip pixels whose logit is 0.
    assert (found.masks ^ expected).float().mean() < 1e-4
    torch.testing.assert_close(found.quality, quality.clamp(0, 1), atol=1e-5, rtol=0)


def test_a_larger_image_is_resized_as_the_predictor_does() -> None:
    sam = tiny_sam()
    image = picture(250, 333)
    prompts = some_prompts(333, 250)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    expected, _ = asked_of_the_predictor(predictor, prompts, torch.tensor([SIDE / 333, 96 / 250]))
    found = SamSegmenter(sam, SegmenterConfig(), CPU)(torch.from_numpy(image), prompts)
    assert found.masks.shape == (7, 250, 333)
    assert (found.masks ^ expected).float().mean() < 0.01


def test_encoder_width_shrinks_image_and_prompts_together() -> None:
    sam = tiny_sam()
    image = picture(128, 256)
    prompts = some_prompts(256, 128)
    small = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None].float(), (64, 128), mode="bilinear", antialias=True
    )
    predictor = SamPredictor(sam)
    predictor.set_torch_image(small.round(), (128, 256))
    expected, _ = asked_of_the_predictor(predictor, prompts, torch.tensor([0.5, 0.5]))
    found = SamSegmenter(sam, SegmenterConfig(encoder_width=128), CPU)(torch.from_numpy(image), prompts)
    assert (found.masks ^ expected).float().mean() < 1e-4


def test_only_the_encoder_runs_in_reduced_precision() -> None:
    sam = tiny_sam()
    image = torch.from_numpy(picture(96, SIDE))
    prompts = some_prompts(SIDE, 96)
    seen: dict[str, torch.dtype] = {}
    sam.image_encoder.neck[0].register_forward_hook(lambda module, inputs, output: seen.__setitem__("encoder", output.dtype))
    sam.mask_decoder.output_upscaling.register_forward_hook(lambda module, inputs, output: seen.__setitem__("decoder", output.dtype))
    reduced = SamSegmenter(sam, SegmenterConfig(), Runtime(torch.device("cpu"), torch.bfloat16))(image, prompts)
    assert seen == {"encoder": torch.bfloat16, "decoder": torch.float32}
    full = SamSegmenter(sam, SegmenterConfig(), CPU)(image, prompts)
    assert (reduced.masks ^ full.masks).float().mean() < 0.05


def test_without_prompts_no_network_runs() -> None:
    sam = tiny_sam()
    sam.image_encoder.register_forward_hook(lambda *_: pytest.fail("the encoder ran"))
    found = SamSegmenter(sam, SegmenterConfig(), CPU)(torch.zeros(64, 80, 3, dtype=torch.uint8), Prompts.empty())
    assert found.masks.shape == (0, 64, 80)


@pytest.mark.parametrize(("boxes", "points"), [(1, 0), (0, 1)])
def test_one_kind_of_prompt_alone(boxes: int, points: int) -> None:
    prompts = some_prompts(SIDE, 96, boxes, points)
    found = SamSegmenter(tiny_sam(), SegmenterConfig(), CPU)(torch.from_numpy(picture(96, SIDE)), prompts)
    assert found.masks.shape == (1, 96, SIDE)
    assert 0.0 <= found.quality.item() <= 1.0


@pytest.mark.parametrize("model", ["vit_b", "vit_l", "vit_h"])
def test_missing_weights_are_named(model: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=OFFICIAL_WEIGHTS[model]):
        SEGMENTERS.get("sam")(SegmenterConfig(name="sam", model=model), Runtime(torch.device("cpu"), None, tmp_path))


def test_a_checkpoint_of_metas_layout_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tiny_sam()
    torch.save(original.state_dict(), tmp_path / "sam_vit_b_01ec64.pth")

    def untrained() -> Sam:
        sam = tiny_sam()
        with torch.no_grad():
            for parameter in sam.parameters():
                parameter.zero_()
        return sam

    monkeypatch.setitem(sam_model_registry, "vit_b", untrained)
    segmenter = SEGMENTERS.get("sam")(SegmenterConfig(name="sam"), Runtime(torch.device("cpu"), None, tmp_path))
    image, prompts = torch.from_numpy(picture(96, SIDE)), some_prompts(SIDE, 96)
    expected = SamSegmenter(original, SegmenterConfig(), CPU)(image, prompts)
    assert torch.equal(segmenter(image, prompts).masks, expected.masks)


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tiny_sam().state_dict()
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "sam_vit_b_01ec64.pth")
    monkeypatch.setitem(sam_model_registry, "vit_b", tiny_sam)
    with pytest.raises(WeightsError, match=r"segment-anything vit_b.*mask_decoder\.iou_token\.weight"):
        SEGMENTERS.get("sam")(SegmenterConfig(name="sam"), Runtime(torch.device("cpu"), None, tmp_path))
