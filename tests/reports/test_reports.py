"""Pages and figures from synthetic results: what is drawn and said must be what the table holds."""

import json
import re

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from probing.utils.errors import UserError
from reports.answer import convergence
from reports.charts import bundle
from reports.figures import heat_map, layer_plot
from reports.page import write_report
from reports.pictures import grid_figure, read_grids
from reports.results import load_runs
from reports.tables import decoded_notes, decoded_table
from reports.theme import CEILING, LIGHT
from tests.helpers.charts import Parsed
from tests.helpers.report_runs import decode, make_run, pictures

pytestmark = pytest.mark.usefixtures("without_pictures")


def keep_one_curve(run, **names):
    """Drawing is slow, and every curve is drawn in the same way."""
    results = pd.read_csv(run / "results.csv", keep_default_na=False)
    few = results[(results["teacher"] == "seg") & (results["metric"] == "cosine_centred")]
    few.assign(**names).to_csv(run / "results.csv", index=False)


@pytest.fixture
def run(tmp_path):
    return load_runs([make_run(tmp_path / "run")])[0]


def line_of(axes, figure, name, dashed=False):
    """Points of the lines of a checkpoint in one panel."""
    colour = next(line.get_color() for line in figure.legends[0].get_lines() if line.get_label() == name)
    lines = [line for line in axes.lines if line.get_color() == colour and line.is_dashed() == dashed]
    return np.concatenate([line.get_xydata() for line in lines])


def test_panels_draw_the_tables_values_in_layer_order(run):
    figure = layer_plot([run], "cosine_centred", "strict")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:3] == [f"{t}, Perceiver resampler" for t in ("Depth", "Segmentation", "Generation")]
    lines = [line for line in figure.axes[0].lines if line.get_color() == LIGHT[0]]
    own, final = lines[0].get_xydata(), [line.get_xydata() for line in lines if len(line.get_xydata()) == 1]
    np.testing.assert_allclose(own, np.stack([np.arange(13), 0.5 - 0.01 * np.arange(13)], axis=1))
    assert all(point[0, 0] > 12 for point in final) and len(final) == 3  # of the checkpoint and two controls
    assert {round(float(point[0, 1]), 6) for point in final} == {0.37, 0.17, -0.11}
    assert figure.axes[-1].get_xticklabels()[-1].get_text() == "final"
    bands = [
        band.get_paths()[0].vertices for band in figure.axes[0].collections if len(band.get_paths()[0].vertices) > 9
    ]
    assert any(np.isclose(band[:, 1].max(), 0.51) and np.isclose(band[:, 1].min(), 0.37) for band in bands)


def test_every_line_is_in_the_legend_and_looks_different(run):
    figure = layer_plot([run], "cosine", "strict")
    entries = {line.get_label(): (line.get_color(), str(line._dash_pattern)) for line in figure.legends[0].get_lines()}
    assert list(entries) == ["tiny", "mean target", "checkpoint", "random weights", "shuffled pairs"]
    colours, dashes = (
        [entries[name][k] for name in names] for k, names in enumerate((list(entries)[:2], list(entries)[2:]))
    )
    assert len(set(colours)) == 2 and len(set(dashes)) == 3


def test_heat_map_scales_every_row_from_worst_to_best_layer(tmp_path):
    path = make_run(tmp_path / "run", layers=2, final=False)
    decode(path)
    axes = heat_map(load_runs([path])[0], "resampler").axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    rows = dict(zip(names, axes.collections[0].get_array().reshape(len(names), 3), strict=True))
    np.testing.assert_allclose(rows["Depth: centred cosine similarity"], [1, 0.5, 0])
    np.testing.assert_allclose(rows["Segmentation: mIoU, probe alone"], [0, 1, 0.2])
    np.testing.assert_allclose(rows["Generation: Fréchet distance (toy features)"], [0, 0.9, 1])  # less is better


def test_probes_that_did_not_converge_are_named(run):
    for row in run.manifest["convergence"]:
        if row["teacher"] == "seg" and row["layer"] in ("3", "final"):
            row["state"] = "still falling"
    sentence, caution = convergence(run)
    assert "A flat loss does not prove convergence" in caution
    assert "2 of 42 probes of the checkpoint were still falling" in sentence and "seg 3, final" in sentence


def test_a_hostile_name_is_only_text(tmp_path):
    make_run(tmp_path / "run", name="<script>alert(1)</script>")
    page = write_report([tmp_path / "run"], tmp_path / "report").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;" in page


