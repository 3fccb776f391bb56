"""The command line end to end, on tiny models of the real classes and on bad input."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from analysis.evaluation.options import Options
from probing.cli import cli
from probing.data.panoptic import read_panoptic
from probing.recipe import ProbeRunRecipe
from tests.helpers import tiny
from tests.helpers.cli import error_line, probing

ROOT = Path(__file__).parents[3]
REAL_COCO = ROOT.parent / "shared" / "data" / "coco"
needs_real_coco = pytest.mark.skipif(not REAL_COCO.exists(), reason="needs the small piece of real COCO")


def train_arguments(models, data, out, *more):
    teachers = [f"--teacher={name}={models[name]}" for name in ("depth", "seg", "gen")]
    small = ["fit.batch_size=6", "fit.micro_batch=3", "fit.workers=0", "fit.report_to=none"]
    return ["train", "--checkpoint", models["llava"], "--data", f"coco:{data}", *teachers, "--out", out, *small, *more]


WHOLE = ["--layers", "0,3,final", "--control", "random", "fit.seeds=[0,1]"]


@pytest.fixture(scope="module")
def finished(models, coco, tmp_path_factory):
    """A trained, evaluated and reported run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    probing(*train_arguments(models, coco, out, *WHOLE))
    probing("evaluate", out)
    probing("report", out)
    return out


# help


def test_help_lists_verbs_in_pipeline_order_with_short_lines():
    lines = probing("--help").stdout.split("Commands:\n")[1].split("\n\n")[0].splitlines()
    verbs = (
        "demo inspect teachers plan assemble distill train evaluate erase compare report align bench import push pull"
    )
    assert [line.split()[0] for line in lines] == verbs.split()
    assert all(len(line.split(maxsplit=1)[1]) < 60 and line.endswith(".") for line in lines)


def test_no_command_says_what_to_do_first():
    said, listed = probing().stdout, probing("--help").stdout
    assert said.endswith(listed) and said.startswith("Start here")
    shown = [shlex.split(line) for line in said.removesuffix(listed).splitlines() if line.startswith("  probing")]
    assert [words[1] for words in shown] == ["demo", "inspect", "train", "evaluate", "report"]
    for _, verb, *words in shown:  # as typed
        cli.commands[verb].make_context(verb, words)


def test_completion_line_of_the_help_works_in_bash(tmp_path):
    (tmp_path / "probing").write_text(f'#!/bin/sh\nexec {sys.executable} -m probing "$@"\n')
    (tmp_path / "probing").chmod(0o755)
    (line,) = re.findall(r"eval .*", probing("--help").stdout)
    script = f'{line}; COMP_WORDS=(probing tra); COMP_CWORD=1; _probing_completion probing; echo "${{COMPREPLY[@]}}"'
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.stdout.split() == ["train"], done.stderr


@pytest.mark.parametrize("show", [[], ["--open"]])
def test_report_opens_its_page_on_request(finished, monkeypatch, show):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    monkeypatch.setattr("reports.page.write_report", lambda runs, out, style: out / "index.html")
    assert f"report: {finished / 'report' / 'index.html'}" in probing("report", finished, *show).stdout
    assert opened == [(finished / "report" / "index.html").as_uri()] * len(show)


def test_options_come_from_fields_with_help_and_defaults():
    text = " ".join(probing("evaluate", "--help").stdout.split())
    for name, field in Options.model_fields.items():
        option = name.removesuffix("s") if isinstance(field.default, tuple) else name
        assert f"--{option.replace('_', '-')} " in text and field.description.split()[0] in text
    assert "Diffusion steps per image. [default: 25]" in text and "[resampler|ridge]" in text
    text = " ".join(probing("train", "--help").stdout.split())
    assert ProbeRunRecipe.model_fields["layers"].description.split("`")[-1] in text


