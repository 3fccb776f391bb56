import json
import weakref

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from PIL import Image
from transformers import AutoModelForImageTextToText

from probing.models import describe_checkpoint, load_backbone, parse_layers
from probing.models.random_weights import with_random_weights
from probing.models.token_map import TokenMap
from probing.recipe import TOKEN_KINDS, BackboneRecipe
from probing.utils.errors import UserError
from tests.helpers import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)) for _ in range(2)]


@pytest.fixture
def backbone(models):
    return load_backbone(BackboneRecipe(checkpoint=str(models["llava"])), CPU)


def test_states_agree_with_transformers_own(backbone, models, images):
    states, _ = backbone.hidden_states(images, "all,final")
    model = AutoModelForImageTextToText.from_pretrained(models["llava"])
    raw = {}
    model.model.language_model.layers[-1].register_forward_hook(
        lambda module, args, out: raw.update(last=out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        reference = model(**backbone.prepare(images).inputs, output_hidden_states=True).hidden_states
    assert list(states) == [0, 1, 2, 3, "final"]
    for layer in (0, 1, 2):
        torch.testing.assert_close(states[layer], reference[layer], rtol=0, atol=0)
    torch.testing.assert_close(states[3], raw["last"], rtol=0, atol=0)  # before the final norm
    torch.testing.assert_close(states["final"], reference[-1], rtol=0, atol=0)


def test_nothing_runs_after_the_deepest_layer(backbone, images):
    ran = []
    for index, block in enumerate(backbone.blocks, start=1):
        block.register_forward_pre_hook(lambda module, args, index=index: ran.append(index))
    backbone.norm.register_forward_pre_hook(lambda module, args: ran.append("norm"))
    backbone.hidden_states(images, "0,2")
    assert ran == [1, 2]


def test_a_state_is_free_once_its_layer_has_been_visited(backbone, images):
    seen, alive = [], []

    def visit(layer, state):
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(state))

    backbone.stream(backbone.prepare(images), [0, 1, 2, 3], visit)
    assert len(alive) == 4 and max(alive) <= 1


def test_block_that_runs_twice_or_changes_shape_is_an_error(backbone, images):
    batch = backbone.prepare(images)
    backbone.blocks[1].register_forward_hook(
        lambda module, args, out: (out[0] if isinstance(out, tuple) else out)[:, :-1]
    )
    with pytest.raises(RuntimeError, match="layer 2 of llava gave"):
        backbone.stream(batch, [2], lambda layer, state: None)


def test_token_map(backbone, images):
    _, tokens = backbone.hidden_states(images, "0")
    ids = backbone.prepare(images).inputs["input_ids"]
    assert tokens.counts() == {"system": 3, "image": 16, "text": ids.shape[1] - 19}
    assert bool((tokens.mask("image") == (ids == 3)).all())
    assert tokens.grid == (4, 4)


def test_selection_by_token_map_handles_padding():
    code = {kind: index for index, kind in enumerate(TOKEN_KINDS)}
    kinds = torch.tensor([[code["image"], code["text"], code["text"]], [code["image"], code["text"], code["padding"]]])
    states = torch.arange(6.0).view(2, 3, 1)
    selected, mask = TokenMap(kinds, (1, 1)).select(states, ["image", "text"])
    assert selected.shape == (2, 3, 1) and mask.tolist() == [[True, True, True], [True, True, False]]
    selected, mask = TokenMap(kinds, (1, 1)).select(states, ["image"])
    assert selected.flatten().tolist() == [0.0, 3.0] and mask is None


def test_the_batch_does_not_change_the_states(backbone, images):
    together, _ = backbone.hidden_states(images, "3")
    alone, _ = backbone.hidden_states(images[1:], "3")
    torch.testing.assert_close(together[3][1:], alone[3], rtol=1e-4, atol=1e-5)


def test_random_weights_keep_the_tower_and_nothing_else(models):
    recipe = BackboneRecipe(checkpoint=str(models["llava"]))
    trained, fresh = load_backbone(recipe, CPU), load_backbone(recipe, CPU, random_seed=7)
    again = load_backbone(recipe, CPU, random_seed=7)
    for name, parameter in trained.core.named_parameters():
        other = fresh.core.get_parameter(name)
        assert torch.equal(other, again.core.get_parameter(name))
        if parameter.std() > 0 and name.startswith("vision_tower"):
            assert torch.equal(parameter, other), name
        elif parameter.std() > 0:
            assert not torch.equal(parameter, other), name


def test_dispatched_backbone_gives_the_same_states(models, images, tmp_path):
    """The disk stands for a second device: hooks of accelerate load a block's weights when it runs, and drop them."""
    recipe = BackboneRecipe(checkpoint=str(models["llava"]), device_map="auto")
    backbone = load_backbone(recipe, CPU, with_head=True)
    expected, _ = load_backbone(recipe.model_copy(update={"device_map": None}), CPU).hidden_states(images, "all,final")
    random = [
        load_backbone(recipe.model_copy(update={"device_map": places}), CPU, random_seed=7) for places in ("auto", None)
    ]
    (there, _), (here, _) = (one.hidden_states(images, "3") for one in random)
    assert torch.equal(there[3], here[3]) and not torch.equal(there[3], expected[3])
    parts = {"model.language_model.layers.1": "disk", "model.language_model.layers.2": "disk", "lm_head": "disk"}
    parts |= dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "model.language_model"), "cpu")
    dispatch_model(backbone.writer, parts, offload_dir=tmp_path)
    assert backbone.blocks[2].mlp.up_proj.weight.is_meta
    for layers in ("2", "all,final", "0,1"):  # a pass ends inside the model
        states, _ = backbone.hidden_states(images, layers)
        assert all(torch.equal(state, expected[layer]) for layer, state in states.items()), layers
    with pytest.raises(UserError, match="cannot be offloaded to disk"):
        with_random_weights(backbone.writer, 7)
    whole = load_backbone(recipe, CPU, with_head=True).writer
    places = whole.hf_device_map = dict.fromkeys(parts, "cpu")
    assert with_random_weights(whole, 7).hf_device_map == places
    assert whole.get_output_embeddings().weight.is_meta  # its memory is free


