"""Embedding losses, special tokens and predictors, on tiny models."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from probing.data.conversations import ConversationDataset, Encoder, collate, read_conversations
from probing.distillation.losses import EmbeddingLoss, embedding_losses, unit_rows
from probing.distillation.model import DistillationModel
from probing.distillation.predictors import EmbeddingPredictors, Task
from probing.distillation.recipe import DistillRecipe, EmbeddingRecipe
from probing.distillation.special_tokens import SpecialTokens, add_special_tokens
from probing.distillation.trainer import require_same_recipe, run_stage
from probing.models import describe_checkpoint, load_backbone
from probing.models.token_map import special_ids, token_kinds
from probing.probes.bank import ProbeBank, ProbeKey
from probing.recipe import TOKEN_KINDS, BackboneRecipe, TeacherRecipe, dump_recipe
from probing.teachers import load_teacher
from probing.utils.errors import UserError
from tests.helpers import tiny

CPU = torch.device("cpu")


def teacher_of(models, name):
    """With a number of target tokens that four divides."""
    return TeacherRecipe(id=str(models[name]), grid=2 if name == "seg" else None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve conversations about coarse images; the first has no image."""
    root = tiny.conversations(tmp_path_factory.mktemp("distill"), 12)
    return {"conversations": str(root / "data.json"), "image_root": str(root)}


@pytest.fixture
def recipe(models, data):
    def make(embedding=None, **changes):
        common = {"batch_size": 6, "micro_batch": 3, "workers": 0, "lr": 1e-3, "stage": "pt"}
        trainer = {"report_to": "none", "use_cpu": True, "logging_steps": 1}
        teachers = {name: teacher_of(models, name).model_dump() for name in ("depth", "seg", "gen")}
        layers = {"depth": "1,3", "seg": "2", "gen": "2,3"}
        section = {"teachers": teachers, "layers": layers, "seek": 4, "heads": 2, "dim_head": 8} | (embedding or {})
        values = {"checkpoint": str(models["llava"]), "data": data, "trainer": trainer} | common | changes
        return DistillRecipe.model_validate({"embedding": section} | values)

    return make


def log_of(folder):
    return json.loads((folder / "training.json").read_text())["log"]


def test_embedding_losses_equal_plain_loop():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 5, 3, 4, generator=generator).double()
    scale = torch.tensor(2.0)
    smooth = contrast = 0.0
    for i in range(5):
        for p, t in zip(prediction[i].flatten().tolist(), target[i].flatten().tolist(), strict=True):
            smooth += 0.5 * (p - t) ** 2 if abs(p - t) < 1 else abs(p - t) - 0.5
        cosines = []
        for j in range(5):
            a, b = prediction[i].flatten(), target[j].flatten()
            cosines.append(float((a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())))
        powers = [math.exp(math.exp(2.0) * c) for c in cosines]
        contrast -= math.log(powers[i] / sum(powers))
    parts = [
        embedding_losses(prediction[r].float(), target[r].float(), unit_rows(target), torch.arange(5)[r], scale)
        for r in (slice(0, 2), slice(2, 5), slice(5, 5))
    ]
    assert float(sum(p[0] for p in parts)) == pytest.approx(smooth / (5 * 12), rel=1e-5)
    assert float(sum(p[1] for p in parts)) == pytest.approx(contrast / 5, rel=1e-5)


def test_targets_do_not_depend_on_micro_batches(models):
    teacher = load_teacher("gen", TeacherRecipe(id=str(models["gen"])), CPU)
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    recipe = EmbeddingRecipe(teachers={"gen": {"id": "x"}}, seek=1)
    predictors = EmbeddingPredictors([Task("gen", (1,), 0.5, teacher.shape)], 8, recipe)
    loss = EmbeddingLoss(predictors, {"gen": teacher}, 0.3, 3, {})

    def batches(*sizes):
        made, start = [], 0
        for size in sizes:
            rows = {"target_rows": torch.arange(size), "teacher_pixels": {"gen": pixels[start : start + size]}}
            rows |= dict.fromkeys(("input_ids", "attention_mask", "labels"), torch.ones(size, 4, dtype=torch.long))
            made.append(rows if size else {})
            start += size
        loss.prepare(made, CPU, world=1)
        return [batch.get("targets") for batch in made]

    (whole,) = batches(5)
    cut = batches(2, 0, 3)
    assert cut[1] is None and cut[2]["positive"].tolist() == [2, 3, 4]
    assert torch.allclose(cut[0]["candidates"]["gen"], whole["candidates"]["gen"], atol=1e-6)