def test_runs_of_one_checkpoint_have_different_labels(tmp_path):
    runs = load_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b")])
    assert [run.label for run in runs] == ["a", "b"]
    write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report")
    assert set(pd.read_csv(tmp_path / "report" / "results.csv")["checkpoint"]) == {"a", "b"}


def test_pooled_seeds_are_drawn_where_there_are_several(tmp_path):
    path = make_run(tmp_path / "run")
    table = pd.read_csv(path / "results.csv", dtype=str, keep_default_na=False)
    pooled = table.assign(seed="all", value="0.123")
    pd.concat([table, table.assign(seed="1"), pooled]).to_csv(path / "results.csv", index=False)
    (run,) = load_runs([path])
    curve = run.curve("depth", "resampler", "none", "cosine", "strict")
    assert len(curve) == 14 and set(curve["value"].astype(float)) == {0.123}


def test_folders_without_results_say_what_to_type(tmp_path):
    with pytest.raises(UserError, match="probing train"):
        load_runs([tmp_path])
    path = make_run(tmp_path / "run")
    (path / "results.csv").unlink()
    with pytest.raises(UserError, match="probing evaluate"):
        load_runs([path])


def test_decoded_metric_has_floor_and_ceiling(tmp_path):
    run = make_run(tmp_path / "run", layers=2, final=False)
    decode(run)
    page = write_report([run], tmp_path / "report").read_text()
    assert "<summary>mIoU, probe alone</summary>" in page
    shown = [chart["rows"] for chart in Parsed(page).charts()]
    ceilings = [rows[rows["checkpoint"] == CEILING] for rows in shown]
    assert sum(len(rows) > 0 for rows in ceilings) == 2  # each metric belongs to one teacher only
    assert all((rows["value"] == 0.52).all() for rows in ceilings)
    (loaded,) = load_runs([run])
    assert loaded.teachers_of("miou", "blind") == ["seg"]
    figure = layer_plot([loaded], "miou", "blind")
    for name, level in (("mean target", 0.08), ("teacher's feature", 0.52)):
        np.testing.assert_allclose(line_of(figure.axes[0], figure, name)[:, 1], [level] * 3)
    np.testing.assert_array_equal(line_of(figure.axes[0], figure, "tiny")[:, 0], [0, 1, 2])  # the mean is no layer


def test_table_8_has_mean_and_best_layer(tmp_path):
    run = make_run(tmp_path / "run", layers=2, final=False)
    decode(run)
    (loaded,) = load_runs([run])
    frame = decoded_table([loaded])
    assert list(frame.columns) == ["Fréchet distance (toy features) ↓", "mIoU, probe alone ↑"]
    best = frame.loc["tiny · Perceiver resampler, best layer"]
    assert list(best) == ["20.0 [20.0, 20.0] · layer 2", "0.450 [0.440, 0.460] · layer 1"]
    assert frame.loc["tiny · Perceiver resampler, mean over layers"].iloc[1] == "0.430 [0.420, 0.440]"
    assert frame.loc["floor: mean target"].iloc[1].startswith("0.080")
    assert frame.index[-1].startswith("ceiling") and not frame.index.str.contains("ridge").any()
    assert any("50 images" in note and "biased" in note for note in decoded_notes([loaded]))
    write_report([run], tmp_path / "report")
    assert (tmp_path / "report" / "table8.csv").read_text().count("\n") == len(frame) + 1
    assert decoded_table(load_runs([make_run(tmp_path / "other")])).empty


