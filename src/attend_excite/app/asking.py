"""The left half of the page: what a visitor asks for."""

from __future__ import annotations

import secrets
from typing import Any

import gradio as gr

from attend_excite.app import limits, views
from attend_excite.app.actions import Server, resolved
from attend_excite.app.api import failures_as_errors
from attend_excite.app.events import AT_ONCE
from attend_excite.app.forms import RECOMMENDED, Form, checked_form
from attend_excite.app.opening import about, examples, opening_form
from attend_excite.app.parts import picked
from attend_excite.app.views import sentence
from attend_excite.app.words import subjects_of, words_document, words_from, words_of
from attend_excite.guidance.recipes import recipe_names
from attend_excite.methods import METHODS, AttendAndExcite, method_named
from attend_excite.models import Model
from attend_excite.pictures import STRENGTH
from attend_excite.schedulers import fitting_schedulers
from attend_excite.verdict import judge_of


class Asking:
    """The form: its parts, and what happens among them.

    Attributes:
        prompt: the prompt.
        draw: the button that starts a run.
        seed: of the first picture.
        copy_link: the button for the link to this form.
        copied: where it is said what became of the link.
        inputs: what `read` takes, and `fill` fills, in their order.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        # What the page says from the start is what Draw does, even before the address has been read.
        model = server.models.get("")
        first = opening_form(model)
        recipe = model.recipe
        height, width = model.default_size
        self.prompt = gr.Textbox(
            first.prompt,
            label="What to draw",
            max_lines=4,
            max_length=limits.MAX_PROMPT,
            elem_id="ae-prompt",
        )
        self._chips = views.chips(self._read_words(first.prompt, None, ""), elem_id="ae-words")
        # Not before the address has been read: it may ask for something else.
        self.draw = gr.Button("Draw", variant="primary", elem_id="ae-draw", interactive=False)
        self._examples = gr.Dataset(
            components=[self.prompt],
            samples=examples(model.name),
            type="index",
            label="Prompts of the paper",
            elem_id="ae-examples",
        )
        self._about = gr.HTML(views.about_view(*about(model.name)), apply_default_css=False)
        self._pictures = gr.Slider(1, limits.MAX_PICTURES, first.pictures, step=1, label="Pictures")
        self._best = gr.Checkbox(
            label="Keep only the one that shows the most subjects",
            container=False,
            visible=judge_of(model.name) is not None,
            elem_id="ae-best",
        )
        self._best_of = gr.Slider(
            1,
            limits.MAX_NOISES,
            first.best_of,
            step=1,
            label="Noises tried for each picture",
            info="a few steps each; the one of the lowest loss is drawn",
            elem_id="ae-best-of",
        )
        with gr.Row(elem_id="ae-seeds"):
            self.seed = gr.Number(
                first.seed,
                label="First seed",
                precision=0,
                minimum=0,
                maximum=limits.MAX_SEED,
                min_width=120,
            )
            self._random = gr.Checkbox(label="New seed each time", container=False, min_width=150)
        # Only Stable Diffusion's own pictures may be called so.
        titles = {name: method_named(name).title for name in METHODS}
        titles["stable-diffusion"] = "the plain model alone"
        self._method = gr.Dropdown(
            [(titles[name], name) for name in METHODS],
            value=first.method,
            label="Method",
            elem_id="ae-method",
        )
        self._negative = gr.Textbox(
            first.negative,
            label="Negative prompt",
            placeholder="what the picture is to be without",
            max_lines=2,
            max_length=limits.MAX_PROMPT,
            elem_id="ae-negative",
        )
        with gr.Accordion("Model, steps and size", open=False):
            names = list(server.models.names)
            self._model = gr.Dropdown(names, value=names[0], label="Model", elem_id="ae-model")
            self._steps = gr.Slider(
                1, limits.MAX_STEPS, first.steps, step=1, label="Steps", elem_id="ae-steps"
            )
            self._scheduler = gr.Dropdown(
                _schedulers(model), value=first.scheduler, label="Scheduler", elem_id="ae-scheduler"
            )
            self._guidance = gr.Slider(0, limits.MAX_GUIDANCE, first.guidance, step=0.5, label="Guidance")
            with gr.Row():
                self._width, self._height = (
                    gr.Slider(limits.MIN_SIDE, value=side, label=label, min_width=140, **_sides(model))
                    for side, label in ((width, "Width"), (height, "Height"))
                )
        with gr.Accordion("Begin from a picture", open=False):
            with gr.Row():
                self._image, self._mask = (
                    gr.Image(
                        label=label,
                        type="filepath",
                        format="png",
                        image_mode=None,  # as it is: looked at before it is decoded
                        sources=["upload", "clipboard"],
                        height=160,
                        elem_id=elem_id,
                    )
                    for label, elem_id in (
                        ("Picture", "ae-image"),
                        ("Mask: white is drawn", "ae-mask"),
                    )
                )
            self._strength = gr.Slider(
                0.05, 1, STRENGTH, step=0.05, label="How much is made anew", elem_id="ae-strength"
            )
        with gr.Accordion("Recipe of Attend-and-Excite", open=False) as self._knobs:
            self._recipe = gr.Dropdown([RECOMMENDED, *recipe_names()], value=first.recipe, label="Start from")
            self._step_size = gr.Number(_shown(recipe.step_size), label="Step size α", minimum=0, step=0.5)
            self._altered = gr.Slider(
                0, 1, _shown(recipe.altered), step=0.05, label="Share of the steps that is altered"
            )
            self._max_refinements = gr.Slider(
                0,
                limits.MAX_REFINEMENTS,
                recipe.max_refinements,
                step=1,
                label="Refinements at each threshold, at most",
            )
            self._sigma = gr.Number(
                _shown(recipe.sigma), label="Smoothing σ, in patches of the map", minimum=0, step=0.1
            )
            self._recipe_parts = [self._step_size, self._altered, self._max_refinements, self._sigma]
        self.copy_link = gr.Button("Copy a link to this form", size="sm", elem_id="ae-copy")
        self.copied = gr.HTML(apply_default_css=False, elem_id="ae-copied")
        self.inputs = [
            self.prompt,
            self._chips,
            self._model,
            self._method,
            self._recipe,
            *self._recipe_parts,
            self._pictures,
            self._best,
            self._best_of,
            self.seed,
            self._random,
            self._steps,
            self._scheduler,
            self._guidance,
            self._negative,
            self._width,
            self._height,
            self._image,
            self._strength,
            self._mask,
        ]
        self._wire()

    def read(
        self,
        prompt: str,
        chips: Any,
        model: str,
        method: str,
        recipe: str,
        step_size: float | None,
        altered: float,
        max_refinements: int,
        sigma: float,
        pictures: int,
        best: bool,
        best_of: int,
        seed: int | None,
        random: bool,
        steps: int,
        scheduler: str | None,
        guidance: float,
        negative: str,
        width: int,
        height: int,
        image: str | None,
        strength: float,
        mask: str | None,
    ) -> Form:
        """What the form says. A first seed that is random is drawn here.

        Raises:
            ValueError: the prompt cannot be read.
        """
        # The prompt may have changed since its words were shown.
        words, _ = words_of(prompt, self._server.models.tokenizer(model), earlier=words_from(chips))
        # A number that is shown shorter than it is, and wasn't changed, is the recipe's own.
        own = Form(recipe=recipe).recipe_of(self._server.models.get(model))
        numbers = {
            "step_size": step_size,
            "altered": altered,
            "max_refinements": max_refinements,
            "sigma": sigma,
        }
        knobs = {
            name: value
            for name, value in numbers.items()
            if value is not None and value != _shown(getattr(own, name))
        }
        return checked_form(
            prompt=prompt,
            subjects=subjects_of(words),
            model=model,
            method=method,
            recipe=recipe,
            **knobs,
            pictures=_whole(pictures),
            best=best,
            best_of=_whole(best_of),
            seed=secrets.randbelow(2**31) if random else int(seed or 0),
            steps=_whole(steps),
            scheduler=scheduler or "",
            guidance=guidance,
            negative=negative,
            width=_whole(width),
            height=_whole(height),
            image=image,
            strength=float(strength),
            mask=mask,
        )

    def read_link(self, *values: Any) -> tuple[str, str]:
        """The query part of the link to what the form says, and "", or the other way round what is wrong."""
        try:
            form = self.read(*values)
            # Beside brackets a link can name no subjects.
            return resolved(form, self._server.models.tokenizer(form.model)).to_query(), ""
        except ValueError as error:
            return "", views.note(sentence(error))

    def fill(self, form: Form) -> dict[Any, Any]:
        """What makes the page say that.

        Raises:
            ValueError: it speaks of a model that is not served, asks for too much, or the like.
        """
        model = self._server.models.get(form.model)
        form = form.on(model)
        # The recipe is filled in also where another method is chosen.
        for method in (method_named(form.method), AttendAndExcite()):
            limits.check(form.settings(model, method), form.seeds, model)
        unread = self._server.models.unread(form.model)
        words = words_of(form.prompt, model.tokenizer, form.subjects, unread_of=unread)
        return {
            self.prompt: form.prompt,
            self._model: form.model or self._server.models.names[0],
            self._method: form.method,
            self._knobs: _knobs(form.method),
            self._recipe: form.recipe,
            self._pictures: form.pictures,
            self._best_of: form.best_of,
            self.seed: form.seed,
            self._random: False,
            self._negative: form.negative,
            self._image: form.image,
            self._strength: form.strength,
            self._mask: form.mask,
            **self._of_model(form, model),
            self._best: _best(model, form.best),
            self._chips: words_document(*words, form.prompt),
        }

    @property
    def filled(self) -> list[Any]:
        """The parts that `fill` fills."""
        return [*self.inputs, self._knobs, self._examples, self._about]

    def _wire(self) -> None:
        self.prompt.change(
            self._read_words,
            [self.prompt, self._chips, self._model],
            self._chips,
            trigger_mode="always_last",
            **AT_ONCE,
        )
        self._method.change(
            _knobs,
            self._method,
            self._knobs,
            **AT_ONCE,
        )
        self._recipe.input(self._follow_recipe, [self._model, self._recipe], self._recipe_parts, **AT_ONCE)
        self._model.input(
            self._follow_model,
            [self.prompt, self._chips, self._model, self._recipe],
            [
                self._chips,
                *self._recipe_parts,
                self._width,
                self._height,
                self._steps,
                self._guidance,
                self._scheduler,
                self._best,
                self._examples,
                self._about,
            ],
            # Behind another visitor's run it would come after the click on Draw, which reads what it fills.
            **AT_ONCE,
        )
        self._examples.click(
            self._take_example,
            [self._examples, self._model],
            [self.prompt, self._chips],
            **AT_ONCE,
        )

    def _read_words(self, prompt: str, chips: Any, model: str) -> dict[str, Any]:
        try:
            models, earlier = self._server.models, () if chips is None else words_from(chips)
            words = words_of(prompt, models.tokenizer(model), earlier=earlier, unread_of=models.unread(model))
            return words_document(*words, prompt)
        except ValueError as error:
            return words_document((), sentence(error))

    def _take_example(self, index: int, model: str) -> tuple[str, dict[str, Any]]:
        with failures_as_errors():
            (prompt,) = picked(examples(model), index, "example")
        # Another prompt, and so none of the clicks on the words of the one before.
        return prompt, self._read_words(prompt, None, model)

    def _follow_model(self, prompt: str, chips: Any, name: str, recipe: str) -> dict[Any, Any]:
        with failures_as_errors():
            model = self._server.models.get(name)
            values = self._of_model(Form(recipe=recipe).on(model), model)
            return {self._chips: self._read_words(prompt, chips, name)} | values

    def _follow_recipe(self, name: str, recipe: str) -> dict[Any, Any]:
        with failures_as_errors():
            return self._numbers(Form(recipe=recipe), self._server.models.get(name))

    def _numbers(self, form: Form, model: Model) -> dict[Any, Any]:
        recipe = form.recipe_of(model)
        return {
            self._step_size: _shown(recipe.step_size),
            self._altered: _shown(recipe.altered),
            self._max_refinements: recipe.max_refinements,
            self._sigma: _shown(recipe.sigma),
        }

    def _of_model(self, form: Form, model: Model) -> dict[Any, Any]:
        """What depends on the model: the recipe's numbers, the sizes, the examples and the like."""
        height, width = model.default_size
        return {
            **self._numbers(form, model),
            self._steps: form.steps,
            self._guidance: form.guidance,
            self._scheduler: gr.Dropdown(_schedulers(model), value=form.scheduler),
            self._width: gr.Slider(value=form.width or width, **_sides(model)),
            self._height: gr.Slider(value=form.height or height, **_sides(model)),
            self._best: _best(model),
            self._examples: gr.Dataset(samples=examples(model.name)),
            self._about: views.about_view(*about(model.name)),
        }


