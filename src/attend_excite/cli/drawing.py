"""Draw what a command line asks for and write it down, batch by batch."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from attend_excite.cli.messages import MESSAGES, plain, warn
from attend_excite.cli.words import check_subjects
from attend_excite.generate import Generation, StepEvent
from attend_excite.guidance.schedule import Recipe, read_recipe
from attend_excite.metadata import (
    DTYPES,
    MAX_BATCH,
    MAX_SEED,
    Origin,
    Settings,
    draw_as,
    fingerprint,
    read_origin,
    revision_of,
    write_png,
)
from attend_excite.methods import (
    AttendAndExcite,
    AttentionReweighting,
    ComposableDiffusion,
    Method,
    StableDiffusion,
    StructureDiffusion,
)
from attend_excite.methods.noise import check_noise, chooses_noise
from attend_excite.methods.own import find_method
from attend_excite.models import Model, load, load_streams
from attend_excite.models.additions import Addition
from attend_excite.models.catalogue import plain_title
from attend_excite.models.loading import is_usable
from attend_excite.models.model import fitting_batch_size
from attend_excite.pictures import STRENGTH, PictureFile, beginning
from attend_excite.sheets import comparison_sheet, maps_sheet
from attend_excite.subjects import Prompt, Subject, parse, unmarked
from attend_excite.trace import Trace
from attend_excite.verdict import NOBODY_CAN_TELL, Verdict, best, can_judge, verdicts

_DEFAULTS: dict[str, Any] = {
    "model": "stickers",
    "method": AttendAndExcite(),
    "subjects": None,
    "steps": None,
    "scheduler": None,
    "guidance_scale": None,
    "negative_prompt": "",
    "height": None,
    "width": None,
    "dtype": None,
    "device": None,
    "revision": None,
    "image": None,
    "strength": None,
    "mask": None,
    "loras": (),
    "embeddings": (),
    "vae": None,
    "syntax": "plain",
    "best_of": 1,
}
_BATCH_SIZE = 8

MAX_PICTURES = 10**6
"""Of one command: more is a slip of the keyboard."""


@dataclass(frozen=True)
class Request:
    """The command line of `generate`, as typed. None: the default, or what `source` was made with."""

    out: Path
    prompt: str | None = None
    subjects: list[str] | None = None
    syntax: str | None = None
    model: str | None = None
    seed_count: int | None = None
    seeds: list[int] | None = None
    best: int | None = None
    best_of: int | None = None
    method: str | None = None
    weights: list[float] | None = None
    phrases: list[str] | None = None
    recipe: str | None = None
    steps: int | None = None
    scheduler: str | None = None
    guidance: float | None = None
    size: str | None = None
    negative: str | None = None
    image: Path | None = None
    strength: float | None = None
    mask: Path | None = None
    loras: list[str] | None = None
    embeddings: list[Path] | None = None
    vae: Path | None = None
    compare: bool = False
    maps: bool = False
    device: str | None = None
    dtype: str | None = None
    batch_size: str | None = None
    compile: bool = False
    source: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What a request comes to: every run draws every batch.

    Attributes:
        prompt: parsed, with the subjects where a method or the maps need them.
        model: loaded.
        runs: the settings of each method, the plain model's first.
        batches: the seeds of each pass.
        wanted: the seeds whose pictures are wanted.
        maps: whether the attention is kept.
    """

    prompt: Prompt
    model: Model
    runs: Sequence[Settings]
    batches: Sequence[tuple[int, ...]]
    wanted: set[int]
    maps: bool


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn and written.

    Attributes:
        image: the picture.
        origin: where it comes from.
        path: its file.
        maps_path: the file of its maps, where they were asked for.
        trace: what happened on its way.
        nsfw: whether the model's safety checker blacked it out.
        seconds: its share of its batch's time, decoding excluded.
        verdict: which of the subjects are in it.
    """

    image: Image.Image = field(repr=False)
    origin: Origin
    path: Path
    maps_path: Path | None
    trace: Trace
    nsfw: bool
    seconds: float
    verdict: Verdict


@dataclass(frozen=True)
class Drawing:
    """All that one command made.

    Attributes:
        prompt: parsed, with the subjects.
        model: the model's name.
        pictures: in the order in which they were drawn.
        sheet: the file of the comparison, where it was asked for.
    """

    prompt: Prompt
    model: str
    pictures: Sequence[Picture]
    sheet: Path | None


def draw(request: Request, finished: list[Path] | None = None) -> Drawing:
    """Make and write the pictures; those of a finished batch are kept whatever comes.

    Args:
        request: what is to be drawn.
        finished: gets the file of each picture as soon as it is written.

    Raises:
        ValueError: the request makes no sense.
        OSError: a picture cannot be written.
    """
    plan = prepare(request)
    pictures: list[Picture] = []
    made = generations(plan)
    if request.best is not None:
        made = list(made)
        plan = replace(plan, wanted={_best_seed(plan, made)})
    for settings, batch, result in made:
        for picture in _written(request, plan.prompt, settings, batch, plan.wanted, result):
            pictures.append(picture)
            if finished is not None:
                finished.append(picture.path)
    sheet = _write_comparison(request.out, plan.prompt, plan.runs, pictures) if request.compare else None
    return Drawing(plan.prompt, plan.model.name, pictures, sheet)


def prepare(request: Request) -> Plan:
    """Check a request and load its model.

    Raises:
        ValueError: the request makes no sense.
    """
    method = None if request.method is None else find_method(request.method)
    origin = read_origin(request.source, method) if request.source else None
    check_subjects(request.subjects, request.prompt or "")
    seeds, in_one_pass = _seeds(request, origin), _in_one_pass(request)
    chosen = _chosen(request, origin, method)
    methods: list[Method] = [StableDiffusion()] if request.compare else []
    methods.append(chosen["method"])
    if request.compare and type(chosen["method"]) is StableDiffusion:
        raise ValueError("--compare sets a method beside the plain model: choose another --method")
    if request.maps and not chosen["method"].attends_to_prompt:
        raise ValueError(
            f"there are no maps of {chosen['method'].name}: it never attends to the prompt as a whole"
        )
    _make_writable(request.out)

    words = [each.path for each in chosen["embeddings"]]
    streams = load_streams(chosen["model"], revision=chosen["revision"], embeddings=words)
    try:
        prompt = parse(chosen["prompt"], streams, chosen["subjects"], chosen["syntax"])
    except ValueError:
        asks = request.maps or request.best or chosen["best_of"] > 1
        if asks or any(method.uses_subjects for method in methods):
            raise
        prompt = parse(chosen["prompt"], streams, (), chosen["syntax"])
    if request.best and not can_judge(prompt, chosen["model"]):
        raise ValueError(f"--best: {NOBODY_CAN_TELL}")
    with MESSAGES.status(plain(f"loading {chosen['model']}")):
        model = _loaded(chosen)
    runs = [_settings(model, chosen, _with_recipe(method, request.recipe, model)) for method in methods]
    for settings in runs:
        check_noise(model, settings.method, settings.best_of)
    _warn_of_size(model, runs[0])
    fingerprint(*runs)  # What cannot be written down shows before anything is drawn.
    if request.compile:
        model.compile()
    if origin is not None and seeds == [origin.seed] and request.batch_size is None:
        batches = [origin.batch]
    else:
        size = in_one_pass or _fitting(model, runs[0])
        batches = [tuple(seeds[start : start + size]) for start in range(0, len(seeds), size)]
    return Plan(prompt, model, runs, batches, set(seeds), request.maps)


def generations(plan: Plan) -> Iterator[tuple[Settings, tuple[int, ...], Generation]]:
    """Draw, with a bar: (settings, seeds, what came of them), batch by batch, and of a batch run by run."""
    runs, batches = plan.runs, plan.batches
    passes, pictures = len(batches) * len(runs), len(plan.wanted) * len(runs)
    chooses = chooses_noise(plan.model, runs[-1].method, runs[-1].best_of)
    with _progress(passes, pictures, runs[-1].steps, chooses=chooses) as advance:
        for batch in batches:
            for settings in runs:
                result = draw_as(plan.model, settings, batch, maps=plan.maps, callback=advance)
                yield settings, batch, result


def _best_seed(plan: Plan, made: Iterable[tuple[Settings, tuple[int, ...], Generation]]) -> int:
    """The seed with the most subjects as asked in what the last of the runs drew, the lowest of equals."""
    seen = {
        seed: verdict
        for settings, batch, result in made
        if settings is plan.runs[-1]
        for seed, verdict in zip(batch, verdicts(result.images, plan.prompt, plan.model.name), strict=True)
    }
    return list(seen)[best(list(seen.values()), plan.prompt)]


def _warn_of_size(model: Model, settings: Settings) -> None:
    """Say before anything is drawn that a size is far from the model's: twice each side, or half."""
    height, width = model.default_size
    times = settings.height * settings.width / (height * width)
    if 0.25 < times < 4:
        return
    size = f"{settings.width}x{settings.height}"
    # Convolutions grow with the pixels, self-attention with their square.
    costs = f"a step takes {times:.0f} times as long or more, and " if times > 1 else ""
    warn(
        f"'{model.name}' was made for {width}x{height} pixels, and {size} is far from that: {costs}what it "
        "draws may be no picture; leave --size out for its own"
    )


