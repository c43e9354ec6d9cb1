"""What a run will cost, from what it has cost so far or from one batch a system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from attend_excite.benchmark import store
from attend_excite.benchmark.jobs import Batch
from attend_excite.benchmark.run import Row, draw
from attend_excite.models import Model

# Enough images to know their average size in bytes.
_SIZES = 16


@dataclass(frozen=True)
class Estimate:
    """What the images of one system that are not drawn yet will cost.

    Attributes:
        system: its name.
        images: how many there will be.
        measured: on how many images the figures stand; 0: on none, and there are no figures.
        unet_passes: of all those images together.
        seconds: likewise, on one worker.
        size: likewise, in bytes.
    """

    system: str
    images: int
    measured: int
    unet_passes: float
    seconds: float
    size: float


def estimate(run: str | Path, model: Model, batches: Sequence[Batch]) -> list[Estimate]:
    """An estimate for each system; one without images in the folder draws a batch that is not kept."""
    sizes_there = store.image_sizes(run)
    rows = [
        row
        for row in store.read_rows(run).to_pylist()
        if row["error"] is None and store.is_whole(row, sizes_there)
    ]
    done = {row["job"] for row in rows}
    systems: dict[str, list[Batch]] = {}
    for batch in batches:
        systems.setdefault(batch[0].system.name, []).append(batch)
    if not done:
        # The first pass on a device is slower than all that follow.
        draw(model, batches[0][:1])
    estimates = []
    for name, all_of_it in systems.items():
        images = sum(job.name not in done for batch in all_of_it for job in batch)
        known = [row for row in rows if row["system"] == name]
        sizes = [sizes_there[row["job"]] for row in known[:_SIZES]]
        if not known and images:
            known, sizes = _measured(model, _spread(all_of_it))
        estimates.append(
            Estimate(
                system=name,
                images=images,
                measured=len(known),
                unet_passes=images * fmean([row["unet_passes"] for row in known] or [0]),
                seconds=images * fmean([row["seconds"] for row in known] or [0]),
                size=images * fmean(sizes or [0]),
            )
        )
    return estimates


def _measured(model: Model, batch: Batch) -> tuple[list[Row], list[int]]:
    """The rows of a batch, and how large its images are in bytes."""
    drawn = [(row, image) for row, image in draw(model, batch) if image is not None]
    return [row for row, _ in drawn], [len(store.png_bytes(image)) for _, image in drawn]


def _spread(batches: Sequence[Batch]) -> Batch:
    """As large a batch as the others, of prompts from everywhere in the list with one seed."""
    first_seed = batches[0][0].seed
    jobs = [job for batch in batches for job in batch if job.seed == first_seed]
    return tuple(jobs[:: -(-len(jobs) // len(batches[0]))])
