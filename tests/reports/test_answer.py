"""The answer: verdicts follow from intervals, differences are paired by image, and the probe is one that converged."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.evaluation.above_random import AS_MUCH, LESS, MORE, PairedScores, verdict
from analysis.evaluation.scores import ScoreFile, ScoreKey, score_file
from reports.answer import (
    BITS_BY,
    NO_INTERVAL,
    NOTHING,
    UNKNOWN,
    USED_BY,
    answer_table,
    answers,
    pair_table,
    random_frame,
)
from reports.page import write_report
from reports.results import load_runs
from tests.helpers.report_runs import add_rows, make_run

pytestmark = pytest.mark.usefixtures("without_pictures")
IMAGES = 400


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 0.3, MORE), (-0.1, 0.3, AS_MUCH), (0.0, 0.3, AS_MUCH), (-0.3, -0.1, LESS)]
)
def test_verdict_says_where_the_interval_lies(low, high, expected):
    assert verdict(low, high) == expected


def with_scores(tmp_path, shift, noise):
    """A run whose scores per image share a large image effect with those of random weights; best layer is 1."""
    run = make_run(tmp_path / "run", layers=2, final=False, random=None)
    rng = np.random.default_rng(0)
    image = rng.normal(0, 500, IMAGES)
    table, rows = {}, []
    for layer, extra in (("0", 0.0), ("1", 5.0), ("2", -20.0)):
        for control, lift in (("none", shift), ("random", 0.0)):
            scores = 300 + image + extra + lift + rng.normal(0, noise, IMAGES)
            table[ScoreKey("depth", layer, "ridge", control, "code_length", "strict")] = scores.astype(np.float32)
            rows.append((layer, "ridge", control, scores.mean(), 1.96 * scores.std() / IMAGES**0.5))
    add_rows(run, "code_length", "strict", "depth", rows, n=IMAGES)
    names = [f"{k}.jpg" for k in range(IMAGES)]
    ScoreFile(table, names, "train2017", "").write(score_file(run, "scores/code_length", "train2017"))
    return run, table


def test_difference_from_random_weights_is_paired_by_image(tmp_path):
    """Intervals of both scores overlap by far; the paired one is that of the images' differences."""
    path, table = with_scores(tmp_path, shift=4, noise=10)
    (run,) = load_runs([path])
    (answer,) = [one for one in answers([run]) if one.teacher == "depth"]
    assert answer.measure == ("code_length", "strict") and answer.difference["paired"] and answer.probe == "ridge"
    curves = {c: run.curve("depth", "ridge", c, "code_length", "strict").set_index("layer") for c in ("none", "random")}
    best = {control: curve["value"].idxmax() for control, curve in curves.items()}
    assert answer.best["layer"] == best["none"] and answer.difference["random_layer"] == best["random"]
    assert curves["none"]["ci_low"].max() < curves["random"]["ci_high"].max()
    own, random = (table[ScoreKey("depth", best[c], "ridge", c, "code_length", "strict")] for c in ("none", "random"))
    differences = (own - random).astype(float)
    half = 1.96 * differences.std(ddof=1) / IMAGES**0.5
    assert answer.difference["value"] == pytest.approx(differences.mean(), abs=1e-3)
    assert answer.difference["ci_low"] == pytest.approx(differences.mean() - half, abs=0.2 * half)
    assert answer.difference["ci_high"] == pytest.approx(differences.mean() + half, abs=0.2 * half)
    assert answer.verdict == MORE and answer.above == "3 of 3"
    by_layer = random_frame([answer]).set_index("layer")["value"]
    np.testing.assert_allclose(
        by_layer, (curves["none"]["value"] - curves["random"]["value"])[by_layer.index], rtol=1e-3
    )
    page = write_report([path], tmp_path / "report").read_text()
    assert "It is paired by image." in page and page.index("more than random weights") < page.index('id="random"')


def test_equal_scores_are_told_apart_as_seldom_as_the_level_says():
    """Of 200 pairs that differ by noise alone, 5 % are called different; four standard deviations more fail."""
    rng, key = np.random.default_rng(0), ScoreKey("depth", "1", "ridge", "none", "code_length", "strict")
    wrong = 0
    for _ in range(200):
        image = rng.normal(0, 500, IMAGES)
        own, random = (image + rng.normal(0, 10, IMAGES) for _ in range(2))
        paired = PairedScores({key: own[None], replace(key, control="random"): random[None]})
        interval, n = paired.minus_random(key, "1")
        assert n == IMAGES
        wrong += verdict(interval.low, interval.high) != AS_MUCH
    assert wrong <= 10 + 4 * (200 * 0.05 * 0.95) ** 0.5


def test_no_scores_of_images_no_pairs(tmp_path):
    assert not PairedScores.read(make_run(tmp_path / "run"), "cosine_centred").series


