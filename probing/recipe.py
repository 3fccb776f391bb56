"""Typed recipes: a YAML file, dotted overrides, and the resolved copy that every run keeps.

A recipe fully describes a run. Its fields are declared once, here, as pydantic models; a field that does not exist is
answered with the nearest one that does.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from probing.utils.errors import BROKEN, UserError
from probing.utils.paths import ELSEWHERE, local_path

DEFAULT_PROMPT = "Describe the image in two lines."
TOKEN_KINDS = ("system", "cls", "image", "tile", "newline", "gen", "depth", "seg", "text", "answer", "padding")
"""`image` is the patches of the whole image; `tile` its enlarged parts and `newline` ends of rows, where a family has
them; `cls` the vision tower's class and register tokens, where the LLM gets them."""

TokenKind = Literal["system", "cls", "image", "tile", "newline", "gen", "depth", "seg", "text", "answer"]
R = TypeVar("R", bound=BaseModel)
NO_YAML = (yaml.YAMLError, *BROKEN)
"""What the YAML reader raises; a date of the 13th month is a ValueError, for instance."""


class Strict(BaseModel):
    """Base of every recipe: unknown fields are errors, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


class BackboneRecipe(Strict):
    """Which checkpoint is probed, and how it is loaded and asked."""

    checkpoint: str
    """Folder or Hub id of the checkpoint."""
    revision: str | None = None
    """Hub revision."""
    base: str | None = None
    """Folder or Hub id of the base model, for a checkpoint that is an adapter or a projector alone."""
    prompt: str = DEFAULT_PROMPT
    """The user's turn; it goes through the checkpoint's own chat template, after the image."""
    template: str | None = None
    """Chat template where the checkpoint has none, or another is wanted: vicuna_v1, …, or one in Jinja."""
    vision_tower: str | None = None
    """Folder or Hub id of its vision tower, where the path that it names does not exist."""
    image_size: int | None = Field(default=None, ge=1)
    """Pixels that square images are resized to before the processor of a family that takes every size."""
    whole_image: Literal["first", "last"] | None = None
    """Which part shows the whole image, where a family without a file of its own cuts images into parts."""
    special_tokens: Literal["auto", "on", "off"] = "auto"
    """OLA-VLM's special tokens after the image: `auto` keeps them where the checkpoint has them, `on` insists, `off`
    leaves them out of the prompt."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numbers the checkpoint is loaded in; `auto` is its own type, but float32 for bfloat16 on a CPU without it."""
    device_map: str | None = None
    """Passed to transformers, for checkpoints larger than one device."""
    quantization_config: dict[str, Any] | None = None
    """Passed to transformers, e.g. {quant_method: bitsandbytes, load_in_8bit: true}."""
    attn_implementation: str | None = None
    """Passed to transformers: sdpa, flash_attention_2, eager."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint. Off unless asked for."""


def _teacher_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", name):
        raise ValueError("a teacher's name is a small letter and then up to 31 small letters, digits, - or _")
    if name in NO_TEACHER:
        raise ValueError(f"{name!r} means something else in results; name the teacher differently")
    return name


NO_TEACHER = ("tower", "tokens", "words", "na", "nan", "none", "null")
"""What results name otherwise, or readers of CSV take for nothing."""
TeacherName = Annotated[str, AfterValidator(_teacher_name)]
"""What folders and results call a teacher: one of the catalogue, or any other for a plain encoder."""


class TeacherRecipe(Strict):
    """One teacher: where it comes from and what its target is."""

    id: str
    """Folder or Hub id of the teacher."""
    revision: str | None = None
    """Hub revision."""
    grid: int | None = Field(default=None, ge=1)
    """Side of the target grid of a spatial teacher; by default the teacher's own, at most 24 (the paper's)."""
    features: Literal["patches", "pooled"] = "patches"
    """Of a plain encoder: its features of every patch, or its pooled output, a single token."""
    trust_remote_code: bool = False
    """Run code that comes with a plain encoder. Off unless asked for."""

    @model_validator(mode="after")
    def _grid_of_patches(self) -> Self:
        if self.features == "pooled" and self.grid is not None:
            raise ValueError("pooled features have no grid; leave out grid or features")
        return self