def test_special_tokens_follow_every_image(models):
    processor = AutoProcessor.from_pretrained(models["llava"])
    model = AutoModelForImageTextToText.from_pretrained(models["llava"])
    ids = add_special_tokens(processor, model, ["gen", "depth"], 2)
    assert add_special_tokens(processor, model, ["gen", "depth"], 2) == ids  # they are there
    with pytest.raises(UserError, match="has special tokens already"):
        add_special_tokens(processor, model, ["gen", "depth"], 3)
    text = {"type": "text", "text": "and this"}
    content = [{"type": "text", "text": "look"}, {"type": "image"}, text, {"type": "image"}]
    rendered = processor.apply_chat_template([{"role": "user", "content": content}])
    images = [Image.new("RGB", (32, 32))] * 2
    inputs = processor(images=images, text=[rendered], return_tensors="pt")
    kinds = token_kinds(inputs["input_ids"], inputs["attention_mask"], model.config.image_token_id, ids)[0]
    names = [TOKEN_KINDS[k] for k in kinds.tolist()]
    runs = [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    assert runs == ["system", "image", "gen", "depth", "text", "image", "gen", "depth", "text"]
    assert names.count("image") == 32 and names.count("gen") == 4
    assert model(**inputs).logits.shape[-1] == len(processor.tokenizer)


@pytest.mark.parametrize(
    ("stage", "embedding", "parts"),
    [
        ("pt", True, {"multi_modal_projector", "predictors.queries", "predictors.scales", "predictors.predictors"}),
        (
            "ift",
            True,
            {"multi_modal_projector", "language_model", "lm_head", "predictors.scales", "predictors.predictors"},
        ),
        ("pt", False, {"multi_modal_projector"}),
        ("vpt", False, {"vision_tower", "multi_modal_projector", "language_model", "lm_head"}),
        ("ift", False, {"multi_modal_projector", "language_model", "lm_head"}),
    ],
)
def test_gradients_reach_only_what_the_stage_trains(models, data, stage, embedding, parts):
    processor = AutoProcessor.from_pretrained(models["llava"])
    model = AutoModelForImageTextToText.from_pretrained(models["llava"])
    teachers = {name: load_teacher(name, teacher_of(models, name), CPU) for name in ("gen", "depth", "seg")}
    tasks = [Task(name, (1, 3), 0.5, teacher.shape) for name, teacher in teachers.items()] if embedding else []
    ids = add_special_tokens(processor, model, ["gen", "depth", "seg"], 4)
    auxiliary, rows, queries = [], None, []
    if embedding:
        values = {name: teacher_of(models, name) for name in teachers}
        predictors = EmbeddingPredictors(tasks, 32, EmbeddingRecipe(teachers=values, seek=4))
        auxiliary.append(EmbeddingLoss(predictors, teachers, 0.3, model.config.image_token_id, ids))
        rows, queries = predictors.special_rows, [predictors.queries]
    special = SpecialTokens(ids, model.get_input_embeddings(), rows)
    for group in (special.queries, *queries):
        group.requires_grad_(stage == "pt")
    trained = DistillationModel(model, stage, auxiliary, special).train()
    encoder = Encoder(processor, model.config.image_token_id, 4096)
    prepare = {name: teacher.prepare for name, teacher in teachers.items()} if embedding else {}
    samples = ConversationDataset(
        read_conversations(Path(data["conversations"])), Path(data["image_root"]), encoder, True, prepare
    )
    batch = collate([samples[index] for index in range(4)], processor.tokenizer.pad_token_id)
    if embedding:
        auxiliary[0].prepare([batch], CPU, world=1)
        assert batch["targets"]["rows"].tolist() == [1, 2, 3]
    del batch["names"]
    trained(**batch)["loss"].backward()
    all_parts = ("vision_tower", "multi_modal_projector", "language_model", "lm_head", "special")
    all_parts = (*(f"predictors.{name}" for name in ("queries", "scales", "predictors")), *all_parts)

    def part(name):
        return next(p for p in all_parts if p in name)

    found = {part(name) for name, parameter in trained.named_parameters() if parameter.requires_grad}
    own = {"special"} if stage == "pt" and not embedding else set()
    assert found == parts | own
    for name, parameter in trained.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif part(name) != "vision_tower":  # layers after the one that is read get none
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    if stage == "vpt":
        assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_stage_writes_llava_folder_with_predictors(recipe, models, data, tmp_path):
    run_stage(recipe(max_steps=2), tmp_path / "pt")
    found = describe_checkpoint(BackboneRecipe(checkpoint=str(tmp_path / "pt")))
    assert {name: found["tokens"][name] for name in ("image", "gen", "depth", "seg")} == {
        "image": 16,
        "gen": 4,
        "depth": 4,
        "seg": 4,
    }
    backbone = load_backbone(BackboneRecipe(checkpoint=str(tmp_path / "pt"), dtype="float32"), CPU)
    images = [Image.open(Path(data["image_root"]) / f"{k}.png").convert("RGB") for k in (1, 2)]
    states, tokens = backbone.hidden_states(images, "0,2")
    saved = load_file(tmp_path / "pt" / "predictors" / "queries.safetensors")
    pooled = saved["queries.depth"].unflatten(0, (4, -1)).mean(1)
    assert torch.allclose(states[0][0][tokens.mask("depth")[0]], pooled, atol=1e-6)
    assert torch.allclose(states[0][0][tokens.mask("gen")[0]], saved["queries.gen"], atol=1e-6)
    # The bank predicts what the predictor does, from its own latents.
    tasks = [Task("seg", (2,), 0.5, tuple(load_teacher("seg", teacher_of(models, "seg"), CPU).shape))]
    values = {"seg": teacher_of(models, "seg")}
    embedding = EmbeddingRecipe(teachers=values, layers={"seg": "2"}, seek=4, heads=2, dim_head=8)
    predictors = EmbeddingPredictors(tasks, 32, embedding)
    predictors.load(tmp_path / "pt" / "predictors")
    direct = predictors.predict(tasks[0], 2, states[2], tokens)
    bank = ProbeBank.load(tmp_path / "pt" / "predictors", CPU, ["seg"])
    keys, mask = tokens.select(states[2], ["system", "image", "seg", "text"])
    assert torch.allclose(bank.probes[ProbeKey("seg", 2, 0)](keys, mask), direct, atol=1e-5)
    named = {name for row in log_of(tmp_path / "pt") for name in row if name.startswith("loss/")}
    assert {"loss/next_token", "loss/depth.3.smooth_l1", "loss/gen.2.contrast", "loss/seg.2.smooth_l1"} <= named
    assert len(named) == 1 + 2 * 5


def test_special_tokens_stay_frozen_in_ift(recipe, tmp_path):
    run_stage(recipe(), tmp_path / "pt")
    embedded = "model.language_model.embed_tokens.weight"
    for learn in (None, True):
        out = tmp_path / f"ift-{learn}"
        changes = {"train_special_tokens": learn} if learn else {}
        run_stage(
            recipe(checkpoint=str(tmp_path / "pt"), stage="ift", **changes).model_copy(update={"embedding": None}), out
        )
        before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "pt", out))
        name = next(n for n in before if n.endswith("embed_tokens.weight"))
        ids = special_ids(AutoProcessor.from_pretrained(out).tokenizer)
        rows = [number for numbers in ids.values() for number in numbers]
        assert len(rows) == 12 and torch.equal(before[name][rows], after[name][rows]) == (not learn), embedded
        others = [k for k in range(len(before[name])) if k not in rows]
        assert not torch.equal(before[name][others], after[name][others])


