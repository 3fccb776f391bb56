"""What a run costs, told from shapes alone, against sizes counted by hand and runs that were measured."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    DepthAnythingConfig,
    Dinov2Config,
    DPTImageProcessor,
    OneFormerConfig,
    SwinConfig,
)

from probing.cost import training_cost
from probing.dry_run import META, count_flops, dry_run
from probing.errors import UserError
from probing.recipe import ProbeRunRecipe
from tests import tiny


def test_peak_and_flops_of_a_chain_of_products():
    """a @ b @ c with a view and a deletion in between; floats alone count."""
    with dry_run() as usage, count_flops() as flops:
        a, b, c = (torch.ones(64, 64, device=META) for _ in range(3))
        ids = torch.arange(64, device=META)
        assert usage.bytes == 3 * 64 * 64 * 4
        assert ids.device.type == "cpu"
        first = a @ b
        view = first.t()[:10]
        del first
        second = view.t() @ c[:10]
        assert usage.bytes == 5 * 64 * 64 * 4  # the view keeps its product alive
        del view, second
        assert usage.bytes == 3 * 64 * 64 * 4
    assert usage.peak == 5 * 64 * 64 * 4
    assert flops() == 2 * 64 * 64 * (64 + 10)


def test_masks_keep_their_values():
    """How many places a mask chooses is known, wherever the mask was sent."""
    ids = torch.tensor([[1, 7, 7, 2], [1, 7, 7, 2]])
    with dry_run():
        states = torch.ones(2, 4, 8, device=META)
        mask = (ids.to(META) == 7).to(states.device)
        assert states[mask].shape == (4, 8)
        assert states[:, mask[0]].shape == (2, 2, 8)
        assert int(mask.sum()) == 4


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_counts_as_fused(grouped):
    """No matrix of weights is held, and the operations are those of both products, backward included."""
    batch, heads, length, width = 2, 4, 512, 16
    with dry_run() as usage, count_flops() as flops:
        q, k, v = (
            torch.ones(batch, h, length, width, device=META, requires_grad=True)
            for h in (heads, *([2, 2] if grouped else [heads, heads]))
        )
        mask = torch.ones(batch, 1, length, length, dtype=torch.bool)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        assert out.shape == q.shape
        forward = flops()
        out.sum().backward()
        assert q.grad.shape == q.shape
        assert k.grad.shape == k.shape
        assert usage.peak < 4 * batch * heads * length * length
    product = 2 * batch * heads * length * length * width
    assert forward == 2 * product
    assert flops() == 7 * product


def full_size(root):
    """The paper's checkpoint and teachers: configurations, preprocessing and a small tokenizer, and no weights."""
    checkpoint = root / "ola-llama3"
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    tokenizer.save_pretrained(checkpoint)
    llm = {
        "model_type": "llava_llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "max_position_embeddings": 8192,
    }  # fmt: skip
    vision = {
        "mm_vision_tower": "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup-res768",
        "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad",
    }  # fmt: skip
    (checkpoint / "config.json").write_text(json.dumps(llm | vision))
    dinov2 = Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14,
        out_indices=[5, 12, 18, 24], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    neck = {"reassemble_hidden_size": 1024, "neck_hidden_sizes": [256, 512, 1024, 1024], "fusion_hidden_size": 256}
    DepthAnythingConfig(backbone_config=dinov2, **neck).save_pretrained(root / "depth")
    DPTImageProcessor(size={"height": 518, "width": 518}).save_pretrained(root / "depth")
    swin = SwinConfig(
        image_size=384, patch_size=4, embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    OneFormerConfig(backbone_config=swin, num_labels=133).save_pretrained(root / "seg")
    DPTImageProcessor(size={"height": 800, "width": 800}).save_pretrained(root / "seg")
    CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224,
        patch_size=14, projection_dim=1024,
    ).save_pretrained(root / "gen")  # fmt: skip
    CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}).save_pretrained(
        root / "gen"
    )
    return {
        "backbone": {"checkpoint": str(checkpoint)},
        "data": {"path": f"coco:{tiny.coco(root / 'coco', train=2, val=2)}"},
        "teachers": {name: {"id": str(root / name)} for name in ("depth", "seg", "gen")},
        "layers": "1-32",
        "controls": [],
        "fit": {"epochs": 2, "batch_size": 2, "micro_batch": 2, "workers": 0, "ridge": False},
    }


def test_the_papers_run_without_weights(tmp_path):
    """Llama-3-8B with ConvNeXt-XXL, 32 layers, three teachers; by hand 16.8 TFLOP for 630 tokens."""
    cost = training_cost(ProbeRunRecipe.model_validate(full_size(tmp_path)))
    further = 750 - 630  # a small tokenizer makes more of the prompt; per token LLM, proj_in and to_kv of all probes
    by_hand = 16.8e12 + further * (2 * 6.98e9 + 32 * (1024 + 1536 + 1024) * (4 * 4096 + 6 * 256))
    assert cost.flops == pytest.approx(by_hand, rel=0.02)
    assert cost.backbone == pytest.approx(2 * (7.505e9 + 0.846e9 + 0.0294e9), rel=0.01)
    assert cost.probes == pytest.approx(16 * 1.005e9, rel=0.005)


def test_a_batch_of_corrupt_images_is_said(models, tmp_path):
    coco = tiny.coco(tmp_path / "coco", train=2, val=2)
    for image in (coco / "train2017").iterdir():
        image.write_bytes(b"no image")
    values = {
        "backbone": {"checkpoint": str(models["llava"])},
        "data": {"path": f"coco:{coco}"},
        "teachers": {"gen": {"id": str(models["gen"])}},
        "fit": {"batch_size": 2, "micro_batch": 2, "workers": 0},
    }
    with pytest.raises(UserError, match="none of the first 2 images could be read"):
        training_cost(ProbeRunRecipe.model_validate(values))


@pytest.mark.slow
def test_planned_memory_is_what_a_training_takes():
    """In a fresh process, above what it held before; see tests/benchmarks/memory.py."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--sizes", "1024,2,224,8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) == pytest.approx(1, abs=0.1)
