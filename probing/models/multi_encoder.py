"""LLaVA with the teachers as further vision encoders: OLA-VLM's multi-encoder baselines (arXiv:2412.09585, sec. 5.2).

`feature`: the teachers' features are joined to the tower's channel by channel, and one projector reads them all.
`token`: every teacher has a projector of its own, and some tokens of each follow the image tokens.

A folder holds what a LLaVA folder holds, a model type of its own, so that nothing else takes it for one, and
`encoders.safetensors` with the projectors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import AutoConfig, LlavaConfig
from transformers.activations import ACT2FN

from probing.models import llava
from probing.models.base import Backbone, Batch
from probing.models.decoder import decoder_parts
from probing.models.token_map import SPECIAL, SpecialEmbeddings, special_ids
from probing.recipe import BackboneRecipe, TeacherRecipe, model_name
from probing.teachers import Teacher, load_teacher
from probing.utils.checkpoint_files import loading
from probing.utils.errors import UserError
from probing.utils.pretrained import identity, pretrained, require_whole
from probing.utils.processors import describe_processor, first_difference

MODEL_TYPE = "llava_multi_encoder"
WEIGHTS = "encoders.safetensors"


class MultiEncoderConfig(LlavaConfig):
    """A LLaVA's configuration, and `encoders`: mode, tokens per teacher, and the teachers."""

    model_type = MODEL_TYPE


AutoConfig.register(MODEL_TYPE, MultiEncoderConfig, exist_ok=True)


class ConcatProjector(nn.Module):
    """LLaVA's projector over the tower's features and those of the teachers, joined at every place.

    Attributes:
        extra: features (B, N, sum of widths) of the images that are projected next.
    """

    extra: Tensor | None = None

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.linear_1, self.act = nn.Linear(width, hidden), ACT2FN[activation]
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """Tower features (B, N, C) → image tokens (B, N, H)."""
        extra = self.extra
        if extra is None:  # only to keep the projector in a backward pass without images
            extra = features.new_zeros(*features.shape[:-1], self.linear_1.in_features - features.shape[-1])
        joined = torch.cat((features, extra.to(features)), dim=-1)
        return self.linear_2(self.act(self.linear_1(joined.to(self.linear_1.weight.dtype))))


