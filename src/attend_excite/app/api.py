"""What programs call: the page's functions by name, with plain values in and out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import api

from attend_excite.app.actions import Drawn, Progress, Redrawn, Report, Server, compare, draw, draw_again
from attend_excite.app.forms import RECOMMENDED, Form, checked_form
from attend_excite.app.guard import Endpoints, Listeners
from attend_excite.app.jobs import Line, Waiting, heard, in_turn
from attend_excite.app.limits import SILENCE, check_picture, check_prompt
from attend_excite.app.parts import is_uploaded
from attend_excite.app.words import words_document, words_of
from attend_excite.pictures import STRENGTH
from attend_excite.subjects import Subject


def add_endpoints(server: Server, line: Line, listeners: Listeners) -> Endpoints:
    """Add /words, /generate, /compare and /reproduce to the page that is being built.

    Args:
        server: what they use.
        line: where those that run a model wait for it.
        listeners: without whom a run ends.

    Returns:
        What each of them takes.
    """

    def words(prompt: str, model: str = "") -> dict[str, Any]:
        """The words of a prompt: how the model splits them, and which are its subjects."""
        with failures_as_errors():
            form = checked_form(prompt=prompt, model=model)
            tokenizer, unread = server.models.tokenizer(form.model), server.models.unread(form.model)
            words, note = words_of(form.prompt, tokenizer, unread_of=unread)
            return words_document(words, note, form.prompt)

    async def generate(
        request: gr.Request,
        prompt: str,
        subjects: list[str] | None = None,
        method: str = "attend-excite",
        recipe: str = RECOMMENDED,
        pictures: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
        model: str = "",
        negative: str = "",
        scheduler: str = "",
        best: bool = False,
        image: dict[str, Any] | None = None,
        strength: float = STRENGTH,
        mask: dict[str, Any] | None = None,
        best_of: int = 1,
    ) -> AsyncIterator[dict[str, Any]]:
        """Draw a prompt with a method and with the plain model, from the same noise.

        Subjects are written as on the command line: "frog", "frog=0.7", "-hat"; none given, they are found.
        With `best` only the picture with the most subjects is kept; `best_of` noises are tried for each
        picture; an `image` is begun from, and drawn where the `mask` is white. Reports {"waiting"}, the runs
        that come first, and {"step", "steps"} on the way, and at the end {"pictures": {method: files},
        "verdicts": {method: [{subject: whether it is there, or null}]}, "seeds", "files", "refused"}.
        """
        form = _form(
            subjects,
            prompt=prompt,
            model=model,
            method=method,
            recipe=recipe,
            pictures=pictures,
            seed=seed,
            steps=steps,
            guidance=guidance,
            width=width,
            height=height,
            negative=negative,
            scheduler=scheduler,
            best=best,
            image=None if image is None else str(_uploaded(image)),
            strength=strength,
            mask=None if mask is None else str(_uploaded(mask)),
            best_of=best_of,
        )
        async for document in documents(partial(draw, server, form), request):
            yield document

    async def compare_methods(
        request: gr.Request,
        prompt: str,
        subjects: list[str] | None = None,
        pictures: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        model: str = "",
        negative: str = "",
        scheduler: str = "",
    ) -> AsyncIterator[dict[str, Any]]:
        """Draw a prompt with every method, from the same noise; reports as /generate does."""
        form = _form(
            subjects,
            prompt=prompt,
            model=model,
            pictures=pictures,
            seed=seed,
            steps=steps,
            guidance=guidance,
            negative=negative,
            scheduler=scheduler,
        )
        async for document in documents(partial(compare, server, form), request):
            yield document

    async def reproduce(request: gr.Request, picture: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Draw the picture of a PNG again, from what the file says of itself.

        Reports as /generate does, and at the end {"picture": file, "verdict", "differing_pixels", "notes"}.
        """
        async for document in documents(partial(draw_again, server, _uploaded(picture)), request):
            yield document

    async def documents(work: Callable[[Report], None], request: gr.Request) -> AsyncIterator[dict[str, Any]]:
        session, address = visitor_of(request, tunnelled=server.tunnelled)
        wanted = heard(lambda: session in listeners, SILENCE)
        with failures_as_errors():
            async with aclosing(in_turn(work, line, address, wanted)) as run:
                async for value in run:
                    yield _document(value)

    functions = {"words": words, "generate": generate, "compare": compare_methods, "reproduce": reproduce}
    for name, function in functions.items():
        # They wait in the line, and not in Gradio's queue.
        api(function, api_name=name, concurrency_limit=None)
    return {name: _parameters(function) for name, function in functions.items()}


@contextmanager
def failures_as_errors() -> Iterator[None]:
    """What is wrong with a request goes to whoever made it, and not to the server's log."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except (gr.Error, GeneratorExit):
        raise
    except Exception as error:
        logging.exception("a request failed")
        raise gr.Error("the server could not finish this: its log says why", print_exception=False) from error


def _parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """A function's parameters by name, and whether each has to be given."""
    taken = inspect.signature(function).parameters.values()
    return {each.name: each.default is each.empty for each in taken if each.name != "request"}


def visitor_of(request: gr.Request, *, tunnelled: bool) -> tuple[str, str]:
    """The session that asks, and where from.

    Whoever comes through Gradio's tunnel, and isn't told apart by it, has this machine's own address: then
    the session stands in its place.
    """
    session, address = str(request.session_hash), request.client.host if request.client else ""
    return session, f"session {session}" if tunnelled and _is_here(address) else address


def _is_here(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return not address


def _form(subjects: Any, **values: Any) -> Form:
    with failures_as_errors():
        if isinstance(subjects, str):
            raise ValueError(f"subjects must be a list, like [{subjects[:40]!r}]")
        if subjects is not None and not (
            isinstance(subjects, list) and all(isinstance(s, str) for s in subjects)
        ):
            raise ValueError('subjects must be a list of texts, like ["cat", "frog=0.7"]')
        for subject in subjects or ():
            check_prompt(subject, "a subject")
        named = None if subjects is None else tuple(map(Subject.from_text, subjects))
        return checked_form(subjects=named, **values)


def _document(value: Progress | Drawn | Redrawn | Waiting) -> dict[str, Any]:
    if isinstance(value, Waiting):
        return {"waiting": value.before}
    if isinstance(value, Progress):
        return {"step": value.done, "steps": value.total}
    if isinstance(value, Drawn):
        return {
            "pictures": {label: list(map(_file, paths)) for label, paths in value.files.items()},
            "verdicts": {label: list(map(dict, row)) for label, row in value.verdicts.items()},
            "seeds": list(value.seeds),
            "files": list(map(_file, value.extras)),
            "refused": dict(value.refused),
        }
    return {
        "picture": _file(value.file),
        "verdict": dict(value.verdict),
        "differing_pixels": value.differing,
        "notes": list(value.notes),
    }


def _uploaded(picture: Any) -> Path:
    """A file that the client has sent; any other of this machine is none of its business."""
    with failures_as_errors():
        path = picture.get("path") if isinstance(picture, dict) else None
        if not isinstance(path, str):
            raise ValueError("the picture is no file: send it with gradio_client's handle_file")
        if not is_uploaded(path):
            raise ValueError("the picture was not uploaded: send it with gradio_client's handle_file")
        check_picture(path)
    return Path(path).resolve()


def _file(path: Path) -> dict[str, Any]:
    """A file that the client fetches."""
    return gr.FileData(path=str(path), orig_name=path.name).model_dump()
