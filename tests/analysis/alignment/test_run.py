"""`probing align` on a tiny LLaVA over a tiny world: numbers against plain loops, the page, faults."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from transformers import AutoModelForImageTextToText

from analysis.alignment.context import Annotator
from analysis.alignment.headlines import HEADLINE_METRICS
from analysis.alignment.metrics.pooled_similarity import take_pooled
from analysis.alignment.metrics.similarity import linear_cka
from analysis.alignment.metrics.sparse_codes import pursue
from analysis.alignment.metrics.spectrum import von_neumann_entropy
from analysis.alignment.run import AlignRecipe, align
from analysis.evaluation.compare import compare, statements
from analysis.evaluation.forward_pass import ScoreAccumulator
from analysis.evaluation.scores import POOLED, ScoreKey, read_if_fits
from analysis.planning.alignment import plan_alignment
from probing.cli import cli
from probing.data.coco import list_images
from probing.data.panoptic import read_panoptic
from probing.data.patch_labels import patch_labels, plain_name
from probing.models import load_backbone
from probing.models.word_embeddings import word_ids, word_vectors
from probing.recipe import dump_recipe
from probing.runs.directory import Run
from probing.teachers import load_teacher
from probing.toyworld.layout import write_world
from probing.utils.errors import UserError
from probing.utils.images import square
from reports.page import write_report
from reports.results import load_runs
from reports.tables import difference_table, headline_rows
from tests.analysis.alignment.metrics.test_similarity import neighbour_overlap
from tests.helpers import tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("align") / "world", 2, 6, seed=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.llava(tmp_path_factory.mktemp("align") / "llava", layers=3, hidden=32, image=48)


def recipe(checkpoint, world, **values):
    backbone, data = {"checkpoint": str(checkpoint)}, {"path": f"coco:{world}"} | values.pop("data", {})
    return AlignRecipe.model_validate({"backbone": backbone, "data": data, "workers": 0, **values})


def read(path):
    return pd.read_csv(path, dtype={"layer": str}, keep_default_na=False)


def test_command_gives_numbers_of_plain_loops(checkpoint, world, tmp_path):
    """Patch by patch, with labels counted from pixels."""
    out = tmp_path / "run"
    arguments = ["align", str(checkpoint), "--data", f"coco:{world}", "--out", str(out), "micro_batch=4", "workers=0"]
    said = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert f"next: probing report {out}" in said.output
    results = read(out / "results.csv")
    maps, images = read_panoptic(world, "val2017"), list_images(world, "val2017")
    settings = recipe(checkpoint, world)
    backbone = load_backbone(settings.backbone, torch.device("cpu"))
    tokenizer, table = backbone.prepare.processor.tokenizer, backbone.words.weight.detach()
    words = []
    for name in maps.names:
        ids = [i for i in tokenizer(f"a {name}", add_special_tokens=False).input_ids if tokenizer.decode([i]).strip()]
        words.append(table[ids[len(tokenizer("a", add_special_tokens=False).input_ids) :]].mean(0))
    words = torch.stack(words)
    cosines, right, entropies, tower = [], [], [], []
    for index in range(len(images)):
        labels = maps.labels(images.names[index])
        side = len(labels) // 6
        states, tokens = backbone.hidden_states([images.read(index)], "2")
        patches = tokens.image_states(states[2])[0]
        entropies.append(float(von_neumann_entropy(patches)))
        for number, patch in enumerate(patches):
            row, column = divmod(number, 6)
            part = labels[row * side : (row + 1) * side, column * side : (column + 1) * side]
            kind, counts = np.unique(part, return_counts=True)
            if counts.max() / part.size >= 0.5 and kind[counts.argmax()] < len(words):
                near = F.cosine_similarity(patch[None], words)
                cosines.append(float(near[kind[counts.argmax()]]))
                right.append(int(near.argmax()) == kind[counts.argmax()])
        pixels = backbone.prepare([images.read(index)]).inputs["pixel_values"]
        features = backbone.core.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        tower.append(float(von_neumann_entropy(features)))

    def value(metric, layer, control="none", **rest):
        chosen = results[(results["metric"] == metric) & (results["layer"] == layer) & (results["control"] == control)]
        for name, wanted in rest.items():
            chosen = chosen[chosen[name] == wanted]
        return chosen["value"].item()

    assert value("word_cosine", "2", variant="raw") == pytest.approx(np.mean(cosines), abs=1e-5)
    assert value("word_retrieval", "2", variant="raw") == pytest.approx(np.mean(right), abs=1e-6)
    assert value("von_neumann_entropy", "2") == pytest.approx(np.mean(entropies), abs=1e-5)
    assert value("von_neumann_entropy", "tower") == pytest.approx(np.mean(tower), abs=1e-5)
    assert set(results["control"]) == {"none", "permuted", "random", "uniform"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["data"]["labelled_patches"] == len(cosines)


def test_expensive_measures_equal_plain_loops(checkpoint, models, tmp_path):
    """Lens, attention, sums of words and similarity, from the model's own logits and attention."""
    world = write_world(tmp_path / "world", 2, 16, seed=5)
    settings = recipe(
        checkpoint,
        world,
        layers="0,2,3,final",
        micro_batch=4,
        sample=5,
        teachers={name: {"id": str(models[name])} for name in ("depth", "gen")},
    )
    results = read(align(settings, tmp_path / "run"))
    backbone = load_backbone(settings.backbone, torch.device("cpu"))
    images = list_images(world, "val2017")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager").eval()
    teachers = {name: load_teacher(name, settings.teachers[name], torch.device("cpu")) for name in settings.teachers}
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    pooled = {name: [] for name in ("2", "tower", "depth", "gen")}
    lens, energy, attention, uniform, places, right = [], [], [], [], [], []
    annotate = Annotator(read_panoptic(world, "val2017"), (6, 6))
    ids = [word_ids(backbone.prepare.processor.tokenizer, word) for word in annotate.words]
    for index in range(16):
        image = square(images.read(index))
        batch = backbone.prepare([image])
        with torch.no_grad():
            out = model(**batch.inputs, output_hidden_states=True, output_attentions=True)
        shown = batch.tokens.mask("image")[0]
        states = out.hidden_states[2][0, shown]
        pooled["2"].append(states.mean(0))
        tower = model.model.vision_tower(batch.inputs["pixel_values"], output_hidden_states=True)
        pooled["tower"].append(tower.hidden_states[-2][0, 1:].mean(0))
        targets = {name: teacher.target(teacher.prepare([image]))[0] for name, teacher in teachers.items()}
        for name, target in targets.items():
            pooled[name].append(target.mean(0))
        logits = model.lm_head(model.model.language_model.norm(states))
        likeliest = torch.stack([logits[:, own].amax(dim=1) for own in ids], dim=1).argmax(dim=1).numpy()
        labels = patch_labels(annotate(images.names[index]).numpy())
        right += (likeliest == labels)[labels >= 0].tolist()
        attention.append(float(out.attentions[1][0, :, -1, shown].sum(-1).mean()))
        uniform.append(int(shown.sum()) / len(shown))
        if index < 5:
            chances = model.lm_head(model.model.language_model.norm(states[order[:32]])).softmax(-1)
            lens.append(float(-(chances * chances.log()).sum(-1).mean().detach()))
            found = pursue(states[order[:2]].detach(), backbone.words.weight.detach(), 4)
            energy.append(float(found.energy[:, -1].mean()))
            grid = teachers["depth"].grid
            plane = F.interpolate(states.T.view(1, -1, 6, 6), size=grid, mode="bilinear").flatten(2)[0].T
            places.append(linear_cka(plane.detach(), targets["depth"]))
    pooled = {name: torch.stack(rows).detach() for name, rows in pooled.items()}

    def value(teacher, metric, variant="", control="none"):
        own = (results["layer"] == "2") & (results["teacher"] == teacher) & (results["control"] == control)
        own &= (results["metric"] == metric) & (results["variant"] == variant)
        return results[own]["value"].item()

    assert value("words", "lens_entropy", "final norm") == pytest.approx(np.mean(lens), abs=1e-5)
    assert value("words", "lens_retrieval", "final norm") == pytest.approx(np.mean(right), abs=1e-6)
    assert value("words", "explained_energy_4", "orthogonal") == pytest.approx(np.mean(energy), abs=1e-5)
    assert value("tokens", "image_attention", "last token") == pytest.approx(np.mean(attention), abs=1e-5)
    assert value("tokens", "image_attention", "last token", "uniform") == pytest.approx(np.mean(uniform), abs=1e-6)
    assert value("depth", "cka_places") == pytest.approx(np.mean(places), abs=1e-5)
    assert results.query("metric == 'mutual_knn'")["chance"].astype(float).to_numpy() == pytest.approx(4 / 15, abs=1e-6)
    for name in ("tower", "depth", "gen"):
        assert value(name, "cka") == pytest.approx(linear_cka(pooled["2"], pooled[name]), abs=1e-4)
        overlap = float(neighbour_overlap(pooled["2"], pooled[name], 4).mean())
        assert value(name, "mutual_knn", "k=4") == pytest.approx(overlap, abs=0.02)
    assert set(results[results["metric"] == "lens_entropy"].query("layer == 'final'")["variant"]) == {"final norm"}
    both = results[(results["metric"] == "lens_retrieval") & (results["variant"] == "final norm")]
    both = both[both["control"] == "none"].set_index("layer")["value"]
    assert both["3"] == both["final"]  # the state after the last block, normed, is the final state


