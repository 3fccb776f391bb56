"""The two sizes of benchmarks."""

from pathlib import Path
from typing import Any

import torch

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import (
    CLIPVisionModelWithProjection,
    DepthAnythingForDepthEstimation,
    LlavaForConditionalGeneration,
    OneFormerForUniversalSegmentation,
)

from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS
from tests.helpers import tiny

PROMPT = "Describe this picture in words."


def toy(root: Path, images: int) -> dict[str, Any]:
    """The toy world: its LLaVA (8 blocks, H = 128, 36 patches) and its teachers; fields of a recipe."""
    data = write_world(root / f"world{images}", images, 2, seed=3)
    return {
        "backbone": {"checkpoint": str(ASSETS / "llava")},
        "data": {"path": f"coco:{data}"},
        "teachers": {name: {"id": str(ASSETS / name)} for name in ("depth", "seg", "gen")},
    }


def _grown(path: Path, model_class: Any, changes: dict[str, dict[str, Any]]) -> None:
    """Replaces a folder's model by one of other sizes; `changes` by part of the configuration, '' for the whole."""
    config = model_class.config_class.from_pretrained(path)
    for part, values in changes.items():
        for name, value in values.items():
            setattr(getattr(config, part) if part else config, name, value)
    torch.manual_seed(0)
    model_class(config).save_pretrained(path)


def middle(root: Path, images: int) -> dict[str, Any]:
    """The paper's set-up at a quarter of its widths and half its depth, with about 300 tokens.

    16 Llama blocks of H = 1,024; targets of 256 x 256, 256 x 384 and 1 x 256 for 576 x 1,024, 576 x 1,536 and
    1 x 1,024; DINOv2, DPT and the probes' heads at a quarter of their widths. Costs relative to
    the blocks are as in the paper's set-up (Llama-3-8B, ConvNeXt-XXL, 630 tokens), within a tenth: tower 0.40,
    vocabulary 0.07, teachers 0.04, 0.10 and 0.04, all decoders 0.44, all probes 0.30.
    """
    if not (root / "llava").exists():
        tiny.llava(root / "llava", layers=16, hidden=1024, image=128)
        llm = {"intermediate_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 16_032}
        llm["head_dim"] = 64
        tower = {"hidden_size": 576, "intermediate_size": 2304, "num_hidden_layers": 24, "num_attention_heads": 9}
        parts = {"text_config": llm, "vision_config": tower}
        _grown(root / "llava", LlavaForConditionalGeneration, parts)
        tiny.depth_teacher(root / "depth", width=256, size=112)
        whole = {"neck_hidden_sizes": [64, 128, 256, 256], "fusion_hidden_size": 64}
        dino = {"num_hidden_layers": 12, "num_attention_heads": 4}
        _grown(root / "depth", DepthAnythingForDepthEstimation, {"": whole, "backbone_config": dino})
        tiny.seg_teacher(root / "seg", width=48, size=512)
        swin = {"depths": [1, 1, 9, 1], "num_heads": [3, 6, 12, 24]}
        _grown(root / "seg", OneFormerForUniversalSegmentation, {"backbone_config": swin})
        tiny.gen_teacher(root / "gen", projection=256, size=88)
        vit = {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 16, "num_attention_heads": 5}
        _grown(root / "gen", CLIPVisionModelWithProjection, {"": vit})
    data = write_world(root / f"world{images}", images, 2, seed=3)
    return {
        "backbone": {"checkpoint": str(root / "llava"), "prompt": PROMPT},
        "probe": {"dim_head": 8},
        "data": {"path": f"coco:{data}"},
        "teachers": {name: {"id": str(root / name)} for name in ("depth", "seg", "gen")},
    }


SIZES = {"toy": toy, "middle": middle}