class DataRecipe(Strict):
    """Which images the probes are trained and scored on."""

    path: str
    """`coco:DIR`, a folder in COCO's official layout."""
    train_split: str = "train2017"
    """Split the probes are trained on."""
    eval_split: str = "val2017"
    """Held-out split the probes are scored on."""
    train_limit: int | None = Field(default=None, ge=2)
    """Use only the first N training images; default: all."""
    eval_limit: int | None = Field(default=None, ge=2)
    """Use only the first N held-out images; default: all."""
    view: Literal["square", "own"] = "square"
    """`square`: student and teachers see the same image squashed to a square, so that grids line up (the paper's
    evaluation view); `own`: each applies its own preprocessing to the original image (the paper's training view)."""
    target_cache: str = "off"
    """Cache for teacher features on disk: `off`, `auto` (the user's cache folder, if it has room), or a folder."""
    target_cache_dtype: Literal["float32", "float16"] = "float32"
    """Of what is kept; float16 takes half the disk and rounds features to 11 bits."""

    @field_validator("path")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        if not value.startswith("coco:"):
            raise ValueError(f"must look like coco:DIR, not {value!r}")
        return value


class ProbeRecipe(Strict):
    """The single-layer Perceiver resampler (OLA-VLM, sec. 3; its width is the target's width)."""

    heads: int = Field(default=4, ge=1)
    """Attention heads."""
    dim_head: int = Field(default=32, ge=1)
    """Width of one head."""
    ff_mult: int = Field(default=1, ge=1)
    """Hidden width of the feed-forward block, in multiples of the probe's width."""
    keys: list[TokenKind] = Field(default=list(get_args(TokenKind)), min_length=1)
    """Kinds of tokens the probe may attend to; the default is the whole sequence without padding."""


class FitRecipe(Strict):
    """How the probes are trained."""

    epochs: int = Field(default=2, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=256, ge=2)
    """Images per optimiser step, over all processes."""
    micro_batch: int = Field(default=16, ge=2)
    """Images per forward pass and process; the rest of the batch is accumulated."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the rate rises linearly; then it falls as a cosine to zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradient clipping, per probe, so that no probe depends on another."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """One probe bank per seed, all trained in the same pass. The seed sets initialisation; the order of the images
    follows the first."""
    ridge: bool = True
    """Also gather the sums for the closed-form ridge readout."""
    ridge_penalty: float = Field(default=1e-3, gt=0)
    """Ridge penalty, as a multiple of the mean eigenvalue of the states' covariance."""
    save_minutes: float = Field(default=10.0, ge=0)
    """Minutes between saved training states; 0 saves after every step."""
    workers: int = Field(default=2, ge=0)
    """Processes that read and preprocess images."""
    spread: Literal["auto", "images", "layers"] = "auto"
    """What several processes share among them: `images`, each with all probes; `layers`, each with all images, where
    the probes do not fit one device; `auto`: layers where they do not fit the GPU's memory."""
    bf16: bool = False
    """Products in bfloat16 (autocast); weights, gradients, sums and losses stay float32."""
    report_to: str = "tensorboard"
    """Who is told of losses and learning rate meanwhile: tensorboard (in the run's folder), wandb, mlflow or another
    tracker that accelerate knows, or none."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError("names a seed twice")
        return value


Control = Literal["shuffled", "random"]


class LayersRecipe(Strict):
    """What every look at the layers of a checkpoint is told."""

    backbone: BackboneRecipe
    data: DataRecipe
    teachers: dict[TeacherName, TeacherRecipe] = {}
    """Teacher NAME, or NAME=FOLDER_OR_HUB_ID; any name but depth, seg and gen is a plain vision encoder. Repeatable."""
    layers: str = "all"
    """`all` (0 to L), or a list such as `0,4,8-12,final`; `final` is the state after the final norm."""

    @field_validator("layers", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value  # one layer alone is a number in YAML

    def with_absolute_paths(self) -> Self:
        """A copy whose existing local folders are absolute, so that the run can be used from anywhere."""
        recipe = self.model_copy(deep=True)
        recipe.backbone.checkpoint = _absolute(recipe.backbone.checkpoint)
        if recipe.backbone.base:
            recipe.backbone.base = _absolute(recipe.backbone.base)
        recipe.data.path = "coco:" + _absolute(recipe.data.path.removeprefix("coco:"))
        for teacher in recipe.teachers.values():
            teacher.id = _absolute(teacher.id)
        if recipe.data.target_cache not in ("off", "auto"):
            recipe.data.target_cache = str(local_path(recipe.data.target_cache).absolute())
        return recipe


class ProbeRunRecipe(LayersRecipe):
    """A whole run of `probing train`."""

    teachers: dict[TeacherName, TeacherRecipe] = Field(min_length=1)
    """Teacher NAME, or NAME=FOLDER_OR_HUB_ID; any name but depth, seg and gen is a plain vision encoder. Repeatable."""
    probe: ProbeRecipe = ProbeRecipe()
    fit: FitRecipe = FitRecipe()
    controls: list[Control] = ["shuffled"]
    """Trained controls: `shuffled` pairs every image with another image's target; `random` probes the same
    architecture with random weights in LLM and projector. The mean-target control is always computed."""

    @field_validator("controls")
    @classmethod
    def _no_repeats(cls, value: list[Control]) -> list[Control]:
        return sorted(set(value))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.fit.micro_batch > self.fit.batch_size:
            raise ValueError(
                f"fit.micro_batch {self.fit.micro_batch} is larger than fit.batch_size {self.fit.batch_size}; "
                "lower fit.micro_batch"
            )
        if self.data.train_split == self.data.eval_split:
            raise ValueError(
                f"data.train_split and data.eval_split are both {self.data.eval_split!r}; name a held-out split"
            )
        return self


def _absolute(source: str) -> str:
    if source.startswith(ELSEWHERE):
        return source
    path = local_path(source)
    return str(path.resolve()) if path.exists() else source


def cached_repository(source: str) -> str | None:
    """The repository (`org/name`) whose snapshot in the Hub's cache a path is; None for any other path."""
    parts = re.search(r"(?:^|[/\\])models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$", source)
    return parts[1].replace("--", "/", 1) if parts else None


