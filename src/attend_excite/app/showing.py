"""The right half of the page: what came out."""

from __future__ import annotations

from typing import Any

import gradio as gr

from attend_excite.app import limits, views
from attend_excite.app.actions import Drawn, overlays
from attend_excite.app.api import failures_as_errors
from attend_excite.app.events import AT_ONCE
from attend_excite.app.opening import Opening
from attend_excite.app.parts import picked
from attend_excite.explain import curves_figure

_SECONDS_KEPT = 3600
"""How long the server keeps the maps of a visitor's last run."""


class Pictures:
    """A run of the form, and a closer look at one of its seeds.

    Attributes:
        stage: the pictures side by side.
        drawn: the run, or None.
        look_outputs: what `look` fills.
    """

    def __init__(self, opening: Opening | None) -> None:
        self.stage = views.clickable(views.empty_view(opening), elem_id="ae-stage")
        self.drawn = gr.State(None, time_to_live=_SECONDS_KEPT)
        self._chosen = gr.State(0)
        with gr.Column(visible=False, elem_id="ae-closer") as self._closer, gr.Tabs():
            with gr.Tab("Attention"):
                self._step = gr.Slider(0, 1, step=1, label="Step", elem_id="ae-step")
                self._maps = gr.HTML(apply_default_css=False, elem_id="ae-maps")
            with gr.Tab("Slider"):
                self._slider = gr.ImageSlider(type="filepath", interactive=False, elem_id="ae-slider")
            with gr.Tab("Curves"):
                self._curves = gr.Plot(show_label=False, elem_id="ae-curves")
            with gr.Tab("Files"):
                self._files = gr.Files(label="Pictures, maps and recipe", interactive=False)
        self.look_outputs = [
            self.stage,
            self._chosen,
            self._closer,
            self._slider,
            self._step,
            self._maps,
            self._curves,
            self._files,
        ]
        self.stage.click(self._choose, self.drawn, self.look_outputs, **AT_ONCE)
        self._step.change(
            self._show_maps,
            [self.drawn, self._chosen, self._step],
            self._maps,
            trigger_mode="always_last",
            **AT_ONCE,
        )

    def look(self, drawn: Drawn | None, chosen: int = 0) -> dict[Any, Any]:
        """Everything about one seed of a run."""
        if drawn is None:
            return {self._closer: gr.Column(visible=False)}
        paths = [str(row[chosen]) for row in drawn.files.values()]
        last = _last_step(drawn, chosen)
        labels = list(drawn.files)
        nursed = any(run.prompts[0].groups for run in drawn.with_maps.values())
        return {
            self.stage: views.drawn_view(drawn, chosen),
            self._chosen: chosen,
            self._closer: gr.Column(visible=True),
            self._slider: gr.ImageSlider(
                (paths[0], paths[-1]), label=f"{labels[0]} on the left, {labels[-1]} on the right"
            ),
            self._step: gr.Slider(maximum=last, value=last),
            self._maps: self._show_maps(drawn, chosen, last),
            self._curves: curves_figure(drawn.with_maps, drawn.recipe, chosen) if nursed else None,
            self._files: _paths(drawn),
        }

    def _choose(self, drawn: Drawn | None, click: gr.EventData) -> dict[Any, Any]:
        with failures_as_errors():
            if drawn is not None:
                picked(drawn.seeds, click.index, "picture")
            return self.look(drawn, click.index)

    def _show_maps(self, drawn: Drawn | None, chosen: int, step: float) -> str:
        if drawn is None:
            return ""
        # The slider may still be that of a run of more steps.
        step = min(int(step), _last_step(drawn, chosen))
        return views.overlays_view(drawn.prompt, overlays(drawn, chosen, step))


class Comparison:
    """All methods on the form's prompt and seeds."""

    def __init__(self) -> None:
        gr.Markdown(
            "The paper's five methods, as far as the model takes them, on the prompt and seeds of the form, "
            "from the same noise."
        )
        self.button = gr.Button(
            "Compare the methods", variant="primary", elem_id="ae-compare", interactive=False
        )
        self.stage = gr.HTML(apply_default_css=False, elem_id="ae-compare-stage")
        self.drawn = gr.State(None, time_to_live=_SECONDS_KEPT)
        self.files = gr.Files(label="Pictures and sheet", interactive=False, visible=False)

    def offer(self, drawn: Drawn | None) -> Any:
        """The files of the run."""
        if drawn is None:
            return gr.Files(visible=False)
        return gr.Files(_paths(drawn), visible=True)


class Again:
    """A picture drawn again from what its file says.

    Attributes:
        file: the picture that is dropped.
        stage: what came of it.
        use: the button that fills the form in as the file says.
    """

    def __init__(self) -> None:
        self.file = gr.File(
            label=f"Drop a PNG that attend-excite made, up to {limits.MAX_UPLOAD // 2**20} MB",
            file_types=[".png"],
            height=150,
            elem_id="ae-drop",
        )
        self.use = gr.Button("Fill the form in like this", size="sm", elem_id="ae-use", interactive=False)
        self.stage = gr.HTML(apply_default_css=False, elem_id="ae-again-stage")


def _last_step(drawn: Drawn, chosen: int) -> int:
    return len(next(iter(drawn.generations.values())).trace[chosen].steps) - 1


def _paths(drawn: Drawn) -> list[str]:
    return [str(path) for path in (*(path for row in drawn.files.values() for path in row), *drawn.extras)]
