"""Weights on the Hub are identified by the commit that they are loaded from."""

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi

from probing.models import identify, load_backbone
from probing.models.multi_encoder import load_teachers
from probing.recipe import BackboneRecipe, TeacherRecipe
from probing.teachers import load_teacher
from probing.utils.errors import UserError
from probing.utils.processors import describe_processor
from tests.helpers import encoders, tiny

CPU = torch.device("cpu")


def files(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def publish(hub, repo, *folders):
    """Commits folders one after the other; returns the commits."""
    hub.create(repo, files(folders[0]))
    commits = [HfApi().model_info(repo).sha]
    for folder in folders[1:]:
        hub.commits[repo].append(files(folder))
        commits.append(HfApi().model_info(repo).sha)
    return commits


def test_a_checkpoint(hub, models, tmp_path):
    commits = publish(hub, "org/llava", tiny.llava(tmp_path / "other", seed=1), models["llava"])
    for revision, commit in ((commits[0], commits[0]), (None, commits[1])):
        recipe = BackboneRecipe(checkpoint="org/llava", revision=revision)
        assert load_backbone(recipe, CPU).sha256 == identify(recipe).sha256 == f"commit:{commit}"


def test_teachers_and_the_commit_that_a_multi_encoder_checkpoint_was_trained_with(hub, models, tmp_path):
    old, _ = publish(hub, "org/depth", models["depth"], tiny.depth_teacher(tmp_path / "other", seed=9))
    teacher = load_teacher("depth", TeacherRecipe(id="org/depth", revision=old), CPU)
    newer = load_teacher("depth", TeacherRecipe(id="org/depth"), CPU)
    assert teacher.sha256 == f"commit:{old}" != newer.sha256
    entry = {
        "id": "org/depth", "grid": None, "sha256": teacher.sha256,
        "processor": describe_processor(teacher.prepare, "own"),
    }  # fmt: skip
    config = SimpleNamespace(teacher_entries=lambda: {"depth": entry}, name_or_path="trained")
    found = load_teachers(config, CPU)["depth"]
    pixels = torch.rand(1, 3, 28, 28)
    assert found.sha256 == teacher.sha256 and torch.equal(found.target(pixels), teacher.target(pixels))
    assert not torch.equal(found.target(pixels), newer.target(pixels))


def test_a_part_of_a_model_and_a_pipeline(hub, tmp_path, unclip):
    (commit,) = publish(hub, "org/siglip", encoders.make("siglip", tmp_path / "siglip"))
    assert load_teacher("siglip", TeacherRecipe(id="org/siglip"), CPU).sha256 == f"commit:{commit}"
    (commit,) = publish(hub, "org/unclip", unclip)
    assert load_teacher("gen", TeacherRecipe(id="org/unclip"), CPU).sha256 == f"commit:{commit}"


def test_open_clip_reads_no_revision():
    with pytest.raises(UserError, match=r"teachers\.x\.revision: open_clip reads no revisions"):
        load_teacher("x", TeacherRecipe(id="hf-hub:org/clip", revision="v2"), CPU)
