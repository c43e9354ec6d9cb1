"""What the page's functions do. None knows Gradio: values in, values out, and a `ValueError` for people."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from attend_excite.app.forms import Form
from attend_excite.app.jobs import Reporter
from attend_excite.app.limits import KEPT_RUNS, MAX_NAME, check, check_additions
from attend_excite.app.models import Models
from attend_excite.app.words import subjects_of, words_of
from attend_excite.cli.drawing import method_label, settings_label, slug
from attend_excite.explain import maps_figure
from attend_excite.generate import Generation, StepEvent
from attend_excite.guidance.schedule import Recipe
from attend_excite.metadata import Origin, Settings, draw_as, read_origin, revision_of, write_png
from attend_excite.methods import METHODS, PAPER_METHODS, AttendAndExcite, StableDiffusion, method_named
from attend_excite.models import Model
from attend_excite.sheets import comparison_sheet, fitted
from attend_excite.subjects import Prompt, parse, unmarked
from attend_excite.verdict import NOBODY_CAN_TELL, Verdict, best, can_judge, verdicts

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
        seeds: of the pictures: all that were asked for, or the best alone.
        generations: a method's label -> what came out.
        files: likewise the PNG files, one a seed, each telling how it was made.
        verdicts: likewise which subjects are in each.
        with_maps: those of the generations that kept their maps, of the subjects alone.
        recipe: of Attend-and-Excite, where it was used.
        refused: the label of a method that cannot draw this prompt -> why.
        extras: more files to take away: sheets of the pictures and the maps, the recipe.
    """

    form: Form
    prompt: Prompt
    seeds: Sequence[int]
    generations: Mapping[str, Generation]
    files: Mapping[str, Sequence[Path]]
    verdicts: Mapping[str, Sequence[Verdict]]
    with_maps: Mapping[str, Generation]
    recipe: Recipe | None
    refused: Mapping[str, str]
    extras: Sequence[Path]


@dataclass(frozen=True)
class Kept:
    """Pictures of an earlier run, as far as the server still has them.

    Attributes:
        prompt: parsed.
        seeds: one a picture.
        files: a method's label -> its PNG files, one a seed.
        verdicts: likewise which subjects are in each.
    """

    prompt: Prompt
    seeds: Sequence[int]
    files: Mapping[str, Sequence[Path]]
    verdicts: Mapping[str, Sequence[Verdict]]


@dataclass(frozen=True)
class Redrawn:
    """A picture that was drawn again.

    Attributes:
        origin: what its file says of it.
        prompt: parsed.
        verdict: which subjects are in it.
        file: the new picture.
        differing: how many of its pixels differ from the old one's.
        notes: what may be the reason.
    """

    origin: Origin
    prompt: Prompt
    verdict: Verdict
    file: Path
    differing: int
    notes: Sequence[str]


Report = Reporter[Progress | Drawn | Redrawn]


@dataclass(frozen=True)
class Server:
    """What all visitors share: the models, and the folder with the files of the latest runs.

    Attributes:
        models: what draws.
        folder: of the files.
        tunnelled: whether visitors come through a tunnel, from this machine's own address.
    """

    models: Models
    folder: Path
    tunnelled: bool = False

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
    plain = () if type(method) is StableDiffusion else (StableDiffusion(),)
    model = server.models.get(form.model)
    form = resolved(form, model.tokenizer).on(model)
    wanted = [form.settings(model, each) for each in (*plain, method)]
    for settings in wanted:
        check(settings, form.seeds, model)
    prompt = parse(form.prompt, model.family.streams(), form.subjects)
    if form.best and not can_judge(prompt, model.name):
        raise ValueError(NOBODY_CAN_TELL)
    runs: list[_Run] = []
    with server.models.in_use:
        watch = _Watch(model, len(wanted), report)
        for settings in wanted:
            maps = settings.method.attends_to_prompt
            runs.append(_Run(settings, _generate(model, settings, form.seeds, watch, maps=maps)))
    seeds = form.seeds
    if form.best:
        index = best(verdicts(runs[-1].generation.images, prompt, model.name), prompt)
        seeds = seeds[index : index + 1]
        runs = [replace(run, generation=run.generation.only(index)) for run in runs]
    report(_written(server.new_folder(), form, prompt, seeds, runs, with_maps=True))


