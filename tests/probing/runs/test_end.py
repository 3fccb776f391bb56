"""Every long verb ends, whatever stops it: with its traceback, or with the command that resumes it.

`tests/probing/cli/test_cli.py` does the same to whole processes with data-loading workers.
"""

import importlib
import shlex
import signal

import pytest
import yaml

from probing.toyworld.cvbench import write_cvbench
from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS
from probing.toyworld.scenes import generate
from tests.helpers import tiny
from tests.helpers.cli import probing

STREAM = "probing.models.base.Backbone.stream"
STAGES = {
    "demo": ("probing.toyworld.demo.write_world", "probing.toyworld.demo.wait"),
    "train": ("probing.training.run.load_teachers", STREAM, "probing.training.run.write_manifest"),
    "evaluate": ("analysis.evaluation.context.EvaluationContext.load", STREAM, "analysis.evaluation.run.write_results"),
    "align": ("analysis.alignment.run.load_backbone", STREAM, "analysis.alignment.run.write_pictures"),
    "bench": (
        "analysis.benchmarks.run.load_backbone",
        "analysis.benchmarks.run.ask",
        "analysis.benchmarks.run.versions",
    ),
    "distill": (
        "transformers.Trainer.train",
        "transformers.Trainer.training_step",
        "transformers.PreTrainedModel.save_pretrained",
    ),
    "import": (
        "probing.hub.import_probes.load_teachers",
        "probing.teachers.base.Teacher.target",
        "probing.hub.import_probes.write_manifest",
    ),
    "report": ("reports.page.load_runs", "reports.page.write_text"),
}
"""Functions of each verb that run before, in and after its loop, where it has one; a demo's end takes too long."""


@pytest.fixture
def stop(monkeypatch):
    """Lets a function raise an error, or send this process a signal, the first time that it is called."""

    def stop(where, fault):
        *path, name = where.split(".")
        owner = path.pop() if path[-1][0].isupper() else None
        holder = importlib.import_module(".".join(path))
        holder = getattr(holder, owner) if owner else holder
        function = getattr(holder, name)

        def stopped(*args, **kwargs):
            monkeypatch.setattr(holder, name, function)
            if isinstance(fault, Exception):
                raise fault
            signal.raise_signal(fault)
            return function(*args, **kwargs)

        monkeypatch.setattr(holder, name, stopped)

    return stop


@pytest.fixture(scope="module")
def verbs(models, tmp_path_factory) -> dict[str, list[object]]:
    """A command of each verb, with a blank in its paths."""
    root = tmp_path_factory.mktemp("a b")
    coco, world = tiny.coco(root / "coco", train=6, val=4), write_world(root / "world", 2, 4, seed=4)
    depth = f"--teacher=depth={models['depth']}"
    small = ["fit.epochs=1", "fit.batch_size=3", "fit.micro_batch=3", "fit.workers=0", "controls=[]"]
    train = ["train", "--checkpoint", models["llava"], f"--data=coco:{coco}", depth, "--layers", "0", *small, "--out"]
    data = tiny.conversations(root / "data", 4)
    stage = {
        "checkpoint": str(models["llava"]), "stage": "pt", "batch_size": 2, "micro_batch": 2, "workers": 0,
        "data": {"conversations": str(data / "data.json"), "image_root": str(data)},
        "embedding": {"teachers": {"depth": {"id": str(models["depth"])}}, "layers": {"depth": "2"}, "seek": 4},
        "trainer": {"report_to": "none", "use_cpu": True},
    }  # fmt: skip
    (root / "pt.yaml").write_text(yaml.safe_dump(stage))
    questions = write_cvbench(root / "questions", generate(2, 3), 3)
    probing(*train, root / "run")
    probing("evaluate", root / "run")
    probing("distill", root / "pt.yaml", "--out", root / "pt")
    align = ["align", models["llava"], f"--data=coco:{world}", "--layers=0", "micro_batch=2", "workers=0", "sample=2"]
    bench = ["bench", ASSETS / "llava", "--benchmark", "cvbench", "--data", questions, "max_new_tokens=1"]
    return {
        "demo": ["demo", "--out", root / "demo"],
        "train": [*train, root / "new"],
        "evaluate": ["evaluate", root / "run", "--control", "blank"],
        "align": [*align, "--out", root / "align"],
        "bench": [*bench, "--out", root / "bench"],
        "distill": ["distill", root / "pt.yaml", "--out", root / "again"],
        "import": ["import", root / "pt", root / "imported", f"--data=coco:{coco}", "fit.workers=0"],
        "report": ["report", root / "run"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("verb", STAGES)
def test_every_verb_ends_and_resumes(verbs, stop, monkeypatch, verb):
    """An error, then a signal at each stage; then the printed command finishes the work."""
    for scenes in ("TRAIN_SCENES", "VAL_SCENES", "QUESTION_SCENES"):
        monkeypatch.setattr(f"probing.toyworld.demo.{scenes}", 8)
    stop(STAGES[verb][1], EOFError("injected"))
    assert isinstance(probing(*verbs[verb], code=1).exception, EOFError)
    for number, where in enumerate(STAGES[verb]):
        stop(where, (signal.SIGTERM, signal.SIGINT)[number % 2])
        errors = probing(*verbs[verb], code=130).stderr
        (resume,) = (line for line in errors.splitlines() if line.startswith("interrupted; resume with: "))
    if verb == "demo":
        return
    command = shlex.split(resume.removeprefix("interrupted; resume with: "))
    assert command == ["probing", *map(str, verbs[verb])]
    probing(*command[1:])