def test_page_shows_alignment_and_second_call_reuses_scores(checkpoint, world, tmp_path, monkeypatch):
    settings = recipe(checkpoint, world, layers="0,3", pictures=1)
    results = align(settings, tmp_path / "run")
    before = results.read_text()
    monkeypatch.setattr("analysis.alignment.run.gather", None)
    assert align(settings, tmp_path / "run").read_text() == before
    draw = "matplotlib.figure.Figure.savefig"  # takes long
    monkeypatch.setattr(draw, lambda figure, file, **options: Image.new("RGB", (8, 8)).save(file, "png"))
    page = write_report([tmp_path / "run"], tmp_path / "report", style="paper").read_text()
    assert "Patches and words" in page and "Nearest word of each patch, layer 3" in page
    assert (tmp_path / "report" / "figures" / "word_retrieval_centred.svg").exists()
    with pytest.raises(UserError, match="has no probes to compare"):
        load_runs([tmp_path / "run"])
    with pytest.raises(UserError, match="has no probes; its page: probing report"):
        Run.open(tmp_path / "run")
    with pytest.raises(UserError, match="holds another run"):
        align(recipe(checkpoint, world, layers="0", pictures=1), tmp_path / "run")


def test_runs_of_seeds_are_pooled_and_compared(world, tmp_path):
    """Two checkpoints of two seeds each."""
    folders = [tmp_path / name for name in ("one", "two")]
    for number, folder in enumerate(folders):
        for seed in (0, 1):
            model = tiny.llava(tmp_path / "models" / f"{folder.name}{seed}", image=48, seed=seed + 2 * number)
            align(recipe(model, world, layers="0,3", pictures=0, sample=3), folder / f"seed_{seed}")
        pooled = CliRunner().invoke(cli, ["evaluate", str(folder)], catch_exceptions=False)
        assert pooled.exit_code == 0
    table = compare(folders, ["one", "two"])
    sentences = statements(table, HEADLINE_METRICS)
    assert any("word_retrieval (centred), layer 0: two - one = " in s and "2 pairs of seeds" in s for s in sentences)
    values = "metric == 'word_miou' and variant == 'raw'"
    found = table.query(values).set_index("layer")["value"]
    one, two, *seeds = (
        read(path / "results.csv").query(f"{values} and control == 'none'").set_index("layer")["value"]
        for path in (*folders, folders[1] / "seed_0", folders[1] / "seed_1")
    )
    assert two["3"] == pytest.approx(np.mean([seed["3"] for seed in seeds]), abs=1e-6)
    for layer in ("0", "3", "mean"):
        assert found[layer] == pytest.approx(two[layer] - one[layer], abs=1e-6)
    permuted = read(folders[1] / "results.csv").query("control == 'permuted' and metric == 'word_miou'")
    assert set(permuted["seed"]) == {"all"}
    shown = difference_table(headline_rows(table)).to_csv()
    clear = table.query("(ci_low > 0 or ci_high < 0) and layer in ('0', 'mean') and metric == 'word_cosine'")
    for _, row in clear[clear["variant"] == "centred"].iterrows():
        assert f"{row['value']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}],yes".replace("-", "−") in shown
    with pytest.raises(UserError, match="differ in coverage"):
        align(recipe(model, world, layers="0,3", pictures=0, sample=3, coverage=0.9), tmp_path / "other")
        compare([folders[0] / "seed_0", tmp_path / "other"], ["a", "b"])


