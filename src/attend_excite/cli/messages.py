"""What the command line says besides its results: one sentence each, on stderr."""

from __future__ import annotations

import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from attend_excite.memory import is_out_of_memory

MESSAGES = Console(stderr=True)

BAD_INPUT = 2
FAILED = 1
STOPPED = 130

# Of Python's own, and no sentences for people.
_UNFORESEEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RecursionError,
    TypeError,
)


class Terminated(KeyboardInterrupt):
    """The system asked the program to end: all that was begun is cleaned up, as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def end_tidily() -> None:
    """SIGTERM and SIGHUP clean up before they end the program; one that is ignored, as by nohup, stays so."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP.
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _terminate)


def _terminate(number: int, _: Any) -> None:
    raise Terminated(number)


@contextmanager
def failures_as_sentences(
    *, stopped: str | Callable[[], str] = "stopped", out_of_memory: str = "out of memory"
) -> Iterator[None]:
    """Any failure inside ends the program with one sentence and an exit status; warnings are sentences.

    The library's own `ValueError`s speak of the input, and are worded for people.

    Args:
        stopped: what is said after Ctrl-C: what became of the work, or what gives that sentence then.
        out_of_memory: what is said then: how to need less.
    """
    said = set[str]()

    def say_once(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            warn(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The filter "once" says it once a module that calls.
        warnings.filterwarnings("always", category=UserWarning, module="attend_excite")
        warnings.showwarning = say_once
        try:
            yield
        except KeyboardInterrupt as stop:
            status = 128 + stop.number if isinstance(stop, Terminated) else STOPPED
            raise _exit(stopped if isinstance(stopped, str) else stopped(), status) from None
        except (typer.Exit, BrokenPipeError):
            raise
        except UnicodeEncodeError:
            raise _exit("something that was typed is no text in UTF-8: type it again", BAD_INPUT) from None
        except ValueError as error:
            raise _exit(str(error), BAD_INPUT) from None
        except Exception as error:
            raise _exit(_explained(error, out_of_memory), FAILED) from None


def given_path(text: str | Path) -> Path:
    """A path as it was typed, or the default. An empty one, as from a variable that isn't set, is not the
    current folder."""
    if not str(text).strip():
        raise typer.BadParameter("it is empty: give a path, or . for the current folder")
    if "\0" in str(text):
        raise typer.BadParameter("it has a null byte, which no path has")
    return Path(text)


def quieten_libraries() -> None:
    """No bars and notices of diffusers and transformers between ours; downloads keep theirs."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def quieten_imports() -> None:
    """The same for what transformers says while it is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


# What moves the cursor, sets colours, rings or turns the direction of writing; not tab and line feed.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text of a file, a picture or a prompt as a terminal may have it: what would steer the terminal is
    spelled out, as "\\u001b". Inside a JSON document it still means the same."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def plain(text: str) -> Text:
    """Anyone's text for a console: no markup in it counts, and nothing in it steers the terminal."""
    return Text(printable(text))


def warn(message: str) -> None:
    """Say something that does not end the program."""
    _say("warning", "bold yellow", message)


def _exit(message: str, status: int) -> typer.Exit:
    _say("error", "bold red", message)
    return typer.Exit(status)


def _say(kind: str, style: str, message: str) -> None:
    sentence = printable(" ".join(message.split()))
    MESSAGES.print(Text.assemble((f"{kind}: ", style), sentence), soft_wrap=True)


def _explained(error: Exception, out_of_memory: str) -> str:
    message = str(error).strip().split("\n", 1)[0]
    if is_out_of_memory(error):
        return out_of_memory
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"'{error.filename}' cannot be used: {error.strerror}"
    if isinstance(error, _UNFORESEEN):
        return f"the program met what it wasn't made for, {type(error).__name__}: {message}"
    return message or type(error).__name__
