"""Atomic files and folders, and temporary files of killed processes."""

import pytest

from probing.recipe import ProbeRunRecipe
from probing.runs.directory import FinishedAlignment, Run
from probing.runs.resume import claim
from probing.utils.errors import UserError
from probing.utils.files import atomic_file, atomic_folder


@pytest.fixture
def recipe():
    values = {"backbone": {"checkpoint": "/a"}, "data": {"path": "coco:/b"}, "teachers": {"depth": {"id": "/c"}}}
    return ProbeRunRecipe.model_validate(values)


def test_second_process_keeps_temporary_files(tmp_path, recipe):
    run = Run(tmp_path / "run", recipe)
    claim(run.path, recipe)
    with atomic_file(run.path / "state" / "inputs.json") as temporary:
        claim(run.path, recipe, write=False)
        temporary.write_text("whole")
    assert (run.path / "state" / "inputs.json").read_text() == "whole"


def test_claim_removes_temporary_files_of_a_killed_process(tmp_path, recipe):
    run = Run(tmp_path / "run", recipe)
    claim(run.path, recipe)
    (run.path / "probes").mkdir()
    (run.path / "probes" / ".depth.x.tmp").mkdir()
    (run.path / "probes" / ".depth.x.tmp" / "model.safetensors").touch()
    (run.path / ".results.csv.y.tmp").touch()
    claim(run.path, recipe)
    assert sorted(p.name for p in run.path.rglob("*")) == ["probes", "recipe.yaml"]


@pytest.mark.parametrize("context", [atomic_file, atomic_folder])
def test_failed_write_keeps_the_old_file(tmp_path, context):
    target = tmp_path / "target"
    if context is atomic_file:
        target.write_text("old")
    else:
        target.mkdir()
        (target / "old").touch()
    with pytest.raises(RuntimeError), context(target):
        raise RuntimeError
    assert target.read_text() == "old" if context is atomic_file else (target / "old").exists()
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("text", [None, "{", "- a", "layers: all", b"\xff"], ids=str)
def test_broken_alignment_recipe_is_a_user_error(tmp_path, text):
    if text is not None:
        (tmp_path / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"recipe\.yaml") as caught:
        _ = FinishedAlignment(tmp_path).settings
    assert len(str(caught.value).splitlines()) == 1
