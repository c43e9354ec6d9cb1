"""The page: its halves, and how they work together."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from gradio import themes

from attend_excite.app import history, limits, views
from attend_excite.app.actions import Drawn, Redrawn, Report, Server, compare, draw, draw_again
from attend_excite.app.api import add_endpoints
from attend_excite.app.asking import Asking
from attend_excite.app.events import AT_ONCE, IN_TURN, RUN, watched
from attend_excite.app.forms import Form
from attend_excite.app.jobs import Stops
from attend_excite.app.models import Models
from attend_excite.app.showing import Again, Comparison, Pictures
from attend_excite.methods import method_named

_SESSIONS = 50
"""Visitors whose last run the server keeps for a closer look."""

_CACHE = (3600, 24 * 3600)
"""Seconds between two looks at Gradio's copies of files, and the age at which they go."""

_HEADER = (
    '<header class="ae-header"><h1>Attend-and-Excite</h1><p>Draw everything that a prompt asks for. '
    "Each picture beside that of the plain model, from the same noise.</p></header>"
)
_BUSY = "Too many runs are waiting: try again in a minute."
_SCROLL_ON_PHONES = """(...values) => {
  if (innerWidth < 800) document.querySelector("#ae-results").scrollIntoView({ behavior: "smooth" });
  return values;
}"""
_UNDER_WAY = """() => [
  Object.entries({ pictures: "#ae-stage", compare: "#ae-compare-stage", again: "#ae-again-stage" })
    .filter(([, stage]) => document.querySelector(`${stage} .ae-under-way`))
    .map(([name]) => name).join(" ")
]"""
_READ_ADDRESS = "() => [location.search]"
_SHOW_LINK = "(query) => { if (query) history.replaceState(null, '', `?${query}`); }"
_COPY_LINK = f"""async (query, problem) => {{
  if (!query) return [problem];
  history.replaceState(null, "", `?${{query}}`);
  try {{
    await navigator.clipboard.writeText(location.href);
    return [{json.dumps(views.note("Copied."))}];
  }} catch {{  // Browsers let pages copy only over HTTPS or from this machine.
    return [{json.dumps(views.note("The link stands in the address bar."))}];
  }}
}}"""


@contextmanager
def serving(
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    login: tuple[str, str] | None = None,
    share: bool = False,
) -> Iterator[gr.Blocks]:
    """Serve the page as long as the block runs; `local_url` of what it gives is the page's address.

    Args:
        models: what visitors may choose from; the first is loaded before the page is there.
        host: the address to listen on; the default is reached from this machine alone.
        port: None: the first that is free from 7860 on.
        login: the user and password that visitors must give.
        share: ask Gradio for a public address that tunnels to this machine.

    Raises:
        ValueError: the first model cannot be loaded.
        OSError: the port is taken.
    """
    with TemporaryDirectory(prefix="attend-excite-") as folder:
        page = build(Server(Models(models), Path(folder)))
        page.queue(max_size=limits.MAX_WAITING)
        page.launch(
            server_name=host,
            server_port=port,
            auth=login,
            share=share,
            theme=_theme(),
            css=files("attend_excite.app").joinpath("page.css").read_text(encoding="utf-8"),
            footer_links=["api", "settings"],
            allowed_paths=[folder],
            max_file_size=limits.MAX_UPLOAD,
            state_session_capacity=_SESSIONS,
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            prevent_thread_lock=True,
            quiet=True,
        )
        try:
            yield page
        finally:
            page.close(verbose=False)


