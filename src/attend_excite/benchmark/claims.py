"""Claims: several runs in one folder, on one machine or many, and no job done twice.

Whoever creates the file of a claim first has it: the file system decides, local, shared or an object store.
Each run shows that it is alive by rewriting one file of its own. A run whose file has stayed the same for
`SILENCE` seconds of the observer's own clock was killed, and its claims are free: the next to have one is
whoever first creates the file of the next generation, so nothing is taken away while another looks at it.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import cast
from uuid import uuid4

from attend_excite.benchmark.store import open_folder, write_file

HEARTBEAT = 3.0
SILENCE = 20.0
"""Seconds between two signs of life, and after how many without one a run counts as killed."""


class Claims:
    """The claims of one run, for the length of a `with` block; what it still holds at the end is released."""

    def __init__(self, run: str | Path) -> None:
        self._files, root = open_folder(run)
        self._folder = f"{root}/claims"
        self._owner = uuid4().hex
        self._held: dict[str, int] = {}
        self._last_signs: dict[str, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claims:
        self._give_sign(0)
        # Watching the others begins now, not at the first claim of theirs that is met.
        for path in self._files.find(self._folder):
            name = Path(path).name
            if name.endswith(".alive") and not name.startswith("."):
                self._is_silent(Path(path).stem, self._read(path) or b"")
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._heart.join()
        for name in list(self._held):
            self.release(name)
        self._remove(self._sign(self._owner))

    def take(self, name: str) -> bool:
        """Claim a job. False: another run that is alive has it."""
        generation, dead = 0, b""
        while True:
            path = f"{self._folder}/{name}.{generation}"
            try:
                with self._files.open(path, "xb") as file:
                    file.write(self._owner.encode())  # type: ignore[arg-type]
            except FileExistsError:
                owner = self._read(path)
                if owner is None or not self._is_dead(path, owner):
                    return False
                generation, dead = generation + 1, owner
            else:
                # The dead one's claim may have been inherited and released while we looked at it.
                if generation and self._read(f"{self._folder}/{name}.{generation - 1}") != dead:
                    self._remove(path)
                    return False
                self._held[name] = generation
                return True

    def release(self, name: str) -> None:
        """Let go of a job, if it was claimed: it is done, or left to others."""
        for generation in range(self._held.pop(name, -1) + 1):
            self._remove(f"{self._folder}/{name}.{generation}")

    def _is_dead(self, path: str, owner: bytes) -> bool:
        # The file is there a moment before its content.
        if not owner:
            return self._is_silent(path, owner)
        sign = self._read(self._sign(owner.decode()))
        return sign is None or self._is_silent(owner.decode(), sign)

    def _is_silent(self, key: str, sign: bytes) -> bool:
        last, since = self._last_signs.get(key, (None, 0.0))
        if sign == last:
            return time.monotonic() - since > SILENCE
        self._last_signs[key] = (sign, time.monotonic())
        return False

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(HEARTBEAT):
            count += 1
            # Storage that cannot be reached for a moment must not end the signs for good.
            with suppress(OSError):
                self._give_sign(count)

    def _give_sign(self, count: int) -> None:
        write_file(self._files, self._sign(self._owner), str(count).encode())

    def _sign(self, owner: str) -> str:
        return f"{self._folder}/{owner}.alive"

    def _read(self, path: str) -> bytes | None:
        try:
            return cast(bytes, self._files.cat_file(path))
        except FileNotFoundError:
            return None

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._files.rm_file(path)
