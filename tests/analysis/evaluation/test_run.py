"""Decoded metrics, on the shipped toy models and a small world."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from analysis.evaluation import forward_pass
from analysis.evaluation.metrics.segmentation import class_counts, mean_iou
from analysis.evaluation.options import Options
from analysis.evaluation.registry import metrics
from analysis.evaluation.run import evaluate
from analysis.evaluation.scores import ScoreFile, score_file
from probing.data.coco import list_images
from probing.data.input_substitutes import caption_inputs
from probing.models import load_backbone
from probing.probes.bank import ProbeBank
from probing.recipe import TeacherRecipe
from probing.runs.directory import Run
from probing.teachers import depth, load_teacher
from probing.toyworld.demo import demo_recipe
from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS
from probing.training.run import train
from probing.utils.errors import UserError
from probing.utils.interrupt import Interrupted, Interruption


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A short run on a small world, with decoded metrics, and its results."""
    folder = tmp_path_factory.mktemp("decoded")
    world = write_world(folder / "world", 24, 8, seed=4)
    recipe = demo_recipe(ASSETS, world).model_copy(update={"layers": "0,6", "controls": ["shuffled"]})
    recipe.fit.epochs = 1
    run = train(recipe, folder / "run")
    min((world / "annotations" / "panoptic_val2017").iterdir()).unlink()
    evaluate(run.path, decoded(world))
    return run.path, world, pd.read_csv(run.path / "results.csv", dtype={"layer": str}, keep_default_na=False)


def decoded(world, *metrics, **values):
    """Everything that needs no generated image, in few pictures."""
    metrics = metrics or ("cosine", "da2k", "miou")
    return Options(metrics=metrics, **{"da2k": world / "da2k", "pictures": 2} | values)


def rows(results, metric, **values):
    chosen = results[results["metric"] == metric]
    for name, value in values.items():
        chosen = chosen[chosen[name] == value]
    return chosen


def test_every_number_is_there_once(evaluated):
    _, _, results = evaluated
    place = ["teacher", "layer", "probe", "control", "metric", "protocol", "seed"]
    assert not results.duplicated(place).any()
    for metric, protocols in (("da2k", ["strict"]), ("miou", ["blind", "strict", "paper"])):
        for protocol in protocols:
            found = rows(results, metric, protocol=protocol)
            assert len(rows(found, metric, probe="resampler", control="none")) == 3  # 0, 6, mean
            assert len(rows(found, metric, probe="ridge", control="none")) == 3
            assert len(rows(found, metric, probe="constant")) == len(rows(found, metric, probe="target")) == 1
            assert (found["ci_low"] <= found["value"]).all() and (found["value"] <= found["ci_high"]).all()


def test_the_teachers_own_feature_scores_what_the_teacher_scores(evaluated):
    """The target grid is the last stage's own here, so that nothing is lost on the way."""
    _, _, results = evaluated
    target, teacher = (rows(results, "miou", protocol="strict", probe=p)["value"].item() for p in ("target", "teacher"))
    assert target == teacher > rows(results, "miou", protocol="strict", probe="constant")["value"].item()