@pytest.mark.parametrize(("verb", "section"), [("train", "fit"), ("distill", "stage")])
def test_help_lists_every_field_of_the_recipes(verb, section):
    said = " ".join(CliRunner().invoke(cli, [verb, "--help"], terminal_width=200).output.split())
    options = {"backbone.checkpoint", "data.path", "data.target_cache", "layers", "controls"}
    recipes = [yaml.safe_load(file.read_text()) for file in (Path(__file__).parents[3] / "examples").rglob("*.yaml")]
    keys = set().union(*(leaves(values) for values in recipes if section in values))
    missing = [key for key in keys if f" {key} " not in said]
    assert len(keys) > 10 and not set(missing) - (options if verb == "train" else set())


def leaves(values, prefix=""):
    """Lists the fields of a recipe as --help writes them."""
    found = set()
    for name, value in values.items():
        named = prefix.endswith("teachers.")
        key = f"{prefix}{'NAME' if named else name}"
        free = key in ("trainer", "embedding.layers", "embedding.weights")  # values by name
        found |= leaves(value, f"{key}.") if isinstance(value, dict) and not free else {key}
    return found


def test_every_option_has_a_help_text():
    for name, command in cli.commands.items():
        options = [one for one in command.get_params(click.Context(command)) if isinstance(one, click.Option)]
        assert all(option.help for option in options), name


MEASURED = """
import resource, subprocess, sys
def seconds(*command):
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)
bare = seconds("-c", "import click")
print(seconds("-m", "probing", "--help") / bare, seconds("-m", "probing", "train", "--help") / bare)
"""


def test_help_takes_few_times_the_import_of_click():
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, cwd=ROOT)
    whole, verb = map(float, done.stdout.split())
    assert whole < 4 and verb < 10, done.stdout


HEAVY = {"torch", "transformers", "pandas", "numpy", "scipy", "matplotlib", "PIL", "huggingface_hub"}
LOADED = f"""
import sys
from click.shell_completion import BashComplete
from click.testing import CliRunner
from probing.cli import cli
assert CliRunner().invoke(cli, ["--help"]).exit_code == 0 and "pydantic" not in sys.modules
for verb in cli.commands:
    assert CliRunner().invoke(cli, [verb, "--help"]).exit_code == 0, verb
complete = BashComplete(cli, {{}}, "probing", "_PROBING_COMPLETE").get_completions
print(*(item.value for words in ([[], "tra"], [["train"], "--che"], [["evaluate", "--metric"], "mi"])
        for item in complete(*words)), *({HEAVY} & set(sys.modules)))
"""


def test_help_and_completion_import_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["train", "--checkpoint", "miou"], done.stderr


# a whole run


def test_results_hold_every_number_once(finished):
    results = pd.read_csv(finished / "results.csv", dtype=str, keep_default_na=False)
    key = [column for column in results.columns if column not in ("value", "ci_low", "ci_high", "n")]
    assert not results.duplicated(key).any()
    layers = {"0", "3", "final", "mean"}
    for (probe, control), part in results.groupby(["probe", "control"]):
        assert set(part["layer"]) == ({""} if control == "mean" else layers), (probe, control)
        assert set(part["teacher"]) == {"depth", "seg", "gen"}
    pairs = {("resampler", c) for c in ("none", "shuffled", "random")} | {("ridge", c) for c in ("none", "random")}
    assert set(results.groupby(["probe", "control"]).groups) == pairs | {("constant", "mean")}
    numbers = results[["value", "ci_low", "ci_high"]].astype(float)
    assert (numbers["ci_low"] <= numbers["value"]).all() and (numbers["value"] <= numbers["ci_high"]).all()
    centred_mean = results[(results["control"] == "mean") & (results["metric"] == "cosine_centred")]
    assert (centred_mean["value"].astype(float) == 0).all()


def test_probes_record_where_they_come_from(finished, models):
    config = json.loads((finished / "probes" / "depth" / "config.json").read_text())
    assert config["checkpoint"]["sha256"].startswith("sha256:") and config["teacher"]["id"] == str(models["depth"])
    assert config["prompt"] == "Describe the image in two lines." and "torch" in config["versions"]
    names = load_file(finished / "probes" / "depth" / "model.safetensors")
    assert "seed_1.layer_final.layers.0.0.to_kv.weight" in names
    assert not list(finished.rglob("*.pt")) and not list(finished.rglob(".*"))


