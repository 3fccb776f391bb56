"""What a stage costs, told from shapes alone, against steps that were taken and sizes counted by hand."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from analysis.planning.distillation import stage_cost
from analysis.planning.probe_training import Devices
from probing.cli import cli
from probing.distillation.patch_alignment import attach_pairs
from probing.distillation.recipe import DistillRecipe
from probing.distillation.setup import open_start, put_together
from probing.distillation.teacher_targets import attach_targets
from probing.recipe import dump_recipe
from probing.toyworld.layout import write_world
from probing.utils.errors import UserError
from probing.utils.meta_device import count_flops
from tests.helpers import full_size


@pytest.fixture
def recipe(models, tmp_path):
    """Conversations of one length about COCO's images, so that every micro-batch is as wide."""
    coco = write_world(tmp_path / "coco", 8, 2, seed=0)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a red cube"}]
    names = sorted(f"train2017/{path.name}" for path in (coco / "train2017").iterdir())
    (tmp_path / "data.json").write_text(json.dumps([{"image": name, "conversations": turns} for name in names]))

    def make(**changes):
        data = {"conversations": str(tmp_path / "data.json"), "image_root": str(coco)}
        small = {"batch_size": 8, "micro_batch": 2, "trainer": {"report_to": "none", "use_cpu": True}}
        return DistillRecipe.model_validate(
            {"checkpoint": str(models["llava"]), "stage": "ift", "data": data} | small | changes
        )

    def losses(name):
        teachers = {teacher: {"id": str(models[teacher])} for teacher in ("gen", "depth", "seg")}
        return {
            "plain": {},
            "embedding": {"embedding": {"teachers": teachers, "layers": dict.fromkeys(teachers, "2"), "seek": 1}},
            "feature": {"encoders": {"mode": "feature", "teachers": teachers}},
            "token": {"encoders": {"mode": "token", "teachers": teachers, "tokens": 1}},
            "patches": {"patches": {"annotations": f"coco:{coco}", "coverage": 0.1}},
        }[name]

    make.losses = losses
    return make


@pytest.mark.parametrize("kind", ["plain", "embedding", "feature", "token", "patches"])
def test_a_step_takes_what_was_planned(recipe, kind):
    """Operations of a real step in float32, of three stages and every kind of loss; sizes of real parameters."""
    for stage in ("pt", "vpt", "ift"):
        wanted = recipe(stage=stage, **recipe.losses(kind))
        cost = stage_cost(wanted)
        parts = put_together(wanted, open_start(wanted), torch.device("cpu"))
        batch = parts.collate([parts.samples[index] for index in (0, 1)])
        trainee = parts.trainee.train()
        with count_flops() as flops:
            if parts.teachers:
                attach_targets([batch], parts.teachers, 1)
            if trainee.patches is not None:
                attach_pairs([batch], trainee.patches.least, torch.device("cpu"), 1)
            trainee(**batch, num_items_in_batch=torch.tensor(8))["loss"].backward()
        assert cost.flops == pytest.approx(flops() / 2, rel=0.01)
        assert cost.width == cost.widest == batch["labels"].shape[1]
        assert cost.weights == 4 * sum(p.numel() for p in trainee.parameters())
        assert cost.trained == sum(p.numel() for p in trainee.parameters() if p.requires_grad)
        assert (cost.steps, cost.conversations, cost.long) == (1, 8, cost.flops)


def test_processes_share_the_batch(recipe):
    one, two = (stage_cost(recipe(), processes) for processes in (1, 2))
    assert two.gradients == 2 * one.gradients and two.moments == one.moments
    assert (one.steps, one.flops) == (two.steps, two.flops)
    assert "FSDP leaves" in two.lines(Devices(2))[2] and "FSDP" not in one.lines(Devices())[2]
    with pytest.raises(UserError, match="not a multiple of micro_batch 2 times 3 processes"):
        stage_cost(recipe(), 3)


def test_bfloat16_and_checkpointing(recipe):
    """The one halves what is kept for the backward pass, the other runs the LLM's forward pass again."""
    plain, short, again = (stage_cost(recipe(**c)) for c in ({}, {"bf16": True}, {"gradient_checkpointing": True}))
    assert short.long == 0 and short.flops == plain.flops
    assert short.step < plain.step and again.step < plain.step and again.flops > plain.flops


def test_images_that_cannot_be_read_are_said(recipe):
    wanted = recipe()
    for image in Path(wanted.data.image_root, "train2017").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of 2 conversations could be used, first: train2017/.*"):
        stage_cost(wanted)


def test_on_the_command_line(recipe, tmp_path):
    (tmp_path / "stage.yaml").write_text(dump_recipe(recipe()))
    done = CliRunner().invoke(cli, ["plan", str(tmp_path / "stage.yaml"), "--devices", "2"], catch_exceptions=False)
    assert [line.split(":")[0] for line in done.output.splitlines()] == [
        f"training, {what}" for what in ("work", "time", "memory of a device", "disk")
    ]
    refused = CliRunner().invoke(cli, ["plan", str(tmp_path / "stage.yaml"), "--metric", "miou"])
    assert isinstance(refused.exception, UserError) and "leave out --metric" in str(refused.exception)


@pytest.mark.slow
def test_llama_3_without_weights(tmp_path):
    """By hand: the LLM forward, again, and back to its inputs; attention's products on top; the tower forward."""
    full_size.llava(tmp_path / "llava")
    file = full_size.conversations(tmp_path / "data/pt.json", 64, rounds=(1, 1), words=(12, 12))
    data = {"conversations": str(file), "image_root": str(file.parent)}
    values = {"checkpoint": str(tmp_path / "llava"), "stage": "pt", "data": data, "batch_size": 16}
    cost = stage_cost(DistillRecipe.model_validate(values | {"bf16": True, "gradient_checkpointing": True}))
    llm, head, tower = 6.98e9, 128256 * 4096, 0.303e9
    attention = 32 * 4096 * cost.width * 4  # of one token, both products, nothing left out for being later
    last = 32 * 14336 * 4096  # of a block, which is not run again: nothing behind it needs what it gives
    by_hand = (
        cost.width * ((2 * llm + attention) * 2 + 2 * llm + 2.5 * attention + 2 * 2 * head - 2 * last) + 577 * 2 * tower
    )
    assert cost.flops == pytest.approx(by_hand, rel=0.02)
    assert cost.weights == pytest.approx(4 * (llm + 2 * head + tower + 0.021e9), rel=0.005)