def build(server: Server) -> gr.Blocks:
    """The page, with all that it does.

    Raises:
        ValueError: the first model cannot be loaded.
    """
    server.models.get("")
    with gr.Blocks(title="Attend-and-Excite", analytics_enabled=False, delete_cache=_CACHE) as page:
        gr.HTML(_HEADER)
        with gr.Row(elem_id="ae-page"):
            with gr.Column(scale=5, min_width=340, elem_id="ae-form"):
                asking = Asking(server)
            with gr.Column(scale=8, min_width=340, elem_id="ae-results"), gr.Tabs() as tabs:
                with gr.Tab("Pictures", id="pictures"):
                    pictures = Pictures()
                with gr.Tab("Compare methods", id="compare"):
                    comparison = Comparison()
                with gr.Tab("Draw again", id="again"):
                    again = Again()
                with gr.Tab("History", id="history"):
                    past = views.clickable(views.history_view([]), elem_id="ae-history")
        gr.HTML(f'<footer class="ae-footer">{limits.SENTENCES}</footer>')
        remembered = gr.BrowserState([], storage_key="attend-excite", secret="attend-excite")
        link, under_way, ticket = (gr.Textbox(visible=False) for _ in range(3))
        stops = Stops()

        stages = {"pictures": pictures.stage, "compare": comparison.stage, "again": again.stage}

        def begin(on: Any, name: str, drawn: Sequence[gr.State] = (), **options: Any) -> Any:
            """Say at once that a run waits for its turn: other visitors' runs may take a while."""

            def wait(request: gr.Request) -> tuple[Any, ...]:
                visitor = str(request.session_hash)
                # A run that Stop ends before its turn must not leave the earlier one as what came out.
                forgotten = [None] * len(drawn)
                return gr.Tabs(selected=name), views.waiting_view(), stops.ticket(visitor), *forgotten

            return on(wait, None, [tabs, stages[name], ticket, *drawn], **options, **AT_ONCE)

        def run(waiting: Any, name: str, work: Any, inputs: list[Any], outputs: list[Any]) -> Any:
            """Join the queue. Where that is full the visitor is told so."""
            running = waiting.then(work, [ticket, *inputs], outputs, **RUN)
            # It fails also where Stop has taken it out of the queue again.
            running.failure(
                lambda ticket: views.problem_view(_BUSY) if stops.wanted(ticket) else gr.skip(),
                ticket,
                stages[name],
                **AT_ONCE,
            )
            return running

        def remember(run: Any, drawn: gr.State) -> None:
            run.then(_remember, [drawn, remembered], [remembered, past, link], **AT_ONCE).then(
                None, link, None, js=_SHOW_LINK
            )

        drawing = run(
            begin(
                partial(gr.on, [asking.draw.click, asking.prompt.submit]),
                "pictures",
                [pictures.drawn],
                js=_SCROLL_ON_PHONES,
            ),
            "pictures",
            _run(server, stops, asking, _draw, pictures.stage, pictures.drawn),
            asking.inputs,
            [pictures.stage, pictures.drawn, asking.seed],
        )
        looked = drawing.then(pictures.look, pictures.drawn, pictures.look_outputs, **AT_ONCE)
        remember(looked, pictures.drawn)
        comparing = run(
            begin(comparison.button.click, "compare", [comparison.drawn]),
            "compare",
            _run(server, stops, asking, compare, comparison.stage, comparison.drawn),
            asking.inputs,
            [comparison.stage, comparison.drawn, asking.seed],
        )
        offered = comparing.then(comparison.offer, comparison.drawn, comparison.files, **AT_ONCE)
        remember(offered, comparison.drawn)
        redrawing = run(
            begin(again.file.upload, "again"), "again", _run_again(server, stops), [again.file], [again.stage]
        )

        def stop(request: gr.Request) -> None:
            stops.press(str(request.session_hash))

        asking.stop.click(stop, None, None, **AT_ONCE)
        # Out of the queue, too, where they have come into it.
        asking.stop.click(None, cancels=[drawing, comparing, redrawing])
        # Queued, and so behind the last step that the run has reported: "Stopped." is shown for good.
        asking.stop.click(
            lambda names: {stages[name]: views.stopped_view() for name in names.split()} or gr.skip(),
            under_way,
            list(stages.values()),
            js=_UNDER_WAY,
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )

        restored = [*asking.filled, *pictures.look_outputs, pictures.drawn, tabs]

        def restore(query: str) -> dict[Any, Any]:
            if not query:
                # Nothing to fill in; the visitor may be typing already.
                return gr.skip()
            try:
                return asking.fill(Form.from_query(query.removeprefix("?")))
            except ValueError as error:
                return {
                    tabs: gr.Tabs(selected="pictures"),
                    pictures.drawn: None,
                    **pictures.look(None),
                    pictures.stage: views.problem_view(views.sentence(error)),
                }

        def restore_remembered(entries: Any, click: gr.EventData) -> dict[Any, Any]:
            return restore(history.entries(entries)[click.index]["query"])

        page.load(restore, link, restored, js=_READ_ADDRESS, **AT_ONCE)
        page.load(lambda entries: views.history_view(history.entries(entries)), remembered, past, **AT_ONCE)
        past.click(restore_remembered, remembered, restored, **AT_ONCE)
        asking.copy_link.click(asking.read_link, asking.inputs, [link, asking.copied], **AT_ONCE).success(
            None, [link, asking.copied], asking.copied, js=_COPY_LINK
        )
        add_endpoints(server, IN_TURN)
    return page


def _run(
    server: Server,
    stops: Stops,
    asking: Asking,
    action: Callable[[Server, Form, Report], None],
    stage: Any,
    drawn: Any,
) -> Callable[..., AsyncIterator[dict[Any, Any]]]:
    """What a press of a button does: read the form, do as it says, show it step by step."""

    async def run(ticket: str, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        yield {drawn: None}
        wanted = partial(stops.wanted, ticket)
        if not wanted():
            return
        try:
            form = asking.read(*values)
        except ValueError as error:
            yield {stage: views.problem_view(views.sentence(error))}
            return
        yield {asking.seed: form.seed}
        async with aclosing(watched(partial(action, server, form), form.seeds, wanted)) as steps:
            async for value in steps:
                if isinstance(value, Drawn):
                    yield {stage: views.drawn_view(value), drawn: value}
                else:
                    yield {stage: value}

    return run


def _draw(server: Server, form: Form, report: Report) -> None:
    """As `actions.draw`, which speaks to programs where no word is chosen."""
    if form.prompt.strip() and not form.subjects and method_named(form.method).uses_subjects:
        raise ValueError("choose at least one word")
    draw(server, form, report)


def _run_again(server: Server, stops: Stops) -> Callable[[str, str], AsyncIterator[str]]:
    async def run(ticket: str, path: str) -> AsyncIterator[str]:
        wanted = partial(stops.wanted, ticket)
        if not wanted():
            return
        async with aclosing(watched(partial(draw_again, server, Path(path)), (), wanted)) as steps:
            async for value in steps:
                if isinstance(value, Redrawn):
                    yield views.redrawn_view(value)
                elif isinstance(value, str):
                    yield value

    return run


def _remember(drawn: Drawn | None, entries: Any) -> tuple[Any, ...]:
    if drawn is None:
        return gr.skip(), gr.skip(), gr.skip()
    entries = history.with_run(history.entries(entries), drawn)
    return entries, views.history_view(entries), drawn.form.to_query()


def _theme() -> themes.Base:
    """Fonts of the visitor's own system: the page asks no other server for anything."""
    return themes.Base(
        primary_hue="orange",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        radius_size="lg",
    ).set(
        # Gradio's own are too pale for WCAG's contrast of 4.5.
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_border_color="*primary_700",
        button_primary_border_color_dark="*primary_700",
    )