def _seeds(request: Request, origin: Origin | None) -> list[int]:
    """The seeds whose pictures are wanted, or among which the best is."""
    if request.best is not None:
        if request.seeds or request.seed_count is not None:
            raise ValueError("--best N draws the seeds 0 to N-1 and keeps one: leave out --seeds and --seed")
        if not 1 <= request.best <= MAX_PICTURES:
            raise ValueError(f"--best is {request.best}: it must be 1 to {MAX_PICTURES}")
        return list(range(request.best))
    if request.seeds and request.seed_count is not None:
        raise ValueError("give --seeds N for the seeds 0 to N-1, or --seed for one of them, not both")
    if request.seed_count is not None and not 1 <= request.seed_count <= MAX_PICTURES:
        raise ValueError(f"--seeds is {request.seed_count}: it must be 1 to {MAX_PICTURES}")
    if request.seeds:
        seeds = list(dict.fromkeys(request.seeds))
        if not 0 <= min(seeds) <= max(seeds) <= MAX_SEED:
            raise ValueError(f"a seed is out of range: --seed takes 0 to {MAX_SEED}")
        return seeds
    if request.seed_count is None and origin is not None:
        return [origin.seed]
    return list(range(request.seed_count or 1))


def _in_one_pass(request: Request) -> int | None:
    """How many pictures a pass has; None: as many as fit in memory."""
    if request.batch_size is None:
        return _BATCH_SIZE
    if request.batch_size == "auto":
        return None
    if not request.batch_size.isdecimal() or not 1 <= int(request.batch_size) <= MAX_BATCH:
        raise ValueError(f"--batch-size is {request.batch_size}: it must be 1 to {MAX_BATCH}, or auto")
    return int(request.batch_size)


