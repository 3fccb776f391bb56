"""Recipes are valid and in the index, and the commands of the texts can be typed."""

import re
import runpy
import shlex
from pathlib import Path

import click
import pytest

from probing.cli import cli
from probing.distillation.recipe import DistillRecipe
from probing.recipe import ProbeRunRecipe, load_recipe, read_yaml

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.parent.name != "cluster")
ABLATIONS = runpy.run_path(str(EXAMPLES / "distill" / "ablations.py"))
TABLES = ["Fig. 5", *(f"Table {n}" for n in ("3", "4", "5", "6", "7", "I", "II", "III", "IV", "V"))]
WHOLE_PAPER = [
    "Fig. 2", "Fig. 3, row 1", "Fig. 3, row 2", "Fig. 3, row 3", "Fig. 5", "Fig. 6", "Figs. II, VI, VII, VIII",
    *(f"Table {n}" for n in ("1", "2", "3", "4", "5", "6", "7", "8", "I", "II", "III", "IV", "V")),
]  # fmt: skip


def load(path, overrides=()):
    kind = DistillRecipe if "stage" in read_yaml(path) else ProbeRunRecipe
    return load_recipe(kind, path, overrides)


def header(path) -> str:
    """The comments that a recipe opens with."""
    lines = path.read_text().splitlines()
    return "\n".join(lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))])


def spoken(text: str) -> list[list[str]]:
    """The commands of a text: what follows `probing`."""
    found = re.findall(
        r"(?:^#? +|`|; do |; )(?:accelerate launch [^\n`]*?-m )?probing ([^\n`|&;]+)", text, re.MULTILINE
    )
    split = [shlex.split(re.sub(r"\$\{?\w+}?|2>&1", "x", one), comments=True) for one in found]
    return [words for words in split if len(words) > 1]  # `probing plan` alone is a name


def check(words: list[str]) -> None:
    """A command that can be typed: its options exist, and so do the fields that it sets."""
    verb = cli.commands[words[0]]
    context = verb.make_context(words[0], words[1:])
    recipe = context.params.get("recipe_file") or context.params.get("path")
    if recipe and str(recipe).endswith(".yaml"):
        load(ROOT / recipe, context.params["overrides"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_recipes_are_valid_and_open_with_commands_and_cost(path):
    assert load(path)
    text = header(path)
    assert re.search(r"Cost|minutes|cores", text) or path.parent.name == "study", text
    commands = spoken(text)
    assert commands or path.parent.name in ("study",) or "ola_patches" in path.name
    for words in commands:
        check(words)


def test_the_index_has_everything_and_nothing_else():
    text = (EXAMPLES / "README.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert sorted(set(rows) & set(WHOLE_PAPER)) == sorted(WHOLE_PAPER)
    for path in RECIPES:
        assert f"{path.parent.name}/{path.name}" in text, path
    commands = spoken("\n".join(line for line in text.splitlines() if line.startswith("| ")))
    assert len(commands) > 15
    for words in commands:
        check(words)
    assert re.findall(r'ablations\.py "([^"]+)"', text) == TABLES


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(EXAMPLES.rglob("README.md"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_page_links_exist_and_commands_parse(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^):#]+)\)", text):
        assert (page.parent / link).exists(), link
    for words in spoken("\n".join(line for line in text.splitlines() if line.startswith(("    probing", "probing ")))):
        check([word for word in words if not word.startswith("…")])


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


@pytest.mark.parametrize("toy", [False, True], ids=["full", "toy"])
def test_ablations_become_commands_that_can_be_typed(toy):
    names = []
    for table in TABLES:
        commands = ABLATIONS["commands"](table, Path("runs/x"), toy)
        rows = ABLATIONS["rows"](table, toy)
        assert len(commands) == 4 * (len(rows) + 1) + 1
        outs = [words[words.index("--out") + 1] for words in commands if "--out" in words]
        assert len(set(outs)) == len(outs), "rows share a folder"
        names += rows
        for words in commands:
            assert words[0] == "probing"
            check(words[1:])
    assert len(names) == 40
    only_ift = ABLATIONS["commands"]("Table 4", Path("runs/x"), toy)[-5:]
    recipe = load(ROOT / only_ift[1][2], [word for word in only_ift[1] if "=" in word])
    assert recipe.stage == "ift" and recipe.embedding is not None and recipe.train_special_tokens
    with pytest.raises(click.ClickException, match=r"there are Fig\. 5, Table 3"):
        ABLATIONS["rows"]("Table 99", toy)
