"""Everything inside a micro-batch on the meta device.

There torch raises where a tensor was left on the CPU, at `item` and at boolean indexing: all that crashes or waits on a
GPU.
"""

import pytest
import torch

from probing.distillation.losses import EmbeddingLoss
from probing.distillation.predictors import EmbeddingPredictors, Task
from probing.distillation.recipe import EmbeddingRecipe
from probing.models.base import Backbone
from probing.teachers import depth
from probing.training.buffer import ActivationBuffer
from probing.training.schedule import plan_steps
from tests.helpers.trainer import make_trainer

META = torch.device("meta")
LAYERS = [0, 2, "final"]


@pytest.fixture
def trainer(recipe_values, tmp_path):
    return make_trainer(recipe_values, tmp_path, LAYERS, ["none", "shuffled"], META)


@pytest.fixture
def prepared(trainer):
    return next(trainer.batches(plan_steps(12, trainer.recipe.fit)[:1]))


@pytest.mark.parametrize("key_kinds", [["image", "text"], ["system", "image", "text"]])
def test_backbone_and_probes_never_wait_for_the_device(trainer, prepared, monkeypatch, key_kinds):
    # transformers waits once per forward pass each to count image tokens and to look for padding, before block 1.
    monkeypatch.setattr("transformers.models.llava.modeling_llava.torch_compilable_check", lambda *_: None)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda **_: None)
    trainer.recipe.probe.keys = key_kinds
    state = trainer.initial_state()
    columns = {column: index for index, column in enumerate(state.columns)}
    buffer = ActivationBuffer(LAYERS, META)
    for name, teacher in trainer.teachers.items():
        state.prequential.means[name] = torch.empty(teacher.shape, device=META)
        for layer in map(str, LAYERS):
            weight = torch.empty(teacher.shape[1], trainer.backbone.hidden_size, device=META)
            state.prequential.maps[name, layer, ""] = weight, weight[:, 0]
    trainer.micro_batch(state, prepared, 0.5, True, columns, buffer)
    assert len(state.prequential.errors) == 2 * 3 + 3 * 9  # of two constants, and of three probes at each layer
    assert set(state.ridge) == {(teacher.grid, layer) for teacher in trainer.teachers.values() for layer in LAYERS}

    def no_forward_pass(*_):
        raise AssertionError

    monkeypatch.setattr(Backbone, "stream", no_forward_pass)
    totals = trainer.micro_batch(state, buffer.prepared(prepared.indices), 0.5, False, columns, buffer)
    assert totals.sums.is_meta and all(p.grad is not None for own in state.parameters for p in own)


def test_depth_decoder_never_waits_for_the_device(trainer, prepared):
    """OneFormer's decoder looks for empty masks in every layer, so that decoding segmentations waits."""
    teacher = trainer.teachers["depth"]
    assert depth.decode(teacher, teacher.target(prepared.pixels["depth"].to(META))).is_meta


def test_embedding_losses_never_wait_for_the_device(trainer, prepared):
    tasks = [Task(name, (1, 2), 0.5, teacher.shape) for name, teacher in trainer.teachers.items()]
    recipe = EmbeddingRecipe(teachers={task.name: {"id": "x"} for task in tasks}, seek=0)
    loss = EmbeddingLoss(EmbeddingPredictors(tasks, 32, recipe), trainer.teachers, 0.3, 4, {}).to(META)
    ids = torch.full((3, 20), 4)
    batch = {"target_rows": torch.arange(3), "teacher_pixels": {n: p.to(META) for n, p in prepared.pixels.items()}}
    batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    loss.prepare([batch], META, world=1)  # once per step; may wait
    batch["targets"] |= {name: batch["targets"][name].to(META) for name in ("rows", "positive")}
    losses = loss.loss({layer: torch.empty(3, 20, 32, device=META) for layer in (1, 2)}, batch)
    assert len(losses) == 12 and all(value.is_meta for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
