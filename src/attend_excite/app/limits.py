"""What one visitor may ask of the server: enforced here, whatever the browser or a client sends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from attend_excite.guidance.schedule import Recipe
from attend_excite.metadata import Settings
from attend_excite.methods import AttendAndExcite, ComposableDiffusion, Method, StructureDiffusion
from attend_excite.methods.composable import concepts
from attend_excite.methods.noise import check_noise
from attend_excite.models import Model
from attend_excite.subjects import Subject

MAX_PROMPT = 500
"""Characters."""

MAX_PICTURES = 8
"""Seeds of one run."""

MAX_STEPS = 100
MAX_GUIDANCE = 30.0

MAX_PIXELS = 2.0
"""Of a picture, as a multiple of the pixels that the model was trained on."""

MIN_SIDE = 64
"""In pixels."""

MAX_SEED = 2**53 - 1
"""The last whole number that a browser counts to exactly."""

MAX_REFINEMENTS = 50
MAX_NOISES = 8
"""Tried for each picture."""

MAX_SEARCH = 200
"""Passes of a recipe's search for the noise."""

MAX_PARTS = 8
"""Thresholds of a recipe and terms of its loss, attributes of a subject, concepts of Composable Diffusion,
phrases of StructureDiffusion."""

MAX_SUBJECTS = 16
"""Whose maps are kept for a closer look."""

MAX_UPLOAD = 20 * 2**20
"""Bytes of an uploaded picture."""

MAX_UPLOADED_PIXELS = 32_000_000
"""Of it, however few bytes they take."""

MAX_WAITING = 20
"""Runs that wait for the model."""

MAX_WAITING_EACH = 5
"""Of them, from one address."""

MAX_BODY = 2 * 2**20
"""Bytes of any other request."""

MAX_NAME = 200
"""Characters of a model's, a method's or a recipe's name."""

MAX_QUERY = 100_000
"""Characters of the part of a link that fills the form in."""

MAX_TICKET = 20
"""Digits of the number of a run."""

MAX_SESSION = 64
"""Characters of the name that a browser gives its session."""

LOGINS, UPLOADS = 10, 30
"""From one address in a minute."""

SILENCE = 10.0
"""Seconds that a run goes on while nobody listens to it."""

KEPT_RUNS = 100
"""Runs whose files the server keeps."""

SENTENCES = (
    f"Prompts of up to {MAX_PROMPT} characters and {MAX_SUBJECTS} subjects, {MAX_PICTURES} pictures a run, "
    f"{MAX_STEPS} steps, {MAX_NOISES} noises a picture or a search of {MAX_SEARCH} passes, guidance of up to "
    f"{MAX_GUIDANCE:g}, {MAX_REFINEMENTS} refinements a threshold, "
    f"{MAX_PARTS} thresholds, terms, attributes, concepts or phrases, sides from {MIN_SIDE} pixels on and "
    f"pictures of up to {MAX_PIXELS:g} times the model's own pixels, "
    f"uploads of up to {MAX_UPLOAD // 2**20} MB and {MAX_UPLOADED_PIXELS // 10**6} million pixels, "
    f"{MAX_WAITING} waiting runs, {MAX_WAITING_EACH} from one "
    "address. The server keeps the files of its "
    f"latest {KEPT_RUNS} runs, and loads only the models that it was started with."
)
"""The limits for people."""


def check(settings: Settings, seeds: tuple[int, ...], model: Model) -> None:
    """Refuse a run that asks for too much.

    Raises:
        ValueError: it does, and this says of what.
    """
    check_prompt(settings.prompt)
    check_prompt(settings.negative_prompt, "the negative prompt")
    check_subjects(settings.subjects or ())
    check_numbers(settings.steps, settings.guidance_scale, seeds)
    check_noises(settings.best_of)
    check_noise(model, settings.method, settings.best_of)
    height, width = model.default_size
    most = int(MAX_PIXELS * height * width)
    for what, side in (("the height", settings.height), ("the width", settings.width)):
        _require(side >= MIN_SIDE, what, side, f"at least {MIN_SIDE} pixels")
    size = f"{settings.width}x{settings.height}"
    pixels = settings.width * settings.height
    _require(pixels <= most, "the size", size, f"at most {most} pixels in all for {model.name}")
    _check_method(settings.method, settings.prompt)


def check_prompt(text: str, what: str = "the prompt") -> None:
    """Refuse a text that is too long to be looked at, or that no tokenizer reads.

    Raises:
        ValueError: it is.
    """
    if len(text) > MAX_PROMPT:
        raise ValueError(f"{what} has {len(text)} characters: at most {MAX_PROMPT} are read here")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{what} has half a character, which is none: leave it out")


