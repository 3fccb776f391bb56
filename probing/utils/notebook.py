"""HTML by which notebooks show our objects; all text is escaped."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

PICTURE_SIDE = 288
"""Longest side of a picture, in pixels."""


def table(title: str, rows: Sequence[Sequence[Any]], columns: Sequence[str] = ()) -> str:
    """Returns a table under a title; without `columns` it has no head."""
    import pandas as pd

    frame = pd.DataFrame(list(rows), columns=list(columns) or None)
    with pd.option_context("display.max_colwidth", 120):
        return f"<p><b>{escape(title)}</b></p>{frame.to_html(index=False, header=bool(columns), border=0)}"


def strip(segments: Sequence[tuple[int, str, str]], height: int = 22) -> str:
    """Returns a bar of segments `(length, colour, name)` with a legend."""
    total, start, parts = sum(length for length, _, _ in segments), 0, []
    for length, colour, name in segments:
        parts.append(
            f'<rect x="{start}" width="{length}" height="1" fill="{colour}"><title>{escape(name)}</title></rect>'
        )
        start += length
    size = f'width="100%" height="{height}" viewBox="0 0 {total} 1" preserveAspectRatio="none"'
    colours = {name: colour for _, colour, name in segments}
    legend = " ".join(f'<span style="color:{colour}">■</span> {escape(name)}' for name, colour in colours.items())
    return f'<svg {size} role="img" aria-label="token kinds in order">{"".join(parts)}</svg><p>{legend}</p>'


def picture(image: Image.Image, grid: tuple[int, int] | None, first: int, last: int) -> str:
    """Returns a picture; over it a grid of rows and columns, with the position of the first and of the last patch."""
    shown = image.convert("RGB")
    shown.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    scale = PICTURE_SIDE / max(shown.size)
    width, height = (round(side * scale) for side in shown.size)
    file = io.BytesIO()
    shown.save(file, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [f'<image href="{source}" width="{width}" height="{height}" preserveAspectRatio="none"/>']
    if grid:
        rows, columns = grid
        lines = [f"M0 {height * row / rows:.4g}H{width}" for row in range(1, rows)]
        lines += [f"M{width * column / columns:.4g} 0V{height}" for column in range(1, columns)]
        parts.append(f'<path d="{"".join(lines)}" stroke="white" stroke-opacity="0.6" stroke-width="0.7" fill="none"/>')
        style = 'font-size="13" font-family="sans-serif" fill="white" stroke="black" stroke-width="3"'
        parts.append(f'<text x="3" y="14" {style} paint-order="stroke">{first}</text>')
        parts.append(
            f'<text x="{width - 3}" y="{height - 5}" text-anchor="end" {style} paint-order="stroke">{last}</text>'
        )
    return f'<svg width="{width}" height="{height}" role="img" aria-label="picture">{"".join(parts)}</svg>'
