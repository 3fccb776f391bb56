"""Defines what every teacher offers: images → pixels on the CPU, pixels → target features."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import probing.utils.torchvision_shim  # noqa: F401
from probing.recipe import TeacherRecipe
from probing.utils.checkpoint_files import loading
from probing.utils.errors import UserError, first_line
from probing.utils.precision import tf32_products
from probing.utils.pretrained import identity, load_config, locate, pretrained

PAPER_GRID = 24
"""Side of the paper's spatial targets (576 tokens); the default for teachers with finer grids."""
STATISTICS = ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize")
"""Settings of an image processor that a teacher keeps."""


@dataclass(frozen=True)
class Teacher:
    """A frozen encoder whose features the probes predict.

    Attributes:
        name: `depth`, `seg`, `gen`, or any other name of a vision encoder.
        id: folder or Hub id.
        model: the whole teacher, in eval mode, without gradients.
        prepare: RGB images → pixel values (B, 3, S, S) on the CPU; has no weights.
        encode: pixel values → features (B, N, D), float32.
        shape: (N, D).
        licence: of the weights, if it is known.
        sha256: identifies the weights.
        source: folder or Hub id of the encoder itself, which may be a part of `id`.
    """

    name: str
    id: str
    model: nn.Module
    prepare: Callable[[Sequence[Any]], Tensor]
    encode: Callable[[Tensor], Tensor]
    shape: tuple[int, int]
    licence: str
    sha256: str
    source: str

    def __repr__(self) -> str:
        return f"Teacher({self.name}: {self.class_name} {self.id}, target {self.shape[0]} x {self.shape[1]})"

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of a spatial target, None for others."""
        side = math.isqrt(self.shape[0])
        return (side, side) if side > 1 and side * side == self.shape[0] else None

    @property
    def class_name(self) -> str:
        """Name of the model's class."""
        return type(self.model).__name__

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def target(self, pixels: Tensor) -> Tensor:
        """Computes targets (B, N, D), float32, of pixel values.

        Products are in TensorFloat-32 on CUDA, where teachers take most of a training step otherwise: on an H200 2.6
        times as fast for a relative error of 4e-4 to 8e-4 (Depth Anything V2 L, OneFormer Swin-L, CLIP H; random
        weights).
        """
        with tf32_products(self.device):
            return self.encode(pixels.to(self.device, non_blocking=True)).float().contiguous()


@dataclass(frozen=True)
class TeacherSource:
    """A teacher whose weights are not loaded yet.

    Attributes:
        name: of the teacher.
        recipe: where it comes from.
        location: folder or Hub id.
        config: of the model, if it is of transformers.
        sha256: identifies the weights, if folder or commit do not.
    """

    name: str
    recipe: TeacherRecipe
    location: str
    config: Any
    sha256: str = ""


@dataclass(frozen=True)
class Pixels:
    """Applies an image processor of transformers."""

    processor: Any

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """RGB images → (B, 3, S, S)."""
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]


def open_teacher(recipe: TeacherRecipe, name: str, model_types: Sequence[str], subfolder: str = "") -> TeacherSource:
    """Finds a teacher and reads its configuration.

    Raises:
        UserError: the teacher is missing, or has none of the model types.
    """
    location = locate(recipe.id, f"{name} teacher")
    config = load_config(location, f"{name} teacher", revision=recipe.revision, subfolder=subfolder)
    if config.model_type not in model_types:
        found = ", ".join(config.architectures or [config.model_type])
        raise UserError(
            f"{recipe.id} cannot be the {name} teacher: it holds {found}, and {name} needs model type "
            f"{' or '.join(model_types)}; give it another name"
        )
    return TeacherSource(name, recipe, location, config)


def square_pixels(source: TeacherSource, size: int | None = None) -> tuple[Pixels, int]:
    """Returns a teacher's preprocessing, pinned to a square, and its side in pixels.

    Only statistics and size are taken from the folder: resizing to the shortest edge would give every image another
    grid, and OneFormer's processor requests class names from another repository for a task that needs none.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(source.location, revision=source.recipe.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"teacher {source.location} has no preprocessing: {first_line(error)}; add it") from None
    return square_processor(values, source.location, size)


def _pixel_side(values: Mapping[str, Any], teacher: str) -> int:
    """Reads the side in pixels of an image processor's square output; crops are squashed to it.

    Raises:
        UserError: it states no size, or one that is not square.
    """
    size = (values.get("do_center_crop") and values.get("crop_size")) or values.get("size") or {}
    if isinstance(size, int):  # older files
        return size
    height, width = (size.get(name) for name in ("height", "width"))
    if height != width:
        raise UserError(f"teacher {teacher}: its images are {height} x {width} pixels, and targets need a square")
    side = height or size.get("shortest_edge") or size.get("longest_edge")
    if not side:
        raise UserError(f"teacher {teacher}: its image processor states no size; add it")
    return int(side)


def square_processor(values: Mapping[str, Any], teacher: str, size: int | None = None) -> tuple[Pixels, int]:
    """Builds preprocessing that squashes images to a square, with an image processor's statistics; returns its side."""
    from transformers import ViTImageProcessor

    side = size or _pixel_side(values, teacher)
    statistics = {name: values[name] for name in STATISTICS if values.get(name) is not None}
    return Pixels(ViTImageProcessor(size={"height": side, "width": side}, **statistics)), side


def on_grid(feature: Tensor, side: int, exactly: bool) -> Tensor:
    """Resizes a square feature map (B, D, s, s) to a target grid if it is larger, or has `exactly` to be as large.

    Returns:
        (B, N, D), row-major.
    """
    size = feature.shape[-1]
    if size > side or (exactly and size != side):
        feature = F.interpolate(feature, size=(side, side), mode="bilinear", align_corners=False)
    return feature.flatten(2).transpose(1, 2)


def load_model(model_class: Any, source: TeacherSource, device: torch.device, **kwargs: Any) -> nn.Module:
    """Loads a frozen model in float32.

    Raises:
        UserError: weights are unreadable or missing.
    """
    label, kwargs = f"{source.name} teacher {source.location}", {"revision": source.recipe.revision, **kwargs}
    with loading(label):
        model, missing, _ = pretrained(model_class, source.location, source.config, device, torch.float32, **kwargs)
    if missing:
        raise UserError(f"{label} lacks {len(missing)} tensors (first: {min(missing)}); download it again")
    frozen: nn.Module = model.eval().requires_grad_(False).to(device)
    return frozen


def build_teacher(
    source: TeacherSource,
    model: nn.Module,
    prepare: Pixels,
    encode: Callable[[Tensor], Tensor],
    licences: Mapping[str, str],
) -> Teacher:
    """Builds a teacher, whose target has the shape of a blank image's; `licences` of weights are by folder or Hub id.

    Raises:
        UserError: its features are not finite.
    """
    with torch.no_grad():
        target = encode(prepare([Image.new("RGB", (64, 64))]).to(next(model.parameters()).device))
    if target.device.type != "meta" and not bool(target.isfinite().all()):
        raise UserError(
            f"{source.name} teacher {source.recipe.id} gives features that are not finite numbers: its weights are "
            f"damaged, or lack what {source.recipe.features} features need; choose other weights"
        )
    return Teacher(
        name=source.name,
        id=source.recipe.id,
        model=model,
        prepare=prepare,
        encode=encode,
        shape=(target.shape[1], target.shape[2]),
        licence=licences.get(source.recipe.id, "see the source of the weights"),
        sha256=source.sha256 or identity(source.location, source.config, target.device, source.recipe.revision),
        source=source.location,
    )
