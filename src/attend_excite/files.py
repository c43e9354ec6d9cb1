"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file whole, or not at all: under the name that this gives, which becomes `path` at the end."""
    partial = path.with_name(f".partial-{secrets.token_hex(8)}{path.suffix}")
    try:
        yield partial
        put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> Path:
    """Write bytes, or text in UTF-8, whole or not at all; returns the path."""
    with written_whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def put_in_place(partial: Path, path: Path) -> None:
    """Give a file, or a folder, its name once what is in it has reached the disk.

    The name has reached the disk too when this returns, so that not even a loss of power leaves half a file
    or an empty one under it.
    """
    _to_disk(partial)
    partial.replace(path)
    with suppress(OSError):  # not all file systems let a folder be opened for this
        _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # where a folder can't be opened
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
