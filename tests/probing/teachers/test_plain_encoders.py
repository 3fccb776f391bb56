"""Plain encoders together with a teacher of the paper, from the command line to the page."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.evaluation.scores import ScoreFile, score_file
from probing.data.coco import list_images
from probing.recipe import TeacherRecipe
from probing.runs.directory import Run
from probing.teachers import load_teacher
from probing.toyworld.layout import write_world
from probing.utils.images import square
from tests.helpers import cli, encoders
from tests.helpers.cli import error_line

SMALL = ["fit.epochs=1", "fit.batch_size=6", "fit.micro_batch=3", "fit.workers=0"]


def probing(*args):
    return cli.probing(*args).output


@pytest.fixture(scope="module")
def teachers(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    own = {"dino": encoders.make("dinov2_registers", root / "dino"), "sig-lip_2": encoders.make("siglip", root / "b")}
    return {"depth": models["depth"], **own}


def options(teachers):
    return [f"--teacher={name}={folder}" for name, folder in teachers.items()]


@pytest.fixture(scope="module")
def run(models, coco, teachers, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    common = ["--checkpoint", models["llava"], "--data", f"coco:{coco}", "--target-cache", out.parent / "cache"]
    probing(
        "train", *common, "--layers", "0,3", *options(teachers), "--out", out, *SMALL,
        "teachers.sig-lip_2.features=pooled",
    )  # fmt: skip
    probing("evaluate", out)
    probing("report", out)
    return out


def test_results_probes_and_page_have_every_teacher(run, teachers):
    results = pd.read_csv(run / "results.csv", keep_default_na=False)
    assert set(results["teacher"]) == set(teachers)
    for name in teachers:
        own = results[(results["teacher"] == name) & (results["metric"] == "cosine_centred")]
        assert {("resampler", "none"), ("resampler", "shuffled"), ("ridge", "none"), ("constant", "mean")} == set(
            zip(own["probe"], own["control"], strict=True)
        )
        assert (run / "probes" / name / "model.safetensors").exists() and name in (
            run / "report/index.html"
        ).read_text()
    manifest = json.loads((run / "manifest.json").read_text())["teachers"]
    assert manifest["dino"]["shape"] == [16, 24] and manifest["sig-lip_2"]["shape"] == [1, 24]
    assert len(list((run.parent / "cache").glob("*/targets.bin"))) == 6  # a teacher, a split


def test_the_mean_target_is_of_what_the_encoder_itself_gives(run, teachers, coco):
    """The cosine of the mean target, by a loop over images and positions."""
    teacher = load_teacher("dino", TeacherRecipe(id=str(teachers["dino"])), torch.device("cpu"))
    splits = [list_images(coco, split, None) for split in ("train2017", "val2017")]
    train, val = (
        [teacher.target(teacher.prepare([square(images.read(i))]))[0] for i in range(len(images))] for images in splits
    )
    mean = torch.stack(train).mean(0)
    torch.testing.assert_close(Run.open(run).mean_targets(torch.device("cpu"))["dino"], mean, atol=1e-4, rtol=1e-4)
    expected = [
        np.mean([float(m @ v / (m.norm() * v.norm())) for m, v in zip(mean, target, strict=True)]) for target in val
    ]
    found = ScoreFile.read(score_file(run, "scores/cosine", "val2017")).table
    own = [
        v
        for c, v in found.items()
        if (c.teacher, c.control, c.metric, c.protocol) == ("dino", "mean", "cosine", "strict")
    ]
    np.testing.assert_allclose(own[0], expected, atol=1e-4)


@pytest.mark.slow
def test_runs_with_plain_encoders_are_compared_and_drawn(run, models, coco, teachers, tmp_path):
    other = tmp_path / "other"
    probing("train", "--recipe", run / "recipe.yaml", "--out", other, "fit.seeds=[1]")
    probing("evaluate", other)
    said = probing("compare", run, other, "--out", tmp_path / "page")
    assert all(f"{name}, ridge, centred cosine" in said for name in teachers)
    page = (tmp_path / "page" / "index.html").read_text()
    assert all(name in page for name in teachers)
    another = tmp_path / "another"
    recipe = ["--recipe", run / "recipe.yaml", "--out", another, "teachers.sig-lip_2.features=patches"]
    probing("train", *recipe)
    probing("evaluate", another)
    line = error_line("compare", run, another, "--out", tmp_path / "refused")
    assert "they differ in sig-lip_2 teacher's target" in line


@pytest.mark.slow
def test_layers_are_compared_with_plain_encoders(models, teachers, tmp_path):
    world = write_world(tmp_path / "world", 2, 16, seed=4)
    probing(
        "align",
        models["llava"],
        "--data",
        f"coco:{world}",
        *options(teachers),
        "--out",
        tmp_path / "words",
        "workers=0",
    )
    results = pd.read_csv(tmp_path / "words" / "results.csv", keep_default_na=False)
    there = results[results["metric"] == "cka"]
    assert set(there["teacher"]) == {"tower", *teachers} and there["value"].between(-1, 1).all()
    probing("report", tmp_path / "words")
    page = (tmp_path / "words" / "report" / "index.html").read_text()
    assert "CKA with the dino teacher" in page and "CKA with the sig-lip_2 teacher" in page


def test_plan_counts_encoders_without_their_weights(run, teachers):
    said = probing("plan", run / "recipe.yaml")
    weights = 0
    for name, folder in teachers.items():
        teacher = load_teacher(name, TeacherRecipe(id=str(folder)), torch.device("cpu"))
        weights += 4 * sum(p.numel() for p in teacher.model.parameters())
    assert re.search(rf"^teachers .* {weights / 1e3:.3g} kB", said, re.MULTILINE)


def test_teachers_are_listed_and_looked_at(teachers):
    assert "--teacher dino=facebook/dinov2-large" in probing("teachers")
    said = probing("teachers", f"sig={teachers['sig-lip_2']}", "features=pooled")
    assert "1 x 24 (one token)" in said and "SiglipVisionModel" in said


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("dino", "any vision encoder: --teacher dino=FOLDER_OR_HUB_ID"),
        ("Dino={dino}", "a teacher's name is a lowercase letter"),
        ("../dino={dino}", "a teacher's name is a lowercase letter"),
        ("dino=/nowhere", "no such dino teacher: /nowhere"),
        ("dino={empty}", "no dino teacher in .*: it has no config.json"),
    ],
)
def test_bad_teachers_are_one_line_and_leave_nothing(models, coco, teachers, tmp_path, option, message):
    arguments = ["train", "--checkpoint", models["llava"], "--data", f"coco:{coco}", "--out", tmp_path / "run"]
    line = error_line(*arguments, "--teacher", option.format(dino=teachers["dino"], empty=tmp_path))
    assert re.search(message, line) and not (tmp_path / "run").exists()
