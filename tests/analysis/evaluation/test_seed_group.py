"""Folders of runs that differ by the seed of their checkpoint alone."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.evaluation.bootstrap import Interval
from analysis.evaluation.compare import compare, statements
from analysis.evaluation.jackknife import Jackknife
from analysis.evaluation.options import Options
from analysis.evaluation.run import evaluate
from analysis.evaluation.scores import ScoreFile, ScoreKey, Summary, score_file, summaries, write_summaries
from analysis.evaluation.seed_group import _merged
from analysis.planning.evaluation import plan_evaluation
from probing.recipe import ProbeRunRecipe, validate
from probing.training.run import train
from probing.utils.errors import UserError
from tests.helpers import tiny
from tests.helpers.cli import probing

SEEDS = 3


@pytest.fixture(scope="module")
def arms(models, coco, tmp_path_factory):
    """Two folders of three runs each, evaluated as folders."""
    root = tmp_path_factory.mktemp("pooled")
    for arm in ("base", "other"):
        for seed in range(SEEDS):
            checkpoint = tiny.llava(root / "checkpoints" / f"{arm}_{seed}", seed=seed + 10 * (arm == "other"))
            values = {
                "backbone": {"checkpoint": str(checkpoint)},
                "data": {"path": f"coco:{coco}"},
                "teachers": {"depth": {"id": str(models["depth"])}},
                "layers": "0,2",
                "controls": [],
                "fit": {"epochs": 1, "batch_size": 6, "micro_batch": 3, "workers": 0, "seeds": [seed]},
            }
            train(validate(ProbeRunRecipe, values, "test"), root / arm / f"seed_{seed}")
        evaluate(root / arm, Options(protocols=("strict",)))
    return root


def own_means(folder, probe, layer="2", metric="cosine_centred"):
    """Mean over images of every run's own scores, read from its own file."""
    means = []
    for run in sorted(folder.iterdir()):
        if run.is_dir():
            table = ScoreFile.read(score_file(run, "scores/cosine", "val2017")).table
            means += [s.mean() for c, s in table.items() if (c.probe, c.layer, c.metric) == (probe, layer, metric)]
    return np.array(means)


@pytest.mark.parametrize("probe", ["resampler", "ridge"])
def test_the_folders_results_are_those_of_its_runs(arms, probe):
    results = pd.read_csv(arms / "base" / "results.csv", dtype=str)
    place = (results["probe"] == probe) & (results["layer"] == "2") & (results["metric"] == "cosine_centred")
    rows = results[place].set_index("seed")
    means = own_means(arms / "base", probe)
    assert float(rows.loc["all", "value"]) == pytest.approx(means.mean(), abs=1e-6)
    assert set(results["checkpoint"]) == {"base"} and len(means) == SEEDS
    if probe == "resampler":
        assert [float(rows.loc[str(k), "value"]) for k in range(SEEDS)] == pytest.approx(means, abs=1e-6)
    between = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert float(rows.loc["all", "ci_high"]) - float(rows.loc["all", "ci_low"]) > 0.6 * (between.high - between.low)


def test_runs_of_the_same_name_are_pairs(arms):
    table = compare([arms / "base", arms / "other"], ["base", "other"])
    row = table[(table["layer"] == "2") & (table["probe"] == "resampler") & (table["metric"] == "cosine_centred")].iloc[
        0
    ]
    differences = own_means(arms / "other", "resampler") - own_means(arms / "base", "resampler")
    assert row["value"] == pytest.approx(differences.mean(), abs=1e-6) and row["seeds"] == "3, 3"
    assert row["higher"] == f"{(differences > 0).sum()} of 3"
    assert any("6 images and 3 pairs of seeds (higher in" in sentence for sentence in statements(table))


def test_without_pairs_seeds_are_resampled_apart(arms, tmp_path):
    shutil.copytree(arms / "other", tmp_path / "other")
    (tmp_path / "other" / "seed_2").rename(tmp_path / "other" / "seed_9")
    table = compare([arms / "base", tmp_path / "other"], ["base", "other"])
    assert set(table["higher"]) == {""} and any("3 and 3 seeds" in sentence for sentence in statements(table))


def test_the_commands_take_folders(arms, tmp_path):
    done = probing("compare", arms / "base", arms / "other", "--out", tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "depth, ridge, centred cosine similarity, mean over layers: other - base = " in done.stdout
    assert ", 3 runs)" in page and "the first of 3 that differ by their seed" in page
    merged = pd.read_csv(tmp_path / "results.csv", dtype=str)
    assert set(merged["checkpoint"]) == {"base", "other"} and {"0", "1", "2", "all"} <= set(merged["seed"])


def test_runs_that_cannot_be_pooled(arms, tmp_path):
    shutil.copytree(arms / "base", tmp_path / "base")
    recipe = tmp_path / "base" / "seed_1" / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("lr: 0.001", "lr: 0.002"))
    with pytest.raises(UserError, match=r"seed_1 cannot be compared: they differ in fit.lr \(0.001 and 0.002\)"):
        evaluate(tmp_path / "base")
    with pytest.raises(UserError, match=r"they differ in fit\.lr"):
        plan_evaluation(tmp_path / "base", Options())
    recipe.write_text(text.replace("- 1\n", "- 1\n  - 2\n"))
    with pytest.raises(UserError, match="seed_1 has 2 seeds of its probes"):
        evaluate(tmp_path / "base")
    recipe.write_text(text)
    (tmp_path / "base" / "seed_1" / "manifest.json").unlink()
    with pytest.raises(UserError, match="seed_1 has not finished"):
        compare([tmp_path / "base", arms / "other"], ["base", "other"])