def test_dtype_passes_through(models, images):
    backbone = load_backbone(BackboneRecipe(checkpoint=str(models["llava"]), dtype="bfloat16"), CPU)
    states, _ = backbone.hidden_states(images, "1")
    assert states[1].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", [0, 1, 2, 3]),
        ("0,2-3,final", [0, 2, 3, "final"]),
        ("3,1,1", [1, 3]),
        ("all,final", [0, 1, 2, 3, "final"]),
    ],
)
def test_layer_selection(text, expected):
    assert parse_layers(text, 3) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [("4", "0 to 3"), ("2-9", "0 to 3"), ("3-1", "1-3"), ("last", "cannot read"), ("", "cannot read")],
)
def test_layers_that_do_not_exist(text, message):
    with pytest.raises(UserError, match=message):
        parse_layers(text, 3)


def test_inspect_needs_no_weights(tmp_path):
    folder = tiny.llava(tmp_path / "llava")
    (folder / "model.safetensors").unlink()
    found = describe_checkpoint(BackboneRecipe(checkpoint=str(folder)))
    assert found["llm"]["layers"] == 3 and found["tokens"]["image"] == 16


def test_incomplete_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny.llava(tmp_path / "llava")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if "layers.1.mlp" in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 tensor"):
        load_backbone(BackboneRecipe(checkpoint=str(folder)), CPU)


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}, "architectures": ["Own"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match=r"its own code, which was not run; .*backbone\.trust_remote_code=true"):
        load_backbone(BackboneRecipe(checkpoint=str(tmp_path)), CPU)
    assert not (tmp_path / "ran").exists()


def test_another_kind_of_model_is_named(models):
    with pytest.raises(UserError, match="no vision-language model but DepthAnythingForDepthEstimation"):
        load_backbone(BackboneRecipe(checkpoint=str(models["depth"])), CPU)
