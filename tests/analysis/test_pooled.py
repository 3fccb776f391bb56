"""Folders of runs that differ by the seed of their checkpoint alone."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.compare import compare, statements
from analysis.evaluate import Options, evaluate
from analysis.pooled import _pooled_rows
from analysis.scores import Curve, ScoreFile, Summary, score_file
from analysis.statistics import Interval
from probing.errors import UserError
from probing.recipe import ProbeRunRecipe, validate
from probing.train import train
from tests import tiny

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
    def probing(*arguments):
        command = [sys.executable, "-m", "probing", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    done = probing("compare", arms / "base", arms / "other", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "index.html").read_text()
    assert "depth, ridge, cosine_centred (strict): other - base = " in done.stdout
    assert "3 runs" in page and "the first of 3, whose seeds differ" in page
    merged = pd.read_csv(tmp_path / "results.csv", dtype=str)
    assert set(merged["checkpoint"]) == {"base", "other"} and {"0", "1", "2", "all"} <= set(merged["seed"])


def test_runs_that_cannot_be_pooled(arms, tmp_path):
    shutil.copytree(arms / "base", tmp_path / "base")
    recipe = tmp_path / "base" / "seed_1" / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("lr: 0.001", "lr: 0.002"))
    with pytest.raises(UserError, match=r"seed_1 cannot be compared: they differ in fit.lr \(0.001 and 0.002\)"):
        evaluate(tmp_path / "base")
    recipe.write_text(text.replace("- 1\n", "- 1\n  - 2\n"))
    with pytest.raises(UserError, match="seed_1 has 2 seeds of its probes"):
        evaluate(tmp_path / "base")
    recipe.write_text(text)
    (tmp_path / "base" / "seed_1" / "manifest.json").unlink()
    with pytest.raises(UserError, match="seed_1 has not finished"):
        compare([tmp_path / "base", arms / "other"], ["base", "other"])


def test_distances_of_seeds_get_the_spread_of_both():
    """Against the textbook: Student's interval over seeds, and the images' own, in quadrature."""
    values = [10.0, 12.0, 15.0]
    curve = Curve("gen", "2", "resampler", "no", "fid", "strict", 0)
    rows = [Summary(curve, "val2017", "0", Interval(v, v - 2, v + 2), 500) for v in values]
    *seeds, pooled = _pooled_rows(rows)
    between = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    half = np.hypot((between.high - between.low) / 2, 2)
    assert (pooled.seed, pooled.interval.value) == ("all", pytest.approx(np.mean(values)))
    assert pooled.interval.high == pytest.approx(np.mean(values) + half)
    assert [row.seed for row in seeds] == ["0", "1", "2"] and [row.interval.value for row in seeds] == values
