"""Options made from the fields of pydantic models, which are imported only to parse or show them."""

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import click

from probing.utils.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from analysis.planning.plan import Devices, Plan

    R = TypeVar("R", bound=BaseModel)

CLICK_TYPES = {int: click.INT, float: click.FLOAT, Path: click.Path(path_type=Path)}
OUT = click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Check the inputs, print the plan, and write nothing.")
OPEN = click.option("--open", "show", is_flag=True, help="Open the report in the browser.")
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


class FieldCommand(click.Command):
    """A command with options made from a model's fields: type, choices, default and help.

    Args:
        model: `module:Class`; importing it on demand keeps `probing --help` fast.
        fields: option name → field; sections are separated by `__`. By default every field is an option.
        keys: whether KEY=VALUE sets any field; --help lists those that are no options.
    """

    def __init__(
        self, *args: Any, model: str, fields: Mapping[str, str] | None = None, keys: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model, self.fields, self.keys = model, fields, keys

    def _load_model(self) -> type["BaseModel"]:
        module, name = self.model.split(":")
        return getattr(importlib.import_module(module), name)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Adds the options of fields to those declared on the function."""
        model = self._load_model()
        fields = {field: field for field in model.model_fields} if self.fields is None else self.fields
        return [*(field_option(model, *pair) for pair in fields.items()), *super().get_params(ctx)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Adds the fields that KEY=VALUE sets, with their defaults, below the options."""
        super().format_options(ctx, formatter)
        options = {key.replace("__", ".") for key in (self.fields or {}).values()}
        if self.keys:
            with formatter.section("Fields (KEY=VALUE)"):
                formatter.write_dl([(key, text) for key, text in recipe_keys(self._load_model()) if key not in options])


def recipe_keys(model: type["BaseModel"], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields every field of a recipe with its sections, and its description and default."""
    from pydantic import BaseModel

    for name, field in model.model_fields.items():
        key, kind = f"{prefix}{name}", _without_none(field.annotation)
        by_name = get_origin(kind) is dict
        if by_name:
            kind = get_args(kind)[1]
        section = isinstance(kind, type) and issubclass(kind, BaseModel)
        if by_name or not section or (not field.is_required() and field.default is None):
            yield key, _help(field)
        if section:
            yield from recipe_keys(kind, f"{key}.NAME." if by_name else f"{key}.")


def _without_none(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is UnionType and NoneType in get_args(kind) else kind


def _help(field: "FieldInfo") -> str:
    text = " ".join((field.description or "").replace("`", "").split())
    if isinstance(field.default, (int, float, str, list)) and field.default != []:
        text += f"  [default: {json.dumps(field.default).replace(chr(34), '')}]"  # as one would write it
    return text


def field_option(model: type["BaseModel"], name: str, key: str) -> click.Option:
    """Makes an option from a field; the default stays with the field, so that a missing option is None or empty."""
    *sections, last = key.split("__")
    for section in sections:
        model = model.model_fields[section].annotation  # type: ignore[assignment]
    field = model.model_fields[last]
    kind = _without_none(field.annotation)
    multiple = get_origin(kind) in (list, tuple, dict)
    if get_origin(kind) in (list, tuple):
        kind, name = get_args(kind)[0], name.removesuffix("s")
    extra: Any = field.json_schema_extra or {}
    choices = get_args(kind) if get_origin(kind) is Literal else extra.get("choices", tuple)()
    text = _help(field)
    if multiple and "epeatable" not in text:
        text += " Repeatable."
    return click.Option(
        [f"--{name.replace('_', '-')}", key],
        type=click.Choice(list(choices)) if choices else CLICK_TYPES.get(kind, click.STRING),
        multiple=multiple,
        metavar="NAME[=ID]" if get_origin(kind) is dict else None,
        callback=(lambda ctx, option, value: teacher_values(value)) if get_origin(kind) is dict else None,
        help=text,
    )


def build_recipe(
    model: type["R"],
    values: dict[str, Any],
    options: Mapping[str, Any],
    overrides: Iterable[str] = (),
    source: str = "command line",
) -> "R":
    """Builds a recipe from plain values, then options that are set, then KEY=VALUE.

    Raises:
        UserError: a field is unknown, missing or invalid.
    """
    from probing.recipe import apply_overrides, set_field, validate

    for name, value in options.items():
        *sections, _ = name.split("__")
        for section in sections:
            values.setdefault(section, {})  # so that an error names the missing field, not its section
        if value not in (None, (), {}):
            set_field(values, name.replace("__", "."), value)
    return validate(model, apply_overrides(values, overrides), source)


def print_plan(plan: "Plan", devices: "Devices | None" = None) -> None:
    """Prints a plan for some devices; by default for the processes that a launcher started."""
    from analysis.planning.plan import Devices
    from probing.utils.distributed import world_size

    click.echo("\n".join(plan.lines(devices or Devices(world_size()))))


def print_page(page: Path, show: bool) -> None:
    """Prints the path of a report, and opens it on request."""
    click.echo(f"report: {page}")
    if show:
        import webbrowser

        if not webbrowser.open(page.absolute().as_uri()):
            click.echo("no browser found; open the report by hand", err=True)


def teacher_values(options: Iterable[str]) -> dict[str, dict[str, str]]:
    """Builds section `teachers` of a recipe from `NAME[=ID]`.

    Raises:
        UserError: a name that has no default id comes without one, or is repeated.
    """
    from probing.teachers.registry import CATALOGUE

    values: dict[str, dict[str, str]] = {}
    for option in options:
        name, _, identifier = option.partition("=")
        if name not in CATALOGUE and not identifier:
            raise UserError(
                f"no teacher is called {name!r}; use {', '.join(CATALOGUE)}, or any vision encoder: --teacher "
                f"{name or 'NAME'}=FOLDER_OR_HUB_ID"
            )
        if name in values:
            raise UserError(f"two teachers are called {name!r}; rename one, such as {name}2=…")
        values[name] = {"id": identifier or CATALOGUE[name].default_id}
    return values


def as_lines(values: Mapping[str, Any]) -> str:
    """Formats a description as lines of name and value."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{inner} {part}" for inner, part in value.items())
        elif isinstance(value, list):
            value = " x ".join(map(str, value))
        elif isinstance(value, str) and ("\n" in value or name == "prompt"):
            value = json.dumps(value)
        lines.append(f"{name.replace('_', ' '):<16}{value}")
    return "\n".join(lines)
