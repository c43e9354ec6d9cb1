"""The published losses: what counts as agreement, and what is compared with them."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

from attend_excite import AttendAndExcite, Model
from attend_excite.benchmark.verify import compare, losses_from, published_traces, traces_for
from attend_excite.cli import app
from attend_excite.cli.verify import print_verdict

TRACES = published_traces()


def test_thirteen_traces_of_two_models() -> None:
    assert Counter(trace.model for trace in TRACES) == {"sd-1.4": 9, "sd-2.1-base": 4}
    assert {len(trace.losses) for trace in TRACES} == {25}


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: f"{trace.prompt} {trace.seed}")
def test_a_recorded_trace_agrees_with_itself(trace) -> None:
    comparison = compare(trace, trace.losses)
    assert comparison.departure is None
    assert max(comparison.differences) == 0


@pytest.mark.parametrize(
    ("step", "by", "departs"),
    [(1, 0.001, False), (4, -0.0011, True), (4, 0.00104, False), (5, 0.003, False), (25, 0.0032, True)],
)
def test_a_trace_departs_where_it_is_beyond_the_tolerance(step: int, by: float, departs: bool) -> None:
    for trace in TRACES:
        losses = list(trace.losses)
        losses[step - 1] += by
        assert compare(trace, losses).departure == (step if departs else None)


def test_what_is_no_number_or_missing_departs() -> None:
    trace = TRACES[0]
    assert compare(trace, [*trace.losses[:2], math.nan, *trace.losses[3:]]).departure == 3
    assert compare(trace, trace.losses[:20]).departure == 21


def test_the_verdict_names_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = TRACES[:2]
    print_verdict([compare(first, first.losses)])
    assert "verified: all 1 published traces are found again" in capsys.readouterr().out
    losses = [*second.losses[:6], 0.5, *second.losses[7:]]
    print_verdict([compare(first, first.losses), compare(second, losses)])
    shown = capsys.readouterr().out
    assert f"departs at step 7: 0.5000 here, {second.losses[6]:.4f} published" in shown
    assert "NOT verified: 1 of 2" in shown


def test_losses_from_given_noise_are_those_of_a_generation(tiny: Model) -> None:
    prompt, seed = "a cat and a frog", 3
    drawn = tiny.generate(
        prompt, method=AttendAndExcite("official"), seeds=seed, steps=4, decode=False, progress=False
    )
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 4, 16, 16, generator=generator, dtype=torch.float64)
    assert losses_from(tiny, prompt, noise, steps=4) == pytest.approx(drawn.trace[0].losses, abs=1e-12)


def test_a_model_without_published_losses_is_refused(stickers: Model) -> None:
    with pytest.raises(ValueError, match="no losses were published for 'stickers'"):
        traces_for(stickers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_machine_without_cuda_is_told_at_the_door() -> None:
    result = CliRunner().invoke(app, ["verify"])
    assert result.exit_code == 2
    assert "random generator of a CUDA device" in result.stderr