class Encoders(nn.Module):
    """What a multi-encoder LLaVA has beside a LLaVA; the teachers are frozen and no part of its weights.

    Attributes:
        mode: `feature` or `token`.
        tokens: tokens per teacher, in mode `token`.
        teachers: by name, in the order gen, depth, seg.
        special: puts projected tokens into the embedded sequence.
    """

    def __init__(self, config: Any, teachers: dict[str, Teacher], tokenizer: Any) -> None:
        super().__init__()
        self.mode, self.tokens = config.encoders["mode"], config.encoders["tokens"]
        self.teachers = teachers
        self.side = config.vision_config.image_size // config.vision_config.patch_size
        hidden, activation = config.text_config.hidden_size, config.projector_hidden_act
        widths = {name: teacher.shape[1] for name, teacher in teachers.items()}
        if self.mode == "feature":
            width = config.vision_config.hidden_size + sum(widths.values())
            self.projector: nn.Module = ConcatProjector(width, hidden, activation)
        else:
            for name, teacher in teachers.items():
                count = teacher.shape[0]
                if count > 1 and count % self.tokens:
                    raise UserError(
                        f"encoders.tokens = {self.tokens} does not divide the {count} tokens of the {name} teacher; "
                        f"choose one of {', '.join(str(n) for n in range(1, 33) if count % n == 0)}"
                    )
            self.projectors = nn.ModuleDict(
                {
                    name: nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
                    for name, width in widths.items()
                }
            )
            ids = special_ids(tokenizer)
            self.special = SpecialEmbeddings([number for name in teachers for number in ids[name]])
        self.placed: Tensor | None = None

    def install(self, model: Any) -> None:
        """Lets a LLaVA use them."""
        if self.mode == "feature":
            model.model.multi_modal_projector = self.projector
        else:
            model.get_input_embeddings().register_forward_hook(self._place)

    def _place(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output if self.placed is None else self.special.place(args[0], output, self.placed)

    def begin(self, features: dict[str, Tensor], rows: Tensor, batch: int) -> None:
        """Says what the next forward pass sees.

        Args:
            features: per teacher (b, N, D), one row per image.
            rows: (b) which samples of the batch have an image.
            batch: number of samples.
        """
        if self.mode == "feature":
            assert isinstance(self.projector, ConcatProjector)
            self.projector.extra = torch.cat([self._spread(features[name]) for name in self.teachers], dim=-1)
            return
        tokens = torch.cat([self._pool(name, features[name]) for name in self.teachers], dim=1)
        self.placed = tokens.new_zeros(batch, *tokens.shape[1:]).index_copy(0, rows, tokens)

    def end(self) -> None:
        """Forgets it."""
        self.placed = None
        if self.mode == "feature":
            assert isinstance(self.projector, ConcatProjector)
            self.projector.extra = None

    def _spread(self, features: Tensor) -> Tensor:
        """Brings features to the places of the image tokens; a single token stands at every place."""
        count, places = features.shape[1], self.side**2
        if count == 1:
            return features.expand(-1, places, -1)
        if count == places:
            return features
        side = round(count**0.5)
        plane = features.transpose(1, 2).unflatten(2, (side, side))
        wide = F.interpolate(plane, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return wide.flatten(2).transpose(1, 2)

    def _pool(self, name: str, features: Tensor) -> Tensor:
        """A teacher's tokens, means over equally many neighbours; a single token is repeated."""
        if features.shape[1] == 1:
            pooled = features.expand(-1, self.tokens, -1)
        else:
            pooled = features.unflatten(1, (self.tokens, -1)).mean(dim=2)
        projector = self.projectors[name]
        return projector(pooled.to(next(projector.parameters()).dtype))


def open_encoders(config: Any, tokenizer: Any, device: torch.device, folder: Path | None) -> Encoders:
    """Loads the teachers, and the projectors where there are some.

    Args:
        config: a `MultiEncoderConfig`.
        tokenizer: of the checkpoint.
        device: for the teachers.
        folder: with `encoders.safetensors`; None starts afresh.

    Raises:
        UserError: a teacher cannot be loaded or is another one, or the projectors do not fit.
    """
    teachers = {}
    for name in (name for name in SPECIAL if name in config.encoders["teachers"]):  # a saved configuration is sorted
        entry = config.encoders["teachers"][name]
        teacher = load_teacher(name, TeacherRecipe(id=entry["id"], grid=entry.get("grid")), device)
        if device.type != "meta" and entry.get("sha256", teacher.sha256) != teacher.sha256:
            raise UserError(f"the {name} teacher {entry['id']} is not the one this checkpoint was trained with")
        if "processor" in entry:
            now = {f"{name} teacher's processor": describe_processor(teacher.prepare, "own")}
            if changed := first_difference({f"{name} teacher's processor": entry["processor"]}, now):
                raise UserError(f"the {changed} changed since {config.name_or_path} was trained; put it back")
        teachers[name] = teacher
    encoders = Encoders(config, teachers, tokenizer)
    if folder is not None:
        try:
            encoders.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{folder / WEIGHTS} cannot be used ({str(error).splitlines()[0]}); copy the whole folder"
            ) from None
    return encoders


def save_encoders(encoders: Encoders, config: Any, folder: Path) -> None:
    """Makes a multi-encoder folder of a LLaVA folder that was just saved."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in encoders.state_dict().items()}
    save_file(own, folder / WEIGHTS, metadata={"format": "pt"})
    values = config.to_dict()
    for name, teacher in encoders.teachers.items():
        processor = describe_processor(teacher.prepare, "own")
        values["encoders"]["teachers"][name] |= {"sha256": teacher.sha256, "processor": processor}
    values.pop("model_type", None)
    MultiEncoderConfig(**values).save_pretrained(folder)


def as_llava(config: Any) -> Any:
    """The configuration of the LLaVA inside."""
    values = config.to_dict()
    for name in ("encoders", "model_type", "architectures"):
        values.pop(name, None)
    return LlavaConfig(**values)


def load_inner(source: str, config: Any, device: torch.device, dtype: Any, **kwargs: Any) -> Any:
    """The LLaVA inside; its projector is replaced afterwards, so it may have another size."""
    from transformers import LlavaForConditionalGeneration

    inner = as_llava(config)
    model, missing, unexpected = pretrained(
        LlavaForConditionalGeneration, source, inner, device, dtype, ignore_mismatched_sizes=True, **kwargs
    )
    require_whole(source, {name for name in missing if "multi_modal_projector." not in name}, unexpected)
    return model


@dataclass(frozen=True)
class EncoderInputs:
    """Images → `Batch`, with each teacher's pixels among the inputs."""

    inputs: llava.LlavaInputs
    prepare: dict[str, Any]

    @property
    def text(self) -> str:
        """The rendered chat template."""
        return self.inputs.text

    @property
    def processor(self) -> Any:
        """The checkpoint's own."""
        return self.inputs.processor

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image tokens."""
        return self.inputs.grid

    def __call__(self, images: Sequence[Any]) -> Batch:
        """Prepares a batch of RGB images."""
        inputs = self.encode(images, [self.text] * len(images))
        return Batch(inputs, self.inputs.token_map(inputs))

    def encode(self, images: Sequence[Any], texts: Sequence[str]) -> dict[str, Tensor]:
        """What the model takes, of images and as many rendered prompts."""
        pixels = {f"teacher_pixels.{name}": prepare(images) for name, prepare in self.prepare.items()}
        return self.inputs.encode(images, texts) | pixels


class Core(nn.Module):
    """The LLaVA without its head, which looks through the teachers first."""

    def __init__(self, llava_core: nn.Module, encoders: Encoders) -> None:
        super().__init__()
        self.llava, self.encoders = llava_core, encoders

    def forward(self, **inputs: Any) -> Any:
        """One forward pass; every sample has one image, or none has."""
        if "pixel_values" not in inputs:
            return self.llava(**inputs)
        return look_through(self.encoders, self.llava, inputs)


def look_through(encoders: Encoders, model: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """Calls a model whose images the teachers see too; their pixels are among the inputs."""
    own = {name: value for name, value in inputs.items() if not name.startswith("teacher_pixels.")}
    features = {name: one.target(inputs[f"teacher_pixels.{name}"]) for name, one in encoders.teachers.items()}
    batch = len(own["input_ids"])
    encoders.begin(features, torch.arange(batch, device=own["input_ids"].device), batch)
    try:
        return model(**own)
    finally:
        encoders.end()


@dataclass(frozen=True)
class Writer:
    """The whole model, which looks through the teachers before it writes."""

    model: Any
    encoders: Encoders

    @property
    def generation_config(self) -> Any:
        """The model's own."""
        return self.model.generation_config

    def generate(self, **inputs: Any) -> Any:
        """As transformers' `generate`."""
        return look_through(self.encoders, self.model.generate, inputs)


def make_inputs(source: str, config: Any, recipe: BackboneRecipe) -> llava.LlavaInputs:
    """The LLaVA's own inputs, for `probing inspect`."""
    return llava.make_inputs(source, config, recipe)


def load(source: str, config: Any, recipe: BackboneRecipe, device: torch.device, random_seed: int | None) -> Backbone:
    """Loads a multi-encoder checkpoint; see `probing.models.llava.load`.

    In the random-weights control, LLM and projectors are drawn anew, and tower and teachers are kept.
    """
    inputs = make_inputs(source, config, recipe)
    with loading(f"checkpoint {source}"):
        model = load_inner(source, config, device, dtype=recipe.dtype, revision=recipe.revision)
    fresh = random_seed is not None or device.type == "meta"
    if random_seed is not None:
        model = llava.randomised(model, random_seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed or 0)
        encoders = open_encoders(config, inputs.processor.tokenizer, device, None if fresh else Path(source))
    encoders.to(model.dtype).install(model)
    core = Core(model.model, encoders).to(device).eval().requires_grad_(False)
    blocks, norm = decoder_parts(model)
    prepare = {name: teacher.prepare for name, teacher in encoders.teachers.items()}
    return Backbone(
        name=model_name(source),
        source=source,
        family=MODEL_TYPE,
        core=core,
        blocks=blocks,
        norm=norm,
        hidden_size=config.text_config.hidden_size,
        prepare=EncoderInputs(inputs, prepare),
        sha256=identity(source, config, device),
        words=model.get_input_embeddings(),
        projector=model.model.multi_modal_projector,
        head=model.get_output_embeddings(),
        writer=Writer(model, encoders),
    )


def describe(config: Any, inputs: llava.LlavaInputs) -> dict[str, Any]:
    """What `probing inspect` shows."""
    teachers = {name: entry["id"] for name, entry in config.encoders["teachers"].items()}
    return llava.describe(config, inputs) | {"encoders": {"mode": config.encoders["mode"], **teachers}}
