"""Families in transformers' format: states, token maps, batches, random weights, whole runs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, TorchAoConfig

from analysis.evaluation.run import evaluate
from probing.models import describe_checkpoint, load_backbone
from probing.recipe import BackboneRecipe, ProbeRunRecipe, validate
from probing.training.run import train
from probing.utils.errors import UserError
from tests.helpers import tiny

CPU = torch.device("cpu")
FAMILIES = ("vipllava", "llava_next", "llava_onevision")
TILED = FAMILIES[1:]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: getattr(tiny, name)(root / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def images():
    """Landscape, portrait and square, of several sizes: families with tiles give each another number of tokens."""
    rng = np.random.default_rng(0)
    sizes = ((40, 50), (90, 30), (64, 64), (20, 200))
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.mark.parametrize("name", FAMILIES)
def test_states_are_transformers_own(checkpoints, images, name):
    backbone = load_backbone(BackboneRecipe(checkpoint=str(checkpoints[name])), CPU)
    states, tokens = backbone.hidden_states(images, "all,final")
    model = AutoModelForImageTextToText.from_pretrained(checkpoints[name])
    raw = {}
    model.model.language_model.layers[-1].register_forward_hook(
        lambda module, args, out: raw.update(last=out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        reference = model(**backbone.prepare(images).inputs, output_hidden_states=True).hidden_states
    for layer in (0, 1, 2):
        assert torch.equal(states[layer], reference[layer])
    assert torch.equal(states[3], raw["last"]) and torch.equal(states["final"], reference[-1])
    assert tokens.image_states(states[3]).shape == (len(images), 16, 32)


@pytest.mark.parametrize("name", FAMILIES)
def test_neither_batch_nor_padding_changes_a_state(checkpoints, images, name):
    backbone = load_backbone(BackboneRecipe(checkpoint=str(checkpoints[name])), CPU)
    together, tokens = backbone.hidden_states(images, "0,3")
    assert tokens.mask("padding").any() == (name in TILED)
    for index, image in enumerate(images):
        alone, own = backbone.hidden_states([image], "0,3")
        valid = ~tokens.mask("padding")[index]
        assert torch.equal(tokens.kinds[index][valid], own.kinds[0])
        for layer in (0, 3):
            torch.testing.assert_close(together[layer][index][valid], alone[layer][0], rtol=1e-4, atol=1e-5)


def test_half_precision_runs(checkpoints, images):
    recipe = BackboneRecipe(checkpoint=str(checkpoints["llava_next"]))
    full, _ = load_backbone(recipe, CPU).hidden_states(images, "3")
    half, _ = load_backbone(recipe.model_copy(update={"dtype": "bfloat16"}), CPU).hidden_states(images, "3")
    assert half[3].dtype == torch.bfloat16
    assert torch.cosine_similarity(full[3].flatten(), half[3].float().flatten(), dim=0) > 0.999


def test_a_quantized_backbone_runs(checkpoints, images):
    """Eight-bit weights of torchao, if it is installed."""
    quantization = pytest.importorskip("torchao.quantization")
    recipe = BackboneRecipe(checkpoint=str(checkpoints["llava_next"]))
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig()).to_dict()
    full, _ = load_backbone(recipe, CPU).hidden_states(images, "3")
    small = load_backbone(recipe.model_copy(update={"quantization_config": config}), CPU)
    assert type(small.blocks[0].mlp.gate_proj.weight) is not torch.nn.Parameter
    states, _ = small.hidden_states(images, "3")
    assert 0.999 < torch.cosine_similarity(full[3].flatten(), states[3].flatten(), dim=0) < 1 - 1e-9


@pytest.mark.parametrize("name", TILED)
def test_token_map_has_whole_image_tiles_and_newlines(checkpoints, images, name):
    """Against the embedded sequence: what tower and projector give for the whole image, and the newline's vector."""
    backbone = load_backbone(BackboneRecipe(checkpoint=str(checkpoints[name])), CPU)
    states, tokens = backbone.hidden_states(images, "0")
    core, inputs = backbone.core, backbone.prepare(images).inputs
    layer = core.config.vision_feature_layer
    with torch.no_grad():
        whole = core.vision_tower(inputs["pixel_values"][:, 0], output_hidden_states=True).hidden_states[layer]
        if core.config.vision_feature_select_strategy == "default":
            whole = whole[:, 1:]
        expected = core.multi_modal_projector(whole)
    torch.testing.assert_close(tokens.image_states(states[0]), expected, rtol=1e-4, atol=1e-5)
    is_newline = (states[0] == core.image_newline).all(dim=-1)
    assert torch.equal(is_newline, tokens.mask("newline"))
    assert len(tokens.tiles) == len(images) and len(set(tokens.tiles)) > 2
    for index, (rows, columns) in enumerate(tokens.tiles):
        assert tokens.mask("tile")[index].sum() == rows * columns and is_newline[index].sum() == rows
        ends = is_newline[index].nonzero().flatten().diff()
        assert (ends == columns + 1).all()  # a newline after every row


