"""Makes a CUDA build of torchvision importable with a CPU build of torch.

PyPI's Linux wheels of torchvision are linked against CUDA; with a CPU-only torch their native operators fail to load,
and then ``import torchvision`` fails, and with it most image classes of transformers. Declaring the schemas of the two
operators that torchvision registers fake kernels for is enough: nothing here calls them.

Import this module before anything that imports torchvision, timm or a model class of transformers.
"""

import importlib.util
from pathlib import Path

import torch


def _declare_missing_operators() -> torch.library.Library | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    for native in sorted(Path(spec.origin).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(native))
            return None  # the native operators work: declaring them twice would abort the process
        except OSError:
            continue
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_LIBRARY = _declare_missing_operators()  # must outlive the process: its schemas vanish with it
