"""The generic adapter, on tiny random checkpoints of families that have no file of their own."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from analysis.evaluation.run import evaluate
from probing.models import describe_checkpoint, load_backbone
from probing.recipe import BackboneRecipe, ProbeRunRecipe, validate
from probing.training.run import train
from probing.utils.errors import UserError
from tests.helpers import tiny

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}"
    "{{ 'IMAGE' if p['type'] == 'image' else p['text'] }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
LLM = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer(*special, **named):
    base = tiny.tokenizer()
    base.add_special_tokens({"additional_special_tokens": [*special, *named.values()]})
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=base.backend_tokenizer, extra_special_tokens=named, **marks)


def qwen2_5_vl(path):
    """Any size, patches merged two by two, rotary positions in three dimensions."""
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    text = tokenizer(*names)
    image, video, start, end = text.convert_tokens_to_ids(names)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": len(text), "rope_parameters": rope, **LLM},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
            "out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1],
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=32 * 32, max_pixels=128 * 128),
        video_processor=Qwen2VLVideoProcessor(patch_size=8, merge_size=2),
        tokenizer=text,
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(path)


def internvl(path):
    """Cut into parts, the whole image last."""
    text = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    config = InternVLConfig(
        text_config=Qwen2Config(vocab_size=len(text), **LLM),
        vision_config=InternVLVisionConfig(image_size=[32, 32], patch_size=[4, 4], **TOWER),
        image_token_id=text.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
    )
    InternVLForConditionalGeneration(config).save_pretrained(path)
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4),
        video_processor=InternVLVideoProcessor(),
        tokenizer=text,
        image_seq_length=16,
        chat_template=TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>"),
    ).save_pretrained(path)


def gemma3(path):
    """The template writes another token than the one that stands for the image, and image tokens see each other."""
    text = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    config = Gemma3Config(
        text_config=Gemma3TextConfig(vocab_size=len(text), head_dim=8, sliding_window=16, **LLM),
        vision_config=SiglipVisionConfig(image_size=32, patch_size=4, vision_use_head=False, **TOWER),
        mm_tokens_per_image=16,
        boi_token_index=text.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=text.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=text.convert_tokens_to_ids("<image_soft_token>"),
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(path)
    Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=text,
        image_seq_length=16,
        chat_template=TEMPLATE.replace("IMAGE", "<start_of_image>"),
    ).save_pretrained(path)


def idefics3(path):
    """Cut into parts with markers between them, the whole image last (SmolVLM's parent)."""
    rows = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    text = tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows)
    config = Idefics3Config(
        text_config=LlamaConfig(vocab_size=len(text), **LLM),
        vision_config={"image_size": 32, "patch_size": 4, **TOWER},
        scale_factor=2,
        image_token_id=3,
        pad_token_id=2,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(path)
    Idefics3Processor(
        image_processor=Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer=text,
        image_seq_len=16,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    ).save_pretrained(path)


def paligemma(path):
    """No chat template, and a prompt whose tokens all see each other."""
    text = tokenizer("<image>")
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", "vocab_size": len(text) + 1152, "head_dim": 8, **LLM},
        vision_config={
            "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "projection_dim": 32, **TOWER
        },
        image_token_index=text.convert_tokens_to_ids("<image>"), projection_dim=32,
    )  # fmt: skip
    PaliGemmaForConditionalGeneration(config).save_pretrained(path)
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    PaliGemmaProcessor(image_processor=images, tokenizer=text).save_pretrained(path)


FAMILIES = {
    "qwen2_5_vl": (qwen2_5_vl, {"image_size": 64}),
    "internvl": (internvl, {"whole_image": "last"}),
    "gemma3": (gemma3, {}),
    "idefics3": (idefics3, {"whole_image": "last"}),
    "paligemma": (paligemma, {"template": "{{ '<image>' + messages[0].content[1].text }}"}),
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """A recipe per family, with the fields that it needs."""
    made = {}
    for name, (build, options) in FAMILIES.items():
        folder = tmp_path_factory.mktemp("generic") / name
        torch.manual_seed(0)
        build(folder)
        made[name] = BackboneRecipe(checkpoint=str(folder), **options)
    return made


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)) for side in (50, 90, 64)]


