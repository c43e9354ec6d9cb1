"""Draw the benchmark that a command line asks for, and show how it goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from attend_excite.benchmark.claims import Claims
from attend_excite.benchmark.estimate import Estimate, estimate
from attend_excite.benchmark.jobs import Batch, plan, sweep, systems_named
from attend_excite.benchmark.names import FULL_METHOD, PLAIN
from attend_excite.benchmark.prompts import paper_prompts, read_prompts, sample, with_subjects
from attend_excite.benchmark.run import Executor, Here, Queue, Row, begin, broken_images, settings_of
from attend_excite.benchmark.store import open_folder, read_rows, set_aside_broken
from attend_excite.cli.messages import MESSAGES, plain, warn
from attend_excite.cli.summary import RESULTS, table
from attend_excite.guidance.schedule import Recipe
from attend_excite.methods import PAPER_METHODS
from attend_excite.models import load, load_streams

# Errors that are told one by one; beyond them a count is enough.
_ERRORS_TOLD = 5


@dataclass(frozen=True)
class Request:
    """The command line of `benchmark run`, as typed."""

    out: str
    prompts: Path | None
    per_subset: int | None
    seeds: range
    systems: tuple[str, ...]
    sweeps: tuple[str, ...]
    steps: int | None
    guidance: float | None
    model: str
    device: str | None
    dtype: str | None
    batch_size: int
    executor: str
    workers: int | None
    address: str | None
    dry_run: bool


def draw_benchmark(request: Request) -> bool:
    """Draw what isn't drawn yet, or say what that will cost.

    Returns:
        Whether all is well: no image failed.

    Raises:
        ValueError: the request makes no sense, or doesn't go with what the folder holds.
        OSError: an image or row cannot be written.
    """
    open_folder(request.out)  # A mistake in its name shows before a model is loaded.
    if request.executor == "local" and (request.workers or request.address):
        raise ValueError("--workers and --address are for --executor ray")
    names = [*request.systems, *(name for text in request.sweeps for name in sweep(text))]
    if request.sweeps and not request.systems:
        names = [PLAIN, FULL_METHOD, *names]
    systems_named(names, Recipe.named("official"))  # A mistake shows before a model is loaded.
    prompts = paper_prompts() if request.prompts is None else read_prompts(request.prompts)
    if request.per_subset is not None:
        prompts = sample(prompts, request.per_subset)
    streams = load_streams(request.model)
    # With the brackets out, two that were spelled differently may be the same.
    prompts = list(dict.fromkeys(with_subjects(prompt, streams) for prompt in prompts))
    with _executor(request) as executor:
        with MESSAGES.status(plain(f"loading {request.model}")):
            conditions, recommended = executor.describe(request.steps, request.guidance)
        if not names and isinstance(executor, Here) and executor.model.family.sets_refusal:
            names = [name for name in PAPER_METHODS if name != "structure"]
            warn(f"structure is left out: {executor.model.name} {executor.model.family.sets_refusal}")
        systems = systems_named(names, recommended)
        seeds = request.seeds
        batches = plan(prompts, seeds, systems, conditions, request.batch_size)
        if isinstance(executor, Here) and request.dry_run:
            settings_of(
                request.out, conditions, prompts, seeds, systems
            )  # Refuses what the run would refuse.
            with MESSAGES.status("measuring"):
                estimates = estimate(request.out, executor.model, batches)
            # How many a cluster has isn't known before it is there.
            _print_estimates(estimates, request.workers or 1, on_ray=request.executor == "ray")
            return True
        begin(request.out, conditions, prompts, seeds, systems)
        set_aside_broken(request.out, "rows")
        for path in broken_images(request.out):
            warn(f"the picture '{path}' of '{request.out}' is broken: it counts as gone and is drawn again")
        with Claims(request.out) as claims:
            queue = Queue(request.out, batches, claims)
            _draw(executor, queue, batches)
    return _print_rows(request.out, batches, queue.done)


@contextmanager
def _executor(request: Request) -> Iterator[Executor]:
    """What draws, or in a dry run what measures: one worker does for that."""
    if request.executor == "local" or request.dry_run:
        with MESSAGES.status(plain(f"loading {request.model}")):
            model = load(request.model, device=request.device, dtype=request.dtype)
        yield Here(model)
        return
    from attend_excite.benchmark.ray_executor import ray_workers

    with ray_workers(
        request.model,
        device=request.device,
        dtype=request.dtype,
        workers=request.workers,
        address=request.address,
    ) as executor:
        yield executor


def _draw(executor: Executor, queue: Queue, batches: Sequence[Batch]) -> None:
    """Draw all that is left, under a bar."""
    jobs = {job.name for batch in batches for job in batch}
    before, drawn, failed = len(jobs & queue.done), 0, 0
    began = time.monotonic()
    if before:
        MESSAGES.print(f"{before} of {len(jobs)} images are there")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total} images, {task.fields[pace]}"),
        TimeRemainingColumn(),
    )
    # Over minutes: batches are slow, and those of different systems unevenly so.
    with Progress(*columns, console=MESSAGES, transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task("drawing", total=len(jobs), completed=before, pace="")
        for rows in executor.draw(queue):
            drawn += len(rows)
            failed += sum(row["error"] is not None for row in rows)
            bar.update(
                task,
                completed=len(jobs & queue.done) + failed,
                description="drawing" if rows else "waiting for other runs or for a worker",
                pace=f"{drawn / (time.monotonic() - began):.2f} a second, {failed} failed",
            )


def _print_rows(run: str, batches: Sequence[Batch], done: set[str]) -> bool:
    """What there is now, system by system, and why the rest failed; whether none did."""
    jobs = {job.name for batch in batches for job in batch}
    rows = [row for row in read_rows(run).to_pylist() if row["job"] in jobs]
    for row in rows:
        if row["error"] is None and row["job"] not in done:
            row["error"] = "its picture is gone, and could not be drawn again"
    systems = table("system", "images", "failed", "black", "seconds an image", "UNet passes", "updates")
    for system in dict.fromkeys(batch[0].system.name for batch in batches):
        mine = [row for row in rows if row["system"] == system]
        drawn = [row for row in mine if row["error"] is None]
        systems.add_row(
            plain(system),
            str(len(drawn)),
            str(len(mine) - len(drawn)),
            str(sum(row["nsfw"] for row in drawn)),
            *(_mean(drawn, column) for column in ("seconds", "unet_passes", "updates")),
        )
    RESULTS.print(systems)
    errors = Counter((row["error"], row["prompt"], row["system"]) for row in rows if row["error"] is not None)
    for (error, prompt, system), count in errors.most_common(_ERRORS_TOLD):
        warn(f"'{prompt}' by {system}, {count} images: {error}")
    if len(errors) > _ERRORS_TOLD:
        warn(f"{len(errors) - _ERRORS_TOLD} more prompts failed: the rows say why")
    return not errors


def _mean(rows: Sequence[Row], column: str) -> str:
    return f"{fmean(row[column] for row in rows):.3g}" if rows else "–"


def _print_estimates(estimates: Sequence[Estimate], workers: int, *, on_ray: bool) -> None:
    workers_named = f" on {workers} {'worker' if workers == 1 else 'workers'}" if on_ray else ""
    costs = table("system", "images to draw", "UNet passes", f"time{workers_named}", "disk", "measured on")
    for of_system in estimates:
        costs.add_row(
            plain(of_system.system),
            str(of_system.images),
            *_costs([of_system], workers),
            f"{of_system.measured} images" if of_system.measured else "nothing: none can be drawn",
        )
    costs.add_row("all", str(sum(each.images for each in estimates)), *_costs(estimates, workers), "")
    RESULTS.print(costs)


def _costs(estimates: Sequence[Estimate], workers: int) -> tuple[str, str, str]:
    """UNet passes, time and disk of some systems together."""
    passes, seconds, size = (
        sum(getattr(each, name) for each in estimates) for name in ("unet_passes", "seconds", "size")
    )
    return f"{passes:,.0f}", str(timedelta(seconds=round(seconds / workers))), decimal(round(size))
