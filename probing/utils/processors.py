"""Describes image processors by their output, and compares descriptions of inputs."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from probing.utils.images import square
from probing.utils.weights_hash import settings

Inputs = Mapping[str, Any]
"""What results depend on: values or hashes, under the names that messages show."""
SIZES = ((640, 480), (96, 128))
"""Width and height of the sample images on which image processors are compared."""


def describe_processor(prepare: Any, view: str) -> dict[str, Any]:
    """Describes a teacher's preprocessing by its settings and its output for fixed images."""
    pixels = [prepare([image]) for image in sample_images(view)]
    return {"settings": processor_settings(prepare), "pixels": tensors_hash(pixels)}


def changed_input(then: Inputs, now: Inputs) -> str:
    """Returns the name of the first input that differs, with its field if it has fields; empty if none does."""
    for name, value in now.items():
        before = then.get(name)
        if before == value:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            if "pixels" in value:
                if before.get("settings") == value["settings"] or before.get("pixels") == value["pixels"]:
                    continue  # library versions differ in last bits, or in the names of defaults
                before, value = before.get("settings") or {}, value["settings"]
            fields = {key: (before.get(key, "absent"), value.get(key, "absent")) for key in {**before, **value}}
            key, pair = next((key, pair) for key, pair in fields.items() if pair[0] != pair[1])
            return f"{name} ({_then_and_now(key, *pair)})"
        if name.endswith("shape"):
            return f"{name} ({_then_and_now('', before, value)})"
        return name
    return ""


def processor_settings(prepare: Any) -> dict[str, str]:
    """Returns the settings of the image processor of a checkpoint or teacher."""
    prepare = getattr(prepare, "inputs", prepare)
    processor = getattr(prepare, "processor", None)
    processor = getattr(processor, "image_processor", processor)
    attributes = {
        name: getattr(prepare, name) for name in ("border", "side") if getattr(prepare, name, None) is not None
    }
    values = processor.to_dict() if processor is not None else {"processor": repr(prepare)}
    return settings({name: value for name, value in values.items() if value is not None} | attributes)


def sample_images(view: str) -> list[Image.Image]:
    """Returns images with fine and coarse detail, equal on every machine."""
    images = [_pattern(width, height) for width, height in SIZES]
    return [square(image) for image in images] if view == "square" else images


def _pattern(width: int, height: int) -> Image.Image:
    x, y = torch.arange(width)[None, :, None], torch.arange(height)[:, None, None]
    c = torch.arange(3)
    values = (x * (3 + c) + y * (5 - c) + 64 * ((x // 9 + y // 7) % 2) + 96 * c) % 256
    return Image.fromarray(values.to(torch.uint8).numpy())


def tensors_hash(tensors: Sequence[Any]) -> str:
    """Hashes shapes, types and values of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        values = torch.as_tensor(tensor)
        digest.update(f"{tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _then_and_now(key: str, before: Any, now: Any) -> str:
    shown = f"{key}: " if key else ""
    return f"{shown}{before} then, {now} now"
