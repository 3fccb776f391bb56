"""What a training stage costs, compared with counted operations of real steps and sizes of real parameters."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from analysis.planning.distillation import plan_stage
from analysis.planning.plan import Devices
from probing.distillation.recipe import DistillRecipe
from probing.distillation.setup import build_stage, load_inputs
from probing.recipe import dump_recipe
from probing.toyworld.layout import write_world
from probing.utils.errors import UserError
from tests.helpers import tiny
from tests.helpers.cli import error_line, probing

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations of one length about COCO's images, so that every micro-batch is as wide."""
    folder = tmp_path_factory.mktemp("data")
    coco = write_world(folder / "coco", 8, 2, seed=0)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a red cube"}]
    names = sorted(f"train2017/{path.name}" for path in (coco / "train2017").iterdir())
    (folder / "data.json").write_text(json.dumps([{"image": name, "conversations": turns} for name in names]))
    return {"conversations": str(folder / "data.json"), "image_root": str(coco)}


@pytest.fixture
def recipe(models, data):
    teachers = {teacher: {"id": str(models[teacher])} for teacher in ("gen", "depth")}
    losses = {
        "plain": {},
        "embedding": {"embedding": {"teachers": teachers, "layers": dict.fromkeys(teachers, "2"), "seek": 1}},
        "feature": {"encoders": {"mode": "feature", "teachers": teachers}},
        "token": {"encoders": {"mode": "token", "teachers": teachers, "tokens": 1}},
        "patches": {"patches": {"annotations": f"coco:{data['image_root']}", "coverage": 0.1}},
    }

    def make(kind="plain", **changes):
        small = {"batch_size": 8, "micro_batch": 2, "trainer": {"report_to": "none", "use_cpu": True}}
        values = {"checkpoint": str(models["llava"]), "stage": "ift", "data": data} | small | losses[kind] | changes
        return DistillRecipe.model_validate(values)

    return make


@pytest.mark.parametrize(
    ("stage", "kind", "again"),
    [
        ("pt", "plain", False),
        ("ift", "plain", True),
        ("vpt", "plain", False),
        ("pt", "embedding", True),
        ("ift", "feature", False),
        ("pt", "token", False),
        ("pt", "patches", False),
    ],
)
def test_flops_are_within_15_percent_of_a_counted_step(recipe, stage, kind, again):
    wanted = recipe(kind, stage=stage, gradient_checkpointing=again)
    work = plan_stage(wanted).work
    stage = build_stage(wanted, load_inputs(wanted), CPU)
    batch = stage.collate([stage.dataset()[index] for index in (0, 1)])
    trainee = stage.model.train()
    del batch["names"]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for auxiliary in trainee.auxiliary:
            auxiliary.prepare([batch], CPU, 1)
        trainee(**batch, num_items_in_batch=torch.tensor(8))["loss"].backward()
    assert work.total.flops32 == pytest.approx(counter.get_total_flops() / 2, rel=0.15) and work.total.flops16 == 0
    assert f"of {batch['labels'].shape[1]} tokens" in work.samples and work.count == 8
    trained = sum(p.numel() for p in trainee.parameters() if p.requires_grad)
    assert work.parts["model"].memory == 4 * sum(p.numel() for p in trainee.parameters())
    assert work.parts["moments"].memory == 8 * trained


def test_processes_share_the_batch_and_weights(recipe):
    one, two = (plan_stage(recipe(), processes=n) for n in (1, 2))
    assert one.work.count == two.work.count and one.work.total.flops32 == two.work.total.flops32
    assert two.work.total.memory > one.work.total.memory  # gradients are sent in buckets
    assert "FSDP shards" in two.lines(Devices(2))[-1] and "FSDP" not in one.lines(Devices())[-1]
    with pytest.raises(UserError, match="not a multiple of micro_batch 2 times 3 processes"):
        plan_stage(recipe(), processes=3)


def test_bfloat16_and_checkpointing_take_less_memory(recipe):
    plain, short, again = (plan_stage(recipe(**c)).work for c in ({}, {"bf16": True}, {"gradient_checkpointing": True}))
    assert short.total.flops32 == 0 and short.total.flops16 == plain.total.flops32 < again.total.flops32
    peak, *others = (
        next(part.memory for name, part in one.parts.items() if "tokens" in name) for one in (plain, again)
    )
    assert others[0] < peak


def test_unreadable_images_are_one_line(recipe, tmp_path):
    folder = tiny.conversations(tmp_path / "data", 4)
    for image in [*folder.rglob("*.jpg"), *folder.rglob("*.png")]:
        image.write_bytes(b"no image")
    wanted = recipe(data={"conversations": str(folder / "data.json"), "image_root": str(folder)})
    with pytest.raises(UserError, match=r"none of \d conversations could be used, first: .*"):
        plan_stage(wanted)


def test_dry_run_is_plan_and_says_how_far_a_stage_is(recipe, tmp_path):
    file, out = tmp_path / "stage.yaml", tmp_path / "out"
    file.write_text(dump_recipe(recipe(max_steps=1, workers=0)))

    def printed(*arguments):
        return probing(*arguments).stdout

    text = printed("distill", file, "--out", out, "--dry-run")
    state = f"checkpoint: {out} (new); training states in {tmp_path / 'out.training'}\n"
    assert text == state + printed("plan", file)
    assert "data: 8 conversations" in text and "steps: 1 of 8 conversations" in text
    assert [path.name for path in tmp_path.iterdir()] == ["stage.yaml"]
    out.mkdir()
    (out / "training.json").write_text(json.dumps({"recipe": file.read_text()}))
    assert "finished; nothing to do" in printed("distill", file, "--out", out, "--dry-run")
    assert "holds another recipe" in error_line("distill", file, "--out", out, "seed=3", "--dry-run")
    assert "leave out --metric" in error_line("plan", file, "--metric", "miou")


def test_recipe_layers_out_of_range_are_refused(recipe):
    values = yaml.safe_load(dump_recipe(recipe("embedding")))
    values["embedding"]["layers"] = {"gen": "9", "depth": "2"}
    with pytest.raises(UserError, match="layer 9 is out of range"):
        plan_stage(DistillRecipe.model_validate(values))


def test_full_size_stage_costs_what_its_recipe_states(tmp_path, monkeypatch):
    """Llama-3-8B from its configuration alone, with fewer conversations."""
    from tests.helpers import full_size

    root = Path(__file__).parents[3]
    full_size.llava(tmp_path / "checkpoints/llava-untrained")
    full_size.conversations(tmp_path / "data/pt.json", 80, rounds=(1, 1), words=(5, 20))
    monkeypatch.chdir(tmp_path)
    text = (root / "examples/distill/pt.yaml").read_text()
    values = yaml.safe_load(text) | {"micro_batch": 16}
    values["data"] = {"conversations": "data/pt.json", "image_root": "data"}
    plan = plan_stage(DistillRecipe.model_validate(values), processes=8)
    stated = float(text.split(" TFLOP a conversation")[0].split()[-1])
    assert plan.work.total.flops16 / 1e12 == pytest.approx(stated, rel=0.01)
    assert plan.work.total.memory / 1e9 == pytest.approx(57.9, rel=0.01)
