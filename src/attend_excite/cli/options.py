"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, Any

import typer

DRAWING, MACHINE = "Drawing", "Model and machine"
"""The panels of a command's help in which its options stand."""

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Denoising steps.",
        show_default="the model's own, 20 for the bundled ones",
        rich_help_panel=DRAWING,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Scale of classifier-free guidance.",
        show_default="the model's own, 7.5 for stickers",
        rich_help_panel=DRAWING,
    ),
]


def on_device(default: str = "the best available", panel: str | None = None) -> Any:
    """--device, and what it is where it isn't given."""
    return typer.Option(help="cpu, cuda, mps, …", show_default=default, rich_help_panel=panel)
