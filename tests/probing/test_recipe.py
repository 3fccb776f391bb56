from pathlib import Path

import pytest

from probing.recipe import ProbeRunRecipe, apply_overrides, dump_recipe, load_recipe, parse_scalar, validate
from probing.utils.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def values():
    return {"backbone": {"checkpoint": "org/name"}, "data": {"path": "coco:x"}, "teachers": {"gen": {"id": "org/gen"}}}


def test_defaults_are_the_papers(values):
    recipe = validate(ProbeRunRecipe, values, "x")
    assert (recipe.probe.heads, recipe.probe.dim_head, recipe.probe.ff_mult) == (4, 32, 1)
    fit = recipe.fit
    assert (fit.epochs, fit.batch_size, fit.lr, fit.warmup, fit.weight_decay) == (2, 256, 1e-3, 0.03, 0.0)
    assert recipe.backbone.prompt == "Describe the image in two lines."


@pytest.mark.parametrize(("batch", "micro"), [(4, 4), (256, 16)])
def test_micro_batch_is_at_most_the_batch(values, batch, micro):
    fit = validate(ProbeRunRecipe, apply_overrides(values, [f"fit.batch_size={batch}"]), "x").fit
    assert (fit.batch_size, fit.micro_batch) == (batch, micro)
    fit.lr = 1e-2  # an assignment is validated, too
    assert fit.micro_batch == micro


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
        ("fit.seeds=[1,1]", "fit.seeds: names an entry twice"),
        ("data.path=/x", "data.path: must look like coco:DIR"),
        ("probe.keys=[pictures]", "probe.keys.0: "),
        ("teachers={}", "teachers: "),
    ],
)
def test_wrong_field_is_named(values, override, message):
    with pytest.raises(UserError) as caught:
        validate(ProbeRunRecipe, apply_overrides(values, [override]), "recipe.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_parse_numbers():
    assert parse_scalar("1e-3") == 1e-3 and parse_scalar("[0, 1]") == [0, 1] and parse_scalar("all") == "all"
    with pytest.raises(UserError, match="key=value"):
        apply_overrides({}, ["fit.lr"])
    with pytest.raises(UserError, match="not a section"):
        apply_overrides({"fit": 3}, ["fit.lr=1"])


def test_saved_recipe_round_trips(values, tmp_path):
    recipe = validate(ProbeRunRecipe, apply_overrides(values, ["fit.lr=3e-4"]), "x")
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(ProbeRunRecipe, tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "no fields"), (None, "no recipe at")]
)
def test_file_without_recipe_is_a_user_error(tmp_path, text, message):
    if text is not None:
        (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(ProbeRunRecipe, tmp_path / "r.yaml")
