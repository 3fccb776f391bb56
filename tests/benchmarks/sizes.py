"""The two sizes that benchmarks are run at."""

from pathlib import Path
from typing import Any

import probing.compat  # noqa: F401
from probing.data.toyworld.layout import write_world
from probing.data.toyworld.make import ASSETS
from tests import tiny

PROMPT = "Describe this picture in words."


def toy(root: Path, images: int) -> dict[str, Any]:
    """The toy world: its LLaVA (6 blocks, H = 64, 36 patches) and its teachers; fields of a recipe."""
    data = write_world(root / f"world{images}", images, 2, seed=3)
    return {
        "backbone": {"checkpoint": str(ASSETS / "llava")},
        "data": {"path": f"coco:{data}"},
        "teachers": {name: {"id": str(ASSETS / name)} for name in ("depth", "seg", "gen")},
    }


def middle(root: Path, images: int) -> dict[str, Any]:
    """16 blocks of H = 1,024 and about 300 tokens; targets small enough that probes cost a quarter of the backbone.

    That is their share in the paper's set-up too.
    """
    if not (root / "llava").exists():
        tiny.llava(root / "llava", layers=16, hidden=1024, image=128)
        tiny.depth_teacher(root / "depth", width=192, size=84)
        tiny.seg_teacher(root / "seg", width=24, size=384)
        tiny.gen_teacher(root / "gen", projection=192)
    data = write_world(root / f"world{images}", images, 2, seed=3)
    return {
        "backbone": {"checkpoint": str(root / "llava"), "prompt": PROMPT},
        "data": {"path": f"coco:{data}"},
        "teachers": {name: {"id": str(root / name)} for name in ("depth", "seg", "gen")},
    }


SIZES = {"toy": toy, "middle": middle}
