"""Saving, loading and publishing probe banks."""

import json

import pytest
import torch

from probing.probes import bank as bank_module
from probing.probes.bank import ProbeBank
from probing.probes.resampler import ResamplerConfig
from probing.utils.errors import UserError
from tests.helpers.fake_hub import FakeHub


@pytest.fixture
def bank():
    config = ResamplerConfig(key_width=16, queries=4, width=8, output_width=8, heads=2, dim_head=4)
    return ProbeBank.build({"depth": config, "gen": config}, [0, 2, "final"], [0], ["image"], torch.device("cpu"))


def test_bank_round_trip_keeps_predictions(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "probes" / "depth" / "config.json").read_text())
    assert config["layers"] == ["0", "2", "final"] and (tmp_path / "probes" / "gen" / "model.safetensors").is_file()
    loaded = ProbeBank.from_pretrained(tmp_path)
    states = torch.randn(2, 5, 16)
    assert loaded.keys == bank.keys and loaded.probes.keys() == bank.probes.keys()
    assert all(torch.equal(probe(states), bank.probes[key](states)) for key, probe in loaded.probes.items())
    with pytest.raises(UserError, match="no layer 7"):
        ProbeBank.from_pretrained(tmp_path, layers="7")
    with pytest.raises(UserError, match="has no folder probes/"):
        ProbeBank.from_pretrained(tmp_path / "probes")


def test_bank_from_hub_downloads_one_teacher(bank, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path)
    for name in ("create_repo", "upload_folder", "snapshot_download"):
        monkeypatch.setattr(bank_module, name, getattr(hub, name))
    assert bank.push_to_hub("user/bank") == "https://hub/user/bank"
    loaded = ProbeBank.from_pretrained("user/bank", teachers=["gen"], layers="2,final")
    assert [(key.teacher, key.layer) for key in loaded.probes] == [("gen", 2), ("gen", "final")]
    assert all(name.startswith("probes/gen/") for name in hub.downloads)
