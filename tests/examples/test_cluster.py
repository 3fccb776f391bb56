"""Files of examples/cluster: accelerate and `probing` accept them, and the job resumes after it is stopped."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from click.testing import CliRunner

from probing.cli import cli
from probing.distillation.recipe import DistillRecipe
from probing.recipe import ProbeRunRecipe, dump_recipe, load_recipe
from tests.helpers import full_size

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "examples/cluster"
PLANS = re.findall(r"^probing plan (.*)$", (CLUSTER / "README.md").read_text(), re.MULTILINE)
STAND_INS = ["backbone.checkpoint=standins/ola", *(f"teachers.{t}.id=standins/{t}" for t in ("depth", "seg", "gen"))]


@pytest.mark.parametrize("file", sorted(CLUSTER.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_configurations(file):
    config = load_config_from_file(str(file))
    assert config.num_machines == (2 if "sixteen" in file.stem else 1)
    assert config.num_processes == {"one": 1, "two": 2, "eight": 8, "sixteen": 16}[file.stem.split("_")[0]]
    assert config.mixed_precision == "no"
    assert ("fsdp" in file.stem) == (config.distributed_type == "FSDP") == bool(config.fsdp_config)


@pytest.mark.parametrize("script", [CLUSTER / "job.sh", ROOT / "tests/slurm.sh"], ids=lambda script: script.stem)
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.parametrize("command", PLANS)
def test_recipes_of_the_page_are_valid_and_keep_their_batch(command):
    recipe, *rest = shlex.split(command)
    devices = int(rest[rest.index("--devices") + 1]) if "--devices" in rest else 1
    overrides = [word for word in rest if "=" in word]
    if "probe" in recipe:
        assert load_recipe(ProbeRunRecipe, ROOT / recipe, overrides).fit.batch_size == 256
        return
    stage = load_recipe(DistillRecipe, ROOT / recipe, overrides)
    micro, accumulated = stage.micro_batches(devices)
    assert micro * accumulated * devices == {"pt": 256, "ift": 128}[stage.stage]


def test_page_states_what_plan_prints(tmp_path, monkeypatch):
    """For few images: total work and time differ, work per image and memory do not."""
    full_size.ola(tmp_path / "standins/ola")
    full_size.teachers(tmp_path / "standins")
    full_size.coco(tmp_path / "data/coco", train2017=256, val2017=2)
    monkeypatch.chdir(tmp_path)
    recipe, *rest = shlex.split(PLANS[0])
    done = CliRunner().invoke(cli, ["plan", str(ROOT / recipe), *rest, *STAND_INS], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    page = (CLUSTER / "README.md").read_text()
    work, memory = re.search(r"^total +([\d.]+ TFLOP) .* ([\d.]+ GB) +[\d.]+ GB$", done.output, re.MULTILINE).groups()
    assert re.search(rf"^total +{work} .* {memory} +[\d.]+ GB$", page, re.MULTILINE), done.output


@pytest.mark.slow
def test_stopped_job_saves_and_requests_its_requeue(recipe_values, tmp_path):
    """Two processes; USR1 reaches everything, as SLURM sends it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/requests\necho localhost\n')
    (tools / "accelerate").write_text(f'#!/bin/bash\nshift\nexec {sys.executable} -m accelerate.commands.launch "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    recipe_values["fit"] |= {"epochs": 300, "save_minutes": 0, "workers": 1}
    recipe_values["teachers"] = {"gen": recipe_values["teachers"]["gen"]}
    (tmp_path / "recipe.yaml").write_text(dump_recipe(ProbeRunRecipe.model_validate(recipe_values)))
    env = dict(os.environ, PATH=f"{tools}:{os.environ['PATH']}", OMP_NUM_THREADS="1", SLURM_JOB_ID="7")
    command = ["bash", str(CLUSTER / "job.sh"), "two_cpus.yaml", "train"]
    command += ["--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]

    job = subprocess.Popen(
        command, env=env, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    while not (tmp_path / "run/state/none/state.pt").exists():
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGUSR1)
    said = job.communicate(timeout=120)[1]
    assert job.returncode == 130 and "interrupted; resume with the same" in said, said
    assert "requeue 7" in (tmp_path / "requests").read_text()
    assert not (tmp_path / "run/manifest.json").exists()
