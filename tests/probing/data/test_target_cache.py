"""Kept features: the same numbers as computed ones, whoever makes them, and damage that is named."""

import multiprocessing
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import CLIPVisionModel

from analysis.evaluation.run import Options, evaluate
from probing.cli import cli
from probing.data import target_cache
from probing.data.coco import list_images
from probing.data.target_cache import open_caches, teacher_maker
from probing.recipe import ProbeRunRecipe
from probing.teachers import load_teacher
from probing.training.run import arm_backbone, tower_cache_of, train
from probing.utils.errors import UserError
from probing.utils.images import square


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(target_cache, "ROWS", 4)


def teachers_of(recipe, names=("depth", "gen")):
    return {name: load_teacher(name, recipe.teachers[name], torch.device("cpu")) for name in names}


def opened(folder, recipe_values, coco, dtype="float32", **arguments):
    recipe = ProbeRunRecipe.model_validate(recipe_values)
    images = list_images(coco, "train2017")
    given = {"where": str(folder), "view": "square", "batch": 3, "workers": 0} | arguments
    teachers = teachers_of(recipe)
    makers = {name: teacher_maker(teacher, dtype) for name, teacher in teachers.items()}
    return open_caches(makers=makers, images=images, **given), teachers, images


def test_rows_are_what_the_teachers_make_of_the_images(recipe_values, coco, tmp_path):
    caches, teachers, images = opened(tmp_path, recipe_values, coco)
    assert len(images) == 12 and caches["depth"].shards == 3
    for name, teacher in teachers.items():
        for index in range(len(images)):
            own = teacher.target(teacher.prepare([square(images.read(index))]))[0]
            torch.testing.assert_close(caches[name].read(index), own, rtol=1e-5, atol=1e-5)
    half, *_ = opened(tmp_path, recipe_values, coco, dtype="float16")
    assert half["depth"].folder != caches["depth"].folder and half["depth"].bytes * 2 == caches["depth"].bytes
    torch.testing.assert_close(half["depth"].read(5), caches["depth"].read(5), rtol=1e-3, atol=1e-3)
    own, *_ = opened(tmp_path, recipe_values, coco, view="own")
    assert own["depth"].folder != caches["depth"].folder


def test_probes_and_scores_are_those_of_computed_features(recipe_values, tmp_path):
    """Training twice over the images, in other batches than the cache was made in; then the cosine."""
    plain = ProbeRunRecipe.model_validate(recipe_values)
    kept = plain.model_copy(deep=True)
    kept.data.target_cache = str(tmp_path / "cache")
    runs = [train(recipe, tmp_path / name) for name, recipe in (("plain", plain), ("kept", kept))]
    for teacher in plain.teachers:
        one, two = (load_file(run.probes("none") / teacher / "model.safetensors") for run in runs)
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    one, two = (evaluate(run.path, Options(controls=("none",))).read_text().splitlines() for run in runs)
    assert len(one) == len(two)
    for first, second in zip(one[1:], two[1:], strict=True):
        np.testing.assert_allclose(*(np.array(row.split(",")[9:], dtype=float) for row in (first, second)), atol=2e-4)


def test_the_teacher_is_not_asked_where_its_features_are_kept(recipe_values, tmp_path, monkeypatch):
    recipe = ProbeRunRecipe.model_validate(recipe_values)
    recipe.data.target_cache = str(tmp_path / "cache")
    train(recipe, tmp_path / "one")
    loaded = teachers_of(recipe, recipe.teachers)
    monkeypatch.setattr("probing.training.run.load_teachers", lambda recipe, device: loaded)
    monkeypatch.setattr("probing.teachers.base.Teacher.target", lambda self, pixels: pytest.fail("asked"))
    train(recipe, tmp_path / "two")


def _make(folder, recipe_values, coco, process):
    torch.set_num_threads(1)
    target_cache.ROWS = 4
    opened(folder, recipe_values, coco, process=process, processes=2)


def test_two_processes_fill_one_folder(recipe_values, coco, tmp_path):
    alone, *_ = opened(tmp_path / "alone", recipe_values, coco)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_make, args=(tmp_path / "both", recipe_values, coco, rank)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    for cache in alone.values():
        for number in range(cache.shards):
            both = tmp_path / "both" / cache.folder.name / cache.shard(number).name
            assert both.read_bytes() == cache.shard(number).read_bytes()
    assert not list((tmp_path / "both").rglob("*.tmp"))


def test_what_was_half_built_is_built_again(recipe_values, coco, tmp_path):
    caches, *_ = opened(tmp_path, recipe_values, coco)
    whole = caches["depth"].shard(1).read_bytes()
    (caches["depth"].folder / ".shard_00001.npy.x.tmp").write_bytes(whole[:100])  # what a killed process leaves
    caches["depth"].shard(1).unlink()
    again, *_ = opened(tmp_path, recipe_values, coco)
    assert again["depth"].shard(1).read_bytes() == whole


@pytest.mark.parametrize("damage", ["truncated", "empty", "other shape", "pickle"])
def test_a_damaged_shard_is_named(recipe_values, coco, tmp_path, damage):
    caches, *_ = opened(tmp_path, recipe_values, coco)
    file = caches["gen"].shard(2)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "other shape":
        np.save(file, np.zeros((4, 2, 2), dtype=np.float32))
    else:
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"gen-.*shard_00002\.npy .*remove it, and it is made again"):
        opened(tmp_path, recipe_values, coco)
    file.unlink()
    opened(tmp_path, recipe_values, coco)