def test_depth_pairs_by_brute_force(evaluated):
    run, world, results = evaluated
    teacher = load_teacher("depth", TeacherRecipe(id=str(ASSETS / "depth")), torch.device("cpu"))
    entries = json.loads((world / "da2k" / "annotations.json").read_text())
    right, count = 0.0, 0
    for name, pairs in entries.items():
        with Image.open(world / "da2k" / name) as image:
            pixels = teacher.prepare([image.convert("RGB")])
            size = (image.height, image.width)
        one = depth.decode(teacher, teacher.target(pixels))
        plane = F.interpolate(one[:, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        for pair in pairs:
            a, b = (float(plane[tuple(pair[p])]) for p in ("point1", "point2"))
            right += 0.5 if a == b else float((a > b) == (pair["closer_point"] == "point1"))
            count += 1
    assert rows(results, "da2k", probe="target")["value"].item() == pytest.approx(right / count, abs=1e-6)
    found = ScoreFile.read(score_file(run, "scores/da2k", "da2k"))
    assert found.names == list(entries) and all(scores[:, 1].sum() == count for scores in found.table.values())
    higher = [
        (pair["closer_point"] == "point1") == (pair["point1"][0] > pair["point2"][0])
        for pairs in entries.values()
        for pair in pairs
    ]
    assert rows(results, "da2k", probe="image_row")["value"].item() == pytest.approx(sum(higher) / count)


def test_an_image_without_panoptic_png_is_left_out_and_named(evaluated):
    run, world, results = evaluated
    assert set(rows(results, "miou")["n"]) == {7} and set(rows(results, "cosine")["n"]) == {8}
    skipped = json.loads((run / "manifest.json").read_text())["skipped"]
    first = min(path.name for path in (world / "val2017").iterdir())
    assert [(s["image"], s["reason"]) for s in skipped] == [(first, "no panoptic PNG")]


def test_blind_decoding_of_the_mean_is_the_same_for_every_image(evaluated):
    run, _, _ = evaluated
    table = ScoreFile.read(score_file(run, "scores/miou", "val2017")).table
    found = {c.protocol: scores for c, scores in table.items() if c.probe == "constant"}
    predicted = {p: found[p].reshape(7, 3, -1)[:, 2] for p in ("blind", "strict")}
    assert (predicted["blind"] == predicted["blind"][0]).all()  # the same pixels per class in every image
    assert not (predicted["strict"] == predicted["strict"][0]).all()


def test_what_a_metric_needs_and_does_not_find(evaluated, tmp_path):
    run, world, _ = evaluated
    for options, message in (
        (Options(metrics=("da2k",)), "needs --da2k DIR"),
        (decoded(world, "da2k", protocols=("paper",)), "no requested metric has the protocol 'paper': da2k has strict"),
        (Options(metrics=("frechet",)), "needs --extractor DIR"),
        (Options(layers="0,3"), "no layer '3'; it has 0, 6"),
        (Options(controls=("random",)), "no control 'random'; it has none, shuffled"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(run, options)
    broken = tmp_path / "da2k"
    shutil.copytree(world / "da2k", broken)
    file = broken / "annotations.json"
    entries = json.loads(file.read_text())
    name = next(iter(entries))
    entries[name][0]["point1"] = [48, 0]
    file.write_text(json.dumps({name: entries[name][:1]}))
    with pytest.raises(UserError, match="1 pairs outside its 48 x 48 pixels, and so have all"):
        evaluate(run, decoded(world, "da2k", da2k=broken))
    file.write_text(json.dumps({"images/other.jpg": entries[name]}))
    with pytest.raises(UserError, match="none of the 1 images"):
        evaluate(run, decoded(world, "da2k", da2k=broken))
    before = (run / "results.csv").read_bytes()
    panoptic = world / "annotations" / "panoptic_val2017.json"
    whole = panoptic.read_text()
    classes = json.loads(whole)["categories"]
    doubled = classes + [c | {"id": c["id"] + 50} for c in classes]
    try:
        panoptic.write_text(json.dumps(json.loads(whole) | {"categories": doubled}))
        with pytest.raises(UserError, match="18 classes and the seg teacher 9"):
            evaluate(run, decoded(world, "miou"))
    finally:
        panoptic.write_text(whole)
    assert (run / "results.csv").read_bytes() == before


def test_a_broken_label_map_costs_one_image(evaluated, tmp_path):
    run, world, _ = evaluated
    copy, data = tmp_path / "run", tmp_path / "world"
    shutil.copytree(run, copy)
    shutil.copytree(world, data)
    last = max((data / "annotations" / "panoptic_val2017").iterdir())
    last.write_bytes(b"no picture")
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(world), str(data)))
    for file in (copy / "scores").glob("miou*"):
        file.unlink()
    results = pd.read_csv(evaluate(copy, Options(metrics=("miou",), protocols=("strict",), pictures=0)))
    assert set(rows(results, "miou")["n"]) == {6}
    skipped = {s["image"]: s["reason"] for s in json.loads((copy / "manifest.json").read_text())["skipped"]}
    assert skipped[last.name].startswith("corrupt")


def test_a_missing_image_is_counted(evaluated, tmp_path):
    run, world, _ = evaluated
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.copytree(world / "da2k", tmp_path / "da2k")
    first, second = list(json.loads((world / "da2k" / "annotations.json").read_text()))[:2]
    (tmp_path / "da2k" / first).unlink()
    (tmp_path / "da2k" / second).write_bytes(b"no image")
    evaluate(copy, decoded(world, "da2k", da2k=tmp_path / "da2k"))
    skipped = {s["image"]: s["reason"] for s in json.loads((copy / "manifest.json").read_text())["skipped"]}
    assert skipped[first] == "missing" and skipped[second].startswith("corrupt")
    found = ScoreFile.read(score_file(copy, "scores/da2k", "da2k"))
    assert first not in found.names and second not in found.names
    assert {len(scores) for scores in found.table.values()} == {len(found.names)} and len(found.names) > 2


def test_saved_matrix_of_a_layer_gives_its_mean_iou(evaluated):
    run, _, results = evaluated
    found = ScoreFile.read(score_file(run, "scores/miou", "val2017"))
    curves = [c for c in found.sums if c.protocol != "paper" and c.probe == "ridge"]
    assert len(curves) == 4
    for curve in curves:
        matrix = torch.from_numpy(found.sums[curve])
        again = mean_iou(class_counts(matrix).numpy())
        row = rows(results, "miou", layer=curve.layer, probe="ridge", protocol=curve.protocol)
        assert row["value"].item() == pytest.approx(float(again), rel=1e-6)


def test_the_mean_over_layers_is_that_of_the_blocks(evaluated):
    """Layers 0 and 6 were probed; 0 is the projector's output and no block."""
    _, _, results = evaluated
    for metric, protocol in (("cosine", "strict"), ("miou", "blind")):
        chosen = rows(results, metric, protocol=protocol, probe="resampler", control="none")
        for name in ("value", "ci_low", "ci_high"):
            assert list(chosen[chosen["layer"] == "mean"][name]) == list(chosen[chosen["layer"] == "6"][name])


def test_scores_are_reused_and_a_layer_can_be_added(evaluated, tmp_path, caplog):
    run, world, _ = evaluated
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    expected = (copy / "results.csv").read_text()
    file = score_file(copy, "scores/miou", "val2017")
    before = file.stat().st_mtime_ns
    caplog.set_level("INFO")
    evaluate(copy, decoded(world))
    assert file.stat().st_mtime_ns == before and "exists; remove it" in caplog.text
    shutil.rmtree(copy / "scores")
    evaluate(copy, decoded(world, layers="6"))
    part = pd.read_csv(copy / "results.csv", dtype={"layer": str}, keep_default_na=False)
    assert set(part["layer"]) == {"", "6", "mean"}
    evaluate(copy, decoded(world, layers="0"))
    assert (copy / "results.csv").read_text() == expected


def test_a_pass_that_was_stopped_resumes_to_the_same_numbers(evaluated, tmp_path, monkeypatch):
    run, world, _ = evaluated
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "results.csv").unlink()
    shutil.rmtree(copy / "scores")
    options = decoded(world, "miou", "cosine", micro_batch=4)

    class Stop(Interruption):
        requested = property(lambda self: True, lambda self, value: None)

    stops = 0
    with monkeypatch.context() as patch:
        patch.setattr(forward_pass, "Interruption", Stop)
        for _ in range(20):
            try:
                evaluate(copy, options)
                break
            except Interrupted:
                stops += 1
                assert (copy / "state" / "evaluate").exists() and not (copy / "results.csv").exists()
    assert stops == 4  # after every batch, of two metrics with two batches each
    assert not list((copy / "state" / "evaluate").iterdir())
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    shutil.rmtree(whole / "scores")
    evaluate(whole, options)
    assert (copy / "results.csv").read_text() == (whole / "results.csv").read_text()


def test_an_image_that_a_control_lacks_counts_for_the_others(evaluated, tmp_path):
    """One image has no caption; another is corrupt, so that the one before it has no other image."""
    run, world, _ = evaluated
    copy, data = tmp_path / "run", tmp_path / "world"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("scores", "results.csv"))
    shutil.copytree(world, data)
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(world), str(data)))
    names = list_images(data, "val2017").names
    corrupt = data / "val2017" / names[5]
    corrupt.write_bytes(bytes(corrupt.stat().st_size))  # of the same size, so that the images are the run's
    file = data / "annotations" / "captions_val2017.json"
    captions = json.loads(file.read_text())
    first = next(image["id"] for image in captions["images"] if image["file_name"] == names[1])
    captions["annotations"] = [entry for entry in captions["annotations"] if entry["image_id"] != first]
    file.write_text(json.dumps(captions))
    alone = pd.read_csv(evaluate(copy, Options(layers="6")), keep_default_na=False)
    options = Options(layers="6", controls=("other", "caption", "none"))
    results = pd.read_csv(evaluate(copy, options), keep_default_na=False)
    place = ["teacher", "layer", "probe", "control", "metric", "protocol", "seed"]
    both = results.merge(alone, on=place, suffixes=("", "_alone"))
    assert len(both) == len(alone) and (both["value"] == both["value_alone"]).all()
    numbers = {control: set(part["n"]) for control, part in results.groupby("control")}
    assert numbers == {"none": {7}, "mean": {7}, "shuffled": {7}, "other": {6}, "caption": {6}}
    scores = ScoreFile.read(score_file(copy, "scores/cosine", "val2017"))
    assert scores.names == [name for name in names if name != names[5]]
    missing = {key.control: np.flatnonzero(np.isnan(values)).tolist() for key, values in scores.table.items()}
    assert missing["other"] == [4] and missing["caption"] == [1] and missing["none"] == []
    skipped = {row["image"]: row["reason"] for row in json.loads((copy / "manifest.json").read_text())["skipped"]}
    assert skipped[names[1]].endswith("no caption (caption)") and skipped[names[4]].endswith("(other)")
    before = score_file(copy, "scores/cosine", "val2017").stat().st_mtime_ns
    evaluate(copy, options)
    assert score_file(copy, "scores/cosine", "val2017").stat().st_mtime_ns == before


