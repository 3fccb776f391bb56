"""Recipe of `probing bench`."""

from typing import Self

from pydantic import Field, field_validator

from probing.recipe import BackboneRecipe, Strict
from probing.utils.paths import local_path


class BenchRecipe(Strict):
    """A whole run of `probing bench`."""

    backbone: BackboneRecipe
    benchmark: str
    """Benchmark, such as cvbench; an unknown name gives an error that lists all."""
    data: str
    """Folder of the benchmark's published files, or one of them."""
    suffix: str | None = "auto"
    """Text after every question; `auto` is the benchmark's usual one, and `suffix=` omits it."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Maximal tokens of an answer."""
    micro_batch: int = Field(default=8, ge=1)
    """Questions per forward pass."""

    @field_validator("benchmark")
    @classmethod
    def _is_known(cls, name: str) -> str:
        from analysis.benchmarks.tasks import BENCHMARKS  # not for `--help`: task files import pandas

        if name not in BENCHMARKS:
            raise ValueError(f"is not one of {', '.join(BENCHMARKS)}")
        return name

    def with_absolute_paths(self) -> Self:
        """Copies the recipe with absolute local folders, so that the run can be used from anywhere."""
        data = str(local_path(self.data).absolute())
        return self.model_copy(update={"backbone": self.backbone.with_absolute_paths(), "data": data})
