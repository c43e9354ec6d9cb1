"""How a run is interrupted."""

from __future__ import annotations

interrupted = False


class InterruptProcessingException(Exception):
    pass


def throw_exception_if_processing_interrupted() -> None:
    if interrupted:
        raise InterruptProcessingException
