"""Both in turns: seconds, memory, operations, and the check that both do the same."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attend_excite.bench.memory import can_be_measured, peak_of_guidance
from attend_excite.bench.sizes import Subject, build
from attend_excite.bench.works import (
    Figure,
    figures,
    guidance_steps,
    plain_pass,
    shortened_forward,
    whole_images,
)

# float32 rounds 860 million weights' products in another order in each class.
_TOLERANCE = 1e-3

# Of steps and of rounds.
_MOST = 1000


def measure(size: str, *, steps: int, rounds: int, only: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """All figures of a size as plain data.

    Args:
        size: one of `sizes.SIZES`.
        steps: denoising steps of a whole image, 2 or more.
        rounds: turns that each side takes, 1 or more.
        only: a regular expression; times only the figures whose names it finds something in.
        tell: called with what is being done.

    Raises:
        ValueError: an argument is out of its range, or the two give different results.
    """
    if not (2 <= steps <= _MOST and 1 <= rounds <= _MOST):
        raise ValueError(
            f"{steps} steps and {rounds} rounds: it takes 2 steps and 1 round, or more, and {_MOST} at most"
        )
    try:
        wanted = re.compile(only)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"'{only}' is no regular expression: {error}") from error
    tell(f"building {size}")
    subject = build(size)
    chosen = [figure for figure in figures(subject, steps) if wanted.search(figure.name)]
    if not chosen:
        names = "; ".join(figure.name for figure in figures(subject, steps))
        raise ValueError(f"'{only}' finds none of: {names}")
    tell("checking that both do the same")
    report: dict[str, Any] = {
        "size": size,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "relative distance": distances(subject),
        "GFLOP": operations(subject),
    }
    if can_be_measured():
        tell("memory, in processes of their own")
        report["guidance step, MiB above the weights"] = {
            whose: peak_of_guidance(size, whose) for whose in ("ours", "diffusers")
        }
    report["matrix rate, GFLOP/s"] = matrix_rate()
    report["seconds"] = {figure.name: take_turns(figure, rounds, tell) for figure in chosen}
    return report


def distances(subject: Subject) -> dict[str, float]:
    """How far apart the two are, relative to diffusers': a guidance step's gradient, the latents of a run.

    Raises:
        ValueError: too far, so that no speed would be worth knowing.
    """
    pairs = {
        "gradient": guidance_steps(subject),
        "latents of 2 steps": {whose: whole_images(subject, whose, 2) for whose in ("ours", "diffusers")},
    }
    found = {}
    for name, works in pairs.items():
        ours, theirs = works["ours"](), works["diffusers"]()
        found[name] = float((ours - theirs).norm() / theirs.norm())
        if not found[name] < _TOLERANCE:
            raise ValueError(f"nothing was timed: the two differ in the {name} by {found[name]:.0e}")
    return found


def take_turns(figure: Figure, rounds: int, tell: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds of one unit of each work, A B A B ..., from the first call on."""
    seconds: dict[str, list[float]] = {whose: [] for whose in figure.works}
    for turn in range(rounds):
        for whose, work in figure.works.items():
            tell(f"{figure.name}: {whose}, {turn + 1} of {rounds}")
            began = time.perf_counter()
            work()
            seconds[whose].append((time.perf_counter() - began) / figure.units)
    return seconds


def matrix_rate() -> float:
    """What the machine reaches on large matrix products, in GFLOP/s."""
    side = 2048
    a = torch.randn(side, side)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds) / 1e9


def operations(subject: Subject) -> dict[str, float]:
    """GFLOP of our guidance step and of the CFG pass: matrix products, convolutions and attention.

    The guidance step's forward pass is counted twice: the way back to the latents has a product of the same
    size for each of the way there, and the frozen weights need none.
    """
    return {
        "guidance step": 2 * _counted(lambda: shortened_forward(subject)),
        "CFG pass": _counted(lambda: plain_pass(subject)),
    }


def _counted(work: Callable[[], object]) -> float:
    # The counter knows no formula for the CPU's fused attention; what that computes are these products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops() / 1e9


def reached(report: Mapping[str, Any]) -> dict[str, float]:
    """The share of the machine's matrix rate that ours reaches, by figure."""
    return {
        name: flop / statistics.median(report["seconds"][name]["ours"]) / report["matrix rate, GFLOP/s"]
        for name, flop in report["GFLOP"].items()
        if name in report["seconds"]
    }


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Turn by turn."""
    return [a / b for a, b in zip(above, below, strict=True)]
