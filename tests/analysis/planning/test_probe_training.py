"""What a run costs, told from shapes alone, against sizes counted by hand and runs that were measured."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from analysis.planning.probe_training import Devices, training_cost
from probing.recipe import ProbeRunRecipe
from probing.utils.errors import UserError
from probing.utils.meta_device import META, autocast, backward, count_flops, dry_run
from tests.helpers import full_size, tiny


def test_peak_and_flops_of_a_chain_of_products():
    """a @ b @ c with a view and a deletion in between; floats alone count."""
    with dry_run() as usage, count_flops() as flops:
        a, b, c = (torch.ones(64, 64, device=META) for _ in range(3))
        ids = torch.arange(64, device=META)
        assert usage.bytes == 3 * 64 * 64 * 4
        assert ids.device.type == "cpu"
        first = a @ b
        view = first.t()[:10]
        del first
        second = view.t() @ c[:10]
        assert usage.bytes == 5 * 64 * 64 * 4  # the view keeps its product alive
        del view, second
        assert usage.bytes == 3 * 64 * 64 * 4
    assert usage.peak == 5 * 64 * 64 * 4
    assert flops() == 2 * 64 * 64 * (64 + 10)


def test_masks_keep_their_values():
    """How many places a mask chooses is known, wherever the mask was sent."""
    ids = torch.tensor([[1, 7, 7, 2], [1, 7, 7, 2]])
    with dry_run():
        states = torch.ones(2, 4, 8, device=META)
        mask = (ids.to(META) == 7).to(states.device)
        assert states[mask].shape == (4, 8)
        assert states[:, mask[0]].shape == (2, 2, 8)
        assert int(mask.sum()) == 4


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_counts_as_fused(grouped):
    """No matrix of weights is held, and the operations are those of both products, backward included."""
    batch, heads, length, width = 2, 4, 512, 16
    with dry_run() as usage, count_flops() as flops:
        q, k, v = (
            torch.ones(batch, h, length, width, device=META, requires_grad=True)
            for h in (heads, *([2, 2] if grouped else [heads, heads]))
        )
        mask = torch.ones(batch, 1, length, length, dtype=torch.bool)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        assert out.shape == q.shape
        forward = flops()
        out.sum().backward()
        assert q.grad.shape == q.shape
        assert k.grad.shape == k.shape
        assert usage.peak < 4 * batch * heads * length * length
    product = 2 * batch * heads * length * length * width
    assert forward == 2 * product
    assert flops() == 7 * product


def full_size_recipe(root):
    """The paper's run without weights."""
    return {
        "backbone": {"checkpoint": str(full_size.ola(root / "ola-llama3"))},
        "data": {"path": f"coco:{tiny.coco(root / 'coco', train=2, val=2)}"},
        "teachers": full_size.teachers(root),
        "layers": "1-32",
        "controls": [],
        "fit": {"epochs": 2, "batch_size": 2, "micro_batch": 2, "workers": 0, "ridge": False},
    }


def test_the_papers_run_without_weights(tmp_path):
    """Llama-3-8B with ConvNeXt-XXL, 32 layers, three teachers; by hand 16.8 TFLOP for 630 tokens."""
    cost = training_cost(ProbeRunRecipe.model_validate(full_size_recipe(tmp_path)))
    assert cost.flops == pytest.approx(16.8e12, rel=0.02)  # the small tokenizer makes about as many
    assert cost.backbone == pytest.approx(2 * (7.505e9 + 0.846e9 + 0.0294e9), rel=0.01)
    assert cost.probes == pytest.approx(16 * 1.005e9, rel=0.005)


@pytest.mark.slow
def test_teachers_and_probes_are_in_32_bits_and_take_their_time(tmp_path):
    values = full_size_recipe(tmp_path)
    cost = training_cost(ProbeRunRecipe.model_validate(values), processes=2)
    assert cost.long == pytest.approx(1.62e12 + 2.64e12, rel=0.05)  # facts of teachers and probes at their sizes
    assert cost.batch == 1  # of the batch of two, each process has one
    seconds = cost.images * cost.passes * ((cost.flops - cost.long) / 0.2e12 + cost.long / 0.05e12) / 2
    assert f"{seconds / 3600:.3g} h, at 0.2 TFLOP/s" in cost.lines(Devices(2, 0.2, 0.05))[1]
    assert "time: less than a minute, at 200 TFLOP/s" in cost.lines(Devices(2, 200, 50))[1]
    with pytest.raises(UserError, match="3 processes for 2 images"):
        training_cost(ProbeRunRecipe.model_validate(values), processes=3)


def test_autocast_rounds_products_and_keeps_the_weights_it_rounded():
    with dry_run() as usage, count_flops() as flops:
        weight, states = torch.ones(64, 64, device=META, requires_grad=True), torch.ones(8, 64, device=META)
        before = usage.bytes
        with autocast():
            out = F.linear(states, weight)
            assert out.dtype == torch.bfloat16
            assert F.layer_norm(out, (64,)).dtype == torch.float32
            assert usage.bytes - before == 2 * (64 * 64 + 2 * 8 * 64)  # the weight's copy, both states
            F.linear(states, weight)
            loss = out.sum()
        backward(loss)
        assert weight.grad.dtype == torch.float32
    assert flops() == flops.short == 3 * 2 * 8 * 64 * 64


def test_a_batch_of_corrupt_images_is_said(models, tmp_path):
    coco = tiny.coco(tmp_path / "coco", train=2, val=2)
    for image in (coco / "train2017").iterdir():
        image.write_bytes(b"no image")
    values = {
        "backbone": {"checkpoint": str(models["llava"])},
        "data": {"path": f"coco:{coco}"},
        "teachers": {"gen": {"id": str(models["gen"])}},
        "fit": {"batch_size": 2, "micro_batch": 2, "workers": 0},
    }
    with pytest.raises(UserError, match="none of the first 2 images could be read"):
        training_cost(ProbeRunRecipe.model_validate(values))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--sizes", "1024,2,224,8"], ["--stage", "ift", "--sizes", "1024,4,128,8"]], ids=["probes", "stage"]
)
def test_planned_memory_is_what_a_training_takes(options):
    """In a fresh process, above what it held before; see tests/benchmarks/memory.py."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) == pytest.approx(1, abs=0.1)
