"""Recipe of `probing align`."""

from pydantic import Field

from probing.recipe import LayersRecipe


class AlignRecipe(LayersRecipe):
    """A whole run of `probing align`."""

    coverage: float = Field(default=0.5, gt=0, le=1)
    """Share of a patch that a class must cover to be its label."""
    sample: int = Field(default=64, ge=1)
    """Images for expensive measures: spectra, the whole vocabulary, sums of words, patch positions of teachers."""
    micro_batch: int = Field(default=16, ge=1)
    """Images per forward pass."""
    workers: int = Field(default=2, ge=0)
    """Processes that read images and annotations."""
    pictures: int = Field(default=4, ge=0)
    """Images whose patches are shown with their words in the report."""
