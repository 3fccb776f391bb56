"""The schema of recipes: YAML files that fully describe a run, with dotted overrides."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from probing.utils.errors import BROKEN, UserError
from probing.utils.paths import ELSEWHERE, local_path

DEFAULT_PROMPT = "Describe the image in two lines."
TOKEN_KINDS = ("system", "cls", "image", "tile", "newline", "gen", "depth", "seg", "text", "answer", "padding")
"""`image`: patches of the whole image; `tile`: its enlarged parts; `newline`: ends of rows; `cls`: class and register
tokens of the vision tower."""

Position = Literal["image", "text", "last", "special"]
TokenKind = Literal["system", "cls", "image", "tile", "newline", "gen", "depth", "seg", "text", "answer"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed that torch, NumPy and transformers accept."""
R = TypeVar("R", bound=BaseModel)
YAML_ERRORS = (yaml.YAMLError, *BROKEN)
"""What the YAML parser raises; an invalid date is a ValueError, for instance."""


class Strict(BaseModel):
    """Base of all recipes: unknown fields are errors, assignments are validated, and numbers are finite."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _words(cls, value: Any, info: ValidationInfo) -> Any:
        """Restores `on` and `off`, which YAML reads as booleans, in fields that are not boolean."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            return "on" if value else "off"
        return value


class BackboneRecipe(Strict):
    """The checkpoint, how it is loaded, and its prompt."""

    checkpoint: str
    """Folder or Hub id of the checkpoint."""
    revision: str | None = None
    """Hub revision."""
    base: str | None = None
    """Folder or Hub id of the base model of an adapter or a projector-only checkpoint."""
    prompt: str = DEFAULT_PROMPT
    """The user's turn, after the image in the checkpoint's chat template."""
    template: str | None = None
    """Chat template that replaces the checkpoint's: vicuna_v1, …, or Jinja text."""
    vision_tower: str | None = None
    """Folder or Hub id of the vision tower, if the path in the checkpoint does not exist."""
    image_size: int | None = Field(default=None, ge=1)
    """Side in pixels to which images are resized, for families that accept any size."""
    whole_image: Literal["first", "last"] | None = None
    """Which crop shows the whole image, for generic families that split images into crops."""
    special_tokens: Literal["auto", "on", "off"] = "auto"
    """OLA-VLM's special tokens after the image: `auto` uses them if the checkpoint has them, `on` requires them, `off`
    omits them."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the loaded checkpoint; `auto`: its own, but float32 instead of bfloat16 on CPUs without bfloat16."""
    device_map: str | None = None
    """Passed to transformers, for checkpoints larger than one device."""
    quantization_config: dict[str, Any] | None = None
    """Passed to transformers, e.g. {quant_method: bitsandbytes, load_in_8bit: true}."""
    attn_implementation: str | None = None
    """Passed to transformers: sdpa, flash_attention_2, eager."""
    trust_remote_code: bool = False
    """Run code from the checkpoint."""

    def with_absolute_paths(self) -> Self:
        """Copies the recipe with absolute local folders."""
        sources = {name: getattr(self, name) for name in ("checkpoint", "base", "vision_tower")}
        return self.model_copy(update={name: _absolute(source) for name, source in sources.items() if source})


class AssembleRecipe(Strict):
    """The parts of a new checkpoint."""

    llm: str
    """Folder or Hub id of a decoder-only LLM."""
    vision_tower: str
    """Folder or Hub id of transformers or timm; of open_clip a folder, hf-hub:ID, or open_clip:NAME/TAG."""
    projector: str = "mlp2x_gelu"
    """linear, mlp2x_gelu, mlp3x_gelu, …, or identity."""
    image_size: int | None = Field(default=None, ge=1)
    """Side in pixels of the images of an open_clip or timm tower; by default the tower's."""
    template: str | None = None
    """Chat template in place of the LLM's: vicuna_v1, …, or Jinja text."""
    seed: Seed = 0
    """Seed of the projector's initialisation."""


def _teacher_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", name):
        raise ValueError("a teacher's name is a lowercase letter and up to 31 lowercase letters, digits, - or _")
    if name in RESERVED_NAMES:
        raise ValueError(f"{name!r} has another meaning in results; choose another name")
    return name


