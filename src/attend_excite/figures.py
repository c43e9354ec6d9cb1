"""How figures look, and the files that they become: one style for the benchmark's reports and the study's."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK = "#1f2328"
"""Text and lines; becomes the page's colour where a figure stands in a page."""

OURS, OTHER, BETTER, WORSE = "#e07b39", "#8a9bb0", "#3f9c8f", "#c65a6b"
SERIES = ("#e07b39", "#3d6b9e", "#3f9c8f", "#8e5ea2", "#b8a12f", "#c65a6b", "#5f6b7a", "#6fb7d6", "#a4713d")
"""Colours of systems that stand side by side."""

NOBODY = "#d5d9de"
"""The colour of "none is better"."""

KINDS = ("svg", "png", "pdf")
"""What a figure is written as."""

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    # Text stays text: it can be searched for and read aloud.
    "svg.fonttype": "none",
    "svg.hashsalt": "attend-excite",
    "pdf.fonttype": 42,
    "text.color": INK,
    "text.parse_math": False,  # prompts may have dollars in them
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Drawn:
    """A figure as files.

    Attributes:
        files: its content by `KINDS`: SVG and PNG on white, PDF for print.
        inline: SVG for a page: no background, and the page's colour as ink.
        width: in points.
    """

    files: dict[str, bytes]
    inline: str
    width: int


@contextmanager
def styled() -> Iterator[None]:
    """In the block figures are made in the house's style."""
    with matplotlib.rc_context(_STYLE):
        yield


def drawn(figure: Figure) -> Drawn:
    """A figure that was made in a `styled` block, as files."""
    with styled():
        return _drawn(figure)


def _drawn(figure: Figure) -> Drawn:
    svg = _saved(figure, "svg", transparent=True, metadata={"Date": None}).decode()
    inline = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # It is laid out by now, and the other kinds can't differ.
    figure.set_layout_engine(None)
    files = {
        "svg": svg.replace("<svg ", '<svg style="background: white" ', 1).encode(),
        "png": _saved(figure, "png", facecolor="white", dpi=160),
        "pdf": _saved(figure, "pdf", facecolor="white", metadata={"CreationDate": None}),
    }
    return Drawn(files, inline, round(72 * figure.get_figwidth()))


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()