def test_report_shows_the_run(finished):
    page = (finished / "report" / "index.html").read_text()
    assert "llava" in page and "random" in page and len(page) < 5_000_000


def test_finished_run_is_not_trained_again(finished, models, coco):
    before = (finished / "manifest.json").stat().st_mtime_ns
    probing(*train_arguments(models, coco, finished, *WHOLE))
    assert (finished / "manifest.json").stat().st_mtime_ns == before


def test_plan_of_a_recipe_and_of_a_run(finished, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load((finished / "recipe.yaml").read_text()) | {"layers": "0,3"}))
    text = probing("plan", file, "--metric", "fid", "--images", 4, "--steps", 10, "fit.epochs=1000000000").stdout
    # Two layers, two seeds, the mean target and the true feature; ten steps, each twice for guidance.
    assert re.search(r"^total .* [EPT]?FLOP ", text, re.MULTILINE)
    assert "6 sets x 4 images = 24 images x 20 calls" in text and "= 480 calls" in text
    assert str(finished / "scores" / "cosine-val2017.safetensors") in probing("plan", finished).stdout
    assert probing("plan", finished).stdout == probing("evaluate", finished, "--dry-run").stdout
    assert "--tflops" in error_line("plan", file, "--tflops", "nan")
    assert "no layer '2'; it has 0, 3" in error_line("plan", file, "--layers", "2")
    assert "is a run, whose recipe is fixed" in error_line("plan", finished, "fit.epochs=3")


# bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--checkpoint", "/nowhere/llava"], "no such checkpoint"),
        (["--checkpoint", "{depth}"], "no vision-language model but DepthAnything"),
        (["--layers", "0,7"], "layer 7 is out of range: this checkpoint has layers 0 to 3"),
        (["teachers.seg.id={gen}"], "cannot be the seg teacher: it holds CLIPVisionModelWithProjection"),
        (["--teacher=sge"], "no teacher is called 'sge'"),
        (["--teacher=gen"], "two teachers are called 'gen'"),
        (["--data", "coco:{root}"], "has no split 'train2017'"),
        (["fit.batchsize=3"], "did you mean 'batch_size'"),
        (["probe.keys=[seg,answer]"], "has no seg, answer tokens; choose probe.keys from system, image, text"),
        (["backbone.checkpoint.x=9"], "'checkpoint' is a value, not a section"),
        (["--recipe", "/nowhere.yaml"], "no recipe at"),
        (["--control", "no_such"], "'no_such' is not one of 'shuffled', 'random'"),
        (["--bogus"], "No such option '--bogus'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(models, coco, tmp_path, change, message):
    out = tmp_path / "run"
    arguments = train_arguments(models, coco, out, *(part.format(root=tmp_path, **models) for part in change))
    for kind in ([], ["--dry-run"]):
        assert message in error_line(*arguments, *kind)
        assert not out.exists()


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_models_are_looked_for_before_annotations_are_read(models, tmp_path, dry_run):
    """Those of COCO's training images take many seconds."""
    data, out = tmp_path / "coco", tmp_path / "run"
    for split in ("train2017", "val2017"):
        (data / split).mkdir(parents=True)
        (data / split / "1.jpg").touch()
    train = train_arguments(models, data, out, *dry_run)
    align = ["align", models["llava"], "--data", f"coco:{data}", "--out", out, *dry_run]
    for command in (train, align):
        assert str(data / "annotations") in error_line(*command)
        assert "no such checkpoint" in error_line(*command, "backbone.checkpoint=/nowhere/llava")
        assert "no such gen teacher" in error_line(*command, "teachers.gen.id=/nowhere/clip")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "{out}", "--data", "coco:x"], "no backbone.checkpoint; set backbone.checkpoint=VALUE"),
        (["train", "--out", "{out}", "--recipe", "{recipe}", "--data", "coco:x"], "'data' is a value, not a section"),
        (["evaluate", "{out}"], "no run"),
        (["evaluate", "{out}", "--metric", "none"], "is not one of 'code_length', 'cosine', "),
        (["evaluate", "{out}", "--steps", "0"], "steps: Input should be greater than or equal to 1"),
        (["report", "{out}"], "make one with: probing train --checkpoint"),
        (["align", "x", "--out", "{out}"], "no data.path; set data.path=VALUE"),
        (["bench", "x", "--data", "{out}"], "no benchmark; set benchmark=VALUE"),
        (["inspect", "x", "template=vicuna_v1"], "write backbone.template=vicuna_v1"),
        (["doctor"], "No such command 'doctor'"),
    ],
)
def test_missing_or_wrong_arguments_are_one_line(tmp_path, arguments, message):
    (tmp_path / "recipe.yaml").write_text("data: 3")
    names = {"out": tmp_path / "run", "recipe": tmp_path / "recipe.yaml"}
    assert message in error_line(*(argument.format(**names) for argument in arguments))
    assert not (tmp_path / "run").exists()