def test_images_that_could_not_be_read_are_skipped_and_told(recipe_values, coco, tmp_path):
    """An image that is broken while features are made, and whole afterwards, has no features, and is not made up."""
    world = tmp_path / "coco"
    shutil.copytree(coco, world)
    recipe = ProbeRunRecipe.model_validate(recipe_values | {"data": {"path": f"coco:{world}"}})
    recipe.data.target_cache = str(tmp_path / "cache")
    images = list_images(world, "train2017")
    broken = world / "train2017" / images.names[6]
    whole = broken.read_bytes()
    broken.write_bytes(bytes(len(whole)))
    makers = {name: teacher_maker(t, "float32") for name, t in teachers_of(recipe, recipe.teachers).items()}
    open_caches(recipe.data.target_cache, makers, images, "square", 3, 0)
    broken.write_bytes(whole)
    run = train(recipe, tmp_path / "run")
    (skipped,) = run.manifest["skipped"]
    assert skipped["image"] == images.names[6] and "when its features were kept" in skipped["reason"]


def test_the_towers_part_is_kept_too(recipe_values, tmp_path, monkeypatch):
    """For the checkpoint and for random weights, in training and in scoring: the same numbers, and no tower runs."""
    plain = ProbeRunRecipe.model_validate(recipe_values | {"controls": ["shuffled", "random"]})
    kept = plain.model_copy(deep=True)
    kept.data.target_cache = kept.data.tower_cache = str(tmp_path / "cache")
    runs = [train(recipe, tmp_path / name) for name, recipe in (("plain", plain), ("kept", kept))]
    for control in ("none", "random"):
        for teacher in plain.teachers:
            one, two = (load_file(run.probes(control) / teacher / "model.safetensors") for run in runs)
            for name in one:
                torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    one, two = (evaluate(run.path, Options(controls=("none", "blank"))).read_text().splitlines() for run in runs)
    assert len(one) == len(two) > 10
    for first, second in zip(one[1:], two[1:], strict=True):
        np.testing.assert_allclose(*(np.array(row.split(",")[9:], dtype=float) for row in (first, second)), atol=2e-4)
    assert len(list((tmp_path / "cache").glob("tower-*"))) == 3  # both sets of weights, and what is held out
    monkeypatch.setattr("probing.data.target_cache._require_same", lambda *given: None)
    looked, tower = [], CLIPVisionModel.forward

    def look(self, *pixels, **options):
        looked.extend(len(images) for images in pixels if images.device.type != "meta")  # there, tokens are counted
        return tower(self, *pixels, **options)

    monkeypatch.setattr(CLIPVisionModel, "forward", look)
    train(plain.model_copy(update={"data": kept.data}), tmp_path / "again")
    assert looked == [1, 1]  # an image for each set of weights, which tells the number of tokens


def test_half_precision_is_kept_bit_for_bit(recipe_values, coco, tmp_path):
    recipe = ProbeRunRecipe.model_validate(recipe_values)
    recipe.backbone.dtype, recipe.data.tower_cache = "bfloat16", str(tmp_path)
    backbone, images = arm_backbone(recipe, "none", torch.device("cpu")), list_images(coco, "train2017")
    (cache,) = tower_cache_of(recipe, "none", backbone, images).values()
    assert cache.dtype == "bfloat16" and cache.bytes == 12 * 16 * 32 * 2
    for index in range(len(images)):
        own = backbone.embed_images(backbone.prepare([square(images.read(index))]))
        torch.testing.assert_close(cache.read(index), own[0].float(), rtol=2**-7, atol=1e-3)


def test_a_checkpoint_that_shows_its_image_in_other_ways_is_named(recipe_values, coco, tmp_path):
    """Such as one whose deeper blocks get features of the tower as well."""
    recipe = ProbeRunRecipe.model_validate(recipe_values)
    recipe.data.tower_cache = str(tmp_path)
    backbone = arm_backbone(recipe, "none", torch.device("cpu"))
    tower = []
    backbone.core.register_forward_pre_hook(lambda module, args: tower.clear())
    backbone.core.vision_tower.register_forward_hook(lambda module, args, output: tower.append(output[0].mean()))
    backbone.blocks[1].register_forward_hook(lambda module, args, output: output + (tower.pop() if tower else 0))
    with pytest.raises(UserError, match=r"by more than input embeddings.*set data\.tower_cache=off"):
        tower_cache_of(recipe, "none", backbone, list_images(coco, "train2017"))
    assert not list(tmp_path.iterdir())


def test_room_is_looked_for_first(recipe_values, coco, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLLM_PROBING_CACHE")
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    caches, *_ = opened("auto", recipe_values, coco)
    assert not caches and "features are not kept: that would add" in caplog.text
    with pytest.raises(UserError, match="no disk space: the run needs about"):
        opened(tmp_path / "cache", recipe_values, coco)
    monkeypatch.undo()
    monkeypatch.setattr(target_cache, "ROWS", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLLM_PROBING_CACHE")
    caches, *_ = opened("auto", recipe_values, coco)
    assert caches["depth"].folder.is_relative_to(tmp_path / "home" / "mllm-probing" / "features")


def test_from_the_command_line(models, coco, tmp_path, caplog):
    out, cache = tmp_path / "run", tmp_path / "cache"
    teachers = [part for name in ("depth", "gen") for part in ("--teacher", f"{name}={models[name]}")]
    arguments = ["train", "--checkpoint", str(models["llava"]), "--data", f"coco:{coco}", *teachers, "--layers", "1"]
    arguments += [
        "--target-cache",
        str(cache),
        "--out",
        str(out),
        "fit.workers=0",
        "fit.batch_size=4",
        "fit.micro_batch=4",
    ]
    with caplog.at_level("INFO", logger="probing"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
        CliRunner().invoke(cli, ["evaluate", str(out)], catch_exceptions=False)
    assert "12 images x" in caplog.text and "6 images x" in caplog.text
    assert len(list(cache.iterdir())) == 4  # two teachers, two splits
