"""LLaVA's original format and OLA-VLM's, on tiny random checkpoints in the published layout."""

import json
import pickle

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    LlamaConfig,
    LlamaModel,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from probing.cli import cli
from probing.distillation.recipe import DistillRecipe
from probing.distillation.trainer import run_stage
from probing.models import Backbone, Batch, TokenMap, count_blocks, describe_checkpoint, load_backbone
from probing.models.chat_templates import SYSTEM
from probing.models.llava_original import read_config
from probing.models.token_map import SPECIAL
from probing.probes.resampler import Resampler, ResamplerConfig
from probing.recipe import TOKEN_KINDS, BackboneRecipe
from probing.utils.errors import UserError
from tests.helpers import tiny
from tests.helpers.hostile import Payload
from tests.helpers.original import LLMS, PINPOINTS, original

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((40, 50), (64, 32))]


def padded_pixels(images, size):
    """What a tower sees of images that are padded to a square in the mean colour."""
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = []
    for image in images:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        pixels.append((np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)) / 255 - mean) / std)
    return torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2).float()


def plain_states(tensors, raw, tokenizer, pixels, before, after, special=()):
    """The forward pass as the format is described: pieces of text, projected patches, special tokens, one LLM."""
    config_class, model_class, _ = LLMS[raw["model_type"]]
    llm = model_class(config_class(**{k: raw[k] for k in config_class().to_dict() if k in raw and k != "model_type"}
                                   | {"rope_theta": raw["rope_theta"]}))  # fmt: skip
    llm.load_state_dict({k: v for k, v in tensors.items() if k in llm.state_dict()})
    with torch.no_grad():
        if raw["mm_hidden_size"] == 64:
            trunk = timm.create_model("test_convnext", pretrained=False, num_classes=0, global_pool="").eval()
            prefix = "model.vision_tower.vision_tower."
            trunk.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            last = trunk.norm_pre(trunk.stages(trunk.stem(pixels)))
            features = torch.stack([last[:, :, r, c] for r in range(4) for c in range(4)], dim=1)
        else:
            vision = CLIPVisionModel.from_pretrained(raw["mm_vision_tower"])
            features = vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        names = [f"model.mm_projector.{layer}" for layer in ("", "0.", "2.", "4.")]
        names = [name for name in names if f"{name}weight" in tensors]
        projected = features
        for number, name in enumerate(names):
            hidden = torch.nn.functional.gelu(projected) if number else projected
            projected = hidden @ tensors[f"{name}weight"].T + tensors[f"{name}bias"]
        embed = tensors["model.embed_tokens.weight"]
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (before, after)]
        rows = [tensors[f"model.special_{task}_tokens"] for task in special]
        if raw["model_type"] == "ola_llama" or raw.get("task_token_format") != "emb":
            rows = [torch.stack([group.mean(0) for group in row.chunk(4)]) for row in rows]
        sequence = [torch.cat([embed[ids[0]], image, *rows, embed[ids[1]]]) for image in projected]
        raw_last = {}
        llm.model.layers[-1].register_forward_hook(
            lambda module, args, out: raw_last.update(state=out[0] if isinstance(out, tuple) else out)
        )
        states = llm.model(inputs_embeds=torch.stack(sequence), output_hidden_states=True).hidden_states
    return [*states[:-1], raw_last["state"], states[-1]]