def compare(server: Server, form: Form, report: Report) -> None:
    """All systems of the paper on the form's prompt and seeds; reports as `draw` does.

    Raises:
        ValueError: as for `draw`. What a single method refuses stands in `Drawn.refused`.
    """
    model = server.models.get(form.model)
    form = replace(resolved(form, model.tokenizer).on(model), best=False)  # all of them are shown
    wanted = [form.settings(model, method_named(name)) for name in PAPER_METHODS]
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
    prompt = parse(form.prompt, model.family.streams(), form.subjects)
    drawn = _written(server.new_folder(), form, prompt, form.seeds, runs, with_maps=False)
    report(replace(drawn, refused=refused))


def resolved(form: Form, tokenizer: Any) -> Form:
    """The form with its prompt free of brackets and its subjects named.

    Raises:
        ValueError: the prompt is empty, too long, or has a bracket that is not closed.
    """
    words, _ = words_of(form.prompt, tokenizer)
    subjects = subjects_of(words) if form.subjects is None else form.subjects
    return replace(form, prompt=unmarked(form.prompt), subjects=subjects)


def draw_again(server: Server, picture: Path, report: Report) -> None:
    """The picture of a PNG, from what the file says of itself; reports `Progress`, then a `Redrawn`.

    Nothing in the file is trusted: it may name only a model that is served here, and ask for no more than
    a visitor may. Its whole batch is drawn, without which the pixels may differ.

    Raises:
        ValueError: the file does not say how it was made, or says what cannot be.
    """
    try:
        origin = read_origin(picture)
    except ValueError as error:
        # Where the server keeps it is nobody's business.
        raise ValueError(str(error).replace(str(picture), picture.name)) from error
    settings = origin.settings
    if settings.image is not None:
        # Its path is whatever somebody wrote into the file, and must open nothing here.
        raise ValueError(
            f"it was made from another picture, '{Path(settings.image.path).name[:40]}', which isn't in it: "
            "use these settings, and begin from that picture again"
        )
    check_additions(settings)
    model = server.models.get(settings.model)
    check(settings, origin.batch, model)
    before = _pixels(picture, settings)
    with server.models.in_use:
        generation = _generate(model, settings, origin.batch, _Watch(model, 1, report))
    here = replace(
        settings,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        revision=revision_of(model),
    )
    file = server.new_folder() / _file_name(generation.prompts[0], settings, origin.seed)
    image = generation.images[origin.batch.index(origin.seed)]
    write_png(file, image, Origin(here, origin.seed, origin.batch))
    notes = [f"It was drawn with {package}." for package in origin.other_versions]
    for what in ("device", "dtype", "revision"):
        was, now = getattr(settings, what), getattr(here, what)
        if was != now:
            notes.append(f"Its {what} was {was}; here it is {now}.")
    differing = (
        image.width * image.height
        if before is None
        else int((before != np.asarray(image.convert("RGB"))).any(axis=-1).sum())
    )
    prompt = _named(origin, model)
    (verdict,) = verdicts([image], prompt, model.name)
    report(Redrawn(origin, prompt, verdict, file, differing, notes))


def kept(server: Server, folder: str, names: Mapping[str, Sequence[str]]) -> Kept | None:
    """Pictures of an earlier run; None: the server doesn't have all of them any more.

    Args:
        server: what drew them.
        folder: the name of the run's folder. Like all else that browsers remember it is not trusted.
        names: a method's label -> its files in it, one a seed.
    """
    rows = list(names.values())
    texts = [folder, *names, *(name for row in rows for name in row)]
    fine = len(names) <= len(METHODS) and len(set(map(len, rows))) == 1 and all(rows)
    if not fine or not all(len(text) <= MAX_NAME and text.isprintable() for text in texts):
        return None
    root = server.folder / folder
    files = {label: [root / name for name in row] for label, row in names.items()}
    # Nothing outside the folder can be meant.
    if root.resolve().parent != server.folder.resolve() or not all(
        path.resolve().parent == root.resolve() and path.suffix == ".png" and path.is_file()
        for row in files.values()
        for path in row
    ):
        return None
    try:
        origins = {label: [read_origin(path) for path in row] for label, row in files.items()}
        prompts = {
            label: _named(row[-1], server.models.get(row[-1].settings.model))
            for label, row in origins.items()
        }
    except ValueError:
        return None
    seen = {
        label: verdicts(list(map(_image, row)), prompts[label], origins[label][-1].settings.model)
        for label, row in files.items()
    }
    last = list(files)[-1]
    return Kept(prompts[last], [origin.seed for origin in origins[last]], files, seen)


