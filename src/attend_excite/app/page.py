"""The page: its halves, and how they work together."""

from __future__ import annotations

import asyncio
import json
import os
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
from attend_excite.app.actions import Drawn, Progress, Report, Server, compare, draw, draw_again, kept
from attend_excite.app.api import add_endpoints, failures_as_errors, visitor_of
from attend_excite.app.asking import Asking
from attend_excite.app.events import AT_ONCE, RUN, watched
from attend_excite.app.forms import Form, says_something
from attend_excite.app.guard import Endpoints, Listeners, check_address, guards
from attend_excite.app.jobs import Line, Stops, heard, in_turn
from attend_excite.app.models import Models
from attend_excite.app.opening import opening_of
from attend_excite.app.parts import Function, picked
from attend_excite.app.showing import Again, Comparison, Pictures
from attend_excite.metadata import read_origin
from attend_excite.methods import method_named

_SESSIONS = 50
"""Visitors whose last run the server keeps for a closer look."""

_CACHE = (3600, 24 * 3600)
"""Seconds between two looks at Gradio's copies of files, and the age at which they go."""

_HEADER = (
    '<header class="ae-header"><h1>Attend-and-Excite</h1><p>Draw everything that a prompt asks for. '
    "Each picture stands beside the plain model's, from the same noise.</p></header>"
)
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
        ValueError: the first model cannot be loaded, or nothing can listen on the address.
    """
    check_address(host, port)
    with TemporaryDirectory(prefix="attend-excite-") as folder:
        listeners = Listeners()
        page, endpoints = build(Server(Models(models), Path(folder), tunnelled=share), listeners)
        with _believing_no_proxy():
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
                app_kwargs={"middleware": guards(listeners, endpoints, _functions(page))},
            )
        try:
            yield page
        finally:
            page.close(verbose=False)


@contextmanager
def _believing_no_proxy() -> Iterator[None]:
    """A server that begins in the block takes no address from X-Forwarded-For, unless its owner has said from
    whom: uvicorn would from everybody on this machine, and visitors' limits go by their addresses."""
    name = "FORWARDED_ALLOW_IPS"
    if name in os.environ:
        yield
        return
    os.environ[name] = ""
    try:
        yield
    finally:
        del os.environ[name]


