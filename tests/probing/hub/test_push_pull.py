"""Published runs: a round trip keeps every number, and no local path or token leaves the machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from analysis.evaluation.run import evaluate
from probing.cli import cli
from probing.hub.push_pull import hide_local_paths, pull, push
from probing.probes.bank import ProbeBank
from probing.probes.ridge import RidgeReadout
from probing.recipe import ProbeRunRecipe
from probing.training.run import train
from probing.utils.errors import UserError
from reports.model_card import write_card
from reports.results import load_runs
from tests.helpers import tiny
from tests.helpers.cli import error_line
from tests.helpers.hub_server import TOKEN

CPU = torch.device("cpu")
TEACHERS = ("depth", "gen")


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """An evaluated run with unreadable images, training state, temporary files and an odd folder name."""
    root = tmp_path_factory.mktemp("run") / "my façade's [x]+(1)"
    data = tiny.coco(root / "coco_folder")
    for split in ("train2017", "val2017"):
        min((data / split).iterdir()).write_bytes(b"no image")
    values = {
        "backbone": {"checkpoint": str(models["llava"])},
        "data": {"path": f"coco:{data}", "target_cache": str(root / "cache")},
        "teachers": {name: {"id": str(models[name])} for name in TEACHERS},
        "layers": "0,2,final",
        "controls": ["random"],
        "fit": {"epochs": 1, "batch_size": 4, "micro_batch": 2, "workers": 0},
    }
    run = train(ProbeRunRecipe.model_validate(values), root / "run")
    evaluate(run.path)
    (run.path / "state").mkdir(exist_ok=True)
    (run.path / "state" / "state.pt").write_bytes(b"x")
    (run.path / "scores" / ".x.json.tmp").write_text("half")
    shutil.copytree(run.path / "probes", run.path / ".probes.1.tmp")
    return run


@pytest.fixture(scope="module")
def paths(models, run):
    """Overrides that set the paths of this machine."""
    teachers = [f"teachers.{name}.id={models[name]}" for name in TEACHERS]
    return [f"backbone.checkpoint={models['llava']}", f"data.path={run.recipe.data.path}", *teachers]


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "llava-probes"
    push(run.path, str(folder), write_card)
    return folder


def table(run):
    return pd.read_csv(run / "results.csv", dtype={"layer": str, "seed": str}, keep_default_na=False)


def empty_card(folder, repo):
    (folder / "README.md").write_text(repo)


def retrained(run, folder):
    """Copies a run with the identity of another one."""
    shutil.copytree(run, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": "2030-01-01T00:00:00Z"}))
    return folder


def test_pulled_run_evaluates_to_same_scores(run, published, paths, tmp_path):
    out = tmp_path / "pulled"
    result = CliRunner().invoke(cli, ["pull", str(published), str(out), *paths])
    assert result.exit_code == 0 and "probing report" in result.output
    pd.testing.assert_frame_equal(table(out), table(run.path))
    assert load_runs([out])[0].teachers == list(TEACHERS)
    shutil.rmtree(out / "scores")
    evaluate(out)
    pd.testing.assert_frame_equal(table(out), table(run.path))


def test_subset_predicts_like_whole_run(run, published, paths, tmp_path):
    subset = pull(str(published), tmp_path / "out", ["2", "final"], ["depth"], paths[:3])
    assert {file.parent.name for file in subset.path.rglob("model.safetensors")} == {"depth"}
    for file in subset.path.rglob("model.safetensors"):
        assert {name.split("layer_")[1].split(".")[0] for name in load_file(file)} == {"2", "final"}
    for control in ("none", "random"):
        whole, part = (ProbeBank.load(one.probes(control), CPU).probes for one in (run, subset))
        assert len(part) == 2
        for key, probe in part.items():
            assert all(torch.equal(t, whole[key].state_dict()[name]) for name, t in probe.state_dict().items())
    whole, part = (RidgeReadout.load(one.ridge("none"), CPU).maps for one in (run, subset))
    assert len(part) == 2 and all(torch.equal(weight, whole[key][0]) for key, (weight, _) in part.items())
    pd.testing.assert_frame_equal(table(subset.path), table(run.path))
    shutil.rmtree(subset.path / "scores")
    evaluate(subset.path)
    whole = table(run.path)
    whole = whole[(whole["teacher"] == "depth") & whole["layer"].isin(["2", "final", ""])].reset_index(drop=True)
    part = table(subset.path)
    pd.testing.assert_frame_equal(part[part["layer"] != "mean"].reset_index(drop=True), whole)
    with pytest.raises(UserError, match="holds something else"):
        push(subset.path, str(published), empty_card)


def test_published_files_hold_no_local_path(run, published, models):
    files = [path for path in published.rglob("*") if path.is_file()]
    assert {path.relative_to(published).parts[0] for path in files} == {
        "README.md", "figures", "recipe.yaml", "manifest.json", "probes", "ridge", "controls", "scores",
        "mean_targets.safetensors", "learning_curves.csv", "results.csv",
    }  # fmt: skip
    private = [*map(str, (run.path.parent, models["llava"].parent, published.parent, Path.home(), "/tmp")), "façade"]
    for file in files:
        content = file.read_bytes()
        assert not file.is_symlink() and not file.name.startswith(".")
        assert not any(text.encode() in content for text in [*private, "fa\\u00e7ade", "ade's", "[x]+(1)"]), file
    recipe = yaml.safe_load((published / "recipe.yaml").read_text())
    assert recipe["backbone"]["checkpoint"] == "elsewhere:llava"
    assert recipe["data"]["path"] == "coco:elsewhere:coco_folder"
    skipped = json.loads((published / "manifest.json").read_text())["skipped"]
    assert {(row["split"], row["reason"]) for row in skipped} == {
        ("train2017", "corrupt: cannot identify image file"),
        ("val2017", "corrupt: cannot identify image file"),
    }


def test_local_paths_are_hidden_and_texts_stay():
    cached = "/home/me/.cache/huggingface/hub/models--org--name/snapshots/0123abc"
    assert hide_local_paths({"a": ["/data/x y", "~/coco", "coco:/data/coco", cached]}) == {
        "a": ["elsewhere:x y", "elsewhere:coco", "coco:elsewhere:coco", "org/name"]
    }
    texts = ["org/name", "</s>[INST] <image>\n/a [/INST]", "Describe and/or list.", 3, None]
    assert hide_local_paths(texts) == texts


@pytest.mark.parametrize("prompt", ["Look at {run}.", "hf_" + "aB3" * 11])
def test_push_refuses_files_with_secrets(run, tmp_path, prompt):
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"prompt": prompt.format(run=copy)}))
    with pytest.raises(UserError, match=r"manifest\.json would publish (/|a Hub token)"):
        push(copy, str(tmp_path / "out"), empty_card)
    assert not (tmp_path / "out").exists()


def test_hub_round_trip_downloads_requested_teacher(run, published, paths, hub, tmp_path):
    assert push(run.path, "user/probes", empty_card) == f"{hub.url}/user/probes"
    names = [path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()]
    names = [name for name in names if not name.startswith("figures/")]
    assert sorted(hub.files("user/probes")) == sorted([".gitattributes", *names])
    pull("user/probes", tmp_path / "part", teachers=["gen"])
    assert {name.split("/")[-2] for name in hub.downloads if name.endswith("model.safetensors")} == {"gen"}
    whole = pull("user/probes", tmp_path / "whole", overrides=paths)
    pd.testing.assert_frame_equal(table(whole.path), table(run.path))


def test_second_push_replaces_same_run_only(run, hub, tmp_path):
    push(run.path, "user/probes", empty_card)
    files = hub.files("user/probes")
    hub.commits["user/probes"].append(files | {"scores/outdated.json": b"[]", "NOTES.md": b"the owner's"})
    push(run.path, "user/probes", empty_card)
    assert hub.files("user/probes") == files | {"NOTES.md": b"the owner's"}
    other = retrained(run.path, tmp_path / "other")
    with pytest.raises(UserError, match="user/probes holds something else"):
        push(other, "user/probes", empty_card)
    hub.create("user/model", {"config.json": b"{}"})
    with pytest.raises(UserError, match="user/model holds something else"):
        push(run.path, "user/model", empty_card)


def test_push_names_an_invalid_repository_name(run):
    with pytest.raises(UserError, match="'a b c' is no repository name"):
        push(run.path, "a b c", empty_card)


def test_paths_can_be_set_after_pull(run, published, paths, tmp_path, caplog):
    out = tmp_path / "run"
    caplog.set_level("INFO")
    pull(str(published), out)
    assert "backbone.checkpoint=DIR data.path=coco:DIR teachers.depth.id=DIR teachers.gen.id=DIR" in caplog.text
    with pytest.raises(UserError, match="elsewhere:coco_folder"):
        evaluate(out)
    assert pull(str(published), out, overrides=paths).recipe.data.path == run.recipe.data.path
    evaluate(out)
    push(out, str(published), empty_card)


def test_pulled_recipe_runs_no_code_and_fills_no_folder(published, tmp_path):
    folder = tmp_path / "theirs"
    shutil.copytree(published, folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["backbone"]["trust_remote_code"] = recipe["teachers"]["gen"]["trust_remote_code"] = True
    recipe["data"]["target_cache"] = str(tmp_path / "filled")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    recipe = pull(str(folder), tmp_path / "run").recipe
    assert not recipe.backbone.trust_remote_code and not recipe.teachers["gen"].trust_remote_code
    assert recipe.data.target_cache == "off"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push", "{run}", "{run}"], "holds something else"),
        (["push", "{run}", "{full}"], "holds something else"),
        (["push", "{other}", "{published}"], "holds something else"),
        (["push", "{full}", "{tmp}/new"], "no run at"),
        (["push", "{run}", "user/probes"], "no valid Hub token; log in"),
        (["pull", "user/probes", "{tmp}/new"], "no repository user/probes on the Hub"),
        (["pull", "{tmp}/nowhere", "{tmp}/new"], "is no published run"),
        (["pull", "{published}", "{tmp}/new", "--layer", "9"], "no probes of layer '9'; choose from 0, 2, final"),
        (
            ["pull", "{published}", "{tmp}/new", "--teacher", "seg"],
            "no probes of teacher 'seg'; choose from depth",
        ),
        (["pull", "{published}", "{full}"], "holds something else"),
        (["pull", "{published}", "{other}"], "holds something else"),
        (["pull", "{published}", "{tmp}/new", "data.pth=x"], "unknown field 'data.pth'"),
    ],
)
def test_user_error_is_one_line_and_writes_nothing(run, published, hub, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    retrained(run.path, tmp_path / "other")
    before = {path: path.stat().st_mtime_ns for path in [*tmp_path.rglob("*"), *published.rglob("*")]}
    places = {"run": run.path, "published": published, "tmp": tmp_path}
    places |= {name: tmp_path / name for name in ("full", "other")}
    monkeypatch.delenv("HF_TOKEN")
    assert message in error_line(*(part.format(**places) for part in arguments))
    assert before == {path: path.stat().st_mtime_ns for path in [*tmp_path.rglob("*"), *published.rglob("*")]}


@pytest.fixture
def online(hub, published):
    """The Hub with the published run."""
    files = [file for file in published.rglob("*") if file.is_file()]
    hub.create("user/probes", {file.relative_to(published).as_posix(): file.read_bytes() for file in files})
    return hub


def test_interrupted_download_resumes(online, published, tmp_path):
    online.cuts = 2
    pulled = pull("user/probes", tmp_path / "run").path
    assert online.cuts == 0
    for file in published.rglob("*.safetensors"):
        assert (pulled / file.relative_to(published)).read_bytes() == file.read_bytes()


def test_lost_connection_is_one_line_and_leaves_nothing(online, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    online.cuts = 10**6
    line = error_line("pull", "user/probes", tmp_path / "run", "--teacher", "gen")
    assert "user/probes: the Hub fails (peer closed connection" in line and "check network" in line
    assert not (tmp_path / "run").exists()
    online.cuts = 0
    assert pull("user/probes", tmp_path / "run", teachers=["gen"]).recipe.teachers.keys() == {"gen"}


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (None, "user/probes", "no repository user/probes on the Hub; check its name, or log in with: hf auth login"),
        (TOKEN, "user/other", "no repository user/other on the Hub; check its name"),
        ("hf_wrong", "user/probes", "no valid Hub token; log in with: hf auth login, or set HF_TOKEN"),
    ],
)
def test_refused_download_is_one_line(online, tmp_path, monkeypatch, token, repo, message):
    online.private.add("user/probes")
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    assert error_line("pull", repo, tmp_path / "run").startswith(message)
    with pytest.raises(UserError, match=message):
        ProbeBank.from_pretrained(repo)


def test_refused_upload_is_one_line(run, hub):
    hub.broken = True
    line = error_line("push", run.path, "user/probes")
    assert line == "user/probes: the Hub fails (403 Forbidden: the storage refuses); check network and token"
    assert hub.files("user/probes").keys() == {".gitattributes"}
    hub.broken = False
    line = error_line("push", run.path, "user/probes", "--license", "mine")
    assert 'Invalid metadata in README.md. - "license" must be one of' in line
    push(run.path, "user/probes", empty_card)


def test_stopped_hub_is_one_line(hub, tmp_path):
    hub.stop()
    assert "user/probes: the Hub fails (" in error_line("pull", "user/probes", tmp_path / "run")


@pytest.mark.slow
def test_processes_publish_and_read_over_http(run, hub, tmp_path):
    names = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    names |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def python(*arguments):
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=os.environ | names, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"published: {hub.url}/user/probes" in python("-m", "probing", "push", run.path, "user/probes")
    python("-m", "probing", "pull", "user/probes", tmp_path / "pulled", "--layer", "2")
    pd.testing.assert_frame_equal(table(tmp_path / "pulled"), table(run.path))
    hub.downloads.clear()
    line = "import probing; print(*probing.ProbeBank.from_pretrained('user/probes', layer=2, teacher='gen').probes)"
    assert "ProbeKey(teacher='gen', layer=2, seed=0)" in python("-c", line)
    assert not hub.downloads  # they are in the cache
