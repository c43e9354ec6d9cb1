"""What the page's functions do. None knows Gradio: values in, values out, and a `ValueError` for people."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attend_excite.app.forms import Form
from attend_excite.app.limits import KEPT_RUNS, check
from attend_excite.app.models import Models
from attend_excite.app.words import subjects_of, without_brackets, words_of
from attend_excite.cli.drawing import method_label, settings_label, slug
from attend_excite.explain import maps_figure
from attend_excite.generate import Generation, StepEvent, decode_latents
from attend_excite.guidance.schedule import Recipe
from attend_excite.metadata import Origin, Settings, draw_as, read_origin, revision_of, write_png
from attend_excite.methods import METHODS, AttendAndExcite, StableDiffusion, method_named
from attend_excite.models import Model
from attend_excite.sheets import comparison_sheet, fitted
from attend_excite.subjects import Prompt, parse

_PREVIEW_SHARE = 0.15
"""Of the time that a run takes: what pictures in the making may cost."""


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        doing: which method draws.
        done: steps so far, of all methods.
        total: steps in all.
        seconds_left: a guess from those so far.
        pictures: a method's label -> its pictures as they are by now, one a seed; empty before the first.
    """

    doing: str
    done: int
    total: int
    seconds_left: float
    pictures: Mapping[str, Sequence[Image.Image]]


@dataclass(frozen=True)
class Drawn:
    """A run that is done.

    Attributes:
        form: what was asked for, its prompt without brackets and its subjects named.
        prompt: parsed.
        generations: a method's label -> what came out.
        files: likewise the PNG files, one a seed, each telling how it was made.
        with_maps: those of the generations that kept their maps.
        recipe: of Attend-and-Excite, where it was used.
        refused: the label of a method that cannot draw this prompt -> why.
        extras: more files to take away: sheets of the pictures and the maps, the recipe.
    """

    form: Form
    prompt: Prompt
    generations: Mapping[str, Generation]
    files: Mapping[str, Sequence[Path]]
    with_maps: Mapping[str, Generation]
    recipe: Recipe | None
    refused: Mapping[str, str]
    extras: Sequence[Path]


@dataclass(frozen=True)
class Redrawn:
    """A picture that was drawn again.

    Attributes:
        origin: what its file says of it.
        file: the new picture.
        differing: how many of its pixels differ from the old one's.
        notes: what may be the reason.
    """

    origin: Origin
    file: Path
    differing: int
    notes: Sequence[str]


Report = Callable[[Progress | Drawn | Redrawn], None]


@dataclass(frozen=True)
class Server:
    """What all visitors share: the models, and the folder with the files of the latest runs."""

    models: Models
    folder: Path

    def new_folder(self) -> Path:
        """A folder for the files of one run, whose name nobody guesses; the oldest makes room for it."""
        runs = sorted(self.folder.iterdir(), key=lambda run: run.stat().st_mtime)
        for run in runs[: max(len(runs) - KEPT_RUNS + 1, 0)]:
            shutil.rmtree(run, ignore_errors=True)
        folder = self.folder / secrets.token_urlsafe(12)
        folder.mkdir()
        return folder


def draw(server: Server, form: Form, report: Report) -> None:
    """The form's method beside the plain model, from the same noise; reports `Progress`, then a `Drawn`.

    Raises:
        ValueError: the form makes no sense or asks for too much.
    """
    method = method_named(form.method)
    plain = () if isinstance(method, StableDiffusion) else (StableDiffusion(),)
    model = server.models.get(form.model)
    form = resolved(form, model.tokenizer)
    wanted = [form.settings(model, each) for each in (*plain, method)]
    for settings in wanted:
        check(settings, form.seeds, model)
    runs: list[_Run] = []
    with server.models.in_use:
        watch = _Watch(model, len(wanted), report)
        for settings in wanted:
            maps = settings.method.attends_to_prompt
            runs.append(_Run(settings, _generate(model, settings, form.seeds, watch, maps=maps)))
    prompt = parse(form.prompt, model.tokenizer, form.subjects)
    report(_written(server.new_folder(), form, prompt, runs, with_maps=True))


