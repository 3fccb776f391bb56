"""A new teacher is one new file."""

import torch
from click.testing import CliRunner
from PIL import Image
from transformers import SegformerForSemanticSegmentation

from probing.cli import cli
from probing.recipe import TeacherRecipe
from probing.teachers import load_teacher
from tests.helpers.new_parts import add_teacher, segformer


def test_a_teacher_is_one_new_file(monkeypatch, tmp_path):
    add_teacher(monkeypatch, tmp_path / "package")
    result = CliRunner().invoke(cli, ["teachers"], catch_exceptions=False)
    assert "semantic" in result.output and "logits on the grid" in result.output
    folder = segformer(tmp_path / "weights")
    teacher = load_teacher("semantic", TeacherRecipe(id=str(folder), grid=16), torch.device("cpu"))
    pixels = teacher.prepare([Image.linear_gradient("L").convert("RGB")])
    with torch.no_grad():
        logits = SegformerForSemanticSegmentation.from_pretrained(folder).eval()(pixels).logits
    torch.testing.assert_close(teacher.target(pixels), logits.flatten(2).transpose(1, 2), rtol=0, atol=1e-6)
