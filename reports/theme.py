"""Colours, dashes and sizes, shared by the figures (matplotlib) and the page's charts (Vega-Lite)."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.colors import to_hex

LIGHT = ("#0a5fb4", "#e0701a", "#3b1054", "#1f8a5b", "#8c1c4a", "#5cb3e6")
"""Colours of checkpoints on white. Neighbours differ by 18 in CIE L*, any two by 8, so that lines are distinct in grey
print; the hues are distinct for colour-blind readers."""
DARK = ("#3a86d0", "#f5a04f", "#efe6ff", "#2fb27a", "#c03a78", "#8fd8ff")
"""The same hues on a dark ground."""
GROUND = {"light": "#ffffff", "dark": "#17181a"}
MEAN, CEILING = "mean target", "teacher's feature"
"""Names of the references among the checkpoints of a chart."""
REFERENCES = {MEAN: ("#808080", "#9a9a9a"), CEILING: ("#333333", "#d8d8d8")}
"""Colours of the references, on light and dark ground."""

CHECKPOINT = "checkpoint"
"""Value of the column `control` for the checkpoint itself."""
CONTROLS = {
    "none": CHECKPOINT,
    "random": "random weights",
    "shuffled": "shuffled pairs",
    "blank": "shown grey",
    "other": "shown another image",
    "caption": "given the caption",
    "subspace": "random subspace",
}
"""Control in `results.csv` → its name in charts."""
DASHES: dict[str, tuple[float, ...]] = {
    CHECKPOINT: (),
    "random weights": (5, 2),
    "shuffled pairs": (1, 1.5),
    "shown grey": (7, 2, 1, 2),
    "shown another image": (3, 1.2),
    "given the caption": (7, 1.5, 1, 1.5, 1, 1.5),
    "random projector": (5, 2),
    "random subspace": (2, 2),
}
"""Name of a control → lengths of dash and gap, in line widths. Chance is dotted."""
CHANCE_DASH = (1, 1.5)

SINGLE, DOUBLE = 3.25, 6.75
"""Widths of one and of two columns of a paper, in inches."""


def dash(control: str) -> tuple[float, ...]:
    """Returns the dashes of a control; those of chance, such as permuted labels, by default."""
    return DASHES.get(control, CHANCE_DASH)


def palette(names: Sequence[str], dark: bool = False) -> dict[str, str]:
    """Assigns a colour to each checkpoint, and to the references.

    More checkpoints than colours get shades of cividis, which is ordered by lightness.
    """
    base: Sequence[str] = DARK if dark else LIGHT
    if len(names) > len(base):
        start, end = (0.2, 1.0) if dark else (0.0, 0.85)
        shades = mpl.colormaps["cividis"]
        base = [to_hex(shades(start + (end - start) * k / (len(names) - 1))) for k in range(len(names))]
    return {name: colours[dark] for name, colours in REFERENCES.items()} | dict(zip(names, base, strict=False))


def style(paper: bool = False) -> dict[str, Any]:
    """Returns matplotlib's settings for the screen, or for a paper: 7 points, thin lines, embedded fonts."""
    size = 7 if paper else 9
    rest = {
        "text.parse_math": False,  # a checkpoint may be called $x^2$
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "svg.hashsalt": "mllm-probing",
        "svg.fonttype": "path",  # independent of installed fonts, and no name can be markup
        "pdf.fonttype": 42,  # TrueType, embedded: publishers refuse Type 3
        "ps.fonttype": 42,
        "grid.color": "#e4e4e4",
        "font.size": size,
        **dict.fromkeys(("axes.labelsize", "axes.titlesize", "xtick.labelsize", "ytick.labelsize"), size),
        **dict.fromkeys(("legend.fontsize", "legend.title_fontsize"), size),
        "lines.linewidth": 1.1 if paper else 1.8,
        "lines.markersize": 2.2 if paper else 3.5,
        "grid.linewidth": 0.4 if paper else 0.6,
        "axes.linewidth": 0.6 if paper else 0.8,
    }
    return {**sns.plotting_context("paper"), **sns.axes_style("whitegrid"), **rest}


def vega_config(names: Sequence[str], dark: bool = False) -> dict[str, Any]:
    """Returns Vega-Lite's settings; the range `category` has the colours of `names` and of the references."""
    text, soft, grid = ("#ececec", "#b4b4b4", "#2c2e31") if dark else ("#1b1b1b", "#595959", "#e6e6e6")
    font = "system-ui, sans-serif"
    axis = {"labelColor": soft, "titleColor": soft, "gridColor": grid, "domainColor": soft, "tickColor": soft}
    letters = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
    return {
        "background": GROUND["dark" if dark else "light"],
        "font": font,
        "axis": axis | letters,
        "axisY": {"titleLimit": 190},
        "title": {"color": text, "fontSize": 13, "anchor": "start", "font": font, "limit": 330},
        "rule": {"color": soft},
        "view": {"stroke": None},
        "range": {"category": [palette(names, dark)[name] for name in (*names, *REFERENCES)]},
    }
