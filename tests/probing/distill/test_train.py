import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

from probing.backbones import describe_checkpoint
from probing.data.conversations import ConversationDataset, Encoder, collate, read_conversations
from probing.distill.recipe import DistillRecipe
from probing.distill.train import Trainee, run_stage
from probing.errors import UserError
from probing.recipe import BackboneRecipe, load_recipe

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
def test_each_stage_moves_its_own_parts(models, recipe, tmp_path, stage, moving):
    run_stage(recipe(stage=stage, epochs=2), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (models["llava"], tmp_path / "out"))
    assert before.keys() == after.keys()
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    moved = {p for name in before if not torch.equal(before[name], after[name]) for p in parts if p in name}
    assert moved == moving
    assert describe_checkpoint(BackboneRecipe(checkpoint=str(tmp_path / "out")))["llm"]["layers"] == 3


def test_the_loss_is_the_mean_over_all_supervised_tokens_of_the_batch(models, recipe, data, tmp_path):
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


def test_it_learns(recipe, tmp_path):
    run_stage(recipe(max_steps=60, lr=1e-2, batch_size=12, micro_batch=12), tmp_path / "out")
    losses = [
        row["loss"] for row in json.loads((tmp_path / "out" / "training.json").read_text())["log"] if "loss" in row
    ]
    assert losses[-1] < 0.35 * losses[0]


def test_an_interrupted_stage_goes_on_to_the_same_weights(recipe, tmp_path, monkeypatch):
    same = recipe(max_steps=8, save_steps=3)
    run_stage(same, tmp_path / "whole")
    step = Trainer.training_step
    calls = []

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 10:  # two micro-batches a step: in the sixth step, after the state of the third
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run_stage(same, tmp_path / "cut")
    monkeypatch.setattr(Trainer, "training_step", step)
    assert (tmp_path / "cut.training" / "checkpoint-3").exists() and not (tmp_path / "cut").exists()
    run_stage(same, tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not (tmp_path / "cut.training").exists()


def test_unreadable_images_are_named_and_the_rest_is_trained_on(recipe, data, tmp_path):

    (Path(data["image_root"]) / "3.png").write_bytes(b"broken")
    (Path(data["image_root"]) / "5.png").unlink()
    run_stage(recipe(), tmp_path / "out")
    skipped = json.loads((tmp_path / "out" / "training.json").read_text())["skipped"]
    assert [name.split(":")[0] for name in skipped] == ["3.png", "5.png"]


def test_tied_weights_can_be_saved(models):
    model = AutoModelForImageTextToText.from_pretrained(models["llava"])
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    pointers = [tensor.data_ptr() for tensor in Trainee(model, "ift").state_dict().values()]
    assert len(pointers) == len(set(pointers))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "/nowhere"}, "no such checkpoint"),
        ({"trainer": {"loging_steps": 1}}, "did you mean 'logging_steps'"),
        ({"batch_size": 5, "micro_batch": 2}, "not a multiple"),
        ({"data": {"conversations": "/nowhere.json", "image_root": "/"}}, "no conversation file"),
    ],
)
def test_bad_recipes(recipe, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_stage(recipe(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_finished_stage_is_kept_and_another_recipe_refused(recipe, tmp_path):
    run_stage(recipe(max_steps=1), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    run_stage(recipe(max_steps=1), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another recipe"):
        run_stage(recipe(max_steps=2), tmp_path / "out")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[3] / "examples" / "distill").glob("*.yaml")), ids=lambda p: p.name
)
def test_examples_are_valid(path):
    assert load_recipe(DistillRecipe, path).stage == path.stem
