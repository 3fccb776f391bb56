"""Tiny random checkpoints in LLaVA's original layout and OLA-VLM's: names, fields and shards as published."""

import json

import timm
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from tests.helpers import tiny

LLMS = {
    "llava_llama": (LlamaConfig, LlamaForCausalLM, "LlavaLlamaForCausalLM"),
    "llava_mistral": (MistralConfig, MistralForCausalLM, "LlavaMistralForCausalLM"),
    "llava_phi3": (Phi3Config, Phi3ForCausalLM, "LlavaPhi3ForCausalLM"),
    "ola_llama": (LlamaConfig, LlamaForCausalLM, "OlaLlavaLlamaForCausalLM"),
    "probe_dsg_llava_llama": (LlamaConfig, LlamaForCausalLM, "ProbeDSGLlavaLlamaForCausalLM"),
}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def tower(path):
    """A CLIP vision tower as its own folder."""
    torch.manual_seed(5)
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = CLIPVisionModel(config)
    model.save_pretrained(path)
    return model


def convnext_tower(path):
    """timm's smallest ConvNeXt, with timm's description, and a head as published towers have."""
    path.mkdir()
    torch.manual_seed(7)
    model = timm.create_model("test_convnext", pretrained=False, num_classes=0, global_pool="").eval()
    (path / "config.json").write_text(json.dumps({"architecture": "test_convnext"}))
    return model


def original(
    path, kind="llava_llama", convnext=False, own_tower=False, special=0, headers=False, extra=None, split=True,
    suffix="safetensors", token_format="expand_emb", anyres=False, projector="mlp2x_gelu",
):  # fmt: skip
    """Writes a checkpoint in the original layout.

    Args:
        path: folder to make; the tower is next to it.
        kind: model type.
        convnext: a ConvNeXt of 128 pixels instead of CLIP, among the checkpoint's weights.
        own_tower: whether the tower's weights are among the checkpoint's (OLA-VLM), or apart (LLaVA-1.5).
        special: rows of the special tokens for depth and seg; gen has 4. 0 for none.
        headers: give the tokenizer Llama-3's role headers.
        extra: further tensors.
        split: two shards and an index.
        suffix: safetensors or bin.
        token_format: what is made of the special tokens' rows.
        projector: its type, mlp2x_gelu, mlp3x_gelu or linear.
        anyres: tiles of 32 pixels, and a newline after each of their rows.
    """
    path.mkdir(parents=True)
    place = path.parent / ("tower-res128" if convnext else "tower")
    vision = convnext_tower(place) if convnext else tower(place)
    width = 64 if convnext else 24
    tokenizer = tiny.tokenizer()
    tokenizer = type(tokenizer)(
        tokenizer_object=without_image(tokenizer), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    if headers:
        tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    tokenizer.save_pretrained(path)
    config_class, model_class, name = LLMS[kind]
    values = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "rope_theta": 500000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(6)
    tensors = dict(model_class(config_class(**values)).state_dict())
    names = {"linear": [""], "mlp2x_gelu": ["0.", "2."], "mlp3x_gelu": ["0.", "2.", "4."]}[projector]
    for number, name_of_layer in enumerate(names):
        tensors[f"model.mm_projector.{name_of_layer}weight"] = 0.3 * torch.randn(32, 32 if number else width)
        tensors[f"model.mm_projector.{name_of_layer}bias"] = torch.randn(32)
    if convnext:
        tensors |= {f"model.vision_tower.vision_tower.{k}": v for k, v in vision.state_dict().items()}
    elif own_tower:
        tensors |= {f"model.vision_tower.vision_tower.vision_model.{k}": v for k, v in vision.state_dict().items()}
    if special:
        for task, count in (("gen", 4), ("depth", special), ("seg", special)):
            tensors[f"model.special_{task}_tokens"] = torch.randn(count, 32)
    if anyres:
        tensors["model.image_newline"] = torch.randn(32)
    tensors |= extra or {}
    tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
    names = sorted(tensors)
    files = [names[: len(names) // 2], names[len(names) // 2 :]] if split else [names]
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    where = {}
    for number, some in enumerate(files, start=1):
        file = f"{stem}-{number:05d}-of-{len(files):05d}.{suffix}" if split else f"{stem}.{suffix}"
        part = {key: tensors[key] for key in some}
        if suffix == "safetensors":
            save_file(part, path / file, {"format": "pt"})
        else:
            torch.save(part, path / file)
        where |= dict.fromkeys(some, file)
    if split:
        (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    task = {"num_task_tokens": 4, "aux_mode": "gen-depth-seg", "task_token_format": token_format} if special else {}
    raw = values | {
        "model_type": kind, "architectures": [name], "rope_scaling": None, "torch_dtype": "float32",
        "mm_vision_tower": str(place), "mm_projector_type": projector, "mm_hidden_size": width,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad", "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True,
        "tokenizer_padding_side": "right", "tokenizer_model_max_length": 4096, "hidden_act": "silu",
    } | task  # fmt: skip
    if anyres:
        raw |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
        raw |= {"image_grid_pinpoints": PINPOINTS}
    (path / "config.json").write_text(json.dumps(raw))
    return tensors, raw, tokenizer


def without_image(tokenizer):
    """The original code knows no token for an image: it splits the text there."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    last = "<image>"
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != last]
    vocabulary = state["model"]["vocab"]
    gap = vocabulary.pop(last)
    state["model"]["vocab"] = {token: number - (number > gap) for token, number in vocabulary.items()}
    for token in state["added_tokens"]:
        token["id"] = state["model"]["vocab"][token["content"]]
    return Tokenizer.from_str(json.dumps(state))
