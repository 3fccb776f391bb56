from pathlib import Path

import pytest

from analysis.benchmarks.recipe import BenchRecipe
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


@pytest.mark.parametrize(
    ("overrides", "batch", "micro"),
    [
        (["fit.batch_size=4"], 4, 4),
        (["fit.batch_size=1e1"], 10, 10),
        (["fit.batch_size=4", "fit.micro_batch=32"], 4, 4),
        ([], 256, 16),
    ],
)
def test_micro_batch_is_at_most_the_batch(values, overrides, batch, micro):
    fit = validate(ProbeRunRecipe, apply_overrides(values, overrides), "x").fit
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
        ("data.eval_split=train2017", "both 'train2017'"),
        ("fit.lr=-1", "fit.lr: "),
        ("fit.lr=inf", "fit.lr: Input should be a finite number"),
        ("fit.buffer=inf", "fit.buffer: Input should be 'off' or 'auto'"),
        ("fit.seeds=[-1]", "fit.seeds.0: "),
        ("fit.seeds=[4294967296]", "fit.seeds.0: "),
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


@pytest.mark.parametrize(
    ("field", "word"),
    [("fit.buffer", "off"), ("data.target_cache", "off"), ("backbone.special_tokens", "on")],
)
def test_on_and_off_are_words(values, field, word):
    """YAML reads them as booleans, on the command line and in files."""
    section, name = field.split(".")
    for given in (
        apply_overrides(values, [f"{field}={word}"]),
        values | {section: values.get(section, {}) | {name: word == "on"}},
    ):
        assert getattr(getattr(validate(ProbeRunRecipe, given, "x"), section), name) == word
    assert validate(ProbeRunRecipe, apply_overrides(values, ["fit.ridge=off"]), "x").fit.ridge is False


def test_run_with_relative_paths_can_be_used_from_anywhere(values, tmp_path, monkeypatch):
    for name in ("checkpoint", "base", "tower", "coco", "gen"):
        (tmp_path / name).mkdir()
    values["backbone"] = {"checkpoint": "checkpoint", "base": "base", "vision_tower": "tower"}
    values |= {"data": {"path": "coco:coco"}, "teachers": {"gen": {"id": "gen"}}}
    monkeypatch.chdir(tmp_path)
    recipe = validate(ProbeRunRecipe, values, "x").with_absolute_paths()
    backbone = recipe.backbone
    paths = (backbone.checkpoint, backbone.base, backbone.vision_tower, recipe.teachers["gen"].id)
    assert paths == tuple(str(tmp_path / name) for name in ("checkpoint", "base", "tower", "gen"))
    assert recipe.data.path == f"coco:{tmp_path}/coco"
    bench = {"backbone": values["backbone"], "benchmark": "cvbench", "data": "coco"}
    answered = validate(BenchRecipe, bench, "x").with_absolute_paths()
    assert answered.backbone == backbone and answered.data == str(tmp_path / "coco")


def test_overrides_parse_values():
    assert parse_scalar("1e-3") == 1e-3 and parse_scalar("[0, 1]") == [0, 1] and parse_scalar("all") == "all"
    assert parse_scalar("{a: 1}") == {"a": 1} and parse_scalar("'1'") == "1" and parse_scalar("null") is None
    for sentence in ("Answer briefly: what is shown?", "Is it #3 or #4?", "Left: [a], right: {b}"):
        assert parse_scalar(sentence) == sentence
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
