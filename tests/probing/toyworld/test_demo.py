"""The shipped models reach their stated quality."""

import json
import multiprocessing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from transformers import AutoImageProcessor

from analysis.evaluation.generated_images.distances import Gaussian, frechet_distance
from analysis.evaluation.generated_images.features import classifier
from probing.cli import cli
from probing.data.coco import list_images
from probing.recipe import TeacherRecipe
from probing.teachers import load_teacher
from probing.teachers.gen import GenDecoder
from probing.toyworld import demo, models
from probing.toyworld.demo import demo_recipe
from probing.toyworld.layout import write_world
from probing.toyworld.llava import Schedule, answer_accuracy
from probing.toyworld.models import ASSETS, SHIPPED, Sizes, make_models, write_assets
from probing.toyworld.unclip import GUIDANCE, STEPS
from probing.utils.errors import UserError
from tests.helpers import warm


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world whose scenes none of the models has seen."""
    return write_world(tmp_path_factory.mktemp("toy") / "world", 4, 120, seed=777)


def test_they_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 13e6
    text = "".join(path.read_text() for path in ASSETS.rglob("*.json"))
    assert '"/' not in text  # no path of the machine they were made on


@pytest.mark.parametrize("name", ["depth", "seg", "gen"])
def test_teachers_load_by_path_and_targets_depend_on_image(name, world):
    AutoImageProcessor.from_pretrained(ASSETS / name, subfolder="feature_extractor" if name == "gen" else "")
    teacher = load_teacher(name, TeacherRecipe(id=str(ASSETS / name)), torch.device("cpu"))
    assert teacher.grid == (None if name == "gen" else (6, 6))
    images = list_images(world, "val2017")
    target = teacher.target(teacher.prepare([images.read(index) for index in range(60)]))
    assert target.var(dim=0).mean() / target.square().mean() > 0.15  # not all mean


def test_the_unclip_generates_the_scene_it_is_given(world):
    """An image generated from an embedding is closer to its own scene than to others, in pixels and in the encoder."""
    recipe = TeacherRecipe(id=str(ASSETS / "gen"))
    teacher = load_teacher("gen", recipe, torch.device("cpu"))
    images = list_images(world, "val2017")
    embeds = teacher.target(teacher.prepare([images.read(index) for index in range(40)]))[:, 0]
    generated = GenDecoder.load(teacher, recipe, STEPS, GUIDANCE).decode(embeds, range(40))
    true = np.stack([np.asarray(images.read(index)) for index in range(40)])
    error = ((generated[:, None].astype(float) - true[None]) ** 2).mean((2, 3, 4))
    assert (error.argmin(1) == np.arange(40)).mean() > 0.3
    again = teacher.target(teacher.prepare([Image.fromarray(one) for one in generated]))[:, 0]
    near = F.normalize(again, dim=-1) @ F.normalize(embeds, dim=-1).T
    assert (near.argmax(1) == torch.arange(40)).float().mean() > 0.3


def test_the_classifier_tells_real_scenes_from_noise(world):
    images = list_images(world, "val2017")
    extractor = classifier(str(ASSETS / "toy"), torch.device("cpu"))
    assert extractor.metrics == ("frechet_toy", "kernel_toy") and extractor.side == 48
    real = extractor.features([images.read(index) for index in range(120)])
    noise = np.random.default_rng(0).integers(0, 255, (60, 48, 48, 3), dtype=np.uint8)
    other = extractor.features([Image.fromarray(one) for one in noise])
    halves, far = (frechet_distance(Gaussian.fit(real[:60]), Gaussian.fit(x)) for x in (real[60:], other))
    assert far > 5 * halves


def test_the_llava_answers_clearly_above_chance(world):
    found = answer_accuracy(ASSETS / "llava", world, limit=200)["all"]
    error = (found["chance"] * (1 - found["chance"]) / found["n"]) ** 0.5
    assert found["accuracy"] > found["chance"] + 5 * error


def test_the_demos_recipe_probes_every_layer(tmp_path):
    recipe = demo_recipe(ASSETS, tmp_path)
    assert recipe.layers == "all" and recipe.controls == ["random", "shuffled"]
    assert list(recipe.teachers) == ["depth", "seg", "gen"]


def test_checkpoints_of_another_study_are_added_to_those_there(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(models, "make_base_checkpoint", lambda *_, **__: tmp_path)
    monkeypatch.setattr(models, "make_llava", lambda world, reader, folder, *_: made.append(folder.name))
    monkeypatch.setattr(models, "answer_accuracy", lambda *_: {"all": {"n": len(made)}})
    own = models.checkpoint_variants(tmp_path)
    first = models.make_checkpoints(tmp_path, Schedule(), 0)
    more = models.make_checkpoints(tmp_path, Schedule(), 0, {"patch": {"patches": {}}, "llava": own["llava"]})
    assert made == [*own, "patch"] and list(first) == list(own) and list(more) == ["patch", "llava"]
    assert more["llava"] == first["llava"] and models.make_checkpoints(tmp_path, Schedule(), 0) == first
    assert len(made) == len(own) + 1


@pytest.mark.slow
def test_everything_can_be_made_from_nothing(tmp_path):
    """All models and their shipped copies, made from nothing with too few steps to learn."""
    few = Sizes(
        teacher_scenes=16, held_out=16, train=8, val=6, depth_steps=2, seg_steps=2, gen_steps=2,
        unclip_steps=(2, 2), classifier_steps=2, llava=Schedule(2, 1, 1, 1),
    )  # fmt: skip
    quality = make_models(tmp_path / "models", few)
    assert set(quality) == {*SHIPPED, "multi"} and quality["llava"]["all"]["n"] > 20
    assert write_assets(tmp_path / "models", tmp_path / "assets") < 13
    again = make_models(tmp_path / "models", few)
    assert again == quality == json.loads((tmp_path / "assets" / "quality.json").read_text())


@pytest.mark.parametrize(("options", "browser"), [([], True), (["--open"], True), (["--open"], False)])
def test_open_shows_the_page_in_the_browser(tmp_path, monkeypatch, options, browser):
    opened = []
    monkeypatch.setattr("probing.toyworld.demo.run_demo", lambda preset, out: out / "report" / "index.html")
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or browser)
    done = CliRunner().invoke(cli, ["demo", "--out", str(tmp_path / "a b"), *options], catch_exceptions=False)
    assert done.exit_code == 0 and opened == [f"file://{tmp_path}/a%20b/report/index.html"] * len(options)
    assert ("no browser found" in done.stderr) == (not browser)


@pytest.fixture
def copies(monkeypatch):
    """Lets the demo work in copies of a process that has imported everything; test_end.py starts new interpreters."""
    context = warm.context()
    monkeypatch.setattr("multiprocessing.get_context", lambda method: context)


@pytest.mark.slow
@pytest.mark.usefixtures("copies")
def test_an_error_in_one_checkpoint_stops_the_others(tmp_path, monkeypatch):
    for name, count in {"TRAIN_SCENES": 16, "VAL_SCENES": 8, "QUESTION_SCENES": 4, "EPOCHS": 100_000}.items():
        monkeypatch.setattr(demo, name, count)
    monkeypatch.setattr(demo, "QUICK", {"llava": "llava", "missing": "missing"})
    with pytest.raises(UserError, match="missing"):
        demo.run_demo("quick", tmp_path)
    assert not multiprocessing.active_children()
    assert not [*tmp_path.rglob("results.csv")]  # 100,000 epochs take hours


@pytest.mark.slow
@pytest.mark.usefixtures("copies")
def test_small_demo_ends_and_repeats_from_its_files(tmp_path, monkeypatch):
    few = {"TRAIN_SCENES": 24, "VAL_SCENES": 8, "QUESTION_SCENES": 4, "DECODED_IMAGES": 4, "EPOCHS": 1, "STEPS": 2}
    for name, count in few.items():
        monkeypatch.setattr(demo, name, count)
    monkeypatch.setattr(demo, "demo_recipe", lambda *paths: demo_recipe(*paths).model_copy(update={"layers": "0,8"}))
    page = demo.run_demo("quick", tmp_path / "demo")
    text = page.read_text(encoding="utf-8")
    assert all(word in text for word in ("llava", "ola", "Patches and words", "CV-Bench", "mIoU, probe alone"))
    manifests = {file: file.read_bytes() for file in (tmp_path / "demo" / "runs").rglob("manifest.json")}
    monkeypatch.setattr(demo, "write_report", lambda *arguments: page)  # the same page, which takes long
    assert demo.run_demo("quick", tmp_path / "demo") == page
    assert manifests == {file: file.read_bytes() for file in manifests} and len(manifests) >= 4
