"""A checkpoint and teachers go in, trained probes come out."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.alignment.recipe import AlignRecipe
    from analysis.benchmarks.recipe import BenchRecipe
    from probing.api import (
        align,
        assemble,
        bench,
        compare,
        erase,
        evaluate,
        load_model,
        load_teacher,
        open_run,
        plot,
        report,
        train,
    )
    from probing.distillation.recipe import DistillRecipe
    from probing.probes.bank import ProbeBank
    from probing.probes.resampler import Resampler
    from probing.recipe import AssembleRecipe, BackboneRecipe, ProbeRunRecipe, TeacherRecipe, load_recipe

__version__ = "0.1.0"
__all__ = [
    "AlignRecipe",
    "AssembleRecipe",
    "BackboneRecipe",
    "BenchRecipe",
    "DistillRecipe",
    "ProbeBank",
    "ProbeRunRecipe",
    "Resampler",
    "TeacherRecipe",
    "align",
    "assemble",
    "bench",
    "compare",
    "erase",
    "evaluate",
    "load_model",
    "load_recipe",
    "load_teacher",
    "open_run",
    "plot",
    "report",
    "train",
]
_HOMES = {
    "AlignRecipe": "analysis.alignment.recipe",
    "BenchRecipe": "analysis.benchmarks.recipe",
    "DistillRecipe": "probing.distillation.recipe",
    "ProbeBank": "probing.probes.bank",
    "Resampler": "probing.probes.resampler",
    **dict.fromkeys(
        ("AssembleRecipe", "BackboneRecipe", "ProbeRunRecipe", "TeacherRecipe", "load_recipe"), "probing.recipe"
    ),
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `import probing` is instant."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "probing.api")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