def test_grids_have_a_row_per_layer(tmp_path):
    run = make_run(tmp_path / "run", layers=2)
    pictures(run, "depth", (16, 16), np.float16, ["10", "0", "final", "2"])
    pictures(run, "seg", (16, 16), np.uint8, map(str, range(33)))
    pictures(run, "gen", (16, 16, 3), np.uint8, ["0"])
    (run / "pictures" / "classes.json").write_text(json.dumps(["cat", "dog", "<tree>"]))
    keep_one_curve(run)
    depth, seg, gen = read_grids(run)
    assert list(depth.layers) == ["0", "2", "10", "final"] and list(gen.layers) == ["0"]
    assert list(seg.layers) == [str(layer) for layer in range(33)]
    rows = [axes.get_ylabel() for axes in grid_figure(seg).axes if axes.get_ylabel()]
    assert len(rows) == 2 + 12 and rows[2] == "layer 0" and rows[-1] == "layer 32"  # as a file; the page has them all
    figure = grid_figure(depth)
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert labels == ["photograph", "teacher", "layer 0", "layer 2", "layer 10", "final"]
    drawn = figure.axes[2 * 2 + 1].images[0]  # layer 0, second column, on the teacher's scale
    low, high = depth.teacher_pictures[1].min(), depth.teacher_pictures[1].max()
    scaled = ((depth.layers["0"][1].astype(np.float32) - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(drawn.get_array() / 255, mpl.colormaps["magma"](scaled)[..., :3], atol=0.02)
    texts = [text.get_text() for text in grid_figure(seg).legends[0].get_texts()]
    assert texts == ["cat", "dog", "<tree>", "class 3", "class 4"]
    page = write_report([run], tmp_path / "report", style="screen").read_text()
    assert page.count("data:image/webp;base64,") == 3 * 2 + 4 + 33 + 1
    assert {f.name for f in (tmp_path / "report" / "figures").glob("grid_*")} == {
        f"grid_{teacher}_resampler.png" for teacher in ("depth", "seg", "gen")
    }


def test_names_are_text_wherever_they_come_from(tmp_path):
    """Of checkpoints, files, classes, teachers and prompts: neither markup nor formulas."""
    name = 'x"><script>alert(1)</script>$\\frac{$ &amp; --> 1.5'
    run = make_run(tmp_path / "run", name=name, layers=1)
    other = make_run(tmp_path / "other", name=name.replace("1.5", "1.6"), layers=1)
    for path in (run, other):
        keep_one_curve(path)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["skipped"] = [{"image": f"{name}.jpg", "split": name, "reason": name}]
    manifest |= {"prompt": name, "versions": {name: name}}
    manifest["checkpoint"] |= {"path": name, "family": name, "sha256": name}
    manifest["data"] |= {"path": name, "view": name}
    for teacher in manifest["teachers"].values():
        teacher |= {"id": name, "class": name, "licence": name}
    (run / "manifest.json").write_text(json.dumps(manifest))
    pictures(run, "seg", (16, 16), np.uint8, ["0"])
    (run / "pictures" / "classes.json").write_text(json.dumps([name] * 5))
    page = write_report([run, other], tmp_path / "report", style="screen").read_text()
    folder = tmp_path / "report" / "figures"
    assert all(
        (folder / f"layers_cosine_centred_strict.{kind}").stat().st_size > 1000 for kind in ("png", "svg", "pdf")
    )
    figures = [file.read_text() for file in folder.glob("*.svg")]
    assert page.count("alert(1)") > 10 and figures and page.count("<script>") == 3  # its own
    for text in (page.replace(bundle(), ""), *figures):
        assert "<script>alert" not in text and "1)</script" not in text
        assert text.count("-->") == text.count("<!--")
    assert not any("<script" in figure for figure in figures)
    learning = sorted(file.name for file in (tmp_path / "report" / "figures").glob("learning*.png"))
    assert len(learning) == 2 and all(re.fullmatch(r"[\w.-]+", file) for file in learning)


def test_what_a_table_calls_a_metric_is_no_path(tmp_path):
    run = make_run(tmp_path / "run", layers=1)
    keep_one_curve(run, metric="frechet_../../../../outside", protocol="../../strict")
    write_report([run], tmp_path / "a" / "report", style="screen")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "run"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["report"]
    assert not any(path.is_dir() for path in (tmp_path / "a" / "report" / "figures").iterdir())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.csv", "", r"results\.csv cannot be read .*; remove it and evaluate again"),
        ("results.csv", "teacher,layer\n1,2\n", "no column checkpoint"),
        ("results.csv", '"', r"results\.csv cannot be read"),
        ("learning_curves.csv", "", r"learning_curves\.csv cannot be read"),
        ("manifest.json", "{", r"manifest\.json cannot be read"),
        ("manifest.json", "[" * 100_000, r"manifest\.json cannot be read"),
        ("manifest.json", "[]", r"manifest\.json cannot be read"),
    ],
)
def test_files_of_a_run_that_are_broken(tmp_path, name, text, message):
    run = make_run(tmp_path / "run", layers=1)
    (run / name).write_text(text)
    with pytest.raises(UserError, match=message):
        write_report([run], tmp_path / "report")


def test_pictures_that_are_broken(tmp_path):
    run = make_run(tmp_path / "run", layers=1)
    pictures(run, "gen", (16, 16, 3), np.uint8, ["0"])
    file = run / "pictures" / "gen-val2017.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"gen-val2017\.safetensors cannot be read"):
        read_grids(run)