def test_chance_that_depends_on_the_data_is_that_of_the_runs():
    key = ScoreKey("tower", "1", "", "none", "mutual_knn", variant="k=1")
    files = [ScoreFile({key: np.ones(5)}, list("abcde"), "val2017", "", chance={"mutual_knn": 0.25}) for _ in "ab"]
    rows = list(summaries(_merged([None, None], files), range(2)))
    assert rows and all(row.chance == 0.25 and row.n == 5 for row in rows)


def distances(value, group_spread=0.5, groups=10, seed=0):
    """Jackknife of one seed whose groups move it by a known spread."""
    left_out = value + np.random.default_rng(seed).normal(0, group_spread, (groups, 1))
    return Jackknife(np.array([value]), left_out)


def write_distances(run, values):
    """Puts Fréchet distances of layer 2 where an evaluation of generated images stores them."""
    curve = ScoreKey("gen", "2", "resampler", "none", "fid", "strict")
    rows = []
    for layer in ("2", "mean"):
        place = replace(curve, layer=layer)
        rows.append(Summary(place, "val2017", "0", values.interval(), 500, images="images", jackknife=values))
    kernel = Interval(values.whole[0] / 10, 0.0, 5.0)
    rows.append(Summary(replace(curve, metric="kid"), "val2017", "0", kernel, 500, images="images"))
    write_summaries(run / "scores" / "fid-val2017.json", rows)


def test_distances_of_seeds_get_the_spread_of_both(arms, tmp_path):
    """Against the textbook: the variance of the groups' mean, and that of the seeds, add."""
    shutil.copytree(arms / "base", tmp_path / "base")
    values = [10.0, 12.0, 15.0]
    for number, value in enumerate(values):
        write_distances(tmp_path / "base" / f"seed_{number}", distances(value, seed=number))
    evaluate(tmp_path / "base", Options(protocols=("strict",)))
    results = pd.read_csv(tmp_path / "base" / "results.csv", dtype={"seed": str, "layer": str})
    rows = results[(results["metric"] == "fid") & (results["layer"] == "2")].set_index("seed")["value"]
    assert rows[["0", "1", "2"]].tolist() == values and rows["all"] == pytest.approx(np.mean(values))
    pooled = results[(results["metric"] == "fid") & (results["layer"] == "2") & (results["seed"] == "all")].iloc[0]
    left_out = np.mean([distances(v, seed=k).left_out[:, 0] for k, v in enumerate(values)], axis=0)
    variance = 81 / 10 * left_out.var(ddof=1) + np.var(values, ddof=1) / 3
    assert pooled["ci_high"] - pooled["value"] == pytest.approx(stats.t.ppf(0.975, 2) * variance**0.5, rel=1e-6)
    kid = results[(results["metric"] == "kid") & (results["seed"] == "all")].iloc[0]
    assert kid["value"] == pytest.approx(np.mean(values) / 10) and (kid["ci_low"], kid["ci_high"]) == (0, 5)


def test_differences_of_distances(arms, tmp_path):
    """Lower is better; what the groups of images have in common goes out."""
    for arm in ("base", "other"):
        shutil.copytree(arms / arm, tmp_path / arm)
    for number in range(SEEDS):
        shared = distances(10.0 + number, group_spread=3.0, seed=number)
        lower = Jackknife(shared.whole - 1, shared.left_out - 1 + 0.01 * np.arange(10)[:, None])
        write_distances(tmp_path / "base" / f"seed_{number}", shared)
        write_distances(tmp_path / "other" / f"seed_{number}", lower)
    table = compare([tmp_path / "base", tmp_path / "other"], ["base", "other"])
    row = table[(table["metric"] == "fid") & (table["layer"] == "2")].iloc[0]
    reach = stats.t.ppf(0.975, 2) * (81 / 10 * np.var(0.01 * np.arange(10), ddof=1)) ** 0.5
    assert (row["value"], row["higher"]) == (pytest.approx(-1), "0 of 3")
    assert row["ci_high"] - row["value"] == pytest.approx(reach)
    (sentence,) = (s for s in statements(table) if "FID" in s)
    assert "other reads better" in sentence and "kid" not in set(table["metric"])
    # Without pairs, the seeds of each vary on their own, and nothing is clear.
    (tmp_path / "other" / "seed_2").rename(tmp_path / "other" / "seed_9")
    table = compare([tmp_path / "base", tmp_path / "other"], ["base", "other"])
    row = table[(table["metric"] == "fid") & (table["layer"] == "2")].iloc[0]
    seeds = 2 * np.var([10.0, 11.0, 12.0], ddof=1) / 3
    assert row["ci_high"] - row["value"] == pytest.approx(
        stats.t.ppf(0.975, 2) * (reach**2 / stats.t.ppf(0.975, 2) ** 2 + seeds) ** 0.5
    )
