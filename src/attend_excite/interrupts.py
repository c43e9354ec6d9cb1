"""Ctrl-C while a caller's model is given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


def to_the_end(undo: Callable[[], None]) -> None:
    """Run a clean-up that can be repeated: Ctrl-C in its midst begins it anew, and is raised at the end.

    So whoever presses Ctrl-C twice gets the model back as it was all the same.
    """
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            undo()
            break
        except KeyboardInterrupt as again:
            interrupted = again
    if interrupted is not None:
        raise interrupted


@contextmanager
def cleaning_up() -> Iterator[ExitStack]:
    """An `ExitStack` that is emptied to its end, whatever Ctrl-C comes meanwhile.

    What is put on it does its own part to the end, as `to_the_end` does it.
    """
    stack = ExitStack()
    try:
        yield stack
    finally:
        to_the_end(stack.close)
