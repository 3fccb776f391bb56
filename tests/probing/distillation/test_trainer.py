import datetime
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

from probing.data.conversations import ConversationDataset, Encoder, collate, read_conversations
from probing.distillation.model import DistillationModel
from probing.distillation.recipe import DistillRecipe
from probing.distillation.trainer import LossLog, run_stage
from probing.models import describe_checkpoint
from probing.recipe import BackboneRecipe
from probing.runs import recorded_inputs
from probing.utils.errors import UserError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


@pytest.fixture
def data(tmp_path):
    """Twelve conversations about images of one colour, one of them without an image."""
    root = tmp_path / "images"
    root.mkdir()
    entries = []
    for index, (name, colour) in enumerate(list(COLOURS.items()) * 3):
        Image.new("RGB", (40, 30), colour).save(root / f"{index}.png")
        question = {"from": "human", "value": "<image>\nWhich colour?" if index else "Which colour?"}
        entry = {"id": str(index), "conversations": [question, {"from": "gpt", "value": f"It is {name}"}]}
        entries.append(entry | ({"image": f"{index}.png"} if index else {}))
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return {"conversations": str(tmp_path / "data.json"), "image_root": str(root)}


@pytest.fixture
def recipe(models, data):
    def make(**changes):
        small = {
            "batch_size": 4,
            "micro_batch": 2,
            "workers": 0,
            "lr": 1e-3,
            "trainer": {"report_to": "none", "use_cpu": True},
        }
        values = {"checkpoint": str(models["llava"]), "stage": "ift", "data": data} | small | changes
        return DistillRecipe.model_validate(values)

    return make


@pytest.mark.parametrize(
    ("stage", "moving"), [("pt", {"multi_modal_projector"}), ("ift", {"multi_modal_projector", "language_model"})]
)
def test_stage_trains_only_its_parts(models, recipe, tmp_path, stage, moving):
    run_stage(recipe(stage=stage, max_steps=2), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (models["llava"], tmp_path / "out"))
    assert before.keys() == after.keys()
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    moved = {p for name in before if not torch.equal(before[name], after[name]) for p in parts if p in name}
    assert moved == moving
    assert describe_checkpoint(BackboneRecipe(checkpoint=str(tmp_path / "out")))["llm"]["layers"] == 3


@pytest.mark.parametrize("stage", ["pt", "ift"])
def test_saved_checkpoint_equals_trained_model(recipe, data, tmp_path, monkeypatch, stage):
    built, init = [], DistillationModel.__init__
    monkeypatch.setattr(DistillationModel, "__init__", lambda self, *a: (init(self, *a), built.append(self))[0])
    run_stage(recipe(stage=stage), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    (conversation,) = read_conversations(Path(data["conversations"]), limit=2)[1:]
    with Image.open(Path(data["image_root"]) / "1.png") as image:
        batch = collate([Encoder(processor, 3, 4096)(conversation, [image.convert("RGB")])], 2)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, built[0].model.eval()(**batch).logits)


def test_half_precision_checkpoint_trains_in_float32(models, recipe, tmp_path):
    shutil.copytree(models["llava"], tmp_path / "half")
    AutoModelForImageTextToText.from_pretrained(models["llava"], dtype=torch.float16).save_pretrained(tmp_path / "half")
    run_stage(recipe(checkpoint=str(tmp_path / "half"), lr=1e-6), tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "out"))
    name = next(name for name in before if "multi_modal_projector" in name and name.endswith("weight"))
    assert before[name].dtype == torch.float16 and after[name].dtype == torch.float32
    difference = (before[name].float() - after[name]).abs()
    assert 0 < difference.max() < 1e-5  # steps that float16 would have rounded away


def test_frozen_parts_stay_in_eval_mode_and_checkpointed(models):
    model = AutoModelForImageTextToText.from_pretrained(models["llava"])
    llm = model.model.language_model
    enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    trained = DistillationModel(model, "pt").train()
    layer = model.model.language_model.layers[0]
    assert layer.training and not layer.self_attn.training and model.model.multi_modal_projector.training
    assert not any(module.training for module in model.model.vision_tower.modules())
    assert DistillationModel(model, "ift").train().model.model.language_model.layers[0].self_attn.training
    assert not any(module.training for module in trained.eval().modules())


