"""From embeddings to distances, through the real unCLIP pipeline and Inception, both tiny or random."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from analysis.evaluation.compare import compare, statements
from analysis.evaluation.generated_images import generation
from analysis.evaluation.generated_images.distances import Gaussian, frechet_distance
from analysis.evaluation.generated_images.features import Extractor, inception
from analysis.evaluation.generated_images.generation import image_seeds
from analysis.evaluation.options import Options
from analysis.evaluation.run import evaluate
from analysis.evaluation.scores import ScoreFile, ScoreKey, read_summaries, score_file
from probing.data.coco import list_images
from probing.recipe import ProbeRunRecipe, TeacherRecipe, validate
from probing.runs.directory import Run
from probing.teachers import load_teacher
from probing.teachers.gen import GenDecoder
from probing.training.run import train
from probing.utils.errors import UserError
from probing.utils.images import square

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def evaluated(models, unclip, coco, inception_file, tmp_path_factory):
    values = {
        "backbone": {"checkpoint": str(models["llava"])},
        "data": {"path": f"coco:{coco}"},
        "teachers": {"gen": {"id": str(unclip)}},
        "layers": "0,2",
        "fit": {"epochs": 1, "batch_size": 6, "micro_batch": 3, "workers": 0},
    }
    run = train(validate(ProbeRunRecipe, values, "test"), tmp_path_factory.mktemp("generation") / "run")
    evaluate(run.path, options(inception_file))
    return run.path


def options(inception_file, **values):
    common = {"inception_weights": inception_file, "steps": 2, "guidance": 2.0, "pictures": 2}
    return Options(metrics=("fid",), **common | values)


def results(run):
    return pd.read_csv(run / "results.csv", dtype={"layer": str}, keep_default_na=False)


def test_every_resampler_curve_has_both_distances(evaluated):
    found = results(evaluated)
    assert set(found["metric"]) == {"fid", "kid"} and set(found["n"]) == {6}
    for metric in ("fid", "kid"):
        places = set(map(tuple, found.loc[found["metric"] == metric, ["layer", "probe", "control"]].values))
        layers = {(layer, "resampler", "none") for layer in ("0", "2", "mean")}
        assert places == layers | {("", "constant", "mean"), ("", "target", "teacher")}


def test_the_teachers_own_row_is_computed_by_hand(evaluated, unclip, coco, inception_file):
    """Target embedding, generated, seen by Inception, and the closed form, each called directly."""
    recipe = TeacherRecipe(id=str(unclip))
    teacher = load_teacher("gen", recipe, CPU)
    images = list_images(coco, "val2017")
    pictures = [square(images.read(index)) for index in range(6)]
    embeds = teacher.target(teacher.prepare(pictures))[:, 0]
    decoder, extractor = GenDecoder.load(teacher, recipe, 2, 2.0), inception(inception_file, CPU)
    generated = np.concatenate(
        [decoder.decode(embeds[i : i + 1], image_seeds(images.names)[i : i + 1]) for i in range(6)]
    )
    fake = extractor.features([Image.fromarray(one) for one in generated])
    expected = frechet_distance(Gaussian.fit(fake), Gaussian.fit(extractor.features(pictures)))
    found = results(evaluated).query("metric == 'fid' and probe == 'target'")["value"].item()
    assert found == pytest.approx(expected, rel=1e-3)


def test_probe_equal_to_target_scores_as_the_teacher(evaluated, inception_file, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    file = score_file(run, "embeddings/gen", "val2017")
    found = ScoreFile.read(file)
    target = found.table[ScoreKey("gen", "", "target", "teacher", "embedding", "strict")]
    found.table[ScoreKey("gen", "2", "resampler", "none", "embedding", "strict")] = target
    found.write(file)
    evaluate(run, options(inception_file))
    table = results(run).query("metric == 'fid'").set_index(["layer", "probe"])[["value", "ci_low", "ci_high"]]
    assert table.loc[("2", "resampler")].equals(table.loc[("", "target")])
    assert not table.loc[("0", "resampler")].equals(table.loc[("", "target")])


def test_nothing_is_generated_twice(evaluated, inception_file, monkeypatch, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    before = (run / "results.csv").read_text()

    def refuse(*_):
        raise AssertionError("generated again")

    monkeypatch.setattr(GenDecoder, "decode", refuse)
    evaluate(run, options(inception_file))
    assert (run / "results.csv").read_text() == before
    with pytest.raises(AssertionError, match="generated again"):
        evaluate(run, options(inception_file, steps=3))


def test_images_that_were_generated_differently_are_not_compared(evaluated, inception_file, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    same = compare([evaluated, run], ["a", "b"]).query("metric == 'fid'")
    assert set(same["n"]) == {6} and set(same["value"]) == {0}
    evaluate(run, options(inception_file, steps=1))
    assert results(run).query("metric == 'fid'")["value"].ne(results(evaluated).query("metric == 'fid'")["value"]).all()
    differences = compare([evaluated, run], ["a", "b"])
    assert set(differences["n"]) == {0} and differences["value"].isna().all()
    assert statements(differences) == [
        "b - a: no image has finite numbers of both, or sets of images differ, at some of: layers 0, 2"
    ]


def test_a_seed_without_finite_predictions_leaves_the_others(evaluated, coco, monkeypatch, tmp_path):
    """A probe that was never trained predicts nothing, so that none of its images is generated."""
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("- 0\n", "- 0\n  - 1\n"))
    images = list_images(coco, "val2017")
    real = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    monkeypatch.setattr(generation, "reference_features", lambda *_: (real, True))

    def encode(shown):
        return torch.from_numpy(shown[:, 0].reshape(-1, 12)[:, :5])

    extractor = Extractor("inception", 4, encode, "", ("fid", "kid"))
    noise = np.random.default_rng(1).integers(0, 255, (6, 4, 4, 3), dtype=np.uint8)
    decoder = SimpleNamespace(steps=1, guidance=1.0, decode=lambda embeds, seeds: noise[: len(embeds)])
    key = ScoreKey("gen", "2", "resampler", "none", "embedding", "strict")
    table = {replace(key, seed=seed): np.full((6, 4), value, np.float32) for seed, value in ((0, 1.0), (1, np.nan))}
    embeddings = ScoreFile(table, images.names, "val2017", "")
    generation.write_distances(Run.open(run), embeddings, images, generation.Generator(decoder, extractor, "", 6))
    rows = read_summaries(run / "scores" / "fid-val2017.json")
    found = {row.seed: row for row in rows if row.key.layer == "2" and row.key.metric == "fid"}
    expected = frechet_distance(Gaussian.fit(encode(noise)), Gaussian.fit(real))
    assert found["0"].interval.value == pytest.approx(expected)
    assert found["1"].n == found["all"].n == 0


def test_too_few_images_for_a_distance(evaluated, inception_file):
    with pytest.raises(UserError, match="at least 4 images, not 3"):
        evaluate(evaluated, options(inception_file, images=3))


def test_features_and_pictures_are_saved(evaluated):
    files = list((evaluated / "generated").glob("inception-*/*.safetensors"))
    assert len(files) == 4 and all(load_file(file)["features"].shape == (6, 2048) for file in files)
    pictures = ScoreFile.read(score_file(evaluated, "pictures/gen", "val2017"))
    kinds = {(c.layer, c.probe) for c in pictures.table}
    assert {("", "photograph"), ("", "target"), ("0", "resampler"), ("2", "ridge")} <= kinds
    assert all(p.shape == (2, 32, 32, 3) and p.dtype == np.uint8 for p in pictures.table.values())


def test_an_encoder_alone_cannot_generate(evaluated, models, unclip, coco, inception_file, tmp_path):
    values = {
        "backbone": {"checkpoint": str(models["llava"])},
        "data": {"path": f"coco:{coco}"},
        "teachers": {"gen": {"id": str(models["gen"])}},
        "layers": "0",
        "fit": {"epochs": 1, "batch_size": 6, "micro_batch": 3, "workers": 0},
    }
    run = train(validate(ProbeRunRecipe, values, "test"), tmp_path / "run")
    with pytest.raises(UserError, match="has no decoder"):
        evaluate(run.path, options(inception_file))
    assert not (run.path / "results.csv").exists()