def test_ift_resumes_predictors_of_pt(recipe, tmp_path):
    """Table 4: losses in pt and ift; in ift the tokens stay, the predictors learn on."""
    run_stage(recipe(), tmp_path / "pt")
    run_stage(recipe(checkpoint=str(tmp_path / "pt"), stage="ift"), tmp_path / "ift")
    one, two = (load_file(tmp_path / name / "predictors" / "queries.safetensors") for name in ("pt", "ift"))
    assert all(torch.equal(one[name], two[name]) for name in one if name.startswith("queries"))
    assert any(not torch.equal(one[name], two[name]) for name in one if name.startswith("scale"))
    run_stage(
        recipe(checkpoint=str(tmp_path / "pt"), stage="ift").model_copy(update={"embedding": None}), tmp_path / "b"
    )
    with pytest.raises(UserError, match="has special tokens but no predictors/"):
        run_stage(recipe(checkpoint=str(tmp_path / "b"), stage="ift"), tmp_path / "c")


def test_zero_weights_equal_the_baseline(recipe, tmp_path):
    nothing = {"weights": {"depth": 0, "seg": 0, "gen": 0}}
    run_stage(recipe(nothing), tmp_path / "zero")
    run_stage(recipe().model_copy(update={"embedding": None}), tmp_path / "plain")
    zero, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("zero", "plain"))
    assert zero.keys() == plain.keys() and all(torch.equal(zero[name], plain[name]) for name in zero)
    assert not (tmp_path / "zero" / "predictors").exists()


def test_predictors_without_special_tokens_have_latents(recipe, tmp_path):
    run_stage(recipe({"seek": 0, "contrastive": 0}), tmp_path / "out")
    assert not special_ids(AutoProcessor.from_pretrained(tmp_path / "out").tokenizer)
    assert ProbeBank.load(tmp_path / "out" / "predictors", CPU).probes.keys() >= {ProbeKey("depth", 3, 0)}
    assert not any("contrast" in name for row in log_of(tmp_path / "out") for name in row)


