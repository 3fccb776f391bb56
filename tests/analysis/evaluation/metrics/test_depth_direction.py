"""Near and far of depth teachers: relative ones give disparity, metric ones metres."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DepthAnythingForDepthEstimation

from analysis.evaluation.context import EvaluationContext
from analysis.evaluation.metrics.depth_pairs import DepthPairs, warn_if_inverted
from analysis.evaluation.options import Options
from analysis.evaluation.pictures import DepthPictures
from analysis.evaluation.registry import EvaluationBatch
from analysis.evaluation.scores import ScoreFile, ScoreKey
from probing.data.coco import list_images
from probing.recipe import TeacherRecipe
from probing.teachers import depth, describe_teacher, load_teacher
from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS
from tests.helpers import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), 2, 8, seed=4)


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    """The toy world's teacher with its last layer negated, so that it gives metres."""
    folder = tmp_path_factory.mktemp("metric")
    model = DepthAnythingForDepthEstimation.from_pretrained(
        ASSETS / "depth", depth_estimation_type="metric", max_depth=20
    )
    with torch.no_grad():
        for tensor in model.head.conv3.parameters():
            tensor.neg_()
    model.save_pretrained(folder)
    for file in (ASSETS / "depth").glob("*processor*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def context(teacher, world) -> EvaluationContext:
    options = Options(da2k=world / "da2k")
    return EvaluationContext(SimpleNamespace(), options, CPU, list_images(world, "val2017"), {"depth": teacher})


def own_scores(teacher, world) -> dict[str, float]:
    """DA-2K accuracy of a teacher's own answer, of its decoded target, and of the image row."""
    metric = DepthPairs(context(teacher, world))
    pixels = teacher.prepare([metric.images.read(index) for index in range(len(metric.images))])
    batch = EvaluationBatch([], metric.images.names, {"depth": pixels}, {"depth": teacher.target(pixels)})
    batch = replace(batch, extra=metric.prepare(batch))
    return {
        probe: float(counts[:, 0].sum() / counts[:, 1].sum())
        for probe, _, scores in metric.references("depth", batch)
        for counts in scores.values()
    }


def test_metric_and_relative_teachers_have_equal_scores(world, metric):
    """Metres are a falling function of the relative teacher's values, which order the same pairs."""
    relative = own_scores(load_teacher("depth", TeacherRecipe(id=str(ASSETS / "depth")), CPU), world)
    metres = own_scores(load_teacher("depth", TeacherRecipe(id=str(metric)), CPU), world)
    assert metres["image_row"] == relative["image_row"]
    for row in ("teacher", "target"):
        assert relative[row] > 0.8 and metres[row] == pytest.approx(relative[row], abs=0.05)


def test_metric_maps_are_transformers_negative_metres(metric, world):
    teacher = load_teacher("depth", TeacherRecipe(id=str(metric)), CPU)
    pixels = teacher.prepare([Image.effect_noise((60, 60), 50).convert("RGB")])
    reference = DepthAnythingForDepthEstimation.from_pretrained(metric).eval()
    with torch.no_grad():
        metres = reference(pixels).predicted_depth
        maps = reference.backbone(pixels).feature_maps
        decoded = reference.head(reference.neck([maps[-1]] * 4, *teacher.grid), *teacher.grid)
    assert float(metres.min()) > 0
    torch.testing.assert_close(depth.predict(teacher, pixels), -metres)
    torch.testing.assert_close(depth.decode(teacher, teacher.target(pixels)), -decoded)
    picture = DepthPictures(context(teacher, world), "depth").decode(teacher.target(pixels), None)
    assert int(picture.flatten().argmax()) == int(decoded.half().flatten().argmin())  # near is bright


def test_scores_of_another_direction_are_not_reused(world, models):
    teacher = load_teacher("depth", TeacherRecipe(id=str(models["depth"])), CPU)
    before = DepthPairs(context(teacher, world)).settings
    teacher.model.config.depth_estimation_type = "metric"
    assert DepthPairs(context(teacher, world)).settings != before


@pytest.mark.parametrize(("share", "warned"), [(0.1, True), (0.5, False), (0.9, False)])
def test_a_teacher_below_chance_is_named(share, warned, caplog):
    right = np.random.default_rng(0).binomial(5, share, 40)
    scores = np.stack([right, np.full(40, 5)], axis=1).astype(float)
    curves = {ScoreKey("depth", "", "teacher", "teacher", "da2k", "strict"): scores}
    curves[ScoreKey("depth", "1", "resampler", "none", "da2k", "strict")] = 0 * scores  # of a probe that is no fault
    with caplog.at_level(logging.WARNING):
        warn_if_inverted(ScoreFile(curves, [str(k) for k in range(40)], "da2k", ""))
    assert ["near and far look swapped" in record.message for record in caplog.records] == [True] * warned


@pytest.mark.parametrize(("kind", "said"), [("relative", "nearer"), ("metric", "farther")])
def test_the_direction_of_a_teacher_is_shown(kind, said, tmp_path):
    folder = tiny.depth_teacher(tmp_path / "depth")
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"depth_estimation_type": "relative"', f'"depth_estimation_type": "{kind}"')
    )
    assert said in describe_teacher({"depth": {"id": str(folder)}})["depth"]
