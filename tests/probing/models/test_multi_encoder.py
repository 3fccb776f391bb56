"""Multi-encoder baselines: trained by the stages, read by the backbone, seen from the numbers of their parts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from analysis.planning.model_cost import trace
from analysis.planning.probe_training import plan_training
from probing.distillation.recipe import DistillRecipe
from probing.distillation.trainer import run_stage
from probing.models import describe_checkpoint, load_backbone
from probing.models.generate import ask
from probing.models.llava import prompt
from probing.models.multi_encoder import load_model, load_teachers
from probing.recipe import BackboneRecipe, ProbeRunRecipe, TeacherRecipe, validate
from probing.teachers import load_teacher
from probing.training.run import train
from probing.utils.errors import UserError
from probing.utils.pretrained import load_config
from tests.helpers import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.conversations(tmp_path_factory.mktemp("encoders"), 6)


def teacher_recipe(models, name):
    return TeacherRecipe(id=str(models[name]), grid=2 if name == "seg" else None)


@pytest.fixture(scope="module", params=["feature", "token"])
def trained(request, models, data, tmp_path_factory):
    """Stages pt and ift of one mode."""
    out = tmp_path_factory.mktemp("multi")
    names = ("depth", "seg", "gen")
    encoders = {
        "mode": request.param,
        "tokens": 2,
        "teachers": {n: teacher_recipe(models, n).model_dump() for n in names},
    }

    def stage(name, source, **changes):
        values = {"checkpoint": str(source), "batch_size": 3, "micro_batch": 3, "workers": 0, "lr": 1e-2}
        values |= {"data": {"conversations": str(data / "data.json"), "image_root": str(data)}}
        values |= {"trainer": {"report_to": "none", "use_cpu": True}}
        return run_stage(DistillRecipe.model_validate(values | changes), out / name)

    first = stage("pt", models["llava"], stage="pt", encoders=encoders)
    return request.param, first, stage("ift", first, stage="ift")


def images_of(data):
    return [Image.open(data / f"{k}.png").convert("RGB") for k in (1, 2)]


def test_inspect_describes_it_and_auto_model_refuses_it(trained):
    mode, _, folder = trained
    found = describe_checkpoint(BackboneRecipe(checkpoint=str(folder)))
    assert found["family"] == "llava_multi_encoder" and found["encoders"]["mode"] == mode
    assert found["tokens"].get("depth", 0) == (2 if mode == "token" else 0) and found["tokens"]["image"] == 16
    with pytest.raises((ValueError, KeyError)):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_llm_input_equals_projected_features(trained, models, data):
    """Layer 0 from the saved tensors: tower, teachers, projectors."""
    mode, _, folder = trained
    backbone = load_backbone(BackboneRecipe(checkpoint=str(folder), dtype="float32"), CPU)
    images = images_of(data)
    states, tokens = backbone.hidden_states(images, "0")
    saved = load_file(folder / "model.safetensors")
    config = load_config(str(folder), "checkpoint")
    model = load_model(str(folder), config, CPU, dtype=torch.float32)
    features = {}
    for name in ("gen", "depth", "seg"):
        teacher = load_teacher(name, teacher_recipe(models, name), CPU)
        features[name] = teacher.target(teacher.prepare(images))
    inputs = backbone.prepare(images).inputs
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    seen = tower.hidden_states[config.vision_feature_layer][:, 1:]

    def mlp(x, first, second):
        first, second = f"model.{first}", f"model.{second}"
        x = torch.nn.functional.gelu(x @ saved[f"{first}.weight"].T + saved[f"{first}.bias"])
        return x @ saved[f"{second}.weight"].T + saved[f"{second}.bias"]

    if mode == "feature":
        plane = features["seg"].transpose(1, 2).unflatten(2, (2, 2))
        seg = torch.nn.functional.interpolate(plane, size=(4, 4), mode="bilinear").flatten(2).transpose(1, 2)
        joined = torch.cat([seen, features["gen"].expand(-1, 16, -1), features["depth"], seg], dim=-1)
        expected = mlp(joined, "multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
        torch.testing.assert_close(states[0][tokens.mask("image")], expected.flatten(0, 1), rtol=1e-4, atol=1e-5)
    else:
        pooled = features["depth"].unflatten(1, (2, -1)).mean(2)
        expected = mlp(pooled, "teacher_projectors.depth.0", "teacher_projectors.depth.2")
        torch.testing.assert_close(states[0][tokens.mask("depth")], expected.flatten(0, 1), rtol=1e-4, atol=1e-5)
        gen = mlp(features["gen"].expand(-1, 2, -1), "teacher_projectors.gen.0", "teacher_projectors.gen.2")
        torch.testing.assert_close(states[0][tokens.mask("gen")], gen.flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_every_stage_trains_the_projectors(trained, models):
    _, first, second = trained
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    start = load_file(models["llava"] / "model.safetensors")
    projectors = [name for name in before if "projector" in name]
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in projectors)
    query = "model.language_model.layers.0.self_attn.q_proj.weight"
    old = next(name for name in start if name.endswith("layers.0.self_attn.q_proj.weight") and "language" in name)
    assert torch.equal(before[query], start[old]) and not torch.equal(after[query], start[old])


def test_probes_train_on_it(trained, models, coco, tmp_path):
    _, _, folder = trained
    values = {
        "backbone": {"checkpoint": str(folder)},
        "data": {"path": f"coco:{coco}"},
        "teachers": {"gen": {"id": str(models["gen"])}},
        "layers": "0",
        "controls": ["random"],
        "fit": {"epochs": 1, "batch_size": 6, "micro_batch": 3, "workers": 0},
    }
    recipe = validate(ProbeRunRecipe, values, "test")
    core = load_backbone(recipe.backbone, CPU).core
    own = [core, *(teacher.model for teacher in core.teachers.values())]
    weights = sum(4 * parameter.numel() for model in own for parameter in model.parameters())
    planned = plan_training(recipe)
    assert planned.work.parts["checkpoint"].memory == pytest.approx(weights, rel=1e-4)
    plain = plan_training(recipe.model_copy(update={"backbone": BackboneRecipe(checkpoint=str(models["llava"]))}))
    meta = load_backbone(recipe.backbone, torch.device("meta")).core
    image = Image.new("RGB", (64, 64))
    teachers = [trace(one.target, pixels=one.prepare([image])).flops for one in meta.teachers.values()]
    own, bare = (sum((plan.work.total.flops16, plan.work.total.flops32)) for plan in (planned, plain))
    assert own - bare > 0.99 * sum(teachers)
    run = train(recipe, tmp_path / "run")
    assert run.manifest["checkpoint"]["family"] == "llava_multi_encoder"


def test_conversations_with_several_images_are_skipped(trained, data, tmp_path):
    _, first, _ = trained
    turns = [{"from": "human", "value": "<image><image>\nSame?"}, {"from": "gpt", "value": "none"}]
    entries = json.loads((data / "data.json").read_text())
    entries.append({"id": "two", "image": ["1.png", "2.png"], "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    values = {
        "checkpoint": str(first),
        "stage": "ift",
        "data": {"conversations": str(tmp_path / "data.json"), "image_root": str(data)},
        "batch_size": 7,
        "micro_batch": 7,
        "workers": 0,
        "trainer": {"report_to": "none", "use_cpu": True},
    }
    run_stage(DistillRecipe.model_validate(values), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "training.json").read_text())["skipped"] == [
        "conversation 6 (id two): 2 images, and a multi-encoder model takes one"
    ]


def test_invalid_encoders_are_refused(trained, models, data, tmp_path):
    _, first, _ = trained
    encoders = {"mode": "token", "tokens": 5, "teachers": {"depth": {"id": str(models["depth"])}}}
    values = {
        "stage": "pt",
        "data": {"conversations": str(data / "data.json"), "image_root": str(data)},
        "batch_size": 3,
        "workers": 0,
        "trainer": {"report_to": "none", "use_cpu": True},
        "encoders": encoders,
    }
    with pytest.raises(UserError, match="does not divide the 16 tokens of the depth teacher"):
        run_stage(DistillRecipe.model_validate(values | {"checkpoint": str(models["llava"])}), tmp_path / "a")
    with pytest.raises(UserError, match="has several encoders already"):
        run_stage(DistillRecipe.model_validate(values | {"checkpoint": str(first)}), tmp_path / "b")
    with pytest.raises(ValueError, match="exclude each other"):
        embedding = {"teachers": encoders["teachers"], "layers": {"depth": "1"}}
        DistillRecipe.model_validate(values | {"checkpoint": "x", "embedding": embedding})
    assert not Path(tmp_path / "a").exists()


def test_generate_reads_the_teachers(trained, data):
    """Answers equal a loop over whole forward passes that computes the teachers' features first."""
    path = trained[2]
    recipe = BackboneRecipe(checkpoint=str(path), dtype="float32")
    backbone = load_backbone(recipe, CPU, with_head=True)
    questions = ["Which?", "Which number is it?"]
    answers = ask(backbone, recipe, images_of(data), questions, most=3)
    config, processor = load_config(str(path), "checkpoint"), backbone.prepare.processor
    model = load_model(str(path), config, CPU, dtype=torch.float32).eval()
    teachers = load_teachers(config, CPU)
    for image, question, answer in zip(images_of(data), questions, answers, strict=True):
        text = prompt(processor, recipe.model_copy(update={"prompt": question}))
        inputs = dict(processor(images=[image], text=[text], return_tensors="pt"))
        inputs.pop("token_type_ids", None)
        start = inputs["input_ids"].shape[1]
        inputs["teacher_features"] = {name: t.target(t.prepare([image])) for name, t in teachers.items()}
        for _ in range(3):
            with torch.no_grad():
                token = model(**inputs, use_cache=False).logits[:, -1:].argmax(-1)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if int(token) == processor.tokenizer.eos_token_id:
                break
        assert answer == processor.tokenizer.decode(inputs["input_ids"][0, start:], skip_special_tokens=True).strip()


def test_teacher_tokens_cannot_be_removed(trained):
    mode, _, folder = trained
    recipe = BackboneRecipe(checkpoint=str(folder), dtype="float32", special_tokens="off")
    if mode == "token":
        with pytest.raises(UserError, match="reads its teachers through special tokens"):
            load_backbone(recipe, CPU)
    else:
        load_backbone(recipe, CPU)


def test_changed_teacher_is_refused(trained, tmp_path):
    folder = shutil.copytree(trained[2], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["encoders"]["teachers"]["gen"]["sha256"] = "sha256:other"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the gen teacher .* is not the one this checkpoint was trained with"):
        load_backbone(BackboneRecipe(checkpoint=str(folder)), CPU)