def _fitting(model: Model, settings: Settings) -> int:
    return fitting_batch_size(model, model.latent_size(settings.height, settings.width))


def _chosen(request: Request, origin: Origin | None, method: Method | None) -> dict[str, Any]:
    """The fields of `Settings`: what was typed, else what the source was made with, else the default."""
    recorded = {}
    if origin is not None:
        settings = origin.settings
        recorded = {member.name: getattr(settings, member.name) for member in fields(settings)}
        if request.model is not None:
            recorded["revision"] = None
        if request.model not in (None, settings.model) and isinstance(settings.method, AttendAndExcite):
            # What was good for one model is not for another.
            recorded["method"] = settings.method.on(None)
        if request.prompt not in (None, settings.prompt):
            recorded["subjects"] = None
            if settings.subjects and not request.subjects:
                warn("the prompt is another, so its own nouns are its subjects: name others with --subject")
        elif request.subjects and settings.syntax == "plain":
            recorded["prompt"] = unmarked(settings.prompt)
        if request.device is None and not is_usable(settings.device):
            warn(f"it was drawn on {settings.device}, which is not here: the pixels may differ")
            recorded["device"] = None
        if origin.other_versions:
            warn(f"it was drawn with {', '.join(origin.other_versions)}: the pixels may differ")
        if origin.other_threads is not None and (request.device or recorded["device"]) == "cpu":
            warn(
                f"it was drawn on {_threads(origin.other_threads)}, and here it is on "
                f"{_threads(torch.get_num_threads())}: some pixels may differ by one; "
                f"OMP_NUM_THREADS={origin.other_threads} in front of the command draws it as it was"
            )
    elif request.prompt is None:
        raise ValueError("there is nothing to draw: give a prompt, or a picture with --from")
    if request.device is not None and not is_usable(request.device):
        raise ValueError(f"the device '{request.device}' is not here: leave --device out, or use cpu")
    if request.dtype is not None and request.dtype not in DTYPES:
        raise ValueError(f"unknown dtype '{request.dtype}': choose one of {', '.join(DTYPES)}")
    width, height = (None, None) if request.size is None else _size(request.size)
    typed = {
        "prompt": request.prompt,
        "syntax": request.syntax,
        "subjects": tuple(map(Subject.from_text, request.subjects)) if request.subjects else None,
        "model": request.model,
        "method": method,
        "steps": request.steps,
        "scheduler": request.scheduler,
        "guidance_scale": request.guidance,
        "height": height,
        "width": width,
        "negative_prompt": request.negative,
        "device": request.device,
        "dtype": request.dtype,
        "image": None if request.image is None else PictureFile.at(request.image),
        "strength": request.strength,
        "mask": None if request.mask is None else PictureFile.at(request.mask, "L"),
        "loras": tuple(map(_lora, request.loras)) if request.loras else None,
        "embeddings": tuple(map(Addition.at, request.embeddings)) if request.embeddings else None,
        "vae": None if request.vae is None else Addition.at(request.vae),
        "best_of": request.best_of,
    }
    chosen = _DEFAULTS | recorded | {name: value for name, value in typed.items() if value is not None}
    chosen["method"] = _with_options(chosen["method"], request)
    if chosen["image"] is not None and chosen["strength"] is None:
        chosen["strength"] = STRENGTH
    # What a picture was made from may be gone by now.
    for each, mode in (("image", "RGB"), ("mask", "L")):
        if chosen[each] is not None:
            chosen[each].read(mode)
    for option, additions in (
        ("--lora", chosen["loras"]),
        ("--embedding", chosen["embeddings"]),
        ("--vae", [chosen["vae"]] if chosen["vae"] else []),
    ):
        for addition in additions:
            addition.check(option)
    if request.recipe is not None:
        if not isinstance(chosen["method"], AttendAndExcite):
            raise ValueError(f"--recipe is for attend-excite and its like: {chosen['method'].name} has none")
        # A mistake in it shows before a model is loaded.
        read_recipe(request.recipe, Recipe.named("official"))
    # So does a number out of its range; what is left to the model stands in as something that is in it.
    stand_ins = {
        "steps": 1,
        "guidance_scale": 1.0,
        "height": 1,
        "width": 1,
        "dtype": DTYPES[0],
        "device": "cpu",
    }
    left = {name: value for name, value in stand_ins.items() if chosen[name] is None}
    Settings(**chosen | left)
    return chosen


