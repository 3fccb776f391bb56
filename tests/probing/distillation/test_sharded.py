"""Stages whose weights, gradients and moments are sharded over two processes."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, DistributedType, PartialState
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Trainer

from probing.distillation.recipe import DistillRecipe
from probing.distillation.trainer import run_stage
from probing.recipe import dump_recipe
from probing.utils.errors import UserError
from tests.helpers import tiny, warm

pytestmark = pytest.mark.slow
CLUSTER = Path(__file__).parents[3] / "examples/cluster"


def fsdp() -> dict[str, str]:
    """The variables that `accelerate launch` sets for the configuration of examples/cluster."""
    values = yaml.safe_load((CLUSTER / "eight_gpus_fsdp.yaml").read_text())["fsdp_config"]
    values["fsdp_transformer_cls_to_wrap"] = values.pop("fsdp_transformer_layer_cls_to_wrap")
    texts = {
        name.upper(): str(value).lower() if value in (True, False) else str(value) for name, value in values.items()
    }
    return {"ACCELERATE_USE_FSDP": "true"} | texts


def prepare_process(variables: dict[str, str], stop: int) -> None:
    """Sets variables, and signals the second process before a micro-batch.

    FSDP2 and DeepSpeed work on CPUs; accelerate selects them for other devices only.
    """
    os.environ.update(variables)
    init, step, calls = AcceleratorState.__init__, Trainer.training_step, []

    def sharded(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if plugin := kwargs.get("fsdp_plugin"):
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
        if plugin := kwargs.get("deepspeed_plugin"):
            self.distributed_type, self.deepspeed_plugins = DistributedType.DEEPSPEED, plugin
            plugin.set_mixed_precision("no")
            plugin.select(_from_accelerator_state=True)
        PartialState._shared_state["distributed_type"] = self.distributed_type

    def stopped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == stop and self.args.process_index == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **kwargs)

    AcceleratorState.__init__, Trainer.training_step = sharded, stopped


@pytest.fixture
def recipe(models, tmp_path):
    data = tiny.conversations(tmp_path / "data", 16)

    def make(stage, **changes):
        return DistillRecipe.model_validate({
            "checkpoint": str(models["llava"]), "stage": stage, "lr": 1e-3, "workers": 0,
            "data": {"conversations": str(data / "data.json"), "image_root": str(data)},
            "batch_size": 4, "micro_batch": 1, "trainer": {"report_to": "none", "logging_steps": 1}, **changes,
        })  # fmt: skip

    return make


def deepspeed(stage: int) -> dict[str, dict]:
    """Fields of a recipe for DeepSpeed with a stage of ZeRO."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    return {"deepspeed": zero | dict.fromkeys(names, "auto")}


@pytest.mark.parametrize("stage", ["vpt", "ift"])
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_sharded_stage_equals_one_process(recipe, models, tmp_path, stage, engine):
    """Losses and gradients of every step to 1e-4, though it was stopped in the second of four and resumed."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    embedding = {"teachers": {"gen": {"id": str(models["gen"])}}, "layers": {"gen": "2"}, "seek": 2, "heads": 2}
    same = recipe(stage, **({"embedding": embedding} if stage == "vpt" else {}))
    run_stage(same, tmp_path / "one")
    variables, state = (fsdp(), "pytorch_model_fsdp_0") if engine == "fsdp" else ({}, "global_step2")
    sharded = same.model_copy(update={"trainer": same.trainer | deepspeed(1)}) if engine == "deepspeed" else same
    (tmp_path / "recipe.yaml").write_text(dump_recipe(sharded))
    for stop, code in ((4, 130), (0, 0)):
        log = tmp_path / f"log{code}"
        command = ["distill", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "two")]
        codes, said = warm.finish(warm.launch(command, log, partial(prepare_process, variables, stop)), log)
        assert codes == [code, code], said
        assert (tmp_path / "two.training/checkpoint-2" / state).exists() == (code == 130)
    one, two = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two"))
    for first, second in zip(one["log"], two["log"], strict=True):
        for name in (name for name in first if name.startswith("loss") or name == "grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-4), name
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all((one[name] - two[name]).abs().max() < 1e-4 for name in one)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.lm_head.weight, two["language_model.lm_head.weight"])


@pytest.mark.parametrize("zero", [2, 3])
def test_other_stages_of_zero_are_refused(recipe, tmp_path, zero):
    pytest.importorskip("deepspeed")
    with pytest.raises(UserError, match=f"ZeRO stage {zero} .*; set zero_optimization.stage to 1, or use FSDP"):
        run_stage(recipe("ift", trainer=deepspeed(zero)), tmp_path / "out")
