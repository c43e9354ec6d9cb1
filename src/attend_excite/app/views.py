"""The parts of the page that Gradio lacks: chips, pictures side by side, progress, history.

What is shown is written here as HTML, every text in it escaped: a prompt can come from anyone's link. Nothing
of it may go through the templates of `gr.HTML`, which run what stands in ${...} in a value of theirs.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from PIL import Image

from attend_excite.app.actions import Drawn, Progress, Redrawn
from attend_excite.sheets import SUBJECT_COLOURS, subject_name
from attend_excite.subjects import Prompt

PICTURE_URL = "data:image/webp;base64,"

_THUMBNAIL, _PREVIEW = 96, 320
"""Pixels of the longer side."""

_CLICKS = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-index]");
  if (button) trigger("click", { index: Number(button.dataset.index) });
});
"""


def chips(value: Mapping[str, Any], **options: Any) -> gr.HTML:
    """A prompt's words as buttons: its value is what `words.words_document` gives."""
    template = (
        '<div class="ae-chips" role="group" aria-label="subjects among the words of the prompt"></div>'
        '<ul class="ae-subjects"></ul><p class="ae-note" role="status"></p>'
    )
    script = files("attend_excite.app").joinpath("chips.js").read_text(encoding="utf-8")
    return gr.HTML(value, html_template=template, js_on_load=script, apply_default_css=False, **options)


def clickable(value: str, **options: Any) -> gr.HTML:
    """HTML whose buttons with a data-index are clicks that carry it."""
    return gr.HTML(value, js_on_load=_CLICKS, apply_default_css=False, **options)


def empty_view() -> str:
    """Before the first run."""
    return '<p class="ae-empty">Press Draw: the pictures appear here as they form.</p>'


def waiting_view() -> str:
    """Before the first step."""
    return '<p class="ae-note ae-under-way" role="status">Waiting for the model …</p>'


def stopped_view() -> str:
    """After Stop."""
    return note("Stopped.")


def note(text: str) -> str:
    """A short message."""
    return f'<p class="ae-note" role="status">{escape(text)}</p>'


def problem_view(message: str) -> str:
    """What is wrong, in one sentence."""
    return f'<p class="ae-problem" role="alert">{escape(message)}</p>'


def sentence(error: Exception) -> str:
    """An error of the library as a sentence of its own."""
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


def progress_view(progress: Progress, seeds: Sequence[int]) -> str:
    """A bar, the time left, and the pictures as they form."""
    bar = (
        f'<div class="ae-progress ae-under-way"><progress value="{progress.done}" max="{progress.total}" '
        f'aria-label="steps"></progress><span>{escape(progress.doing)}: step {progress.done} of '
        f"{progress.total} · {_duration(progress.seconds_left)} left</span></div>"
    )
    cells = {
        label: [f'<img src="{data_url(picture, _PREVIEW)}" alt="in the making">' for picture in pictures]
        for label, pictures in progress.pictures.items()
    }
    return bar + _sets(seeds, cells)


def drawn_view(drawn: Drawn, chosen: int | None = None) -> str:
    """The methods side by side, a row a seed, each picture a file to take away.

    Args:
        drawn: the run.
        chosen: the index of the seed that is looked at more closely; None: none can be.
    """
    cells: dict[str, list[str]] = {}
    for label, paths in drawn.files.items():
        names = [f"{drawn.prompt.text}, {label}, seed {seed}" for seed in drawn.form.seeds]
        cells[label] = list(map(_picture, paths, names))
    refused = "".join(note(f"{label}: {why}") for label, why in drawn.refused.items())
    return _title(drawn.prompt) + _sets(drawn.form.seeds, cells, chosen) + refused


def overlays_view(prompt: Prompt, rows: Mapping[str, Sequence[Image.Image]]) -> str:
    """Where each subject was attended to: a row a method, a column a subject."""
    if not rows or not prompt.groups:
        return note("No maps: choose a subject, and a method that attends to the whole prompt.")
    sections = []
    for label, pictures in rows.items():
        figures = "".join(
            f'<figure><img src="{data_url(picture, _PREVIEW)}" alt="attention to {escape(group.text)}, '
            f'{escape(label)}"><figcaption><b data-subject="{index % len(SUBJECT_COLOURS)}">'
            f"{escape(subject_name(group))}</b></figcaption></figure>"
            for index, (group, picture) in enumerate(zip(prompt.groups, pictures, strict=True))
        )
        sections.append(f'<section><h4>{escape(label)}</h4><div class="ae-row">{figures}</div></section>')
    return f'<div class="ae-sets">{"".join(sections)}</div>'


def redrawn_view(redrawn: Redrawn) -> str:
    """A picture that was drawn again, and whether it is the same."""
    settings = redrawn.origin.settings
    same = (
        "The same picture, to the pixel."
        if not redrawn.differing
        else (f"{redrawn.differing} pixels differ. " + " ".join(redrawn.notes))
    )
    made = (
        f"{settings.model} · {settings.method.name} · seed {redrawn.origin.seed} · {settings.steps} steps · "
        f"guidance {settings.guidance_scale:g} · {settings.width}x{settings.height} pixels"
    )
    figure = f"<figure>{_picture(redrawn.file, 'drawn again')}</figure>"
    return (
        f'<h3 class="ae-title">{escape(settings.prompt)}</h3>{note(made)}'
        f'<p class="ae-verdict" role="status">{escape(same)}</p><div class="ae-row">{figure}</div>'
    )


def history_view(entries: Iterable[Mapping[str, Any]]) -> str:
    """Runs of this browser, the latest first, each a button."""
    rows = [
        f'<li><button type="button" data-index="{index}">'
        + "".join(f'<img src="{escape(str(url))}" alt="">' for url in entry["pictures"])
        + f"<span><b>{escape(str(entry['title']))}</b><small>{escape(str(entry['made']))}</small></span>"
        "</button></li>"
        for index, entry in enumerate(entries)
    ]
    if not rows:
        return note("Nothing yet. What you draw is remembered here, in this browser alone.")
    return f'<ul class="ae-history">{"".join(rows)}</ul>'


def data_url(picture: Image.Image, side: int = _THUMBNAIL) -> str:
    """A small copy of a picture that needs no file."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return PICTURE_URL + base64.b64encode(buffer.getvalue()).decode()


def _sets(seeds: Sequence[int], cells: Mapping[str, Sequence[str]], chosen: int | None = None) -> str:
    sets = []
    for index, seed in enumerate(seeds):
        figures = "".join(
            f"<figure>{row[index]}<figcaption>{escape(label)}</figcaption></figure>"
            for label, row in cells.items()
        )
        pressed = str(index == chosen).lower()
        title = f"seed {seed}"
        if chosen is not None and len(seeds) > 1:
            title = f'<button type="button" data-index="{index}" aria-pressed="{pressed}">{title}</button>'
        sets.append(
            f'<section data-chosen="{pressed}"><h4>{title}</h4><div class="ae-row">{figures}</div></section>'
        )
    return f'<div class="ae-sets">{"".join(sets)}</div>'


def _picture(path: Path, alternative: str) -> str:
    """A picture as the file that it is: saving it keeps what it says of itself."""
    url = f"gradio_api/file={quote(str(path))}"
    return (
        f'<a href="{url}" download="{escape(path.name)}" title="Download the PNG">'
        f'<img src="{url}" alt="{escape(alternative)}"></a>'
    )


def _title(prompt: Prompt) -> str:
    return f'<h3 class="ae-title">{escape(prompt.text)}</h3>'


def _duration(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"
