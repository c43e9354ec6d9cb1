"""What made a picture, kept in its PNG, so that the picture can be made again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from attend_excite import infotext
from attend_excite.checks import require
from attend_excite.files import written_whole
from attend_excite.generate import Generation
from attend_excite.methods import METHODS, Method
from attend_excite.methods.noise import MAX_NOISES
from attend_excite.models import Model
from attend_excite.models.additions import Addition
from attend_excite.pictures import PictureFile
from attend_excite.schedulers import check_scheduler
from attend_excite.subjects import Subject, Syntax, checked_syntax

KEY = "attend-excite"
"""The keyword of the PNG's text chunk."""

FORMAT = 1
"""The version of what stands in it."""

DTYPES = ("float32", "float16", "bfloat16")
MAX_SEED = 2**63 - 1
MAX_BATCH = 256
MAX_GUIDANCE = 1e4
MAX_STEPS = 1000

# Metadata comes from anywhere: beyond these a picture would only fill memory.
_MAX_SIDE = 8192
_MAX_THREADS = 4096
_MAX_TEXT = 2**17
"""Characters."""

# And a picture makes nobody run code that it names.
_SOMEBODYS_OWN = "{} is somebody's own, {}: name what drew it with --method"


@dataclass(frozen=True)
class Settings:
    """Everything that a picture depends on besides its seed.

    Attributes:
        model: the name, folder or Hub id for `load`.
        prompt: as it was typed, brackets included.
        method: with its own options; Attend-and-Excite's recipe is there in full.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        height: in pixels.
        width: in pixels.
        dtype: of the weights, one of `DTYPES`.
        device: where it was drawn.
        subjects: as they were given; None: the prompt's brackets or nouns.
        negative_prompt: what the unconditional half of the guidance sees.
        revision: the commit of a model from the Hub.
        scheduler: by its short name; None: the model's own.
        image: the picture that it begins from; None: noise alone.
        strength: how much of that is made anew; None where there is none.
        mask: where it is drawn; None: everywhere.
        loras: that were added to the model's weights.
        embeddings: the words that it was taught.
        vae: the autoencoder that it was given; None: its own.
        syntax: how the prompts are written, one of `SYNTAXES`.
        best_of: noises that were tried for each seed.

    Raises:
        ValueError: a number is out of its range.
    """

    model: str
    prompt: str
    method: Method
    steps: int
    guidance_scale: float
    height: int
    width: int
    dtype: str
    device: str
    subjects: tuple[Subject, ...] | None = None
    negative_prompt: str = ""
    revision: str | None = None
    scheduler: str | None = None
    image: PictureFile | None = None
    strength: float | None = None
    mask: PictureFile | None = None
    loras: tuple[Addition, ...] = ()
    embeddings: tuple[Addition, ...] = ()
    vae: Addition | None = None
    syntax: Syntax = "plain"
    best_of: int = 1

    def __post_init__(self) -> None:
        require(1 <= self.steps <= MAX_STEPS, "steps", self.steps, f"1 to {MAX_STEPS}")
        fine = 0 <= self.guidance_scale <= MAX_GUIDANCE
        require(fine, "the guidance", self.guidance_scale, f"0 to {MAX_GUIDANCE:g}")
        for what, pixels in (("the height", self.height), ("the width", self.width)):
            require(1 <= pixels <= _MAX_SIDE, what, pixels, f"1 to {_MAX_SIDE} pixels")
        require(self.dtype in DTYPES, "the dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        require(1 <= self.best_of <= MAX_NOISES, "best_of", self.best_of, f"1 to {MAX_NOISES}")
        check_scheduler(self.scheduler)
        checked_syntax(self.syntax)
        if self.strength is not None:
            require(0 < self.strength <= 1, "the strength", self.strength, "above 0, 1 at most")
        if self.image is None and (self.strength is not None or self.mask is not None):
            raise ValueError("a strength or a mask is for a picture to begin from: give one with --image")


def draw_as(model: Model, settings: Settings, seeds: Sequence[int], **options: Any) -> Generation:
    """Draw seeds in one pass as settings say, with other options for `generate`: maps, callback."""
    return model.generate(
        settings.prompt,
        method=settings.method,
        subjects=settings.subjects,
        syntax=settings.syntax,
        seeds=seeds,
        steps=settings.steps,
        scheduler=settings.scheduler,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
        height=settings.height,
        width=settings.width,
        image=settings.image and settings.image.read(),
        strength=settings.strength,
        mask=settings.mask and settings.mask.read("L"),
        best_of=settings.best_of,
        batch_size=len(seeds),
        progress=False,
        **options,
    )


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("attend-excite", "torch", "diffusers")}


