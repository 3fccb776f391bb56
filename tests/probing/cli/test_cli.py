"""The command line end to end, on tiny models of the real classes and on bad input."""

import contextlib
import io
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import psutil
import pytest
import yaml
from safetensors.torch import load_file

from probing.cli import main
from probing.data.panoptic import read_panoptic
from tests.helpers import tiny

ROOT = Path(__file__).parents[3]
REAL_COCO = ROOT.parent / "shared" / "data" / "coco"


def process(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "probing", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == code, done.stderr
    return done


def probing(*arguments: object, code: int = 0) -> SimpleNamespace:
    """The same in this process, which has imported everything."""
    out, err, log = io.StringIO(), io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(err)
    log.addHandler(handler)
    found = 0
    try:
        with (
            mock.patch.object(sys, "argv", ["probing", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as ended:
        found = ended.code
    finally:
        log.removeHandler(handler)
    assert found == code, err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def train_arguments(models, data, out, *more):
    teachers = [f"--teacher={name}={models[name]}" for name in ("depth", "seg", "gen")]
    small = ["fit.batch_size=6", "fit.micro_batch=3", "fit.workers=0"]
    return ["train", "--checkpoint", models["llava"], "--data", f"coco:{data}", *teachers, "--out", out, *small, *more]


@pytest.fixture(scope="module")
def finished(models, coco, tmp_path_factory):
    """A trained, evaluated and reported run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    more = ["--layers", "all,final", "--control", "random", "fit.seeds=[0,1]"]
    process(*train_arguments(models, coco, out, *more))
    process("evaluate", out)
    process("report", out)
    return out


def test_results_hold_every_number_once(finished):
    results = pd.read_csv(finished / "results.csv", dtype=str, keep_default_na=False)
    place = [c for c in results.columns if c not in ("value", "ci_low", "ci_high", "n")]
    assert not results.duplicated(place).any()
    layers = {"0", "1", "2", "3", "final", "mean"}
    for (probe, control), part in results.groupby(["probe", "control"]):
        assert set(part["layer"]) == ({""} if control == "mean" else layers), (probe, control)
        assert set(part["teacher"]) == {"depth", "seg", "gen"}
    pairs = {("resampler", c) for c in ("none", "shuffled", "random")} | {("ridge", c) for c in ("none", "random")}
    assert set(results.groupby(["probe", "control"]).groups) == pairs | {("constant", "mean")}
    numbers = results[["value", "ci_low", "ci_high"]].astype(float)
    assert (numbers["ci_low"] <= numbers["value"]).all() and (numbers["value"] <= numbers["ci_high"]).all()
    centred_mean = results[(results["control"] == "mean") & (results["metric"] == "cosine_centred")]
    assert (centred_mean["value"].astype(float) == 0).all()


def test_probes_carry_their_provenance(finished, models):
    config = json.loads((finished / "probes" / "depth" / "config.json").read_text())
    assert config["checkpoint"]["sha256"].startswith("sha256:") and config["teacher"]["id"] == str(models["depth"])
    assert config["prompt"] == "Describe the image in two lines." and "torch" in config["versions"]
    names = load_file(finished / "probes" / "depth" / "model.safetensors")
    assert "seed_1.layer_final.layers.0.0.to_kv.weight" in names
    assert not list(finished.rglob("*.pt")) and not list(finished.rglob(".*"))


def test_report_shows_the_run(finished):
    page = (finished / "report" / "index.html").read_text()
    assert "llava" in page and "random" in page and len(page) < 5_000_000


def test_a_finished_run_is_not_trained_again(finished, models, coco):
    before = (finished / "manifest.json").stat().st_mtime_ns
    more = ["--layers", "all,final", "--control", "random", "fit.seeds=[0,1]"]
    probing(*train_arguments(models, coco, finished, *more))
    assert (finished / "manifest.json").stat().st_mtime_ns == before


HEAVY = {"torch", "transformers", "pandas", "numpy", "scipy", "matplotlib", "PIL", "pydantic", "huggingface_hub"}
LOADED = """
import sys
from click.testing import CliRunner
from probing.cli import cli, main
for words in ([], *([verb] for verb in cli.commands)):
    assert CliRunner().invoke(cli, [*words, "--help"]).exit_code == 0, words
sys.stderr.write(" ".join(sys.modules))
main()
"""
"""Names what the help of every verb imports, then does what it is asked to."""


@pytest.mark.parametrize(
    ("typed", "completed"), [(["tra"], ["train"]), (["train", "--che"], ["--checkpoint"])], ids=["verb", "option"]
)
def test_help_and_completion_import_nothing_heavy(typed, completed):
    words = {"COMP_WORDS": " ".join(["probing", *typed]), "COMP_CWORD": str(len(typed))}
    asked = os.environ | {"_PROBING_COMPLETE": "bash_complete"} | words
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, cwd=ROOT, env=asked)
    assert done.stdout.split() == [f"plain,{word}" for word in completed], done.stderr
    assert "probing.cli" in done.stderr.split() and not HEAVY & set(done.stderr.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--checkpoint", "/nowhere/llava"], "no such checkpoint"),
        (["--checkpoint", "{depth}"], "no vision-language model but DepthAnything"),
        (["--layers", "0,7"], "layer 7 is out of range: this checkpoint has layers 0 to 3"),
        (["teachers.seg.id={gen}"], "cannot be the seg teacher: it holds CLIPVisionModelWithProjection"),
        (["--teacher=sge"], "no teacher is called 'sge'"),
        (["--data", "coco:{root}"], "has no split 'train2017'"),
        (["fit.batchsize=3"], "did you mean 'batch_size'"),
        (["fit.micro_batch=9"], "larger than fit.batch_size"),
        (["--recipe", "/nowhere.yaml"], "no recipe at"),
        (["--bogus"], "No such option"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(models, coco, tmp_path, change, message):
    out = tmp_path / "run"
    change = [part.format(root=tmp_path, **models) for part in change]
    run = process if "--bogus" in change or "no such checkpoint" in message else probing
    done = run(*train_arguments(models, coco, out, *change), code=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("probing: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in done.stderr
    assert not out.exists()


def test_verbs_on_folders_that_are_no_runs(tmp_path, models, coco):
    for verb in ("evaluate", "report"):
        assert "probing: " in probing(verb, tmp_path, code=2).stderr
    (tmp_path / "note.txt").write_text("mine")
    done = probing(*train_arguments(models, coco, tmp_path), code=2)
    assert "is not empty and holds no run" in done.stderr and (tmp_path / "note.txt").read_text() == "mine"


def test_another_recipe_in_the_same_folder_is_refused(finished, models, coco):
    done = probing(*train_arguments(models, coco, finished, "fit.lr=0.5"), code=2)
    assert "holds another run" in done.stderr


def test_a_full_disk_is_one_line(models, coco, tmp_path):
    """A limit on file size, because writes then fail as on a full disk, and without root."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "probing", *map(str, train_arguments(models, coco, out))]
    script = 'trap "" XFSZ; ulimit -f 64; exec "$@"'
    done = subprocess.run(["bash", "-c", script, "bash", *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert f"no disk space left at {out}" in done.stderr and "Traceback" not in done.stderr
    assert not (out / "manifest.json").exists() and not list(out.rglob(".*"))
    probing(*train_arguments(models, coco, out))  # with space again, the same command goes through


def test_corrupt_and_missing_images_are_named(models, tmp_path):
    data = tiny.coco(tmp_path / "coco")
    (data / "train2017" / "000000000002.jpg").write_bytes(b"broken")
    (data / "val2017" / "000000000013.jpg").write_bytes(b"broken")
    (data / "train2017" / "000000000003.jpg").unlink()
    out = tmp_path / "run"
    probing(*train_arguments(models, data, out))
    probing("evaluate", out)
    skipped = {s["image"]: s["reason"] for s in json.loads((out / "manifest.json").read_text())["skipped"]}
    assert skipped["000000000003.jpg"] == "missing"
    assert skipped["000000000002.jpg"].startswith("corrupt") and skipped["000000000013.jpg"].startswith("corrupt")
    assert set(pd.read_csv(out / "results.csv")["n"]) == {5}


def test_resuming_with_another_teacher_is_refused(models, tmp_path):
    own = tiny.depth_teacher(tmp_path / "depth")
    data = tiny.coco(tmp_path / "coco")
    out = tmp_path / "run"
    arguments = train_arguments({**models, "depth": own}, data, out, "fit.save_minutes=0", "fit.epochs=50")
    kill_when(arguments, lambda: (out / "state" / "none" / "state.pt").exists())
    shutil.rmtree(own)
    tiny.depth_teacher(own, width=24)
    done = probing(*arguments, code=2)
    assert "the depth teacher's target shape ([16, 16] then, [16, 24] now) changed since" in done.stderr


def kill_when(arguments, ready, number=signal.SIGKILL, delay=0.0):
    process = subprocess.Popen(
        [sys.executable, "-m", "probing", *map(str, arguments)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    limit = time.monotonic() + 60
    while not ready() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(delay)
    os.killpg(process.pid, number)  # as a terminal does: the reading processes get it too
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_saves_and_says_how_to_go_on(models, coco, tmp_path, number):
    out = tmp_path / "run"
    arguments = train_arguments(models, coco, out, "fit.epochs=200", "fit.workers=2")
    code, errors = kill_when(arguments, (out / "state" / "inputs.json").exists, number, delay=1.0)
    assert code == 130, errors
    assert "Traceback" not in errors and f"resume with: {shlex.join(['probing', *map(str, arguments)])}" in errors
    assert (out / "state" / "none" / "state.pt").exists()


@pytest.mark.slow
def test_two_processes_train_what_one_does(models, coco, tmp_path):
    """Same global batch, gradients and sums reduced: the same probes up to the order of additions."""
    more = ["fit.epochs=2", "controls=[]"]
    probing(*train_arguments(models, coco, tmp_path / "one", *more))
    environment = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "probing"]
    arguments = list(map(str, train_arguments(models, coco, tmp_path / "two", *more)))
    done = subprocess.run([*launch, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind in ("probes", "ridge"):
        for teacher in ("depth", "seg", "gen"):
            one, two = (load_file(tmp_path / run / kind / teacher / "model.safetensors") for run in ("one", "two"))
            for name, tensor in one.items():
                assert (tensor - two[name]).abs().max() < 2e-3, (kind, teacher, name)


@pytest.mark.slow
def test_a_run_whose_other_process_dies_ends_and_goes_on(models, coco, tmp_path):
    """The survivor says so in one line, and the same command gives the same bytes as a run that was left alone."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "probing"]
    more = ["fit.epochs=20", "controls=[]", "fit.save_minutes=0"]

    def start(out):
        arguments = [*launch, *map(str, train_arguments(models, coco, out, *more))]
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    hurt = start(tmp_path / "hurt")
    while not (tmp_path / "hurt" / "state" / "none" / "state.pt").exists():
        assert hurt.poll() is None
        time.sleep(0.01)
    psutil.Process(hurt.pid).children()[1].kill()
    said = hurt.communicate(timeout=120)[1]
    assert hurt.returncode != 0 and "probing: another process of this run ended before its time" in said
    assert not (tmp_path / "hurt" / "manifest.json").exists()
    again = start(tmp_path / "hurt")
    assert again.wait() == 0, again.stderr.read()
    for file in ("probes/depth/model.safetensors", "ridge/seg/model.safetensors", "learning_curves.csv"):
        assert (tmp_path / "hurt" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


@pytest.mark.skipif(not REAL_COCO.exists(), reason="the small piece of real COCO is not beside the repository")
def test_real_coco_images_of_all_shapes(models, tmp_path):
    out = tmp_path / "run"
    done = probing(
        *train_arguments(models, REAL_COCO, out, "data.train_limit=24", "data.eval_limit=12", "fit.epochs=1")
    )
    assert "in no annotation file" in done.stderr
    probing("evaluate", out)
    assert len(pd.read_csv(out / "results.csv")) > 0
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["data"]["path"] == f"coco:{REAL_COCO.resolve()}"


@pytest.fixture(scope="module")
def decodable(models, unclip, tmp_path_factory):
    """Teachers that are complete enough to decode."""
    seg = tmp_path_factory.mktemp("seg") / "seg"
    shutil.copytree(models["seg"], seg)
    tiny.tokenizer().save_pretrained(seg)
    return {**models, "seg": seg, "gen": unclip}


@pytest.mark.skipif(not REAL_COCO.exists(), reason="the small piece of real COCO is not beside the repository")
def test_real_coco_goes_through_every_decoder(decodable, inception_file, tmp_path):
    out = tmp_path / "run"
    small = ["data.train_limit=12", "data.eval_limit=6", "fit.epochs=1", "fit.batch_size=6", "--layers", "0,2"]
    probing(*train_arguments(decodable, REAL_COCO, out, *small))
    metrics = [
        "--metric",
        "miou",
        "--protocol",
        "blind",
        "--protocol",
        "strict",
        "--metric",
        "fid",
        "--inception-weights",
        inception_file,
    ]
    few = ["--steps", 2, "--layers", "2", "--pictures", 2]
    assert "nothing" in probing("plan", out, *metrics, *few).stdout
    probing("evaluate", out, *metrics, *few)
    found = pd.read_csv(out / "results.csv", dtype={"layer": str}, keep_default_na=False)
    assert set(found["metric"]) == {"miou", "fid", "kid"} and set(found["n"]) == {6}
    assert len(read_panoptic(REAL_COCO, "val2017").names) == 133
    assert ((found["metric"] != "miou") | found["value"].between(0, 1)).all()
    assert "3 of 3 sets" in probing("plan", out, *metrics, *few).stdout
    probing("report", out)
    page = (out / "report" / "index.html").read_text()
    assert "mIoU, probe alone" in page and "Below 2048 it is biased" in page


def test_plan_of_a_recipe_and_of_a_run(finished, models, coco, tmp_path):
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text()) | {"layers": "0,3"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    said = probing("plan", tmp_path / "recipe.yaml", "--metric", "fid", "--images", 4, "--steps", 10).stdout
    # Two layers, two seeds, the mean target and the true feature; ten steps, each twice for guidance.
    assert "6 sets x 4 images = 24 images x 20 calls" in said and "= 480 calls" in said
    assert str(finished / "scores" / "cosine-val2017.safetensors") in probing("plan", finished).stdout
    assert "EFLOP, " in probing("plan", tmp_path / "recipe.yaml", "fit.epochs=1000000000").stdout
    assert "--tflops" in probing("plan", tmp_path / "recipe.yaml", "--tflops", "nan", code=2).stderr
    assert "no layer '2'; it has 0, 3" in probing("plan", tmp_path / "recipe.yaml", "--layers", "2", code=2).stderr


def test_distill_writes_a_checkpoint_that_train_reads(models, tmp_path):
    tiny.coco(tmp_path / "coco", train=4, val=2)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing"}]
    entries = [{"id": str(k), "image": f"train2017/{k:012d}.jpg", "conversations": turns} for k in range(1, 5)]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    recipe = {
        "checkpoint": str(models["llava"]),
        "stage": "pt",
        "batch_size": 2,
        "micro_batch": 2,
        "workers": 0,
        "data": {"conversations": str(tmp_path / "data.json"), "image_root": str(tmp_path / "coco")},
    }
    (tmp_path / "pt.yaml").write_text(yaml.safe_dump(recipe))
    done = probing("distill", tmp_path / "pt.yaml", "--out", tmp_path / "new", "max_steps=2")
    assert done.stdout.startswith("checkpoint: ") and done.stdout.count("\n") == 1  # no log of the Trainer's
    assert "stage pt: 2/2 steps" in done.stderr
    found = json.loads(probing("inspect", tmp_path / "new", "--json").stdout)
    assert found["family"] == "llava" and found["tokens"]["image"] == 16
    assert (
        "did you mean 'stage'"
        in probing("distill", tmp_path / "pt.yaml", "--out", tmp_path / "x", "stag=1", code=2).stderr
    )
