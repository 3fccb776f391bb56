"""Tiny random vision encoders of the real classes, in the layouts that their publishers use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
import timm
import transformers as t

SIDE = 32
VIT: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": 8,
}  # fmt: skip
TEXT = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 8,
}  # fmt: skip
SQUARE = {"height": SIDE, "width": SIDE}


def _saved(path: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def dinov2(path: Path) -> Path:
    """Its processor crops, as the published one does."""
    processor = t.BitImageProcessor(size={"shortest_edge": 40}, crop_size=SQUARE)
    return _saved(path, t.Dinov2Model(t.Dinov2Config(**VIT)), processor)


def dinov2_registers(path: Path) -> Path:
    model = t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**VIT, num_register_tokens=3))
    return _saved(path, model, t.BitImageProcessor(size={"shortest_edge": 40}, crop_size=SQUARE))


def dinov3(path: Path) -> Path:
    model = t.DINOv3ViTModel(t.DINOv3ViTConfig(**VIT, num_register_tokens=4))
    return _saved(path, model, t.DINOv3ViTImageProcessor(size=SQUARE))


def siglip(path: Path) -> Path:
    """With its text model, as published."""
    model = t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=VIT))
    return _saved(path, model, t.SiglipImageProcessor(size=SQUARE))


def siglip2(path: Path) -> Path:
    """Without a fixed size."""
    vision = {name: value for name, value in VIT.items() if name != "image_size"} | {"num_patches": 16}
    model = t.Siglip2Model(t.Siglip2Config(text_config=TEXT, vision_config=vision))
    return _saved(path, model, t.Siglip2ImageProcessor(patch_size=8, max_num_patches=16))


def clip(path: Path) -> Path:
    """With its text model, as published."""
    model = t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VIT, projection_dim=12))
    return _saved(path, model, t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE))


def internvl(path: Path) -> Path:
    """The encoder inside a whole InternVL."""
    vision = t.InternVLVisionConfig(**VIT | {"image_size": [SIDE, SIDE], "patch_size": [8, 8]})
    text = t.Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    config = t.InternVLConfig(vision_config=vision, text_config=text, image_seq_length=4)
    return _saved(path, t.InternVLForConditionalGeneration(config), t.GotOcr2ImageProcessor(size=SQUARE))


def sam(path: Path) -> Path:
    """With prompt encoder and decoder, as published."""
    vision = t.SamVisionConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8, output_channels=12,
        num_pos_feats=6, mlp_dim=48, window_size=2, global_attn_indexes=[1],
    )  # fmt: skip
    decoder = {"hidden_size": 12, "mlp_dim": 16, "iou_head_hidden_dim": 16, "num_attention_heads": 2}
    prompt = {"hidden_size": 12, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    config = t.SamConfig(vision_config=vision, mask_decoder_config=decoder, prompt_encoder_config=prompt)
    size = {"height": 64, "width": 64}
    return _saved(path, t.SamModel(config), t.SamImageProcessor(size={"longest_edge": 64}, pad_size=size))


def convnext(path: Path) -> Path:
    """A classifier, of which the head is left out."""
    config = t.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
    return _saved(path, t.ConvNextForImageClassification(config), t.ConvNextImageProcessor(size={"shortest_edge": 128}))


def swin(path: Path) -> Path:
    config = t.SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    return _saved(path, t.SwinModel(config), t.ViTImageProcessor(size={"height": 64, "width": 64}))


def _timm(path: Path, architecture: str, **kwargs: Any) -> Path:
    from timm.models import save_for_hf

    model = timm.create_model(architecture, num_classes=3, **kwargs)
    save_for_hf(model, path, model_args=kwargs, safe_serialization=True)
    return path


def timm_vit(path: Path) -> Path:
    """With a class token and registers."""
    return _timm(
        path, "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=24, num_heads=2, reg_tokens=4
    )  # fmt: skip


def timm_cnn(path: Path) -> Path:
    return _timm(path, "resnet10t", pretrained_cfg_overlay={"input_size": (3, 96, 96)})


def timm_swin(path: Path) -> Path:
    """Its feature map has the channels last."""
    return _timm(
        path, "swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1), num_heads=(1, 1), embed_dim=8
    )


MAKERS: dict[str, Callable[[Path], Path]] = {
    maker.__name__: maker
    for maker in (
        dinov2, dinov2_registers, dinov3, siglip, siglip2, clip, internvl, sam, convnext, swin, timm_vit, timm_cnn,
        timm_swin,
    )
}  # fmt: skip


def make(name: str, path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    return MAKERS[name](path)