def _knobs(method: str) -> gr.Accordion:
    """The recipe's numbers, for the methods that go by them."""
    return gr.Accordion(visible=isinstance(method_named(method), AttendAndExcite))


def _best(model: Model, ticked: bool | None = None) -> gr.Checkbox:
    """The box for the best of the pictures: unticked where nobody can tell, and None as it was."""
    if judge_of(model.name) is None:
        return gr.Checkbox(False, visible=False)
    return gr.Checkbox(visible=True) if ticked is None else gr.Checkbox(ticked, visible=True)


def _sides(model: Model) -> dict[str, Any]:
    """The longest side of a picture, and what a side is a multiple of."""
    most = int(limits.MAX_PIXELS * min(model.default_size))
    return {"maximum": most, "step": model.family.size_factor}


def _schedulers(model: Model) -> list[tuple[str, str]]:
    """The schedulers that fit a model as choices, its own first."""
    own = model.pipeline.scheduler
    fitting = [(title, name) for name, title in fitting_schedulers(own).items()]
    return [(f"the model's own ({type(own).__name__.removesuffix('Scheduler')})", ""), *fitting]


def _whole(number: Any) -> Any:
    """What a slider says, which may be 4.0."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _shown(number: float) -> float:
    """A number of a recipe as short as people want it."""
    return round(number, 3)
