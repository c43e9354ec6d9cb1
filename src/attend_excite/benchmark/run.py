"""Draw a benchmark's images: claimed, drawn, written down, one batch at a time."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from attend_excite.benchmark import store
from attend_excite.benchmark.claims import Claims
from attend_excite.benchmark.jobs import Batch, Conditions, Job, System, conditions_of
from attend_excite.benchmark.prompts import BenchmarkPrompt
from attend_excite.guidance.schedule import Recipe
from attend_excite.methods import AttendAndExcite, ComposableDiffusion, Method
from attend_excite.methods.composable import concepts
from attend_excite.models import Model

Row = dict[str, Any]
"""The columns of `store.ROW` by name."""

# Seconds between two looks at what other runs have claimed.
_POLL = 1.0

# Those that decide what an image looks like.
_PACKAGES = ("attend-excite", "torch", "diffusers", "transformers")

# What all images of a folder have in common, beside the model.
_SHARED = ("revision", "dtype", "steps", "guidance", "height", "width")


class Executor(Protocol):
    """Where batches are drawn."""

    def describe(self, steps: int, guidance: float) -> tuple[Conditions, Recipe]:
        """What the images will have in common, and the recipe that the model recommends."""
        ...

    def draw(self, queue: Queue) -> Iterator[list[Row]]:
        """Draw and write down all that the queue gives: the rows of each batch, none while it waits."""
        ...


class Here:
    """Draws in this process with a loaded model, one batch after the other."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def describe(self, steps: int, guidance: float) -> tuple[Conditions, Recipe]:
        """See `Executor`."""
        return conditions_of(self.model, steps, guidance), self.model.recipe

    def draw(self, queue: Queue) -> Iterator[list[Row]]:
        """See `Executor`."""
        while queue:
            if batch := queue.take():
                rows = write(queue.run, draw(self.model, batch))
                queue.finish(batch, rows)
                yield rows
            elif queue:
                yield []
                time.sleep(_POLL)


class Queue:
    """The jobs that are left, shared with other runs in the same folder.

    Attributes:
        run: the folder.
        done: the names of the jobs that have their image and their row, whoever drew them.
    """

    def __init__(self, run: str | Path, batches: Sequence[Batch], claims: Claims) -> None:
        self.run = run
        self.done: set[str] = set()
        self._claims = claims
        self._left, self._elsewhere = deque(batches), deque[Batch]()
        self._images = store.jobs_with_image(run)
        self._refresh()

    def __bool__(self) -> bool:
        """Whether there is anything left to take, now or later."""
        return bool(self._left or self._elsewhere)

    def take(self) -> Batch | None:
        """The next jobs to draw; None: other runs draw all that is left, or nothing is left."""
        if not self._left:
            self._left, self._elsewhere = self._elsewhere, deque()
        while self._left:
            batch = self._left.popleft()
            # Whole, so that it is drawn as it would be by one run alone.
            if not all(self._claims.take(job.name) for job in batch):
                self._release(batch)
                self._elsewhere.append(batch)
                continue
            if any(job.name not in self._images and store.has_image(self.run, job.name) for job in batch):
                # Another run has been here, and perhaps finished these and more.
                self._images = store.jobs_with_image(self.run)
                self._refresh()
            undone = self._undone(batch)
            self._release(tuple(job for job in batch if job.name in self.done))
            if undone:
                return undone
        return None

    def finish(self, batch: Batch, rows: Sequence[Row]) -> None:
        """The rows of a batch that was taken are written down."""
        self.done.update(row["job"] for row in rows if row["error"] is None)
        self._release(batch)

    def _release(self, batch: Batch) -> None:
        for job in batch:
            self._claims.release(job.name)

    def _refresh(self) -> None:
        rows = store.read_rows(self.run).select(["job", "error"]).to_pylist()
        self.done = {row["job"] for row in rows if row["error"] is None} & self._images
        self._left = deque(batch for old in self._left if (batch := self._undone(old)))

    def _undone(self, batch: Batch) -> Batch:
        return tuple(job for job in batch if job.name not in self.done)


def begin(
    run: str | Path,
    conditions: Conditions,
    prompts: Sequence[BenchmarkPrompt],
    seeds: Sequence[int],
    systems: Sequence[System],
) -> None:
    """Write down what the run is, together with what the folder holds already.

    Raises:
        ValueError: see `settings_of`.
    """
    store.write_settings(run, settings_of(run, conditions, prompts, seeds, systems))


def settings_of(
    run: str | Path,
    conditions: Conditions,
    prompts: Sequence[BenchmarkPrompt],
    seeds: Sequence[int],
    systems: Sequence[System],
) -> dict[str, Any]:
    """What the run is, together with what the folder holds already, as plain data.

    Raises:
        ValueError: the folder holds images of another model, made under other conditions, by a system of
            the same name with other numbers or code, or of the same prompt with other subjects; or a prompt
            is given twice.
    """
    texts = Counter(prompt.text for prompt in prompts)
    if twice := [text for text, count in texts.items() if count > 1]:
        raise ValueError(f"the prompt '{twice[0]}' is given twice, with other subjects or another subset")
    # As it will be read again: JSON knows no tuples, and text keys only.
    settings: dict[str, Any] = json.loads(
        json.dumps(
            {name: getattr(conditions, name) for name in ("model", *_SHARED)}
            | {
                "systems": {system.name: system.numbers for system in systems},
                "seeds": list(seeds),
                "prompts": {
                    prompt.text: {"subset": prompt.subset, "subjects": prompt.subjects} for prompt in prompts
                },
            }
        )
    )
    if (before := settings_there(run)) is not None:
        _refuse_another(run, before, settings)
        settings["model"] = before["model"]
        settings["seeds"] = list(dict.fromkeys(before["seeds"] + settings["seeds"]))
        for name in ("systems", "prompts"):
            settings[name] = before[name] | settings[name]
    return settings