@pytest.mark.parametrize(
    ("random", "expected"), [(0.3, MORE), (0.605, AS_MUCH), (0.585, AS_MUCH), (0.7, LESS), (None, UNKNOWN)]
)
def test_without_scores_of_images_the_interval_is_as_wide_as_both(tmp_path, random, expected):
    """`make_run`: the ridge readout's best is 0.6 ± 0.01, and that of random weights the parameter ± 0.01."""
    (run,) = load_runs([make_run(tmp_path / "run", random=random)])
    found = answers([run])
    assert [one.verdict for one in found] == [expected] * 3 and {one.probe for one in found} == {"ridge"}
    if random is None:
        assert found[0].difference is None and "--control random" in found[0].sentence
    else:
        ends = found[0].difference[["value", "ci_low", "ci_high"]].tolist()
        assert ends == pytest.approx([0.6 - random, 0.58 - random, 0.62 - random])
        assert found[0].above == ("14 of 14" if expected == MORE else "0 of 14")
    assert f"Depth, tiny: {expected}. " in found[0].sentence and "0.600 [0.590, 0.610]" in found[0].sentence
    if expected in (MORE, UNKNOWN):
        page = write_report([run.path], tmp_path / "report").read_text()
        assert expected in page and ("Random weights were not probed" in page) == (random is None)


@pytest.mark.parametrize(
    ("state", "control", "offset", "expected"),
    [
        ("flat", "none", 0.7, "resampler"),
        ("flat", "none", 0.5, "ridge"),
        ("still falling", "none", 0.7, "ridge"),
        ("stuck at the mean", "random", 0.7, "ridge"),
        ("stuck at the mean", "shuffled", 0.7, "resampler"),
    ],
)
def test_no_resampler_answers_that_did_not_converge_or_reads_less(tmp_path, state, control, offset, expected):
    path = make_run(tmp_path / "run", layers=2)
    table = pd.read_csv(path / "results.csv", dtype={"layer": str}, keep_default_na=False)
    chosen = (table["probe"] == "resampler") & (table["control"] == "none")
    table.loc[chosen, ["value", "ci_low", "ci_high"]] += offset - 0.5
    table.to_csv(path / "results.csv", index=False)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["convergence"].append({"control": control, "teacher": "depth", "layer": "1", "seed": 0, "state": state})
    (path / "manifest.json").write_text(json.dumps(manifest))
    probes = {one.teacher: one.probe for one in answers(load_runs([path]))}
    assert probes["depth"] == expected


def test_a_score_at_the_mean_target_is_nothing(tmp_path):
    path = make_run(tmp_path / "run", layers=2, random=0.3)
    table = pd.read_csv(path / "results.csv", dtype={"layer": str}, keep_default_na=False)
    table.loc[table["probe"] != "constant", "ci_low"] = -0.01
    table.to_csv(path / "results.csv", index=False)
    assert {one.verdict for one in answers(load_runs([path]))} == {NOTHING}


def test_a_pair_is_summarised_in_the_answers_own_measure_and_probe(tmp_path):
    """Depth has a clear difference, segmentation the opposite one, generation none; other rows say the contrary."""
    paths = [make_run(tmp_path / name, name=name, layers=2) for name in ("llava", "ola")]
    found = answers(load_runs(paths))
    assert {one.probe for one in found} == {"ridge"} and found[0].measure == ("cosine_centred", "strict")
    own = {"layer": "mean", "probe": "ridge", "metric": "cosine_centred", "protocol": "strict", "variant": ""}
    contrary = [{"probe": "resampler"}, {"layer": "1"}, {"metric": "cosine"}, {"variant": "text"}]
    rows = [own | {"teacher": name, "value": x} for name, x in (("seg", -0.2), ("depth", 0.1), ("gen", 0.01))]
    rows += [own | {"teacher": "depth", "value": -0.5} | other for other in contrary]
    table = pd.DataFrame(rows).assign(checkpoint="ola", reference="llava", n=50, seeds="1, 1", higher="")
    table = pd.concat([table, table.assign(checkpoint="multi", reference="ola")])  # not from the first checkpoint
    table = table.assign(ci_low=table["value"] - 0.05, ci_high=table["value"] + 0.05)
    assert pair_table(found, table).to_dict("list") == {
        "teacher": ["Depth", "Segmentation", "Generation"],
        "probe": ["ridge readout"] * 3,
        "ola − llava": [
            "+0.100 [+0.050, +0.150]: better",
            "−0.200 [−0.250, −0.150]: worse",
            "+0.010 [−0.040, +0.060]: no clear difference",
        ],
    }
    assert pair_table(found, table[table["layer"] != "mean"]).empty and pair_table(found, table.assign(n=0)).empty


def test_erasure_and_positions_are_columns_where_they_have_rows(tmp_path):
    path = make_run(tmp_path / "run", layers=2, final=False)
    assert not {USED_BY, BITS_BY} & {*answer_table(answers(load_runs([path])))}
    rows = [(layer, "leace", "none", 0.2 + 0.1 * int(layer), 0.01) for layer in "012"]
    add_rows(path, "erased_excess", "strict", "depth", rows, variant="text")
    table = answer_table(answers(load_runs([path])))
    yes = "yes: text, layer 2, +0.400 [+0.390, +0.410] nats"
    assert dict(zip(table["teacher"], table[USED_BY], strict=True)) == {
        "Depth": yes,
        "Segmentation": "not measured",
        "Generation": "not measured",
    }
    assert BITS_BY not in table


def test_no_verdict_without_an_interval(tmp_path):
    """A Fréchet distance of few images has a value and no interval: nothing contains zero."""
    path = make_run(tmp_path / "run", layers=2)
    table = pd.read_csv(path / "results.csv", dtype={"layer": str}, keep_default_na=False)
    table.assign(ci_low="", ci_high="").to_csv(path / "results.csv", index=False)
    found = answers(load_runs([path]))
    assert {(one.verdict, one.above) for one in found} == {(NO_INTERVAL, "")}
    assert "is 0.600. The best" in found[0].sentence and "difference: +0.300." in found[0].sentence
