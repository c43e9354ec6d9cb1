"""Draw a benchmark's images: claimed, drawn, written down, one batch at a time."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image

from attend_excite.benchmark import store
from attend_excite.benchmark.claims import Claims
from attend_excite.benchmark.jobs import Batch, Conditions, Job, System, conditions_of
from attend_excite.benchmark.prompts import BenchmarkPrompt, as_drawn
from attend_excite.guidance.schedule import Recipe
from attend_excite.memory import is_out_of_memory
from attend_excite.methods import AttendAndExcite, ComposableDiffusion, Method
from attend_excite.methods.composable import concepts
from attend_excite.models import Model

Row = dict[str, Any]
"""The columns of `store.ROW` by name."""

# Seconds between two looks at what other runs have claimed.
_POLL = 1.0

# The claim on what the run is; jobs are called otherwise.
_SETTINGS = "settings"

# Those that decide what an image looks like.
_PACKAGES = ("attend-excite", "torch", "diffusers", "transformers")

# What the queue must know of the rows that are there.
_OF_QUEUE = ["job", "error", "bytes", "attempt", "batch_prompts", "batch_seeds"]

# What all images of a folder have in common, beside the model.
_SHARED = ("revision", "dtype", "steps", "guidance", "height", "width")


class Executor(Protocol):
    """Where batches are drawn."""

    def describe(self, steps: int | None, guidance: float | None) -> tuple[Conditions, Recipe]:
        """What the images will have in common, and the recipe that the model recommends."""
        ...

    def draw(self, queue: Queue) -> Iterator[list[Row]]:
        """Draw and write down all that the queue gives: the rows of each batch, none while it waits."""
        ...


class Here:
    """Draws in this process with a loaded model, one batch after the other."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def describe(self, steps: int | None, guidance: float | None) -> tuple[Conditions, Recipe]:
        """See `Executor`."""
        return conditions_of(self.model, steps, guidance), self.model.recipe

    def draw(self, queue: Queue) -> Iterator[list[Row]]:
        """See `Executor`."""
        while queue:
            if work := queue.take():
                rows = write(queue.run, work, draw(self.model, work.batch))
                queue.finish(work, rows)
                yield rows
            elif queue:
                yield []
                time.sleep(_POLL)