def _refuse_another(run: str | Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise where averages over old and new images would be of different things."""
    # As in a job's name: where the weights are known it doesn't matter under what name they were found.
    for name in _SHARED if settings["revision"] else ("model", *_SHARED):
        if before[name] != settings[name]:
            raise ValueError(
                f"'{run}' is a run with {name} {before[name]}, not {settings[name]}: choose another --out"
            )
    images = [row for row in store.read_rows(run).to_pylist() if row["image"] is not None]
    for name, column, reason in (
        ("systems", "system", "with other numbers or code"),
        ("prompts", "prompt", "with other subjects or another subset"),
    ):
        drawn = {row[column] for row in images}
        for key in before[name].keys() & settings[name].keys() & drawn:
            if before[name][key] != settings[name][key]:
                raise ValueError(f"'{run}' holds images of '{key}' {reason}: choose another --out")


def settings_there(run: str | Path) -> dict[str, Any] | None:
    """What the folder holds; None: no run yet."""
    try:
        return store.read_settings(run)
    except store.NoRunError:
        return None


def draw(model: Model, batch: Batch) -> list[tuple[Row, Image.Image | None]]:
    """Draw a batch: each job's row, and its image unless the row has an error.

    A batch that fails is drawn prompt by prompt, so that a prompt that cannot be drawn spoils no other.
    """
    prompts = list(dict.fromkeys(job.prompt for job in batch))
    seeds = list(dict.fromkeys(job.seed for job in batch))
    # Of a batch that was drawn in part before, single images may be left.
    if len(batch) == len(prompts) * len(seeds):
        try:
            return _drawn(model, batch, prompts, seeds)
        except torch.OutOfMemoryError:
            raise  # no prompt's fault
        except Exception as error:
            if len(prompts) == 1:
                return [(failed(job, str(error) or type(error).__name__), None) for job in batch]
    parts = [tuple(job for job in batch if job.prompt == prompt) for prompt in prompts]
    return [drawn for part in parts for drawn in draw(model, part)]


def write(run: str | Path, drawn: Sequence[tuple[Row, Image.Image | None]]) -> list[Row]:
    """Write the images of a batch, then its rows, and give the rows."""
    rows = []
    for row, image in drawn:
        path = None if image is None else store.write_image(run, row["job"], image)
        rows.append(row | {"image": path})
    store.write_rows(run, rows)
    return rows


def failed(job: Job, error: str) -> Row:
    """The row of a job whose image could not be drawn."""
    return _row(job) | {"error": error}


def _drawn(
    model: Model, batch: Batch, prompts: Sequence[BenchmarkPrompt], seeds: Sequence[int]
) -> list[tuple[Row, Image.Image | None]]:
    conditions, method = batch[0].conditions, batch[0].system.method
    began = time.perf_counter()
    result = model.generate(
        [prompt.text for prompt in prompts],
        method=method,
        subjects=[prompt.subjects for prompt in prompts],
        seeds=seeds,
        steps=conditions.steps,
        guidance_scale=conditions.guidance,
        height=conditions.height,
        width=conditions.width,
        batch_size=len(batch),
        progress=False,
    )
    seconds = (time.perf_counter() - began) / len(batch)
    drawn = []
    for job, image, nsfw, trace in zip(batch, result.images, result.nsfw, result.trace, strict=True):
        visits = [update for step in trace.steps for update in step.updates]
        passes = len(trace.steps) * passes_a_step(method, job.prompt.text, conditions.guidance) + len(visits)
        found = {
            "nsfw": nsfw,
            "seconds": seconds,
            "unet_passes": passes,
            "updates": sum(update.shift > 0 for update in visits),
            "device": _name_of(model.device),
            "host": platform.node(),
            "versions": _versions(),
            "error": None,
        }
        drawn.append((_row(job) | found, image))
    return drawn


def passes_a_step(method: Method, prompt: str, guidance: float) -> int:
    """UNet passes that an image needs at each step, guidance passes of nursing apart."""
    if isinstance(method, AttendAndExcite):
        return passes_a_step(method.base, prompt, guidance)
    if isinstance(method, ComposableDiffusion):
        return 1 + len(concepts(prompt))
    return 2 if guidance > 1 else 1


def _name_of(device: torch.device) -> str:
    """ "NVIDIA H100 80GB HBM3", or where there is none, the device's kind: "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def _versions() -> str:
    return ", ".join(f"{package} {version(package)}" for package in _PACKAGES)


def _row(job: Job) -> Row:
    """What is known of a job before it is drawn."""
    return {
        "job": job.name,
        "prompt": job.prompt.text,
        "subset": job.prompt.subset,
        "subjects": job.prompt.shown,
        "seed": job.seed,
        "system": job.system.name,
        "method": job.system.method.name,
        "recipe": job.system.recipe,
        "model": job.conditions.model,
        "revision": job.conditions.revision,
        "image": None,
        "width": job.conditions.width,
        "height": job.conditions.height,
    }
