"""Adapters and projectors on their base models, against peft's own merge."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from probing.models import describe_checkpoint, identify, load_backbone
from probing.recipe import BackboneRecipe
from probing.utils.errors import UserError
from tests.helpers import tiny
from tests.helpers.original import original

CPU = torch.device("cpu")
IMAGES = [Image.new("RGB", (40, 30), (200, 10, 50)), Image.new("RGB", (20, 50), (0, 90, 250))]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def states_of(recipe):
    return load_backbone(recipe, CPU).hidden_states(IMAGES, "all,final")[0]


def assert_same_states(found, expected):
    assert found.keys() == expected.keys()
    for layer, state in found.items():
        torch.testing.assert_close(state, expected[layer], rtol=0, atol=1e-5)


def lora(base, folder, config):
    """Writes an adapter with random weights, as peft saves it."""
    torch.manual_seed(3)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.llava(tmp_path_factory.mktemp("adapters") / "base")


KINDS = {
    "lora": LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS),
    "dora": LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, use_dora=True, alpha_pattern={"layers.1.*": 7}),
    "whole-modules": LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["linear_2", "embed_tokens"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("kind", ["dora", "whole-modules", "ia3"])
def test_an_adapter_is_merged_as_peft_merges_it(base, tmp_path, kind):
    lora(LlavaForConditionalGeneration.from_pretrained(base), tmp_path / "adapter", KINDS[kind])
    model = LlavaForConditionalGeneration.from_pretrained(base)
    merged = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    shutil.copytree(base, tmp_path / "merged")
    merged.save_pretrained(tmp_path / "merged")
    recipe = BackboneRecipe(checkpoint=str(tmp_path / "adapter"), base=str(base))
    found = states_of(recipe)
    assert_same_states(found, states_of(BackboneRecipe(checkpoint=str(tmp_path / "merged"))))
    plain = states_of(BackboneRecipe(checkpoint=str(base)))
    assert (found[3] - plain[3]).abs().max() > 1e-3
    assert describe_checkpoint(recipe)["base"] == str(base)


def test_an_adapter_with_older_names_is_merged_too(base, tmp_path):
    """transformers called the LLM `language_model.model` before it called it `model.language_model`."""
    lora(LlavaForConditionalGeneration.from_pretrained(base), tmp_path / "new", KINDS["lora"])
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    file = tmp_path / "old" / "adapter_model.safetensors"
    tensors = load_file(file)
    older = {n.replace(".model.model.language_model.", ".model.language_model.model."): t for n, t in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, file)
    new, old = (BackboneRecipe(checkpoint=str(tmp_path / name), base=str(base)) for name in ("new", "old"))
    assert_same_states(states_of(old), states_of(new))


def llava_lora(tmp_path, base_is_llm, suffix):
    """LLaVA's LoRA folder and its base, and the same weights merged by hand."""
    tensors, raw, _ = original(tmp_path / "whole", headers=True, own_tower=not base_is_llm, split=False)
    folder, base, merged = tmp_path / "llava-lora", tmp_path / "base", tmp_path / "merged"
    shutil.copytree(tmp_path / "whole", base)
    if base_is_llm:
        (base / "model.safetensors").unlink()
        (base / "config.json").write_text(json.dumps(raw | {"model_type": "llama"}))
    llm = LlamaForCausalLM(LlamaForCausalLM.config_class(**{k: raw[k] for k in LLM_FIELDS}))
    llm.load_state_dict({n: t for n, t in tensors.items() if n in llm.state_dict()})
    if base_is_llm:
        llm.save_pretrained(base)
    lora(llm, folder, KINDS["lora"])
    llm = LlamaForCausalLM(LlamaForCausalLM.config_class(**{k: raw[k] for k in LLM_FIELDS}))
    llm.load_state_dict({n: t for n, t in tensors.items() if n in llm.state_dict()})
    own = PeftModel.from_pretrained(llm, folder).merge_and_unload().state_dict()
    projector = {n: torch.randn_like(t) for n, t in tensors.items() if "mm_projector" in n}
    torch.save({f"base_model.model.{n}": t for n, t in projector.items()}, folder / "non_lora_trainables.bin")
    if suffix == "bin":
        weights = load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        torch.save(weights, folder / "adapter_model.bin")
    (folder / "config.json").write_text(json.dumps(raw))
    shutil.copytree(tmp_path / "whole", merged)
    save_file(tensors | own | projector, merged / "model.safetensors", {"format": "pt"})
    return folder, base, merged


LLM_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
)  # fmt: skip


@pytest.mark.parametrize(("base_is_llm", "suffix"), [(True, "bin"), (False, "safetensors")], ids=["llm", "llava"])
def test_llava_adapters_bring_their_projector(tmp_path, base_is_llm, suffix):
    """On a plain LLM, as LLaVA-1.5's LoRA has it, and on a checkpoint in the original format."""
    folder, base, merged = llava_lora(tmp_path, base_is_llm, suffix)
    recipe = BackboneRecipe(checkpoint=str(folder), base=str(base))
    assert_same_states(states_of(recipe), states_of(BackboneRecipe(checkpoint=str(merged))))
    assert identify(recipe).name == "llava-lora"
    assert describe_checkpoint(recipe)["family"] == "original llava_llama"