def _threads(number: int) -> str:
    return f"{number} {'thread' if number == 1 else 'threads'}"


def _with_options(method: Method, request: Request) -> Method:
    """The method with the weights and phrases that were typed for it."""
    if request.weights:
        if isinstance(method, ComposableDiffusion):
            method = replace(method, weights=tuple(request.weights))
        elif isinstance(method, AttentionReweighting) and len(request.weights) == 1:
            method = replace(method, weight=request.weights[0])
        else:
            raise ValueError("--weight is for composable, once a concept, and for reweight, once")
    if request.phrases:
        if not isinstance(method, StructureDiffusion):
            raise ValueError(f"--phrase is for structure: {method.name} has none")
        method = replace(method, phrases=tuple(request.phrases))
    return method


def _lora(text: str) -> Addition:
    """A LoRA of "FILE" or "FILE:0.8"."""
    path, colon, number = text.rpartition(":")
    try:
        weight = float(number) if colon else 1.0
    except ValueError:  # a colon of the path's own
        path, weight = text, 1.0
    return Addition.at(Path(path if colon else text).expanduser(), weight)


def _size(text: str) -> tuple[int, int]:
    """(width, height) of "512" or "768x512"."""
    sides = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text.strip().lower())
    if not sides:
        raise ValueError(f"the size '{text}' is not understood: write it like 512 or 768x512, width first")
    return int(sides[1]), int(sides[2] or sides[1])


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"the folder '{folder}' cannot be written to: {error.strerror}") from error


def _loaded(chosen: dict[str, Any]) -> Model:
    return load(
        chosen["model"],
        device=chosen["device"],
        dtype=chosen["dtype"],
        revision=chosen["revision"],
        loras=chosen["loras"],
        embeddings=[each.path for each in chosen["embeddings"]],
        vae=chosen["vae"] and chosen["vae"].path,
    )


def _with_recipe(method: Method, name: str | None, model: Model) -> Method:
    """Attend-and-Excite with its numbers in full, whatever the model or a later version recommends."""
    if not isinstance(method, AttendAndExcite):
        return method
    if name is not None:
        return method.on(read_recipe(name, model.recipe))
    return replace(method, recipe=method.recipe_for(model.recipe))