def build(server: Server, listeners: Listeners) -> tuple[gr.Blocks, Endpoints]:
    """The page, with all that it does, and what programs may call.

    Args:
        server: what all visitors share.
        listeners: who listens to the runs: without one they end.

    Raises:
        ValueError: the first model cannot be loaded.
    """
    first = server.models.get("")
    with gr.Blocks(title="Attend-and-Excite", analytics_enabled=False, delete_cache=_CACHE) as page:
        gr.HTML(_HEADER)
        with gr.Row(elem_id="ae-page"):
            with gr.Column(scale=5, min_width=340, elem_id="ae-form"):
                asking = Asking(server)
            with gr.Column(scale=8, min_width=340, elem_id="ae-results"):
                # Only while something runs: see the style sheet.
                stop = gr.Button("Stop", elem_id="ae-stop")
                with gr.Tabs() as tabs:
                    with gr.Tab("Pictures", id="pictures"):
                        pictures = Pictures(opening_of(first))
                    with gr.Tab("Compare", id="compare"):
                        comparison = Comparison()
                    with gr.Tab("Draw again", id="again"):
                        again = Again()
                    with gr.Tab("History", id="history") as history_tab:
                        past = views.clickable(views.history_view([]), elem_id="ae-history")
        gr.HTML(
            f'<footer class="ae-footer"><details><summary>What this server allows</summary>'
            f"<p>{limits.SENTENCES}</p></details></footer>"
        )
        link, entry, remembered, under_way, ticket = (gr.Textbox(visible=False) for _ in range(5))
        house = _House(server, listeners)
        stages = {"pictures": pictures.stage, "compare": comparison.stage, "again": again.stage}
        unfinished = {name: gr.State(None) for name in stages}

        def begin(on: Any, name: str, *forgotten: gr.State, **options: Any) -> Any:
            """Say at once that a run waits for its turn: other visitors' runs may take a while."""

            def wait() -> tuple[Any, ...]:
                # A run that Stop ends before its turn must not leave the earlier one as what came out.
                nothing = [None] * (1 + len(forgotten))
                return gr.Tabs(selected=name), views.waiting_view(), house.ticket(), *nothing

            return on(
                wait, None, [tabs, stages[name], ticket, unfinished[name], *forgotten], **options, **AT_ONCE
            )

        def remember(run: Any, drawn: gr.State) -> None:
            added = run.then(_remember, drawn, [entry, link], **AT_ONCE)
            added.then(None, link, None, js=_SHOW_LINK)
            added.then(None, entry, remembered, js=history.ADD).then(_history, remembered, past, **AT_ONCE)

        drawing = begin(
            partial(gr.on, [asking.draw.click, asking.prompt.submit]),
            "pictures",
            pictures.drawn,
            js=_SCROLL_ON_PHONES,
        ).then(
            house.run(asking, _draw, pictures.stage, unfinished["pictures"], pictures.drawn),
            [ticket, *asking.inputs],
            [pictures.stage, unfinished["pictures"], pictures.drawn, asking.seed],
            **RUN,
        )
        looked = drawing.then(pictures.look, pictures.drawn, pictures.look_outputs, **AT_ONCE)
        remember(looked, pictures.drawn)
        comparing = begin(comparison.button.click, "compare", comparison.drawn).then(
            house.run(asking, compare, comparison.stage, unfinished["compare"], comparison.drawn),
            [ticket, *asking.inputs],
            [comparison.stage, unfinished["compare"], comparison.drawn, asking.seed],
            **RUN,
        )
        offered = comparing.then(comparison.offer, comparison.drawn, comparison.files, **AT_ONCE)
        remember(offered, comparison.drawn)
        redrawing = begin(again.file.upload, "again").then(
            house.run_again(again.stage, unfinished["again"], again.use),
            [ticket, again.file],
            [again.stage, unfinished["again"], again.use],
            **RUN,
        )

        def stopped(names: str | None, *latest: Any) -> dict[Any, Any]:
            shown = dict(zip(stages, latest, strict=True))
            views_of = {
                stages[name]: views.stopped_view(*(shown[name] or ()))
                for name in (names or "").split()
                if name in stages
            }
            return views_of or gr.skip()

        stop.click(house.stop, None, None, **AT_ONCE)
        # Out of Gradio's hands, too, where they have come into them.
        stop.click(None, cancels=[drawing, comparing, redrawing])
        # Queued, and so behind the last step that the run has reported: "Stopped" is shown for good.
        stop.click(
            stopped,
            [under_way, *unfinished.values()],
            list(stages.values()),
            js=_UNDER_WAY,
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )

        buttons = [asking.draw, comparison.button]
        restored = [*asking.filled, *pictures.look_outputs, pictures.drawn, tabs, *buttons]

        def restore(query: str | None) -> dict[Any, Any]:
            query = (query or "").removeprefix("?")
            ready: dict[Any, Any] = {button: gr.Button(interactive=True) for button in buttons}
            try:
                if not says_something(query):
                    # Nothing to fill in; the visitor may be typing already.
                    return ready
                return asking.fill(Form.from_query(query)) | ready
            except ValueError as error:
                return ready | {
                    tabs: gr.Tabs(selected="pictures"),
                    pictures.drawn: None,
                    **pictures.look(None),
                    pictures.stage: views.problem_view(views.sentence(error)),
                }

        def restore_remembered(text: str | None, click: gr.EventData) -> dict[Any, Any]:
            with failures_as_errors():
                entry = picked(history.entries(text), click.index, "earlier run")
            found = kept(server, entry["folder"], entry["files"])
            shown = views.gone_view(entry["title"]) if found is None else views.kept_view(found)
            earlier = {
                pictures.drawn: None,
                **pictures.look(None),
                pictures.stage: shown,
                tabs: gr.Tabs(selected="pictures"),
            }
            return earlier | restore(entry["query"])

        def fill_in(picture: str | None) -> dict[Any, Any]:
            with failures_as_errors():
                if picture is None:
                    raise ValueError("drop a picture first")
                origin = read_origin(Path(picture))
                model = server.models.get(origin.settings.model)
                return asking.fill(Form.from_settings(origin.settings, origin.seed, model)) | {
                    tabs: gr.Tabs(selected="pictures")
                }

        page.load(restore, link, restored, js=_READ_ADDRESS, **AT_ONCE)
        for on in (page.load, history_tab.select):
            on(None, None, remembered, js=history.READ).then(_history, remembered, past, **AT_ONCE)
        past.click(restore_remembered, remembered, restored, **AT_ONCE)
        again.use.click(fill_in, again.file, [*asking.filled, tabs], **AT_ONCE)
        asking.copy_link.click(asking.read_link, asking.inputs, [link, asking.copied], **AT_ONCE).success(
            None, [link, asking.copied], asking.copied, js=_COPY_LINK
        )
        endpoints = add_endpoints(server, house.line, listeners)
    return page, endpoints


