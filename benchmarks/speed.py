"""Speed and memory against diffusers' deprecated class, side by side in one run.

    python -m benchmarks.speed --size quarter

Both classes get the same weights, noise and threads and take turns, and before anything is timed they must
give the same latents. Times are medians with their smallest and largest value; ratios are taken turn by
turn. Memory is the peak above the weights, of a fresh process for each figure.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
    pipeline_stable_diffusion_attend_and_excite as deprecated,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attend_excite.attention.places import cross_attention_places
from attend_excite.attention.record import record
from attend_excite.guidance.objective import (
    SubjectTokens,
    most_neglected,
    subject_attention,
    subject_losses,
    token_probabilities,
)
from attend_excite.guidance.schedule import Recipe
from attend_excite.models.model import frozen
from benchmarks.sizes import SIZES, Subject, build

TOKENS = [2, 5]
Work = Callable[[], Tensor]


def guidance_step_ours(subject: Subject) -> Work:
    """One guidance pass and the gradient of its loss, as `methods.attend_excite` makes them."""
    unet = subject.ours.unet
    places = cross_attention_places(unet, subject.latent_side // subject.map_side)
    tokens = SubjectTokens.stack([[[token] for token in TOKENS]], last=[subject.text.shape[1] - 2])
    recipe = Recipe.named("official")

    def work() -> Tensor:
        with frozen(unet), record(unet, places, stop_after_last=True) as recording:
            latents = subject.noise(1).requires_grad_(True)
            recording.forward(latents, 981, encoder_hidden_states=subject.text)
            chosen = token_probabilities(recording.average(), tokens.last, recipe.temperature)
            losses = subject_losses(subject_attention(chosen, tokens, recipe.sigma), tokens)
            return torch.autograd.grad(most_neglected(losses).sum(), latents)[0]

    return work


def guidance_step_theirs(subject: Subject) -> Work:
    """The same by the deprecated class's own functions, in the order of its loop."""
    pipeline: Any = subject.theirs

    def work() -> Tensor:
        before = pipeline.unet.attn_processors
        pipeline.attention_store = deprecated.AttentionStore((subject.map_side, subject.map_side))
        pipeline.register_attention_control()
        latents = subject.noise(1).requires_grad_(True)
        pipeline.unet(latents, 981, encoder_hidden_states=subject.text)
        loss = pipeline._compute_loss(pipeline._aggregate_and_get_max_attention_per_token(TOKENS))
        # A long step, so that the gradient isn't lost in the rounding of the latents it is taken from.
        shifted = pipeline._update_latent(latents, loss, 1e4)
        pipeline.unet.set_attn_processor(before)
        return (latents - shifted).detach() / 1e4

    return work


def whole_image(
    subject: Subject, whose: str, steps: int, thresholds: Mapping[int, float], images: int = 1
) -> Work:
    """A whole run to the latents; `whose`: "ours", "diffusers", or "plain", ours without any nursing."""
    pipeline: Any = subject.theirs if whose == "diffusers" else subject.ours

    def work() -> Tensor:
        return pipeline(
            None,
            TOKENS,
            height=subject.latent_side * 8,
            width=subject.latent_side * 8,
            num_inference_steps=steps,
            latents=subject.noise(images),
            num_images_per_prompt=images,
            prompt_embeds=subject.text,
            negative_prompt_embeds=subject.empty_text,
            max_iter_to_alter=0 if whose == "plain" else steps // 2,
            thresholds={} if whose == "plain" else thresholds,
            scale_factor=subject.step_size,
            attn_res=(subject.map_side, subject.map_side),
            output_type="latent",
        ).images

    return work


def capped(steps: int) -> dict[int, float]:
    """Thresholds that no map reaches, at the recipe's three places: every refinement runs to its cap."""
    return {int(fraction * steps): 1.0 for fraction in (0.0, 0.2, 0.4)}


def figures(subject: Subject, steps: int) -> dict[str, dict[str, Work]]:
    """What is timed: figure -> whose -> work."""
    return {
        "guidance step": {"ours": guidance_step_ours(subject), "diffusers": guidance_step_theirs(subject)},
        f"whole image, {steps} steps, no refinement": {
            whose: whole_image(subject, whose, steps, {}) for whose in ("ours", "diffusers", "plain")
        },
        f"whole image, {steps} steps, every refinement at its cap": {
            whose: whole_image(subject, whose, steps, capped(steps)) for whose in ("ours", "diffusers")
        },
    }


