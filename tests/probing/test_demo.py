"""The models that ship with the package are what they are said to be."""

import json

import pytest
import torch
from transformers import AutoImageProcessor

from probing.data.coco import list_images
from probing.data.toyworld.layout import write_world
from probing.data.toyworld.llava import Schedule, answer_accuracy
from probing.data.toyworld.make import ASSETS, Sizes, make_models, write_assets
from probing.demo import demo_recipe
from probing.recipe import TeacherRecipe
from probing.teachers import load_teacher


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world whose scenes none of the models has seen."""
    return write_world(tmp_path_factory.mktemp("toy") / "world", 4, 120, seed=777)


def test_they_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 10e6
    text = "".join(path.read_text() for path in ASSETS.rglob("*.json"))
    assert '"/' not in text  # no path of the machine they were made on


@pytest.mark.parametrize("name", ["depth", "seg", "gen"])
def test_teachers_load_by_path_and_their_targets_say_something_about_the_image(name, world):
    AutoImageProcessor.from_pretrained(ASSETS / name)
    teacher = load_teacher(name, TeacherRecipe(id=str(ASSETS / name)), torch.device("cpu"))
    assert teacher.grid == (None if name == "gen" else (6, 6))
    images = list_images(world, "val2017")
    target = teacher.target(teacher.prepare([images.read(index) for index in range(60)]))
    assert target.var(dim=0).mean() / target.square().mean() > 0.15  # not all mean


def test_the_llava_answers_clearly_above_chance(world):
    found = answer_accuracy(ASSETS / "llava", world, limit=500)["all"]
    error = (found["chance"] * (1 - found["chance"]) / found["n"]) ** 0.5
    assert found["accuracy"] > found["chance"] + 5 * error


def test_the_demos_recipe_probes_every_layer_with_every_control(tmp_path):
    recipe = demo_recipe(ASSETS, tmp_path)
    assert recipe.layers == "all" and recipe.controls == ["random", "shuffled"]
    assert list(recipe.teachers) == ["depth", "seg", "gen"]


@pytest.mark.slow
def test_everything_can_be_made_from_nothing(tmp_path):
    """The whole way of `--preset full` and of the shipped models, with too few steps to be any good."""
    few = Sizes(200, 200, 40, 20, 3, 3, 3, Schedule(3, 2, 2, 2))
    quality = make_models(tmp_path / "models", few)
    assert set(quality) == {"depth", "seg", "gen", "llava"} and quality["llava"]["all"]["n"] > 20
    assert write_assets(tmp_path / "models", tmp_path / "assets") < 10
    again = make_models(tmp_path / "models", few)
    assert again == quality == json.loads((tmp_path / "assets" / "quality.json").read_text())
