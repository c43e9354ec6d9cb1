"""Recipes: step sizes, thresholds and the last altered step, as fractions of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from attend_excite.checks import is_number, is_whole, require
from attend_excite.documents import read_object
from attend_excite.guidance.recipes import packaged_recipes

# Terms are made where they are needed: `--help` asks for the recipes' names, and must not wait for torch.
if TYPE_CHECKING:
    from attend_excite.guidance.objectives import Need, Objective, Term

Decay = Literal["square-root", "linear", "constant"]
Number = bool | int | float


@dataclass(frozen=True)
class WeightedTerm:
    """One term of the loss that a recipe moves the latents down along.

    Attributes:
        term: its name, one of `TERMS`.
        weight: the factor on it, not 0.
        options: numbers of the term's own, by name; as (name, number) pairs or a mapping. Its temperature and
            sigma are the recipe's unless they are among these.
        start: from this fraction of the run on it counts, 0 to 1.
        end: and before this one.
        only_at_thresholds: whether it counts only on steps that have a threshold.

    Raises:
        ValueError: there is no such term or number, or one is out of its range.
    """

    term: str
    weight: float = 1.0
    options: tuple[tuple[str, Number], ...] = ()
    start: float = 0.0
    end: float = 1.0
    only_at_thresholds: bool = False

    def __post_init__(self) -> None:
        where = f"of the term {self.term}"
        for what in ("weight", "start", "end"):
            value = getattr(self, what)
            fine = is_number(value) and math.isfinite(value)
            require(fine, f"the {what} {where}", value, "a number")
        require(self.weight != 0, f"the weight {where}", self.weight, "other than 0")
        if not 0 <= self.start < self.end <= 1:
            given = f"{self.start:g} and {self.end:g}"
            raise ValueError(f"start and end {where} are {given}: they must be 0 to 1, in this order")
        fine = isinstance(self.only_at_thresholds, bool)
        require(fine, f"only_at_thresholds {where}", self.only_at_thresholds, "true or false")
        try:
            object.__setattr__(self, "options", tuple(sorted(dict(self.options).items())))
        except (TypeError, ValueError):
            raise ValueError(f"the options {where} are numbers by name") from None
        self.made()

    def made(self, **shared: Number) -> Term:
        """The term with its own numbers, and with those that all terms of the recipe share."""
        from attend_excite.guidance.objectives import term_named

        return term_named(self.term, dict(self.options), **shared)


class PlannedTerm(NamedTuple):
    """A term of one step, or a function like one, and the factor on it."""

    weight: float
    term: Objective


def _the_papers() -> tuple[PlannedTerm, ...]:
    return (PlannedTerm(1.0, WeightedTerm("most-neglected").made()),)


# No recipe comes near; beyond them numbers overflow, and a run doesn't end.
_LARGEST, _MOST = 1e6, 1000


def _searched_for() -> tuple[WeightedTerm, ...]:
    return (
        WeightedTerm("most-neglected"),
        WeightedTerm("self-overlap", options=(("gate", 0.5),)),
        WeightedTerm("clean-background", weight=0.1),
    )


@dataclass(frozen=True)
class NoiseSearch:
    """The search for a noise from which a picture begins: the first stage of InitNO (Guo et al., CVPR 2024).

    Each image's noise z becomes m + exp(v / 2) z, and m and v are moved down the loss by Adam: a step takes
    one pass of the conditional half at the first timestep, with its gradient. They are kept close to 0, and
    so the noise to a standard normal one. Each round begins with another noise. An image is done as soon as
    it has `enough`; where no round leads there, the best round goes on.

    Attributes:
        rounds: noises that are tried, at most, 1 or more.
        steps: of Adam in each round, at most, 1 or more.
        more: further steps where no round leads there, at most; 0: none.
        learning_rate: of Adam, above 0.
        terms: the loss.
        enough: (term, loss) pairs: an image is done where each of these terms is below its number.

    Raises:
        ValueError: a number is out of its range, or `enough` names a term that isn't there.
    """

    rounds: int = 5
    steps: int = 10
    more: int = 50
    learning_rate: float = 0.01
    terms: tuple[WeightedTerm, ...] = field(default_factory=_searched_for)
    enough: tuple[tuple[str, float], ...] = (("most-neglected", 0.2), ("self-overlap", 0.3))

    def __post_init__(self) -> None:
        for what, least in (("rounds", 1), ("steps", 1), ("more", 0)):
            value = getattr(self, what)
            fine = is_whole(value, least, _MOST)
            require(fine, f"{what} of the search", value, f"a whole number, {least} to {_MOST}")
        rate = self.learning_rate
        fine = is_number(rate) and 0 < rate <= 1
        require(fine, "the learning_rate of the search", rate, "above 0, 1 at most")
        object.__setattr__(self, "terms", _terms(self.terms))
        known = {each.term for each in self.terms}
        try:
            enough = tuple((str(name), float(loss)) for name, loss in self.enough)
        except (TypeError, ValueError):
            raise ValueError('what is enough in the search are pairs, as ["most-neglected", 0.2]') from None
        for name, loss in enough:
            require(name in known, "a term that is enough", name, f"one of {', '.join(sorted(known))}")
            require(math.isfinite(loss), f"what is enough of {name}", loss, "a number")
        object.__setattr__(self, "enough", enough)

    @property
    def most_passes(self) -> int:
        """What it costs an image at most: guidance passes with their gradients."""
        return self.rounds * self.steps + self.more


@dataclass(frozen=True)
class StepPlan:
    """What nursing does at one iteration of the denoising loop.

    Attributes:
        step_size: the factor on the gradient (alpha_t in Equation 3).
        alters: whether the ordinary update is made.
        threshold: the attention that every subject must reach here, 0 to 1; None: no refinement.
        max_refinements: at most so many refinement updates.
        update_after_refinement: whether a refined latent gets the ordinary update on top.
        terms: what the loss is the sum of.
        max_shift: no update moves a latent by more than this share of its norm; None: no bound.
    """

    step_size: float
    alters: bool
    threshold: float | None
    max_refinements: int
    update_after_refinement: bool
    max_shift: float | None = None
    terms: tuple[PlannedTerm, ...] = field(default_factory=_the_papers)

    @property
    def idle(self) -> bool:
        """Whether the latents cannot change here, so that no guidance pass is needed."""
        return not self.alters and self.threshold is None

    @property
    def needs(self) -> frozenset[Need]:
        """What its terms need recorded besides the cross-attention."""
        return frozenset["Need"]().union(*(getattr(each.term, "needs", ()) for each in self.terms))


@dataclass(frozen=True)
class Recipe:
    """The numbers of Attend-and-Excite (Section 4 and Appendix A.1).

    Attributes:
        step_size: alpha at the first step, above 0; see `decay` for how it falls.
        decay: "square-root": step_size * sqrt(1 .. 0.5) over the whole run, as in the authors' code;
            "linear": step_size * (1 .. 0.5) over the altered steps, in Appendix A.1; "constant": it stays.
        thresholds: (fraction of the run, attention demanded there) pairs, both 0 to 1.
        altered: where altering ends, as a fraction of the run, 0 to 1.
        max_refinements: at most so many refinement updates at each threshold; 0: no refinement.
        update_after_refinement: whether the ordinary update follows a refinement, as in the authors'
            code, or the refinement's last update is the step's update, as in Algorithm 1.
        temperature: factor on the attention before the softmax over the tokens, above 0.
        sigma: the Gaussian filter's standard deviation in patches; 0: no filter.
        prompt_tokens_only: whether the softmax leaves out <eot> and padding. None: as is usual for the
            architecture: all but Stable Diffusion 1.x leave them out. Where image and text share a softmax
            they are always left out.
        guide_every: alter only every so many of the altered steps, 1 or more; steps with a threshold are
            always guided. Above 1 an approximation that saves time.
        start: where altering begins, as a fraction of the run, 0 to `altered`. What a threshold demands
            earlier is demanded there.
        max_shift: no update moves a latent by more than this share of its norm, above 0: a longer one is
            shortened to it. None: no bound.
        rest_after: leave an image alone once all its subjects have enough (`rest_at`, `rest_lead`), and had
            when each of so many guided steps in a row began, the present one included. An image whose next
            step begins with less is nursed again, unless so many steps began well: then it isn't looked at
            any more. 1: as soon as they have enough; 0: never. Saves time, and keeps what is there.
        rest_at: the attention that is enough, 0 to 1; None: the last threshold. Taken as a threshold is.
        rest_lead: how far each subject must also be ahead of the others where it is furthest ahead, -1 to 1:
            above 0 it leads somewhere (`subject_leads`). None: not asked.
        terms: the loss, a weighted sum; most often of the most neglected subject alone. Whether a threshold
            is met, and an image rests, stays a matter of the subjects' attention.
        choose_at: where in the run, as a fraction of it, 0 to 1, noises are compared if the best of several
            is to be drawn (`generate`, `best_of`). With n iterations before it a noise costs 2n + 1 passes.
        search: a search for the noise before the first step; {}: as InitNO does it. None: the noise is the
            seed's own.
        method: the name of the method that it is, on the command line.
        title: its name for people.
        summary: one line for people.
        tuned: what suits other recipes on the model that recommends this one: by a recipe's name the numbers
            in which it is to differ from itself. They count where `named` makes it of this one; what a recipe
            does itself doesn't depend on them, so they are neither compared nor written down.

    Raises:
        ValueError: a number is out of its range.
    """

    step_size: float
    decay: Decay
    thresholds: tuple[tuple[float, float], ...]
    altered: float
    max_refinements: int
    update_after_refinement: bool
    temperature: float
    sigma: float
    prompt_tokens_only: bool | None = None
    guide_every: int = 1
    start: float = 0.0
    max_shift: float | None = None
    rest_after: int = 0
    rest_at: float | None = None
    rest_lead: float | None = None
    terms: tuple[WeightedTerm, ...] = field(default_factory=lambda: (WeightedTerm("most-neglected"),))
    choose_at: float = 0.02
    search: NoiseSearch | None = None
    method: str = "attend-excite"
    title: str = "Attend-and-Excite"
    summary: str = ""
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        optional = [what for what in ("max_shift", "rest_at", "rest_lead") if getattr(self, what) is not None]
        for what in ("step_size", "altered", "temperature", "sigma", "start", "choose_at", *optional):
            value = getattr(self, what)
            require(is_number(value), what, value, "a number")
        switches = {"update_after_refinement": self.update_after_refinement}
        if self.prompt_tokens_only is not None:
            switches["prompt_tokens_only"] = self.prompt_tokens_only
        for what, value in switches.items():
            require(isinstance(value, bool), what, value, "true or false")
        require(0 < self.step_size <= _LARGEST, "step_size", self.step_size, f"above 0, {_LARGEST:g} at most")
        require(self.decay in get_args(Decay), "decay", self.decay, " or ".join(get_args(Decay)))
        require(0 <= self.altered <= 1, "altered", self.altered, "a fraction of the run, 0 to 1")
        fine = 0 <= self.start <= self.altered
        require(
            fine, "start", self.start, f"a fraction of the run, 0 to where altering ends ({self.altered:g})"
        )
        require(0 <= self.choose_at <= 1, "choose_at", self.choose_at, "a fraction of the run, 0 to 1")
        require(self.max_shift is None or self.max_shift > 0, "max_shift", self.max_shift, "above 0")
        require(self.rest_at is None or 0 <= self.rest_at <= 1, "rest_at", self.rest_at, "0 to 1")
        require(self.rest_lead is None or -1 <= self.rest_lead <= 1, "rest_lead", self.rest_lead, "-1 to 1")
        for what, least in (("max_refinements", 0), ("guide_every", 1), ("rest_after", 0)):
            value = getattr(self, what)
            require(is_whole(value, least, _MOST), what, value, f"a whole number, {least} to {_MOST}")
        require(
            0 < self.temperature <= _LARGEST,
            "temperature",
            self.temperature,
            f"above 0, {_LARGEST:g} at most",
        )
        require(0 <= self.sigma <= _LARGEST, "sigma", self.sigma, f"0 to {_LARGEST:g}")
        for what in ("method", "title", "summary"):
            value = getattr(self, what)
            require(isinstance(value, str), what, value, "a text")
        known = self.tuned.values() if isinstance(self.tuned, Mapping) else (None,)
        fine = all(isinstance(numbers, Mapping) for numbers in known)
        require(fine, "tuned", self.tuned, "objects of numbers by the names of recipes")
        object.__setattr__(self, "terms", _terms(self.terms))
        object.__setattr__(self, "search", _search(self.search))
        object.__setattr__(self, "thresholds", _pairs(self.thresholds))
        for fraction, threshold in self.thresholds:
            require(0 <= fraction <= 1, "a threshold's place", fraction, "a fraction of the run, 0 to 1")
            require(0 <= threshold <= 1, "a threshold", threshold, "an attention, 0 to 1")

    @staticmethod
    def named(name: str, recommended: Recipe | None = None) -> Recipe:
        """One of the recipes that come with the package, by name.

        Args:
            name: as in `recipe_names` or `method_recipes`, or "recommended".
            recommended: the model's own recipe (`model.recipe`), which the ablations change.

        Raises:
            ValueError: there is no such recipe, or it is made of a model's and that isn't given.
        """
        recipes = packaged_recipes()
        if name == "recommended":
            if recommended is None:
                raise ValueError(
                    "what a model recommends is its own: give it too, as "
                    'Recipe.named("recommended", model.recipe), or take "official" as the base'
                )
            return recommended
        if not isinstance(name, str) or name not in recipes:
            raise ValueError(f"unknown recipe {name!r}: choose one of recommended, {', '.join(recipes)}")
        tuned = {} if recommended is None else recommended.tuned.get(name, {})
        return replace(Recipe.from_dict({**recipes[name], **tuned}, recommended), tuned={})

    @staticmethod
    def from_dict(values: Mapping[str, Any], recommended: Recipe | None = None) -> Recipe:
        """A recipe from plain data; `base` names the recipe from which missing values are taken.

        Args:
            values: attributes by name, and perhaps a base, as `named` takes it.
            recommended: likewise: `Recipe.from_dict({"base": "recommended", "sigma": 0.0}, model.recipe)`.

        Raises:
            ValueError: an unknown or missing key, a number out of its range, or a base that is made of a
                model's recipe where that isn't given.
        """
        if not isinstance(values, Mapping):
            raise ValueError("a recipe is an object of numbers by name")
        values = dict(values)
        base = values.pop("base", None)
        known = {each.name for each in fields(Recipe)}
        needed = {each.name for each in fields(Recipe) if each.default is each.default_factory is MISSING}
        if unknown := sorted(values.keys() - known):
            raise ValueError(
                f"unknown in a recipe: {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        if base is not None:
            origin = Recipe.named(base, recommended)
            # What is told here holds for the methods that are made of it, too.
            tuned = {
                name: {key: value for key, value in numbers.items() if key not in values}
                for name, numbers in origin.tuned.items()
            }
            return replace(origin, **{"tuned": tuned, **values})
        if missing := sorted(needed - values.keys()):
            raise ValueError(f'missing in a recipe: {", ".join(missing)}; or give it a base, say "official"')
        return Recipe(**values)

    def plan(self, iterations: int) -> tuple[StepPlan, ...]:
        """What to do at each of so many iterations of the denoising loop.

        A fraction f stands for iteration floor(f * iterations): with 50 iterations, and with the 51
        that PNDM makes of 50 steps, the official numbers 0, 10, 20 and 25 come out.
        """
        start, altered = _floor(self.start * iterations), _floor(self.altered * iterations)
        thresholds: dict[int, float] = {}
        if self.max_refinements:
            for fraction, threshold in self.thresholds:
                index = min(max(_floor(fraction * iterations), start), iterations - 1)
                # In a short run two thresholds can fall on one iteration; the stronger one holds.
                thresholds[index] = max(threshold, thresholds.get(index, 0.0))
        terms = self._planned_terms(iterations, thresholds)
        return tuple(
            StepPlan(
                step_size=self._step_size(index, start, altered, iterations),
                alters=start <= index < altered
                and bool(terms[index])
                and ((index - start) % self.guide_every == 0 or index in thresholds),
                threshold=thresholds.get(index) if terms[index] else None,
                max_refinements=self.max_refinements,
                update_after_refinement=self.update_after_refinement,
                max_shift=self.max_shift,
                terms=terms[index],
            )
            for index in range(iterations)
        )

    def _planned_terms(
        self, iterations: int, thresholds: Mapping[int, float]
    ) -> list[tuple[PlannedTerm, ...]]:
        """The terms that count at each iteration."""
        made = self._made(self.terms)
        spans = [(_floor(each.start * iterations), _floor(each.end * iterations)) for each in self.terms]
        if all(end == 0 for _, end in spans):  # a run so short that they end before its first step
            spans = [(start, 1) for start, _ in spans]
        return [
            tuple(
                planned
                for each, planned, (start, end) in zip(self.terms, made, spans, strict=True)
                if start <= index < end and (index in thresholds or not each.only_at_thresholds)
            )
            for index in range(iterations)
        ]

    def _made(self, terms: Sequence[WeightedTerm]) -> list[PlannedTerm]:
        numbers = {"temperature": self.temperature, "sigma": self.sigma}
        return [PlannedTerm(each.weight, each.made(**numbers)) for each in terms]

    def compared_at(self, iterations: int) -> int:
        """The iteration at which noises are compared, of so many of the denoising loop."""
        return min(_floor(self.choose_at * iterations), iterations - 1)

    @property
    def searched_terms(self) -> tuple[PlannedTerm, ...]:
        """The terms of its search; none where there is none."""
        return () if self.search is None else tuple(self._made(self.search.terms))

    @property
    def goal(self) -> float:
        """The attention that every subject is to have in the end, 0 to 1: the last threshold."""
        return max(self.thresholds, default=(0.0, 1.0))[1]

    @property
    def enough(self) -> float:
        """The attention with which a subject has enough for its image to rest, 0 to 1."""
        return self.goal if self.rest_at is None else self.rest_at

    def _step_size(self, index: int, start: int, altered: int, iterations: int) -> float:
        if self.decay == "constant":
            return self.step_size
        first, steps = (start, altered - start) if self.decay == "linear" else (0, iterations)
        scale = 1 - 0.5 * min(max(index - first, 0) / max(steps - 1, 1), 1)
        return self.step_size * (math.sqrt(scale) if self.decay == "square-root" else scale)


def read_recipe(name: str, recommended: Recipe | None = None) -> Recipe:
    """A recipe by its name, or from a file whose name ends in ".json".

    Args:
        name: as for `Recipe.named`, or a path.
        recommended: likewise; what the file may be based on.

    Raises:
        ValueError: there is no such recipe or file, or what is in it makes none.
    """
    if not name.endswith(".json"):
        return Recipe.named(name, recommended)
    try:
        numbers = read_object(Path(name))
    except ValueError as error:
        raise ValueError(f"the recipe '{name}' {error}") from error
    try:
        return Recipe.from_dict(numbers, recommended)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the recipe '{name}' cannot be used: {error}") from error


def _pairs(thresholds: Any) -> tuple[tuple[float, float], ...]:
    try:
        return tuple((float(fraction), float(threshold)) for fraction, threshold in thresholds)
    except (TypeError, ValueError):
        raise ValueError(
            "thresholds are pairs: a fraction of the run and an attention, as (0.2, 0.5)"
        ) from None


def _terms(terms: Any) -> tuple[WeightedTerm, ...]:
    try:
        found = tuple(each if isinstance(each, WeightedTerm) else WeightedTerm(**each) for each in terms)
    except TypeError:
        example = '{"term": "overlap", "weight": 0.5, "options": {"raw": true}}'
        raise ValueError(f"terms are a list of objects, as {example}") from None
    if not found:
        raise ValueError("terms is empty: it must be one term or more")
    return found


def _search(search: Any) -> NoiseSearch | None:
    if search is None or isinstance(search, NoiseSearch):
        return search
    try:
        return NoiseSearch(**search)
    except TypeError:
        known = ", ".join(each.name for each in fields(NoiseSearch))
        raise ValueError(f"search is an object with some of {known}, or {{}} for all as they are") from None


def _floor(value: float) -> int:
    # 0.29 * 100 is 28.999999999999996 in floating point and means 29.
    return math.floor(value + 1e-6)
