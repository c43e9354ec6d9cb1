"""What is to be drawn: every system on every prompt with every seed, in batches that are always the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from attend_excite.benchmark.names import FULL_METHOD
from attend_excite.benchmark.prompts import BenchmarkPrompt
from attend_excite.benchmark.store import name_of
from attend_excite.guidance.schedule import Recipe, read_recipe
from attend_excite.metadata import MAX_GUIDANCE, MAX_SEED, MAX_STEPS, as_plain_data, digest_of, revision_of
from attend_excite.methods import PAPER_METHODS, AttendAndExcite, Method, StableDiffusion
from attend_excite.methods.noise import MAX_NOISES
from attend_excite.methods.own import code_digest, find_method
from attend_excite.models import Model, source_of
from attend_excite.models.catalogue import SETTINGS_FILE

_WEIGHT_FILES = {".bin", ".json", ".safetensors", ".txt"}


@dataclass(frozen=True)
class System:
    """A row of the tables.

    Attributes:
        name: a method's name, or where one lies, as "my_methods:Faded"; with another recipe also what that
            is: "attend-excite bare", "attend-excite mine.json", "attend-excite step_size=10"; with several
            noises tried for each seed also how many: "stable-diffusion best_of=4".
        method: with Attend-and-Excite's numbers in full.
        recipe: what follows the method in the name; None: what the model recommends, or the method has none.
        code: a digest of the code of a method of one's own.
        best_of: noises that are tried for each seed: see `generate`.
        chosen_by: the recipe that chooses among them, for a method that has none.
    """

    name: str
    method: Method
    recipe: str | None
    code: str | None = None
    best_of: int = 1
    chosen_by: Recipe | None = None

    @property
    def numbers(self) -> dict[str, Any]:
        """All that the method does to an image, as plain data."""
        told = {"name": self.method.name} | as_plain_data(_unsummarised(self.method))
        if isinstance(self.method, AttendAndExcite):
            # What is left as it is goes without saying: so jobs keep their names when there is more to say.
            if self.method.base == StableDiffusion():
                told["base"] = {}
            if self.method.objective is None:
                del told["objective"]
            usual = as_plain_data(Recipe.named("official"))
            for key in ("terms", "choose_at", "search", "method", "title"):
                if told["recipe"][key] == usual[key]:
                    del told["recipe"][key]
        if self.best_of > 1:
            told["best_of"] = self.best_of
        if self.chosen_by is not None:
            told["chosen_by"] = as_plain_data(replace(self.chosen_by, summary=""))
        return told if self.code is None else told | {"code": self.code}


@dataclass(frozen=True)
class Conditions:
    """What all images of a run share.

    Attributes:
        model: the name, folder or Hub id for `load`.
        revision: the commit of a model from the Hub; or a digest of a file, or of a folder's files and of
            which maps are read; None: neither.
        dtype: of the weights.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        height: in pixels.
        width: in pixels.

    Raises:
        ValueError: a number is out of its range.
    """

    model: str
    revision: str | None
    dtype: str
    steps: int
    guidance: float
    height: int
    width: int

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"the steps are {self.steps}: there must be 1 to {MAX_STEPS}")
        if not 0 <= self.guidance <= MAX_GUIDANCE:
            raise ValueError(f"the guidance is {self.guidance}: it must be 0 to {MAX_GUIDANCE:g}")


@dataclass(frozen=True)
class Job:
    """One image to draw.

    Attributes:
        prompt: what of.
        seed: of its noise.
        system: how.
        conditions: what it shares with the others.
    """

    prompt: BenchmarkPrompt
    seed: int
    system: System
    conditions: Conditions

    @cached_property
    def name(self) -> str:
        """16 hex digits from the system's name and all that decides what the image looks like."""
        conditions = asdict(self.conditions)
        # Where the weights are known it doesn't matter under what name they were found.
        model = conditions.pop("model")
        conditions["revision"] = self.conditions.revision or model
        # A system's own name too: where two have the same numbers, each has its rows.
        system = {"system": self.system.name, "method": self.system.numbers}
        return name_of(conditions, system, self.prompt.text, self.prompt.subjects, self.seed)


Batch = tuple[Job, ...]
"""Jobs of one system that are drawn in one pass: each of some prompts with each of some seeds."""


def systems_named(names: Sequence[str], recommended: Recipe) -> list[System]:
    """Systems by name.

    Args:
        names: methods as `find_method` takes them, and "attend-excite RECIPE" for ablations, RECIPE being a
            recipe's name, a file that ends in ".json", or numbers that are other than the model's: "bare",
            "mine.json", "step_size=10", "official step_size=10 sigma=0". Behind any of them perhaps
            "best_of=4": noises that are tried for each seed. Empty: the paper's methods.
        recommended: the model's own recipe.

    Raises:
        ValueError: there is no such method or recipe, a method that has no recipes is given one, or two
            files have the same name.
    """
    systems: list[System] = []
    for name in dict.fromkeys(" ".join(name.split()) for name in names or PAPER_METHODS):
        method_name, _, rest = name.partition(" ")
        recipe, best_of = _without_noises(rest)
        method = find_method(method_name)
        if isinstance(method, AttendAndExcite):
            method = _with_recipe(method, recipe, recommended)
        elif recipe:
            raise ValueError(f"'{name}': {method_name} has no recipes: attend-excite has, and its like")
        if ".json" in recipe:  # wherever it lies
            name = f"{method_name} {_without_folders(recipe)}" + (
                f" best_of={best_of}" if best_of > 1 else ""
            )
        if best_of > 1 and not method.attends_to_prompt:
            raise ValueError(f"'{name}': {method_name} shows the model no prompt by which to compare noises")
        chosen_by = None if best_of == 1 or isinstance(method, AttendAndExcite) else recommended
        system = System(name, method, rest or None, code_digest(method_name), best_of, chosen_by)
        if any(other.name == name for other in systems):
            raise ValueError(f"two systems are called '{name}': rename one of the files")
        systems.append(system)
    return systems


