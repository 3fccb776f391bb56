"""Full and read-only disks: a one-line error with the path, no partial files, and resumption afterwards."""

import errno
import io
import os
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from safetensors.torch import load_file

from analysis.alignment.run import AlignRecipe, align
from analysis.evaluation.compare import compare
from analysis.evaluation.run import evaluate
from probing.distillation.recipe import DistillRecipe
from probing.distillation.trainer import run_stage
from probing.hub.import_probes import import_probes
from probing.recipe import ProbeRunRecipe
from probing.runs.directory import Run
from probing.toyworld.layout import write_world
from probing.training.run import train
from probing.training.trainer import ProbeTrainer
from probing.utils import files as probing_run
from probing.utils.errors import UserError
from probing.utils.interrupt import Interrupted
from reports.page import write_report
from tests.helpers import tiny

MESSAGES = {errno.ENOSPC: "no disk space left at", errno.EROFS: "cannot be written"}


@pytest.fixture(scope="module")
def recipe(models, coco):
    values = {
        "backbone": {"checkpoint": str(models["llava"])},
        "data": {"path": f"coco:{coco}"},
        "teachers": {"gen": {"id": str(models["gen"])}},
        "layers": "0,2",
        "fit": {"epochs": 1, "batch_size": 6, "micro_batch": 6, "workers": 0, "save_minutes": 0},
        "controls": [],
    }
    return ProbeRunRecipe.model_validate(values)


@pytest.fixture(scope="module")
def stage(models, tmp_path_factory):
    data = tiny.conversations(tmp_path_factory.mktemp("talk"), 4)
    values = {
        "checkpoint": str(models["llava"]),
        "stage": "pt",
        "data": {"conversations": str(data / "data.json"), "image_root": str(data)},
        **{"batch_size": 2, "micro_batch": 2, "workers": 0, "save_steps": 1},
        "trainer": {"report_to": "none", "use_cpu": True},
    }
    return DistillRecipe.model_validate(values)


