"""Images that are not finite at a layer: every verb leaves them out there, and every number says how many count."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.alignment.run import AlignRecipe, align
from analysis.evaluation.bootstrap import Interval
from analysis.evaluation.compare import compare, statements
from analysis.evaluation.forward_pass import ScoreAccumulator
from analysis.evaluation.generated_images.distances import Gaussian, frechet_distance
from analysis.evaluation.generated_images.generation import summarise
from analysis.evaluation.options import Options
from analysis.evaluation.run import evaluate
from analysis.evaluation.scores import ScoreFile, ScoreKey, Summary, score_file, write_rows
from probing.data.coco import list_images
from probing.recipe import ProbeRunRecipe
from probing.toyworld.layout import write_world
from probing.training.run import train
from reports.alignment import chapter, load_alignments, sentences
from reports.model_card import write_card
from reports.page import write_report
from reports.results import load_runs, read_results
from reports.tables import difference_table, headline_rows
from tests.helpers import tiny
from tests.helpers.charts import Parsed
from tests.helpers.poison import poison_states, poison_targets
from tests.helpers.report_runs import make_run

BAD, NO_TARGET = 2, 4
"""Held-out images: one is not finite at layer 1, the other has no finite target of the gen teacher."""


@pytest.fixture(scope="module")
def trained(models, coco, tmp_path_factory):
    values = {
        "backbone": {"checkpoint": str(models["llava"])},
        "data": {"path": f"coco:{coco}"},
        "teachers": {teacher: {"id": str(models[teacher])} for teacher in ("depth", "gen")},
        "layers": "0,1,2",
        "controls": ["shuffled", "random"],
        "fit": {"epochs": 1, "batch_size": 6, "micro_batch": 3, "workers": 0, "report_to": "none"},
    }
    run = train(ProbeRunRecipe.model_validate(values), tmp_path_factory.mktemp("finite") / "clean")
    evaluate(run.path, Options(protocols=("strict",)))
    return run.path


@pytest.fixture(scope="module")
def both(trained, coco, tmp_path_factory):
    """A clean run, and the same evaluated where some images are not finite at layer 1, and none is at layer 2."""
    bad = tmp_path_factory.mktemp("finite") / "bad"
    shutil.copytree(trained, bad, ignore=shutil.ignore_patterns("scores", "results.csv"))
    images = list_images(coco, "val2017")
    with pytest.MonkeyPatch.context() as patch:
        poison_states(patch, images, {1: [BAD], 2: range(len(images))})
        poison_targets(patch, "gen", images, [NO_TARGET])
        evaluate(bad, Options(protocols=("strict",)))
    return trained, bad


def test_scores_are_those_of_the_other_images(both):
    clean, bad = (read_results(run / "results.csv") for run in both)
    place = ["teacher", "layer", "probe", "control", "metric", "protocol", "variant", "seed"]
    assert bad[place].equals(clean[place])  # every row is there, in its order
    file = ScoreFile.read(score_file(both[0], "scores/cosine", "val2017"))
    for curve, scores in file.table.items():
        lacking = {"1": {BAD}, "2": set(range(6))}.get(curve.layer, set()) | (
            {NO_TARGET} & {4} if curve.teacher == "gen" else set()
        )
        rest = np.delete(scores, sorted(lacking))
        (row,) = (
            row
            for _, row in bad.iterrows()
            if tuple(row[name] for name in place[:-1]) == tuple(vars(curve).values())[:-1]
        )
        assert row["n"] == len(rest), curve
        if len(rest):
            assert row["value"] == pytest.approx(rest.mean(), abs=1e-5), curve
        else:
            assert row[["value", "ci_low", "ci_high"]].isna().all(), curve
    assert (bad[bad["layer"] == "mean"]["n"] == 0).all()  # layer 2 is one of them, and has no image


def test_what_was_left_out_is_named(both, coco):
    names = list_images(coco, "val2017").names
    manifest = json.loads((both[1] / "manifest.json").read_text())
    rows = {(row["image"], row["control"]): (row["layers"], row["teachers"]) for row in manifest["not_finite"]}
    assert len(rows) == 12
    for control in ("none", "random"):
        assert rows[names[BAD], control] == ("1-2", "") and rows[names[NO_TARGET], control] == ("2", "gen")
        assert rows[names[0], control] == ("2", "")


def test_probes_that_were_never_trained_have_no_score(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("scores", "results.csv"))
    manifest = json.loads((run / "manifest.json").read_text())
    for row in manifest["convergence"]:
        if (row["control"], row["teacher"], row["layer"]) == ("none", "gen", "1"):
            row["state"] = "not trained"
    (run / "manifest.json").write_text(json.dumps(manifest))
    evaluate(run, Options(protocols=("strict",), layers="0,1"))
    results = read_results(run / "results.csv")
    empty = results[(results["n"] == 0) & (results["layer"] != "mean")]
    assert set(zip(empty["teacher"], empty["layer"], empty["probe"], empty["control"], strict=True)) == {
        ("gen", "1", "resampler", "none")
    }


def test_runs_are_compared_over_the_images_of_both(both):
    table = compare(both, ["clean", "bad"])
    for _, row in table.iterrows():
        expected = {"0": 6, "1": 5, "2": 0, "mean": 0}[row["layer"]] - (
            row["teacher"] == "gen" and row["layer"] in "01"
        )
        assert row["n"] == expected and (row["value"] == 0 if expected else math.isnan(row["value"]))
    said = statements(table)
    assert said and all("nan" not in sentence for sentence in said)
    assert "no image has finite numbers of both" in said[-1] and said[-1].endswith("layers 2")


def test_report_shows_what_is_empty(both, tmp_path):
    differences = compare(both, ["clean", "bad"])
    page = write_report([both[1]], tmp_path / "one")
    text = page.read_text()
    rows = pd.concat(chart["rows"] for chart in Parsed(text).charts())
    empty = rows[rows["value"].isna()]
    assert set(empty["layer"]) == {"2"} and (empty["n"] == 0).all()  # the page says: no finite score
    assert "nan" not in text.split("<script")[0].lower().replace("nanmean", "")
    assert "6 images of val2017" not in text  # grouped by the layers that they lack
    assert "4 images of val2017 have non-finite values at layers 2" in text
    write_report(list(both), tmp_path / "two")
    assert len(differences)


@pytest.mark.parametrize("empty", ["", "nan", "NaN"])
@pytest.mark.parametrize("which", ["one layer", "one metric", "everything"])
def test_report_reads_tables_with_empty_values(tmp_path, which, empty):
    run = make_run(tmp_path / "run", layers=3, random=None)
    table = pd.read_csv(run / "results.csv", dtype=str, keep_default_na=False)
    table = table[table["teacher"] == "depth"]
    chosen = {
        "one layer": table["layer"] == "3",
        "one metric": table["metric"] == "cosine_centred",
        "everything": table["metric"] != "",
    }[which]
    table.loc[chosen, ["value", "ci_low", "ci_high"]] = empty
    table.loc[chosen, "n"] = "0"
    table.to_csv(run / "results.csv", index=False)
    (loaded,) = load_runs([run])
    assert loaded.results["value"].isna().sum() == chosen.sum()
    assert set(loaded.results["layer"]) == set(table["layer"])  # an empty layer stays text
    if not empty:
        write_report([run], tmp_path / "page")


def test_results_without_a_value_are_empty_cells(tmp_path):
    nothing = Interval(math.nan, math.nan, math.nan)
    rows = [
        Summary(ScoreKey("gen", layer, "resampler", "none", "cosine", "strict"), "val2017", "0", interval, n)
        for layer, interval, n in (("1", Interval(0.5, 0.4, 0.6), 3), ("", nothing, 0))
    ]
    file = write_rows(tmp_path / "results.csv", "nan", rows)
    assert file.read_text().splitlines()[-1] == "nan,gen,,resampler,none,cosine,strict,,val2017,0,,,,0,"
    table = read_results(file)
    assert table["checkpoint"].tolist() == ["nan", "nan"] and table["layer"].tolist() == ["1", ""]
    assert table["value"].isna().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32])
def test_tally_marks_images_that_do_not_count(dtype):
    curve, counts = ScoreKey("t", "1", "p", "none", "m", "s"), torch.tensor([True, False])
    tally = ScoreAccumulator()
    tally.add(curve, torch.tensor([[1, 2], [3, 4]], dtype=dtype), torch.ones(2, dtype=torch.bool))
    tally.add(curve, torch.tensor([[5, 6], [7, 8]], dtype=dtype), counts)
    tally.add(curve, torch.tensor([[5, 6], [7, 8]], dtype=dtype), counts, summed=True)
    tally.settle()
    tally.names = ["a", "b", "c", "d"]
    found = tally.file("val", "settings")
    np.testing.assert_array_equal(found.table[curve], [[1, 2], [3, 4], [5, 6], [math.nan, math.nan]])
    np.testing.assert_array_equal(found.sums[curve], [5, 6])


def test_distances_are_between_the_images_that_count():
    rng = np.random.default_rng(0)
    real, names = rng.normal(size=(9, 3)).astype(np.float32), [f"{n}.jpg" for n in range(9)]
    features = {}
    for layer, lacking in (("1", [2]), ("2", [5]), ("3", range(7))):
        generated = rng.normal(size=(9, 3)).astype(np.float32)
        generated[list(lacking)] = math.nan
        features[ScoreKey("gen", layer, "resampler", "none", "embedding", "strict")] = generated
    run = SimpleNamespace(recipe=SimpleNamespace(fit=SimpleNamespace(seeds=[0])), manifest={})

    def summarised(layers):
        chosen = {curve: values for curve, values in features.items() if curve.layer in layers}
        rows = summarise(run, ScoreFile(chosen, names, "val", ""), real, ("fid", "kid"))
        return {row.key.layer: row for row in rows if row.key.metric == "fid"}

    def distance(layer, lacking):
        generated = next(values for curve, values in features.items() if curve.layer == layer)
        return frechet_distance(*(Gaussian.fit(np.delete(one, lacking, axis=0)) for one in (generated, real)))

    rows = summarised("12")
    assert [rows[layer].n for layer in ("1", "2", "mean")] == [8, 8, 7]
    assert rows["1"].interval.value == pytest.approx(distance("1", [2]))
    assert rows["mean"].interval.value == pytest.approx((distance("1", [2, 5]) + distance("2", [2, 5])) / 2)
    rows = summarised("123")
    assert rows["3"].n == 2 and math.isnan(rows["3"].interval.value) and math.isnan(rows["mean"].interval.value)


@pytest.fixture(scope="module")
def aligned(models, tmp_path_factory):
    """`probing align`, clean and where images are not finite at some layers."""
    folder = tmp_path_factory.mktemp("align")
    world, checkpoint = write_world(folder / "world", 2, 16, seed=5), tiny.llava(folder / "llava", image=48)
    values = {"backbone": {"checkpoint": str(checkpoint)}, "data": {"path": f"coco:{world}"}}
    values |= {"teachers": {"gen": {"id": str(models["gen"])}, "depth": {"id": str(models["depth"])}}}
    values |= {"layers": "0-3", "sample": 5, "micro_batch": 4, "workers": 0, "pictures": 2}
    recipe, images = AlignRecipe.model_validate(values), list_images(world, "val2017")
    align(recipe, folder / "clean")
    with pytest.MonkeyPatch.context() as patch:
        poison_states(patch, images, {1: [BAD], 2: range(16), 3: range(5)})
        poison_targets(patch, "depth", images, [NO_TARGET])
        align(recipe, folder / "bad")
    return folder / "clean", folder / "bad"


def test_alignment_is_measured_over_the_images_that_count(aligned):
    clean, bad = (read_results(run / "results.csv") for run in aligned)
    place = ["teacher", "layer", "control", "metric", "protocol"]
    assert set(map(tuple, bad[place].values)) == set(map(tuple, clean[place].values))
    whole = {
        name: ScoreFile.read(score_file(aligned[0], f"scores/{name}", "val2017")) for name in ("alignment", "sample")
    }
    for metric, name, lacking in (
        ("anisotropy", "alignment", {"1": [BAD]}),
        ("von_neumann_entropy", "sample", {"1": [BAD]}),
    ):
        for curve, scores in whole[name].table.items():
            if curve.metric == metric and curve.layer != "2":
                rest = np.delete(scores, lacking.get(curve.layer, [*range(5)] if curve.layer == "3" else []))
                row = bad[(bad["metric"] == metric) & (bad["layer"] == curve.layer)].iloc[0]
                assert row["n"] == len(rest), curve
                assert row["value"] == pytest.approx(rest.mean(), abs=1e-5) if len(rest) else math.isnan(row["value"])
    empty = bad[(bad["layer"] == "2") & (bad["metric"] != "image_attention")]  # that is not measured from the states
    assert len(empty) > 20 and (empty["n"] == 0).all() and empty["value"].isna().all()
    manifests = [json.loads((run / "manifest.json").read_text()) for run in aligned]
    assert manifests[0]["data"]["labelled_patches"] == manifests[1]["data"]["labelled_patches"]
    assert manifests[0]["not_finite"] == [] and len(manifests[1]["not_finite"]) == 16
    assert manifests[1]["not_finite"][BAD]["layers"] == "1-3"


def test_alignments_with_empty_layers_are_compared_and_reported(aligned):
    table = compare(aligned, ["clean", "bad"])
    table = table[table["metric"] != "image_attention"]
    assert (table[table["layer"] == "2"]["n"] == 0).all() and (table[table["layer"] == "0"]["n"] > 0).any()
    assert (table[(table["layer"] == "0") & (table["teacher"] != "depth")]["n"] > 0).all()
    assert all("nan" not in sentence for sentence in statements(table))
    runs = load_alignments(list(aligned))
    assert all("nan" not in sentence for run in runs for sentence in sentences(run))
    charts = [chart for part in chapter(runs, ["clean", "bad"])["alignment_sections"] for chart in part["charts"]]
    assert len(charts) > 10 and all("nan" not in json.dumps(chart).lower() for chart in charts)
    assert "nan" not in difference_table(headline_rows(table)).to_csv()


def test_a_card_is_written_of_a_run_with_empty_layers(both, tmp_path):
    shutil.copytree(both[1], tmp_path / "run")
    write_card(tmp_path / "run", "org/name")
    assert "nan" not in (tmp_path / "run" / "README.md").read_text()
