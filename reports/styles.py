"""Colours, markers and sizes: a checkpoint looks the same in every figure and in the page.

The style index of a checkpoint is its position among the runs of a report, those with probes first; it determines
colour and marker, even in figures without some of the runs. A run of `probing align` shares the index of the probed run
of the same checkpoint.
"""

from collections.abc import Sequence
from typing import Any

LIGHT = {
    **{"k0": "#0a5fb4", "k1": "#e0701a", "k2": "#3b1054", "k3": "#1f8a5b", "k4": "#8c1c4a", "k5": "#5cb3e6"},
    **{"ink": "#333333", "grey": "#808080", "violet": "#6a3d9a"},
}
"""Colours on white: six checkpoints, then controls and references. Neighbours differ by 18 in CIE L*, any two
checkpoints by 8, so that lines are distinct in grey print; the hues are distinct for colour-blind readers."""
DARK = {
    **{"k0": "#3a86d0", "k1": "#f5a04f", "k2": "#efe6ff", "k3": "#2fb27a", "k4": "#c03a78", "k5": "#8fd8ff"},
    **{"ink": "#d8d8d8", "grey": "#9a9a9a", "violet": "#b79be0"},
}
"""The same hues for the dark theme, at other lightness."""
N_COLOURS = 6
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One more than colours, so that 42 checkpoints differ in colour or marker."""
SHAPES = {
    "o": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
    "s": "M-2.8-2.8h5.6v5.6h-5.6z",
    "^": "M0-3.5L3.4 2.6H-3.4z",
    "D": "M0-3.8L3.8 0L0 3.8L-3.8 0z",
    "v": "M0 3.5L3.4-2.6H-3.4z",
    "P": "M-1.2-3.4h2.4v2.2h2.2v2.4h-2.2v2.2h-2.4v-2.2h-2.2v-2.4h2.2z",
    "X": "M-3.3-1.7L-1.7-3.3L0-1.6L1.7-3.3L3.3-1.7L1.6 0L3.3 1.7L1.7 3.3L0 1.6L-1.7 3.3L-3.3 1.7L-1.6 0z",
    "x": "M-2.8-2.8L2.8 2.8M-2.8 2.8L2.8-2.8",
    "_": "M-3.2 0H3.2",
    "+": "M-3.2 0H3.2M0-3.2V3.2",
    "*": "M0-3.4V3.4M-3-1.7L3 1.7M-3 1.7L3-1.7",
}
"""Matplotlib's markers as SVG paths around the origin."""
UNFILLED = ("x", "_", "+", "*")
DASHES = {"-": "", "--": "6 3", ":": "1.5 3", "-.": "7 3 1.5 3"}
"""Matplotlib's line styles → SVG dash arrays."""

SINGLE, DOUBLE = 3.25, 6.75
"""Widths of one and of two columns of a paper, in inches."""
_COMMON = {
    "text.parse_math": False,  # a checkpoint may be called $x^2$
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "svg.hashsalt": "mllm-probing",
    "svg.fonttype": "path",  # independent of installed fonts, and no name can be markup
    "pdf.fonttype": 42,  # TrueType, embedded: publishers refuse Type 3
    "ps.fonttype": 42,
}
SCREEN: dict[str, Any] = _COMMON | {
    "font.size": 9,
    "axes.titlesize": 10,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}
PAPER: dict[str, Any] = _COMMON | {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.1,
    "lines.markersize": 2.8,
    "legend.fontsize": 7,
    "legend.handlelength": 2.6,
}


def tone(style_index: int) -> str:
    """Returns the colour key of a checkpoint, a key of `LIGHT` and `DARK`."""
    return f"k{style_index % N_COLOURS}"


def marker(style_index: int) -> str:
    """Returns the marker of a checkpoint."""
    return MARKERS[style_index % len(MARKERS)]


def assign_style_indices(probed: Sequence[str], aligned: Sequence[str]) -> tuple[list[int], list[int]]:
    """Assigns style indices to the runs of a report.

    Args:
        probed: checkpoint hashes of runs with probes; runs of the same checkpoint have separate indices, so that they
            can be compared.
        aligned: checkpoint hashes of runs of `probing align`.

    Returns:
        The indices of `probed` and of `aligned`.
    """
    unmatched = [*enumerate(probed)]
    aligned_indices, next_index = [], len(probed)
    for checkpoint in aligned:
        match = next((entry for entry in unmatched if entry[1] == checkpoint), None)
        if match:
            unmatched.remove(match)
            aligned_indices.append(match[0])
        else:
            aligned_indices.append(next_index)
            next_index += 1
    return list(range(len(probed))), aligned_indices