def compare(server: Server, form: Form, report: Report) -> None:
    """All methods on the form's prompt and seeds; reports as `draw` does.

    Raises:
        ValueError: as for `draw`. What a single method refuses stands in `Drawn.refused`.
    """
    model = server.models.get(form.model)
    form = resolved(form, model.tokenizer)
    wanted = [form.settings(model, method_named(name)) for name in METHODS]
    runs: list[_Run] = []
    refused: dict[str, str] = {}
    with server.models.in_use:
        watch = _Watch(model, len(wanted), report)
        for settings in wanted:
            try:
                check(settings, form.seeds, model)
                runs.append(_Run(settings, _generate(model, settings, form.seeds, watch)))
            except ValueError as error:
                watch.passes -= 1
                refused[method_label(settings)] = str(error)
    if not runs:
        raise ValueError(next(iter(refused.values())))
    prompt = parse(form.prompt, model.tokenizer, form.subjects)
    drawn = _written(server.new_folder(), form, prompt, runs, with_maps=False)
    report(replace(drawn, refused=refused))


def resolved(form: Form, tokenizer: Any) -> Form:
    """The form with its prompt free of brackets and its subjects named.

    Raises:
        ValueError: the prompt is empty, too long, or has a bracket that is not closed.
    """
    words, _ = words_of(form.prompt, tokenizer)
    subjects = subjects_of(words) if form.subjects is None else form.subjects
    return replace(form, prompt=without_brackets(form.prompt, tokenizer), subjects=subjects)


def draw_again(server: Server, picture: Path, report: Report) -> None:
    """The picture of a PNG, from what the file says of itself; reports `Progress`, then a `Redrawn`.

    Nothing in the file is trusted: it may name only a model that is served here, and ask for no more than
    a visitor may. Its whole batch is drawn, without which the pixels may differ.

    Raises:
        ValueError: the file does not say how it was made, or says what cannot be.
    """
    origin = read_origin(picture)
    settings = origin.settings
    model = server.models.get(settings.model)
    check(settings, origin.batch, model)
    with server.models.in_use:
        generation = _generate(model, settings, origin.batch, _Watch(model, 1, report))
    here = replace(
        settings,
        dtype=str(model.unet.dtype).removeprefix("torch."),
        device=model.device.type,
        revision=revision_of(model),
    )
    file = server.new_folder() / _file_name(generation.prompts[0], settings, origin.seed)
    write_png(
        file, generation.images[origin.batch.index(origin.seed)], Origin(here, origin.seed, origin.batch)
    )
    notes = [f"It was drawn with {package}." for package in origin.other_versions]
    for what in ("device", "dtype", "revision"):
        was, now = getattr(settings, what), getattr(here, what)
        if was != now:
            notes.append(f"Its {what} was {was}; here it is {now}.")
    report(Redrawn(origin, file, _differing_pixels(picture, file), notes))


def overlays(drawn: Drawn, image: int, step: int) -> dict[str, list[Image.Image]]:
    """Where each subject was attended to at a step, over one of the pictures: a method's label -> one a
    subject. All share one scale, so that words, steps and methods can be compared."""
    maps = {
        label: [generation.maps.of_tokens(group.positions) for group in drawn.prompt.groups]
        for label, generation in drawn.with_maps.items()
    }
    highest = max((float(word.values[image].max()) for row in maps.values() for word in row), default=1.0)
    return {
        label: [
            word.overlay(fitted(drawn.generations[label].images[image]), image, step, highest=highest)
            for word in row
        ]
        for label, row in maps.items()
    }