@dataclass(frozen=True)
class Origin:
    """Where one picture comes from.

    Attributes:
        settings: what it shares with the other pictures of its run.
        seed: its own.
        batch: the seeds drawn in one pass with it, its own among them. They shift it by a rounding
            error, so the very same pixels need the very same batch.
        versions: of the packages that drew it.
        threads: of the CPU that it was drawn with: sums are split among them, and so rounded in another
            way with another number. None: it isn't known.

    Raises:
        ValueError: a seed is out of range or not in its batch.
    """

    settings: Settings
    seed: int
    batch: tuple[int, ...]
    versions: dict[str, str] = field(default_factory=_versions)
    threads: int | None = None

    def __post_init__(self) -> None:
        require(len(self.batch) <= MAX_BATCH, "the batch", len(self.batch), f"at most {MAX_BATCH}")
        for seed in self.batch:
            require(0 <= seed <= MAX_SEED, "a seed", seed, f"0 to {MAX_SEED}")
        require(self.seed in self.batch, "the seed", self.seed, "in its batch")
        if self.threads is not None:
            require(1 <= self.threads <= _MAX_THREADS, "threads", self.threads, f"1 to {_MAX_THREADS}")

    @property
    def other_threads(self) -> int | None:
        """The number of threads that it was drawn with, where that isn't the number here and may show."""
        same = self.settings.device != "cpu" or self.threads in (None, torch.get_num_threads())
        return None if same else self.threads

    @property
    def other_versions(self) -> list[str]:
        """The packages that drew it and have another version here, as "torch 2.6.0"."""
        here = _versions()
        return [f"{name} {made}" for name, made in self.versions.items() if here.get(name) != made]


def write_png(path: Path, picture: Image.Image, origin: Origin | None = None) -> None:
    """Save a picture that was drawn just now with where it comes from: whole, or not at all."""
    chunks = PngInfo()
    if origin is not None:
        origin = replace(origin, threads=origin.threads or torch.get_num_threads())
        # What others read comes first: some stop at the first text.
        chunks.add_text(infotext.KEY, infotext.infotext(origin))
        chunks.add_itxt(KEY, json.dumps({"format": FORMAT} | as_plain_data(origin), ensure_ascii=False))
    with written_whole(path) as partial:
        picture.save(partial, pnginfo=chunks)


def read_origin(path: Path, method: Method | None = None) -> Origin:
    """Where the picture in a PNG comes from. Nothing in the file is trusted.

    Args:
        path: of the PNG.
        method: in place of the one that the file names, which is then not read.

    Raises:
        ValueError: it is no PNG, carries no settings, or ones that make no sense.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            text = picture.info.get(KEY)
    except FileNotFoundError:
        raise ValueError(f"there is no picture '{path}'") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"'{path}' is not a PNG picture that can be read") from error
    if not isinstance(text, str):
        raise ValueError(
            f"'{path}' does not say how it was made: attend-excite did not write it, or as a sheet "
            "of pictures, or a program has saved it since"
        )
    try:
        require(len(text) <= _MAX_TEXT, "its length", len(text), f"at most {_MAX_TEXT} characters")
        values = json.loads(text)
        made_as = values.pop("format", None) if isinstance(values, dict) else None
        require(made_as == FORMAT, "the format", made_as, f"{FORMAT} for this version of attend-excite")
        if method is None:
            return _decode(Origin, values, "the whole")
        if isinstance(values.get("settings"), dict):
            values["settings"]["method"] = as_plain_data(METHODS["stable-diffusion"]())
        origin = _decode(Origin, values, "the whole")
        return replace(origin, settings=replace(origin.settings, method=method))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"what '{path}' says of how it was made cannot be used: {error}") from error


def fingerprint(*values: Any) -> str:
    """A short name for settings, another for every other."""
    text = json.dumps([as_plain_data(value) for value in values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def revision_of(model: Model) -> str | None:
    """The commit of a model from the Hub, which gives its name to the folder in the Hub's cache."""
    folder = str(model.network.config.get("_name_or_path", ""))
    commit = re.search(r"snapshots[/\\]([0-9a-f]{40})\b", folder)
    return commit[1] if commit else None


