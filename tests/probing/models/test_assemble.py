"""Models assembled from an LLM and a vision tower, against a plain composition of the parts."""

import json
import re
from itertools import chain

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GraniteConfig,
    SiglipVisionModel,
    T5Config,
)

from probing.distillation.recipe import DistillRecipe
from probing.distillation.trainer import run_stage
from probing.models import load_backbone
from probing.models.assemble import assemble, describe_assembly
from probing.recipe import AssembleRecipe, BackboneRecipe
from tests.helpers import encoders, parts, tiny
from tests.helpers.cli import error_line, probing

CPU = torch.device("cpu")
QUESTION = "Which colour?"


def pictures():
    noise = torch.Generator().manual_seed(0)
    return [
        Image.fromarray((torch.rand(*size, 3, generator=noise) * 255).byte().numpy()) for size in ((40, 50), (64, 32))
    ]


def clip(path):
    model = CLIPVisionModel.from_pretrained(encoders.make("clip", path)).eval()
    return str(path), lambda pixels: model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def siglip(path):
    model = SiglipVisionModel.from_pretrained(encoders.make("siglip", path)).eval()
    return str(path), lambda pixels: model(pixels, output_hidden_states=True).hidden_states[-2]


def open_clip_visual(path, vision):
    import open_clip

    return open_clip.create_model(f"local-dir:{parts.open_clip_model(path, vision)}").visual.eval()