def sweep(text: str) -> list[str]:
    """The names of Attend-and-Excite's systems with one number of a recipe going through some values.

    Args:
        text: as "step_size=5,10,20"; before it perhaps the recipe that all else is taken from, which is else
            the model's: "official sigma=0,0.5".

    Raises:
        ValueError: it says something else.
    """
    head, equals, values = text.rpartition("=")
    try:
        listed = json.loads(f"[{values}]")
    except (ValueError, RecursionError):  # no JSON, numbers that are too long, or nested too deep
        listed = [value.strip() for value in values.split(",")]
    if not head.strip() or not equals or "" in listed or len(listed) < 2:
        raise ValueError(f"'{text}' is no sweep: write it like step_size=5,10,20")
    told = [value if isinstance(value, str) else json.dumps(value, separators=(",", ":")) for value in listed]
    return [f"{FULL_METHOD} {head.strip()}={value}" for value in told]


def _with_recipe(method: AttendAndExcite, text: str, recommended: Recipe) -> AttendAndExcite:
    """A method with its numbers in full: its own, or what stands behind its name."""
    words = [] if text.endswith(".json") else text.split()
    changes = [word for word in words if "=" in word]
    named = " ".join(word for word in words if "=" not in word) if changes else text
    if named:
        method = method.on(read_recipe(named, recommended))
    recipe = method.recipe_for(recommended)
    if changes:
        recipe = Recipe.from_dict({"base": "recommended"} | dict(map(_change, changes)), recipe)
    return replace(method, recipe=recipe)


def _without_folders(recipe: str) -> str:
    """A recipe as it is called, with its file's name alone."""
    if recipe.endswith(".json"):  # perhaps with spaces in its path
        return Path(recipe).name
    named, file, numbers = recipe.partition(".json ")
    return f"{Path(named).name}{file}{numbers}"


def _without_noises(text: str) -> tuple[str, int]:
    """What stands behind a method's name without "best_of=4", and that number, 1 where it isn't there."""
    words = text.split()
    tried = [word for word in words if word.startswith("best_of=")]
    number = tried[-1].removeprefix("best_of=") if tried else "1"
    if len(tried) > 1 or not number.isdecimal() or not 1 <= int(number[:9]) <= MAX_NOISES:
        raise ValueError(f"'{text}': best_of is given once, and is a whole number, 1 to {MAX_NOISES}")
    return " ".join(word for word in words if word not in tried), int(number)


def _change(word: str) -> tuple[str, Any]:
    key, _, value = word.partition("=")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def conditions_of(model: Model, steps: int | None, guidance: float | None) -> Conditions:
    """The conditions of a run on a loaded model, which draws pictures of its own size.

    Args:
        model: the model.
        steps: denoising steps; None: as many as are usual for the model.
        guidance: scale of classifier-free guidance; None: likewise.
    """
    height, width = model.default_size
    dtype = str(model.dtype).removeprefix("torch.")
    steps = model.steps if steps is None else steps
    guidance = model.family.defaults.guidance_scale if guidance is None else guidance
    return Conditions(model.name, _revision(model), dtype, steps, guidance, height, width)


def plan(
    prompts: Sequence[BenchmarkPrompt],
    seeds: Sequence[int],
    systems: Sequence[System],
    conditions: Conditions,
    batch_size: int,
) -> list[Batch]:
    """All jobs, in batches that depend on nothing but these arguments.

    An image's pixels depend on its batch by a rounding error, so a run that goes on where another was killed
    must batch as that one did. Systems take turns, so that what there is of a run can be compared.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not seeds or min(seeds) < 0 or max(seeds) > MAX_SEED:
        raise ValueError(f"the benchmark needs at least one seed, and its seeds are 0 to {MAX_SEED}")
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}: it must be 1 or more")
    prompts_a_batch = max(1, batch_size // len(seeds))
    return [
        tuple(Job(prompt, seed, system, conditions) for prompt in some_prompts for seed in some_seeds)
        for some_prompts in _chunks(prompts, prompts_a_batch)
        for some_seeds in _chunks(seeds, batch_size)
        for system in systems
    ]


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _unsummarised(method: Any) -> Any:
    """The method without its recipe's line for people, which changes no image."""
    if not isinstance(method, AttendAndExcite) or not isinstance(method.recipe, Recipe):
        return method
    return replace(method, recipe=replace(method.recipe, summary=""))


def _revision(model: Model) -> str | None:
    source = Path(source_of(model.name))
    if source.is_file():
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if not source.is_dir():
        return revision_of(model)
    # What the model recommends is part of each job that follows it, and changes no other.
    files = {path for path in source.rglob("*") if path.suffix in _WEIGHT_FILES} - {source / SETTINGS_FILE}
    return name_of(digest_of(source, files), model.attention_downsampling, model.layers)
