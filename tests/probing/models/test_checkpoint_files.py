"""Missing, superfluous or wrong files and tensors of a checkpoint: inspect, --dry-run and loading report the same."""

import json
import logging
import shutil

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from analysis.planning.probe_training import plan_training
from probing.cli import cli
from probing.models import describe_checkpoint, identify, load_backbone
from probing.models.llava_next import parse_pinpoints
from probing.recipe import BackboneRecipe, ProbeRunRecipe, model_name
from probing.utils.errors import UserError
from tests.helpers import tiny
from tests.helpers.original import PINPOINTS, original

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Checkpoints of one file each, by family."""
    root = tmp_path_factory.mktemp("files")
    original(root / "original", headers=True, split=False)
    original(root / "convnext" / "model", headers=True, convnext=True, split=False)
    return {
        "llava": tiny.llava(root / "llava"),
        "llava_next": tiny.llava_next(root / "llava_next"),
        "llava_onevision": tiny.llava_onevision(root / "llava_onevision"),
        "original": root / "original",
        "convnext": root / "convnext" / "model",
    }


def copied(whole, family, tmp_path, change):
    """A copy of a checkpoint whose tensors `change` edits; returns the folder and the name of its LLM's last matrix."""
    folder = tmp_path / family
    shutil.copytree(whole[family], folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(tensors) if n.endswith("layers.1.mlp.down_proj.weight"))
    change(tensors, name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, name


def looks(folder, coco, gen):
    """The ways to look at a checkpoint: inspect, a dry run of train, and loading it."""
    recipe = BackboneRecipe(checkpoint=str(folder))
    run = ProbeRunRecipe.model_validate(
        {
            "backbone": recipe.model_dump(),
            "data": {"path": f"coco:{coco}"},
            "teachers": {"gen": {"id": str(gen)}},
            "fit": {"batch_size": 2, "micro_batch": 2, "workers": 0},
        }
    )
    return (
        lambda: describe_checkpoint(recipe),
        lambda: plan_training(run, folder.parent / "run"),
        lambda: load_backbone(recipe, CPU),
    )


def without(tensors, name):
    del tensors[name]


def reshaped(tensors, name):
    tensors[name] = torch.zeros(7, 5)


def tower_reshaped(tensors, name):
    name = next(n for n in sorted(tensors) if "vision_tower" in n and ".head." not in n and tensors[n].dim() == 1)
    tensors[name] = torch.zeros(5)


def with_lora(tensors, name):
    tensors[name.removesuffix("weight") + "lora_A.default.weight"] = torch.ones(4, 64)


def with_base_layer(tensors, name):
    tensors[name.removesuffix("weight") + "base_layer.weight"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        *[(family, without, "lacks 1 tensors") for family in ("llava_next", "original")],
        *[
            (family, reshaped, r"layers.1.mlp.down_proj.weight has shape \[7, 5\], its config.json needs \[32, 64\]")
            for family in ("llava_onevision", "original")
        ],
        ("convnext", tower_reshaped, r"has shape \[5\], its config.json needs"),
        *[(family, with_lora, "unmerged adapter .*lora_A") for family in ("llava", "original")],
        ("llava", with_base_layer, "unmerged adapter .*base_layer"),
    ],
)
def test_wrong_tensors_are_named_before_training(whole, tmp_path, coco, models, family, change, message):
    folder, _ = copied(whole, family, tmp_path, change)
    for look in looks(folder, coco, models["gen"]):
        with pytest.raises(UserError, match=message) as caught:
            look()
        assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named_before_training(tmp_path, coco, models):
    original(tmp_path / "model", headers=True, suffix="bin")
    shard = next((tmp_path / "model").glob("*-00002-of-*.bin"))
    shard.unlink()
    for look in looks(tmp_path / "model", coco, models["gen"])[:2]:
        with pytest.raises(UserError, match=f"lacks the shard {shard.name}"):
            look()


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("vision_tower.vision_model.embeddings.position_ids", False),
        ("vision_tower.vision_model.head.probe", False),
        ("language_model.model.layers.0.self_attn.gate.weight", True),
        ("resampler.queries", True),
    ],
)
def test_unused_tensors_are_warned_of(whole, tmp_path, caplog, name, warned):
    folder, _ = copied(whole, "llava", tmp_path, lambda tensors, _: tensors.update({name: torch.zeros(2)}))
    with caplog.at_level(logging.WARNING, logger="probing"):
        load_backbone(BackboneRecipe(checkpoint=str(folder)), CPU)
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("probing")]
    assert len(logged) == warned
    assert all("1 tensors" in line and name.rsplit(".", 2)[-2] in line for line in logged)