RESERVED_NAMES = ("tower", "tokens", "words", "na", "nan", "none", "null")
"""Names with another meaning in results, or that CSV readers parse as missing values."""
TeacherName = Annotated[str, AfterValidator(_teacher_name)]
"""Name of a teacher in folders and results: one of the catalogue, or any other for a plain encoder."""


class TeacherRecipe(Strict):
    """One teacher: its source and its target."""

    id: str
    """Folder or Hub id of the teacher."""
    revision: str | None = None
    """Hub revision."""
    grid: int | None = Field(default=None, ge=1)
    """Side of a spatial teacher's target grid; by default the teacher's, at most 24 as in the paper."""
    features: Literal["patches", "pooled"] = "patches"
    """Target of a plain encoder: features of all patches, or the pooled output as a single token."""
    trust_remote_code: bool = False
    """Run code from a plain encoder."""

    @model_validator(mode="after")
    def _grid_of_patches(self) -> Self:
        if self.features == "pooled" and self.grid is not None:
            raise ValueError("pooled features have no grid; leave out grid or features")
        return self


class DataRecipe(Strict):
    """The images on which probes are trained and scored."""

    path: str
    """`coco:DIR`, a folder in COCO's official layout."""
    train_split: str = "train2017"
    """Split on which probes are trained."""
    eval_split: str = "val2017"
    """Held-out split on which probes are scored."""
    train_limit: int | None = Field(default=None, ge=2)
    """Use only the first N training images; default: all."""
    eval_limit: int | None = Field(default=None, ge=2)
    """Use only the first N held-out images; default: all."""
    view: Literal["square", "own"] = "square"
    """`square`: checkpoint and teachers see the same image squashed to a square, so that grids line up (the paper's
    evaluation); `own`: each preprocesses the original image (the paper's training)."""
    target_cache: str = "off"
    """Cache for teacher features on disk: `off`, `auto` (the user's cache folder, if it has space), or a folder."""
    target_cache_dtype: Literal["float32", "float16"] = "float32"
    """dtype of cached features; float16 halves the disk usage and rounds features to 11 bits."""

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
    """Kinds of tokens to which the probe may attend; by default all but padding."""


class FitRecipe(Strict):
    """Training of the probes."""

    epochs: int = Field(default=2, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=256, ge=2)
    """Images per optimiser step, over all processes."""
    micro_batch: int = Field(default=16, ge=2)
    """Images per forward pass and process, at most the batch; gradients accumulate over the batch."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Fraction of the steps with linear warm-up, before cosine decay to zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Maximal gradient norm per probe."""
    seeds: list[Seed] = Field(default=[0], min_length=1)
    """One probe bank per seed, all trained in the same pass. A seed sets the initialisation, the first also the order
    of the images."""
    ridge: bool = True
    """Also fit the closed-form ridge readout."""
    ridge_penalty: float = Field(default=1e-3, gt=0)
    """Ridge penalty, as a multiple of the mean eigenvalue of the states' covariance."""
    positions: list[Position] = []
    """Also measure what each layer holds at the `image` tokens, the `text` after the image, the `last` token or the
    `special` tokens: code length of the mean feature, from the mean state there. Needs `ridge`."""
    buffer: Literal["off", "auto"] | Annotated[float, Field(gt=0)] = "off"
    """Holds hidden states of a window of images, so that several epochs need one forward pass: GB of the host's memory
    per process, `auto` (half of what is free), or `off`."""
    save_minutes: float = Field(default=10.0, ge=0)
    """Minutes between saved training states; 0: save after every step."""
    workers: int = Field(default=2, ge=0)
    """Processes that read and preprocess images."""
    spread: Literal["auto", "images", "layers"] = "auto"
    """What several processes divide among them: `images` (each trains all probes), `layers` (each sees all images), or
    `auto` (layers if the probes exceed the GPU's memory)."""
    bf16: bool = False
    """Train with bfloat16 autocast; weights, gradients, sums and losses stay float32."""
    report_to: str = "tensorboard"
    """Experiment tracker for losses and learning rate: tensorboard (in the run's folder), wandb, mlflow or another that
    accelerate supports, or none."""

    @field_validator("seeds", "positions")
    @classmethod
    def _distinct(cls, value: list[Any]) -> list[Any]:
        if len(set(value)) != len(value):
            raise ValueError("names an entry twice")
        return value

    @model_validator(mode="after")
    def _positions_need_ridge(self) -> Self:
        if self.positions and not self.ridge:
            raise ValueError("positions need ridge: true")
        return self

    @model_validator(mode="after")
    def _micro_batch_in_batch(self) -> Self:
        if self.micro_batch > self.batch_size:
            self.micro_batch = self.batch_size
        return self


