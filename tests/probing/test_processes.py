"""Processes that were started together work together, or say that they cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from probing.errors import UserError
from probing.processes import alone, together

ROOT = Path(__file__).parents[2]
SAY = """
import sys, torch
from probing.processes import together
place = together()
sum = place.reduce(torch.ones(1, device=place.device), "sum")
sys.stdout.write(f"process {place.process_index} of {int(sum)}\\n")
"""


def test_a_launcher_need_not_say_that_there_is_no_gpu(tmp_path):
    """Accelerate's variable for it is set by `accelerate launch` for a single process alone."""
    (tmp_path / "say.py").write_text(SAY)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run([*command, str(tmp_path / "say.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["process 0 of 2", "process 1 of 2"]


def test_one_that_finds_itself_alone_touches_nothing(monkeypatch):
    together()  # of this process, which nobody launched
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, and accelerate joins 1"):
        together()


def test_commands_that_are_one_process_refuse_more(monkeypatch):
    assert alone("evaluate").num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="probing evaluate runs as one process, and 2 were started"):
        alone("evaluate")
