"""What training of probes costs: counted operations of a real step, sizes of real parameters, and refusals."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from analysis.planning.plan import IMAGES_PER_CORE, Devices, Part, Plan, Work
from analysis.planning.probe_training import plan_training
from probing.models import parse_layers
from probing.recipe import ProbeRunRecipe, dump_recipe
from probing.teachers import load_teachers
from probing.training.run import load_run_backbone, train, training_images
from probing.training.schedule import plan_steps
from probing.training.trainer import ProbeTrainer
from probing.utils.errors import UserError
from probing.utils.interrupt import Interrupted, Interruption
from tests.helpers import tiny
from tests.helpers.cli import error_line, probing
from tests.probing.models.test_auto import idefics3, internvl, qwen2_5_vl

CPU = torch.device("cpu")


def counted(recipe, folder):
    """Operations of a real step of the first epoch, per image."""
    backbone, teachers, images = (
        load_run_backbone(recipe, "none", CPU),
        load_teachers(recipe.teachers, CPU),
        training_images(recipe.data),
    )
    layers = parse_layers(recipe.layers, backbone.layers)
    trainer = ProbeTrainer(
        recipe, backbone, teachers, images, layers, ["none", *recipe.controls], folder, Accelerator(cpu=True)
    )
    state = trainer.initial_state()
    step = plan_steps(len(images), recipe.fit)[0]
    prepared = next(trainer.batches([step]))
    columns = {column: index for index, column in enumerate(state.columns)}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainer.micro_batch(state, prepared, 1.0, True, columns)
    return counter.get_total_flops() / len(step.micros[0]), state


@pytest.mark.parametrize(
    ("kind", "layers", "changes"),
    [
        ("llava", "all", {}),
        ("llava", "1", {"ridge": False}),
        ("llava_next", "0,2", {"seeds": [0, 1]}),
        ("llava_onevision", "final", {}),
        (internvl, "2", {"ridge": False}),
        (qwen2_5_vl, "2", {}),
        (idefics3, "0,3", {}),
    ],
)
def test_flops_are_within_15_percent_of_a_counted_step(recipe_values, tmp_path, kind, layers, changes):
    checkpoint = tmp_path / "checkpoint"
    (getattr(tiny, kind) if isinstance(kind, str) else kind)(checkpoint)
    backbone = {"checkpoint": str(checkpoint)} | ({} if isinstance(kind, str) else {"whole_image": "last"})
    fit = recipe_values["fit"] | {"epochs": 1} | changes
    if layers != "all":  # one with every kind of teacher
        recipe_values["teachers"] = {"gen": recipe_values["teachers"]["gen"]}
    values = recipe_values | {"backbone": backbone, "layers": layers, "controls": ["shuffled"], "fit": fit}
    recipe = ProbeRunRecipe.model_validate(values)
    work = plan_training(recipe).work
    real, state = counted(recipe, tmp_path)
    assert work.total.flops16 + work.total.flops32 == pytest.approx(real, rel=0.15)
    parameters = sum(p.numel() for own in state.parameters for p in own)
    assert work.parts["probes with gradients and moments"].memory == 16 * parameters


def test_buffer_plans_one_forward_pass(recipe_values):
    def flops(**fit):
        work = plan_training(ProbeRunRecipe.model_validate(recipe_values | {"fit": recipe_values["fit"] | fit})).work
        return work.count * (work.total.flops16 + work.total.flops32)

    epochs = [flops(epochs=number) for number in (1, 2)]
    buffered = [flops(epochs=number, buffer=1) for number in (1, 2, 5)]
    assert buffered[0] == pytest.approx(epochs[0])
    probes = buffered[1] - buffered[0]
    assert 0 < probes < epochs[1] - epochs[0] and buffered[2] == pytest.approx(buffered[0] + 4 * probes)


def test_dry_run_is_plan_and_says_how_far_a_run_is(recipe_values, tmp_path, monkeypatch):
    recipe_values["teachers"] = {"gen": recipe_values["teachers"]["gen"]}
    recipe = ProbeRunRecipe.model_validate(recipe_values | {"controls": ["shuffled", "random"]})
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(dump_recipe(recipe))

    def printed(*arguments):
        return probing(*arguments).stdout

    training = ("train", "--recipe", file, "--out", out, "--dry-run")
    text = printed(*training)
    assert text == f"run: {out} (new)\n" + printed("plan", file)
    assert "12 of train2017 to train on, 6 of val2017" in text and "steps: 4 of 6 images" in text
    assert "layers 0, 1, 2, 3\n" in text and not out.exists()
    assert "code_length: not measured" not in text
    assert "code_length: not measured" in printed(*training, "fit.batch_size=12")

    class Stop(Interruption):  # after one step
        def __init__(self):
            super().__init__()
            self.requested = True

    with monkeypatch.context() as stopped, pytest.raises(Interrupted):
        stopped.setattr("probing.training.trainer.Interruption", Stop)
        train(recipe, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    text = printed(*training)
    assert "pretrained weights: resumes after step 1 of 4; random weights: from the start" in text
    assert "holds another run (fit.lr is 0.001 there and 0.5 here)" in error_line(*training, "fit.lr=0.5")
    assert "has not finished" in error_line("evaluate", out, "--dry-run")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    train(recipe, out)
    assert "finished; nothing to do" in printed(*training)
    text = printed("evaluate", out, "--dry-run")
    assert "cosine: 6 images x 2 forward passes" in text and f"writes: {out / 'results.csv'}" in text
    assert text == printed("plan", out)
    assert "needs --da2k DIR" in error_line("evaluate", out, "--metric", "da2k", "--dry-run")


def test_plan_refuses_what_training_refuses(recipe_values, tmp_path, monkeypatch):
    recipe = ProbeRunRecipe.model_validate(recipe_values)
    for change, processes, message in (
        ({"layers": "0,9"}, 1, "layer 9 is out of range"),
        ({}, 13, "13 processes for 12 images"),
        ({"fit": recipe.fit.model_copy(update={"report_to": "pigeon"})}, 1, "fit.report_to is 'pigeon'"),
    ):
        with pytest.raises(UserError, match=message):
            plan_training(recipe.model_copy(update=change), tmp_path / "run", processes)
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="no disk space"):
        plan_training(recipe, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_plan_of_unreadable_images_is_one_line(recipe_values, tmp_path):
    data = tiny.coco(tmp_path / "coco", train=2, val=2)
    for image in (data / "train2017").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(UserError, match="no image of train2017 can be read"):
        plan_training(ProbeRunRecipe.model_validate(recipe_values | {"data": {"path": f"coco:{data}"}}))


def test_table_is_of_the_devices():
    parts = {
        "checkpoint": Part(flops16=3e16, memory=12e9),
        "teachers": Part(flops32=1e13, memory=3e9),
        "ridge sums": Part(),
        "moments": Part(memory=5e8, disk=5_000),
    }
    work = Work("10 images x 2 passes", 20, parts, sharded=8e9)
    lines = Plan({"steps": "4"}, work).lines(Devices(2, tflops16=100, tflops32=10))
    assert lines == [
        "steps: 4",
        "",
        "           per sample all samples      time   memory  disk",
        "checkpoint   30 PFLOP   600 PFLOP    50 min    12 GB",
        "teachers     10 TFLOP   200 TFLOP   < 1 min     3 GB",
        "moments                                       500 MB  5 kB",
        "total        30 PFLOP   600 PFLOP  50.2 min  15.5 GB  5 kB",
        "",
        "samples: 10 images x 2 passes, 0% of the FLOPs in 32 bits",
        "time: on 2 devices, at 100 TFLOP/s in 16 bits and 10 in 32 bits (assumed; see probing plan --help)",
        "reading: 1 images a second need 1 CPU cores, at 20 a core (assumed)",
        "memory: per device; FSDP shards 8 GB to 4 GB",
    ]
    one = Plan({}, work).lines(Devices(1, tflops16=50, tflops32=10))
    assert "3.33 h" in one[2] and "FSDP" not in "".join(one)


def test_cores_feed_the_images_of_the_planned_time():
    work = Work("7,200,000 conversations", 7_200_000, {"model": Part(1e12)}, images=0.5)  # 2 h, 500 a second
    assert f"reading: 500 images a second need {math.ceil(500 / IMAGES_PER_CORE)} CPU cores, at" in "\n".join(
        Plan({}, work).lines(Devices(10, tflops16=100))
    )
    texts = replace(work, images=0)
    assert "reading" not in "\n".join(Plan({}, texts).lines(Devices(10)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--sizes", "512,2,112,4"], ["--stage", "ift", "--sizes", "512,4,64,8"]], ids=["probes", "stage"]
)
def test_planned_memory_is_within_15_percent_of_a_training(options):
    """In a fresh process, above what it held before; see tests/benchmarks/memory.py."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) == pytest.approx(1, abs=0.15), done.stdout
