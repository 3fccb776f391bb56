"""Paired differences between two checkpoints, on tiny models."""

import json
import shutil
import time

import numpy as np
import pandas as pd
import pytest

from analysis.evaluation.bootstrap import bootstrap, paired_bootstrap
from analysis.evaluation.compare import _shared_series, compare, statements
from analysis.evaluation.options import Options
from analysis.evaluation.run import evaluate
from analysis.evaluation.scores import ScoreFile, ScoreKey, score_file
from probing.recipe import ProbeRunRecipe, validate
from probing.training.run import train
from probing.utils.errors import UserError
from reports.curves import differences_from
from tests.helpers import tiny
from tests.helpers.cli import probing


@pytest.fixture(scope="module")
def runs(models, coco, tmp_path_factory):
    """Two checkpoints probed alike, the first with one seed and the second with two."""
    root = tmp_path_factory.mktemp("compare")
    other = tiny.llava(root / "other", seed=7)
    made = []
    for name, checkpoint, seeds in (("one", models["llava"], [0]), ("two", other, [0, 1])):
        values = {
            "backbone": {"checkpoint": str(checkpoint)},
            "data": {"path": f"coco:{coco}"},
            "teachers": {teacher: {"id": str(models[teacher])} for teacher in ("depth", "gen")},
            "layers": "0,1,3,final",
            "fit": {"epochs": 1, "batch_size": 6, "micro_batch": 3, "workers": 0, "seeds": seeds},
        }
        run = train(validate(ProbeRunRecipe, values, "test"), root / name)
        evaluate(run.path, Options(protocols=("strict",)))
        made.append(run.path)
    return made


def test_differences_are_taken_image_by_image(runs):
    table = compare(runs, ["one", "two"])
    assert not table.duplicated(["teacher", "layer", "probe", "metric", "protocol"]).any()
    assert set(table["layer"]) == {"0", "1", "3", "final", "mean"} and set(table["probe"]) == {"resampler", "ridge"}
    files = [ScoreFile.read(score_file(run, "scores/cosine", "val2017")) for run in runs]
    place = ("depth", "3", "resampler", "none", "cosine_centred", "strict", "")
    both = [np.mean([f.table[c] for c in f.table if tuple(vars(c).values())[:-1] == place], axis=0) for f in files]
    row = table[(table["teacher"] == "depth") & (table["layer"] == "3") & (table["metric"] == "cosine_centred")]
    row = row[row["probe"] == "resampler"].iloc[0]
    assert row["value"] == pytest.approx((both[1] - both[0]).mean(), abs=1e-6) and row["n"] == 6
    assert row["seeds"] == "2, 1" and row["ci_low"] <= row["value"] <= row["ci_high"]
    layers = table[(table["teacher"] == "gen") & (table["probe"] == "ridge") & (table["metric"] == "cosine")]
    blocks = layers[layers["layer"].isin(["1", "3"])]["value"].mean()
    assert layers[layers["layer"] == "mean"]["value"].item() == pytest.approx(blocks)
    assert len(statements(table)) == 2 * 2 * 2 and all("of 4 layers" in sentence for sentence in statements(table))


def test_a_run_compared_with_itself_differs_by_nothing(runs):
    table = compare([runs[0], runs[0]], ["a", "b"])
    assert (table[["value", "ci_low", "ci_high"]] == 0).all(axis=None)
    assert all("no clear difference" in sentence for sentence in statements(table))


def test_every_pair_is_compared_once_first_run_first(runs):
    table = compare([runs[0], runs[1], runs[0]], ["one", "two", "three"])
    pairs = list(dict.fromkeys(zip(table["checkpoint"], table["reference"], strict=True)))
    assert pairs == [("two", "one"), ("three", "one"), ("three", "two")]
    place = ["teacher", "layer", "probe", "metric", "protocol"]
    forth, back = (table[table["checkpoint"] == a][lambda t, b=b: t["reference"] == b] for a, b in (pairs[0], pairs[2]))
    both = forth.merge(back, on=place, suffixes=("", "_back"))
    assert len(both) == len(forth) and np.allclose(both["value"], -both["value_back"], atol=1e-12)
    seen = differences_from(table, "two")[lambda t: t["checkpoint"] == "one"].merge(
        back, on=place, suffixes=("", "_back")
    )
    spread = (seen["ci_high"] - seen["ci_low"]).to_numpy()
    # One seed against two is drawn from other random numbers when sides change: the ends agree but for that.
    assert (np.abs(seen["ci_low"] - seen["ci_low_back"]) < 0.35 * spread).all()