def test_micro_batches_change_no_loss(recipe, tmp_path):
    logs = []
    for size in (6, 2):
        run_stage(recipe(micro_batch=size, batch_size=6, max_steps=2), tmp_path / str(size))
        logs.append([row for row in log_of(tmp_path / str(size)) if "loss" in row])
    assert len(logs[0]) == len(logs[1]) == 2
    for one, two in zip(*logs, strict=True):
        for key in (k for k in one if k.startswith("loss/")):
            assert two[key] == pytest.approx(one[key], rel=2e-3, abs=2e-4), key


def test_tokens_in_another_order_embed_their_own_queries(recipe, data, tmp_path):
    folder = run_stage(recipe({"order": ["seg", "gen", "depth"]}, max_steps=1), tmp_path / "pt")
    backbone = load_backbone(BackboneRecipe(checkpoint=str(folder), dtype="float32"), CPU)
    states, tokens = backbone.hidden_states([Image.open(Path(data["image_root"]) / "1.png").convert("RGB")], "0")
    saved = load_file(folder / "predictors" / "queries.safetensors")
    assert torch.allclose(states[0][0][tokens.mask("gen")[0]], saved["queries.gen"], atol=1e-6)
    pooled = saved["queries.seg"].unflatten(0, (4, -1)).mean(1)
    assert torch.allclose(states[0][0][tokens.mask("seg")[0]], pooled, atol=1e-6)


def test_predictors_beat_the_mean_target(recipe, models, data, tmp_path):
    """Cosine with each image's own target, at the selected layers, before and after training on these images."""
    run_stage(recipe({"seek": 1}, max_steps=60, lr=1e-2, batch_size=12, micro_batch=12), tmp_path / "out")
    backbone = load_backbone(BackboneRecipe(checkpoint=str(tmp_path / "out"), dtype="float32", prompt="Which?"), CPU)
    images = [Image.open(Path(data["image_root"]) / f"{k}.png").convert("RGB") for k in range(1, 12)]
    bank = ProbeBank.load(tmp_path / "out" / "predictors", CPU)
    for key, probe in bank.probes.items():
        teacher = load_teacher(key.teacher, teacher_of(models, key.teacher), CPU)
        target = teacher.target(teacher.prepare(images))
        states, tokens = backbone.hidden_states(images, str(key.layer))
        found = probe(*tokens.select(states[key.layer], ["system", "image", key.teacher, "text"]))
        mean = target.mean(0, keepdim=True)
        centred = torch.cosine_similarity((found - mean).flatten(1), (target - mean).flatten(1)).mean()
        assert centred > 0.3, (key, centred)


@pytest.mark.parametrize(
    ("embedding", "changes", "message"),
    [
        ({"layers": {"depth": "4", "seg": "2", "gen": "2"}}, {}, "layer 4 is out of range"),
        ({"layers": {"depth": "0", "seg": "2", "gen": "2"}}, {}, "give decoder blocks, 1 to 3"),
        ({"seek": 5}, {}, "seek = 5 does not divide the 16 queries of depth"),
        ({}, {"lr": 1e30, "max_steps": 5}, "is not finite at step"),
    ],
)
def test_invalid_embedding_is_refused(recipe, tmp_path, embedding, changes, message):
    with pytest.raises(UserError, match=message):
        run_stage(recipe(embedding, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_contradictory_recipe_is_refused(recipe):
    for embedding, message in (
        ({"order": ["gen", "depth"]}, "order must name every task"),
        ({"layers": {"depth": "1"}}, "layers has none for gen"),
        ({"keys": []}, "at least 1"),
        ({"keys": ["special"], "seek": 0}, "seek=0 makes none"),
        ({"weights": {"gen": -0.5}}, "greater than or equal to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe(embedding)


@pytest.mark.parametrize("view", ["own", "square"])
def test_cached_targets_give_the_same_losses(recipe, tmp_path, view):
    """A stage that began without them may resume with them."""
    computed, cached = recipe(view=view), recipe(view=view, target_cache=str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(computed))
    require_same_recipe(cached, tmp_path / "recipe.yaml")
    logs = [log_of(run_stage(one, tmp_path / name)) for one, name in ((computed, "computed"), (cached, "cached"))]
    for one, two in zip(*logs, strict=True):
        for name in (name for name in one if name.startswith("loss")):
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("computed", "cached"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    assert {folder.name.split("-")[0] for folder in (tmp_path / "cache").iterdir()} == {"depth", "seg", "gen"}
