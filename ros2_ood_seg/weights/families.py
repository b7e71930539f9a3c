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
        name: Short name.
        title: What it is, in words.
        use: Settings that make the pipeline use it, empty when it has no place in the pipeline.
        signature: Beginnings of names that all have to occur.
        outputs: An entry and the length of its first axis, where only that tells two families apart.
        without: Beginnings of names of which none may occur, those that another network built on this one adds.
        files: Names under which settings look for such a file, the usual one first; empty for the name.
    """

    name: str
    title: str
    use: str
    signature: tuple[str, ...]
    outputs: tuple[str, int] | None = None
    without: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def file_names(self) -> tuple[str, ...]:
        """Names under which settings look for such a file, the usual one first."""
        return self.files or (self.name,)

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state dict without wrapper prefixes is of this family."""
        if not all(any(key.startswith(start) for key in state) for start in self.signature):
            return False
        if any(key.startswith(self.without) for key in state):
            return False
        return self.outputs is None or state[self.outputs[0]].shape[:1] == (self.outputs[1],)


_WRN38 = ("mod1.conv1.weight", "mod7.block1.", "aspp.features.0.", "bot_fine.weight", "final.6.weight")

_MOBILE = ("features.0.0.weight", "aspp.features.0.", "bot_fine.weight", "final.6.weight")
_LDN121 = ("backbone.features.denseblock4.", "spp.spp.", "upsample.upsample_layers.", "logits.conv.")
_SEGFORMER = ("backbone.layers.0.0.projection.", "backbone.layers.0.1.0.ffn.", "decode_head.fusion_conv.conv.weight")
_MASK2FORMER = ("backbone.", "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor.class_embed.weight")

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
        files=("deeplab_mobilenet_v2", "pebal", "max_entropy"),
    ),
    Family("pebal", "PEBAL on DeepLabV3+ WideResNet-38 (20 outputs)", "scorer.name=pebal", _WRN38, outputs=("final.6.weight", 20)),
    Family(
        "deeplab_wrn38",
        "DeepLabV3+ WideResNet-38: plain, or trained for maximum entropy (Meta-OoD), which the file does not tell",
        "scorer.name=deeplab_wrn38 or max_entropy or mahalanobis",
        _WRN38,
        files=("deeplab_wrn38", "max_entropy"),
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
    *(
        Family(
            "sam",
            f"Segment Anything {title}",
            f"segmenter.name=sam and --set segmenter.model={model}",
            ("image_encoder.", "prompt_encoder.", "mask_decoder.", "image_encoder.patch_embed.proj.bias"),
            outputs=("image_encoder.patch_embed.proj.bias", width),
            without=("mask_decoder.hf_token.",),
            files=(file,),
        )
        for title, model, width, file in (
            ("ViT-B", "vit_b", 768, "sam_vit_b_01ec64"),
            ("ViT-L", "vit_l", 1024, "sam_vit_l_0b3195"),
            ("ViT-H", "vit_h", 1280, "sam_vit_h_4b8939"),
        )
    ),
    Family(
        "s2m_prompt_generator",
        "detectron2 Faster R-CNN with FPN, the layout of S2M's box prompt generator",
        "prompts.boxes.method=faster_rcnn",
        ("backbone.bottom_up.", "proposal_generator.rpn_head.", "roi_heads.box_predictor."),
        without=("roi_heads.mask_head.",),
    ),
    Family(
        "mask2anomaly",
        "detectron2 Mask2Former with global attention (Mask2Anomaly)",
        "scorer.name=mask2anomaly",
        (*_MASK2FORMER, "sem_seg_head.predictor.transformer_cross_attention_layers.0.multihead_attn_background."),
    ),
    Family(
        "uno",
        "detectron2 Mask2Former with a negative class beside those of Cityscapes (UNO)",
        "scorer.name=uno",
        _MASK2FORMER,
        outputs=("sem_seg_head.predictor.class_embed.weight", 21),
    ),
    Family(
        "mask2former",
        "detectron2 Mask2Former on Swin or ResNet: RbA or EAM, which the file does not tell",
        "scorer.name=rba or eam",
        _MASK2FORMER,
        files=("rba", "eam", "uno", "mask2anomaly"),
    ),
    Family(
        "mask2former_ugains",
        "UGainS's Mask2Former on Swin (Lightning)",
        "scorer.name=rba and --set scorer.weights=rude0fhk, or --profile ugains",
        ("backbone.patch_embed.", "pixel_decoder.transformer.", "sem_seg_head.class_embed."),
        files=("rude0fhk", "rba"),
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
