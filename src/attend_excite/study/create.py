"""A study: drawn from a benchmark run once, then frozen."""

from __future__ import annotations

import hashlib
import json
import math
import random
import secrets
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from attend_excite.benchmark import store
from attend_excite.benchmark.names import is_own
from attend_excite.documents import read_object
from attend_excite.files import put_in_place, write_whole, written_whole
from attend_excite.study.votes import Kind

STUDY_FILE, IMAGES = "study.json", "images"
NONE = "none"
"""How "none is better" is written in forms and files."""

BETWEEN = ";"
"""Parts the systems of a list in a file."""

_IMAGE_SIDE = 384
_QUALITY = 85

CONSENT = (
    "You will see descriptions. Below each are several sets of images that computers drew from it. "
    "Choose the set that best reflects the description.\n\n"
    "Taking part is voluntary, and you can stop whenever you like. We store your choices, the time you take "
    "for each, and a random number. A cookie keeps the number in your browser, so that you can go on later. "
    "We store no name, no address, and nothing else about you or your device. Whoever runs this study can "
    "delete your answers if you tell them the number. It is at the foot of every page."
)


@dataclass(frozen=True)
class Rules:
    """Who is left out of the analysis, decided before anyone has answered.

    Attributes:
        least_checks: share of the checks that a respondent must pass, 0 to 1.
        least_seconds: the least that the median of a respondent's seconds a page may be.
        least_answered: share of all pages that a respondent must have answered, 0 to 1.
    """

    least_checks: float = 0.6
    least_seconds: float = 1.0
    least_answered: float = 1.0

    def __post_init__(self) -> None:
        for name in ("least_checks", "least_answered"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a share is 0 to 1")
        if not (math.isfinite(self.least_seconds) and self.least_seconds >= 0):
            raise ValueError(f"least_seconds is {self.least_seconds}: it must be a number, 0 or more")


@dataclass(frozen=True)
class Page:
    """One page: a prompt and each system's images for it.

    Attributes:
        id: random, 16 hexadecimal digits.
        kind: what the page is for.
        prompt: the images' prompt. A "check" page shows in its place which set to choose.
        subset: the prompt's subset of the benchmark; "" if it has none.
        images: system -> names of its files under `images/`, one a seed, in the order of `Study.seeds`.
        repeats: the ordinary page that a "repeat" page repeats, else None.
        expected: the system to choose on a "check" page, else None.
    """

    id: str
    kind: Kind
    prompt: str
    subset: str
    images: Mapping[str, tuple[str, ...]]
    repeats: str | None = None
    expected: str | None = None


@dataclass(frozen=True)
class Study:
    """All that was decided at creation.

    Attributes:
        model: the model that drew the images.
        systems: what is compared, in the alphabet's order.
        seeds: of the images of each set.
        pages: ordinary ones, checks and repeats; each respondent sees all, in an order of their own.
        rules: who is left out of the analysis.
        allow_none: whether "none is better" can be answered.
        consent: what a respondent agrees to; paragraphs are parted by empty lines.
        draw_seed: of the draw of prompts, seeds, checks and repeats.
        files: image name -> SHA-256 of the file.
        titles: those of the systems that a user wrote, for people.
    """

    model: str
    systems: tuple[str, ...]
    seeds: tuple[int, ...]
    pages: tuple[Page, ...]
    rules: Rules
    allow_none: bool
    consent: str
    draw_seed: int
    files: Mapping[str, str]
    titles: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the content, images included: another study has another hash."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()

    def content(self) -> dict[str, Any]:
        """All of it as plain data: without titles where there are none, as studies were that had none."""
        content = asdict(self)
        return content if self.titles else {key: value for key, value in content.items() if key != "titles"}

    @cached_property
    def page(self) -> Mapping[str, Page]:
        """The pages by id."""
        return {page.id: page for page in self.pages}


def read_study(folder: Path) -> Study:
    """The study in a folder, which must be as it was created.

    Raises:
        ValueError: there is no study, or something in it has changed since it was created.
    """
    if not (folder / STUDY_FILE).exists():
        raise ValueError(f"'{folder}' is not a study: it has no {STUDY_FILE}")
    try:
        content = read_object(folder / STUDY_FILE)
    except ValueError as error:
        raise ValueError(f"'{folder / STUDY_FILE}' {error}") from error
    try:
        frozen = content.pop("hash")
        content |= {
            "systems": tuple(content["systems"]),
            "seeds": tuple(content["seeds"]),
            "pages": tuple(Page(**page | {"images": _tuples(page["images"])}) for page in content["pages"]),
            "rules": Rules(**content["rules"]),
        }
        study = Study(**content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the study in '{folder}' is not one that `study create` made: {error}") from error
    images = folder / IMAGES
    changed = [
        name
        for name, digest in study.files.items()
        if not (images / name).is_file() or _digest(images / name) != digest
    ]
    if study.hash != frozen or changed:
        raise ValueError(
            f"the study in '{folder}' has changed since it was created ({[*changed, STUDY_FILE][0]}): "
            "put the files back as they were, or create another study"
        )
    return study


def create_study(
    run: str | Path,
    folder: Path,
    *,
    prompts_per_subset: int = 10,
    seeds: int = 4,
    systems: Sequence[str] | None = None,
    checks: int = 3,
    repeats: int = 3,
    allow_none: bool = False,
    rules: Rules | None = None,
    consent: str = CONSENT,
    draw_seed: int = 0,
) -> Study:
    """Draw a study from a benchmark run and freeze it.

    As in the paper's study (Section 5, Table 2), prompts are drawn at random from each subset, and the same
    seeds, drawn at random, serve every prompt and system. Nothing is drawn anew where an image is missing:
    a choice that hangs on which images came out well would favour a system.

    A check is a page like the others whose text says which set to choose. What is expected there
    doesn't depend on how well any system draws, so that nobody fails it for their taste.

    Args:
        run: folder of the benchmark run, here or anywhere that fsspec reaches.
        folder: to be made; must not exist.
        prompts_per_subset: prompts drawn from each subset.
        seeds: images of each set.
        systems: two to nine of the run's; None: all.
        checks: pages that check attention. Their images are of prompts outside the study where there are any.
        repeats: ordinary pages shown once more, later and in another order.
        allow_none: offer "none is better".
        rules: who is left out of the analysis; None: the defaults.
        consent: what a respondent agrees to; paragraphs are parted by empty lines.
        draw_seed: of all that is drawn.

    Raises:
        ValueError: the run has too little, or a system lacks an image.
    """
    if folder.exists():
        raise ValueError(f"'{folder}' exists, and a study never changes: choose another folder")
    for name, number, least in (
        ("prompts_per_subset", prompts_per_subset, 1),
        ("seeds", seeds, 1),
        ("checks", checks, 0),
        ("repeats", repeats, 0),
    ):
        if number < least:
            raise ValueError(f"{name} is {number}: it must be {least} or more")
    rows = store.read_rows(run).to_pylist()
    if not rows:
        raise ValueError(f"'{run}' is no benchmark run with images")
    compared = _compared(rows, systems)
    rows = [row for row in rows if row["system"] in compared]
    draw = random.Random(draw_seed)
    prompts, spare = _drawn_prompts(rows, prompts_per_subset, draw)
    if repeats > len(prompts):
        raise ValueError(f"{repeats} pages are to be repeated, and there are {len(prompts)}: lower --repeats")
    drawn_seeds = _drawn_seeds(rows, seeds, draw)
    checked = draw.sample(spare if len(spare) >= checks else prompts * checks, checks)
    repeated = draw.sample(range(len(prompts)), repeats)
    sources = _sources(rows, prompts + checked, compared, drawn_seeds)

    # A name says nothing of the system, and can't be guessed from another.
    names = {source: f"{secrets.token_hex(16)}.webp" for sets in sources.values() for source in sets}

    def page(kind: Kind, subset: str, prompt: str, **more: str) -> Page:
        images = {system: tuple(names[source] for source in sources[prompt, system]) for system in compared}
        return Page(secrets.token_hex(8), kind, prompt, subset, images, **more)

    ordinary = [page("ordinary", *chosen) for chosen in prompts]
    pages = (
        ordinary
        + [page("check", *chosen, expected=draw.choice(compared)) for chosen in checked]
        + [page("repeat", *prompts[index], repeats=ordinary[index].id) for index in repeated]
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        partial = Path(temporary) / "study"
        (partial / IMAGES).mkdir(parents=True)
        copies = tqdm(names.items(), "copying images", unit="image", leave=False, disable=None)
        study = Study(
            model=rows[0]["model"],
            systems=tuple(compared),
            seeds=tuple(drawn_seeds),
            pages=tuple(pages),
            rules=rules or Rules(),
            allow_none=allow_none,
            consent=consent,
            draw_seed=draw_seed,
            titles=_titles(run, compared),
            files={
                name: _copied(store.read_image(run, source), partial / IMAGES / name)
                for source, name in copies
            },
        )
        content = {"hash": study.hash} | study.content()
        write_whole(partial / STUDY_FILE, json.dumps(content, indent=1) + "\n")
        put_in_place(partial, folder)
    return study


def _titles(run: str | Path, systems: Sequence[str]) -> dict[str, str]:
    """The titles that a run keeps of the systems that a user wrote."""
    try:
        kept = store.read_settings(run).get("titles", {})
    except store.NoRunError:
        return {}
    return {system: kept[system] for system in systems if is_own(system) and system in kept}


def _compared(rows: Sequence[Mapping[str, Any]], systems: Sequence[str] | None) -> list[str]:
    there = {row["system"] for row in rows}
    if missing := set(systems or ()) - there:
        raise ValueError(f"the run has no {', '.join(sorted(missing))}: it has {', '.join(sorted(there))}")
    compared = sorted(there if systems is None else set(systems))
    if not 2 <= len(compared) <= 9:
        raise ValueError(f"a study compares 2 to 9 systems, and these are {len(compared)}: name them")
    if unfit := [name for name in compared if BETWEEN in name or name == NONE or name.isdigit()]:
        raise ValueError(f"the system '{unfit[0]}' cannot be told apart from an answer in a file: rename it")
    # Where the weights are known it doesn't matter under what name they were found.
    models = {row["revision"] or row["model"]: row["model"] for row in rows if row["system"] in compared}
    if len(models) > 1:
        raise ValueError(f"the systems were drawn by different models: {', '.join(sorted(models.values()))}")
    return compared


def _drawn_prompts(
    rows: Iterable[Mapping[str, Any]], count: int, draw: random.Random
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(subset, prompt) of those drawn, and of those left over."""
    subsets: dict[str, set[str]] = {}
    for row in rows:
        subsets.setdefault(row["subset"], set()).add(row["prompt"])
    drawn = []
    for subset, prompts in sorted(subsets.items()):
        if len(prompts) < count:
            raise ValueError(
                f"{count} prompts are to be drawn of '{subset}', and the run has {len(prompts)}: "
                "lower --prompts-per-subset"
            )
        drawn += [(subset, prompt) for prompt in draw.sample(sorted(prompts), count)]
    every = [(subset, prompt) for subset, prompts in sorted(subsets.items()) for prompt in sorted(prompts)]
    return drawn, [chosen for chosen in every if chosen not in drawn]


def _drawn_seeds(rows: Iterable[Mapping[str, Any]], count: int, draw: random.Random) -> list[int]:
    there = sorted({row["seed"] for row in rows})
    if len(there) < count:
        raise ValueError(f"{count} seeds are to be drawn, and the run has {len(there)}")
    return sorted(draw.sample(there, count))


def _sources(
    rows: Iterable[Mapping[str, Any]],
    prompts: Iterable[tuple[str, str]],
    systems: Iterable[str],
    seeds: Iterable[int],
) -> dict[tuple[str, str], list[str]]:
    """(prompt, system) -> its images in the run, one a seed."""
    images: dict[tuple[str, str, int], str] = {}
    for row in rows:
        key = row["prompt"], row["system"], row["seed"]
        # A safety checker's black picture is no picture of the prompt.
        if row["image"] is None or row["nsfw"]:
            continue
        if images.setdefault(key, row["image"]) != row["image"]:
            raise ValueError(f"the run has two images of '{key[0]}' by {key[1]} with seed {key[2]}")
    wanted = [(prompt, system, seed) for _, prompt in prompts for system in systems for seed in seeds]
    if missing := [key for key in wanted if key not in images]:
        prompt, system, seed = missing[0]
        raise ValueError(
            f"{len(missing)} of {len(wanted)} images are missing or blacked out, the first is {system}'s "
            f"of '{prompt}' with seed {seed}: draw them, or choose another draw seed"
        )
    sources: dict[tuple[str, str], list[str]] = {}
    for prompt, system, seed in dict.fromkeys(wanted):
        sources.setdefault((prompt, system), []).append(images[prompt, system, seed])
    return sources


def _copied(image: Image.Image, target: Path) -> str:
    """Write an image small, without what its file said of itself; returns the new file's SHA-256."""
    picture = image.convert("RGB")
    picture.info.clear()
    picture.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE), Image.Resampling.LANCZOS)
    with written_whole(target) as partial:
        picture.save(partial, quality=_QUALITY)
    return _digest(target)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _tuples(images: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    return {system: tuple(names) for system, names in images.items()}
