"""Which published network a state dict belongs to, told by the names of its entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.weights.store import WeightFile

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "branch1.", "model.", "net.")
"""What DataParallel, torch.compile, PEBAL and RPL, Lightning and others put before every name."""


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint.

    Args:
        name: Short name, also the file name that ``ood-seg weights import`` gives it.
        title: What it is, in words.
        use: Settings that make the pipeline use it, empty when it has no place in the pipeline.
        signature: Beginnings of names that all have to occur.
        outputs: Classes of ``final.6.weight``, where only their number tells two families apart; 0 for any.
    """

    name: str
    title: str
    use: str
    signature: tuple[str, ...]
    outputs: int = 0

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state dict without wrapper prefixes is of this family."""
        if not all(any(key.startswith(start) for key in state) for start in self.signature):
            return False
        return not self.outputs or state["final.6.weight"].shape[0] == self.outputs


_WRN38 = ("mod1.conv1.weight", "mod7.block1.", "aspp.features.0.", "bot_fine.weight", "final.6.weight")

_MOBILE = ("features.0.0.weight", "aspp.features.0.", "bot_fine.weight", "final.6.weight")
_LDN121 = ("backbone.features.denseblock4.", "spp.spp.", "upsample.upsample_layers.", "logits.conv.")
_SEGFORMER = ("backbone.layers.0.0.projection.", "backbone.layers.0.1.0.ffn.", "decode_head.fusion_conv.conv.weight")

FAMILIES = (
    Family("compact_scorer", "compact scorer of this package", "scorer.name=compact", ("features.", "class_head.", "outlier_head.")),
    Family("rpl", "RPL or RPL+CoroCL on DeepLabV3+ WideResNet-38", "scorer.name=rpl", (*_WRN38, "residual_block.atten_aspp.")),
    Family("dense_hybrid", "DenseHybrid on DeepLabV3+ WideResNet-38", "scorer.name=dense_hybrid", (*_WRN38, "logits_ood.conv.")),
    Family("rpl", "RPL or RPL+CoroCL on DeepLabV3+ MobileNetV2", "scorer.name=rpl", (*_MOBILE, "residual_block.atten_aspp.")),
    Family("dense_hybrid", "DenseHybrid on DeepLabV3+ MobileNetV2", "scorer.name=dense_hybrid", (*_MOBILE, "logits_ood.conv.")),
    Family(
        "deeplab_mobilenet_v2",
        "DeepLabV3+ MobileNetV2: plain, or trained as PEBAL or for maximum entropy, which the file does not tell",
        "scorer.name=deeplab_mobilenet_v2 or pebal or max_entropy or mahalanobis",
        _MOBILE,
    ),
    Family("pebal", "PEBAL on DeepLabV3+ WideResNet-38 (20 outputs)", "scorer.name=pebal", _WRN38, outputs=20),
    Family(
        "deeplab_wrn38",
        "DeepLabV3+ WideResNet-38: plain, or trained for maximum entropy (Meta-OoD), which the file does not tell",
        "scorer.name=deeplab_wrn38 or max_entropy or mahalanobis",
        _WRN38,
    ),
    Family(
        "sml",
        "DeepLabV3+ ResNet-101 of standardized max logits",
        "scorer.name=sml",
        ("layer0.0.weight", "layer4.0.", "aspp.features.0.", "bot_fine.0.weight", "final1.0.weight", "final2.0.weight"),
    ),
    Family(
        "torchvision_segmentation",
        "torchvision DeepLabV3",
        "scorer.name=torchvision_segmentation",
        ("backbone.", "classifier.0.convs.0.0.weight", "classifier.4.weight"),
    ),
    Family(
        "torchvision_segmentation",
        "torchvision LR-ASPP",
        "scorer.name=torchvision_segmentation",
        ("backbone.", "classifier.cbr.0.weight", "classifier.high_classifier.weight"),
    ),
    Family(
        "dense_hybrid_ldn121",
        "DenseHybrid on Ladder-DenseNet-121",
        "scorer.name=dense_hybrid_ldn121",
        (*_LDN121, "logits_ood."),
    ),
    Family("ldn121", "Ladder-DenseNet-121", "scorer.name=ldn121", _LDN121),
    Family(
        "gmmseg", "GMMSeg on SegFormer (mmsegmentation)", "scorer.name=gmmseg", (*_SEGFORMER, "decode_head.means", "decode_head.diagonal")
    ),
    Family("segformer", "SegFormer (mmsegmentation)", "scorer.name=segformer", (*_SEGFORMER, "decode_head.conv_seg.weight")),
    Family("sam", "Segment Anything", "segmenter.name=sam", ("image_encoder.", "prompt_encoder.", "mask_decoder.")),
    Family(
        "s2m_prompt_generator",
        "detectron2 Faster R-CNN with FPN, the layout of S2M's box prompt generator",
        "prompts.boxes.method=faster_rcnn",
        ("backbone.bottom_up.", "proposal_generator.rpn_head.", "roi_heads.box_predictor."),
    ),
    Family(
        "mask2former",
        "detectron2 Mask2Former on Swin (RbA, EAM, UNO)",
        "scorer.name=rba or eam or uno or mask2anomaly",
        ("backbone.patch_embed.", "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."),
    ),
    Family(
        "mask2former_ugains",
        "UGainS's Mask2Former on Swin (Lightning)",
        "scorer.name=rba",
        ("backbone.patch_embed.", "pixel_decoder.transformer.", "sem_seg_head.class_embed."),
    ),
    Family(
        "mask2former_resnet",
        "detectron2 Mask2Former on ResNet (Mask2Anomaly)",
        "",
        ("backbone.stem.", "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."),
    ),
)
"""Known kinds of checkpoint, the more special ones first."""


def without_prefixes(weights: WeightFile) -> WeightFile:
    """The same weights, without the prefixes that wrappers put before every name."""
    state = weights.state
    stripped = True
    while stripped:
        stripped = False
        for prefix in WRAPPER_PREFIXES:
            if state and all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
                stripped = True
    return WeightFile(weights.path, state, weights.metadata)


def recognise(weights: WeightFile) -> Family:
    """The family of a weights file.

    Args:
        weights: What was read, wrapper prefixes already removed.

    Raises:
        WeightsError: No known family; lists the first few names that were found.
    """
    for family in FAMILIES:
        if family.matches(weights.state):
            return family
    names = ", ".join(list(weights.state)[:4])
    known = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
    raise WeightsError(f"weights file '{weights.path}' is of no known family ({known}): it has {len(weights.state)} entries, {names}, …")