def test_gradient_checkpointing_changes_no_number(recipe, tmp_path, monkeypatch):
    seen = []
    forward = DistillationModel.forward

    def look(self, *args, **kwargs):
        hook = self.model.model.vision_tower.register_forward_hook(
            lambda *a: seen.append(a[2].last_hidden_state.requires_grad)
        )
        try:
            return forward(self, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(DistillationModel, "forward", look)
    for name, on in (("plain", False), ("saving", True)):
        run_stage(recipe(stage="pt", gradient_checkpointing=on), tmp_path / name)
    plain, saving = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "saving"))
    assert all(torch.allclose(plain[name], saving[name], atol=1e-6) for name in plain)
    assert seen and not any(seen)


def test_pt_trains_on_text_without_image(recipe, tmp_path):
    run_stage(recipe(stage="pt", batch_size=1, micro_batch=1), tmp_path / "out")  # the first conversation has no image
    assert json.loads((tmp_path / "out" / "training.json").read_text())["steps"] == 12


def test_loss_is_mean_over_supervised_tokens_of_batch(models, recipe, data, tmp_path):
    """One batch of twelve in micro-batches of four, against cross entropy summed sample by sample."""
    run_stage(
        recipe(
            batch_size=12,
            micro_batch=4,
            max_steps=1,
            trainer={"report_to": "none", "use_cpu": True, "logging_steps": 1},
        ),
        tmp_path / "out",
    )
    log = json.loads((tmp_path / "out" / "training.json").read_text())["log"]
    model = AutoModelForImageTextToText.from_pretrained(models["llava"]).eval()
    processor = AutoProcessor.from_pretrained(models["llava"])

    samples = ConversationDataset(
        read_conversations(Path(data["conversations"])), Path(data["image_root"]), Encoder(processor, 3, 4096)
    )
    total, count = 0.0, 0
    for index in range(len(samples)):
        batch = collate([samples[index]], 2)
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1]
        total += F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum").item()
        count += int((labels != -100).sum())
    assert log[0]["loss"] == pytest.approx(total / count, rel=1e-4)


def test_training_lowers_loss(recipe, tmp_path):
    run_stage(recipe(max_steps=25, lr=2e-2, batch_size=12, micro_batch=12), tmp_path / "out")
    losses = [
        row["loss"] for row in json.loads((tmp_path / "out" / "training.json").read_text())["log"] if "loss" in row
    ]
    assert losses[-1] < 0.35 * losses[0]


class Cut(Exception):
    pass


