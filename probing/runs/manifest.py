"""The manifest's header: hashes of weights, licences, versions."""

import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probing.models import Identity
    from probing.teachers.base import Teacher

PACKAGES = ("mllm-probing", "torch", "torchvision", "transformers", "accelerate", "timm", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Returns the versions of the packages that affect numbers."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def manifest_header(checkpoint: "Identity", prompt: str, teachers: dict[str, "Teacher"]) -> dict[str, Any]:
    """Returns the part of a manifest on checkpoint, prompt (the user's turn) and teachers."""
    return {
        "checkpoint": {name: value for name, value in vars(checkpoint).items() if name not in ("prompt", "prepare")},
        "prompt": prompt,
        "rendered_prompt": checkpoint.prompt,
        "teachers": {
            name: {
                "id": teacher.id,
                "class": teacher.class_name,
                "shape": list(teacher.shape),
                "licence": teacher.licence,
                "sha256": teacher.sha256,
            }
            for name, teacher in teachers.items()
        },
    }