class _Watch:
    """Turns the steps of some passes into `Progress`, with a look at the pictures now and then."""

    def __init__(self, model: Model, passes: int, report: Report) -> None:
        self.passes = passes
        self._model, self._report = model, report
        self._began, self._looking, self._done = time.perf_counter(), 0.0, 0
        self._pictures: dict[str, Sequence[Image.Image]] = {}

    def step_of(self, label: str, event: StepEvent) -> None:
        """One more step of that method is done."""
        self._done += 1
        before = time.perf_counter()
        if self._looking <= _PREVIEW_SHARE * (before - self._began):
            self._pictures[label] = decode_latents(self._model, event.latents)[0]
            self._looking += time.perf_counter() - before
        total = self.passes * event.iterations
        each = (time.perf_counter() - self._began) / self._done
        left = each * (total - self._done)
        self._report(Progress(label, self._done, total, left, dict(self._pictures)))

    def finished(self, label: str, pictures: Sequence[Image.Image]) -> None:
        """That method's pictures are there."""
        self._pictures[label] = pictures


def _generate(
    model: Model, settings: Settings, seeds: Sequence[int], watch: _Watch, *, maps: bool = False
) -> Generation:
    label = method_label(settings)
    generation = draw_as(
        model, settings, seeds, maps=maps, callback=lambda event: watch.step_of(label, event)
    )
    watch.finished(label, generation.images)
    return generation


@dataclass(frozen=True)
class _Run:
    settings: Settings
    generation: Generation

    @property
    def label(self) -> str:
        return method_label(self.settings)


def _written(folder: Path, form: Form, prompt: Prompt, runs: Sequence[_Run], *, with_maps: bool) -> Drawn:
    """Everything of some runs in files, each picture with what it was made with."""
    seeds = form.seeds
    files: dict[str, list[Path]] = {run.label: [] for run in runs}
    for run in runs:
        for seed, image in zip(seeds, run.generation.images, strict=True):
            path = folder / _file_name(prompt, run.settings, seed)
            write_png(path, image, Origin(run.settings, seed, seeds))
            files[run.label].append(path)
    generations = {run.label: run.generation for run in runs}
    mapped = {
        run.label: run.generation for run in runs if with_maps and run.settings.method.attends_to_prompt
    }
    subtitle, name = settings_label(runs[-1].settings), slug(prompt.text)
    extras: list[Path] = []
    if len(runs) > 1:
        extras.append(folder / f"{name}_compare.png")
        rows = {label: generation.images for label, generation in generations.items()}
        write_png(extras[-1], comparison_sheet(prompt, subtitle, rows, seeds))
    if any(generation.prompts[0].groups for generation in mapped.values()):
        for index, seed in enumerate(seeds):
            extras.append(folder / f"{name}_seed{seed}_maps.png")
            write_png(extras[-1], maps_figure(mapped, index, subtitle=f"seed {seed} · {subtitle}"))
    methods = [run.settings.method for run in runs]
    recipe = next((method.recipe for method in methods if isinstance(method, AttendAndExcite)), None)
    # `Form.settings` writes it out: it is no name.
    assert not isinstance(recipe, str)
    if recipe is not None:
        extras.append(folder / "recipe.json")
        extras[-1].write_text(json.dumps(asdict(recipe), indent=2), encoding="utf-8")
    return Drawn(form, prompt, generations, files, mapped, recipe, {}, extras)


def _file_name(prompt: Prompt, settings: Settings, seed: int) -> str:
    return f"{slug(prompt.text)}_seed{seed}_{settings.method.name}.png"


def _differing_pixels(one: Path, other: Path) -> int:
    """How many pixels of the second PNG differ from the first; all of them where the sizes do."""
    with Image.open(one, formats=["PNG"]) as first, Image.open(other, formats=["PNG"]) as second:
        if first.size != second.size:
            return second.width * second.height
        pixels = [np.asarray(picture.convert("RGB")) for picture in (first, second)]
    return int((pixels[0] != pixels[1]).any(axis=-1).sum())