@pytest.fixture
def interrupted(monkeypatch):
    """Runs a stage and stops it hard before a micro-batch."""
    step = Trainer.training_step

    def run(recipe, out, after):
        calls = []

        def stop(self, *args, **kwargs):
            calls.append(1)
            if len(calls) > after:
                raise Cut
            return step(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(Cut):
            patch.setattr(Trainer, "training_step", stop)
            run_stage(recipe, out)

    return run


def test_interrupted_stage_resumes_to_same_weights(recipe, tmp_path, interrupted):
    same = recipe(max_steps=8, save_steps=3)
    run_stage(same, tmp_path / "whole")
    interrupted(same, tmp_path / "cut", after=10)  # two micro-batches a step: in the sixth, after the third's state
    assert (tmp_path / "cut.training" / "checkpoint-3").exists() and not (tmp_path / "cut").exists()
    run_stage(same, tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not (tmp_path / "cut.training").exists()


def test_stage_killed_while_saving_takes_no_further_step(recipe, tmp_path, monkeypatch):
    """At a constant rate, so that one step more would show."""
    same = recipe(max_steps=2, save_steps=1, trainer={"use_cpu": True, "lr_scheduler_type": "constant"})
    run_stage(same, tmp_path / "whole")

    def die(*args):
        raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr("probing.distillation.saving.save_checkpoint", die)
        run_stage(same, tmp_path / "cut")
    run_stage(same, tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "cut")]
    assert records[0]["steps"] == records[1]["steps"] == 2
    assert records[0]["final_loss"] == records[1]["final_loss"]


def test_ctrl_c_saves_the_current_step(recipe, tmp_path, monkeypatch):
    same = recipe(max_steps=8, save_steps=1000)
    run_stage(same, tmp_path / "whole")
    step, calls = Trainer.training_step, []

    def press(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 9:  # two micro-batches a step: in the fifth step
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", press)
        run_stage(same, tmp_path / "cut")
    assert len(calls) == 10 and (tmp_path / "cut.training" / "checkpoint-5").exists()
    run_stage(same, tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


class Payload:
    """Makes a file when it is unpickled by anything that runs code."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickled_code_in_saved_state_is_refused(recipe, tmp_path, interrupted, name):
    same = recipe(max_steps=3, save_steps=1)
    interrupted(same, tmp_path / "out", after=2)
    torch.save({"state": Payload(tmp_path / "it ran")}, tmp_path / "out.training" / "checkpoint-1" / name)
    with pytest.raises(UserError, match=r"may run code; remove .*out\.training"):
        run_stage(same, tmp_path / "out")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_unreadable_images_are_skipped_and_named(recipe, data, tmp_path, micro_batch, interrupted):
    (Path(data["image_root"]) / "3.png").write_bytes(b"broken")
    (Path(data["image_root"]) / "5.png").unlink()
    same = recipe(micro_batch=micro_batch, save_steps=1)
    interrupted(same, tmp_path / "out", after=8 // micro_batch)  # those of the first two steps are not read again
    run_stage(same, tmp_path / "out")
    skipped = json.loads((tmp_path / "out" / "training.json").read_text())["skipped"]
    assert [name.split(":")[0] for name in skipped] == ["3.png", "5.png"]


def test_batch_without_readable_image_has_zero_loss(recipe, data, tmp_path):
    (Path(data["image_root"]) / "3.png").write_bytes(b"broken")
    every = {"report_to": "none", "use_cpu": True, "logging_steps": 1}
    run_stage(recipe(batch_size=1, micro_batch=1, trainer=every), tmp_path / "out")
    log = json.loads((tmp_path / "out" / "training.json").read_text())["log"]
    assert sorted(row["loss"] for row in log if "loss" in row)[:2] == [0, pytest.approx(5.5, abs=1)]
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())


def test_loss_of_empty_batch_is_zero(models):
    model = DistillationModel(AutoModelForImageTextToText.from_pretrained(models["llava"]), "ift")
    nothing = collate([{"skipped": "x.png: missing"}], pad_id=2)
    del nothing["skipped"], nothing["names"]
    assert model(**nothing, num_items_in_batch=torch.tensor(0))["loss"] == 0


def test_data_without_answers_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match="nothing to learn from"):
        run_stage(recipe(max_length=12), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_weights_are_saved_once_and_resume(models, recipe, tmp_path, interrupted):
    shutil.copytree(models["llava"], tmp_path / "tied")
    model = AutoModelForImageTextToText.from_pretrained(models["llava"])
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    same = recipe(checkpoint=str(tmp_path / "tied"), save_steps=1)
    run_stage(same, tmp_path / "whole")
    interrupted(same, tmp_path / "cut", after=4)
    run_stage(same, tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert not any("lm_head" in name for name in whole) and all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "/nowhere"}, "no such checkpoint"),
        ({"trainer": {"loging_steps": 1}}, "did you mean 'logging_steps'"),
        ({"trainer": {"learning_rate": 1.0}}, "set lr instead"),
        ({"trainer": {"report_to": "nosuchtracker", "use_cpu": True}}, "not installed"),
        ({"trainer": {"lr_scheduler_type": "cosinus", "use_cpu": True}}, "the Trainer refuses the recipe: cosinus"),
        ({"batch_size": 5, "micro_batch": 2}, "not a multiple"),
        ({"data": {"conversations": "/nowhere.json", "image_root": "/"}}, "no conversation file"),
    ],
)
def test_bad_recipes(recipe, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_stage(recipe(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refused_recipe_is_unchanged_and_blocks_nothing(recipe, tmp_path):
    sharded = recipe(trainer={"report_to": "none", "use_cpu": True, "fsdp": True, "fsdp_config": {"version": 2}})
    before = sharded.model_copy(deep=True)
    with pytest.raises(UserError, match="fsdp only works in distributed training"):
        run_stage(sharded, tmp_path / "out")
    assert sharded == before  # transformers fills in fsdp_config in place
    run_stage(recipe(max_steps=1), tmp_path / "out")


def test_finished_stage_stays_and_refuses_other_recipe(recipe, tmp_path, caplog):
    run_stage(recipe(max_steps=1), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    run_stage(recipe(max_steps=1), tmp_path / "out")
    assert "is finished already" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    run_stage(recipe(max_steps=1, save_steps=7), tmp_path / "out")  # moves no number
    with pytest.raises(UserError, match=r"another recipe \(max_steps is 1 there and 2 here\)"):
        run_stage(recipe(max_steps=2), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        run_stage(recipe(), tmp_path / "mine")


def test_stage_does_not_resume_with_changed_inputs(models, recipe, data, tmp_path, interrupted):
    shutil.copytree(models["llava"], tmp_path / "llava")
    same = recipe(checkpoint=str(tmp_path / "llava"), max_steps=4, save_steps=1)
    interrupted(same, tmp_path / "out", after=5)
    template = tmp_path / "llava" / "chat_template.jinja"
    whole = template.read_text()
    template.write_text(whole.replace("USER: ", "HUMAN: "))
    with pytest.raises(UserError, match=r"^the chat template changed since"):
        run_stage(same, tmp_path / "out")
    template.write_text(whole)
    file = Path(data["conversations"])
    text = file.read_text()
    file.write_text(text.replace("It is", "That is"))
    with pytest.raises(UserError, match=r"^the conversations changed since"):
        run_stage(same, tmp_path / "out")
    file.write_text(json.dumps(json.loads(text), indent=3))
    run_stage(same, tmp_path / "out")


def test_stage_over_midnight_renders_its_first_date(models, recipe, tmp_path, interrupted, monkeypatch):
    shutil.copytree(models["llava"], tmp_path / "llava")
    template = tmp_path / "llava" / "chat_template.jinja"
    template.write_text("{{ 'On ' + strftime_now('%d %B %Y') + '. ' }}" + template.read_text())
    same = recipe(checkpoint=str(tmp_path / "llava"), max_steps=4, save_steps=1)
    first, second = datetime.datetime(2030, 12, 31), datetime.datetime(2031, 1, 1)
    monkeypatch.setattr(recorded_inputs, "_now", lambda: first)
    run_stage(same, tmp_path / "whole")
    interrupted(same, tmp_path / "cut", after=5)
    monkeypatch.setattr(recorded_inputs, "_now", lambda: second)
    run_stage(same, tmp_path / "cut")
    run_stage(same, tmp_path / "later")
    whole, cut, later = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "cut", "later"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not all(torch.equal(whole[name], later[name]) for name in whole)


@pytest.mark.parametrize(
    ("values", "norm", "message"),
    [
        ((1.0, 2.0), 3.0, ""),
        ((1.0, math.nan), 3.0, "the loss next_token of c, d"),
        ((math.inf, 1.0), 3.0, "the loss next_token of a, b"),
        ((1.0, 2.0), math.inf, "the gradient of a, b, c, d"),
        ((1.0, 2.0), math.nan, "the gradient of a, b, c, d"),
    ],
)
def test_loss_log_names_samples_that_are_not_finite(values, norm, message):
    log = LossLog()
    for names, value in zip((["a", "b"], ["c", "d"]), values, strict=True):
        log.add(names, {"next_token": torch.tensor(value)})
    assert log.not_finite(norm) == message


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_stage_stops_before_step_that_is_not_finite(recipe, tmp_path, monkeypatch, what):
    """In its second step, by one sample of a loss, or by a gradient alone."""
    forward, calls = DistillationModel.forward, []

    def spoiled(self, *args, **kwargs):
        calls.append(1)
        output = forward(self, *args, **kwargs)
        if len(calls) == 2 and what == "loss":
            output["losses"]["next_token"] = torch.tensor(math.nan)
        if len(calls) == 2 and what == "gradient":
            parameter = next(p for p in self.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: gradient * math.inf)
        return output

    monkeypatch.setattr(DistillationModel, "forward", spoiled)
    with pytest.raises(UserError, match=f"the {what}.*of conversation .*is not finite at step 2"):
        run_stage(recipe(batch_size=1, micro_batch=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