def _named(origin: Origin, model: Model) -> Prompt:
    """The prompt of a picture with its subjects, or with none where there are none to be found."""
    settings = origin.settings
    try:
        return parse(settings.prompt, model.family.streams(), settings.subjects, settings.syntax)
    except ValueError:
        return parse(settings.prompt, model.family.streams(), (), settings.syntax)


def _image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


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
            self._pictures[label] = self._model.family.decode(event.latents)[0]
            self._looking += time.perf_counter() - before
        total = self.passes * event.iterations
        each = (time.perf_counter() - self._began) / self._done
        left = each * (total - self._done)
        self._report(Progress(label, self._done, total, left, dict(self._pictures)))

    def before_pass(self, *_: object) -> None:
        """A hook of the UNet, so that Stop need not wait for all the refinements of a step."""
        self._report.check()

    def finished(self, label: str, pictures: Sequence[Image.Image]) -> None:
        """That method's pictures are there."""
        self._pictures[label] = pictures


def _generate(
    model: Model, settings: Settings, seeds: Sequence[int], watch: _Watch, *, maps: bool = False
) -> Generation:
    label = method_label(settings)
    hook = model.network.register_forward_pre_hook(watch.before_pass)
    try:
        generation = draw_as(
            model, settings, seeds, maps=maps, callback=lambda event: watch.step_of(label, event)
        )
    finally:
        hook.remove()
    watch.finished(label, generation.images)
    return generation


@dataclass(frozen=True)
class _Run:
    settings: Settings
    generation: Generation

    @property
    def label(self) -> str:
        return method_label(self.settings)


def _written(
    folder: Path, form: Form, prompt: Prompt, seeds: Sequence[int], runs: Sequence[_Run], *, with_maps: bool
) -> Drawn:
    """Everything of some runs in files, each picture with what it was made with."""
    files: dict[str, list[Path]] = {run.label: [] for run in runs}
    for run in runs:
        for seed, image in zip(seeds, run.generation.images, strict=True):
            path = folder / _file_name(prompt, run.settings, seed)
            write_png(path, image, Origin(_without_folders(run.settings), seed, form.seeds))
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
    # The server keeps a run for a visitor who may look closer: of all tokens it would be a hundred megabytes.
    subjects = sorted({position for group in prompt.groups for position in group.positions})
    lean = {
        label: replace(run, _maps=run.maps.only(subjects)) if label in mapped else run
        for label, run in generations.items()
    }
    seen = {run.label: verdicts(run.generation.images, prompt, run.settings.model) for run in runs}
    return Drawn(
        form, prompt, seeds, lean, files, seen, {label: lean[label] for label in mapped}, recipe, {}, extras
    )


def _without_folders(settings: Settings) -> Settings:
    """Where the server keeps the pictures that were begun from is nobody's business."""
    image, mask = (
        file and replace(file, path=Path(file.path).name) for file in (settings.image, settings.mask)
    )
    return replace(settings, image=image, mask=mask)


def _file_name(prompt: Prompt, settings: Settings, seed: int) -> str:
    return f"{slug(prompt.text)}_seed{seed}_{slug(settings.method.name)}.png"


def _pixels(picture: Path, settings: Settings) -> NDArray[np.uint8] | None:
    """(H, W, 3) a PNG's pixels; None: it hasn't the size that it says it was drawn in.

    Raises:
        ValueError: it ends too early, or is broken.
    """
    try:
        with Image.open(picture, formats=["PNG"]) as image:
            if image.size != (settings.width, settings.height):
                return None
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"the picture '{picture.name}' is broken: its file is not whole") from error