def test_folder_without_a_run_is_left_alone(tmp_path, models, coco):
    (tmp_path / "note.txt").write_text("mine")
    assert "is not empty and holds no run" in error_line(*train_arguments(models, coco, tmp_path))
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_another_recipe_in_the_same_folder_is_refused(finished, models, coco):
    assert "holds another run" in error_line(*train_arguments(models, coco, finished, "fit.lr=0.5"))


def test_corrupt_and_missing_images_are_named(models, tmp_path):
    data = tiny.coco(tmp_path / "coco")
    (data / "train2017" / "000000000002.jpg").write_bytes(b"broken")
    (data / "val2017" / "000000000013.jpg").write_bytes(b"broken")
    (data / "train2017" / "000000000003.jpg").unlink()
    out = tmp_path / "run"
    probing(*train_arguments(models, data, out, "--layers=1", "controls=[]"))
    probing("evaluate", out)
    skipped = {s["image"]: s["reason"] for s in json.loads((out / "manifest.json").read_text())["skipped"]}
    assert skipped["000000000003.jpg"] == "missing"
    assert skipped["000000000002.jpg"].startswith("corrupt") and skipped["000000000013.jpg"].startswith("corrupt")
    assert set(pd.read_csv(out / "results.csv")["n"]) == {5}


# faults