def open_clip_vit(path, width=24):
    visual = open_clip_visual(path, parts.VIT | {"width": width, "head_width": width // 2})

    def features(pixels):
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
        x = visual.ln_pre(x)
        for block in visual.transformer.resblocks[:-1]:
            x = block(x)
        return x[:, 1:]

    return str(path), features


def open_clip_32(path):
    return open_clip_vit(path, width=32)  # as the LLM


def convnext(path):
    trunk = open_clip_visual(path, parts.CONVNEXT).trunk
    return str(path), lambda pixels: trunk.stages(trunk.stem(pixels)).flatten(2).transpose(1, 2)


def timm_vit(path):
    import timm

    model = timm.create_model(f"local-dir:{encoders.make('timm_vit', path)}", pretrained=True, num_classes=0).eval()

    def features(pixels):
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
        for block in model.blocks[:-1]:
            x = block(x)
        return x[:, model.num_prefix_tokens :]

    return str(path), features


def project(features, projector):
    """Linear layers with GELU between them."""
    layers = [layer for layer in projector.children() if isinstance(layer, torch.nn.Linear)]
    for number, layer in enumerate(layers):
        features = layer(features if number == 0 else torch.nn.functional.gelu(features))
    return features


def compose(tower, projector, llm, batch, image_id):
    """The embedded sequence: words, and the projected patches at the image tokens."""
    embedded = llm.get_input_embeddings()(batch["input_ids"].clamp(max=llm.config.vocab_size - 1))
    embedded[batch["input_ids"] == image_id] = project(tower(batch["pixel_values"]), projector).flatten(0, 1)
    return embedded


@pytest.mark.parametrize(
    ("tower", "projector"),
    [(clip, "mlp2x_gelu"), (siglip, "linear"), (open_clip_vit, "mlp2x_gelu"), (convnext, "mlp2x_gelu"),
     (timm_vit, "mlp4x_gelu"), (convnext, "linear"), (open_clip_32, "identity")],
)  # fmt: skip
def test_states_are_those_of_a_plain_composition(tmp_path, tower, projector):
    source, features = tower(tmp_path / "tower")
    llm = AutoModelForCausalLM.from_pretrained(parts.llm(tmp_path / "llm")).eval()
    recipe = AssembleRecipe(llm=str(tmp_path / "llm"), vision_tower=source, projector=projector)
    out = assemble(recipe, tmp_path / "out")
    backbone = load_backbone(BackboneRecipe(checkpoint=str(out), prompt=QUESTION), CPU, with_head=True)
    states, tokens = backbone.hidden_states(pictures(), "all,final")
    prompt = AutoTokenizer.from_pretrained(llm.name_or_path).apply_chat_template(
        [{"role": "user", "content": f"<image>\n{QUESTION}"}], tokenize=False, add_generation_prompt=True
    )
    assert backbone.prepare.text == prompt
    # another question makes the second sequence longer: padding
    texts = [prompt, prompt.replace(QUESTION, "And what else is there?")]
    batch = backbone.prepare.encode(pictures(), texts)
    assert not batch["attention_mask"].all()
    own = backbone.prepare.token_map(batch)
    last = {}
    llm.model.layers[-1].register_forward_hook(
        lambda module, args, output: last.update(state=output[0] if isinstance(output, tuple) else output)
    )
    padded = {}
    backbone.stream(type(backbone.prepare(pictures()))(batch, own), list(states), padded.__setitem__)
    for got, inputs in ((states, backbone.prepare(pictures()).inputs), (padded, batch)):
        with torch.no_grad():
            embedded = compose(features, backbone.projector, llm, inputs, backbone.prepare.image_token_id)
            mask = inputs["attention_mask"]
            expected = llm.model(inputs_embeds=embedded, attention_mask=mask, output_hidden_states=True).hidden_states
        valid = mask.bool()
        for layer, state in zip(got, [*expected[:-1], last["state"], expected[-1]], strict=True):
            torch.testing.assert_close(got[layer][valid], state[valid], rtol=0, atol=1e-6)
    assert tokens.counts()["image"] == features(backbone.prepare(pictures()).inputs["pixel_values"]).shape[1]


@pytest.mark.parametrize("tower", [clip, convnext])
def test_generate_equals_a_greedy_loop_of_whole_passes(tmp_path, tower):
    source, features = tower(tmp_path / "tower")
    out = assemble(AssembleRecipe(llm=str(parts.llm(tmp_path / "llm")), vision_tower=source), tmp_path / "out")
    backbone = load_backbone(BackboneRecipe(checkpoint=str(out), prompt=QUESTION), CPU, with_head=True)
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    inputs = backbone.prepare(pictures()).inputs
    ids, number = inputs["input_ids"], backbone.prepare.image_token_id
    with torch.no_grad():
        for _ in range(6):
            embedded = compose(features, backbone.projector, llm, inputs | {"input_ids": ids}, number)
            logits = llm(inputs_embeds=embedded).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    written = backbone.writer.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(written, ids)


def test_another_image_size_changes_the_grid_of_a_saved_model(tmp_path):
    """open_clip's ViT has positions for one size, which it interpolates."""
    llm, (tower, _) = parts.llm(tmp_path / "llm"), open_clip_vit(tmp_path / "tower")
    out = assemble(AssembleRecipe(llm=str(llm), vision_tower=tower, image_size=48), tmp_path / "out")
    backbone = load_backbone(BackboneRecipe(checkpoint=str(out)), CPU)
    states, tokens = backbone.hidden_states(pictures(), "0")
    assert tokens.grid == (6, 6) and tokens.image_states(states[0]).shape == (2, 36, 32)


def test_dry_run_describes_the_model_without_weights(tmp_path):
    """For parts whose weights are absent, and for open_clip's full size by name."""
    source, _ = convnext(tmp_path / "tower")
    parts.llm(tmp_path / "llm")
    for file in tmp_path.glob("*/*.safetensors"):
        file.unlink()
    out = tmp_path / "out"
    shown = probing("assemble", "--llm", tmp_path / "llm", "--vision-tower", source, "--out", out, "--dry-run").stdout
    assert "test_convnext" not in shown and "GB to assemble" in shown and "image grid      2 x 2" in shown
    tag = "laion2b_s34b_b82k_augreg_soup"
    large = AssembleRecipe(
        llm=str(tmp_path / "llm"), vision_tower=f"open_clip:convnext_xxlarge/{tag}", image_size=768
    )  # fmt: skip
    found = describe_assembly(large)
    assert found["image_grid"] == [24, 24] and found["vision_tower"]["hidden_size"] == 3072
    # open_clip's trunk without the norm of its head, which no feature depends on
    assert found["parameters"]["vision_tower"] == f"{843_398_016 - 2 * 3072:,}"
    assert not out.exists()


def test_bad_input_is_one_line(tmp_path):
    llm, tower = parts.llm(tmp_path / "llm"), convnext(tmp_path / "tower")[0]
    plain = parts.llm(tmp_path / "plain", template=None)
    t5 = tmp_path / "t5"
    T5Config(d_model=8, num_layers=1, num_heads=1).save_pretrained(t5)
    word = parts.llm(tmp_path / "word")
    tokenizer = json.loads((word / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<image>"] = len(tokenizer["model"]["vocab"])
    (word / "tokenizer.json").write_text(json.dumps(tokenizer))
    for options, message in (
        ({"llm": plain}, "has no chat template; give --template vicuna_v1, llava_llama_3"),
        ({"llm": t5}, "encoder-decoder"),
        ({"llm": word}, "<image> is an ordinary word"),
        ({"llm": tmp_path / "none"}, "no such LLM"),
        ({"vision-tower": "open_clip:ViT-B-61/openai"}, "nearest: ViT-B-16"),
        ({"vision-tower": "open_clip:ViT-B-16"}, "needs its weights: open_clip:ViT-B-16/TAG, one of openai"),
        ({"image-size": 16}, "has no grid at 16 pixels"),
        ({"projector": "identity"}, "the tower is 64 wide, the LLM 32; give linear"),
        ({"projector": "mlp"}, "no projector is called 'mlp'"),
        ({"out": llm}, "is not empty; choose another --out"),
    ):
        values = {"llm": llm, "vision-tower": tower, "out": tmp_path / "out"} | options
        line = error_line("assemble", *chain(*((f"--{name}", value) for name, value in values.items())))
        assert re.search(message, line), line
        assert len(line.split()) < 30
    assert not (tmp_path / "out").exists()
    probing("assemble", "--llm", plain, "--vision-tower", tower, "--template", "vicuna_v1", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "config",
    [Gemma2Config(), CohereConfig(), GraniteConfig(logits_scaling=8.0), FalconH1Config(lm_head_multiplier=2.0)],
    ids=lambda config: config.model_type,
)
def test_llms_whose_logits_llava_would_change_are_refused(tmp_path, config):
    """LLaVA applies `lm_head` alone, and the LLM would write other words than its own class."""
    config.save_pretrained(tmp_path / "llm")
    line = error_line("assemble", "--llm", tmp_path / "llm", "--vision-tower", "x", "--out", tmp_path / "out")
    assert "scales its logits" in line and "give another LLM" in line


@pytest.mark.parametrize(
    ("projector", "stage", "moving"), [("linear", "vpt", "vision_tower"), ("mlp3x_gelu", "pt", "linear_3")]
)
def test_stages_train_assembled_models(tmp_path, projector, stage, moving):
    """And what a stage saves loads again, with the same tensors."""
    llm, tower = parts.llm(tmp_path / "llm"), convnext(tmp_path / "tower")[0]
    start = assemble(AssembleRecipe(llm=str(llm), vision_tower=tower, projector=projector), tmp_path / "start")
    talk = tiny.conversations(tmp_path / "talk", 4)
    values = {
        "checkpoint": str(start), "stage": stage, "workers": 0, "batch_size": 4, "micro_batch": 2, "lr": 1e-2,
        "data": {"conversations": str(talk / "data.json"), "image_root": str(talk)},
        "trainer": {"report_to": "none", "use_cpu": True}, "max_steps": 2,
    }  # fmt: skip
    out = run_stage(DistillRecipe.model_validate(values), tmp_path / "out")
    before, after = load_file(start / "model.safetensors"), load_file(out / "model.safetensors")
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and any(moving in name for name in moved)
    assert stage == "vpt" or all("multi_modal_projector" in name for name in moved)
    loaded = load_backbone(BackboneRecipe(checkpoint=str(out)), CPU).core.state_dict()
    assert all(torch.equal(loaded[name.removeprefix("model.")], after[name]) for name in moved - {"lm_head.weight"})