def digest_of(folder: Path, files: Iterable[Path]) -> str:
    """16 hex digits of the names and the contents of some of a folder's files, in any order."""
    digest = hashlib.sha256()
    # One name on every system.
    names = {path.relative_to(folder).as_posix(): path for path in files}
    for name, path in sorted(names.items()):
        with path.open("rb") as file:
            digest.update(name.encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def as_plain_data(value: Any) -> Any:
    """Plain data for JSON; a method is told by its name, or by where it lies, as is a function.

    Raises:
        ValueError: it cannot be told from others of its kind, as a lambda or a closure.
    """
    if isinstance(value, tuple | list):
        return [as_plain_data(item) for item in value]
    if isinstance(value, partial):
        given = {key: as_plain_data(item) for key, item in value.keywords.items()}
        return {"name": as_plain_data(value.func), "args": as_plain_data(value.args), "keywords": given}
    if isinstance(value, FunctionType) and "<" not in value.__qualname__:
        return _place(value)
    if not is_dataclass(value):
        if hasattr(value, "attach") and not vars(value):
            return {"name": _place(type(value))}
        if not isinstance(value, str | int | float | bool | dict | None):
            raise ValueError(
                f"{_shortened(value)} cannot be written down so that no other is taken for it: make it a "
                "function with a name in its module, or a frozen dataclass of numbers and texts"
            )
        return value
    name = {"name": getattr(value, "name", None)} if type(value) in METHODS.values() else {}
    if not name and (callable(value) or hasattr(value, "attach")):
        name = {"name": _place(type(value))}
    told = [member.name for member in fields(value) if member.compare]
    return name | {member: as_plain_data(getattr(value, member)) for member in told}


def _place(named: Any) -> str:
    return f"{named.__module__}:{named.__qualname__}"


def _decode(kind: Any, value: Any, where: str) -> Any:
    """The inverse of `as_plain_data`: a value of the annotated type, or a ValueError that says where not."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _decode_first(arguments, value, where)
    if origin is Literal and value in arguments:
        return value
    if origin in (tuple, Sequence) and isinstance(value, list):
        any_length = origin is Sequence or arguments[-1] is ...
        kinds = arguments[:1] * len(value) if any_length else arguments
        if len(kinds) == len(value):
            return tuple(_decode(*pair, where) for pair in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}, {key}") for key, item in value.items()}
    if kind is Method and isinstance(value, dict):
        name = value.get("name")
        if isinstance(name, str) and name in METHODS:
            options = {key: item for key, item in value.items() if key != "name"}
            return _decode_dataclass(getattr(METHODS[name], "func", METHODS[name]), options, where)
        if isinstance(name, str) and ":" in name:
            raise ValueError(_SOMEBODYS_OWN.format(where, _shortened(name)))
    if origin is Callable and isinstance(value, str | dict):
        own = value if isinstance(value, str) else value.get("name")
        raise ValueError(_SOMEBODYS_OWN.format(where, _shortened(own)))
    if is_dataclass(kind) and isinstance(value, dict):
        return _decode_dataclass(kind, value, where)
    # Written so that NaN is out, and so are integers too large for a float.
    if kind is float and isinstance(value, int | float) and -1e300 < value < 1e300:
        return float(value)
    if kind in (str, int, bool, NoneType) and type(value) is kind:
        return value
    raise ValueError(f"{where} is {_shortened(value)}")


def _decode_first(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    errors: list[ValueError] = []
    for kind in kinds:
        try:
            return _decode(kind, value, where)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _decode_dataclass(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    kinds = get_type_hints(kind)
    names = {member.name for member in fields(kind)}
    if unknown := sorted(values.keys() - names):
        raise ValueError(f"{where} has an unknown {_shortened(unknown[0])}")
    decoded = {name: _decode(kinds[name], value, name) for name, value in values.items()}
    try:
        return kind(**decoded)
    except TypeError:  # The types are right, so it is a value that is missing.
        raise ValueError(f"{where} is not complete") from None


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
