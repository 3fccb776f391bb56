"""Every long verb ends, whatever stops it: with its traceback, or with the command that resumes it."""

import atexit
import importlib
import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
import yaml

from probing.cli import main
from probing.toyworld.cvbench import write_cvbench
from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS
from probing.toyworld.scenes import generate
from tests.helpers import tiny
from tests.probing.runs.test_kill import PRELOAD

ROOT = Path(__file__).parents[3]
STAGES = {
    "demo": ("probing.toyworld.demo.write_world", "probing.training.trainer.Fit.micro_batch"),
    "train": (
        "probing.training.run.load_teachers",
        "probing.training.trainer.Fit.micro_batch",
        "probing.training.run.write_manifest",
    ),
    "evaluate": (
        "analysis.evaluation.run.load_teachers",
        "analysis.evaluation.forward_pass.ProbePass.__call__",
        "analysis.evaluation.run.write_results",
    ),
    "align": (
        "analysis.alignment.run.load_backbone",
        "analysis.alignment.forward_pass.MeasurePass.__call__",
        "analysis.alignment.run.write_pictures",
    ),
    "bench": (
        "analysis.benchmarks.run.load_backbone",
        "analysis.benchmarks.run.ask",
        "analysis.benchmarks.run.write_rows",
    ),
    "distill": (
        "probing.distillation.trainer.build_stage",
        "transformers.Trainer.training_step",
        "probing.distillation.saving.save_checkpoint",
    ),
    "import": (
        "probing.hub.import_probes.load_teachers",
        "probing.teachers.base.Teacher.target",
        "probing.hub.import_probes.write_manifest",
    ),
    "report": ("reports.page.load_runs", "reports.page.write_text"),
}
"""Functions of each verb that run before, in and after its loop, where it has one; a demo's end takes too long."""


def command(arguments: list[str], log: Path, where: str, fault: str) -> None:
    """Runs `probing …` as a process of its own, whose function `where` raises, or signals the whole group."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    multiprocessing.set_start_method("fork", force=True)  # of workers: the fork server would import everything again
    torch.set_num_threads(1)
    demo = importlib.import_module("probing.toyworld.demo")
    demo.TRAIN_SCENES = demo.VAL_SCENES = demo.ASKED_SCENES = 8
    if where:
        *path, name = where.split(".")
        owner = path.pop() if path[-1][0].isupper() or path[-1].startswith("_") else None
        module = importlib.import_module(".".join(path))
        place = getattr(module, owner) if owner else module
        function = getattr(place, name)

        def stopped(*args: object, **kwargs: object) -> object:
            setattr(place, name, function)
            if fault == "error":
                raise EOFError("injected")
            os.killpg(0, getattr(signal, fault))
            return function(*args, **kwargs)

        setattr(place, name, stopped)
    sys.argv = ["probing", *arguments]
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # as the interpreter does, and a forked process does not


@pytest.fixture(scope="module")
def warm() -> Iterator[ForkServerContext]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(ROOT)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, "probing.toyworld.demo", "probing.hub.import_probes"])
        yield context


@pytest.fixture(scope="module")
def run(warm, tmp_path_factory):
    """Runs a command, with a fault; returns exit code and output."""
    log = tmp_path_factory.mktemp("log") / "log.txt"

    def run(arguments: list[object], where: str = "", fault: str = "") -> tuple[int | None, str]:
        process = warm.Process(target=command, args=(list(map(str, arguments)), log, where, fault))
        process.start()
        process.join(120)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            pytest.fail(f"hangs: {log.read_text()}")
        return process.exitcode, log.read_text()

    return run


@pytest.fixture(scope="module")
def verbs(run, models, tmp_path_factory) -> dict[str, list[object]]:
    """A command of each verb, with data-loading workers, and a blank in its paths."""
    root = tmp_path_factory.mktemp("a b")
    coco, world = tiny.coco(root / "coco", train=6, val=4), write_world(root / "world", 2, 4, seed=4)
    depth = f"--teacher=depth={models['depth']}"
    small = ["fit.epochs=1", "fit.batch_size=3", "fit.micro_batch=3", "fit.workers=1", "controls=[]"]
    train = ["train", "--checkpoint", models["llava"], f"--data=coco:{coco}", depth, "--layers", "0", *small, "--out"]
    assert run([*train, root / "run"])[0] == 0
    data = tiny.conversations(root / "data", 4)
    stage = {
        "checkpoint": str(models["llava"]), "stage": "pt", "batch_size": 2, "micro_batch": 2, "workers": 1,
        "data": {"conversations": str(data / "data.json"), "image_root": str(data)},
        "embedding": {"teachers": {"depth": {"id": str(models["depth"])}}, "layers": {"depth": "2"}, "seek": 4},
        "trainer": {"report_to": "none", "use_cpu": True},
    }  # fmt: skip
    (root / "pt.yaml").write_text(yaml.safe_dump(stage))
    code, said = run(["distill", root / "pt.yaml", "--out", root / "pt"])
    assert code == 0, said
    code, said = run(["evaluate", root / "run"])
    assert code == 0, said
    questions = write_cvbench(root / "questions", generate(2, 3), 3)
    align = ["align", models["llava"], f"--data=coco:{world}", "--layers=0", "micro_batch=2", "workers=1", "sample=2"]
    bench = ["bench", ASSETS / "llava", "--benchmark", "cvbench", "--data", questions, "max_new_tokens=1"]
    imported = ["import", root / "pt", root / "imported", f"--data=coco:{coco}", "fit.workers=1", "fit.micro_batch=2"]
    return {
        "demo": ["demo", "--out", root / "demo"],
        "train": [*train, root / "new"],
        "evaluate": ["evaluate", root / "run", "--control", "blank"],
        "align": [*align, "--out", root / "align"],
        "bench": [*bench, "--out", root / "bench"],
        "distill": ["distill", root / "pt.yaml", "--out", root / "again"],
        "import": imported,
        "report": ["report", root / "run"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("verb", STAGES)
def test_every_verb_ends_and_resumes(run, verbs, verb):
    """An error, then a signal at each stage; then the printed command finishes the work."""
    where = STAGES[verb][1]
    code, said = run(verbs[verb], where, "error")
    assert code == 1 and "Traceback" in said and "EOFError: injected" in said, said
    resume = ""
    for number, where in enumerate(STAGES[verb]):
        fault = ("SIGTERM", "SIGINT")[number % 2]
        code, said = run(verbs[verb], where, fault)
        assert code == 130 and "Traceback" not in said, said
        (resume,) = (line for line in said.splitlines() if line.startswith("interrupted; resume with: "))
    if verb == "demo":
        return
    _, *arguments = shlex.split(resume.removeprefix("interrupted; resume with: "))
    code, said = run(arguments)
    assert code == 0, said