def test_what_is_shown_in_place_of_the_image(evaluated):
    """The same probes, the same targets, another input: against probes run by hand on that input."""
    run, world, before = evaluated
    evaluate(run, Options(layers="6", controls=("blank", "other", "caption"), micro_batch=3))
    results = pd.read_csv(run / "results.csv", dtype={"layer": str}, keep_default_na=False)
    assert len(results) > len(before)
    images = list_images(world, "val2017")
    pictures = [images.read(index) for index in range(len(images))]
    backbone = load_backbone(Run.open(run).recipe.backbone, torch.device("cpu"))
    bank = ProbeBank.load(run / "probes", torch.device("cpu"), ["depth"], "6")
    (probe,) = [probe for key, probe in bank.probes.items() if key.layer == 6]
    teacher = load_teacher("depth", TeacherRecipe(id=str(ASSETS / "depth")), torch.device("cpu"))
    target = teacher.target(teacher.prepare(pictures))
    grey = Image.new("RGB", (48, 48), (128, 128, 128))
    for control, instead in {"blank": [grey] * len(pictures), "other": pictures[1:] + pictures[:1]}.items():
        states, _ = backbone.hidden_states(instead, "6")
        with torch.no_grad():
            own = F.cosine_similarity(probe(states[6]), target, dim=-1).mean()
        found = rows(results, "cosine", protocol="strict", control=control, layer="6")
        depth_row = rows(found, "cosine", probe="resampler", teacher="depth")
        assert depth_row["value"].item() == pytest.approx(float(own), abs=1e-5)
        assert len(rows(found, "cosine", probe="ridge")) == 3
    captions = json.loads((world / "annotations" / "captions_val2017.json").read_text())
    name = {image["id"]: image["file_name"] for image in captions["images"]}
    caption = next(e["caption"] for e in captions["annotations"] if name[e["image_id"]] == images.names[0])
    inputs = caption_inputs(backbone.prepare, Run.open(run).recipe.backbone)
    batch = inputs([caption, "a"])
    text = backbone.prepare.processor.tokenizer.decode(batch.inputs["input_ids"][0])
    assert caption in text and "<image>" not in text and not batch.tokens.mask("image").any()
    assert batch.tokens.mask("padding")[1].any()
    curves = rows(results, "cosine", control="caption", protocol="strict", layer="6")
    assert set(curves["probe"]) == {"resampler"} and len(curves) == 3
    (world / "annotations" / "captions_val2017.json").unlink()
    with pytest.raises(UserError, match="put COCO's captions of val2017 there"):
        evaluate(run, Options(layers="0", controls=("caption",)))


def test_a_protocol_is_for_the_metrics_that_have_it():
    known = metrics()
    assert known["miou"].select_protocols(["blind"]) == ["blind"]
    assert known["da2k"].select_protocols(["blind"]) == ["strict"]
    assert known["cosine"].select_protocols(["paper", "blind"]) == ["paper"]
    assert len(known["miou"].select_protocols([])) == 3
