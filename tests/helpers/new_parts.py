"""Adds a family or a teacher to the packages, as one new file and nothing else, and makes tiny weights for each."""

import importlib
from pathlib import Path

import torch

import probing.utils.torchvision_shim  # isort: skip
import transformers as hf

import probing.models
import probing.teachers
from probing.models import find_families
from probing.teachers.registry import CATALOGUE, find_teachers
from tests.helpers import tiny

HERE = Path(__file__).parent


def add_family(monkeypatch, folder):
    """Puts `new_family.py` into `probing.models` as fast_vlm.py, as a new process finds it."""
    _place(monkeypatch, probing.models, folder / "fast_vlm.py", HERE / "new_family.py")
    monkeypatch.setattr(probing.models, "FAMILIES", find_families())


def add_teacher(monkeypatch, folder):
    """Puts `new_teacher.py` into `probing.teachers` as semantic.py, as a new process finds it."""
    _place(monkeypatch, probing.teachers, folder / "semantic.py", HERE / "new_teacher.py")
    monkeypatch.setitem(CATALOGUE, "semantic", find_teachers([folder])["semantic"])


def _place(monkeypatch, package, file, example):
    file.parent.mkdir(exist_ok=True)
    file.write_text(example.read_text())
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(file.parent)])
    importlib.invalidate_caches()


def segformer(path):
    torch.manual_seed(0)
    config = hf.SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=8,
        num_labels=5,
    )  # fmt: skip
    hf.SegformerForSemanticSegmentation(config).save_pretrained(path)
    hf.SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(path)
    return path


def fast_vlm(path):
    torch.manual_seed(0)
    sizes = {"inference_mode": True, "layers": (1, 1, 1, 1, 1), "embed_dims": (8, 8, 32, 32, 32)}
    vision = hf.TimmWrapperConfig(
        architecture="fastvit_mci3", do_pooling=True, global_pool="avg", hidden_size=64, model_args=sizes
    )  # fmt: skip
    text = hf.Qwen2Config(
        vocab_size=len(tiny.tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    config = hf.FastVlmConfig(vision_config=vision, text_config=text, image_token_id=3, image_seq_length=16)
    hf.FastVlmForConditionalGeneration(config).save_pretrained(path)
    size = {"height": 256, "width": 256}
    hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size={"shortest_edge": 256}, crop_size=size),
        tokenizer=tiny.tokenizer(), patch_size=64, vision_feature_select_strategy="full",
        chat_template=tiny.CHAT_TEMPLATE,
    ).save_pretrained(path)  # fmt: skip
    return path
