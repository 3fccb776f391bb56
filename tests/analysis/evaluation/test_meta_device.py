"""Scoring on the meta device, where torch raises at what waits for a GPU, see tests/probing/test_meta_device.py."""

import pytest
import torch

from analysis.evaluation.context import EvaluationContext
from analysis.evaluation.forward_pass import PROBES, ProbePass, ScoreAccumulator, Selection
from analysis.evaluation.options import Options
from analysis.evaluation.registry import metrics
from probing.data.dataloader import MicroBatches, micro_batches
from probing.probes.bank import ProbeBank
from probing.probes.ridge import RidgeReadout
from probing.recipe import ProbeRunRecipe
from probing.runs.directory import Run
from probing.toyworld.layout import write_world
from probing.training.run import load_run_backbone, train

CPU, META = torch.device("cpu"), torch.device("meta")
LAYERS = (0, 2, "final")


@pytest.mark.parametrize("name", ["cosine", "da2k"])
def test_scores_never_wait_for_the_device(recipe_values, tmp_path, monkeypatch, name):
    """They go to the CPU once per batch, in `settle`. The decoder of segmentations waits."""
    # transformers' own, see tests/probing/test_meta_device.py
    monkeypatch.setattr("transformers.models.llava.modeling_llava.torch_compilable_check", lambda *_: None)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda **_: None)
    world = write_world(tmp_path / "world", 2, 4, seed=4)
    values = recipe_values | {"layers": "0,2,final", "controls": ["shuffled"]}
    run = train(ProbeRunRecipe.model_validate(values), tmp_path / "run")
    for kind, load in ((ProbeBank, ProbeBank.load), (RidgeReadout, RidgeReadout.load)):  # files cannot go there
        monkeypatch.setattr(kind, "load", lambda *call, load=load: moved(load(call[0], CPU, *call[2:])))
    means = {teacher: mean.to(META) for teacher, mean in run.mean_targets(CPU).items()}
    monkeypatch.setattr(Run, "mean_targets", lambda *_: means)
    context = EvaluationContext.load(run, Options(da2k=str(world / "da2k")), META)
    recorder = metrics()[name](context)
    backbone = load_run_backbone(run.recipe, "none", META)
    score = ProbePass(run, "none", backbone, recorder, Selection(LAYERS, PROBES, ("none", "shuffled")))
    prepare = {teacher: loaded.prepare for teacher, loaded in recorder.teachers.items()}
    images = MicroBatches(recorder.images, [[0, 1, 2]], backbone.prepare, prepare)
    (prepared,) = micro_batches(images, 0, META)
    scores = ScoreAccumulator(names=list(recorder.images.names[:3]))
    with torch.no_grad():
        score(prepared, scores)
    of_layers = [tensors for key, *tensors in scores.pending if key.layer]
    assert len(of_layers) == len(LAYERS) * 3 * len(recorder.teachers) * len(recorder.series)
    assert all(tensor.is_meta for tensors in of_layers for tensor in tensors)


def moved(loaded):
    """A bank or a readout with its tensors on the meta device."""
    if isinstance(loaded, ProbeBank):
        for probe in loaded.probes.values():
            probe.to(META)
    else:
        loaded.maps = {key: (weight.to(META), bias.to(META)) for key, (weight, bias) in loaded.maps.items()}
    return loaded
