"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

PyPI's Linux wheels of torchvision are linked against CUDA; beside a CPU-only torch their native operators fail to
load, and then ``import torchvision`` fails, and with it most image classes of transformers. Declaring the schemas of
the two operators that torchvision registers fake kernels for is enough: nothing here calls them.

Import this module before anything that imports torchvision, timm or a model class of transformers.
"""

import importlib.util
from pathlib import Path

import torch

_LIBRARY: torch.library.Library | None = None  # must outlive the process: its schemas vanish with it


def _declare_missing_operators() -> None:
    global _LIBRARY
    spec = importlib.util.find_spec("torchvision")
    if _LIBRARY is not None or spec is None or spec.origin is None:
        return
    for native in sorted(Path(spec.origin).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(native))
            return  # the native operators work: declaring them twice would abort the process
        except OSError:
            continue
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def native_torchvision() -> bool:
    """Whether torchvision's native operators work here."""
    return _LIBRARY is None


_declare_missing_operators()
