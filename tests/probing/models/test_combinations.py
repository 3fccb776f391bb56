"""Towers, strategies, feature layers, processor fields and LLMs in one LLaVA: always transformers' own states."""

import json

import pytest
import torch
from PIL import Image

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
import transformers as hf

from analysis.planning.probe_training import plan_training
from probing.models import describe_checkpoint, load_backbone
from probing.models.base import FINAL, Batch
from probing.models.decoder import decoder_parts
from probing.recipe import BackboneRecipe, ProbeRunRecipe
from probing.utils.errors import UserError
from tests.helpers import tiny

CPU = torch.device("cpu")
VIT = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TOWERS = {  # configuration, and tokens before the patches
    "clip": (lambda: hf.CLIPVisionConfig(**VIT), 1),
    "siglip": (lambda: hf.SiglipVisionConfig(**VIT, vision_use_head=False), 0),
    "dinov2_registers": (lambda: hf.Dinov2WithRegistersConfig(**VIT, num_register_tokens=4), 5),
    "idefics3": (lambda: hf.Idefics3VisionConfig(**VIT), 0),  # cannot be run on shapes alone
    "deit": (lambda: hf.DeiTConfig(**VIT), 2),
    "swin": (
        lambda: hf.SwinConfig(
            image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=2
        ),
        0,
    ),
}
STRATEGIES = ("default", "full")
FIELDS = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")

LLM = {
    "vocab_size": 277, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
GPT = {
    "vocab_size": 277, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": 0,
    "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
MPT = {"vocab_size": 277, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128, "tie_word_embeddings": False}
BODIES = {  # configuration, decoder blocks, final norm
    **{
        name: (name, LLM, "layers", "norm")
        for name in (
            "Llama", "Mistral", "Qwen2", "Phi3", "StableLm", "Olmo2", "Granite", "Cohere", "Starcoder2", "Mixtral",
            "SmolLM3",
        )
    },
    **{name: (name, LLM | {"head_dim": 8}, "layers", "norm") for name in ("Qwen3", "Gemma2", "Gemma3Text", "Glm4")},
    "Phi": ("Phi", LLM, "layers", "final_layernorm"),
    "Persimmon": ("Persimmon", LLM, "layers", "final_layernorm"),
    "GPTNeoX": ("GPTNeoX", LLM, "layers", "final_layer_norm"),
    "BioGpt": ("BioGpt", LLM, "layers", "layer_norm"),
    "Falcon": ("Falcon", LLM, "h", "ln_f"),
    "Bloom": ("Bloom", GPT | {"hidden_size": 32}, "h", "ln_f"),
    "Mpt": ("Mpt", MPT, "blocks", "norm_f"),
    "GPT2": ("GPT2", GPT, "h", "ln_f"),
    "GPTJ": ("GPTJ", GPT | {"rotary_dim": 4}, "h", "ln_f"),
    "OPT": ("OPT", LLM | {"ffn_dim": 64, "word_embed_proj_dim": 32}, "decoder.layers", "decoder.final_layer_norm"),
}  # fmt: skip


def llava(path, tower="clip", strategy="default", layer=-2, text=None, fields=None, **values):
    """A LLaVA folder of random weights; `fields` replaces what its processor states, None takes a field away."""
    vision, before = TOWERS[tower][0](), TOWERS[tower][1]
    text = text or hf.LlamaConfig(**LLM)
    text.vocab_size = len(tiny.tokenizer())
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, image_token_id=3, vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(path)
    side = {"height": 32, "width": 32}
    hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side), tokenizer=tiny.tokenizer(),
        patch_size=8, num_additional_image_tokens=before, vision_feature_select_strategy=strategy,
        chat_template=tiny.CHAT_TEMPLATE,
    ).save_pretrained(path)  # fmt: skip
    edit(path / "processor_config.json", fields or {})
    edit(path / "config.json", values)
    return model


def edit(file, values):
    stated = {name: value for name, value in (json.loads(file.read_text()) | values).items() if value is not None}
    file.write_text(json.dumps(stated))


