"""Saving, loading and publishing probe banks."""

import json

import pytest
import torch

from probing.probes.bank import ProbeBank
from probing.probes.resampler import ResamplerConfig
from probing.utils.errors import UserError


@pytest.fixture
def bank():
    config = ResamplerConfig(key_width=16, queries=4, width=8, output_width=8, heads=2, dim_head=4)
    return ProbeBank.build({"depth": config, "gen": config}, [0, 2, "final"], [0], ["image"], torch.device("cpu"))


def test_bank_round_trip_keeps_predictions(bank, tmp_path, monkeypatch):
    bank.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "probes" / "depth" / "config.json").read_text())
    assert config["layers"] == ["0", "2", "final"] and (tmp_path / "probes" / "gen" / "model.safetensors").is_file()
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = ProbeBank.from_pretrained("~")
    states = torch.randn(2, 5, 16)
    assert loaded.keys == bank.keys and loaded.probes.keys() == bank.probes.keys()
    assert all(torch.equal(probe(states), bank.probes[key](states)) for key, probe in loaded.probes.items())
    with pytest.raises(UserError, match="has no folder probes/"):
        ProbeBank.from_pretrained(tmp_path / "probes")


def names(bank):
    return [(key.teacher, key.layer) for key in bank.probes]


@pytest.fixture(params=["folder", "hub"])
def source(request, bank, tmp_path, hub):
    """A bank in a folder and on the Hub; teacher gen has no layer 0."""
    bank = ProbeBank(
        {key: bank.probes[key] for key in bank.probes if (key.teacher, key.layer) != ("gen", 0)}, bank.keys
    )
    if request.param == "hub":
        assert bank.push_to_hub("user/bank") == f"{hub.url}/user/bank"
        return "user/bank"
    bank.save_pretrained(tmp_path / "bank")
    return str(tmp_path / "bank")


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        ({"layer": 2, "teacher": "depth"}, [("depth", 2)]),
        ({"layer": [2, "final"], "teacher": "gen"}, [("gen", 2), ("gen", "final")]),
        ({"layer": "0"}, [("depth", 0)]),
        ({"teacher": ["gen"]}, [("gen", 2), ("gen", "final")]),
        ({}, [("depth", 0), ("depth", 2), ("depth", "final"), ("gen", 2), ("gen", "final")]),
    ],
)
def test_bank_reads_only_the_selection(bank, source, hub, selection, chosen):
    loaded = ProbeBank.from_pretrained(source, **selection)
    assert names(loaded) == chosen
    for key, probe in loaded.probes.items():
        assert all(torch.equal(t, bank.probes[key].state_dict()[name]) for name, t in probe.state_dict().items())
    if source == "user/bank":
        tensors = {name for name in hub.downloads if name.endswith("safetensors")}
        assert tensors == {f"probes/{teacher}/model.safetensors" for teacher, _ in chosen}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"layer": 7}, "has no probes of layer '7'; choose from 0, 2, final"),
        ({"layer": 0, "teacher": "gen"}, "has no probes of layer '0'; choose from 2, final"),
        ({"teacher": "seg"}, "has no probes of teacher 'seg'; choose from depth, gen"),
    ],
)
def test_bank_names_what_there_is(source, hub, selection, message):
    with pytest.raises(UserError, match=f"^{source} {message}$"):
        ProbeBank.from_pretrained(source, **selection)
    assert not any(name.endswith("safetensors") for name in hub.downloads)
