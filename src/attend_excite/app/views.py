"""The parts of the page that Gradio lacks: chips, pictures side by side, progress, history.

What is shown is written here as HTML, every text in it escaped: a prompt can come from anyone's link. Nothing
of it may go through the templates of `gr.HTML`, which run what stands in ${...} in a value of theirs.
"""

from __future__ import annotations

import base64
import io
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from PIL import Image

from attend_excite.app.actions import Drawn, Kept, Progress, Redrawn
from attend_excite.app.opening import Opening
from attend_excite.sheets import SUBJECT_COLOURS, subject_name
from attend_excite.subjects import Prompt
from attend_excite.verdict import Verdict, as_asked

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


def empty_view(opening: Opening | None = None) -> str:
    """Before the first run: an example, where there is one of the model's."""
    if opening is None:
        return '<p class="ae-empty">Press Draw: the pictures appear here as they form.</p>'
    alt = escape(opening.prompt.text)
    rows = [
        [
            _Cell(label, f'<img src="{escape(url)}" alt="{alt}, {escape(label)}">', verdict)
            for url, verdict in row
        ]
        for label, row in opening.pictures.items()
    ]
    return (
        f"{_title(opening.prompt)}{_sets(opening.prompt, opening.seeds, rows)}"
        '<p class="ae-note">An example that was drawn beforehand. Press Draw to see it come about, or ask '
        "for something else.</p>"
    )


def about_view(about: str, words: Mapping[str, Sequence[str]]) -> str:
    """What a model is, and the words that it knows by kind, where they can be told."""
    known = " and ".join(f"{len(row)} {kind}" for kind, row in words.items())
    text = escape(about) + (f" It knows {known}: other words mean nothing to it." if known else "")
    rows = "".join(
        f"<p><b>{escape(kind.capitalize())}:</b> {escape(', '.join(row))}</p>" for kind, row in words.items()
    )
    more = f"<details><summary>Which?</summary>{rows}</details>" if rows else ""
    return f'<div class="ae-about"><p>{text}</p>{more}</div>'


def waiting_view(before: int = 0) -> str:
    """Before the first step."""
    first = f": {before} {'run comes' if before == 1 else 'runs come'} first" if before else " …"
    return f'<p class="ae-note ae-under-way" role="status">Waiting for the model{first}</p>'


def stopped_view(progress: Progress | None = None, seeds: Sequence[int] = ()) -> str:
    """After Stop: how far the pictures had come."""
    if progress is None or not progress.pictures:
        return note("Stopped.")
    return note(f"Stopped at step {progress.done} of {progress.total}.") + _in_the_making(progress, seeds)


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
    return bar + _in_the_making(progress, seeds)


def drawn_view(drawn: Drawn, chosen: int | None = None) -> str:
    """The methods side by side, each picture with which subjects it shows.

    Args:
        drawn: the run.
        chosen: the index of the seed that is looked at more closely; None: none can be.
    """
    refused = "".join(note(f"{label}: {why}") for label, why in drawn.refused.items())
    return _pictures_view(drawn, chosen, _best_of(drawn)) + refused


def kept_view(kept: Kept) -> str:
    """Pictures of an earlier run."""
    return _pictures_view(kept) + note(
        "These are the pictures of that run. Press Draw for the maps and curves; where it began from a "
        "picture, give that again first."
    )


def gone_view(title: str) -> str:
    """An earlier run whose pictures the server hasn't any more."""
    return f'<h3 class="ae-title">{escape(title)}</h3>' + note(
        "The server no longer has these pictures. The form is filled in: press Draw for the same ones again; "
        "where they began from a picture, give that again first."
    )


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
    return f'<div class="ae-sets" data-many="true">{"".join(sections)}</div>'


