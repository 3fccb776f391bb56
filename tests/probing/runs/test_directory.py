"""Files and folders are whole or not there, and what a killed process left is cleared by one process alone."""

import pytest

from probing.recipe import ProbeRunRecipe
from probing.runs.directory import AlignmentRun, Run
from probing.utils.errors import UserError
from probing.utils.files import whole_file, whole_folder


@pytest.fixture
def recipe():
    values = {"backbone": {"checkpoint": "/a"}, "data": {"path": "coco:/b"}, "teachers": {"depth": {"id": "/c"}}}
    return ProbeRunRecipe.model_validate(values)


def test_another_process_that_opens_the_run_leaves_files_that_are_being_written(tmp_path, recipe):
    run = Run.create(tmp_path / "run", recipe)
    with whole_file(run.path / "state" / "inputs.json") as temporary:
        Run.create(tmp_path / "run", recipe)
        temporary.write_text("whole")
    assert (run.path / "state" / "inputs.json").read_text() == "whole"


def test_left_overs_of_a_killed_process_are_removed(tmp_path, recipe):
    run = Run.create(tmp_path / "run", recipe)
    (run.path / "probes").mkdir()
    (run.path / "probes" / ".depth.x.tmp").mkdir()
    (run.path / "probes" / ".depth.x.tmp" / "model.safetensors").touch()
    (run.path / ".results.csv.y.tmp").touch()
    run.remove_left_overs()
    assert sorted(p.name for p in run.path.rglob("*")) == ["probes", "recipe.yaml"]


@pytest.mark.parametrize("context", [whole_file, whole_folder])
def test_a_failure_leaves_what_was_there(tmp_path, context):
    target = tmp_path / "target"
    if context is whole_file:
        target.write_text("old")
    else:
        target.mkdir()
        (target / "old").touch()
    with pytest.raises(RuntimeError), context(target):
        raise RuntimeError
    assert target.read_text() == "old" if context is whole_file else (target / "old").exists()
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("text", [None, "{", "- a", "layers: all", b"\xff"], ids=str)
def test_a_broken_recipe_of_an_alignment_is_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"recipe\.yaml") as caught:
        _ = AlignmentRun(tmp_path).settings
    assert len(str(caught.value).splitlines()) == 1