def check_equal(subject: Subject) -> float:
    """The relative distance of one step's gradients; the runs are not worth timing if they differ."""
    ours, theirs = guidance_step_ours(subject)(), guidance_step_theirs(subject)()
    distance = float((ours - theirs).norm() / theirs.norm())
    if distance > 1e-3:
        raise SystemExit(f"the gradients differ by {distance:.1e}: nothing was timed")
    return distance


def take_turns(works: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work, A B A B ... (the check before has warmed everything up)."""
    seconds: dict[str, list[float]] = {whose: [] for whose in works}
    for _ in range(rounds):
        for whose, work in works.items():
            began = time.perf_counter()
            work()
            seconds[whose].append(time.perf_counter() - began)
    return seconds


def peak_memory(size: str, whose: str) -> float:
    """MiB above the weights of one guidance step, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speed", "--size", size, "--memory-of", whose]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().rsplit("\n", 1)[-1])


def print_memory_of(subject: Subject, whose: str) -> None:
    """In that process: reset the peak once the weights are there, then make the step."""
    work = guidance_step_ours(subject) if whose == "ours" else guidance_step_theirs(subject)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_kib()
    work()
    print((_peak_kib() - before) / 1024)


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def matrix_rate() -> float:
    """What the machine reaches on large matrix products, in GFLOP/s."""
    a = torch.randn(2048, 2048)
    seconds = min(take_turns({"product": lambda: a @ a}, 5)["product"])
    return 2 * 2048**3 / seconds / 1e9


def count_operations(subject: Subject) -> float:
    """GFLOP of our guidance step: matrix products, convolutions and attention.

    The forward pass is counted, twice: the way back to the latents has a product of the same size for each
    of the way there, and the frozen weights need none.
    """
    places = cross_attention_places(subject.ours.unet, subject.latent_side // subject.map_side)
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        record(subject.ours.unet, places, stop_after_last=True) as recording,
    ):
        recording.forward(subject.noise(1), 981, encoder_hidden_states=subject.text)
    return 2 * counter.get_total_flops() / 1e9


def main() -> None:
    """Measure, print a table, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="quarter")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of a whole image")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--only", default="", help="only figures whose name matches this regular expression")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--memory-of", choices=("ours", "diffusers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    subject = build(options.size)
    if options.memory_of:
        print_memory_of(subject, options.memory_of)
        return

    report: dict[str, Any] = {
        "size": options.size,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "relative distance of the gradients": check_equal(subject),
        "matrix rate, GFLOP/s": matrix_rate(),
        "guidance step, GFLOP": count_operations(subject),
        "guidance step, MiB above the weights": {
            whose: peak_memory(options.size, whose) for whose in ("ours", "diffusers")
        },
        "seconds": {
            name: take_turns(works, options.rounds)
            for name, works in figures(subject, options.steps).items()
            if re.search(options.only, name)
        },
    }
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def show(report: Mapping[str, Any]) -> None:
    """The figures as a table: median (smallest to largest)."""
    table = Table(
        title=f"{report['size']}, {report['threads']} threads: seconds, median (smallest to largest)"
    )
    for column in ("", "ours", "diffusers", "plain", "diffusers / ours", "ours / plain"):
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds in report["seconds"].items():
        whose = [_spread(seconds.get(column, [])) for column in ("ours", "diffusers", "plain")]
        table.add_row(name, *whose, _ratio(seconds, "diffusers", "ours"), _ratio(seconds, "ours", "plain"))
    memory = report["guidance step, MiB above the weights"]
    ratio = f"{memory['diffusers'] / memory['ours']:.2f}"
    row = [f"{memory[whose]:.0f}" for whose in ("ours", "diffusers")]
    table.add_row("guidance step, peak MiB above the weights", *row, "", ratio, "")
    console = Console()
    console.print(table)
    step = statistics.median(report["seconds"].get("guidance step", {}).get("ours", [float("nan")]))
    rate = report["guidance step, GFLOP"] / step
    console.print(
        f"our guidance step: {report['guidance step, GFLOP']:.0f} GFLOP at {rate:.0f} GFLOP/s, "
        f"{rate / report['matrix rate, GFLOP/s']:.0%} of the machine's rate on large matrices; "
        f"gradients {report['relative distance of the gradients']:.0e} apart"
    )


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return ""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def _ratio(seconds: Mapping[str, Sequence[float]], above: str, below: str) -> str:
    if above not in seconds or below not in seconds:
        return ""
    return _spread([a / b for a, b in zip(seconds[above], seconds[below], strict=True)])


if __name__ == "__main__":
    main()
