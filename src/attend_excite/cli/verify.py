"""`attend-excite verify`: does this machine find the losses that the authors published?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from attend_excite.cli.messages import FAILED, MESSAGES, failures_as_sentences, quieten_libraries

if TYPE_CHECKING:
    from attend_excite.benchmark.verify import Comparison


def verify(
    model: Annotated[
        str, typer.Option(help="sd-1.4, sd-2.1-base, or a folder or Hub id of either.")
    ] = "sd-1.4",
) -> None:
    """Compare with the losses that the authors' notebooks print, step by step. Needs a CUDA device."""
    with failures_as_sentences():
        import torch
        from rich.progress import track

        from attend_excite.benchmark.verify import (
            compare,
            losses_from,
            published_noise,
            require_cuda,
            traces_for,
        )
        from attend_excite.models import load

        quieten_libraries()
        require_cuda()
        with MESSAGES.status(f"loading {model}"):
            loaded = load(model, device="cuda", dtype=torch.float32)
        traces = traces_for(loaded)
        comparisons = [
            compare(trace, losses_from(loaded, trace.prompt, published_noise(trace.seed)))
            for trace in track(traces, "verifying", console=MESSAGES, transient=True)
        ]
        print_verdict(comparisons)
        if any(comparison.departure for comparison in comparisons):
            raise typer.Exit(FAILED)


def print_verdict(comparisons: Sequence[Comparison]) -> None:
    """A line a trace, then the verdict in a sentence."""
    from attend_excite.benchmark.verify import tolerance
    from attend_excite.cli.summary import RESULTS, table

    lines = table("prompt", "seed", "largest difference", "steps 1-4", "verdict")
    for comparison in comparisons:
        trace, step = comparison.trace, comparison.departure
        verdict = "agrees"
        if step is not None:
            verdict = (
                f"departs at step {step}: {comparison.losses[step - 1]:.4f} here, "
                f"{trace.losses[step - 1]:.4f} published"
            )
        largest = [f"{max(part):.4f}" for part in (comparison.differences, comparison.differences[:4])]
        lines.add_row(trace.prompt, str(trace.seed), *largest, verdict)
    RESULTS.print(lines)
    departed = sum(comparison.departure is not None for comparison in comparisons)
    if departed:
        RESULTS.print(
            f"NOT verified: {departed} of {len(comparisons)} published traces depart by more than "
            f"{tolerance(1):g} in the first steps or {tolerance(25):g} later: other weights, or an error"
        )
    else:
        RESULTS.print(f"verified: all {len(comparisons)} published traces are found again")