def test_pairing_takes_out_what_images_have_in_common():
    rng = np.random.default_rng(0)
    image = rng.normal(0, 1, 300)
    one, two = image + rng.normal(0, 0.1, 300), image + 0.05 + rng.normal(0, 0.1, 300)
    paired = paired_bootstrap(two[None], one[None])
    assert paired.low > 0 and paired.value == pytest.approx((two - one).mean())
    apart = [bootstrap(x[None]) for x in (one, two)]
    assert apart[1].low < apart[0].high  # unpaired, the intervals overlap
    spread = 2 * 1.96 * (two - one).std() / 300**0.5
    assert paired.high - paired.low == pytest.approx(spread, rel=0.1)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_bootstrap(two[None], one[None, :10])


def test_time_grows_with_the_number_of_images_and_not_its_square():
    """Of code length, on COCO's training images; a search of each name among all took an hour."""
    rng = np.random.default_rng(0)
    key, names = ScoreKey("depth", "1", "ridge", "none", "code_length", "strict"), [f"{n}.jpg" for n in range(20_000)]
    files = [ScoreFile({key: rng.normal(size=20_000)}, order, "train2017", "") for order in (names, names[::-1])]
    started = time.process_time()
    ((one, two),) = _shared_series(*files, with_final=False)[key]
    assert time.process_time() - started < 5  # 0.04 s; it was 100 s
    np.testing.assert_array_equal(one[0][::-1], files[0].table[key])
    np.testing.assert_array_equal(two[0], files[1].table[key])


def change_manifest(path, *keys, value):
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text(json.dumps(manifest))


def test_probes_that_learned_nothing_are_named(runs, tmp_path, caplog):
    copy = shutil.copytree(runs[1], tmp_path / "two")
    rows = json.loads((copy / "manifest.json").read_text())["convergence"]
    states = [row | {"state": "stuck at the mean" if row["teacher"] == "gen" else "flat"} for row in rows]
    change_manifest(copy, "convergence", value=states)
    compare([runs[0], copy], ["one", "two"])
    (warning,) = (text for text in caplog.messages if text.startswith("two: "))
    assert warning == "two: 8 of 16 resamplers (gen) learned little beyond the mean target; train longer"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("data", "eval_digest"), "x" * 64, "they differ in held-out images"),
        (("data", "view"), "own", r"they differ in view \(square and own\)"),
        (("teachers", "depth", "sha256"), "other", "they differ in depth teacher"),
        (("checkpoint", "layers"), 5, r"they differ in number of layers \(3 and 5\)"),
    ],
)
def test_runs_with_different_probes_are_refused(runs, tmp_path, keys, value, message):
    shutil.copytree(runs[1], tmp_path / "run")
    change_manifest(tmp_path / "run", *keys, value=value)
    with pytest.raises(UserError, match=message):
        compare([runs[0], tmp_path / "run"], ["one", "two"])


def test_other_training_and_other_metrics_are_refused(runs, tmp_path):
    shutil.copytree(runs[1], tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.001", "lr: 0.002"))
    with pytest.raises(UserError, match=r"they differ in fit.lr \(0.001 and 0.002\)"):
        compare([runs[0], tmp_path / "run"], ["one", "two"])
    shutil.copytree(runs[1], tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty" / "scores")
    with pytest.raises(UserError, match="no score in common"):
        compare([runs[0], tmp_path / "empty"], ["one", "two"])
    with pytest.raises(UserError, match="at least two runs"):
        compare([runs[0]], ["one"])


def test_command_prints_sentences_and_draws_differences(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("reports.page.layer_frame", lambda *values: pd.DataFrame())  # slow, and drawn by other tests
    monkeypatch.setattr("reports.page.heat_map", lambda *values: None)
    done = probing("compare", *runs, "--out", tmp_path / "out", "--figures")
    assert "depth, resampler, centred cosine similarity, mean over layers: other - llava = " in done.stdout
    page = (tmp_path / "out" / "index.html").read_text()
    assert (name := ", cosine similarity per token, mean over layers: ") in page and name not in done.stdout
    assert "Paired differences from <span data-chosen>llava</span>" in page and "probing.compare" not in page
    assert len(pd.read_csv(tmp_path / "out" / "differences.csv")) == 2 * 5 * 2 * 2
    assert (tmp_path / "out" / "figures" / "differences_cosine_centred_strict.svg").exists()
