"""Whatever a checkpoint, a probe or a file of scores holds: one line that names it, and no code of it is run."""

import json
import pickle
import shutil
import struct
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

from analysis.evaluation.generated_images.features import inception
from analysis.evaluation.scores import ScoreFile, ScoreKey, read_if_fits, read_summaries
from probing.models import load_backbone
from probing.probes.bank import ProbeBank
from probing.probes.resampler import ResamplerConfig
from probing.recipe import BackboneRecipe, ProbeRunRecipe
from probing.training.run import train
from probing.training.trainer import ProbeTrainer
from probing.utils.checkpoint_files import read_tensors
from probing.utils.errors import UserError
from tests.helpers.hostile import DEEP, Payload, damaged, fuzz, junk, one_line

CPU = torch.device("cpu")


def broken(whole: bytes) -> dict[str, bytes]:
    """A safetensors file in every way in which it can be wrong."""
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = [name for name in header if name != "__metadata__"]

    def packed(changed, start=None):
        text = changed.encode() if isinstance(changed, str) else json.dumps(changed).encode()
        return struct.pack("<Q", len(text) if start is None else start) + text + data

    first, last = header[names[0]], header[names[-1]]
    return {
        "empty": b"",
        "header cut off": whole[: 8 + length // 2],
        "data cut off": whole[:-5],
        "length beyond the file": packed(header, 2**40),
        "length of everything": packed(header, 2**64 - 1),
        "length too small": packed(header, 3),
        "overlap": packed(header | {names[0]: last | {"data_offsets": last["data_offsets"]}}),
        "outside": packed(header | {names[0]: first | {"data_offsets": [2**50, 2**50 + 4]}}),
        "backwards": packed(header | {names[0]: first | {"data_offsets": first["data_offsets"][::-1]}}),
        "huge shape": packed(header | {names[0]: first | {"shape": [2**40, 2**40]}}),
        "other shape": packed(header | {names[0]: first | {"shape": []}}),
        "other type": packed(header | {names[0]: first | {"dtype": "X9"}}),
        "no tensors": packed({"__metadata__": header.get("__metadata__", {})}),
        "junk": packed("{" * 100),
        "deep": packed(DEEP),
        "pickle": pickle.dumps({"a": 1}),
    }


SMALLEST = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
KINDS = list(broken(struct.pack("<Q", len(SMALLEST)) + SMALLEST + bytes(4)))


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    file = tmp_path_factory.mktemp("scores") / "cosine-val2017.safetensors"
    curve = ScoreKey("depth", "0", "resampler", "none", "cosine", "strict")
    ScoreFile({curve: np.ones(3)}, ["a", "b", "c"], "val2017", "x", {curve: np.ones((2, 2))}).write(file)
    return file


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    ProbeBank.build({"gen": ResamplerConfig(8, 1, 12, 12)}, [0, 2], [0], ["image"], CPU).save(folder, {})
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_files(models, scores, bank, tmp_path, kind):
    file = tmp_path / "scores.safetensors"
    file.write_bytes(broken(scores.read_bytes())[kind])
    with pytest.raises(UserError, match=r"scores\.safetensors cannot be read .*; remove it and evaluate again"):
        ScoreFile.read(file)
    assert read_if_fits(file, "x") is None
    shutil.copytree(bank, tmp_path / "bank")
    weights = tmp_path / "bank" / "gen" / "model.safetensors"
    weights.write_bytes(broken(weights.read_bytes())[kind])
    with pytest.raises(UserError, match=r"gen/model\.safetensors cannot be read .*; put it back, or train"):
        ProbeBank.load(tmp_path / "bank", CPU)
    shutil.copytree(models["llava"], tmp_path / "llava")
    weights = tmp_path / "llava" / "model.safetensors"
    weights.write_bytes(broken(weights.read_bytes())[kind])
    with pytest.raises(UserError, match="llava"):
        load_backbone(BackboneRecipe(checkpoint=str(tmp_path / "llava")), CPU)


def test_metadata_of_tensors(scores, bank, tmp_path):
    """The metadata of scores, and the configuration of a bank."""
    content = scores.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    config = json.loads((bank / "gen" / "config.json").read_text())
    folder = tmp_path / "bank"
    shutil.copytree(bank, folder)

    @fuzz
    @given(damaged(json.loads(header["__metadata__"]["pass"])), damaged(config), junk)
    def check(passed, changed, text):
        for said in (json.dumps(passed), json.dumps(text), DEEP):
            new = json.dumps(header | {"__metadata__": {"pass": said}}).encode()
            (tmp_path / "s.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])
            try:
                assert len(ScoreFile.read(tmp_path / "s.safetensors").names) == 3
            except UserError as error:
                one_line(error)
        (tmp_path / "s.json").write_text(json.dumps(text))
        (folder / "gen" / "config.json").write_text(json.dumps(changed))
        for read in (lambda: read_summaries(tmp_path / "s.json"), lambda: ProbeBank.load(folder, CPU)):
            try:
                read()
            except UserError as error:
                one_line(error)

    check()


def test_a_configuration_that_is_nonsense(models, tmp_path):
    folder = tmp_path / "llava"
    shutil.copytree(models["llava"], folder)
    config = json.loads((folder / "config.json").read_text())

    @settings(fuzz, max_examples=25)
    @given(damaged(config))
    @example([])
    @example(config | {"text_config": config["text_config"] | {"hidden_size": -1}})
    @example(config | {"text_config": config["text_config"] | {"num_hidden_layers": "two"}})
    @example(config | {"vision_config": 3})
    @example(config | {"model_type": []})
    @example(config | {"model_type": "llava_llama", "mm_vision_tower": 3, "hidden_size": "x"})
    @example(config | {"mm_vision_tower": "/nowhere", "mm_projector_type": "mlp2x_gelu"})
    def check(changed):
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            load_backbone(BackboneRecipe(checkpoint=str(folder)), torch.device("meta"))
        except UserError as error:
            one_line(error)

    check()


@pytest.mark.parametrize("place", ["../other/model.safetensors", "/etc/passwd", "..", "a/b", 3, None])
def test_shards_are_in_the_folder_of_their_index(models, tmp_path, place):
    folder = tmp_path / "llava"
    shutil.copytree(models["llava"], folder)
    shutil.copytree(models["llava"], tmp_path / "other")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: place for name in ("a", "b")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no file next to it"):
        load_backbone(BackboneRecipe(checkpoint=str(folder)), CPU)
    with pytest.raises(UserError, match="no file next to it"):
        list(read_tensors(str(folder), ""))


def test_no_pickle_runs_code(models, recipe_values, tmp_path, monkeypatch):
    canary, evil = tmp_path / "it ran", tmp_path / "evil.pt"
    torch.save({"a": torch.ones(1), "step": Payload(canary)}, evil)
    torch.load(evil, weights_only=False)
    assert canary.exists()  # so it would
    canary.unlink()
    folder = tmp_path / "llava"
    shutil.copytree(models["llava"], folder)
    (folder / "model.safetensors").unlink()
    shutil.copy(evil, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="may run code"):
        load_backbone(BackboneRecipe(checkpoint=str(folder)), CPU)
    with pytest.raises(UserError, match="may run code"):
        list(read_tensors(str(folder), "a"))
    with pytest.raises(UserError):
        inception(evil, CPU)
    recipe = ProbeRunRecipe.model_validate(recipe_values | {"layers": "1", "controls": []})
    state = tmp_path / "run" / "state" / "none" / "state.pt"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ProbeTrainer, "run", mock.Mock(side_effect=KeyboardInterrupt))
        train(recipe, tmp_path / "run")
    state.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(evil, state)
    with pytest.raises(UserError, match=r"may run code.*; remove .* to train from the start"):
        train(recipe, tmp_path / "run")
    torch.save({"banks": [], "step": "x"}, state)
    with pytest.raises(UserError, match="to train from the start"):
        train(recipe, tmp_path / "run")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UserError, match="to train from the start"):
        train(recipe, tmp_path / "run")
    assert not canary.exists()