@pytest.mark.parametrize("name", FAMILIES)
def test_states_are_transformers_own(recipes, images, name):
    backbone = load_backbone(recipes[name], CPU)
    states, tokens = backbone.hidden_states(images, "all,final")
    model = AutoModelForImageTextToText.from_pretrained(recipes[name].checkpoint).eval()
    raw = {}
    model.get_decoder().layers[-1].register_forward_hook(
        lambda module, args, out: raw.update(last=out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        reference = model(**backbone.prepare(images).inputs, output_hidden_states=True).hidden_states
    for layer in (0, 1, 2):
        assert torch.equal(states[layer], reference[layer])
    assert torch.equal(states[3], raw["last"]) and torch.equal(states["final"], reference[-1])
    assert tokens.grid == (4, 4) and tokens.image_states(states[3]).shape == (3, 16, 32)
    alone, own = backbone.hidden_states(images[1:2], "3")
    torch.testing.assert_close(states[3][1:2], alone[3], rtol=1e-4, atol=1e-5)
    assert torch.equal(tokens.kinds[1:2], own.kinds)


@pytest.mark.parametrize("name", ["internvl", "idefics3"])
def test_the_recipe_says_which_part_is_the_whole_image(recipes, images, name):
    """The image tokens are those that alone change when only the whole image does: the processor's last crop."""
    backbone = load_backbone(recipes[name], CPU)
    batch = backbone.prepare(images[:1])
    pixels = batch.inputs["pixel_values"]
    last = (-1,) if pixels.dim() == 4 else (0, -1)
    states = {}
    for blank in (False, True):
        if blank:
            pixels[last] = 0.5  # black would be taken for padding
        backbone.stream(batch, [0], lambda layer, state, blank=blank: states.update({blank: state}))
    changed = (states[False] != states[True]).any(dim=-1)
    assert torch.equal(changed, batch.tokens.mask("image")) and batch.tokens.counts()["tile"] == 64


@pytest.mark.parametrize("name", FAMILIES)
def test_random_weights_keep_the_tower_alone(recipes, name):
    trained, fresh = load_backbone(recipes[name], CPU), load_backbone(recipes[name], CPU, random_seed=7)
    tower = trained.core.get_encoder("image")
    in_tower = {key for key, module in trained.core.named_parameters() if any(module is p for p in tower.parameters())}
    assert in_tower
    for key, parameter in trained.core.named_parameters():
        if parameter.std() > 0:
            assert torch.equal(parameter, fresh.core.get_parameter(key)) == (key in in_tower), key


@pytest.mark.parametrize("name", FAMILIES)
def test_inspect_describes_every_family(recipes, name):
    found = describe_checkpoint(recipes[name])
    assert found["family"] == name and found["llm"]["layers"] == 3 and found["image_grid"] == [4, 4]
    assert "generic adapter; image token id" in found["found"] and "not_sure" not in found, found.get("not_sure")


def test_a_whole_run(recipes, models, coco, tmp_path):
    values = {
        "backbone": recipes["qwen2_5_vl"].model_dump(),
        "data": {"path": f"coco:{coco}"},
        "teachers": {"depth": {"id": str(models["depth"])}},
        "layers": "0,3",
        "controls": ["random"],
        "fit": {"epochs": 1, "batch_size": 6, "micro_batch": 3, "workers": 0},
    }
    run = train(validate(ProbeRunRecipe, values, "test"), tmp_path / "run")
    assert "depth,3,resampler,random,cosine_centred,strict,,val2017,0" in evaluate(run.path).read_text()


def test_ambiguous_grids_are_user_errors(recipes, tmp_path):
    recipe = recipes["internvl"].model_copy(update={"whole_image": None})
    with pytest.raises(UserError, match=r"5 parts of 16 tokens; which .* backbone\.whole_image=first or last"):
        load_backbone(recipe, CPU).prepare([Image.new("RGB", (50, 50))])
    shapes = [Image.new("RGB", (64, 64)), Image.new("RGB", (128, 64))]
    with pytest.raises(UserError, match=r"different shapes have different grids .* set data\.view=square"):
        load_backbone(recipes["qwen2_5_vl"], CPU).prepare(shapes)
    LlamaForCausalLM(LlamaConfig(vocab_size=20, **LLM)).save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="no vision-language model but LlamaForCausalLM"):
        load_backbone(BackboneRecipe(checkpoint=str(tmp_path / "text")), CPU)
