"""`probing erase`."""

import itertools
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from concept_erasure import LeaceEraser
from PIL import Image
from scipy.stats import binomtest, ttest_1samp
from sklearn.linear_model import LinearRegression
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

import probing
from analysis.erasure import run as erasure
from analysis.erasure.answers import AnsweredInputs, score_answers
from analysis.erasure.erasers import DRAWS, LAGS, EraserFit, PositionSums, erase_from, solve, states_at
from analysis.erasure.options import Options
from analysis.erasure.replay import Replay, require_replay
from analysis.evaluation.compare import compare, statements
from analysis.evaluation.scores import ScoreFile, ScoreKey
from analysis.planning.erasure import plan_erasure
from probing.models import FINAL, TokenMap, load_backbone
from probing.recipe import DEFAULT_PROMPT, TOKEN_KINDS, BackboneRecipe
from probing.runs.directory import Run
from probing.teachers import load_teachers
from probing.toyworld import planted
from probing.training.run import training_images
from probing.utils.errors import UserError
from probing.utils.images import square
from tests.helpers import tiny
from tests.helpers.cli import error_line
from tests.helpers.cli import probing as command
from tests.probing.models.test_auto import FAMILIES as AUTO
from tests.probing.models.test_auto import LLM, TEMPLATE, tokenizer

CPU = torch.device("cpu")
WIDTH, RANK = 12, 3