@pytest.mark.parametrize("name", ["mm_projector.bin", "model.safetensors"])
def test_a_projector_alone_is_loaded_on_its_base(tmp_path, name):
    tensors, raw, _ = original(tmp_path / "base", headers=True, split=False)
    projector = {n: torch.randn_like(t) for n, t in tensors.items() if "mm_projector" in n}
    folder = tmp_path / "projector"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw | {"_name_or_path": str(tmp_path / "base")}))
    if name.endswith("bin"):
        torch.save(projector, folder / name)
    else:
        save_file(projector, folder / name)
    shutil.copytree(tmp_path / "base", tmp_path / "merged")
    save_file(tensors | projector, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    recipe = BackboneRecipe(checkpoint=str(folder))
    assert_same_states(states_of(recipe), states_of(BackboneRecipe(checkpoint=str(tmp_path / "merged"))))
    before, other = identify(recipe).sha256, {n: 2 * t for n, t in projector.items()}
    (torch.save if name.endswith("bin") else save_file)(other, folder / name)
    assert identify(recipe).sha256 != before


def test_the_identity_covers_adapter_and_base(base, tmp_path):
    """Weights of either, and the adapter's scale, make another checkpoint."""
    lora(LlavaForConditionalGeneration.from_pretrained(base), tmp_path / "adapter", KINDS["lora"])
    other = tiny.llava(tmp_path / "other", seed=9)

    def sha256(base=base):
        return identify(BackboneRecipe(checkpoint=str(tmp_path / "adapter"), base=str(base))).sha256

    found = [identify(BackboneRecipe(checkpoint=str(base))).sha256, sha256(), sha256(other)]
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 16', '"lora_alpha": 8'))
    found.append(sha256())
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    found.append(sha256())
    assert len(set(found)) == len(found)


def adapter_without_base(base, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/llama"}))
    return {"checkpoint": str(folder)}, "is an adapter of /nowhere/llama, .*backbone.base=DIR"


def adapter_of_another_width(base, folder):
    wide = tiny.llava(folder.parent / "wide", hidden=48)
    return {"checkpoint": str(folder), "base": str(wide)}, "does not fit the base: .*size mismatch for .*lora_A"


def adapter_of_more_layers(base, folder):
    deep = tiny.llava(folder.parent / "deep", layers=2)
    return {
        "checkpoint": str(folder),
        "base": str(deep),
    }, "tensors do not fit .*layers.2"


def adapter_without_weights(base, folder):
    (folder / "adapter_model.safetensors").unlink()
    return {"checkpoint": str(folder), "base": str(base)}, "is an adapter without weights"


def adapter_next_to_whole_weights(base, folder):
    shutil.copytree(base, folder, dirs_exist_ok=True)
    return {"checkpoint": str(folder)}, "holds whole weights and an adapter"


def base_for_whole_weights(base, folder):
    return {"checkpoint": str(base), "base": str(base)}, "is no adapter; leave out backbone.base"


def adapter_that_cannot_be_merged(base, folder):
    shutil.rmtree(folder)
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", num_layers=3, token_dim=32)
    config.num_attention_heads, config.num_transformer_submodules = 4, 1
    get_peft_model(LlavaForConditionalGeneration.from_pretrained(base), config).save_pretrained(folder)
    return {"checkpoint": str(folder), "base": str(base)}, "of type .*PROMPT_TUNING, which cannot be merged"


def whole_tensor_of_another_shape(base, folder):
    torch.save({"multi_modal_projector.linear_1.bias": torch.zeros(5)}, folder / "non_lora_trainables.bin")
    return {"checkpoint": str(folder), "base": str(base)}, r"does not fit the base: .*size mismatch for .*linear_1.bias"


def whole_tensor_unknown_to_the_base(base, folder):
    torch.save({"base_model.model.model.resampler.w": torch.zeros(5)}, folder / "non_lora_trainables.bin")
    return {"checkpoint": str(folder), "base": str(base)}, "1 tensors do not fit the base, first .*resampler.w"


@pytest.mark.parametrize(
    "fault",
    [
        adapter_without_base, adapter_of_another_width, adapter_of_more_layers, adapter_without_weights,
        adapter_next_to_whole_weights, base_for_whole_weights, adapter_that_cannot_be_merged,
        whole_tensor_of_another_shape, whole_tensor_unknown_to_the_base,
    ],
)  # fmt: skip
def test_unfit_adapters_are_named_by_inspect_and_load(base, tmp_path, fault):
    lora(LlavaForConditionalGeneration.from_pretrained(base), tmp_path / "adapter", KINDS["lora"])
    fields, message = fault(base, tmp_path / "adapter")
    recipe = BackboneRecipe(**fields)
    for look in (describe_checkpoint, lambda recipe: load_backbone(recipe, CPU)):
        with pytest.raises(UserError, match=message) as caught:
            look(recipe)
        assert "\n" not in str(caught.value)