def redrawn_view(redrawn: Redrawn) -> str:
    """A picture that was drawn again, and whether it is the same."""
    settings = redrawn.origin.settings
    same = (
        "The same picture, to the pixel."
        if not redrawn.differing
        else (f"{redrawn.differing} pixels differ. " + " ".join(redrawn.notes))
    )
    scheduler = f" of {settings.scheduler}" if settings.scheduler else ""
    made = (
        f"{settings.model} · {settings.method.name} · {settings.steps} steps{scheduler} · "
        f"guidance {settings.guidance_scale:g} · {settings.width}x{settings.height} pixels"
    )
    cell = _Cell("drawn again", _picture(redrawn.file, "drawn again"), redrawn.verdict)
    return (
        f'{_title(redrawn.prompt)}<p class="ae-verdict" role="status">{escape(same)}</p>'
        f"{_sets(redrawn.prompt, [redrawn.origin.seed], [[cell]])}{note(made)}"
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


@dataclass(frozen=True)
class _Cell:
    """A picture with its label and, where it is done, which subjects it shows."""

    label: str
    picture: str
    verdict: Verdict = field(default_factory=dict)


def _pictures_view(shown: Drawn | Kept, chosen: int | None = None, remark: str = "") -> str:
    rows = []
    for label, paths in shown.files.items():
        names = [f"{shown.prompt.text}, {label}, seed {seed}" for seed in shown.seeds]
        pictures = map(_picture, paths, names)
        rows.append([_Cell(label, *cell) for cell in zip(pictures, shown.verdicts[label], strict=True)])
    told = (
        f'<p class="ae-tally" role="status">{escape(text)}</p>' if (text := remark or _tally(shown)) else ""
    )
    return f"{_title(shown.prompt)}{told}{_sets(shown.prompt, shown.seeds, rows, chosen)}"


def _best_of(drawn: Drawn) -> str:
    if not drawn.form.best or len(drawn.form.seeds) == 1 or len(drawn.seeds) > 1:
        return ""
    first, last = drawn.form.seeds[0], drawn.form.seeds[-1]
    return f"Seed {drawn.seeds[0]} shows the most of the seeds {first} to {last}."


def _tally(shown: Drawn | Kept) -> str:
    """In how many of several pictures all is as asked, method by method."""
    groups, number = shown.prompt.groups, len(shown.seeds)
    judged = [verdict for row in shown.verdicts.values() for verdict in row]
    if number < 2 or not groups or any(None in verdict.values() for verdict in judged):
        return ""
    counts = [
        f"{label} {sum(as_asked(verdict, groups) == len(groups) for verdict in row)} of {number}"
        for label, row in shown.verdicts.items()
    ]
    return f"All is there: {' · '.join(counts)}"


def _in_the_making(progress: Progress, seeds: Sequence[int]) -> str:
    rows = [
        [
            _Cell(label, f'<img src="{data_url(picture, _PREVIEW)}" alt="in the making">')
            for picture in pictures
        ]
        for label, pictures in progress.pictures.items()
    ]
    return _sets(None, seeds, rows)


def _sets(
    prompt: Prompt | None, seeds: Sequence[int], rows: Sequence[Sequence[_Cell]], chosen: int | None = None
) -> str:
    """A card a seed, in it the methods side by side; `rows` has a row a method, a cell a seed."""
    sets = []
    for index, seed in enumerate(seeds):
        figures = "".join(
            f"<figure><figcaption>{escape(row[index].label)}</figcaption>{row[index].picture}"
            f"{_verdict(row[index].verdict, prompt)}</figure>"
            for row in rows
        )
        pressed = str(index == chosen).lower()
        title = f"seed {seed}"
        if chosen is not None and len(seeds) > 1:
            title = (
                f'<button type="button" data-index="{index}" aria-pressed="{pressed}" '
                f'title="Look closer at this one">{title}</button>'
            )
        sets.append(
            f'<section data-chosen="{pressed}"><h4>{title}</h4><div class="ae-row">{figures}</div></section>'
        )
    many = str(len(seeds) > 1 and len(rows) <= 2).lower()
    return f'<div class="ae-sets" data-many="{many}">{"".join(sets)}</div>'


def _verdict(verdict: Verdict, prompt: Prompt | None) -> str:
    """Which subjects a picture shows, "cat ✓ frog ✗"; nothing, where nobody can tell."""
    if prompt is None or all(there is None for there in verdict.values()):
        return ""
    said = []
    for group in prompt.groups:
        there = verdict.get(group.text)
        fits = "unknown" if there is None else "yes" if there is not group.negated else "no"
        name = f"no {group.text}" if group.negated else group.text
        mark, title = _MARKS[fits]
        said.append(f'<li data-fits="{fits}" title="{title}">{escape(name)}&nbsp;{mark}</li>')
    return f'<ul class="ae-shows" aria-label="by the bundled judge">{"".join(said)}</ul>'


_MARKS = {
    "yes": ("✓", "As asked, says the bundled judge, which looks neither at numbers nor at colours"),
    "no": ("✗", "Not as asked, says the bundled judge"),
    "unknown": ("?", "The bundled judge doesn't know this word"),
}


def _picture(path: Path, alternative: str) -> str:
    """A picture that a click enlarges, and the file that it is: saving it keeps what it says of itself."""
    url, large = f"gradio_api/file={quote(str(path))}", f"ae-{secrets.token_hex(6)}"
    image = f'<img src="{url}" alt="{escape(alternative)}">'
    return (
        f'<button type="button" class="ae-enlarge" popovertarget="{large}" title="Enlarge">{image}</button>'
        f'<div popover id="{large}" class="ae-large">{image}'
        f'<p><a href="{url}" download="{escape(path.name)}">Save the PNG</a>'
        f'<button type="button" popovertarget="{large}">Close</button></p></div>'
    )


def _title(prompt: Prompt) -> str:
    return f'<h3 class="ae-title">{escape(prompt.text)}</h3>'


def _duration(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"