def _functions(page: gr.Blocks) -> dict[int, Function]:
    """The page's functions by number; those of the browser alone are none."""
    return {
        number: Function(tuple(part.get_block_name() for part in each.inputs), each.collects_event_data)
        for number, each in page.fns.items()
        if each.fn is not None
    }


class _House:
    """What the page's runs share: whose turn it is, who has pressed Stop, and who listens."""

    def __init__(self, server: Server, listeners: Listeners) -> None:
        self.line = Line(limits.MAX_WAITING, limits.MAX_WAITING_EACH)
        self._server, self._listeners, self._stops = server, listeners, Stops()

    def ticket(self) -> str:
        """Of a run that a visitor asks for now."""
        return str(self._stops.ticket())

    def stop(self, request: gr.Request) -> None:
        """End all that a visitor has asked for."""
        self._stops.press(str(request.session_hash))

    def run(
        self,
        asking: Asking,
        action: Callable[[Server, Form, Report], None],
        stage: Any,
        unfinished: Any,
        drawn: Any,
    ) -> Callable[..., AsyncIterator[dict[Any, Any]]]:
        """What a press of a button does: read the form, do as it says, show it step by step."""

        async def run(request: gr.Request, ticket: str | None, *values: Any) -> AsyncIterator[dict[Any, Any]]:
            yield {drawn: None}
            if not self._wanted(request, ticket):
                return
            try:
                # It may have to load a model, while other visitors wait for their answers.
                form = await asyncio.to_thread(asking.read, *values)
            except ValueError as error:
                yield {stage: views.problem_view(views.sentence(error))}
                return
            yield {asking.seed: form.seed}
            async for shown, value in self._watched(
                partial(action, self._server, form), form.seeds, request, ticket
            ):
                if isinstance(value, Drawn):
                    yield {stage: shown, drawn: value}
                elif isinstance(value, Progress):
                    yield {stage: shown, unfinished: (value, form.seeds)}
                else:
                    yield {stage: shown}

        return run

    def run_again(
        self, stage: Any, unfinished: Any, use: Any
    ) -> Callable[..., AsyncIterator[dict[Any, Any]]]:
        """What a dropped picture does."""

        async def run(
            request: gr.Request, ticket: str | None, path: str | None
        ) -> AsyncIterator[dict[Any, Any]]:
            if path is None or not self._wanted(request, ticket):
                return
            work = partial(draw_again, self._server, Path(path))
            yield {use: gr.Button(interactive=True)}
            async for shown, value in self._watched(work, (), request, ticket):
                if isinstance(value, Progress):
                    yield {stage: shown, unfinished: (value, ())}
                else:
                    yield {stage: shown}

        return run

    def _wanted(self, request: gr.Request, ticket: str | None) -> bool:
        ticket = ticket or ""
        # Python reads no number of thousands of digits.
        number = int(ticket) if ticket.isdecimal() and len(ticket) <= limits.MAX_TICKET else 0
        return self._stops.wanted(str(request.session_hash), number)

    async def _watched(
        self, work: Callable[[Report], None], seeds: Sequence[int], request: gr.Request, ticket: str | None
    ) -> AsyncIterator[tuple[str, Any]]:
        session, address = visitor_of(request, tunnelled=self._server.tunnelled)
        listened = heard(lambda: session in self._listeners, limits.SILENCE)

        def wanted() -> bool:
            return self._wanted(request, ticket) and listened()

        async with aclosing(watched(in_turn(work, self.line, address, wanted), seeds)) as steps:
            async for step in steps:
                yield step


def _draw(server: Server, form: Form, report: Report) -> None:
    """As `actions.draw`, which speaks to programs where no word is chosen."""
    if form.prompt.strip() and not form.subjects and method_named(form.method).uses_subjects:
        raise ValueError("choose at least one word")
    draw(server, form, report)


def _remember(drawn: Drawn | None) -> tuple[Any, ...]:
    """The run for the browser's memory, and the link to it."""
    return ("", "") if drawn is None else (history.entry_of(drawn), drawn.form.to_query())


def _history(text: str) -> str:
    return views.history_view(history.entries(text))


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
