"""Segment Anything (Kirillov et al. 2023) through Meta's ``segment-anything`` package."""

from __future__ import annotations

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn import functional as F

from ros2_ood_seg.config import SegmenterConfig
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Masks, Prompts
from ros2_ood_seg.weights.store import find_weights, load_into, load_weights

OFFICIAL_WEIGHTS = {"vit_b": "sam_vit_b_01ec64", "vit_l": "sam_vit_l_0b3195", "vit_h": "sam_vit_h_4b8939"}
_UPSAMPLE_AT_ONCE = 8
"""Masks brought to full resolution together: 66 MB of float32 at 1920x1080."""


class SamSegmenter:
    """Encodes the image once and answers all prompts of a frame in batches.

    A box takes SAM's single mask; a point, which may mean a part or a whole, the one of three masks with the highest predicted IoU.
    Both are two tokens for the mask decoder, so they share its batches. Autocast covers the image encoder only: bfloat16 would round
    prompt coordinates to 4 px.

    Args:
        sam: The network, in evaluation mode on the runtime's device.
        config: Batch size and encoder width.
        runtime: Device and precision.
    """

    name = "sam"

    def __init__(self, sam: Sam, config: SegmenterConfig, runtime: Runtime) -> None:
        self._sam = sam
        self._config = config
        self._runtime = runtime

    @torch.inference_mode()
    def __call__(self, image: Tensor, prompts: Prompts) -> Masks:
        """See :class:`ros2_ood_seg.segmenters.base.PromptableSegmenter`."""
        height, width = int(image.shape[0]), int(image.shape[1])
        if len(prompts) == 0:
            return Masks.empty((height, width), image.device)
        embedding, input_hw = self._encode(image)
        tokens = self._tokens(prompts, image.new_tensor([input_hw[1] / width, input_hw[0] / height], dtype=torch.float32))
        is_point = torch.arange(len(prompts), device=image.device) >= prompts.num_boxes
        masks = torch.empty((len(prompts), height, width), dtype=torch.bool, device=image.device)
        quality = []
        for start in range(0, len(prompts), self._config.batch_size):
            part = slice(start, start + self._config.batch_size)
            logits, best_quality = self._decode(embedding, tokens[part], is_point[part])
            quality.append(best_quality)
            for n in range(0, len(logits), _UPSAMPLE_AT_ONCE):
                some = logits[n : n + _UPSAMPLE_AT_ONCE]
                full = self._sam.postprocess_masks(some, input_hw, (height, width))[:, 0]
                masks[start + n : start + n + len(some)] = full > self._sam.mask_threshold
        return Masks(masks, torch.cat(quality).clamp(0.0, 1.0))

    def _encode(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(1, C, h, w) float32 embedding, and the size of the image as the encoder saw it, before padding."""
        pixels = image.permute(2, 0, 1)[None].float()
        height, width = int(image.shape[0]), int(image.shape[1])
        if 0 < self._config.encoder_width < width:
            width, height = self._config.encoder_width, max(1, round(height * self._config.encoder_width / width))
            pixels = _resized(pixels, (height, width))
        input_hw = ResizeLongestSide.get_preprocess_shape(height, width, self._sam.image_encoder.img_size)
        pixels = _resized(pixels, input_hw)
        with self._runtime.autocast():
            embedding = self._sam.image_encoder(self._sam.preprocess(pixels))
        return embedding.float(), input_hw

    def _tokens(self, prompts: Prompts, scale_xy: Tensor) -> Tensor:
        """(N, 2, C) prompt tokens; a point is padded to two by SAM itself."""
        encoder = self._sam.prompt_encoder
        boxes = prompts.boxes_xyxy * scale_xy.repeat(2)
        points = (prompts.points_xy * scale_xy)[:, None]
        labels = torch.ones(points.shape[:2], device=points.device)
        box_tokens, _ = encoder(points=None, boxes=boxes, masks=None)
        point_tokens, _ = encoder(points=(points, labels), boxes=None, masks=None)
        return torch.cat([box_tokens, point_tokens])

    def _decode(self, embedding: Tensor, tokens: Tensor, is_point: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1, h, w) low-resolution logits of the chosen masks and (N,) their predicted IoU."""
        _, dense = self._sam.prompt_encoder(points=None, boxes=None, masks=None)
        logits, iou = self._sam.mask_decoder.predict_masks(embedding, self._sam.prompt_encoder.get_dense_pe(), tokens, dense)
        choice = torch.where(is_point, iou[:, 1:].argmax(dim=1) + 1, 0)
        rows = torch.arange(len(tokens), device=tokens.device)
        return logits[rows, choice][:, None], iou[rows, choice]


def _resized(pixels: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing, rounded to whole grey values as Pillow does for SAM's own predictor."""
    if tuple(pixels.shape[-2:]) == tuple(size_hw):
        return pixels
    return F.interpolate(pixels, size_hw, mode="bilinear", align_corners=False, antialias=True).round_().clamp_(0.0, 255.0)


def build(config: SegmenterConfig, runtime: Runtime) -> SamSegmenter:
    """Factory for the registry.

    Raises:
        WeightsError: The weights are not found, cannot be read, or belong to another model.
    """
    path = find_weights(config.weights or OFFICIAL_WEIGHTS[config.model], runtime.weights_dir)
    weights = load_weights(path)
    sam = sam_model_registry[config.model]()
    load_into(sam, weights, f"segment-anything {config.model}")
    return SamSegmenter(sam.eval().to(runtime.device), config, runtime)