@pytest.fixture(scope="module")
def data():
    """Correlated states (n, H), and features (n, r) of which states hold a part."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(600, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator) + 5
    noise = torch.randn(600, RANK, generator=generator)
    return states, states @ torch.randn(WIDTH, RANK, generator=generator) + 2 * noise


def fitted(states, features):
    """The erasers, from sums over batches of ten."""
    sums, others = PositionSums(states[:1]), features.roll(1, dims=0)
    for rows in torch.arange(len(states)).split(10):
        batch = {"a": features[rows, None], "a/shuffled": others[rows, None]}
        sums.add(states[rows, None], batch, torch.ones(len(rows)).bool())
    return {control: eraser for (_, control), eraser in solve(sums, ["a"])}


def explained(states, features):
    """R² of a linear regression."""
    return LinearRegression().fit(states, features).score(states, features)


def test_erasers_are_those_of_the_package_and_erase_all_that_is_linear(data):
    states, features = data
    erasers = fitted(states, features)
    whole = LeaceEraser.fit(
        states.double(), features.double(), shrinkage=False, constrain_cov_trace=False, svd_tol=1e-9
    )
    erased = erasers["none"](states)
    torch.testing.assert_close(erased, whole(states.double()).float(), rtol=1e-4, atol=1e-4)
    assert explained(states, features) > 0.5 and explained(erased, features) < 1e-6
    torch.testing.assert_close(erasers["none"](erased), erased, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(erased.mean(dim=0), states.mean(dim=0), rtol=1e-4, atol=1e-4)


def test_erasure_changes_neither_the_mean_of_a_token_nor_other_tokens(data):
    """Three tokens of text in sequences of five, from the second or the third on."""
    states, features = data
    system, text = TOKEN_KINDS.index("system"), TOKEN_KINDS.index("text")
    kinds = torch.full((200, 5), system)
    for row in range(200):
        kinds[row, 1 + row % 2 :][:3] = text
    tokens = TokenMap(kinds, (1, 1))
    whole = torch.zeros(200, 5, WIDTH)
    offsets = 10 * torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))
    whole[kinds == text] = (states.view(200, 3, WIDTH) + offsets).flatten(0, 1)
    own, others = (x.view(200, 3, RANK) for x in (features, features.roll(3, dims=0)))
    sums = PositionSums(states_at("text", whole, tokens)[0])
    sums.add(states_at("text", whole, tokens), {"a": own, "a/shuffled": others}, torch.ones(200).bool())
    erased = erase_from(whole, tokens, {"text": dict(solve(sums, ["a"]))["a", "none"]})
    assert torch.equal(erased[kinds == system], whole[kinds == system])
    before, after = (states_at("text", x, tokens) for x in (whole, erased))
    torch.testing.assert_close(after.mean(dim=0), before.mean(dim=0), rtol=1e-4, atol=1e-3)
    after, own = ((x - x.mean(dim=0)).flatten(0, 1) for x in (after, own))
    assert explained(after, own) < 1e-6 and (after - before.sub(before.mean(dim=0)).flatten(0, 1)).abs().max() > 1


def test_random_subspace_has_the_same_rank_and_change(data):
    states, features = data
    erasers = fitted(states, features)
    change = {name: eraser(states) - states for name, eraser in erasers.items()}
    for one in change.values():
        assert torch.linalg.matrix_rank(one, rtol=1e-4) == RANK
    energy = {name: one.square().sum().item() for name, one in change.items()}
    for number in range(DRAWS):
        assert energy[f"subspace{number}"] == pytest.approx(energy["none"], rel=1e-4)
    assert explained(erasers["subspace0"](states), features) > 0.2


def test_what_is_no_more_readable_than_other_images_features_is_not_erased(data):
    states, features = data
    unrelated = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    sums = PositionSums(states[:1])
    sums.add(states[:, None], {"a": unrelated[:, None], "a/shuffled": features[:, None]}, torch.ones(600).bool())
    for _, eraser in solve(sums, ["a"]):
        assert torch.equal(eraser(states), states)


def test_chance_erases_something_in_one_of_twenty_cases():
    generator = torch.Generator().manual_seed(0)
    erased, cases = 0, 400
    for _ in range(cases):
        states, features = torch.randn(100, 6, generator=generator), torch.randn(100, 2, generator=generator)
        others = torch.cat([features.roll(lag, dims=0) for lag in range(1, LAGS + 1)], dim=1)
        sums = PositionSums(states[:1])
        sums.add(states[:, None], {"a": features[:, None], "a/shuffled": others[:, None]}, torch.ones(100).bool())
        erased += len(dict(solve(sums, ["a"]))["a", "none"].proj_right) > 0
    assert binomtest(erased, cases, 1 / (1 + LAGS)).pvalue > 0.05


IMAGES = [
    Image.fromarray(np.random.default_rng(side).integers(0, 255, (side, side, 3), dtype=np.uint8))
    for side in (50, 130, 64)
]
CAPTIONS = ["a cat", "two red cars on a street", "a"]
ANSWERS = [(DEFAULT_PROMPT, caption) for caption in CAPTIONS]
TWICE = [(IMAGES[0], answer) for answer in ANSWERS[:2]]


def qwen3_vl(path):
    """Adds features of the tower to the states after the first two blocks."""
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    text = tokenizer(*names)
    image, video, start, end = text.convert_tokens_to_ids(names)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={"vocab_size": len(text), "head_dim": 8, "rope_parameters": rope, **LLM},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
            "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    Qwen3VLForConditionalGeneration(config).save_pretrained(path)
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=32 * 32, max_pixels=128 * 128),
        video_processor=Qwen3VLVideoProcessor(patch_size=8, merge_size=2),
        tokenizer=text,
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(path)


def loaded(build, folder, **options):
    """A tiny checkpoint with its head, and how it gets images with captions."""
    torch.manual_seed(0)
    build(folder)
    recipe = BackboneRecipe(checkpoint=str(folder), **options)
    backbone = load_backbone(recipe, CPU, with_head=True)
    return backbone, AnsweredInputs(backbone.prepare, recipe, None)


FAMILIES = {name: (getattr(tiny, name), {}) for name in ("llava", "llava_next", "llava_onevision")} | AUTO
del FAMILIES["paligemma"]


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_those_of_transformers_and_any_layer_can_be_resumed(tmp_path, name):
    """Of the captions alone, whatever the numbers of image tokens and the side of the padding."""
    build, options = FAMILIES[name]
    backbone, prepare = loaded(build, tmp_path / name, **options)
    require_replay(backbone, prepare(TWICE), 0)
    batch = prepare(list(zip(IMAGES, ANSWERS, strict=True)))
    layers = [*range(backbone.layers + 1), FINAL]
    replay = Replay.record(backbone, batch, layers)
    for layer in layers:
        torch.testing.assert_close(replay.final_from(layer, replay.states[layer]), replay.states[FINAL])
    changed = replay.states[1] + 1
    assert not torch.allclose(replay.final_from(1, changed), replay.states[FINAL])
    ids, answer = batch.inputs["input_ids"], batch.tokens.mask("answer")
    losses, right = score_answers(replay.states[FINAL], backbone.head, ids, answer)
    with torch.no_grad():
        logits = backbone.writer(**batch.inputs).logits
    own = backbone.prepare(IMAGES).tokens
    for row, caption in enumerate(CAPTIONS):
        wanted, predicted = ids[row, 1:][answer[row, 1:]], logits[row, :-1][answer[row, 1:]]
        text = backbone.prepare.processor.decode(wanted)
        assert text.strip().removesuffix("</s>") == caption
        assert losses[row].item() == pytest.approx(cross_entropy(predicted, wanted).item(), rel=1e-4)
        assert right[row].item() == pytest.approx((predicted.argmax(-1) == wanted).float().mean().item())
    for kind in ("image", "tile", "newline", "text"):
        assert torch.equal(batch.tokens.mask(kind).sum(dim=1), own.mask(kind).sum(dim=1)), kind


def test_what_cannot_be_resumed_or_scored_is_one_line(tmp_path):
    """An LLM that gets features of the image after its first blocks; a prompt that sees its answer; no answer."""
    backbone, prepare = loaded(qwen3_vl, tmp_path / "qwen3_vl", image_size=64)
    with pytest.raises(UserError, match="changes states between its blocks"):
        require_replay(backbone, prepare(TWICE), 0)
    require_replay(backbone, prepare(TWICE), 3)
    template = "{{ '<image>' + messages[0].content[1].text }}"
    with pytest.raises(UserError, match="does not write an answer"):
        loaded(AUTO["paligemma"][0], tmp_path / "mute", template=template)[1](TWICE)
    template += "{% if messages | length > 1 %}{{ messages[1].content[0].text }}{% endif %}"
    backbone, prepare = loaded(AUTO["paligemma"][0], tmp_path / "paligemma", template=template)
    with pytest.raises(UserError, match="causal"):
        require_replay(backbone, prepare(TWICE), 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_erasure_hurts_exactly_where_the_planted_function_is_used(tmp_path, seed):
    """At image tokens from where the products are computed until they are moved, at the text from then on.

    Controls hurt less: on average over layers, because in the six dimensions that differ between images some random
    directions hold much of the products.
    """
    world = planted.write_planted(tmp_path, 240, 60, seed)
    fit = {"epochs": 1, "batch_size": 16, "micro_batch": 16, "workers": 0, "report_to": "none"}
    recipe = {
        "backbone": {"checkpoint": str(world.checkpoint)}, "data": {"path": f"coco:{world.data}"},
        "teachers": {"products": {"id": str(world.teacher)}}, "layers": "all", "controls": [], "fit": fit,
    }  # fmt: skip
    run = probing.train(recipe, tmp_path / "run")
    table = probing.erase(run, positions=["image", "text", "all"])
    used = {"image": range(planted.COMPUTED, planted.MOVED), "text": range(planted.MOVED, planted.LAYERS + 1)}
    used["all"] = range(planted.COMPUTED, planted.LAYERS + 1)
    rows = table[(table.layer != "mean") & (table.layer != "")]
    keys = zip(rows.metric, rows.variant, rows.layer.astype(int), rows.control, strict=True)
    found = dict(zip(keys, rows.itertuples(), strict=True))
    for position, layer in itertools.product(used, range(planted.LAYERS + 1)):
        own = [found[f"erased_{name}", position, layer, "none"] for name in ("loss", "accuracy", "excess")]
        loss, accuracy, excess = own
        if layer in used[position]:
            assert loss.ci_low > 0.5 and accuracy.ci_high < -0.2, own
        else:
            assert abs(loss.value) < 1e-3 and accuracy.value == 0 and abs(excess.value) < 1e-3, own
    scores = ScoreFile.read(run.path / "scores" / "erase-val2017.safetensors").table
    losses = {(key.variant, int(key.layer), key.control): x for key, x in scores.items() if key.metric == "erased_loss"}
    for position, control in itertools.product(used, ("subspace", "shuffled")):
        less = [losses[position, layer, "none"] - losses[position, layer, control] for layer in used[position]]
        assert ttest_1samp(np.mean(less, axis=0), 0, alternative="greater").pvalue < 0.05, (position, control)
    ranks = {position: [found["erased_rank", position, layer, "none"].value for layer in range(9)] for position in used}
    assert ranks["image"][: planted.ERASED] == [0, 0] + 4 * [planted.PRODUCTS]  # later on it is rounding
    assert ranks["text"] == 4 * [0] + 5 * [planted.PRODUCTS]


def test_plan_counts_operations_within_15_percent(run, monkeypatch):
    """If at every layer something is erased."""
    own = erasure.fit_erasers

    def whole(*arguments):
        """One direction of each eraser."""
        pairs = own(*arguments).items()
        return {key: LeaceEraser(torch.ones(32, 1), torch.ones(1, 32), e.bias) for key, e in pairs}

    monkeypatch.setattr(erasure, "fit_erasers", whole)
    work = plan_erasure(run, Options(rank=2)).work
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        probing.erase(run, rank=2)
    assert work.total.flops16 + work.total.flops32 == pytest.approx(counter.get_total_flops(), rel=0.15)


@pytest.fixture
def run(recipe_values, tmp_path):
    """A finished run of a tiny checkpoint."""
    values = recipe_values | {"controls": []}
    values["fit"] |= {"epochs": 1, "report_to": "none"}
    return probing.train(values, tmp_path / "run").path


def test_sums_are_those_of_all_states_and_features_in_batches_of_any_size(run, monkeypatch):
    """Of each image with its own feature without the mean, and with those of earlier images."""
    monkeypatch.setattr(EraserFit, "solve", lambda self: self)
    opened = Run.open(run)
    images = training_images(opened.recipe.data)
    backbone = load_backbone(opened.recipe.backbone, CPU)
    teacher = {"gen": load_teachers(opened.recipe.teachers, CPU)["gen"]}
    fits = [
        erasure.fit_erasers(opened, images, backbone, teacher, [0, 2], Options(rank=2, micro_batch=size))
        for size in (1, 5)
    ]
    shown = [square(images.read(index)) for index in range(len(images))]
    states, tokens = backbone.hidden_states(shown)
    with torch.no_grad():
        features = teacher["gen"].target(teacher["gen"].prepare(shown))[:, 0]
    lags = len(shown) // 2
    for fit, (position, layer) in itertools.product(fits, [("image", 0), ("image", 2), ("text", 2)]):
        concept = (features - features.mean(dim=0)) @ fit.directions[position, "gen"]
        torch.testing.assert_close(concept.square().mean(dim=0), torch.ones(2), rtol=1e-4, atol=1e-4)
        own = tokens.select(states[layer], [position])[0][lags:].double()
        others = torch.stack([concept[lags - lag : len(shown) - lag] for lag in range(lags + 1)]).double()
        sums, count = fit.sums[position, layer], own.shape[0] * own.shape[1]
        torch.testing.assert_close(sums.mean(), own.mean(dim=0).float())
        own -= own.mean(dim=0)
        crosses = torch.einsum("inh,lir->hlr", own, others - others.mean(dim=1, keepdim=True)) / count
        torch.testing.assert_close(sums.covariance("gen"), crosses[:, 0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(sums.covariance("gen/shuffled"), crosses[:, 1:].flatten(1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            sums.covariance(), torch.einsum("inh,ing->hg", own, own) / count, rtol=1e-4, atol=1e-7
        )


def test_command_adds_to_results_and_does_nothing_twice(run, monkeypatch):
    command("erase", run, "--dry-run", "--rank", 2)
    assert not (run / "scores").exists()
    line = command("erase", run, "--rank", 2, "--layers", "0,1", "--position", "image").stdout
    assert "results.csv" in line
    table = probing.evaluate(run)
    assert {"cosine", "erased_loss", "erased_excess", "erased_accuracy", "erased_rank", "answer_loss"} <= set(
        table.metric
    )
    assert set(table.teacher) == {"depth", "seg", "gen"}
    command("report", run)
    monkeypatch.setattr(erasure, "load_backbone", None)  # nothing is loaded any more
    command("erase", run, "--rank", 2, "--layers", "1", "--position", "image")


def test_conversations_are_measured_at_the_image_alone(run, tmp_path, caplog):
    names = [f"{number:012d}.jpg" for number in range(13, 16)]  # of the held-out images
    rows = [
        [{"from": "human", "value": "<image>\n" + question}, {"from": "gpt", "value": "a b c"}]
        for question in ("Which?", "a", "Which?")
    ]
    entries = [{"image": f"val2017/{name}", "conversations": row} for name, row in zip(names, rows, strict=True)]
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(entries))
    table = probing.erase(run, rank=2, conversations=file)
    erased = table[table.metric == "erased_loss"]
    assert set(erased.variant) == {"image"} and set(erased.n) == {3}
    file.write_text(json.dumps([*entries, {"image": entries[0]["image"], "conversations": rows[1]}]))
    again = probing.erase(run, rank=2, conversations=file)
    pd.testing.assert_frame_equal(again, table)
    assert "1 conversations are not the first" in caplog.text
    command("erase", run, "--conversations", file, "--dry-run", "--rank", 2)
    backbone = load_backbone(BackboneRecipe(checkpoint=Run.open(run).recipe.backbone.checkpoint), CPU)
    prepare = AnsweredInputs(backbone.prepare, Run.open(run).recipe.backbone, None)
    tokens = prepare([(IMAGES[0], ("Which?", "a b c")), (IMAGES[1], ("a", "a b c"))])
    processor = backbone.prepare.processor
    for row, question in enumerate(("Which?", "a")):
        shown = processor.decode(tokens.inputs["input_ids"][row][tokens.tokens.mask("text")[row]])
        assert question in shown and "b" not in shown
    assert "leave out other" in error_line("erase", run, "--conversations", file, "--position", "text")
    file.write_text(json.dumps([{"image": "val2017/elsewhere.jpg", "conversations": rows[0]}]))
    assert "conversation" in error_line("erase", run, "--conversations", file)


@pytest.mark.parametrize(("above", "warned"), [(0.01, True), (-0.01, False)])
def test_losses_above_those_of_a_uniform_guess_are_a_warning(tmp_path, caplog, above, warned):
    backbone, _ = loaded(tiny.llava, tmp_path / "llava")
    loss = math.log(len(backbone.prepare.processor.tokenizer)) + above
    table = {ScoreKey("depth", "", "", "none", "answer_loss"): np.float32([loss, loss, np.nan])}
    erasure.warn_of_chance(backbone, ScoreFile(table, ["a", "b", "c"], "val2017", ""))
    assert ("does not write such answers" in caplog.text) == warned


def test_images_with_different_numbers_of_tiles(recipe_values, tmp_path):
    """The text is elsewhere in each sequence of a batch."""
    tiny.llava_next(tmp_path / "llava_next")
    values = recipe_values | {"controls": [], "backbone": {"checkpoint": str(tmp_path / "llava_next")}}
    values["data"] |= {"view": "own"}
    values["fit"] |= {"epochs": 1, "report_to": "none"}
    run = probing.train(values, tmp_path / "run")
    backbone = load_backbone(run.recipe.backbone, CPU)
    images = training_images(run.recipe.data)
    tokens = backbone.prepare([images.read(index) for index in range(3)]).tokens
    assert len(tokens.mask("text").unique(dim=0)) > 1
    table = probing.erase(run, rank=2, layers="1", positions=["all"])
    assert set(table[table.metric == "erased_loss"].n) == {6}


def test_comparison_keeps_positions_apart(run):
    command("erase", run, "--rank", 2, "--layers", "1")
    copy = shutil.copytree(run, run.with_name("copy"))
    differences = compare([run, copy], ["a", "b"])
    erased = differences[differences.probe == "leace"]
    assert set(erased.variant) == {"image", "text"} and (erased.value == 0).all()
    lines = [s for s in statements(differences) if s.startswith("gen, leace, loss of answers when erased (")]
    assert len(lines) == 2 and all("no clear difference; of 1 layers" in line for line in lines)
    command("erase", copy, "--rank", 3, "--layers", "1")
    with pytest.raises(UserError, match=r"they differ in --rank \(2 and 3\); score both in the same way"):
        compare([run, copy], ["a", "b"])
    command("erase", copy, "--rank", 2, "--layers", "1", "--images", 4)  # the images of both are paired
    assert set(compare([run, copy], ["a", "b"]).query("probe == 'leace'").n) == {4}


def test_interrupted_erasure_resumes_without_fitting_again(run, monkeypatch):
    own = erasure.ErasurePass.__call__
    calls = []

    def stop(self, prepared, scores):
        own(self, prepared, scores)
        calls.append(prepared)
        if len(calls) == 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(erasure.ErasurePass, "__call__", stop)
    result = command("erase", run, "--rank", 2, code=130)
    assert "erase" in result.stderr and len(calls) == 1
    monkeypatch.setattr(erasure, "fit_erasers", None)
    command("erase", run, "--rank", 2)
    scores = ScoreFile.read(next((run / "scores").glob("erase-*")))
    assert len(scores.names) == 6 and not (run / "state" / "erase" / "erasers.safetensors").exists()


def test_bad_input_is_one_line(run):
    assert "width" in error_line("erase", run, "--rank", 10_000)
    assert "layer 9" in error_line("erase", run, "--layers", "9")
    (run / "manifest.json").rename(run / "elsewhere.json")
    assert "not finished" in error_line("erase", run)
    (run / "elsewhere.json").rename(run / "manifest.json")


def test_missing_captions_are_one_line(run, recipe_values):
    from pathlib import Path

    file = Path(recipe_values["data"]["path"].removeprefix("coco:")) / "annotations" / "captions_val2017.json"
    text = file.read_text()
    try:
        file.unlink()
        assert "captions" in error_line("erase", run)
        document = json.loads(text)
        file.write_text(json.dumps(document | {"annotations": []}))
        assert "caption" in error_line("erase", run)
    finally:
        file.write_text(text)


def test_checkpoint_without_head_is_one_line(run, monkeypatch):
    def headless(*arguments, **options):
        return load_backbone(*arguments, **options | {"with_head": False})

    monkeypatch.setattr(erasure, "load_backbone", headless)
    with pytest.raises(UserError, match="no language-model head"):
        probing.erase(run, rank=2)