Control = Literal["shuffled", "random"]


class LayersRecipe(Strict):
    """Fields shared by all runs over a checkpoint's layers."""

    backbone: BackboneRecipe
    data: DataRecipe
    teachers: dict[TeacherName, TeacherRecipe] = {}
    """Teacher NAME, or NAME=FOLDER_OR_HUB_ID; any name but depth, seg and gen is a plain vision encoder. Repeatable."""
    layers: str = "all"
    """`all` (0 to L), or a list such as `0,4,8-12,final`; `final` is the state after the final norm."""

    @field_validator("layers", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value  # a single layer is a number in YAML

    def with_absolute_paths(self) -> Self:
        """Copies the recipe with absolute local folders, so that the run can be used from anywhere."""
        recipe = self.model_copy(deep=True)
        recipe.backbone = self.backbone.with_absolute_paths()
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
    def _held_out_split(self) -> Self:
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
    """Returns the repository (`org/name`) of a snapshot in the Hub's cache; None for other paths."""
    parts = re.search(r"(?:^|[/\\])models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$", source)
    return parts[1].replace("--", "/", 1) if parts else None


def model_name(source: str) -> str:
    """Returns a checkpoint's name: its repository if in the Hub's cache, else the last part of its path."""
    return cached_repository(source) or source.rstrip("/").rsplit("/", 1)[-1]


def _fields_of(model: type[BaseModel], location: Iterable[str | int]) -> list[str]:
    """Lists the valid fields at a location."""
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
    """Describes the first problem of a recipe in one line."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    where = ".".join(part for part in map(str, first["loc"]) if "[" not in part)  # `[key]`, and members of a union
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
        UserError: a field is unknown, missing, of the wrong type or contradicts another.
    """
    try:
        recipe = model.model_validate(values)
        dump_recipe(recipe).encode()
    except ValidationError as error:
        raise UserError(_explain(error, model, source)) from None
    except BROKEN as error:
        raise UserError(f"{source} has values that YAML cannot store: {error}; use plain values") from None
    return recipe


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Sets dotted `key=value` pairs in nested plain values; values are read as YAML.

    Raises:
        UserError: an override has no `=`, or its parent is not a section.
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
    """Parses one value as YAML, except that `1e-3` is a number, and a sentence may contain `: ` and ` #`."""
    try:
        value = yaml.safe_load(text)
    except YAML_ERRORS:
        return text
    if not isinstance(value, str | dict) or text.lstrip()[0] in "'\"{":
        return value
    try:
        return float(text)
    except ValueError:
        return text


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the plain values of a recipe file.

    Raises:
        UserError: the file is missing, not YAML, or has no fields.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}; see examples/ for recipes to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    except YAML_ERRORS as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        at = "" if line is None else f" (line {line + 1})"
        raise UserError(f"recipe {path} is not valid YAML{at}; fix it or start from one in examples/") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} holds no fields; start from one in examples/")
    return values


def load_recipe(model: type[R], path: Path, overrides: Iterable[str] = ()) -> R:
    """Reads a recipe file and applies overrides.

    Raises:
        UserError: the file is missing, not YAML, or not a valid recipe.
    """
    return validate(model, apply_overrides(read_yaml(path), overrides), str(path))


def dump_recipe(recipe: BaseModel) -> str:
    """Returns the resolved recipe as YAML, with all defaults."""
    values = recipe.model_dump(mode="json")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if any(mark in text for mark in "\x85\u2028\u2029"):  # YAML would read these line breaks back as others
        return yaml.safe_dump(values, sort_keys=False)
    return text