PROMPTS = {
    "vicuna_v1": (f"{SYSTEM} USER: ", "\nWhich colour? ASSISTANT:"),
    "mistral_instruct": ("[INST] ", "\nWhich colour? [/INST]"),
    "llava_phi_3": (
        "<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n",
        "\nWhich colour?<|end|>\n<|assistant|>\n",
    ),
    "llava_llama_3": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
        "\nWhich colour?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


@pytest.mark.parametrize(
    ("kind", "options", "template"),
    [
        ("llava_llama", {}, "vicuna_v1"),
        ("llava_llama", {"headers": True, "own_tower": True}, "llava_llama_3"),
        ("llava_llama", {"headers": True, "own_tower": True, "special": 16}, "llava_llama_3"),
        ("llava_llama", {"headers": True, "own_tower": True, "special": 16, "token_format": "emb"}, "llava_llama_3"),
        ("ola_llama", {"headers": True, "own_tower": True, "special": 16, "token_format": "emb"}, "llava_llama_3"),
        ("llava_llama", {"headers": True, "convnext": True, "special": 16}, "llava_llama_3"),
        ("llava_llama", {"headers": True, "projector": "linear"}, "llava_llama_3"),
        ("llava_llama", {"headers": True, "projector": "mlp3x_gelu", "own_tower": True}, "llava_llama_3"),
        ("llava_mistral", {"suffix": "bin", "split": False}, "mistral_instruct"),
        ("llava_phi3", {"special": 8, "own_tower": True, "suffix": "bin"}, "llava_phi_3"),
    ],
    ids=[
        "llava-1.5",
        "llama-3",
        "ola-llama-3",
        "ola-emb",
        "ola-pt-emb",
        "ola-convnext",
        "linear",
        "mlp3x",
        "mistral-bin",
        "ola-phi-3",
    ],
)
def test_states_are_those_of_the_described_forward_pass(tmp_path, images, kind, options, template):
    tensors, raw, tokenizer = original(tmp_path / "model", kind, **options)
    explicit = {"template": template} if template == "vicuna_v1" else {}
    recipe = BackboneRecipe(checkpoint=str(tmp_path / "model"), prompt="Which colour?", **explicit)
    backbone = load_backbone(recipe, CPU)
    states, tokens = backbone.hidden_states(images, "all,final")
    special = ("gen", "depth", "seg") if options.get("special") else ()
    pixels = backbone.prepare(images).inputs["pixel_values"]
    torch.testing.assert_close(
        pixels, padded_pixels(images, pixels.shape[-1]), rtol=0, atol=0.03
    )  # they round otherwise
    expected = plain_states(tensors, raw, tokenizer, pixels, *PROMPTS[template], special)
    for layer, own in zip(states, expected, strict=True):
        torch.testing.assert_close(states[layer], own, rtol=1e-3, atol=2e-4)
    whole = kind == "llava_llama" and options.get("token_format") == "emb"
    number = {task: 16 if whole and task != "gen" else 4 for task in special}
    assert tokens.counts()["image"] == 16
    assert {task: count for task, count in tokens.counts().items() if task in SPECIAL} == number
    found = describe_checkpoint(recipe)
    assert found["dtype"] == "float32"
    assert found["family"] == f"original {kind}" and found["special_tokens"] == sum(number.values())
    alone, _ = backbone.hidden_states(images[1:], "all,final")
    for layer, state in states.items():
        torch.testing.assert_close(state[1:], alone[layer], rtol=1e-4, atol=1e-5)
    half, _ = load_backbone(recipe.model_copy(update={"dtype": "bfloat16"}), CPU).hidden_states(images, "2")
    assert torch.cosine_similarity(half[2].float().flatten(), states[2].flatten(), dim=0) > 0.999
    fresh = load_backbone(recipe, CPU, random_seed=3)
    both = zip(fresh.core.vision_tower.parameters(), backbone.core.vision_tower.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in both)
    assert not torch.equal(fresh.core.language_model.layers[0].mlp.down_proj.weight,
                           backbone.core.language_model.layers[0].mlp.down_proj.weight)  # fmt: skip


def test_special_tokens_can_be_left_out(tmp_path, images):
    original(tmp_path / "model", headers=True, own_tower=True, special=8)
    recipe = BackboneRecipe(checkpoint=str(tmp_path / "model"), special_tokens="off")
    _, tokens = load_backbone(recipe, CPU).hidden_states(images, "0")
    assert {"gen", "depth", "seg"}.isdisjoint(tokens.counts())
    original(tmp_path / "plain" / "model", headers=True)
    with pytest.raises(UserError, match="has no special tokens"):
        load_backbone(BackboneRecipe(checkpoint=str(tmp_path / "plain" / "model"), special_tokens="on"), CPU)


def test_unknown_tensors_are_named_and_known_ones_ignored(tmp_path):
    teacher = {"da_v2_head.depth_head.projects.0.weight": torch.zeros(2), "gen_logit_scale": torch.zeros(()),
               "image_depth_heads.0.projector.proj_in.weight": torch.zeros(2, 2),
               "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}  # fmt: skip
    original(tmp_path / "a" / "model", headers=True, extra=teacher)
    load_backbone(BackboneRecipe(checkpoint=str(tmp_path / "a" / "model")), CPU)
    original(tmp_path / "b" / "model", headers=True, extra={"model.surprise.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"has unknown 1 tensors: model\.surprise\.weight"):
        load_backbone(BackboneRecipe(checkpoint=str(tmp_path / "b" / "model")), CPU)


def test_bad_input(tmp_path):
    def load(name="model", **values):
        return load_backbone(BackboneRecipe(checkpoint=str(tmp_path / name), **values), CPU)

    original(tmp_path / "model")
    with pytest.raises(UserError, match=r"backbone\.template=NAME, one of vicuna_v1"):
        load()
    with pytest.raises(UserError, match="no template is called 'vicuna'"):
        load(template="vicuna")
    config = json.loads((tmp_path / "model" / "config.json").read_text())

    def change(**values):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | values))

    for values, message in (
        ({"mm_vision_tower": "/cluster/home/someone/my-tower"}, "backbone.vision_tower=FOLDER_OR_HUB_ID"),
        ({"mm_projector_type": "cabstract"}, "no projector is called 'cabstract'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type is 'flat'"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio is 'anyres_max_9'"),
        ({"model_type": "llava_mpt"}, "model type 'llava_mpt'"),
    ):
        change(**values)
        with pytest.raises(UserError, match=message):
            load(template="vicuna_v1")
    change(mm_vision_tower="/cluster/home/someone/my-tower")
    load(template="vicuna_v1", vision_tower=str(tmp_path / "tower"))
    change()
    shard = next((tmp_path / "model").glob("*-00002-of-*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        load(template="vicuna_v1")
    shard.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load(template="vicuna_v1")


def test_tiles_become_those_of_llava_next(tmp_path, images):
    """LLaVA-1.6 as published, against transformers' LLaVA-NeXT holding the same weights."""
    tensors, _, _ = original(tmp_path / "model", "llava_mistral", own_tower=True, anyres=True)
    recipe = BackboneRecipe(checkpoint=str(tmp_path / "model"))
    backbone = load_backbone(recipe, CPU)
    states, tokens = backbone.hidden_states(images, "0,3,final")
    llm, _, _ = LLMS["llava_mistral"]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig.from_pretrained(tmp_path / "tower"),
        text_config=llm.from_pretrained(tmp_path / "model"),
        image_token_id=backbone.prepare.image_token_id, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    own = {}
    for name, tensor in tensors.items():
        if name.startswith("model.vision_tower."):
            name = name.replace("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.")
        elif name.startswith("model.mm_projector."):
            name = name.replace("mm_projector.0", "multi_modal_projector.linear_1")
            name = name.replace("mm_projector.2", "multi_modal_projector.linear_2")
        elif name.startswith("model.") and name != "model.image_newline":
            name = name.replace("model.", "model.language_model.", 1)
        own[name] = tensor
    model = LlavaNextForConditionalGeneration(config).eval()
    model.resize_token_embeddings(len(own["lm_head.weight"]) + 1, mean_resizing=False)  # and the image's
    missing, unexpected = model.load_state_dict(
        {name: tensor for name, tensor in own.items() if name not in RESIZED}, strict=False
    )
    assert set(missing) == set(RESIZED) and not unexpected
    with torch.no_grad():
        for name in RESIZED:
            model.state_dict()[name][: len(own[name])] = own[name]
        batch = backbone.prepare(images)
        expected = model(**batch.inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[0], expected[0])
    torch.testing.assert_close(states["final"], expected[-1])
    counts = [(tokens.kinds[row] == TOKEN_KINDS.index("tile")).sum() for row in range(2)]
    assert tokens.counts()["image"] == 16 and all(count > 0 for count in counts)
    alone, own = backbone.hidden_states(images[:1], "3")
    length = own.kinds.shape[1]
    torch.testing.assert_close(states[3][:1, :length], alone[3], rtol=1e-4, atol=1e-5)
    assert describe_checkpoint(recipe)["tokens"]["newline"] > 0


RESIZED = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def test_every_layer_of_a_full_size_llm_is_handed_over():
    """32 blocks, 4,096 wide, on the meta device: shapes and order, without the memory."""
    with torch.device("meta"):
        values = {name: value for name, value in LLAMA_3_8B.items() if name != "model_type"}
        llm = LlamaModel(LlamaConfig(**values)).to(torch.bfloat16).eval()
        kinds = torch.zeros(2, 640, dtype=torch.long)
        embedded = torch.zeros(2, 640, 4096, dtype=torch.bfloat16)
        mask = torch.zeros(2, 1, 640, 640, dtype=torch.bfloat16)  # 4-D: of a 2-D one transformers would read values
    backbone = Backbone("llm", "", "llama", llm, llm.layers, llm.norm, 4096, lambda images: None, "")
    seen = []
    backbone.stream(
        Batch({"inputs_embeds": embedded, "attention_mask": mask}, TokenMap(kinds, (24, 24))),
        [*range(33), "final"],
        lambda layer, state: seen.append((layer, tuple(state.shape), state.dtype)),
    )
    assert [layer for layer, *_ in seen] == [*range(33), "final"]
    assert {(shape, dtype) for _, shape, dtype in seen} == {((2, 640, 4096), torch.bfloat16)}


def test_inspect_takes_fields_of_the_recipe(tmp_path):
    original(tmp_path / "model")

    def inspect(*options):
        return CliRunner().invoke(cli, ["inspect", str(tmp_path / "model"), *options])

    assert count_blocks(BackboneRecipe(checkpoint=str(tmp_path / "model"))) == 3
    found = json.loads(inspect("--json", "backbone.template=vicuna_v1").stdout)
    assert found["prompt"].endswith("ASSISTANT:") and found["family"] == "original llava_llama"
    assert "write backbone.template=" in inspect("template=vicuna_v1").stderr


def test_it_is_probed_and_not_trained(tmp_path):
    original(tmp_path / "model", headers=True)
    data = tiny.conversations(tmp_path / "data", 4)
    values = {"conversations": str(data / "data.json"), "image_root": str(data)}
    recipe = DistillRecipe.model_validate({"checkpoint": str(tmp_path / "model"), "stage": "pt", "data": values})
    with pytest.raises(UserError, match="original format, which cannot be trained"):
        run_stage(recipe, tmp_path / "out")


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    original(tmp_path / "model", suffix="bin", split=False, headers=True)
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(
        pickle.dumps({"model.norm.weight": Payload(tmp_path / "ran")})
    )
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(BackboneRecipe(checkpoint=str(tmp_path / "model")), CPU)
    assert not (tmp_path / "ran").exists()


LLAMA_3_8B = {
    "vocab_size": 128257, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False, "model_type": "llava_llama",
}  # fmt: skip
PHI_3_MINI = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False, "model_type": "ola_phi3",
}  # fmt: skip
CLIP_L = "/cluster/openai/clip-vit-large-patch14-336"
XXL = "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup-res768"
PROBES = {"depth": (576, 1024), "seg": (576, 1536), "gen": (1, 1024)}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def predictors(width):
    """Two predictors per task, whose queries come from outside; depth's is as wide as the LLM, as published."""
    total = 0
    for task, (tokens, output) in PROBES.items():
        inner = width if task == "depth" else output
        probe = Resampler(ResamplerConfig(width, tokens, inner, output))
        total += 2 * (count(probe) - probe.latents.numel())
    return total


@pytest.mark.parametrize(
    ("name", "llm", "tower_name", "gigabytes"),
    [
        ("probe_depth_llava-1.5-pt", LLAMA_3_8B, XXL, 38.16),
        ("probe_seg_llava-1.5-pt-0.5ift", LLAMA_3_8B, XXL, 37.54),
        ("probe_gen_llava-1.5-pt", LLAMA_3_8B, XXL, 36.62),
        ("OLA-VLM-CLIP-ConvNeXT-Llama3-8b", LLAMA_3_8B, XXL, 35.63),
        ("OLA-VLM-CLIP-ViT-Llama3-8b", LLAMA_3_8B, CLIP_L, 33.44),
        ("pretrain_dsg_OLA-VLM-CLIP-ViT-Llama3-8b", LLAMA_3_8B, CLIP_L, 17.53),
        ("pretrain_dsg_OLA-VLM-CLIP-ConvNeXT-Llama3-8b", LLAMA_3_8B, XXL, 18.64),
        ("pretrain_dsg_OLA-VLM-CLIP-ConvNeXT-Phi3-4k-mini", PHI_3_MINI, XXL, 9.967),
    ],
)
def test_full_size_models_have_the_published_sizes(name, llm, tower_name, gigabytes):
    """Counted on the meta device; the files' sizes are those that the Hub shows (gigabytes of 10^9)."""
    raw = llm | {"mm_vision_tower": tower_name, "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"}
    config = read_config(raw, BackboneRecipe(checkpoint="org/name"))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
        dpt = DepthAnythingForDepthEstimation(
            DepthAnythingConfig(
                backbone_config=Dinov2Config(
                    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14,
                    out_indices=[5, 12, 18, 24], reshape_hidden_states=False,
                ),
                reassemble_hidden_size=1024, neck_hidden_sizes=[256, 512, 1024, 1024], fusion_hidden_size=256,
            )
        )  # fmt: skip
        heads = predictors(llm["hidden_size"])
        probes = {
            task: 32 * count(Resampler(ResamplerConfig(llm["hidden_size"], tokens, output, output)))
            for task, (tokens, output) in PROBES.items()
        }
        tower_size = count(model.model.vision_tower)
    language = count(model.model.language_model) + count(model.lm_head)
    projector, special = count(model.model.multi_modal_projector), (576 + 576 + 8) * llm["hidden_size"]
    decoder = count(dpt.neck) + count(dpt.head)
    if name.startswith("probe"):
        task = name.split("_")[1]
        size = 4 * (language + tower_size + projector + probes[task])
        size += 4 * (count(dpt) + decoder) if task == "depth" else 0
    elif name.startswith("OLA"):
        size = 4 * (language + tower_size + projector + special)
    else:
        size = 2 * (language + tower_size) + 4 * (projector + special + heads + decoder)
    assert size / 1e9 == pytest.approx(gigabytes, rel=1e-3)
