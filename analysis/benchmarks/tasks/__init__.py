"""The benchmarks: one file per task, which registers itself. None imports torch: `reports/` reads their titles."""

import importlib
import pkgutil

from analysis.benchmarks.tasks.base import BENCHMARKS, Question

__all__ = ["BENCHMARKS", "Question", "discover", "part_label", "title"]


def discover() -> None:
    """Imports every task file of this package."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


discover()


def title(name: str, questions: set[int]) -> str:
    """The benchmark's title; `…-like` if a checkpoint did not answer the published number of questions."""
    benchmark = BENCHMARKS[name]
    if questions == {benchmark.size}:
        return benchmark.title
    return f"{benchmark.title}-like ({' or '.join(map(str, sorted(questions)))} questions)"


def part_label(part: str) -> str:
    """The label of a part of a benchmark: `2d/count` → 2D, Count."""
    labels = dict(label for benchmark in BENCHMARKS.values() for label in benchmark.part_labels)
    return ", ".join(labels.get(name, name.capitalize()) for name in part.split("/") if name) or "Overall"