def test_patches_replaced_by_their_words_match(checkpoint, world, tmp_path, monkeypatch):
    settings = recipe(checkpoint, world, layers="0", pictures=0, micro_batch=6)
    backbone = load_backbone(settings.backbone, torch.device("cpu"), with_head=True)
    maps, images = read_panoptic(world, "val2017"), list_images(world, "val2017")
    shares = torch.stack([Annotator(maps, (6, 6))(name) for name in images.names])
    words = word_vectors(backbone.prepare.processor.tokenizer, backbone.words.weight, map(plain_name, maps.names))
    backbone.projector.register_forward_hook(lambda module, args, out: words[shares.argmax(-1)][: len(out)].detach())
    monkeypatch.setattr("analysis.alignment.run.load_backbone", lambda *args, **kwargs: backbone)
    results = read(align(settings, tmp_path / "run"))
    found = results[(results["metric"] == "word_retrieval") & (results["variant"] == "raw")].set_index("control")
    assert found.loc["none", "value"] == 1 and found.loc["permuted", "value"] == 0
    cosine = results[(results["metric"] == "word_cosine") & (results["variant"] == "raw")].set_index("control")
    assert cosine.loc["none", "value"] == pytest.approx(1, abs=1e-5)


def test_dry_run_reports_passes(checkpoint, world, tmp_path):
    out = tmp_path / "run"
    arguments = ["align", str(checkpoint), "--data", f"coco:{world}", "--out", str(out), "--dry-run"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    images = len(list_images(world, "val2017"))
    assert f"pass over all: {images} images (new)" in done.stdout and not out.exists()
    with pytest.raises(UserError, match="layer 99 is out of range"):
        plan_alignment(recipe(checkpoint, world, layers="99"), out)
    (out / "state").mkdir(parents=True)
    (out / "state" / "sample.safetensors").write_bytes(b"")
    (out / "recipe.yaml").write_text(dump_recipe(recipe(checkpoint, world)))
    assert "(resumes)" in plan_alignment(recipe(checkpoint, world), out).facts["pass over a sample"]
    with pytest.raises(UserError, match="holds another run"):
        plan_alignment(recipe(checkpoint, world, coverage=0.9), out)


def test_unusable_data_is_a_user_error(checkpoint, world, coco, tmp_path):
    with pytest.raises(UserError, match="line up with patches on squares only"):
        align(recipe(checkpoint, world, data={"view": "own"}), tmp_path / "run")
    with pytest.raises(UserError, match="neither panoptic_val2017"):
        align(recipe(checkpoint, coco), tmp_path / "run")
    whole = json.loads((world / "annotations" / "panoptic_val2017.json").read_text())
    other = tmp_path / "other"
    (other / "annotations" / "panoptic_val2017").mkdir(parents=True)
    (other / "val2017").symlink_to(world / "val2017")
    (other / "annotations" / "panoptic_val2017.json").write_text(json.dumps(whole | {"annotations": []}))
    with pytest.raises(UserError, match="none of the 6 images of val2017 is annotated"):
        align(recipe(checkpoint, other), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tiles_are_measured_after_the_projector_only(world, tmp_path, caplog):
    """The projector's input has several tiles per image, the image tokens those of the whole image."""
    checkpoint = tiny.llava_next(tmp_path / "next")
    results = read(align(recipe(checkpoint, world, pictures=1), tmp_path / "run"))
    assert "nothing is measured before it" in caplog.text
    assert set(results["layer"]) == {"0", "1", "2", "3", "mean"}
    assert "random" not in set(results[results["metric"].str.startswith("word")]["control"])


def test_run_killed_before_its_scores_is_completed(checkpoint, world, tmp_path, monkeypatch):
    """Scores are written last: where they exist, pictures and manifest do."""
    settings = recipe(checkpoint, world, layers="0", pictures=1)

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("analysis.alignment.run.write_pictures", die)
        with pytest.raises(KeyboardInterrupt):
            align(settings, tmp_path / "run")
    align(settings, tmp_path / "run")
    assert (tmp_path / "run" / "manifest.json").exists() and (tmp_path / "run" / "pictures" / "patches.json").exists()


def test_classes_of_the_same_name_share_a_word(world):
    """As COCO's `wall-brick` and `wall-other-merged` would, if both were walls."""
    maps = read_panoptic(world, "val2017")
    name = next(iter(maps.segments))
    apart, merged = Annotator(maps, (6, 6)), dataclasses.replace(maps, names=["thing"] * len(maps.names))
    together = Annotator(merged, (6, 6))
    assert together.words == ["thing"]
    torch.testing.assert_close(together(name)[:, 0], apart(name).sum(dim=1))


@pytest.mark.parametrize("fault", ["ids", "coverage", "sizes"])
def test_split_without_labelled_patches_is_refused(checkpoint, tmp_path, fault):
    """Unknown ids, classes that cover too little of every patch, maps of another size."""
    world = write_world(tmp_path / "world", 2, 3, seed=6)
    for number, file in enumerate(sorted((world / "annotations" / "panoptic_val2017").iterdir())):
        pixels = np.zeros((48, 48, 3), np.uint8) + np.uint8(240)
        if fault == "coverage":
            pixels[::3, ::3] = np.asarray(Image.open(file))[::3, ::3]
        if fault == "sizes":
            pixels = np.asarray(Image.open(file))[:, : 30 - number]
        Image.fromarray(pixels).save(file)
    with pytest.raises(UserError, match="no patch of val2017 has a label") as caught:
        align(recipe(checkpoint, world), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "results.csv").exists()


def test_broken_label_map_skips_one_image(checkpoint, tmp_path):
    world = write_world(tmp_path / "world", 2, 4, seed=6)
    first, *_ = sorted((world / "annotations" / "panoptic_val2017").iterdir())
    first.write_bytes(b"no picture")
    align(recipe(checkpoint, world, pictures=0), tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [skip["image"] for skip in manifest["skipped"]] == [first.name] and manifest["data"]["eval_images"] == 3


def test_unfinished_pass_resumes_after_the_images_that_are_pooled(tmp_path):
    """Mean states are stored of the first images alone."""
    tally = ScoreAccumulator(names=list("abcde"), done=5)
    tally.add(ScoreKey("", "1", "", "none", "anisotropy"), torch.arange(5.0), torch.ones(5, dtype=torch.bool))
    tally.add(ScoreKey("", "layer:1", "", "none", POOLED), torch.ones(3, 8), torch.ones(3, dtype=torch.bool))
    tally.settle()
    tally.file("val2017", "settings").write(tmp_path / "state.safetensors")
    saved = read_if_fits(tmp_path / "state.safetensors", "settings")
    again = ScoreAccumulator.from_file(saved)
    assert again.done == 5 and again.names == list("abcde") and take_pooled(again)[0]["1"].shape == (3, 8)
    for names in ("ab", "abcdef"):  # fewer than values; more than the other series has
        tally.names = list(names)
        tally.file("val2017", "settings").write(tmp_path / "broken.safetensors")
        assert read_if_fits(tmp_path / "broken.safetensors", "settings") is None
