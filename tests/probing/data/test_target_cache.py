"""Cached targets: the same numbers as computed ones, built once by any number of processes."""

import multiprocessing
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from analysis.evaluation.options import Options
from analysis.evaluation.run import evaluate
from probing.cli import cli
from probing.data import target_cache
from probing.data.coco import list_images
from probing.data.target_cache import CacheOptions, build_target_caches
from probing.recipe import ProbeRunRecipe, TeacherRecipe
from probing.teachers import load_teacher
from probing.training.run import train
from probing.utils.errors import UserError
from probing.utils.images import square

CPU = torch.device("cpu")
SMALL = ["--layers", "1", "fit.epochs=1", "fit.workers=0", "fit.batch_size=4", "fit.micro_batch=4"]


@pytest.fixture(scope="module")
def teachers(models):
    return {name: load_teacher(name, TeacherRecipe(id=str(models[name])), CPU) for name in ("depth", "gen")}


@pytest.fixture
def recipe(recipe_values):
    """A small run with two teachers and one layer."""
    teachers = {name: recipe_values["teachers"][name] for name in ("depth", "gen")}
    return ProbeRunRecipe.model_validate(recipe_values | {"teachers": teachers, "layers": "1"})


def build(folder, teachers, root, dtype="float32", view="square", **processes):
    images = list_images(root, "train2017")
    return build_target_caches(teachers, images, CacheOptions(str(folder), dtype, view, 3, 0), **processes)


def test_rows_are_the_teachers_targets(teachers, coco, tmp_path):
    caches, images = build(tmp_path, teachers, coco), list_images(coco, "train2017")
    for name, teacher in teachers.items():
        for index in range(len(images)):
            expected = teacher.target(teacher.prepare([square(images.read(index))]))[0]
            torch.testing.assert_close(caches[name].read(index), expected, rtol=1e-5, atol=1e-5)
    half = build(tmp_path, teachers, coco, dtype="float16")
    assert half["depth"].folder != caches["depth"].folder and half["depth"].bytes * 2 == caches["depth"].bytes
    torch.testing.assert_close(half["depth"].read(5), caches["depth"].read(5), rtol=1e-3, atol=1e-3)
    assert build(tmp_path, teachers, coco, view="own")["depth"].folder != caches["depth"].folder


def test_probes_and_scores_equal_those_without_cache(recipe, tmp_path):
    """Trains twice over the images, in other batches than the cache was built in; then scores the cosine."""
    cached = recipe.model_copy(deep=True)
    cached.data.target_cache = str(tmp_path / "cache")
    runs = [train(one, tmp_path / name) for name, one in (("computed", recipe), ("cached", cached))]
    for teacher in recipe.teachers:
        one, two = (load_file(run.probes("none") / teacher / "model.safetensors") for run in runs)
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    one, two = (pd.read_csv(evaluate(run.path, Options(controls=("none",)))) for run in runs)
    for column in ("value", "ci_low", "ci_high", "n"):
        np.testing.assert_allclose(one[column], two[column], atol=2e-4)


def test_filled_caches_need_no_teacher(teachers, coco, tmp_path, monkeypatch):
    build(tmp_path, teachers, coco)
    monkeypatch.setattr("probing.teachers.base.Teacher.target", lambda self, pixels: pytest.fail("computed"))
    assert build(tmp_path, teachers, coco)["depth"].missing == 0


def _build(folder, teachers, coco, rank):
    torch.set_num_threads(1)
    build(folder, teachers, coco, rank=rank, world_size=2)


def test_two_processes_fill_one_cache(teachers, coco, tmp_path, monkeypatch):
    monkeypatch.setattr(target_cache, "BATCHES_AT_ONCE", 1)
    alone = build(tmp_path / "alone", teachers, coco)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_build, args=(tmp_path / "both", teachers, coco, rank)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    for cache in alone.values():
        for name in ("targets.bin", "rows.bin"):
            both = tmp_path / "both" / cache.folder.name / name
            assert both.read_bytes() == (cache.folder / name).read_bytes()


def test_interrupted_caches_are_completed(teachers, coco, tmp_path):
    cache = build(tmp_path, teachers, coco)["depth"]
    before = np.fromfile(cache.folder / "targets.bin", np.float32)
    cache.write([4, 5], torch.zeros(2, *cache.shape[1:]))
    cache.mark([4, 5], target_cache.MISSING)
    assert not np.allclose(np.fromfile(cache.folder / "targets.bin", np.float32), before)
    build(tmp_path, teachers, coco)
    np.testing.assert_allclose(np.fromfile(cache.folder / "targets.bin", np.float32), before, atol=1e-5)


def test_images_unreadable_while_building_are_skipped(recipe, teachers, coco, tmp_path):
    """An image that is repaired afterwards has no target."""
    world = tmp_path / "coco"
    shutil.copytree(coco, world)
    recipe.data.path, recipe.data.target_cache = f"coco:{world}", str(tmp_path / "cache")
    images = list_images(world, "train2017")
    broken = world / "train2017" / images.names[6]
    content = broken.read_bytes()
    broken.write_bytes(bytes(len(content)))
    build(tmp_path / "cache", teachers, world)
    broken.write_bytes(content)
    (skipped,) = train(recipe, tmp_path / "run").manifest["skipped"]
    assert skipped["image"] == images.names[6] and "when its targets were cached" in skipped["reason"]


def test_free_space_is_checked_first(teachers, coco, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLLM_PROBING_CACHE")
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
        assert not build("auto", teachers, coco) and "targets are not cached" in caplog.text
        with pytest.raises(UserError, match="no disk space"):
            build(tmp_path / "cache", teachers, coco)
        assert not list(tmp_path.rglob("*.bin"))
    folder = build("auto", teachers, coco)["depth"].folder
    assert folder.is_relative_to(tmp_path / "home" / "mllm-probing" / "features")


def test_full_disks_are_one_line(teachers, coco, tmp_path, monkeypatch):
    def full(self, indices, targets):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(target_cache.TargetCache, "write", full)
    with pytest.raises(UserError, match="no disk space left"):
        build(tmp_path, teachers, coco)


def test_the_command_line_builds_and_reads_caches(models, coco, tmp_path, caplog):
    out, cache = tmp_path / "run", tmp_path / "cache"
    arguments = ["train", "--checkpoint", str(models["llava"]), "--data", f"coco:{coco}", *SMALL]
    arguments += [f"--teacher=gen={models['gen']}", "--target-cache", str(cache), "--out", str(out)]
    with caplog.at_level("INFO", logger="probing"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
        CliRunner().invoke(cli, ["evaluate", str(out)], catch_exceptions=False)
    assert "12 images x" in caplog.text and "6 images x" in caplog.text
    assert len(list(cache.iterdir())) == 2  # one per split
