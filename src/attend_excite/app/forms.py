"""What a visitor asks for, and the link that says it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_type_hints
from urllib.parse import parse_qs, urlencode

from pydantic import TypeAdapter, ValidationError

from attend_excite.app import limits
from attend_excite.guidance.recipes import recipe_names
from attend_excite.guidance.schedule import Recipe
from attend_excite.metadata import Settings, revision_of
from attend_excite.methods import AttendAndExcite, Method, method_named
from attend_excite.models import Model
from attend_excite.pictures import STRENGTH, PictureFile
from attend_excite.subjects import Subject

RECOMMENDED = "recommended"
"""The recipe that the model recommends."""

KNOBS = ("step_size", "altered", "max_refinements", "sigma")
"""The numbers of a recipe that the form has."""


@dataclass(frozen=True)
class Form:
    """The page as it is filled in. None: as the recipe or the model has it.

    Attributes:
        prompt: what to draw.
        subjects: the chosen words; None: those in brackets, or the nouns.
        model: one of those that the server was started with; "": its first.
        method: a method's name.
        recipe: "recommended", or one of `recipe_names`.
        step_size: the recipe's.
        altered: likewise.
        max_refinements: likewise.
        sigma: likewise.
        pictures: how many are drawn.
        best: keep only the one that shows most.
        best_of: noises that are tried for each picture.
        seed: of the first picture; the others count on from it.
        steps: denoising steps; None: as is usual for the model.
        guidance: of classifier-free guidance; None: likewise.
        negative: the negative prompt.
        scheduler: by its short name; "": the model's own.
        width: in pixels.
        height: likewise.
        image: the path of a picture to begin from, which no link carries.
        strength: how much of that is made anew.
        mask: the path of a picture that is white where is drawn.

    Raises:
        ValueError: something is out of range, or too long to be read.
    """

    prompt: str = "a cat and a frog"
    subjects: tuple[Subject, ...] | None = None
    model: str = ""
    method: str = "attend-excite"
    recipe: str = RECOMMENDED
    step_size: float | None = None
    altered: float | None = None
    max_refinements: int | None = None
    sigma: float | None = None
    pictures: int = 1
    best: bool = False
    best_of: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative: str = ""
    scheduler: str = ""
    width: int | None = None
    height: int | None = None
    image: str | None = None
    strength: float = STRENGTH
    mask: str | None = None

    def __post_init__(self) -> None:
        limits.check_count(self.pictures)
        limits.check_prompt(self.prompt)
        limits.check_prompt(self.negative, "the negative prompt")
        for name in (self.model, self.method, self.recipe, self.scheduler):
            limits.check_name(name)
        limits.check_subjects(self.subjects or ())
        limits.check_numbers(self.steps, self.guidance, self.seeds)
        limits.check_refinements(self.max_refinements or 0)
        limits.check_noises(self.best_of)

    @property
    def seeds(self) -> tuple[int, ...]:
        """One a picture."""
        return tuple(range(self.seed, self.seed + self.pictures))

    def to_query(self) -> str:
        """The query part of the link that fills the page in like this."""
        default = Form()
        values: dict[str, Any] = {"prompt": self.prompt} | {
            name: int(value) if isinstance(value := getattr(self, name), bool) else value
            for name in _NUMBERS | _TEXTS
            if getattr(self, name) not in (None, getattr(default, name))
        }
        if self.subjects is not None:
            # An empty one says that no word is chosen; without any the nouns would be.
            values["subject"] = [_subject_text(subject) for subject in self.subjects] or [""]
        return urlencode(values, doseq=True)

    @staticmethod
    def from_query(query: str) -> Form:
        """The inverse of `to_query`. Nothing in it is trusted; what it lacks has its default.

        Raises:
            ValueError: a number is none, or a subject cannot be read.
        """
        fields = _fields(query)
        given = {name: [text for text in texts if text] for name, texts in fields.items()}
        values: dict[str, Any] = {name: given[name][-1] for name in _TEXTS if given.get(name)}
        for name, kind in _NUMBERS.items():
            if given.get(name):
                values[name] = _number(name, kind, given[name][-1])
        if "subject" in given:
            values["subjects"] = tuple(map(Subject.from_text, given["subject"]))
        values["best"] = bool(values.get("best"))
        return Form(**values)

    def on(self, model: Model) -> Form:
        """The same with what is usual for a model where it names no number of its own."""
        steps, guidance = self._numbers_on(model)
        return replace(self, steps=steps, guidance=guidance)

    def _numbers_on(self, model: Model) -> tuple[int, float]:
        usual = model.family.defaults.guidance_scale
        return (
            model.steps if self.steps is None else self.steps,
            usual if self.guidance is None else self.guidance,
        )

    def recipe_of(self, model: Model) -> Recipe:
        """The recipe with the numbers that were changed in it.

        Raises:
            ValueError: there is no such recipe, or a number is out of its range.
        """
        knobs = {name: value for name in KNOBS if (value := getattr(self, name)) is not None}
        return Recipe.from_dict({"base": self.recipe, **knobs}, model.recipe)

    def settings(self, model: Model, method: Method | None = None) -> Settings:
        """All that the pictures depend on besides their seeds.

        Args:
            model: the form's.
            method: another one than the form's.

        Raises:
            ValueError: something makes no sense.
        """
        method = method or method_named(self.method)
        if isinstance(method, AttendAndExcite):
            method = method.on(self.recipe_of(model))
        for picture in filter(None, (self.image, self.mask)):
            limits.check_picture(picture)
        height, width = model.default_size
        steps, guidance = self._numbers_on(model)
        return Settings(
            model=model.name,
            prompt=self.prompt,
            method=method,
            steps=steps,
            guidance_scale=guidance,
            height=self.height or height,
            width=self.width or width,
            dtype=str(model.dtype).removeprefix("torch."),
            device=model.device.type,
            subjects=self.subjects,
            negative_prompt=self.negative,
            scheduler=self.scheduler or None,
            best_of=self.best_of,
            revision=revision_of(model),
            image=None if self.image is None else PictureFile.at(self.image),
            strength=None if self.image is None else self.strength,
            mask=None if self.mask is None else PictureFile.at(self.mask, "L"),
        )

    @staticmethod
    def from_settings(settings: Settings, seed: int, model: Model) -> Form:
        """The form that draws what settings say, as far as it can say it.

        Raises:
            ValueError: the recipe isn't one of the form's with other numbers, the prompt is in A1111's
                syntax, or the picture was drawn with more than its model.
        """
        limits.check_additions(settings)
        if settings.syntax != "plain":
            raise ValueError("its prompt is written as A1111 reads it, and the form reads plain text")
        form = Form(
            prompt=settings.prompt,
            subjects=settings.subjects,
            model=settings.model,
            method=settings.method.name,
            seed=seed,
            steps=settings.steps,
            guidance=settings.guidance_scale,
            negative=settings.negative_prompt,
            scheduler=settings.scheduler or "",
            best_of=settings.best_of,
            width=settings.width,
            height=settings.height,
            strength=settings.strength or STRENGTH,
        )
        method, named = settings.method, method_named(settings.method.name)
        if any(subject.attributes is not None for subject in settings.subjects or ()):
            raise ValueError("what is said of its subjects was named, which the form has no place for")
        if not isinstance(method, AttendAndExcite):
            if method != named:
                raise ValueError("its method has options that the form has no place for")
            return form
        if not isinstance(named, AttendAndExcite) or replace(method, recipe=named.recipe) != named:
            raise ValueError("its method has options that the form has no place for")
        wanted = method.recipe
        if not isinstance(wanted, Recipe):
            return replace(form, recipe=wanted or RECOMMENDED)

        def drawn_by(form: Form) -> Recipe:
            drawn = method.on(form.recipe_of(model)).recipe
            assert isinstance(drawn, Recipe)
            return drawn

        for name in (RECOMMENDED, *recipe_names()):
            filled = replace(form, recipe=name)
            recipe = drawn_by(filled)
            knobs = {
                knob: getattr(wanted, knob)
                for knob in KNOBS
                if getattr(wanted, knob) != getattr(recipe, knob)
            }
            changed = replace(filled, **knobs)
            # What a recipe says of itself and of other methods changes no picture.
            if replace(drawn_by(changed), summary="", tuned={}) == replace(wanted, summary="", tuned={}):
                return changed
        raise ValueError("its recipe has numbers that the form has no place for")


def says_something(query: str) -> bool:
    """Whether the query part of a link has anything for the form.

    Raises:
        ValueError: it is too long, or has too many fields.
    """
    return bool(_fields(query).keys() & (_TEXTS | _NUMBERS | {"subject": str}).keys())


def _fields(query: str) -> dict[str, list[str]]:
    if len(query) > limits.MAX_QUERY:
        raise ValueError(f"the link has {len(query)} characters: at most {limits.MAX_QUERY} are read here")
    return parse_qs(query, keep_blank_values=True, max_num_fields=40)


def checked_form(**values: Any) -> Form:
    """A form of values that may be of any type.

    Raises:
        ValueError: one is of another than the form's, or something is out of range.
    """
    kinds = get_type_hints(Form)
    for name, value in values.items():
        try:
            TypeAdapter(kinds[name]).validate_python(value, strict=True)
        except ValidationError:
            kind = getattr(kinds[name], "__name__", str(kinds[name]))
            raise ValueError(
                f"{name} is {repr(value)[:40]}: it must be {_KIND_NAMES.get(kind, kind)}"
            ) from None
    return Form(**values)


_KIND_NAMES = {
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str | None": "an uploaded picture, or nothing",
    "int | None": "a whole number, or nothing",
    "float | None": "a number, or nothing",
}

_TEXTS: dict[str, type] = dict.fromkeys(("prompt", "model", "method", "recipe", "negative", "scheduler"), str)
_NUMBERS: dict[str, type] = {
    "step_size": float,
    "altered": float,
    "max_refinements": int,
    "sigma": float,
    "pictures": int,
    "best": int,
    "best_of": int,
    "seed": int,
    "steps": int,
    "guidance": float,
    "width": int,
    "height": int,
}


def _number(name: str, kind: type, text: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"the link says {name}={text[:40]}: it must be a number") from None


def _subject_text(subject: Subject) -> str:
    """The inverse of `Subject.from_text`."""
    target = "" if subject.target in (None, float(not subject.negated)) else f"={subject.target:g}"
    return f"{'-' if subject.negated else ''}{subject.text}{target}"