def test_full_disk_is_one_line_and_the_run_resumes(models, coco, tmp_path):
    """A limit on file size makes writes fail as on a full disk, without root."""
    out = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = train_arguments(models, coco, out, "--layers=0,3", "controls=[]")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        line = error_line(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"no disk space left at {out}" in line
    assert not (out / "manifest.json").exists() and not list(out.rglob(".*"))
    probing(*arguments)


@pytest.fixture
def signal_in_step(monkeypatch):
    """Sends this process a signal during an optimiser step."""

    def at(number, step):
        steps, real = [], torch.optim.AdamW.step

        def stopped(self, *args, **kwargs):
            steps.append(1)
            if len(steps) == step:
                signal.raise_signal(number)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", stopped)

    return at


def test_resuming_with_another_teacher_is_refused(models, coco, tmp_path, signal_in_step):
    own = tiny.depth_teacher(tmp_path / "depth")
    arguments = train_arguments({**models, "depth": own}, coco, tmp_path / "run", "--layers=1", "fit.epochs=4")
    signal_in_step(signal.SIGTERM, 2)
    assert f"resume with: {shlex.join(['probing', *map(str, arguments)])}\n" in probing(*arguments, code=130).stderr
    shutil.rmtree(own)
    tiny.depth_teacher(own, width=24)
    assert "the depth teacher's target shape ([16, 16] then, [16, 24] now) changed since" in error_line(*arguments)


BROKEN = """
import torch
from probing.cli import main
def step(self, *args, **kwargs):
    raise EOFError("injected")
torch.optim.AdamW.step = step
main()
"""


def test_error_of_ours_is_a_traceback_and_ends_the_process(models, coco, tmp_path):
    """Data-loading workers ignore signals; the process must not wait for them."""
    arguments = train_arguments(models, coco, tmp_path / "run", "fit.workers=1", "--layers=1")
    command = [sys.executable, "-c", BROKEN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1 and "Traceback" in done.stderr and "EOFError: injected" in done.stderr
    assert "probing: " not in done.stderr


def test_interrupted_process_saves_and_prints_how_to_resume(models, coco, tmp_path):
    out = tmp_path / "run"
    arguments = [*map(str, train_arguments(models, coco, out, "fit.epochs=500", "fit.workers=1", "--layers=1"))]
    process = subprocess.Popen(
        [sys.executable, "-m", "probing", *arguments, "fit.save_minutes=0"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    limit = time.monotonic() + 120
    while not list(out.glob("state/*/state.pt")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the data-loading workers get it too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    resume = shlex.join(["probing", *arguments, "fit.save_minutes=0"])
    assert "Traceback" not in errors and f"resume with: {resume}\n" in errors


def test_wrong_input_leaves_logging_as_it_was(tmp_path, caplog):
    runner = CliRunner()
    first, second = (runner.invoke(cli, ["evaluate", str(tmp_path)]).stderr for _ in range(2))
    assert first == second and first.count("probing: ") == 1


# real photographs, and a new checkpoint


@needs_real_coco
def test_real_coco_images_of_all_shapes(models, tmp_path):
    out = tmp_path / "run"
    small = ["data.train_limit=24", "data.eval_limit=12", "fit.epochs=1", "--layers=1", "controls=[]"]
    assert "in no annotation file" in probing(*train_arguments(models, REAL_COCO, out, *small)).stderr
    probing("evaluate", out)
    assert len(pd.read_csv(out / "results.csv")) > 0
    assert yaml.safe_load((out / "recipe.yaml").read_text())["data"]["path"] == f"coco:{REAL_COCO.resolve()}"


@pytest.mark.slow
@needs_real_coco
def test_real_coco_goes_through_every_decoder(models, unclip, inception_file, tmp_path):
    seg = shutil.copytree(models["seg"], tmp_path / "seg")
    tiny.tokenizer().save_pretrained(seg)
    out, decodable = tmp_path / "run", {**models, "seg": seg, "gen": unclip}
    small = ["data.train_limit=6", "data.eval_limit=4", "fit.epochs=1", "--layers=2", "controls=[]", "fit.ridge=false"]
    probing(*train_arguments(decodable, REAL_COCO, out, *small))
    options = ["--metric", "miou", "--protocol", "blind", "--protocol", "strict", "--metric", "fid"]
    options += ["--inception-weights", inception_file, "--steps", 2, "--pictures", 1]
    assert "nothing" in probing("plan", out, *options).stdout
    probing("evaluate", out, *options)
    results = pd.read_csv(out / "results.csv", dtype={"layer": str}, keep_default_na=False)
    assert set(results["metric"]) == {"miou", "fid", "kid"} and set(results["n"]) == {4}
    assert len(read_panoptic(REAL_COCO, "val2017").names) == 133
    assert ((results["metric"] != "miou") | results["value"].between(0, 1)).all()
    assert "3 of 3 sets" in probing("plan", out, *options).stdout
    probing("report", out)
    page = (out / "report" / "index.html").read_text()
    assert "mIoU, probe alone" in page and "Below 2048 it is biased" in page


def test_distill_writes_a_checkpoint_that_inspect_reads(models, tmp_path):
    data = tiny.conversations(tmp_path / "data", 4)
    recipe = {
        "checkpoint": str(models["llava"]), "stage": "pt", "batch_size": 2, "micro_batch": 2, "workers": 0,
        "data": {"conversations": str(data / "data.json"), "image_root": str(data)},
        "trainer": {"report_to": "none", "use_cpu": True},
    }  # fmt: skip
    (tmp_path / "pt.yaml").write_text(yaml.safe_dump(recipe))
    done = probing("distill", tmp_path / "pt.yaml", "--out", tmp_path / "new", "max_steps=2")
    assert done.stdout.startswith("checkpoint: ") and done.stdout.count("\n") == 1  # transformers' Trainer is silent
    assert "stage pt: 2/2 steps" in done.stderr
    parts = json.loads(probing("inspect", tmp_path / "new", "--json").stdout)
    assert parts["family"] == "llava" and parts["tokens"]["image"] == 16
    assert "did you mean 'stage'" in error_line("distill", tmp_path / "pt.yaml", "--out", tmp_path / "x", "stag=1")