@pytest.mark.parametrize("name", FAMILIES)
def test_random_weights_keep_the_tower_alone(checkpoints, name):
    recipe = BackboneRecipe(checkpoint=str(checkpoints[name]))
    trained, fresh = load_backbone(recipe, CPU), load_backbone(recipe, CPU, random_seed=7)
    for key, parameter in trained.core.named_parameters():
        if parameter.std() > 0:
            assert torch.equal(parameter, fresh.core.get_parameter(key)) == key.startswith("vision_tower"), key


@pytest.mark.parametrize("name", FAMILIES)
def test_inspect_needs_no_weights(checkpoints, tmp_path, name):
    folder = getattr(tiny, name)(tmp_path / name)
    (folder / "model.safetensors").unlink()
    found = describe_checkpoint(BackboneRecipe(checkpoint=str(folder)))
    assert found["family"] == name and found["tokens"]["image"] == 16 and found["llm"]["layers"] == 3
    assert found["projector"]["in"] == (72 if name == "vipllava" else 24)
    assert ("tile_grid" in found) == (name in TILED)


@pytest.mark.parametrize(("name", "view"), [("llava_next", "own"), ("llava_onevision", "square")])
def test_a_whole_run(checkpoints, models, coco, tmp_path, name, view):
    values = {
        "backbone": {"checkpoint": str(checkpoints[name])},
        "data": {"path": f"coco:{coco}", "view": view},
        "teachers": {"depth": {"id": str(models["depth"])}},
        "layers": "0,3",
        "fit": {"epochs": 1, "batch_size": 6, "micro_batch": 3, "workers": 0},
    }
    run = train(validate(ProbeRunRecipe, values, "test"), tmp_path / "run")
    assert "depth,3,resampler,none,cosine_centred,strict,,val2017,0" in evaluate(run.path).read_text()


@pytest.mark.parametrize(
    ("name", "field", "value", "right"),
    [
        ("vipllava", "vision_feature_select_strategy", "full", "default"),
        ("llava_next", "num_additional_image_tokens", 2, 1),
        ("llava_next", "patch_size", 4, 8),
        ("llava_onevision", "num_image_tokens", 25, 16),
        ("llava_onevision", "vision_aspect_ratio", "anyres_max_1", "anyres_max_2"),
    ],
)
def test_processor_fields_are_checked_at_the_door(tmp_path, images, name, field, value, right):
    """A wrong one is named with its right value, an absent one taken from the configuration."""
    folder = getattr(tiny, name)(tmp_path / name)
    recipe = BackboneRecipe(checkpoint=str(folder))
    whole = load_backbone(recipe, CPU).prepare(images).inputs["input_ids"]
    file = folder / "processor_config.json"
    stated = json.loads(file.read_text())
    file.write_text(json.dumps(stated | {field: value}))
    for verb in (describe_checkpoint, lambda recipe: load_backbone(recipe, CPU)):
        with pytest.raises(UserError, match=f"the processor places .* where the model has .* set {field}={right}$"):
            verb(recipe)
    file.write_text(json.dumps({key: own for key, own in stated.items() if key != field}))
    assert torch.equal(load_backbone(recipe, CPU).prepare(images).inputs["input_ids"], whole)


@pytest.mark.parametrize(("name", "right"), [("llava_next", "default"), ("llava_onevision", "full")])
def test_tiles_that_cannot_be_packed_are_refused(tmp_path, name, right):
    """Tiles with a class token, or without their first patch: transformers cannot run them either."""
    folder = getattr(tiny, name)(tmp_path / name)
    file = folder / "config.json"
    wrong = {"default": "full", "full": "default"}[right]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vision_feature_select_strategy": wrong}))
    for verb in (describe_checkpoint, lambda recipe: load_backbone(recipe, CPU)):
        with pytest.raises(UserError, match=f"vision_feature_select_strategy is {wrong}; set it to {right}"):
            verb(BackboneRecipe(checkpoint=str(folder)))