def model_name(source: str) -> str:
    """What a checkpoint is called: its repository where it lies in the Hub's cache, else the last part of its path."""
    return cached_repository(source) or source.rstrip("/").rsplit("/", 1)[-1]


def _fields_of(model: type[BaseModel], location: Iterable[str | int]) -> list[str]:
    """Names of the fields valid where an unknown one was found."""
    current: Any = model
    for part in location:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            current = TeacherRecipe if current is dict else current
            continue
        annotation = field.annotation
        origin = getattr(annotation, "__origin__", None)
        current = origin if origin is dict else annotation
    return list(getattr(current, "model_fields", {}))


def _explain(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """One line for the first problem of a recipe."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        *parents, name = first["loc"]
        valid = _fields_of(model, parents)
        near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(valid)}"
        return f"{source}: unknown field {where!r}; {hint}"
    if first["type"] == "missing":
        return f"{source}: no {where}; set {where}=VALUE"
    message = first["msg"].removeprefix("Value error, ")
    return f"{source}: {where + ': ' if where else ''}{message}"


def validate(model: type[R], values: Any, source: str) -> R:
    """Builds a recipe from plain values.

    Raises:
        UserError: a field is unknown, missing, of the wrong type or contradicts another; the message names it.
    """
    try:
        recipe = model.model_validate(values)
        dump_recipe(recipe).encode()
    except ValidationError as error:
        raise UserError(_explain(error, model, source)) from None
    except BROKEN as error:
        raise UserError(f"{source} holds what cannot be written down again: {error}; use plain values") from None
    return recipe


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Sets dotted `key=value` pairs in nested plain values; values are read as YAML.

    Raises:
        UserError: an override has no `=`, or goes through something that is not a section.
    """
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise UserError(f"override {override!r} is not of the form key=value; write e.g. fit.lr=3e-3")
        set_field(values, key, parse_scalar(text))
    return values


def set_field(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets one field of nested plain values; raises UserError where a dotted key passes through a value."""
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"{key}: {parent!r} is a value, not a section; see examples/")
    values[last] = value


def parse_scalar(text: str) -> Any:
    """Reads one value as YAML, and `1e-3` as the number that YAML 1.1 takes for a string."""
    try:
        value = yaml.safe_load(text)
    except NO_YAML:
        return text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the plain values of a recipe file.

    Raises:
        UserError: the file is missing, is not YAML, or holds no fields.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}; see examples/ for recipes to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    except NO_YAML as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        at = "" if line is None else f" (line {line + 1})"
        raise UserError(f"recipe {path} is not valid YAML{at}; mend it or start from one in examples/") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} holds no fields; start from one in examples/")
    return values


def load_recipe(model: type[R], path: Path, overrides: Iterable[str] = ()) -> R:
    """Reads a recipe file and applies overrides.

    Raises:
        UserError: the file is missing, is not YAML, or does not describe a valid recipe.
    """
    return validate(model, apply_overrides(read_yaml(path), overrides), str(path))


def dump_recipe(recipe: BaseModel) -> str:
    """The resolved recipe as YAML, every default written out."""
    values = recipe.model_dump(mode="json")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if any(mark in text for mark in "\x85\u2028\u2029"):  # line ends to YAML, which it would read back as others
        return yaml.safe_dump(values, sort_keys=False)
    return text
