"""What notebooks show of our objects: the right numbers, well-formed and escaped, without a forward pass."""

import base64
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import probing
from probing.models import load_backbone, parse_layers
from probing.models.base import layer_ranges
from probing.probes.bank import ProbeBank, ProbeKey
from probing.probes.resampler import Resampler, ResamplerConfig
from probing.recipe import TOKEN_KINDS, BackboneRecipe, ProbeRunRecipe
from probing.runs.directory import Run

HOSTILE = "<script>alert('x')</script> & \"more\""
CONFIG = ResamplerConfig(key_width=16, queries=4, width=8, output_width=8, heads=2, dim_head=4)


@pytest.fixture
def model(models):
    return load_backbone(BackboneRecipe(checkpoint=str(models["llava"])), torch.device("cpu"))


def shown(thing):
    """The HTML of an object, parsed; no text of it is markup."""
    html = thing._repr_html_()
    assert "<script" not in html
    return ET.fromstring(f"<div>{html.replace('&nbsp;', ' ')}</div>")


def rows_of(tree):
    """The cells of the table, by row."""
    return [["".join(cell.itertext()) for cell in row if cell.tag in ("td", "th")] for row in tree.iter("tr")]


def test_model_shows_parts_and_their_sizes(model):
    head, *rows = rows_of(shown(replace(model, name=HOSTILE)))
    assert head == ["part", "class", "parameters", "memory"]
    total = sum(one.numel() for one in model.core.parameters())
    assert [row[0] for row in rows] == [name for name, _ in model.core.named_children()]
    units = {"": 1, "k": 1e3, "M": 1e6}
    counted = sum(float(number) * units[unit] for number, _, unit in (row[2].partition(" ") for row in rows))
    assert counted == pytest.approx(total, rel=0.01)
    assert repr(model).startswith("Backbone(llava: llava, layers 0-3,final; ") and len(repr(model)) < 200


def test_token_map_shows_its_positions_over_the_picture(model):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    _, tokens = model.hidden_states([image], "0")
    tree = shown(tokens)
    positions = [TOKEN_KINDS[code] for code in tokens.kinds[0].tolist()]
    for kind, between, number in rows_of(tree)[1:]:
        first, last = map(int, between.split(" to "))
        assert positions[first] == positions[last] == kind and positions.count(kind) == int(number)
    strip, picture = tree.iter("svg")
    assert sum(int(part.get("width")) for part in strip) == len(positions)
    pixels = picture.find("image").get("href").partition(",")[2]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(pixels)))), np.asarray(image))
    rows, columns = tokens.grid
    assert len(re.findall("M", picture.find("path").get("d"))) == rows - 1 + columns - 1
    first, last = (int(text.text) for text in picture.iter("text"))
    assert positions[first:].index("image") == 0 and last - first + 1 == rows * columns
    _, wide = model.hidden_states([image.resize((80, 40))], "0")  # the processor crops it: no grid
    assert shown(wide).find("svg[2]/path") is None and shown(wide).find("svg[2]/image") is not None
    assert len(list(shown(replace(tokens, picture=None)).iter("svg"))) == 1


def test_bank_shows_layers_by_teachers():
    keys = [(HOSTILE, 0, 0), (HOSTILE, 2, 0), (HOSTILE, 2, 1), ("gen", "final", 0), ("gen", 1, 0)]
    bank = ProbeBank({ProbeKey(*key): Resampler(CONFIG) for key in keys}, {})
    assert rows_of(shown(bank)) == [
        ["teacher", "0", "1", "2", "final"],
        [HOSTILE, "1", "", "2", ""],
        ["gen", "", "1", "", "1"],
    ]
    assert repr(bank).startswith("ProbeBank(5 probes, ") and "gen at 1,final" in repr(bank)


def test_run_shows_how_far_it_is(recipe_values, tmp_path):
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    run = Run(folder, ProbeRunRecipe.model_validate(recipe_values))
    cells = dict(rows_of(shown(run)))
    assert cells["state"] == "not finished" and cells["teachers"] == "depth, seg, gen" and cells["layers"] == "all"
    assert cells["path"] == str(folder)
    (folder / "manifest.json").write_text("{}")
    assert "state: trained, not evaluated" in repr(run)
    (folder / "results.csv").write_text("")
    assert dict(rows_of(shown(run)))["state"] == "evaluated"


def test_teacher_is_one_line(models):
    assert repr(probing.load_teacher("depth", id=str(models["depth"]))).endswith("target 16 x 16)")


@given(st.sets(st.integers(0, 40)), st.booleans())
def test_layer_ranges_read_back_as_the_same_layers(numbers, final):
    layers = [*sorted(numbers), *(["final"] if final or not numbers else [])]
    assert parse_layers(layer_ranges(layers), 40) == layers
