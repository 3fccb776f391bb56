"""A new checkpoint family is one new file."""

import torch
from click.testing import CliRunner
from PIL import Image
from transformers import FastVlmForConditionalGeneration

from probing.cli import cli
from probing.models import load_backbone
from probing.recipe import BackboneRecipe
from tests.helpers.new_parts import add_family, fast_vlm


def test_a_family_is_one_new_file(monkeypatch, tmp_path):
    folder = fast_vlm(tmp_path / "checkpoint")
    add_family(monkeypatch, tmp_path / "package")
    result = CliRunner().invoke(cli, ["inspect", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0 and "fastvit_mci3" in result.output  # which only the new file shows
    backbone = load_backbone(BackboneRecipe(checkpoint=str(folder)), torch.device("cpu"))
    image = Image.linear_gradient("L").convert("RGB")
    states, tokens = backbone.hidden_states([image], "2")
    model = FastVlmForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        reference = model(**backbone.prepare([image]).inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[2], reference[2], rtol=0, atol=1e-6)
    assert backbone.family == "fast_vlm" and tokens.grid == (4, 4)
