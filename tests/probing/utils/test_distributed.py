"""Process groups: joining, dead ranks, and training over two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from probing.recipe import ProbeRunRecipe, dump_recipe
from probing.training.run import train
from probing.training.schedule import plan_steps
from probing.training.state_files import StateFiles
from probing.training.trainer import ProbeTrainer
from probing.utils.distributed import (
    DEAD_RANK_MESSAGES,
    has_gpu,
    init_accelerator,
    report_dead_ranks,
    require_single_process,
)
from probing.utils.errors import UserError
from tests.helpers import tiny, warm

ROOT = Path(__file__).parents[3]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
SAY = """
import sys, torch
from probing.utils.distributed import init_accelerator
accelerator = init_accelerator()
total = accelerator.reduce(torch.ones(1, device=accelerator.device), "sum")
sys.stdout.write(f"process {accelerator.process_index} of {int(total)}\\n")
"""


def test_processes_join_without_gpu(tmp_path):
    """Without `ACCELERATE_USE_CPU`, which `accelerate launch` sets only for a single process."""
    (tmp_path / "say.py").write_text(SAY)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*LAUNCH, str(tmp_path / "say.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["process 0 of 2", "process 1 of 2"]


def test_process_that_joins_no_group_is_refused(monkeypatch):
    init_accelerator()  # of this process, which nobody launched
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, and accelerate joins 1"):
        init_accelerator()


def test_single_process_commands_refuse_more(monkeypatch):
    assert require_single_process("evaluate").num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="probing evaluate runs as one process, and 2 were started"):
        require_single_process("evaluate")


def test_device_without_float64_is_not_used(monkeypatch):
    for kind, usable in (("mps", False), ("cuda", True)):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda kind=kind: torch.device(kind))
        assert has_gpu() == usable


@pytest.mark.parametrize("message", [f"[gloo/transport/tcp/pair.cc:547] {part}" for part in DEAD_RANK_MESSAGES])
def test_dead_rank_is_a_user_error(monkeypatch, message):
    with pytest.raises(RuntimeError, match="gloo"), report_dead_ranks():
        raise RuntimeError(message)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="another process of this run ended"), report_dead_ranks():
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="shapes"), report_dead_ranks():
        raise RuntimeError("shapes do not fit")


def stop_second_process(at: int) -> None:
    """Signals the second process before a step, and lets it find the saved state late."""
    step, restore = ProbeTrainer.take_step, StateFiles.restore

    def stopped(self, state, *rest, **more):
        if state.step == at and self.accelerator.process_index == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, state, *rest, **more)

    def late(self, state):
        time.sleep(3 * self.accelerator.process_index)
        restore(self, state)

    ProbeTrainer.take_step, StateFiles.restore = stopped, late


def two_processes(folder, out, stop=-1, *overrides):
    """Runs `probing train` of the folder's recipe in two processes; the second is signalled before a step."""
    arguments = ["train", "--recipe", str(folder / "recipe.yaml"), "--out", str(folder / out), *overrides]
    log = folder / "log"
    return warm.finish(warm.launch(arguments, log, partial(stop_second_process, stop)), log)


@pytest.mark.slow
def test_spread_layers_give_the_bytes_of_one_process(recipe_values, tmp_path):
    """With all controls and two seeds, stopped after the first pass.

    A state that was saved otherwise, or by a process that was killed, is not mistaken for one.
    """
    recipe_values["fit"] |= {"epochs": 2, "save_minutes": 0, "seeds": [0, 1]}
    recipe_values["controls"] = ["shuffled", "random"]
    recipe = ProbeRunRecipe.model_validate(recipe_values)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    codes, said = two_processes(tmp_path, "spread", 2, "fit.spread=layers")
    assert codes == [130, 130]
    assert "saved the training state at step 3" in said and "interrupted; resume with the same" in said, said
    (tmp_path / "spread/state/none/state_1_of_2.9.pt").write_bytes(b"killed before the other had saved")
    codes, said = two_processes(tmp_path, "spread", -1, "fit.spread=images")
    assert "saved by another number of processes, or with another fit.spread" in said and 0 not in codes, said
    codes, said = two_processes(tmp_path, "spread", -1, "fit.spread=layers")
    assert codes == [0, 0] and "resuming from step 3" in said, said
    one = train(recipe, tmp_path / "one")
    files = [f.relative_to(one.path) for f in one.path.rglob("*") if f.suffix in (".safetensors", ".csv")]
    assert len(files) > 15
    for file in files:
        assert (tmp_path / "spread" / file).read_bytes() == (one.path / file).read_bytes(), file
    manifests = [json.loads((tmp_path / out / "manifest.json").read_text()) for out in ("spread", "one")]
    assert manifests[0]["convergence"] == manifests[1]["convergence"]


@pytest.mark.slow
def test_signal_to_one_process_stops_all_and_they_resume(recipe_values, tmp_path):
    """In the first step, and in the last one, when nothing is left but the main process's work.

    The other one can read no image until the first state is saved, and is late to look at it.
    """
    data = tiny.coco(tmp_path / "coco")
    recipe_values["data"] = {"path": f"coco:{data}"}
    recipe_values["fit"] |= {"epochs": 4, "save_minutes": 0}
    del recipe_values["teachers"]["seg"]
    recipe = ProbeRunRecipe.model_validate(recipe_values)
    names = sorted(file.name for file in (data / "train2017").iterdir())
    for micro in plan_steps(len(names), recipe.fit, 1, 2)[0].micros:
        for index in micro:
            (data / "train2017" / names[index]).write_bytes(b"broken")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))

    codes, said = two_processes(tmp_path, "whole")
    assert codes == [0, 0], said
    for stop in (0, 7):
        codes, said = two_processes(tmp_path, "cut", stop)
        assert codes == [130, 130] and f"saved the training state at step {stop + 1}" in said, said
        assert "interrupted; resume with the same" in said and "Traceback (most recent" not in said, said
    codes, said = two_processes(tmp_path, "cut")
    assert codes == [0, 0], said
    for file in ("probes/depth/model.safetensors", "ridge/gen/model.safetensors", "mean_targets.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    manifests = [json.loads((tmp_path / out / "manifest.json").read_text()) for out in ("whole", "cut")]
    assert manifests[0]["convergence"] == manifests[1]["convergence"]
    assert len(manifests[0]["skipped"]) == 3

    train(recipe, tmp_path / "one")
    one = json.loads((tmp_path / "one" / "manifest.json").read_text())
    for found, expected in zip(manifests[0]["convergence"], one["convergence"], strict=True):
        assert found["mean_loss"] == pytest.approx(expected["mean_loss"], rel=1e-5)
    means = [load_file(tmp_path / out / "mean_targets.safetensors") for out in ("whole", "one")]
    assert all((means[0][name] - means[1][name]).abs().max() < 1e-6 for name in means[1])
