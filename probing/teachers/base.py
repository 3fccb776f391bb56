"""What every teacher offers: images → pixels on the CPU, pixels → target features."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import probing.utils.torchvision_shim  # noqa: F401
from probing.recipe import TeacherRecipe
from probing.utils.checkpoint_files import loading
from probing.utils.errors import UserError, first_line
from probing.utils.pretrained import identity, load_config, locate, pretrained

PAPER_GRID = 24
"""Side of the spatial targets in the paper (576 tokens); finer teachers are brought down to it by default."""


@dataclass
class Teacher:
    """A frozen encoder whose features the probes predict.

    Attributes:
        name: `depth`, `seg`, `gen`, or any other of a plain encoder.
        id: folder or Hub id.
        model: the whole teacher, in eval mode, without gradients.
        prepare: RGB images → pixel values (B, 3, S, S) on the CPU; holds no weights.
        encode: pixel values → features (B, N, D), float32.
        grid: rows and columns of a spatial target, None for a single token.
        licence: licence of the weights, as far as it is known.
        sha256: identifies the weights.
        shape: (N, D), read off a forward pass.
        source: folder or Hub id of the encoder itself, which may be a part of what `id` names.
    """

    name: str
    id: str
    model: nn.Module
    prepare: Callable[[Sequence[Any]], Tensor]
    encode: Callable[[Tensor], Tensor]
    grid: tuple[int, int] | None
    licence: str
    sha256: str
    shape: tuple[int, int] = (0, 0)
    source: str = ""

    @property
    def class_name(self) -> str:
        """Name of the real class."""
        return type(self.model).__name__

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def target(self, pixels: Tensor) -> Tensor:
        """Features (B, N, D) of pixel values, float32; N and D are `shape`."""
        return self.encode(pixels.to(self.device, non_blocking=True)).float().contiguous()


@dataclass(frozen=True)
class Pixels:
    """RGB images → pixel values, through an image processor of transformers."""

    processor: Any

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """RGB images → (B, 3, S, S)."""
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]


def square_pixels(source: str, revision: str | None, size: int | None = None) -> tuple[Pixels, int]:
    """Reads a teacher's preprocessing and pins it to a square.

    Only the statistics and the size are taken from the folder: aspect-keeping resizes would give every image its own
    grid, and OneFormer's own processor wants class names from another repository for something that needs none.

    Args:
        source: folder or Hub id.
        revision: Hub revision.
        size: side in pixels; by default the teacher's own.

    Returns:
        The preprocessing and its side in pixels.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"teacher {source} has no preprocessing: {first_line(error)}") from None
    side = size or pixel_side(values, source)
    return squared(values, side), side


def pixel_side(values: dict[str, Any], source: str) -> int:
    """Side in pixels of the square that an image processor ends in; what it crops, it shows whole here.

    Raises:
        UserError: it states no size, or one that is no square.
    """
    size = (values.get("do_center_crop") and values.get("crop_size")) or values.get("size") or {}
    if isinstance(size, int):  # as older files have it
        return size
    height, width = (size.get(name) for name in ("height", "width"))
    if height != width:
        raise UserError(f"teacher {source}: its images are {height} x {width} pixels, and targets need a square")
    side = height or size.get("shortest_edge") or size.get("longest_edge")
    if not side:
        raise UserError(f"teacher {source}: its image processor states no size")
    return int(side)


def squared(values: dict[str, Any], side: int) -> Pixels:
    """Preprocessing with an image processor's statistics, to a square of so many pixels."""
    from transformers import ViTImageProcessor

    kept = ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize")
    own = {name: values[name] for name in kept if values.get(name) is not None}
    return Pixels(ViTImageProcessor(size={"height": side, "width": side}, **own))


def on_grid(feature: Tensor, side: int, exactly: bool) -> Tensor:
    """A square feature map (B, D, s, s) as tokens (B, side², D), row-major; resized where need be.

    Args:
        feature: the map.
        side: of the target grid.
        exactly: whether a smaller map is resized too, and not only a larger one.
    """
    own = feature.shape[-1]
    if own > side or (exactly and own != side):
        feature = F.interpolate(feature, size=(side, side), mode="bilinear", align_corners=False)
    return feature.flatten(2).transpose(1, 2)


def open_teacher(recipe: TeacherRecipe, name: str, model_types: Sequence[str], **kwargs: Any) -> tuple[str, Any]:
    """Finds a teacher and reads its configuration.

    Raises:
        UserError: there is no such teacher, or it is of another class than this kind of teacher needs.
    """
    source = locate(recipe.id, f"{name} teacher")
    config = load_config(source, f"{name} teacher", revision=recipe.revision, **kwargs)
    if config.model_type not in model_types:
        found = ", ".join(config.architectures or [config.model_type])
        raise UserError(
            f"{recipe.id} cannot be the {name} teacher: it holds {found} (model type {config.model_type!r}), and "
            f"{name} needs one of {', '.join(model_types)}; as a plain encoder give it a name of its own"
        )
    return source, config


def load_model(model_class: Any, source: str, config: Any, name: str, device: torch.device, **kwargs: Any) -> nn.Module:
    """Loads a frozen model in float32.

    Raises:
        UserError: the weights cannot be read, or some are missing.
    """
    with loading(f"{name} teacher {source}"):
        model, missing, _ = pretrained(model_class, source, config, device, torch.float32, **kwargs)
    if missing:
        raise UserError(f"{name} teacher {source} lacks {len(missing)} tensors (first: {min(missing)})")
    frozen: nn.Module = model.eval().requires_grad_(False).to(device)
    return frozen


def finish(
    name: str,
    recipe: TeacherRecipe,
    source: str,
    config: Any,
    model: nn.Module,
    prepare: Pixels,
    encode: Callable[[Tensor], Tensor],
    licences: Mapping[str, str],
) -> Teacher:
    """Puts a teacher together; its target shape is read off a forward pass of a blank image.

    Raises:
        UserError: what it gives is not a number.
    """
    from PIL import Image

    teacher = Teacher(
        name=name,
        id=recipe.id,
        model=model,
        prepare=prepare,
        encode=encode,
        grid=None,
        licence=licences.get(recipe.id, "see the source of the weights"),
        sha256=identity(source, config, next(model.parameters()).device),
        source=source,
    )
    target = teacher.target(prepare([Image.new("RGB", (64, 64))]))
    if target.device.type != "meta" and not bool(target.isfinite().all()):
        raise UserError(
            f"{name} teacher {recipe.id} gives features that are not finite numbers: its weights are damaged, or lack "
            f"what {recipe.features} features need; choose other weights"
        )
    tokens, width = target.shape[1:]
    teacher.shape = (tokens, width)
    side = round(tokens**0.5)
    if tokens > 1 and side * side == tokens:
        teacher.grid = (side, side)
    return teacher