class Work(NamedTuple):
    """What is drawn in one pass.

    Attributes:
        batch: all that is drawn.
        wanted: those of it whose images are kept: the others are there already, and are drawn because an
            image's pixels depend on its batch by a rounding error.
        attempt: how often the wanted ones had been drawn before, at most.
    """

    batch: Batch
    wanted: Batch
    attempt: int


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
        # Of each batch as it was planned those jobs that are to be looked at.
        self._left = deque((batch, batch) for batch in batches)
        self._elsewhere = deque[tuple[Batch, Batch]]()
        planned = {job.prompt.text: job.prompt for batch in batches for job in batch}
        self._prompts = _prompts_of(settings_there(run) or {}) | planned
        self._sizes: dict[str, int] = {}
        self._undone_rows: dict[str, Row] = {}
        self._refresh()

    def __bool__(self) -> bool:
        """Whether there is anything left to take, now or later."""
        return bool(self._left or self._elsewhere)

    def take(self) -> Work | None:
        """The next jobs to draw; None: other runs draw all that is left, or nothing is left."""
        if not self._left:
            self._left, self._elsewhere = self._elsewhere, deque()
        while self._left:
            planned, jobs = self._left.popleft()
            # Whole, so that it is drawn as it would be by one run alone.
            if not all(self._claims.take(job.name) for job in jobs):
                self._release(jobs)
                self._elsewhere.append((planned, jobs))
                continue
            if any(self._has_changed(job) for job in self._undone(jobs)):
                # Another run has been here, and perhaps finished these and more.
                self._refresh()
            if undone := self._undone(jobs):
                work = self._work(planned, undone)
                self._release(tuple(job for job in jobs if job not in work.wanted))
                if others := tuple(job for job in undone if job not in work.wanted):
                    self._left.appendleft((planned, others))
                return work
            self._release(jobs)
        return None

    def finish(self, work: Work, rows: Sequence[Row]) -> None:
        """The rows of what was taken are written down."""
        self.done.update(row["job"] for row in rows if row["error"] is None)
        self._release(work.wanted)

    def _work(self, planned: Batch, undone: Batch) -> Work:
        """The first of the undone jobs, and those that are to be drawn with it."""
        before = [self._undone_rows.get(job.name) for job in undone]
        attempt = 1 + max((row["attempt"] or 0 for row in before if row), default=-1)
        lost = [row if row and row["error"] is None else None for row in before]
        if all(row is None for row in lost):
            return Work(undone, undone, attempt)
        if lost[0] is None:
            first = tuple(job for job, row in zip(undone, lost, strict=True) if row is None)
            return Work(first, first, attempt)
        # Lost after it was drawn: the same pixels come of the same batch.
        batch = self._as_drawn(undone[0], lost[0]) or planned
        names = {job.name for job in batch}
        wanted = tuple(job for job, row in zip(undone, lost, strict=True) if row and job.name in names)
        return Work(batch, wanted, attempt)

    def _as_drawn(self, job: Job, row: Row) -> Batch | None:
        """The batch in which a job was drawn; None: nobody wrote that down, or it can't be drawn again."""
        if not row["batch_prompts"] or not set(row["batch_prompts"]) <= self._prompts.keys():
            return None
        prompts = [self._prompts[text] for text in row["batch_prompts"]]
        batch = tuple(
            replace(job, prompt=prompt, seed=seed) for prompt in prompts for seed in row["batch_seeds"]
        )
        return batch if job.name in {other.name for other in batch} else None

    def _release(self, batch: Batch) -> None:
        for job in batch:
            self._claims.release(job.name)

    def _has_changed(self, job: Job) -> bool:
        size = store.image_size(self.run, store.image_path(job.name))
        return size not in (0, self._sizes.get(job.name))

    def _refresh(self) -> None:
        self._sizes = store.image_sizes(self.run)
        rows = store.read_rows(self.run).select(_OF_QUEUE).to_pylist()
        self.done = {row["job"] for row in rows if row["error"] is None and store.is_whole(row, self._sizes)}
        self._undone_rows = {row["job"]: row for row in rows if row["job"] not in self.done}
        self._left = deque((planned, left) for planned, jobs in self._left if (left := self._undone(jobs)))

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
    # Two runs that begin at once would each write down what the other isn't told of.
    with Claims(run) as claims:
        while not claims.take(_SETTINGS):
            time.sleep(_POLL)
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
                "titles": {system.name: str(system.method.title) for system in systems},
                "seeds": list(seeds),
                "prompts": {
                    prompt.text: {"subset": prompt.subset, "subjects": prompt.subjects}
                    | ({"wanted": prompt.wanted} if prompt.wanted else {})
                    for prompt in prompts
                },
            }
        )
    )
    if (before := settings_there(run)) is not None:
        _refuse_another(run, before, settings)
        settings["model"] = before["model"]
        settings["seeds"] = list(dict.fromkeys(before["seeds"] + settings["seeds"]))
        for name in ("systems", "titles", "prompts"):
            settings[name] = before.get(name, {}) | settings[name]
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
    for name, column, spelled, reason in (
        ("systems", "system", str, "with other numbers or code"),
        ("prompts", "prompt", as_drawn, "with other subjects or another subset"),
    ):
        drawn = {row[column] for row in images}
        for key in before[name].keys() & settings[name].keys():
            if spelled(key) in drawn and before[name][key] != settings[name][key]:
                raise ValueError(f"'{run}' holds images of '{key}' {reason}: choose another --out")