@pytest.fixture(scope="module")
def whole(recipe, stage, tmp_path_factory):
    """Results without faults."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate(train(recipe, folder / "run").path)
    run_stage(stage, folder / "stage")
    return folder


@pytest.fixture
def trouble(monkeypatch):
    """Fails the first write of every file, and repeats the command until it succeeds."""
    write, failed = probing_run._sync, []

    def sync(path):
        parts = [part.rsplit(".", 2)[0] if part.endswith(".tmp") else part for part in path.parts]
        if parts not in failed:
            failed.append(parts)
            raise OSError(list(MESSAGES)[len(failed) % 2], "so it is")
        write(path)

    def until_done(work, out):
        failed.clear()
        with monkeypatch.context() as patch:
            patch.setattr(probing_run, "_sync", sync)
            for times in range(40):
                try:
                    work()
                    return times
                except UserError as error:
                    assert MESSAGES[list(MESSAGES)[len(failed) % 2]] in str(error), error
                    assert str(out) in str(error)
                    assert not [path for path in out.parent.rglob(".*") if path.name.endswith(".tmp")]
        raise AssertionError("it is never done")

    return until_done


def test_every_file_of_a_run_can_fail_once(recipe, whole, trouble, tmp_path):
    out = tmp_path / "run"
    # recipe, inputs, state, probes (2), ridge (2), errors, means, summary, learning curves, manifest
    assert trouble(lambda: train(recipe, out), out) == 12
    shutil.copytree(out, tmp_path / "again")
    assert trouble(lambda: evaluate(out), out) == 2
    assert (out / "results.csv").read_bytes() == (whole / "run" / "results.csv").read_bytes()
    assert not list(out.rglob("state/*"))


def test_every_file_of_a_checkpoint_can_fail_once(stage, whole, trouble, tmp_path):
    out = tmp_path / "stage"
    assert trouble(lambda: run_stage(stage, out), out) > 5
    one, two = (load_file(folder / "model.safetensors") for folder in (out, whole / "stage"))
    assert all((one[name] == two[name]).all() for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage"]


def test_every_file_of_an_alignment_can_fail_once(models, trouble, tmp_path):
    world = write_world(tmp_path / "world", 2, 6, seed=4)
    values = {"backbone": {"checkpoint": str(models["llava"])}, "data": {"path": f"coco:{world}"}, "workers": 0}
    settings = AlignRecipe.model_validate(values | {"teachers": {"gen": {"id": str(models["gen"])}}, "layers": "0,3"})
    align(settings, tmp_path / "whole")
    out = tmp_path / "run"
    # recipe, inputs, sample, pictures (2), manifest, scores, results; similarity takes more images
    assert trouble(lambda: align(settings, out), out) == 8
    for file in ("results.csv", "scores/alignment-val2017.safetensors", "pictures/patches.json"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not list(out.rglob("state/*"))


def test_every_file_of_an_import_can_fail_once(stage, models, coco, trouble, tmp_path):
    embedding = {"teachers": {"gen": {"id": str(models["gen"])}}, "layers": {"gen": "2"}, "seek": 4}
    values = stage.model_dump() | {"embedding": embedding | {"heads": 2, "dim_head": 8}}
    checkpoint = run_stage(DistillRecipe.model_validate(values), tmp_path / "checkpoint")

    def bring(out):
        import_probes(str(checkpoint), f"coco:{coco}", out)

    bring(tmp_path / "whole")
    # recipe, probes (2), means, learning curves, manifest
    assert trouble(lambda: bring(tmp_path / "run"), tmp_path / "run") == 6
    one, two = (load_file(tmp_path / name / "probes/gen/model.safetensors") for name in ("run", "whole"))
    assert all((one[name] == two[name]).all() for name in one)


def in_small_space(work, most: int) -> str:
    """Returns the error of a process with a limited file size, which fails as a full disk does."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        sys.stdout = sys.stderr = os.fdopen(nothing, "w")
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        output = "nothing"
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the parent looks at it
            output = f"{type(error).__name__}: {error}"
        os.write(writer, output.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        output = pipe.read()
    os.waitpid(child, 0)
    return output


@pytest.mark.parametrize("most", [1500, 60_000])
def test_full_disk_during_distillation(stage, whole, tmp_path, most):
    """While it writes the recipe or the Trainer's state."""
    out = tmp_path / "stage"
    assert in_small_space(lambda: run_stage(stage, out), most).startswith(f"UserError: no disk space left at {out}")
    assert not out.exists() and not list(tmp_path.glob(".*"))
    run_stage(stage, out)
    one, two = (load_file(folder / "model.safetensors") for folder in (out, whole / "stage"))
    assert all((one[name] == two[name]).all() for name in one)


def test_full_disk_while_torch_writes_moments(stage, tmp_path):
    """With room for the weights, of 0.3 MB; the moments are twice as large."""
    out, whole_model = tmp_path / "stage", stage.model_copy(update={"stage": "ift"})
    message = in_small_space(lambda: run_stage(whole_model, out), 350_000)
    assert message.startswith(f"UserError: no disk space left at {out}")
    assert list(tmp_path.glob("stage.training/checkpoint-1/model.safetensors"))


def test_run_stays_within_the_space_it_requests(recipe, tmp_path, monkeypatch):
    """With random weights, which are trained second; a resumed run needs less by what it has written."""
    values = recipe.model_dump() | {"controls": ["random"], "probe": {"dim_head": 512}}  # larger than headers
    recipe, out, sizes = ProbeRunRecipe.model_validate(values), tmp_path / "run", []
    write, step = probing_run._sync, ProbeTrainer.take_step

    def used():
        return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())

    def sync(path):
        sizes.append(used())
        write(path)

    def stop(*arguments):
        if (out / "state/random/state.pt").exists():
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(probing_run, "_sync", sync)
    requested = []
    with monkeypatch.context() as patch:
        patch.setattr("probing.training.run.require_space", lambda where, needed: requested.append(needed))
        patch.setattr(ProbeTrainer, "take_step", stop)
        with pytest.raises(Interrupted):
            train(recipe, out)
    monkeypatch.setattr(probing_run, "free_bytes", lambda where: requested[0] - used())
    train(recipe, out)
    assert max(sizes) <= requested[0]


