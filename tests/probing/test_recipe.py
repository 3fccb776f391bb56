import re
from pathlib import Path

import pytest

from probing.distill.recipe import DistillRecipe
from probing.errors import UserError
from probing.recipe import ProbeRunRecipe, apply_overrides, dump_recipe, load_recipe, parse_scalar, validate

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def values():
    return {"backbone": {"checkpoint": "org/name"}, "data": {"path": "coco:x"}, "teachers": {"gen": {"id": "org/gen"}}}


def test_the_papers_defaults(values):
    recipe = validate(ProbeRunRecipe, values, "x")
    assert (recipe.probe.heads, recipe.probe.dim_head, recipe.probe.ff_mult) == (4, 32, 1)
    fit = recipe.fit
    assert (fit.epochs, fit.batch_size, fit.lr, fit.warmup, fit.weight_decay) == (2, 256, 1e-3, 0.03, 0.0)
    assert recipe.backbone.prompt == "Describe the image in two lines."


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fit.learning_rate=1", "'fit.learning_rate'; valid here: epochs, batch_size"),
        ("fit.epoch=1", "'fit.epoch'; did you mean 'epochs'"),
        ("bakbone.x=1", "'bakbone'; did you mean 'backbone'"),
        ("teachers.gen.idd=1", "'teachers.gen.idd'; did you mean 'id'"),
        ("fit.micro_batch=512", "fit.micro_batch 512 is larger than fit.batch_size 256"),
        ("data.eval_split=train2017", "both 'train2017'"),
        ("fit.lr=-1", "fit.lr: "),
        ("fit.seeds=[1,1]", "fit.seeds: names a seed twice"),
        ("data.path=/x", "data.path: must look like coco:DIR"),
        ("probe.keys=[pictures]", "probe.keys.0: "),
        ("teachers={}", "teachers: "),
    ],
)
def test_wrong_fields_are_named(values, override, message):
    with pytest.raises(UserError) as caught:
        validate(ProbeRunRecipe, apply_overrides(values, [override]), "recipe.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_read_numbers_as_people_write_them():
    assert parse_scalar("1e-3") == 1e-3 and parse_scalar("[0, 1]") == [0, 1] and parse_scalar("all") == "all"
    with pytest.raises(UserError, match="key=value"):
        apply_overrides({}, ["fit.lr"])
    with pytest.raises(UserError, match="not a section"):
        apply_overrides({"fit": 3}, ["fit.lr=1"])


def test_a_saved_recipe_reads_back_the_same(values, tmp_path):
    recipe = validate(ProbeRunRecipe, apply_overrides(values, ["fit.lr=3e-4"]), "x")
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(ProbeRunRecipe, tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "no fields"), (None, "no recipe at")]
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    if text is not None:
        (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(ProbeRunRecipe, tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "path", [*sorted(EXAMPLES.glob("probe/*.yaml")), EXAMPLES / "study" / "probe.yaml"], ids=lambda p: p.name
)
def test_examples_are_valid(path):
    assert load_recipe(ProbeRunRecipe, path).layers


@pytest.mark.parametrize(
    "path", [*sorted(EXAMPLES.glob("distill/*.yaml")), *sorted(EXAMPLES.glob("toy/*.yaml"))], ids=str
)
def test_examples_of_stages_are_valid(path):
    assert load_recipe(DistillRecipe, path).stage in path.read_text()


@pytest.mark.parametrize(("column", "base"), [(2, "distill/ola_pt.yaml"), (3, "toy/ola_pt.yaml")])
def test_every_ablation_is_a_recipe(column, base):
    """Each row's overrides, and no two rows that are the same unless they say that they are the default."""
    lines = (EXAMPLES / "distill" / "ablations.md").read_text().splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| Table") or line.startswith("| Fig")]
    assert len(rows) == 40
    default = load_recipe(DistillRecipe, EXAMPLES / base)
    for row in rows:
        recipe = load_recipe(DistillRecipe, EXAMPLES / base, re.findall("`([^`]+)`", row[column]))
        if "default" in row[1]:
            assert recipe == default, row[1]
        elif not row[4].strip():
            assert recipe != default, row[1]
