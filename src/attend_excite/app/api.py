"""What programs call: the page's functions by name, with plain values in and out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import api
from gradio.utils import get_upload_folder

from attend_excite.app.actions import Drawn, Progress, Report, Server, compare, draw, draw_again
from attend_excite.app.forms import RECOMMENDED, Form
from attend_excite.app.jobs import reports
from attend_excite.app.words import words_document, words_of
from attend_excite.subjects import Subject


def add_endpoints(server: Server, in_turn: Mapping[str, Any]) -> None:
    """Add /words, /generate, /compare and /reproduce to the page that is being built.

    Args:
        server: what they use.
        in_turn: how those that run a model share it, as arguments of `gradio.api`.
    """

    def words(prompt: str, model: str = "") -> dict[str, Any]:
        """The words of a prompt: how the model splits them, and which are its subjects."""
        with failures_as_errors():
            return words_document(*words_of(prompt, server.models.tokenizer(model)))

    async def generate(
        prompt: str,
        subjects: list[str] | None = None,
        method: str = "attend-excite",
        recipe: str = RECOMMENDED,
        pictures: int = 1,
        seed: int = 0,
        steps: int = 50,
        guidance: float = 7.5,
        width: int | None = None,
        height: int | None = None,
        model: str = "",
    ) -> AsyncIterator[dict[str, Any]]:
        """Draw a prompt with a method and with the plain model, from the same noise.

        Subjects are written as on the command line: "frog", "frog=0.7", "-hat"; none given, they are found.
        Reports {"step", "steps"} on the way, and at the end {"pictures": {method: files}, "files"}.
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
        )
        async for document in _documents(partial(draw, server, form)):
            yield document

    async def compare_methods(
        prompt: str,
        subjects: list[str] | None = None,
        pictures: int = 1,
        seed: int = 0,
        steps: int = 50,
        guidance: float = 7.5,
        model: str = "",
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
        )
        async for document in _documents(partial(compare, server, form)):
            yield document

    async def reproduce(picture: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Draw the picture of a PNG again, from what the file says of itself.

        Reports as /generate does, and at the end {"picture": file, "differing_pixels", "notes"}.
        """
        async for document in _documents(partial(draw_again, server, _uploaded(picture))):
            yield document

    api(words, api_name="words", concurrency_limit=None)
    api(generate, api_name="generate", **in_turn)
    api(compare_methods, api_name="compare", **in_turn)
    api(reproduce, api_name="reproduce", **in_turn)


@contextmanager
def failures_as_errors() -> Iterator[None]:
    """What is wrong with a request goes to whoever made it, and not to the server's log."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _form(subjects: list[str] | None, **values: Any) -> Form:
    with failures_as_errors():
        if isinstance(subjects, str):
            raise ValueError(f"subjects must be a list, like [{subjects!r}]")
        return Form(subjects=None if subjects is None else tuple(map(Subject.from_text, subjects)), **values)


async def _documents(work: Callable[[Report], None]) -> AsyncIterator[dict[str, Any]]:
    with failures_as_errors():
        async with aclosing(reports(work)) as run:
            async for value in run:
                if isinstance(value, Progress):
                    yield {"step": value.done, "steps": value.total}
                elif isinstance(value, Drawn):
                    pictures = {label: list(map(_file, paths)) for label, paths in value.files.items()}
                    extras = list(map(_file, value.extras))
                    yield {"pictures": pictures, "files": extras, "refused": dict(value.refused)}
                else:
                    yield {
                        "picture": _file(value.file),
                        "differing_pixels": value.differing,
                        "notes": list(value.notes),
                    }


def _uploaded(picture: Mapping[str, Any]) -> Path:
    """A file that the client has sent; any other of this machine is none of its business."""
    path = Path(str(picture.get("path", ""))).resolve()
    with failures_as_errors():
        if not path.is_relative_to(Path(get_upload_folder()).resolve()):
            raise ValueError("the picture was not uploaded: send it with gradio_client's handle_file")
    return path


def _file(path: Path) -> dict[str, Any]:
    """A file that the client fetches."""
    return gr.FileData(path=str(path), orig_name=path.name).model_dump()
