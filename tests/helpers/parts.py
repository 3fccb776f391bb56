"""Tiny random parts of a model: LLMs, and vision towers of open_clip, timm and transformers."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from tests.helpers import tiny

TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 3, "head_width": 12}
CONVNEXT = {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template of an LLM, whose messages are texts."""


def llm(path: Path, config: PreTrainedConfig | None = None, template: str | None = CHATML, seed: int = 0) -> Path:
    """An LLM with its tokenizer, which knows no image."""
    from tests.helpers.original import without_image

    tokenizer = tiny.tokenizer()
    tokenizer = type(tokenizer)(
        tokenizer_object=without_image(tokenizer), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    torch.manual_seed(seed)
    values = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(config or LlamaConfig(**values)).save_pretrained(path)
    return path


def open_clip_model(path: Path, vision: dict, seed: int = 1) -> Path:
    """A model as open_clip publishes it; its weights vary enough that features of images differ."""
    torch.manual_seed(seed)
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": TEXT}
    model = open_clip.CLIP(**config)
    path.mkdir(parents=True)
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    preprocessing = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))
    return path