def pictures():
    noise = torch.randint(0, 255, (2, 40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [Image.fromarray(one.numpy()) for one in noise]


def load(path):
    return load_backbone(BackboneRecipe(checkpoint=str(path), dtype="float32"), CPU)


def padded_batch(backbone):
    """Two images, the second with a longer prompt, so that the first is padded."""
    inputs = backbone.prepare.encode(pictures(), [backbone.prepare.text, backbone.prepare.text + " a red cube"])
    batch = Batch(inputs, backbone.prepare.token_map(inputs))
    assert batch.tokens.mask("padding").any()
    return batch


def assert_own_states(path, model, blocks, norm):
    """Every layer against transformers' `hidden_states`, and hooks on blocks and norm that the test names itself."""
    backbone = load(path)
    batch = padded_batch(backbone)
    states = {}
    backbone.stream(batch, [*range(backbone.layers + 1), FINAL], states.__setitem__)
    llm, raw = model.model.language_model, {}
    for layer, block in enumerate(llm.get_submodule(blocks), start=1):
        block.register_forward_hook(
            lambda module, args, out, layer=layer: raw.update({layer: out[0] if isinstance(out, tuple) else out})
        )
    llm.get_submodule(norm).register_forward_hook(lambda module, args, out: raw.update({FINAL: out}))
    with torch.no_grad():
        own = model(**batch.inputs, output_hidden_states=True).hidden_states
    for layer in range(backbone.layers):
        torch.testing.assert_close(states[layer], own[layer], rtol=0, atol=1e-6)
    assert raw.keys() | {0} == states.keys()
    for layer, state in raw.items():
        torch.testing.assert_close(states[layer], state, rtol=0, atol=1e-6)
    return states, batch


@pytest.mark.parametrize(
    ("tower", "strategy", "layer"),
    [
        *[(tower, strategy, -1) for tower in TOWERS for strategy in STRATEGIES],
        *[("clip", "default", layer) for layer in (-2, 1, [-2, 1])],
        ("siglip", "full", [-2, 1]),
        ("swin", "full", 1),
    ],
    ids=str,
)
def test_every_tower_strategy_and_layer(tmp_path, tower, strategy, layer):
    model = llava(tmp_path, tower, strategy, layer)
    states, batch = assert_own_states(tmp_path, model, "layers", "norm")
    tokens, dropped = batch.tokens, strategy == "default"
    with torch.no_grad():
        features = model.get_image_features(batch.inputs["pixel_values"]).pooler_output
    first = tokens.image_states(states[0])
    patches = first.shape[1]
    assert tokens.grid[0] * tokens.grid[1] == patches == (16 if tower != "swin" else len(features[0]) + dropped)
    extra = len(features[0]) - patches
    assert tokens.mask("cls").sum(dim=1).tolist() == [max(0, extra)] * 2 and extra == TOWERS[tower][1] - dropped
    for row, feature in enumerate(features):
        placed = feature[extra:] if extra >= 0 else torch.cat((feature[:1], feature))
        torch.testing.assert_close(first[row], placed, rtol=0, atol=1e-6)
    if layer != -1:
        return
    found = describe_checkpoint(BackboneRecipe(checkpoint=str(tmp_path)))
    assert found["tokens"]["image"] == patches + min(0, extra) and found["tokens"].get("cls", 0) == max(0, extra)


@pytest.mark.parametrize(
    ("tower", "strategy", "absent"),
    [
        *[("clip", "default", absent) for absent in (*((field,) for field in FIELDS), FIELDS, "file")],
        *[(tower, "full", FIELDS) for tower in ("clip", "siglip", "dinov2_registers")],
        ("dinov2_registers", "default", "file"),
    ],
    ids=str,
)
def test_absent_fields_are_taken_from_config(tmp_path, tower, strategy, absent):
    model = llava(tmp_path, tower, strategy, fields={} if absent == "file" else dict.fromkeys(absent))
    whole = tmp_path / "processor_config.json"
    if absent == "file":  # as folders were before transformers 4.45
        image_processor = json.loads(whole.read_text())["image_processor"]
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_processor))
        whole.unlink()
    assert_own_states(tmp_path, model, "layers", "norm")


