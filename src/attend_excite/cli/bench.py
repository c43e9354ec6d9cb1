"""`attend-excite bench`: speed and memory beside diffusers' deprecated class, on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from attend_excite.cli.messages import MESSAGES, failures_as_sentences, given_path, quieten_libraries


def bench(
    size: Annotated[
        Literal["stickers", "quarter", "full"],
        typer.Option(
            help="The bundled model stickers, or random weights in the shape of Stable Diffusion 1.4: with a "
            "quarter of its channels, or in full, which takes 10 GB of memory and a long time."
        ),
    ] = "quarter",
    steps: Annotated[int, typer.Option(help="Denoising steps of a whole image.")] = 50,
    rounds: Annotated[int, typer.Option(help="Turns for each of the two.")] = 3,
    only: Annotated[
        str,
        typer.Option(help="Time only the figures whose names match this regular expression."),
    ] = "",
    document: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write all that was measured to this file.", parser=given_path, metavar="PATH"
        ),
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option(
            help="Draw the ratios to this file, an .svg, .png or .pdf.", parser=given_path, metavar="PATH"
        ),
    ] = None,
) -> None:
    """Time this package and diffusers' deprecated class in turns, on the CPU.

    Both have the same weights, noise and threads. Before anything is timed, they must give the same result.
    Times are medians with their smallest and largest value. Ratios are taken turn by turn. Memory is that
    of a fresh process.
    """
    with failures_as_sentences():
        from attend_excite.bench.measure import measure
        from attend_excite.bench.report import save_chart, show
        from attend_excite.cli.summary import RESULTS
        from attend_excite.files import written_whole

        # A mistake shows before minutes of measuring.
        for path in filter(None, (document, chart)):
            if path.is_dir() or not path.parent.is_dir():
                raise ValueError(f"'{path}' cannot be written: give a file in a folder that is there")
        if chart and chart.suffix.lower() not in (".svg", ".png", ".pdf"):
            raise ValueError(f"'{chart}' is no .svg, .png or .pdf: name it so")
        quieten_libraries()
        with MESSAGES.status("starting") as status:
            report = measure(size, steps=steps, rounds=rounds, only=only, tell=status.update)
        show(report, RESULTS)
        if document:
            with written_whole(document) as partial:
                partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if chart:
            with written_whole(chart) as partial:
                save_chart(report, partial)