def _prompts_of(settings: dict[str, Any]) -> dict[str, BenchmarkPrompt]:
    """The prompts of a run by their texts, as `settings_of` wrote them down."""
    return {
        text: BenchmarkPrompt(
            text, told["subset"], told["subjects"] and tuple(told["subjects"]), told.get("wanted")
        )
        for text, told in settings.get("prompts", {}).items()
    }


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
        except Exception as error:
            if is_out_of_memory(error):
                raise  # no prompt's fault
            if len(prompts) == 1:
                return [(failed(job, str(error) or type(error).__name__), None) for job in batch]
    parts = [tuple(job for job in batch if job.prompt == prompt) for prompt in prompts]
    return [drawn for part in parts for drawn in draw(model, part)]


def write(run: str | Path, work: Work, drawn: Sequence[tuple[Row, Image.Image | None]]) -> list[Row]:
    """Write the wanted images of a pass, then their rows, and give the rows."""
    wanted = {job.name for job in work.wanted}
    rows = []
    for row, image in drawn:
        if row["job"] not in wanted:
            continue
        file: Row = {}
        if image is not None:
            content = store.png_bytes(image)
            file = {"image": store.write_png(run, row["job"], content)}
            file |= {"bytes": len(content), "digest": store.digest_of(content)}
        rows.append(row | file | {"attempt": work.attempt})
    store.write_rows(run, rows)
    return rows


def broken_images(run: str | Path) -> list[str]:
    """The images that are there and not as they were written, by their paths in the run's folder."""
    sizes = store.image_sizes(run)
    rows = store.read_rows(run).select(["job", "image", "bytes"]).to_pylist()
    return [
        row["image"]
        for row in rows
        if row["image"] is not None and row["job"] in sizes and not store.is_whole(row, sizes)
    ]


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
        best_of=batch[0].system.best_of,
        batch_size=len(batch),
        progress=False,
    )
    seconds = (time.perf_counter() - began) / len(batch)
    # Where guidance is distilled into the network, or there is none, a step is one pass.
    family = model.family
    guided = family.takes_guidance and not family.distilled_guidance
    scale = family.weight_of_guidance(conditions.guidance) if guided else 1.0
    drawn = []
    for job, image, nsfw, trace in zip(batch, result.images, result.nsfw, result.trace, strict=True):
        visits = [update for step in trace.steps for update in step.updates]
        passes = len(trace.steps) * passes_a_step(method, job.prompt.text, scale) + len(visits)
        passes += trace.noise.passes if trace.noise else 0
        found = {
            "nsfw": nsfw,
            "seconds": seconds,
            "unet_passes": passes,
            "updates": sum(update.shift > 0 for update in visits),
            "device": _name_of(model.device),
            "host": platform.node(),
            "machine": _machine(),
            "versions": _versions(),
            "batch_prompts": [prompt.text for prompt in prompts],
            "batch_seeds": list(seeds),
            "error": None,
        }
        drawn.append((_row(job) | found, image))
    return drawn


def passes_a_step(method: Method, prompt: str, guidance: float) -> int:
    """UNet passes that an image needs at each step, guidance passes of nursing apart; `guidance` as
    classifier-free guidance weighs its two halves: above 1 it needs both."""
    if isinstance(method, AttendAndExcite):
        return passes_a_step(method.base, prompt, guidance)
    if isinstance(method, ComposableDiffusion):
        return 1 + len(concepts(prompt))
    return 2 if guidance > 1 else 1


def _name_of(device: torch.device) -> str:
    """ "NVIDIA H100 80GB HBM3", or where there is none, the device's kind: "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _machine() -> str:
    """ "Linux x86_64, AMD EPYC 9B14, 2 threads": what else may shift a pixel by a rounding error."""
    return f"{platform.system()} {_processor()}, {torch.get_num_threads()} threads"


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return ", ".join(dict.fromkeys([platform.machine(), *(names[:1] or [platform.processor()])])).strip(", ")


@cache
def _versions() -> str:
    return ", ".join(f"{package} {version(package)}" for package in _PACKAGES)


def _row(job: Job) -> Row:
    """What is known of a job before it is drawn."""
    return {
        "job": job.name,
        "prompt": as_drawn(job.prompt.text),
        "subset": job.prompt.subset,
        "subjects": job.prompt.shown,
        "wanted": job.prompt.wanted,
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