def test_different_fields_of_equal_effect_remain(tmp_path):
    """Transformers runs them as they are: nothing is added, and nothing subtracted."""
    fields = {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    assert_own_states(tmp_path, llava(tmp_path, fields=fields), "layers", "norm")


@pytest.mark.parametrize(
    ("built", "file", "wrong", "advice"),
    [
        ({"strategy": "full"}, "processor_config.json", {"vision_feature_select_strategy": "default"}, None),
        ({}, "processor_config.json", {"vision_feature_select_strategy": "full"}, None),
        ({}, "processor_config.json", {"patch_size": 16}, None),
        ({}, "processor_config.json", {"num_additional_image_tokens": 0}, None),
        ({"tower": "siglip", "strategy": "full"}, "processor_config.json", {"num_additional_image_tokens": 1}, None),
        ({"strategy": "full"}, "processor_config.json", dict(zip(FIELDS, (4, 7, "default"), strict=True)), None),
        ({}, "config.json", {"image_token_index": 5, "image_token_id": 5}, "set it to 3"),
        ({}, "config.json", {"vision_feature_layer": -9}, "layers -4 to 3"),
        ({}, "processor_config.json", {"image_processor": {"crop_size": {"height": 40, "width": 40}}}, "crop_size"),
    ],
    ids=str,
)
def test_contradictions_name_the_wrong_field(tmp_path, built, file, wrong, advice):
    """And what the line says to set makes the folder whole."""
    llava(tmp_path, **built)
    right = json.loads((tmp_path / file).read_text())
    values = {**right["image_processor"], **wrong["image_processor"]} if "image_processor" in wrong else None
    edit(tmp_path / file, {"image_processor": values} if values else wrong)
    recipe = BackboneRecipe(checkpoint=str(tmp_path))
    messages = []
    for verb in (describe_checkpoint, lambda recipe: load_backbone(recipe, CPU)):
        with pytest.raises(UserError) as error:
            verb(recipe)
        messages.append(str(error.value))
    assert messages[0].removeprefix("checkpoint") == messages[1].removeprefix("checkpoint")
    for text in (advice,) if advice else [f"{name}={right[name]}" for name in wrong]:
        assert text in messages[0]
    for name in FIELDS if not advice else ():
        assert (f"{name}=" in messages[0]) == (name in wrong)


def test_a_tokenizer_without_the_image_token(tmp_path):
    llava(tmp_path)
    file = tmp_path / "processor_config.json"
    edit(file, {"image_token": "<picture>"})
    with pytest.raises(UserError, match=r"writes 0 images|has no token '<picture>'"):
        load(tmp_path)


@pytest.mark.parametrize("body", BODIES)
def test_any_llm_inside(tmp_path, body):
    kind, values, blocks, norm = BODIES[body]
    model = llava(tmp_path, text=getattr(hf, f"{kind}Config")(**values))
    assert_own_states(tmp_path, model, blocks, norm)
    if body not in ("Mixtral", "OPT", "Bloom"):
        return
    found = describe_checkpoint(BackboneRecipe(checkpoint=str(tmp_path)))
    assert found["llm"]["layers"] == 3 and found["llm"]["hidden_size"] == 32


@pytest.mark.parametrize(("tower", "body"), [("clip", "Mixtral"), ("idefics3", "Phi")])
def test_plan_accepts_llms_that_it_cannot_cost(tmp_path, recipe_values, tower, body):
    llava(tmp_path / "llava", tower=tower, text=getattr(hf, f"{body}Config")(**BODIES[body][1]))
    backbone = recipe_values["backbone"] | {"checkpoint": str(tmp_path / "llava"), "dtype": "float32"}
    small = {"backbone": backbone, "layers": "1", "teachers": {"gen": recipe_values["teachers"]["gen"]}}
    plan = plan_training(ProbeRunRecipe.model_validate(recipe_values | small))
    assert (plan.work is None) == ("experts" in plan.facts.get("cost", "")) == (body == "Mixtral")


@pytest.mark.parametrize(("part", "message"), [("layers", "no list of 3 decoder blocks"), ("norm", "no final norm")])
def test_bodies_that_cannot_be_read(tmp_path, part, message):
    model = llava(tmp_path)
    delattr(model.model.language_model, part)
    with pytest.raises(UserError, match=f"LlamaModel, the LLM of LlavaForConditionalGeneration, has {message}"):
        decoder_parts(model)


def pixtral(path, config_class=hf.LlavaConfig, merge=1):
    """Rows of patches with a token at the end of each; Mistral 3 merges patches two by two."""
    words = tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    number = words.convert_tokens_to_ids("[IMG]")
    tower = hf.PixtralVisionConfig(**VIT | {"image_size": 64}, head_dim=12)
    own = {"vision_feature_select_strategy": "full"} if merge == 1 else {"spatial_merge_size": merge}
    config = config_class(
        vision_config=tower, text_config=hf.MistralConfig(**LLM | {"vocab_size": len(words)}), image_token_id=number,
        image_token_index=number, vision_feature_layer=-1, **own,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(path)
    hf.PixtralProcessor(
        image_processor=hf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}),
        tokenizer=words, patch_size=8, spatial_merge_size=merge,
        chat_template=tiny.CHAT_TEMPLATE.replace("<image>", "[IMG]"),
    ).save_pretrained(path)  # fmt: skip
    return model


@pytest.mark.parametrize(("kind", "merge"), [("LlavaConfig", 1), ("Mistral3Config", 2)])
def test_pixtral_has_a_grid_per_size_of_image(tmp_path, kind, merge):
    model = pixtral(tmp_path, getattr(hf, kind), merge)
    recipe = BackboneRecipe(checkpoint=str(tmp_path), dtype="float32", image_size=48)
    assert describe_checkpoint(recipe)["image_grid"] == [6 // merge] * 2
    backbone = load_backbone(recipe, CPU)
    for images, grid in (([Image.new("RGB", (9, 9)), Image.new("RGB", (70, 70))], (6, 6)), (pictures(), (5, 7))):
        states, tokens = backbone.hidden_states(images, "all,final")
        batch = backbone.prepare(images)
        with torch.no_grad():
            own = model(**batch.inputs, output_hidden_states=True).hidden_states
        rows, columns = (side // merge if kind == "LlavaConfig" else -(-side // merge) for side in grid)
        assert tokens.grid == (rows, columns) and tokens.image_states(states[0]).shape[1] == rows * columns
        assert tokens.mask("newline").sum(dim=1).tolist() == [rows] * 2
        for layer in (0, 1, 2):
            torch.testing.assert_close(states[layer], own[layer], rtol=0, atol=1e-6)
        torch.testing.assert_close(states[FINAL], own[-1], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"different shapes have different grids .* set data\.view=square"):
        backbone.prepare([Image.new("RGB", (60, 30)), Image.new("RGB", (30, 60))])
