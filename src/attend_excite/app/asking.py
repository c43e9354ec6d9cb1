"""The left half of the page: what a visitor asks for."""

from __future__ import annotations

import json
import secrets
from importlib.resources import files
from typing import Any

import gradio as gr

from attend_excite.app import limits, views
from attend_excite.app.actions import Server, resolved
from attend_excite.app.api import failures_as_errors
from attend_excite.app.events import AT_ONCE
from attend_excite.app.forms import RECOMMENDED, Form
from attend_excite.app.views import sentence
from attend_excite.app.words import subjects_of, words_document, words_from, words_of
from attend_excite.guidance.schedule import recipe_names
from attend_excite.methods import METHODS, AttendAndExcite, method_named
from attend_excite.models import Model

_FIRST = Form()


class Asking:
    """The form: its parts, and what happens among them.

    Attributes:
        prompt: the prompt.
        draw: the button that starts a run.
        stop: the button that ends it.
        seed: of the first picture.
        copy_link: the button for the link to this form.
        copied: where it is said what became of the link.
        inputs: what `read` takes, and `fill` fills, in their order.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        # What the page says from the start is what Draw does, even before the address has been read.
        model = server.models.get(_FIRST.model)
        recipe = model.recipe
        height, width = model.default_size
        self.prompt = gr.Textbox(
            _FIRST.prompt,
            label="What to draw",
            max_lines=4,
            max_length=limits.MAX_PROMPT,
            elem_id="ae-prompt",
        )
        words = words_document(*words_of(_FIRST.prompt, model.tokenizer))
        self._chips = views.chips(words, elem_id="ae-words")
        with gr.Row(elem_id="ae-go"):
            self.draw = gr.Button("Draw", variant="primary", elem_id="ae-draw", scale=3, min_width=120)
            self.stop = gr.Button("Stop", elem_id="ae-stop", scale=1, min_width=80)
        # Only Stable Diffusion's own pictures may be called so.
        titles = {name: method_named(name).title for name in METHODS}
        titles["stable-diffusion"] = "the plain model alone"
        self._method = gr.Dropdown(
            [(titles[name], name) for name in METHODS],
            value=_FIRST.method,
            label="Method",
            elem_id="ae-method",
        )
        self._pictures = gr.Slider(1, limits.MAX_PICTURES, _FIRST.pictures, step=1, label="Pictures")
        with gr.Row(elem_id="ae-seeds"):
            self.seed = gr.Number(
                _FIRST.seed,
                label="First seed",
                precision=0,
                minimum=0,
                maximum=limits.MAX_SEED,
                min_width=120,
            )
            self._random = gr.Checkbox(label="another one each time", container=False, min_width=150)
        with gr.Accordion("Recipe of Attend-and-Excite", open=False) as self._knobs:
            self._recipe = gr.Dropdown(
                [RECOMMENDED, *recipe_names()], value=_FIRST.recipe, label="Start from"
            )
            self._step_size = gr.Number(recipe.step_size, label="Step size α", minimum=0, step=0.5)
            self._altered = gr.Slider(
                0, 1, recipe.altered, step=0.05, label="Share of the steps that is altered"
            )
            self._max_refinements = gr.Slider(
                0,
                limits.MAX_REFINEMENTS,
                recipe.max_refinements,
                step=1,
                label="Refinements at each threshold, at most",
            )
            self._sigma = gr.Number(
                recipe.sigma, label="Smoothing σ, in patches of the map", minimum=0, step=0.1
            )
            self._recipe_parts = [self._step_size, self._altered, self._max_refinements, self._sigma]
        with gr.Accordion("Model, steps and size", open=False):
            names = list(server.models.names)
            self._model = gr.Dropdown(names, value=names[0], label="Model", elem_id="ae-model")
            self._steps = gr.Slider(
                1, limits.MAX_STEPS, _FIRST.steps, step=1, label="Steps", elem_id="ae-steps"
            )
            self._guidance = gr.Slider(0, limits.MAX_GUIDANCE, _FIRST.guidance, step=0.5, label="Guidance")
            with gr.Row():
                self._width, self._height = (
                    gr.Slider(limits.MIN_SIDE, value=side, label=label, min_width=140, **_sides(model))
                    for side, label in ((width, "Width in pixels"), (height, "Height in pixels"))
                )
        self._examples = gr.Dataset(
            components=[self.prompt],
            samples=_examples(model.name),
            label="From the paper",
            elem_id="ae-examples",
        )
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
            self.seed,
            self._random,
            self._steps,
            self._guidance,
            self._width,
            self._height,
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
        seed: int | None,
        random: bool,
        steps: int,
        guidance: float,
        width: int,
        height: int,
    ) -> Form:
        """What the form says. A first seed that is random is drawn here.

        Raises:
            ValueError: the prompt cannot be read.
        """
        # The prompt may have changed since its words were shown.
        words, _ = words_of(prompt, self._server.models.tokenizer(model), earlier=words_from(chips))
        return Form(
            prompt=prompt,
            subjects=subjects_of(words),
            model=model,
            method=method,
            recipe=recipe,
            step_size=step_size,
            altered=altered,
            max_refinements=int(max_refinements),
            sigma=sigma,
            pictures=int(pictures),
            seed=secrets.randbelow(2**31) if random else int(seed or 0),
            steps=int(steps),
            guidance=guidance,
            width=int(width),
            height=int(height),
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
        # The recipe is filled in also where another method is chosen.
        for method in (method_named(form.method), AttendAndExcite()):
            limits.check(form.settings(model, method), form.seeds, model)
        words = words_of(form.prompt, model.tokenizer, form.subjects)
        return {
            self.prompt: form.prompt,
            self._model: form.model or self._server.models.names[0],
            self._method: form.method,
            self._knobs: gr.Accordion(visible=form.method == "attend-excite"),
            self._recipe: form.recipe,
            self._pictures: form.pictures,
            self.seed: form.seed,
            self._random: False,
            self._steps: form.steps,
            self._guidance: form.guidance,
            **self._of_model(form, model),
            self._chips: words_document(*words),
        }

    @property
    def filled(self) -> list[Any]:
        """The parts that `fill` fills."""
        return [*self.inputs, self._knobs, self._examples]

    def _wire(self) -> None:
        self.prompt.change(
            self._read_words,
            [self.prompt, self._chips, self._model],
            self._chips,
            trigger_mode="always_last",
            **AT_ONCE,
        )
        self._method.change(
            lambda method: gr.Accordion(visible=method == "attend-excite"),
            self._method,
            self._knobs,
            **AT_ONCE,
        )
        gr.on(
            [self._recipe.input, self._model.input],
            self._follow_model,
            [self.prompt, self._chips, self._model, self._recipe],
            [self._chips, *self._recipe_parts, self._width, self._height, self._examples],
            # Behind another visitor's run it would come after the click on Draw, which reads what it fills.
            **AT_ONCE,
        )
        self._examples.click(lambda sample: sample[0], self._examples, self.prompt, **AT_ONCE)

    def _read_words(self, prompt: str, chips: Any, model: str) -> dict[str, Any]:
        try:
            tokenizer = self._server.models.tokenizer(model)
            return words_document(*words_of(prompt, tokenizer, earlier=words_from(chips)))
        except ValueError as error:
            return words_document((), sentence(error))

    def _follow_model(self, prompt: str, chips: Any, name: str, recipe: str) -> dict[Any, Any]:
        with failures_as_errors():
            values = self._of_model(Form(recipe=recipe), self._server.models.get(name))
            return {self._chips: self._read_words(prompt, chips, name)} | values

    def _of_model(self, form: Form, model: Model) -> dict[Any, Any]:
        """What depends on the model: the recipe's numbers, the sizes, the examples."""
        recipe = form.recipe_of(model)
        height, width = model.default_size
        return {
            self._step_size: recipe.step_size,
            self._altered: recipe.altered,
            self._max_refinements: recipe.max_refinements,
            self._sigma: recipe.sigma,
            self._width: gr.Slider(value=form.width or width, **_sides(model)),
            self._height: gr.Slider(value=form.height or height, **_sides(model)),
            self._examples: gr.Dataset(samples=_examples(model.name)),
        }


def _sides(model: Model) -> dict[str, Any]:
    """The longest side of a picture, and what a side is a multiple of."""
    most = int(limits.MAX_PIXELS * min(model.default_size))
    return {"maximum": most, "step": model.family.size_factor}


def _examples(model: str) -> list[list[str]]:
    """The paper's prompts; of the bundled model those that it knows the words of."""
    examples = json.loads(files("attend_excite").joinpath("data/examples.json").read_text(encoding="utf-8"))
    return [[example["prompt"]] for example in examples if example["stickers"] or model != "stickers"]
