from collections.abc import Iterator

import pytest
from matplotlib.figure import Figure


@pytest.fixture(scope="module")
def without_pictures() -> Iterator[None]:
    """Pages without the pictures of charts for print: they take most of the time, and other tests draw them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("reports.charts.line_plot", "reports.page.learning_plot"):
            patch.setattr(name, lambda *values, **options: Figure(figsize=(1, 1)))
        yield