def check_subjects(subjects: Sequence[Subject]) -> None:
    """Refuse too many subjects, or ones that are too long to be looked for.

    Raises:
        ValueError: so it is.
    """
    number = len(subjects)
    _require(number <= MAX_SUBJECTS, "the number of subjects", number, f"at most {MAX_SUBJECTS}")
    for subject in subjects:
        check_prompt(subject.text, "a subject")
        _check_parts("attributes", subject.attributes or ())
        for attribute in subject.attributes or ():
            check_prompt(attribute, "an attribute")


def check_picture(path: str | Path) -> None:
    """Refuse a picture that is too large to be decoded; what can't be read is left to what reads it.

    Raises:
        ValueError: it is.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, ValueError):
        return
    except Image.DecompressionBombError:  # beyond what Pillow opens
        width = height = 2**16
    fine = width * height <= MAX_UPLOADED_PIXELS
    _require(fine, "the picture", "too large", f"at most {MAX_UPLOADED_PIXELS // 10**6} million pixels")


def check_additions(settings: Settings) -> None:
    """Refuse settings of a picture that was drawn with more than its model, which is all that is served.

    Raises:
        ValueError: it was.
    """
    added = {
        "LoRAs": settings.loras,
        "words of textual inversion": settings.embeddings,
        "another autoencoder": settings.vae,
    }
    if named := " and ".join(what for what, there in added.items() if there):
        raise ValueError(
            f"it was drawn with {named}, which the page does without: attend-excite generate --from draws it "
            "again"
        )


def check_numbers(steps: int | None, guidance: float | None, seeds: Sequence[int]) -> None:
    """Refuse too many steps or pictures, or none, a guidance or seed out of range; None: the model's.

    Raises:
        ValueError: so it is.
    """
    _require(1 <= len(seeds) <= MAX_PICTURES, "the number of pictures", len(seeds), f"1 to {MAX_PICTURES}")
    for seed in seeds:
        _require(0 <= seed <= MAX_SEED, "a seed", seed, f"0 to {MAX_SEED}")
    _require(steps is None or 1 <= steps <= MAX_STEPS, "steps", steps, f"1 to {MAX_STEPS}")
    fine = guidance is None or 0 <= guidance <= MAX_GUIDANCE
    _require(fine, "the guidance", guidance, f"0 to {MAX_GUIDANCE:g}")


def check_count(pictures: int) -> None:
    """Refuse too many pictures, or none.

    Raises:
        ValueError: so it is.
    """
    _require(1 <= pictures <= MAX_PICTURES, "the number of pictures", pictures, f"1 to {MAX_PICTURES}")


def check_refinements(number: int) -> None:
    """Refuse too many refinements at a threshold.

    Raises:
        ValueError: so it is.
    """
    _require(number <= MAX_REFINEMENTS, "refinements", number, f"at most {MAX_REFINEMENTS}")


def check_noises(number: int) -> None:
    """Refuse too many noises for a picture, or none.

    Raises:
        ValueError: so it is.
    """
    _require(1 <= number <= MAX_NOISES, "the number of noises", number, f"1 to {MAX_NOISES}")


def check_name(name: str) -> None:
    """Refuse a name that is too long to be one.

    Raises:
        ValueError: it is.
    """
    if len(name) > MAX_NAME:
        raise ValueError(f"a name has {len(name)} characters: at most {MAX_NAME} are read here")


def _check_method(method: Method, prompt: str) -> None:
    if isinstance(method, AttendAndExcite):
        if isinstance(method.recipe, Recipe):
            check_refinements(method.recipe.max_refinements)
            _check_parts("thresholds", method.recipe.thresholds)
            _check_parts("terms", method.recipe.terms)
            if (search := method.recipe.search) is not None:
                most = search.most_passes
                _require(most <= MAX_SEARCH, "the passes of the search", most, f"at most {MAX_SEARCH}")
                _check_parts("terms of the search", search.terms)
        _check_method(method.base, prompt)
    if isinstance(method, ComposableDiffusion):
        _check_parts("concepts", concepts(prompt))
    if isinstance(method, StructureDiffusion) and method.phrases is not None:
        _check_parts("phrases", method.phrases)


def _check_parts(what: str, parts: Sequence[object]) -> None:
    number = len(parts)
    _require(number <= MAX_PARTS, f"the number of {what}", number, f"at most {MAX_PARTS}")


def _require(fine: bool, what: str, value: object, wanted: str) -> None:
    if not fine:
        raise ValueError(f"{what} is {str(value)[:40]}: it must be {wanted}")
