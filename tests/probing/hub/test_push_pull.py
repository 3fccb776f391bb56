"""Runs that are pushed and pulled: the same numbers come back, a part predicts as the whole, and no path goes along."""

import csv
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from analysis.evaluation.run import Options, evaluate
from analysis.evaluation.subset import copy_results
from probing.cli import main
from probing.data.coco import read_image
from probing.hub.push_pull import pull, push
from probing.hub.sanitize import _without_folders
from probing.probes.bank import ProbeBank
from probing.probes.ridge import RidgeReadout
from probing.recipe import ProbeRunRecipe
from probing.runs.directory import Run
from probing.training.run import train
from probing.utils.errors import UserError
from reports.model_card import write_card
from reports.page import write_report
from tests.helpers import tiny

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
TEACHERS = ("depth", "gen")
ODD = "my façade's [x]+(1)"
"""A folder's name with what formats and patterns treat in a way of their own."""
BROKEN = ("counted", "torn", "emptied", "unread", "blank", "garbled")
"""Copies of what was pushed, each spoilt in its way."""


def probing(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "probing", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    """A run of two teachers at every layer, with what a push must not take along: paths, states, temporary files."""
    root = tmp_path_factory.mktemp("made") / ODD
    data = tiny.coco(root / "coco_folder")
    for split in ("train2017", "val2017"):
        next(iter(sorted((data / split).iterdir()))).write_bytes(b"no picture")
    values = {
        "backbone": {"checkpoint": str(models["llava"])},
        "data": {"path": f"coco:{data}", "target_cache": str(root / "cache")},
        "teachers": {name: {"id": str(models[name])} for name in TEACHERS},
        "layers": "all,final",
        "controls": ["shuffled", "random"],
        "fit": {"epochs": 1, "batch_size": 4, "micro_batch": 2, "workers": 0, "seeds": [0, 1]},
    }
    run = train(ProbeRunRecipe.model_validate(values), root / "run")
    evaluate(run.path)
    assert json.dumps(str(data))[1:-1] in (run.path / "manifest.json").read_text()
    (run.path / "state").mkdir(exist_ok=True)
    (run.path / "state" / "state.pt").write_bytes(b"x")
    (run.path / ".results.csv.1.tmp").write_text("half")
    shutil.copytree(run.path / "probes", run.path / ".probes.1.tmp")
    return run


@pytest.fixture(scope="module")
def places(models, made):
    """What whoever pulls says of the machine."""
    teachers = [f"teachers.{name}.id={models[name]}" for name in TEACHERS]
    return [f"backbone.checkpoint={models['llava']}", f"data.path={made.recipe.data.path}", *teachers]


@pytest.fixture(scope="module")
def published(made, tmp_path_factory):
    """A folder that the run was pushed to."""
    folder = tmp_path_factory.mktemp("published") / "llava-probes"
    push(made.path, str(folder), write_card)
    return folder


def table(run):
    return pd.read_csv(run / "results.csv", dtype={"layer": str, "seed": str}, keep_default_na=False)


def other_run(run, folder):
    """A copy that claims to be of another checkpoint."""
    shutil.copytree(run, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["checkpoint"]["sha256"] = "sha256:other"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_there_and_back_gives_the_same_numbers(made, published, places, tmp_path):
    out = tmp_path / "pulled"
    assert "probing report" in probing("pull", published, out, *places).stdout
    pd.testing.assert_frame_equal(table(out), table(made.path))
    write_report([out], tmp_path / "report")
    shutil.rmtree(out / "scores")
    (out / "results.csv").unlink()
    evaluate(out)
    pd.testing.assert_frame_equal(table(out), table(made.path))


def test_a_part_is_a_run_and_predicts_bit_for_bit_as_the_whole(made, published, places, tmp_path):
    out = tmp_path / "part"
    own = [place for place in places if "teachers.gen" not in place]
    run = pull(str(published), out, copy_results, ["2", "final"], ["depth"], own)
    assert {path.parent.name for path in out.rglob("model.safetensors")} == {"depth"}
    for file in out.rglob("model.safetensors"):
        assert {name.split("layer_")[1].split(".")[0] for name in load_file(file)} == {"2", "final"}
    assert set(load_file(run.means)) == {"depth"}
    assert not (out / "README.md").exists()
    config = json.loads((out / "probes" / "depth" / "config.json").read_text())
    assert config["left_out"] == {"teachers": ["gen"], "layers": ["0", "1", "3"]} == run.manifest["left_out"]
    states = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    for control in ("none", "shuffled", "random"):
        whole, part = ProbeBank.load(made.probes(control), CPU), ProbeBank.load(run.probes(control), CPU)
        assert len(part.probes) == 4
        for key, probe in part.probes.items():
            assert torch.equal(probe(states), whole.probes[key](states))
    readouts = RidgeReadout.load(made.ridge("none"), CPU).maps
    for key, (weight, bias) in RidgeReadout.load(run.ridge("none"), CPU).maps.items():
        assert torch.equal(weight, readouts[key][0]) and torch.equal(bias, readouts[key][1])
    before = table(out)
    whole = table(made.path)
    chosen = (whole["teacher"] == "depth") & whole["layer"].isin(["2", "final", ""])
    pd.testing.assert_frame_equal(before, whole[chosen].reset_index(drop=True))
    for scores in ("kept", "anew"):
        evaluate(out)
        after = table(out)
        pd.testing.assert_frame_equal(after[after["layer"] != "mean"].reset_index(drop=True), before, obj=scores)
        shutil.rmtree(out / "scores")


def test_nothing_of_the_machine_goes_along(made, published, models):
    files = [path for path in published.rglob("*") if path.is_file()]
    assert {path.parts[len(published.parts)] for path in files} == {
        "README.md", "figures", "recipe.yaml", "manifest.json", "probes", "ridge", "controls", "scores",
        "mean_targets.safetensors", "learning_curves.csv", "results.csv",
    }  # fmt: skip
    roots = [made.path.parent, models["llava"].parent, published.parent, Path.home(), ROOT, Path("/tmp")]
    for file in files:
        content = file.read_bytes()
        assert not file.name.startswith(".") and file.suffix not in (".pt", ".tmp")
        for root in roots:
            assert str(root).encode() not in content, (file, root)
    recipe = yaml.safe_load((published / "recipe.yaml").read_text())
    assert recipe["backbone"]["checkpoint"] == "elsewhere:llava"
    assert recipe["data"]["path"] == "coco:elsewhere:coco_folder" and recipe["data"]["target_cache"] == "off"
    skipped = json.loads((published / "manifest.json").read_text())["skipped"]
    assert {row["split"] for row in skipped} == {"train2017", "val2017"}
    assert {(row["image"], row["reason"]) for row in skipped} == {
        ("000000000001.jpg", "corrupt: cannot identify image file"),
        ("000000000013.jpg", "corrupt: cannot identify image file"),
    }
    for file in files:  # no part of the odd name, in any format's escapes
        content = file.read_bytes()
        for word in ("façade", "fa\\u00e7ade", "fa\\xE7ade", "ade's", "[x]+(1)"):
            assert word.encode() not in content, (file, word)


def test_what_would_give_the_machine_away_is_refused(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made.path, run)
    manifest = json.loads((run / "manifest.json").read_text())
    for prompt, message in ((f"Look at {run}", "a folder of this machine"), ("hf_" + "aB3" * 11, "a token of the Hub")):
        (run / "manifest.json").write_text(json.dumps(manifest | {"prompt": prompt}))
        with pytest.raises(UserError, match=message):
            push(run, str(tmp_path / "out"), write_card)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_the_card_has_the_numbers_of_the_table(made, published):
    card = ModelCard.load(published / "README.md")
    assert card.data.library_name == "mllm-probing" and card.data.license == "other" and "probing" in card.data.tags
    assert card.data.base_model is None and card.data.datasets == ["coco_folder"]
    whole = table(made.path)
    whole = whole[(whole["seed"] == "all") | ((whole["probe"] == "ridge") & ~whole["seed"].isin(["0", "1"]))]
    for title, metric, protocol in (
        ("centred cosine similarity", "cosine_centred", "strict"),
        ("cosine similarity, flattened", "cosine", "paper"),
    ):
        block = card.text.split(f"**{title} ({protocol})**")[1].split("\n\n")[1]
        rows = list(csv.reader(block.splitlines(), delimiter="|"))
        assert len(rows) == 2 + 4  # two teachers, two probes
        for row in rows[2:]:
            teacher, probe = row[1].strip().split(", ")
            own = whole[(whole["metric"] == metric) & (whole["protocol"] == protocol)]
            own = own[own["teacher"] == {"Depth": "depth", "Generation": "gen"}[teacher]]
            kind = "ridge" if probe.startswith("ridge") else "resampler"
            curve = own[(own["probe"] == kind) & (own["control"] == "none")].set_index("layer")
            layers = curve.drop("mean")
            best = layers.loc[layers["value"].idxmax()]
            assert row[2].strip() == best.name
            for cell, number in ((3, best), (4, curve.loc["0"]), (5, curve.loc["mean"])):
                shown = [float(x) for x in re.findall(r"-?\d+\.\d+", row[cell])]
                np.testing.assert_allclose(shown, number[["value", "ci_low", "ci_high"]].astype(float), atol=5.1e-4)
            random = own[(own["probe"] == kind) & (own["control"] == "random") & (own["layer"] != "mean")]
            assert float(row[6].split()[0]) == pytest.approx(random["value"].max(), abs=5.1e-4)
            mean = own[own["control"] == "mean"]["value"].item()
            assert float(row[8]) == pytest.approx(mean, abs=5.1e-4) and int(row[10]) == best["n"]
    assert "still falling" in card.text or "was flat" in card.text or "stuck at the mean" in card.text
    assert "| depth teacher depth (not on the Hub) | not stated |" in card.text
    command = next(line for line in card.text.splitlines() if line.startswith("probing train"))
    assert "--recipe recipe.yaml" in command and "data.path=coco:PATH/coco" in command
    for picture in re.findall(r"\]\((figures/[^)]+)\)", card.text):
        assert (published / picture).read_bytes().startswith(b"\x89PNG")


def test_the_card_names_what_is_on_the_hub(published, tmp_path):
    folder = tmp_path / "hub"
    shutil.copytree(published, folder)
    shutil.rmtree(folder / "figures")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["checkpoint"] |= {"path": "llava-hf/llava-1.5-7b-hf", "name": "a|b [x](y)"}
    manifest["teachers"]["depth"]["id"] = "depth-anything/Depth-Anything-V2-Large-hf"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_card(folder, "user/probes", "apache-2.0")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "llava-hf/llava-1.5-7b-hf" and card.data.license == "apache-2.0"
    assert "CC-BY-NC-4.0 (no commercial use)" in card.text and r"a\|b \[x\](y)" in card.text


class FakeHub:
    """Repositories in a folder, called as the Hub's own client is."""

    def __init__(self, root: Path) -> None:
        self.root, self.fetched = root, []

    def _bound(self, method, *arguments, **named):
        return inspect.signature(getattr(HfApi, method)).bind(self, *arguments, **named).arguments

    def create_repo(self, *arguments, **named):
        asked = self._bound("create_repo", *arguments, **named)
        (self.root / asked["repo_id"]).mkdir(parents=True, exist_ok=asked["exist_ok"])
        (self.root / asked["repo_id"] / ".gitattributes").write_text("lfs")
        return f"https://hub/{asked['repo_id']}"

    def list_repo_files(self, repo):
        folder = self.root / repo
        if not folder.is_dir():
            raise RepositoryNotFoundError("404", response=httpx2.Response(404, request=httpx2.Request("GET", "x:")))
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def upload_folder(self, **named):
        asked = self._bound("upload_folder", **named)
        names = self.list_repo_files(asked["repo_id"])
        for name in list(filter_repo_objects(names, allow_patterns=asked["delete_patterns"])):
            (self.root / asked["repo_id"] / name).unlink()
        shutil.copytree(asked["folder_path"], self.root / asked["repo_id"], dirs_exist_ok=True)

    def snapshot_download(self, *arguments, **named):
        asked = self._bound("snapshot_download", *arguments, **named)
        target = self.root / "cache" / asked["repo_id"]
        names = filter_repo_objects(self.list_repo_files(asked["repo_id"]), allow_patterns=asked["allow_patterns"])
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / asked["repo_id"] / name, target / name)
            self.fetched.append(name)
        return str(target)


def test_by_way_of_the_hub(made, published, places, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub")
    with pytest.raises(UserError, match="no repository user/probes on the Hub"):
        pull("user/probes", tmp_path / "out", copy_results, api=hub)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("probing.hub.push_pull.get_token", lambda: None)
    with pytest.raises(UserError, match="no token of the Hub; log in"):
        push(made.path, "user/probes", write_card)
    assert push(made.path, "user/probes", write_card, api=hub) == "https://hub/user/probes"
    repo = tmp_path / "hub" / "user" / "probes"
    assert not any(path.is_symlink() for path in repo.rglob("*"))
    mine = {path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()}
    assert set(hub.list_repo_files("user/probes")) == mine | {".gitattributes"}

    pull("user/probes", tmp_path / "part", copy_results, ["1"], ["gen"], api=hub)
    tensors = {name for name in hub.fetched if name.endswith("model.safetensors")}
    assert tensors and all(name.split("/")[-2] == "gen" for name in tensors)
    with pytest.raises(UserError, match="user/probes has no layer '7'; its probes are of the layers 0, 1, 2, 3, final"):
        pull("user/probes", tmp_path / "out", copy_results, ["7"], api=hub)
    whole = pull("user/probes", tmp_path / "whole", copy_results, overrides=places, api=hub)
    pd.testing.assert_frame_equal(table(whole.path), table(made.path))

    (repo / "scores" / "old-val2017.json").write_text("[]")
    (repo / "NOTES.md").write_text("the owner's")
    push(made.path, "user/probes", write_card, api=hub)
    assert set(hub.list_repo_files("user/probes")) == mine | {".gitattributes", "NOTES.md"}
    with pytest.raises(UserError, match="user/probes holds another run"):
        push(other_run(made.path, tmp_path / "other"), "user/probes", write_card, api=hub)
    hub.create_repo("user/model", exist_ok=True)
    (tmp_path / "hub" / "user" / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"user/model holds something else \(config.json\)"):
        push(made.path, "user/model", write_card, api=hub)
    with pytest.raises(UserError, match=r"user/model is no probe bank: it has no manifest\.json"):
        pull("user/model", tmp_path / "out", copy_results, api=hub)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push", "{run}", "{run}"], "lie in one another"),
        (["push", "{run}", "{full}"], "holds something else (mine.txt)"),
        (["push", "{other}", "{published}"], "holds another run"),
        (["push", "{full}", "{tmp}/new"], "no run at"),
        (["push", "{run}", "user/probes"], "no token of the Hub"),
        (["pull", "user/probes", "{tmp}/new"], "the Hub cannot be reached, and user/probes was not pulled before"),
        (["pull", "{tmp}/nowhere", "{tmp}/new"], "no folder"),
        (["pull", "{full}", "{tmp}/new"], "is no probe bank: it has no manifest.json"),
        (["pull", "{published}", "{tmp}/new", "--layer", "9"], "has no layer '9'"),
        (["pull", "{published}", "{tmp}/new", "--teacher", "seg"], "no probes of the teacher 'seg'; it has depth, gen"),
        (["pull", "{published}", "{full}"], "holds something else"),
        (["pull", "{published}", "{other}"], "holds something else, or another part"),
        (["pull", "{published}", "{tmp}/new", "fit.lr=1"], "fit.lr stands as the run was made"),
        (["pull", "{counted}", "{tmp}/new"], "counts layers otherwise ('after the norm')"),
        (["pull", "{torn}", "{tmp}/new", "--layer", "1"], "cannot be read"),
        (["pull", "{torn}", "{tmp}/new"], "must push it again"),
        (["pull", "{emptied}", "{tmp}/new"], "probes/gen/model.safetensors cannot be read"),
        (["pull", "{unread}", "{tmp}/new"], "ridge/depth/model.safetensors cannot be read"),
        (["pull", "{unread}", "{tmp}/new", "--layer", "1"], "ridge/depth/model.safetensors cannot be read"),
        (["pull", "{blank}", "{tmp}/new"], "manifest.json cannot be read (ValueError: there is no checkpoint)"),
        (["pull", "{garbled}", "{tmp}/new"], "gen/config.json is no JSON object that can be read"),
        (["push", "{lost}", "{tmp}/new"], "lost/probes/gen/model.safetensors cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(made, published, tmp_path, monkeypatch, capsys, arguments, message):
    folders = {name: tmp_path / name for name in ("full", *BROKEN, "other", "lost")}
    folders["full"].mkdir()
    (folders["full"] / "mine.txt").write_text("mine")
    for name in BROKEN:
        shutil.copytree(published, folders[name])
    config = folders["counted"] / "probes" / "gen" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layer_convention": "after the norm"}))
    weights = folders["torn"] / "probes" / "gen" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    (folders["emptied"] / "probes" / "gen" / "model.safetensors").unlink()
    (folders["unread"] / "ridge" / "depth" / "model.safetensors").unlink()
    (folders["blank"] / "manifest.json").write_text("{}")
    (folders["garbled"] / "probes" / "gen" / "config.json").write_text("[")
    shutil.copytree(made.path, folders["lost"])
    (folders["lost"] / "probes" / "gen" / "model.safetensors").unlink()
    other_run(made.path, folders["other"])
    before = {path: path.stat().st_mtime_ns for path in [*tmp_path.rglob("*"), *published.rglob("*")]}
    places = {"run": made.path, "published": published, "tmp": tmp_path, **folders}
    monkeypatch.setattr(sys, "argv", ["probing", *(part.format(**places) for part in arguments)])
    monkeypatch.setattr("probing.hub.push_pull.get_token", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("probing: ")]
    assert ended.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert before == {path: path.stat().st_mtime_ns for path in [*tmp_path.rglob("*"), *published.rglob("*")]}


def test_a_pulled_run_says_what_it_does_not_know(published, places, tmp_path):
    out = tmp_path / "run"
    first = probing("pull", published, out, "--teacher", "gen").stderr
    assert "where 'llava' lies on this machine, add to the same command: backbone.checkpoint=DIR" in first
    done = probing("evaluate", out, code=2)
    assert "'elsewhere:coco_folder': the recipe comes from another machine" in done.stderr
    scores = (out / "scores" / "cosine-val2017.safetensors").stat().st_mtime_ns
    assert probing("--quiet", "pull", published, out, "--teacher", "gen", *places[:2], places[3]).stderr == ""
    assert (out / "scores" / "cosine-val2017.safetensors").stat().st_mtime_ns == scores
    evaluate(out, Options(layers="1"))
    again = probing("pull", published, out, "--layer", "1", code=2).stderr
    assert "another part of the run" in again
    push(out, str(tmp_path / "again"), write_card)
    assert "Left out: teachers depth" in (tmp_path / "again" / "README.md").read_text()


def test_a_recipe_of_others_decides_nothing_here(published, tmp_path, caplog):
    folder = tmp_path / "theirs"
    shutil.copytree(published, folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["backbone"]["trust_remote_code"] = True
    recipe["data"]["target_cache"] = str(tmp_path / "filled")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = pull(str(folder), tmp_path / "run", copy_results)
    assert not run.recipe.backbone.trust_remote_code and run.recipe.data.target_cache == "off"
    assert "backbone.trust_remote_code=true, which is off here" in caplog.text
    assert Run.open(tmp_path / "run").finished


FOLDERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 100
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FOLDERS)
@example("my data")
@example("it's")
@example('say "so"')
@example("back\\slash")
@example("two\nlines")
@example("C:\\data")
@example("- 'a': (b")
def test_no_reason_names_a_folder(tmp_path, name):
    """As the reading of images words it: Pillow's own error, cut off, or the system's."""
    folder = tmp_path / "parent of all" / name
    errors = [f"[Errno 13] Permission denied: {str(folder / '1.jpg')!r}", f"{folder / '1.jpg'}: truncated (2 bytes)"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "1.jpg").write_bytes(b"broken")
        read_image(folder / "1.jpg")
    except OSError as error:
        errors.append(str(error))
    for error in errors:
        for length in (120, len(str(tmp_path)) + 30, 500):
            reason = _without_folders(f"corrupt: {error.splitlines()[0][:length]}")
            assert reason.startswith("corrupt") and "parent" not in reason and "/" not in reason, reason


@pytest.mark.parametrize("reason", ["missing", "corrupt: image file is truncated (I/O error)", "no panoptic PNG"])
def test_reasons_without_a_path_stay_as_they_are(reason):
    assert _without_folders(reason) == reason