def test_inspect_ends_in_one_line(whole, tmp_path):
    folder, _ = copied(whole, "llava", tmp_path, with_lora)
    done = CliRunner().invoke(cli, ["inspect", str(folder)])
    assert isinstance(done.exception, UserError) or done.exit_code == 2


@pytest.mark.parametrize("named", [False, True], ids=["plain", "named"])
def test_a_chat_template_may_stand_in_the_tokenizer_config(whole, tmp_path, named):
    folder = tmp_path / "llava"
    shutil.copytree(whole["llava"], folder)
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        describe_checkpoint(BackboneRecipe(checkpoint=str(folder)))
    file = folder / "tokenizer_config.json"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": text}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": several if named else text}))
    found = identify(BackboneRecipe(checkpoint=str(folder)))
    assert found.prompt == identify(BackboneRecipe(checkpoint=str(whole["llava"]))).prompt


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("[[336, 672], [672, 336]]", [[336, 672], [672, 336]]),
        ("[(336, 672), (672, 336)]", [[336, 672], [672, 336]]),
        ("(1x1),...,(2x3)", [[336, 336], [336, 672], [336, 1008], [672, 336], [672, 672], [672, 1008]]),
        ([[336, 672]], [[336, 672]]),
    ],
)
def test_resolutions_may_be_written_as_text(text, pairs):
    assert parse_pinpoints(text, 336) == pairs


@pytest.mark.parametrize("text", ["anyres", "[[336]]", "[1, 2]", "", '["a", "b"]', '{"a": 1}'])
def test_other_texts_are_no_resolutions(text):
    with pytest.raises(UserError, match="image_grid_pinpoints"):
        parse_pinpoints(text, 336)


@pytest.mark.parametrize(
    ("family", "where"), [("llava_next", "config.json"), ("llava_onevision", "processor_config.json")]
)
def test_a_checkpoint_with_resolutions_as_text_is_the_same(whole, tmp_path, family, where):
    folder = tmp_path / family
    shutil.copytree(whole[family], folder)
    values = json.loads((folder / where).read_text())
    holder = values if where == "config.json" else values["image_processor"]
    holder["image_grid_pinpoints"] = str(holder["image_grid_pinpoints"])
    (folder / where).write_text(json.dumps(values))
    image = [Image.new("RGB", (60, 30), (9, 99, 199))]
    found, expected = (
        load_backbone(BackboneRecipe(checkpoint=str(path)), CPU).hidden_states(image, "3")[0][3]
        for path in (folder, whole[family])
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_original_checkpoint_may_write_resolutions_as_text(tmp_path):
    original(tmp_path / "model", "llava_mistral", own_tower=True, anyres=True)
    recipe = BackboneRecipe(checkpoint=str(tmp_path / "model"))
    expected = describe_checkpoint(recipe)
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw | {"image_grid_pinpoints": str(PINPOINTS)}))
    assert describe_checkpoint(recipe) == expected


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/cache/hub/models--org--some--name/snapshots/0123abcd", "org/some--name"),
        ("models--org--name/snapshots/0123abcd/", "org/name"),
        ("/cache/models--gpt2/snapshots/0123abcd", "gpt2"),
        ("/data/snapshots/model", "model"),
        ("/data/models--org--name/other/0123abcd", "0123abcd"),
        ("org/name", "name"),
    ],
)
def test_a_cached_checkpoint_is_called_by_its_repository(source, name):
    assert model_name(source) == name


def test_labels_of_a_cached_checkpoint_name_its_repository(whole, tmp_path):
    folder = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    shutil.copytree(whole["llava"], folder)
    recipe = BackboneRecipe(checkpoint=str(folder))
    assert identify(recipe).name == load_backbone(recipe, CPU).name == "org/name"