def test_full_disk_during_evaluation(recipe, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole / "run", out)
    (out / "results.csv").unlink()
    shutil.rmtree(out / "scores")
    before = sorted(out.rglob("*"))
    assert in_small_space(lambda: evaluate(out), 500).startswith(f"UserError: no disk space left at {out}")
    assert [path for path in sorted(out.rglob("*")) if path.is_file()] == [path for path in before if path.is_file()]
    evaluate(out)
    assert (out / "results.csv").read_bytes() == (whole / "run" / "results.csv").read_bytes()


def test_full_disk_during_report(whole, tmp_path):
    output = in_small_space(lambda: write_report([whole / "run"], tmp_path / "report", style="screen"), 5000)
    assert output.startswith(f"UserError: no disk space left at {tmp_path / 'report'}")
    assert not (tmp_path / "report" / "index.html").exists()


def test_figures_are_written_atomically(whole, tmp_path, monkeypatch):
    save = Figure.savefig

    def cut(figure, path, **values):
        if isinstance(path, io.BytesIO):  # a picture of the page
            return save(figure, path, **values)
        Path(path).write_text("half of it")
        raise OSError(errno.ENOSPC, "so it is")

    monkeypatch.setattr(Figure, "savefig", cut)
    with pytest.raises(UserError, match="no disk space left"):
        write_report([whole / "run"], tmp_path / "report", style="screen")
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("most", [500, 20_000])
def test_full_disk_during_comparison(whole, tmp_path, most):
    """While it writes the table of differences or a figure."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        shutil.copytree(whole / "run", run)
    out, names = tmp_path / "report", ["one", "two"]
    output = in_small_space(lambda: write_report(runs, out, compare(runs, names), ["the same"], "screen"), most)
    assert output.startswith(f"UserError: no disk space left at {out}")
    assert not (out / "index.html").exists() and not list(out.rglob("*.tmp"))
    assert (out / "differences.csv").exists() == (most > 500)


@pytest.mark.parametrize("path", ["file", "file/x", "file/x/y", "/proc/x", "n" * 300])
def test_out_that_cannot_be_a_folder(recipe, stage, whole, tmp_path, path):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / path
    for work in (
        lambda: train(recipe, out),
        lambda: run_stage(stage, out),
        lambda: write_report([whole / "run"], out),
    ):
        with pytest.raises(UserError, match=re.escape(path)):
            work()
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["scores", "state", "results.csv"])
def test_parts_of_a_run_of_the_wrong_kind(whole, tmp_path, name):
    out = tmp_path / "run"
    shutil.copytree(whole / "run", out)
    shutil.rmtree(out / "scores")
    (out / "results.csv").unlink()
    (out / name).mkdir() if name == "results.csv" else (out / name).touch()
    with pytest.raises(UserError, match=f"{out}.* cannot be written"):
        evaluate(out)
    (out / name).rmdir() if name == "results.csv" else (out / name).unlink()
    evaluate(out)
    assert (out / "results.csv").read_bytes() == (whole / "run" / "results.csv").read_bytes()


def test_files_of_a_killed_process_are_removed(stage, whole, tmp_path):
    """Of one killed just before it removed them."""
    run, out = tmp_path / "run", tmp_path / "stage"
    shutil.copytree(whole / "run", run)
    shutil.copytree(whole / "stage", out)
    for left in (run / "state" / "none", tmp_path / "stage.training" / "checkpoint-2"):
        left.mkdir(parents=True)
    recipe = Run.open(run).recipe
    train(recipe, run)
    run_stage(stage, out)
    assert not (run / "state" / "none").exists() and not (tmp_path / "stage.training").exists()
    shutil.rmtree(out)
    (tmp_path / ".stage.x.tmp").mkdir()
    run_stage(stage, out)
    for name, seconds in ((".old.x.tmp", 7200), (".tmpAb1xyz", 7200), (".new.x.tmp", 60)):
        file = run / "scores" / name
        file.touch()
        os.utime(file, (time.time() - seconds,) * 2)
    evaluate(run)
    assert [path.name for path in run.rglob(".*")] == [".new.x.tmp"]  # another process may be writing it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "stage"]