def _settings(model: Model, chosen: dict[str, Any], method: Method) -> Settings:
    """What was left to the model, filled in."""
    height, width = _default_size(model, chosen)
    return Settings(
        **chosen
        | {
            "method": method,
            "steps": chosen["steps"] or model.steps,
            "guidance_scale": model.family.defaults.guidance_scale
            if chosen["guidance_scale"] is None
            else chosen["guidance_scale"],
            "height": chosen["height"] or height,
            "width": chosen["width"] or width,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "revision": revision_of(model),
        }
    )


def _default_size(model: Model, chosen: dict[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels where nobody gives one: of the picture that is begun from, or the model's."""
    if chosen["image"] is None:
        return model.default_size
    mask = chosen["mask"] and chosen["mask"].read("L")
    begin = beginning(
        chosen["image"].read(),
        chosen["strength"],
        mask,
        height=chosen["height"],
        width=chosen["width"],
        multiple=model.family.size_factor,
    )
    assert begin is not None
    return begin.size


@contextmanager
def _progress(passes: int, pictures: int, steps: int, *, chooses: bool) -> Iterator[Any]:
    """A bar of all steps; gives the callback that advances it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed}} of {{task.total}} steps for {pictures} pictures"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=MESSAGES, transient=True, disable=not MESSAGES.is_terminal) as bar:
        # A scheduler may make more of them.
        task = bar.add_task("choosing the noise" if chooses else "drawing", total=passes * steps)

        def advance(event: StepEvent) -> None:
            ended = event.index == event.iterations - 1
            doing = "choosing the noise" if chooses and ended else "drawing"
            bar.update(task, description=doing, total=passes * event.iterations, advance=1)

        yield advance


def _written(
    request: Request,
    prompt: Prompt,
    settings: Settings,
    batch: tuple[int, ...],
    wanted: set[int],
    result: Generation,
) -> Iterator[Picture]:
    seen = verdicts(result.images, prompt, settings.model)
    for index, seed in enumerate(batch):
        if seed not in wanted:
            continue
        image, trace = result.images[index], result.trace[index]
        stem = f"{slug(prompt.text)}_seed{seed}_{slug(settings.method.name)}_{fingerprint(settings)}"
        origin = Origin(settings, seed, batch)
        path, maps_path = request.out / f"{stem}.png", None
        write_png(path, image, origin)
        if request.maps:
            maps_path = request.out / f"{stem}_maps.png"
            maps = [result.maps.of_tokens(group.positions) for group in prompt.groups]
            heats = [words.heat_map(index) for words in maps]
            subtitle = f"{method_label(settings)} · seed {seed} · {settings_label(settings)}"
            write_png(maps_path, maps_sheet(prompt, subtitle, {"": (image, heats)}))
        seconds = trace.seconds / len(batch)
        yield Picture(image, origin, path, maps_path, trace, result.nsfw[index], seconds, seen[index])


def _write_comparison(
    folder: Path, prompt: Prompt, runs: Sequence[Settings], pictures: Sequence[Picture]
) -> Path:
    rows = {method_label(run): [p.image for p in pictures if p.origin.settings is run] for run in runs}
    seeds = [picture.origin.seed for picture in pictures if picture.origin.settings is runs[0]]
    path = folder / f"{slug(prompt.text)}_compare_{fingerprint(*runs, seeds)}.png"
    write_png(path, comparison_sheet(prompt, settings_label(runs[-1]), rows, seeds))
    return path


def method_label(settings: Settings) -> str:
    """A method for people. Only Stable Diffusion's own pictures are called that."""
    if type(settings.method) is StableDiffusion:
        return plain_title(settings.model)
    return settings.method.title


def settings_label(settings: Settings) -> str:
    scheduler = f" of {settings.scheduler}" if settings.scheduler else ""
    begun = "".join(f" · {Path(lora.path).stem} {lora.weight:g}" for lora in settings.loras)
    if settings.image is not None:
        begun += f" · from {Path(settings.image.path).name}, strength {settings.strength:g}"
    return (
        f"{Path(settings.model).name} · {settings.width}x{settings.height} pixels · "
        f"{settings.steps} steps{scheduler} · guidance {settings.guidance_scale:g}{begun}"
    )


def slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-")[:50].strip("-") or "picture"
